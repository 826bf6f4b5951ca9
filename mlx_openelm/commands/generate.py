"""`openelm-mlx generate`: a prompt, or a file of prompts."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..cache.config import CacheConfig
from ..conversion.open import open_model
from ..errors import CacheError, PromptError, TokenizerError
from ..files.output import OutputFile, output_file
from ..files.paths import exists, is_folder
from ..generation.defaults import default_sampling, given_sampling
from ..generation.drafters import DEFAULT_MAX_DRAFT, Drafter, DraftModel, PromptLookup
from ..generation.engine import BATCH_SIZE, MAX_TOKENS
from ..generation.prompt_cache import PromptCache, write_prompt_cache
from ..generation.sampling import SamplingConfig
from ..generation.text import Generation, stream_generate
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
    NeededTokenizer,
    PromptCacheFile,
    QuantizedKvStart,
    RepetitionContext,
    RepetitionPenalty,
    Revision,
    Seed,
    Stop,
    System,
    Temperature,
    TopK,
    TopP,
    examples,
)
from .streams import is_terminal, read_stdin
from .terminal import fail, print_json, say
from .text_view import TextView, loading, print_stats, prompt_end

if TYPE_CHECKING:
    from collections.abc import Iterator

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
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
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
    tokenizer: NeededTokenizer = None,
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
    echo: Annotated[
        bool | None,
        typer.Option(
            "--echo/--no-echo", help="Print the prompt before the text; default: on a terminal, its end if it is long."
        ),
    ] = None,
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
    chosen = given_sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        repetition_context=repetition_context,
        seed=seed,
    )
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
    _check_options(text, columns, output, force, draft_model, prompt_lookup, prompt_cache, as_json, echo)
    # Before the model is loaded, so that a second process fails at once.
    is_there = output is not None and exists(output) and not force
    answers = context.with_resource(output_file(output, overwrite=force)) if output and not is_there else None
    cache_file = context.with_resource(output_file(prompt_cache, overwrite=True)) if prompt_cache else None
    for claimed in filter(None, (answers, cache_file)):
        claimed.protect(prompts)
    with loading(model, tokenizer, adapter):
        network, tokens = load(model, dtype=dtype_named(dtype), tokenizer=tokenizer, revision=revision, adapter=adapter)
    sampling = default_sampling(network, **chosen)
    asked = tokens.prompt_format(chat, system)
    if text is None:
        options: dict[str, Any] = {"max_tokens": max_tokens, "sampling": sampling, "stop": stop or (), "cache": kept}
        about = {"chat": chat, "system": system, "columns": named}
        from .answer_prompts import answer_prompts

        there = output if is_there else None
        answer_prompts(network, tokens, prompts, answers, batch_size, options, about, there)  # type: ignore[arg-type]
        return
    ids = tokens.encode_as(asked, text, system=system)
    drafter = _drafter(draft_model, num_draft_tokens, prompt_lookup, dtype, tokens)

    drawn = sampling.with_seed()
    result = Generation(text)
    interrupted = False
    with open_prompt_cache(network, cache_file, kept) as cache:
        echoed = _echo(asked.prompt_text(text), echo, as_json or asked.style != "plain")
        with TextView(echoed, shown=not as_json) as view:
            chunks = stream_generate(
                network,
                tokens,
                ids,
                max_tokens=max_tokens,
                sampling=drawn,
                stop=stop or (),
                cache=cache,
                drafter=drafter,
                on_prefill=view.on_prefill,
            )
            try:
                for chunk in chunks:
                    result.add(chunk)
                    view.add(chunk.text)
            except KeyboardInterrupt:
                interrupted = True
                result.finish_reason = "interrupted"
            chunks.close()
        if as_json:
            print_json(result.to_dict())
        else:
            print_stats(result.stats, None if drawn == sampling else drawn.seed)
    if interrupted:
        fail("interrupted", INTERRUPTED)


def check_prompt_cache(path: Path | None) -> None:
    """Make sure that the folder of a prompt cache exists: one of that name is more likely mistyped than wanted.

    Raises:
        CacheError: if it does not.
    """
    if path is not None and not is_folder(path.expanduser().parent):
        raise CacheError(f"--prompt-cache {path}: the folder {path.parent} does not exist")


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


def _check_options(
    text: str | None,
    columns: str,
    output: Path | None,
    force: bool,
    draft_model: str | None,
    prompt_lookup: int,
    prompt_cache: Path | None,
    as_json: bool,
    echo: bool | None,
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
    if as_json and echo:
        raise PromptError("--echo and --json are mutually exclusive; the JSON contains the prompt")
    check_prompt_cache(prompt_cache)
    if text is None:
        alone = {
            "--draft-model": draft_model,
            "--prompt-lookup": prompt_lookup,
            "--prompt-cache": prompt_cache,
            "--json": as_json,
            "--echo": echo,
        }
        if given := [name for name, value in alone.items() if value]:
            raise PromptError(f"{given[0]} cannot be used with --input")
    if output is not None:
        from .answer_prompts import check_output

        check_output(output, force)


def _echo(text: str, wanted: bool | None, is_message: bool) -> str:
    """What is printed before a text: on a terminal the prompt that it continues, of a long one the end."""
    if wanted is None:
        return prompt_end(text) if is_terminal(sys.stdout) and not is_message else ""
    return (f"{text}\n" if is_message else text) if wanted else ""


def _drafter(
    draft_model: str | None, num_draft_tokens: int, prompt_lookup: int, dtype: str, tokenizer: Tokenizer
) -> Drafter | None:
    if draft_model is None:
        return PromptLookup(prompt_lookup) if prompt_lookup else None
    with loading(draft_model):
        opened = open_model([draft_model])
        if opened.tokenizer is not None and opened.tokenizer.vocab_hash() != tokenizer.vocab_hash():
            raise TokenizerError(f"the vocabulary of --draft-model {draft_model} differs from the model's")
        return DraftModel(load_source(opened.source, dtype_named(dtype)), num_draft_tokens)


def _read_stdin() -> str:
    if is_terminal(sys.stdin):
        say("type the prompt; Ctrl-D on an empty line ends it")
    try:
        return read_stdin().decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"stdin is not valid UTF-8 at byte {error.start:,}") from error
