"""`openelm-mlx generate`: a prompt, or a file of prompts."""

from __future__ import annotations

import sys
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..cache.config import CacheConfig
from ..conversion.open import open_model
from ..errors import OutputError, OutputExistsError, PromptError, TokenizerError
from ..files.output import OutputFile, output_file
from ..files.paths import exists, is_folder
from ..generation.drafters import DEFAULT_MAX_DRAFT, Drafter, DraftModel, PromptLookup
from ..generation.engine import BATCH_SIZE, MAX_TOKENS
from ..generation.prompt_cache import PromptCache, model_fingerprint, write_prompt_cache
from ..generation.sampling import SamplingConfig
from ..generation.text import Generation, Stats, stream_generate
from ..hub import BUILT_IN_MODEL
from ..loading import dtype_named, load, load_source
from ..model.openelm import OpenELM
from ..tokenizer.example_format import parse_columns
from ..tokenizer.tokenizer import Tokenizer
from .interrupts import INTERRUPTED, uninterrupted
from .options import (
    Adapter,
    Dtype,
    Json,
    KvBits,
    KvSinks,
    MaxKvSize,
    MaxTokens,
    MinP,
    Model,
    PromptCacheFile,
    QuantizedKvStart,
    RepetitionContext,
    RepetitionPenalty,
    Revision,
    Seed,
    Stop,
    System,
    Temperature,
    TokenizerOption,
    TopK,
    TopP,
    examples,
)
from .streams import console, is_terminal, read_stdin, styled
from .terminal import fail, mib, print_json, say, write, write_error, write_styled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EXAMPLES = examples(
    'openelm-mlx generate --prompt "Once upon a time there was"',
    'openelm-mlx generate -m OpenELM-1_1B --prompt "The capital of France is" --max-tokens 20',
    "openelm-mlx generate -m OpenELM-1_1B --prompt - --temperature 0.7 --repetition-penalty 1.2 < story.txt",
    'openelm-mlx generate -m OpenELM-3B --draft-model OpenELM-270M --prompt "Dear friend,"',
    "openelm-mlx generate -m OpenELM-1_1B --input prompts.jsonl --output answers.jsonl --batch-size 8",
)


def generate(
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text to continue, or - for stdin.", metavar="TEXT|-")
    ] = None,
    model: Model = BUILT_IN_MODEL,
    max_tokens: MaxTokens = MAX_TOKENS,
    temperature: Temperature = SamplingConfig.temperature,
    top_p: TopP = SamplingConfig.top_p,
    top_k: TopK = SamplingConfig.top_k,
    min_p: MinP = SamplingConfig.min_p,
    repetition_penalty: RepetitionPenalty = SamplingConfig.repetition_penalty,
    repetition_context: RepetitionContext = SamplingConfig.repetition_context,
    stop: Stop = None,
    seed: Seed = SamplingConfig.seed,
    as_json: Json = False,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw", help="Use the chat template or plain text; default: the template if there is one."
        ),
    ] = None,
    system: System = None,
    dtype: Dtype = "auto",
    tokenizer: TokenizerOption = None,
    adapter: Adapter = None,
    revision: Revision = None,
    draft_model: Annotated[
        str | None, typer.Option(help="Draft model for speculative decoding; the output is unchanged.", metavar="M")
    ] = None,
    num_draft_tokens: Annotated[
        int,
        typer.Option(help="Maximum tokens drafted at once with --draft-model; adjusted automatically.", metavar="N"),
    ] = DEFAULT_MAX_DRAFT,
    prompt_lookup: Annotated[
        int,
        typer.Option(help="Prompt-lookup decoding with up to N draft tokens; 0: off.", metavar="N"),
    ] = 0,
    kv_bits: KvBits = CacheConfig.bits,
    quantized_kv_start: QuantizedKvStart = CacheConfig.quantize_after,
    max_kv_size: MaxKvSize = CacheConfig.window,
    kv_sinks: KvSinks = CacheConfig.sinks,
    prompt_cache: PromptCacheFile = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--input", "-i", help="File of prompts: .jsonl, .json, .csv or .parquet.", metavar="FILE"),
    ] = None,
    columns: Annotated[
        str, typer.Option(help="Field names in the --input file, such as prompt=question.", metavar="NAMES")
    ] = "",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="JSONL file for the answers, in the order of the prompts.", metavar="FILE"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts decoded at once.", metavar="N")] = BATCH_SIZE,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the answer file.")] = False,
) -> None:
    """Continue a prompt, or answer it with an Instruct model; with --input, do so for every prompt in a file."""
    sampling = SamplingConfig(temperature, top_p, top_k, min_p, repetition_penalty, repetition_context, seed)
    kept = CacheConfig(kv_bits, quantized_kv_start, max_kv_size, kv_sinks)
    if (prompt is None) == (prompts is None):
        raise PromptError(
            "give --prompt, or a file of prompts with --input"
            if prompt is None
            else "--prompt and --input are mutually exclusive"
        )
    named = parse_columns(columns)
    text = _read_stdin() if prompt == "-" else prompt
    if text == "":
        raise PromptError("the prompt is empty")
    _check_options(text, columns, output, force, draft_model, prompt_lookup, prompt_cache, as_json)
    # Before the model is loaded, so that a second process fails at once.
    answers = context.with_resource(output_file(output, overwrite=force)) if output else None
    cache_file = context.with_resource(output_file(prompt_cache, overwrite=True)) if prompt_cache else None
    for claimed in filter(None, (answers, cache_file)):
        claimed.protect(prompts)
    network, tokens = load(model, dtype=dtype_named(dtype), tokenizer=tokenizer, revision=revision, adapter=adapter)
    asked = tokens.prompt_format(chat, system)
    if text is None:
        options: dict[str, Any] = {"max_tokens": max_tokens, "sampling": sampling, "stop": stop or (), "cache": kept}
        about = {"chat": chat, "system": system, "columns": named}
        _answer_file(network, tokens, prompts, answers, batch_size, options, about)  # type: ignore[arg-type]
        return
    ids = tokens.encode_as(asked, text, system=system)

    result = Generation(text)
    interrupted = False
    with open_prompt_cache(network, cache_file, kept) as cache:
        chunks = stream_generate(
            network,
            tokens,
            ids,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop or (),
            cache=cache,
            drafter=_drafter(draft_model, num_draft_tokens, prompt_lookup, dtype, tokens),
        )
        if is_terminal(sys.stdout) and not as_json and asked.style == "plain":
            write_styled(asked.prompt_text(text), "dim")
        try:
            for chunk in chunks:
                result.add(chunk)
                if not as_json:
                    write(chunk.text, end="")
        except KeyboardInterrupt:
            interrupted = True
            result.finish_reason = "interrupted"
        chunks.close()
        if as_json:
            print_json(result.to_dict())
        else:
            write("")
            print_stats(result.stats)
    if interrupted:
        fail("interrupted", INTERRUPTED)


@contextmanager
def open_prompt_cache(network: OpenELM, output: OutputFile | None, config: CacheConfig) -> Iterator[PromptCache]:
    """Load the KV cache of earlier runs, if any, and always write it back afterwards."""
    if output is None:
        yield PromptCache(network, config)
        return
    cache = PromptCache.load(network, output.path, config) if exists(output.path) else PromptCache(network, config)
    try:
        yield cache
    finally:
        if cache.tokens:
            with uninterrupted():
                write_prompt_cache(cache, output)


def print_stats(stats: Stats | None) -> None:
    """Print statistics of a generation when stderr is a terminal."""
    if stats is None or not is_terminal(sys.stderr):
        return
    reused = f" ({stats.reused_tokens} cached)" if stats.reused_tokens else ""
    drafted = (
        f" ({stats.acceptance:.0%} of {stats.drafted_tokens} draft tokens accepted)" if stats.drafted_tokens else ""
    )
    seed = f"; seed {stats.seed}" if stats.seed is not None else ""
    write_error(
        styled(
            f"{stats.prompt_tokens} prompt tokens{reused}, {stats.generated_tokens} generated; "
            f"prefill {stats.prefill_tokens_per_second:,.1f} tokens/s, "
            f"decoding {stats.decode_tokens_per_second:,.1f} tokens/s{drafted}; "
            f"peak memory {mib(stats.peak_memory_bytes)}{seed}",
            "dim",
            stream=sys.stderr,
        )
    )


def _check_options(
    text: str | None,
    columns: str,
    output: Path | None,
    force: bool,
    draft_model: str | None,
    prompt_lookup: int,
    prompt_cache: Path | None,
    as_json: bool,
) -> None:
    """Reject conflicting options before loading a model."""
    if text is not None and columns:
        raise PromptError("--columns requires --input")
    if text is not None and output is not None:
        raise PromptError("--output requires --input; with --prompt, the text goes to stdout")
    if draft_model is not None and prompt_lookup:
        raise PromptError("--draft-model and --prompt-lookup are mutually exclusive")
    if prompt_lookup < 0:
        raise PromptError(f"--prompt-lookup must not be negative; got {prompt_lookup}")
    if text is None:
        alone = {
            "--draft-model": draft_model,
            "--prompt-lookup": prompt_lookup,
            "--prompt-cache": prompt_cache,
            "--json": as_json,
        }
        if given := [name for name, value in alone.items() if value]:
            raise PromptError(f"{given[0]} cannot be used with --input")
        if output is not None and is_folder(output):
            raise OutputError(f"--output must be a file; {output} is a folder")
        if output is not None and exists(output) and not force:
            raise OutputExistsError(output)


def _drafter(
    draft_model: str | None, num_draft_tokens: int, prompt_lookup: int, dtype: str, tokenizer: Tokenizer
) -> Drafter | None:
    if draft_model is None:
        return PromptLookup(prompt_lookup) if prompt_lookup else None
    opened = open_model([draft_model])
    if opened.tokenizer is not None and opened.tokenizer.vocab_hash() != tokenizer.vocab_hash():
        raise TokenizerError(f"the vocabulary of --draft-model {draft_model} differs from the model's")
    return DraftModel(load_source(opened.source, dtype_named(dtype)), num_draft_tokens)


def _answer_file(
    network: OpenELM,
    tokenizer: Tokenizer,
    path: Path,
    output: OutputFile | None,
    batch_size: int,
    options: dict[str, Any],
    about: dict[str, Any],
) -> None:
    from ..generation.batch import check_batch, generate_batch
    from ..generation.prompt_file import AnswerFile, Answers, read_prompts

    prompts = read_prompts(path, tokenizer, **about)
    ids = [prompt.tokens for prompt in prompts]
    check_batch(network, ids, batch_size=batch_size, max_tokens=options["max_tokens"], cache=options["cache"])
    if output is None:
        answers = Answers(prompts, write)
    else:
        described = {"sampling": asdict(options["sampling"]), "cache": asdict(options["cache"])}
        settings = {**about, **options, **described, "model": model_fingerprint(network)}
        answers = AnswerFile(prompts, output, settings)
    missing = answers.missing
    if len(missing) < len(prompts):
        say(f"{len(prompts) - len(missing):,} of {len(prompts):,} prompts already answered")
    try:
        with closing(answers), _answer_bar(len(prompts), len(prompts) - len(missing)) as moved:
            for number, generation in generate_batch(
                network, tokenizer, ids, batch_size=batch_size, numbers=missing, **options
            ):
                answers.add(number, generation)
                moved(len(generation.tokens))
            answers.finish()
    except KeyboardInterrupt:
        done = len(prompts) - len(answers.missing)
        kept = f"; run the same command again to resume from {output.name}.part" if output is not None and done else ""
        say(f"interrupted after {done:,} of {len(prompts):,} answers{kept}")
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def _answer_bar(total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr; call the result with the number of tokens of each finished answer."""
    if not is_terminal(sys.stderr):
        yield lambda num_tokens: None
        return
    import time

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    started = time.perf_counter()
    tokens = 0
    with Progress(*columns, console=console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total, completed=done)

        def moved(num_tokens: int) -> None:
            nonlocal tokens
            tokens += num_tokens
            rate = tokens / (time.perf_counter() - started)
            progress.update(task, advance=1, description=f"{rate:,.0f} tokens/s")

        yield moved


def _read_stdin() -> str:
    try:
        return read_stdin().decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"stdin is not valid UTF-8 at byte {error.start:,}") from error
