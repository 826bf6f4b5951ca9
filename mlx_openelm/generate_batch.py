"""Many prompts at once: rows go on together, and one that is done makes room for the next prompt."""

from collections.abc import Iterable, Iterator, Sequence

from .cache import CacheConfig
from .device import pays_to_compile, wired_memory
from .engine import MAX_TOKENS, Rows, as_prompt, check_memory
from .errors import CacheError, PromptError
from .generate import GeneratingRow, Generation, check_request
from .model import OpenELM
from .sampling import SamplingConfig
from .tokenizer import Tokenizer

BATCH_SIZE = 8


def generate_batch(
    model: OpenELM,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    *,
    batch_size: int = BATCH_SIZE,
    max_tokens: int = MAX_TOKENS,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008, frozen
    stop: Iterable[str] = (),
    cache: CacheConfig = CacheConfig(),  # noqa: B008, frozen
    numbers: Iterable[int] | None = None,
    compiled: bool | None = None,
) -> Iterator[tuple[int, Generation]]:
    """Continue many prompts; gives each generation with its prompt's number as soon as it is done.

    Each row gives what its prompt gives alone; only that with `quantize_after` all rows are quantized once one is long
    enough. Where there is a seed, the prompt of number n has the seed plus n.

    Args:
        prompts: as of `stream_generate`.
        batch_size: how many rows go on together, at least 1.
        numbers: of the prompts to continue, and in which order; by default all.
        compiled: as of `generate_tokens`.

    Raises:
        PromptError: if a prompt is empty, or no row or token is asked for.
        CacheError: if the cache shall keep a window, which serves one row.
        MemoryLimitError: if so many rows do not fit into memory.
    """
    if batch_size < 1:
        raise PromptError(f"the batch size is {batch_size}; it has to be at least 1")
    if cache.window is not None and batch_size > 1:
        raise CacheError("a window serves one row at a time; leave it out, or take a batch size of 1")
    waiting = iter(list(range(len(prompts)) if numbers is None else numbers))
    stop = tuple(stop)
    compiled = pays_to_compile(max_tokens) if compiled is None else compiled
    rows = Rows(model, sampling, compiled=compiled)
    running: dict[int, tuple[int, Generation, GeneratingRow]] = {}
    with wired_memory():
        while True:
            while len(rows) < batch_size and (number := next(waiting, None)) is not None:
                prompt = prompts[number]
                check_request(prompt, max_tokens)
                ids = as_prompt(model, tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
                check_memory(model, ids.size + max_tokens, cache, batch_size)
                seed = None if sampling.seed is None else sampling.seed + number
                text = GeneratingRow(model, tokenizer, ids.size, max_tokens, stop)
                row = rows.add(ids, model.make_cache(cache), seed=seed)
                running[row] = number, Generation(prompt if isinstance(prompt, str) else ""), text
            if not running:
                return
            for row, step in rows.step(more=any(text.goes_on for _, _, text in running.values())).items():
                number, generation, text = running[row]
                generation.add(text.push(step))
                if generation.finish_reason:
                    rows.remove(row)
                    del running[row]
                    yield number, generation
