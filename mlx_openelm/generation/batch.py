"""Many prompts at once: rows go on together, and one that is done makes room for the next prompt."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..cache.config import CacheConfig
from ..errors import CacheError, PromptError
from ..machine.device import pays_to_compile, wired_memory
from ..model.openelm import OpenELM
from ..tokenizer.tokenizer import Tokenizer
from .engine import MAX_TOKENS, DecodeBatch, as_prompt, check_memory
from .sampling import SamplingConfig
from .text import Generation, TextStream, check_request

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

    What cannot be done is told at once, before anything is computed.

    Each row gives what its prompt gives alone; only that with `quantize_after` all rows are quantized once one is long
    enough. The prompt of number n is sampled with the seed plus n; without a seed, one is drawn for all.

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
        raise PromptError(f"batch_size must be at least 1; got {batch_size}")
    if cache.window is not None and batch_size > 1:
        raise CacheError("a window serves one row at a time; leave it out, or take a batch size of 1")
    numbers = list(range(len(prompts)) if numbers is None else numbers)
    ids: dict[int, mx.array] = {}
    for number in numbers:
        prompt = prompts[number]
        check_request(prompt, max_tokens)
        ids[number] = as_prompt(model, tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
    if ids:
        check_memory(model, max(tokens.size for tokens in ids.values()) + max_tokens, cache, batch_size)
    compiled = pays_to_compile(max_tokens) if compiled is None else compiled
    sampling = sampling.with_seed()
    rows = DecodeBatch(model, sampling, compiled=compiled)
    stop = tuple(stop)

    def begin(number: int) -> "_Running":
        seed = None if sampling.seed is None else sampling.seed + number
        text = TextStream(
            model, tokenizer, ids[number].size, max_tokens, stop, seed=None if sampling.is_greedy else seed
        )
        row = rows.add(ids.pop(number), model.make_cache(cache), seed=seed)
        prompt = prompts[number]
        return _Running(row, number, text, Generation(prompt if isinstance(prompt, str) else ""))

    return _in_turn(rows, batch_size, iter(numbers), begin)


@dataclass
class _Running:
    """A row that goes on."""

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
            for row, step in rows.step(more=any(one.text.goes_on for one in running.values())).items():
                one = running[row]
                one.generation.add(one.text.push(step))
                if one.generation.finish_reason:
                    rows.remove(row)
                    del running[row]
                    yield one.number, one.generation
