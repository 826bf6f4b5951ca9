"""Many prompts at once: rows are decoded together, and the next prompt takes the slot of a finished row."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..cache.config import CacheConfig
from ..errors import CacheError, PromptError
from ..machine.device import pays_to_compile, wired_memory
from ..model.openelm import OpenELM
from ..tokenizer.tokenizer import Tokenizer
from .defaults import default_sampling
from .engine import BATCH_SIZE, MAX_TOKENS, DecodeBatch, as_prompt, check_memory
from .sampling import SamplingConfig
from .text import Generation, TextStream, check_request


def generate_batch(
    model: OpenELM,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    *,
    batch_size: int = BATCH_SIZE,
    max_tokens: int = MAX_TOKENS,
    sampling: SamplingConfig | None = None,
    stop: Iterable[str] = (),
    cache: CacheConfig = CacheConfig(),  # noqa: B008, frozen
    numbers: Iterable[int] | None = None,
    compiled: bool | None = None,
) -> Iterator[tuple[int, Generation]]:
    """Continue many prompts; yield each prompt's number and generation as soon as it is finished.

    The text of each prompt is the same as on its own, except that with `quantize_after` all rows are quantized once one
    of them is long enough. Prompt n is sampled with the seed plus n; without a seed, a random one is used.

    Args:
        prompts: texts or ids, as for `stream_generate`.
        batch_size: rows decoded at once, at least 1.
        sampling: by default that of the model, as for `stream_generate`.
        numbers: indices of the prompts to continue, in this order; by default all.
        compiled: as for `generate_tokens`.

    Raises:
        PromptError, CacheError, MemoryLimitError: as for `check_batch`, before anything is computed.
    """
    numbers = list(range(len(prompts)) if numbers is None else numbers)
    ids: dict[int, Sequence[int]] = {}
    for number in numbers:
        prompt = prompts[number]
        ids[number] = tokenizer.encode(prompt) if isinstance(prompt, str) and prompt else prompt  # type: ignore[assignment]
    arrays = check_batch(model, list(ids.values()), batch_size=batch_size, max_tokens=max_tokens, cache=cache)
    waiting = dict(zip(ids, arrays, strict=True))
    compiled = pays_to_compile(max_tokens) if compiled is None else compiled
    sampling = (sampling or default_sampling(model)).with_seed()
    rows = DecodeBatch(model, sampling, compiled=compiled)
    stop = tuple(stop)

    def begin(number: int) -> "_Running":
        seed = None if sampling.seed is None else sampling.seed + number
        tokens = waiting.pop(number)
        text = TextStream(model, tokenizer, tokens.size, max_tokens, stop, seed=None if sampling.is_greedy else seed)
        row = rows.add(tokens, model.make_cache(cache), seed=seed)
        prompt = prompts[number]
        return _Running(row, number, text, Generation(prompt if isinstance(prompt, str) else ""))

    return _in_turn(rows, batch_size, iter(numbers), begin)


def check_batch(
    model: OpenELM,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int = BATCH_SIZE,
    max_tokens: int = MAX_TOKENS,
    cache: CacheConfig = CacheConfig(),  # noqa: B008, frozen
) -> list[mx.array]:
    """Check that `generate_batch` can continue these ids, and return each as an array (L,).

    Raises:
        PromptError: if a prompt is empty or outside the vocabulary, or `batch_size` or `max_tokens` is below 1.
        CacheError: if the cache keeps a window and `batch_size` is above 1.
        MemoryLimitError: if `batch_size` rows do not fit into memory.
    """
    if batch_size < 1:
        raise PromptError(f"batch_size must be at least 1; got {batch_size}")
    if cache.window is not None and batch_size > 1:
        raise CacheError("`window` requires `batch_size=1`")
    arrays = []
    for prompt in prompts:
        check_request(prompt, max_tokens)
        arrays.append(as_prompt(model, prompt))
    if arrays:
        check_memory(model, max(array.size for array in arrays) + max_tokens, cache, batch_size)
    return arrays


@dataclass
class _Running:
    """An unfinished row."""

    row: int
    number: int
    text: TextStream
    generation: Generation


def _in_turn(
    rows: DecodeBatch, batch_size: int, waiting: Iterator[int], begin: Callable[[int], _Running]
) -> Iterator[tuple[int, Generation]]:
    running: dict[int, _Running] = {}
    with wired_memory():
        while True:
            while len(rows) < batch_size and (number := next(waiting, None)) is not None:
                new = begin(number)
                running[new.row] = new
            if not running:
                return
            for row, step in rows.step(more=any(one.text.wants_more for one in running.values())).items():
                one = running[row]
                one.generation.add(one.text.push(step))
                if one.generation.finish_reason:
                    rows.remove(row)
                    del running[row]
                    yield one.number, one.generation
