"""`openelm-mlx generate` and `openelm-mlx chat`."""

import sys
from contextlib import suppress
from typing import Annotated

import typer

from ..chat import Chat
from ..engine import MAX_TOKENS
from ..errors import PromptError, TokenizerError
from ..generate import Generation, Stats, stream_generate
from ..hub import BUILT_IN_MODEL
from ..model import OpenELM
from ..sampling import SamplingConfig
from ..tokenizer import Tokenizer
from ..weights import dtype_named, load
from .options import (
    Adapter,
    Dtype,
    Json,
    MaxTokens,
    MinP,
    Model,
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
from .terminal import INTERRUPTED, mib, print_json, say

EXAMPLES = examples(
    'openelm-mlx generate --prompt "Once upon a time there was"',
    'openelm-mlx generate -m OpenELM-1_1B --prompt "The capital of France is" --max-tokens 20',
    "openelm-mlx generate -m OpenELM-1_1B --prompt - --temperature 0.7 --repetition-penalty 1.2 < story.txt",
)
CHAT_EXAMPLES = examples('openelm-mlx chat -m OpenELM-1_1B-Instruct --system "Answer in one sentence."')
CHAT_MAX_TOKENS = 1024


def generate(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue; - reads it.", metavar="TEXT|-")],
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
        typer.Option("--chat/--raw", help="With the chat template, or plain text; by default as the model was made."),
    ] = None,
    system: System = None,
    dtype: Dtype = "auto",
    tokenizer: TokenizerOption = None,
    adapter: Adapter = None,
    revision: Revision = None,
) -> None:
    """Continue a prompt, or answer it if the model is an Instruct model."""
    sampling = SamplingConfig(temperature, top_p, top_k, min_p, repetition_penalty, repetition_context, seed)
    text = _read_stdin() if prompt == "-" else prompt
    if not text:
        raise PromptError("the prompt is empty; there is nothing to continue")
    network, tokens = _load(model, dtype, tokenizer, revision, adapter)
    chat = tokens.has_chat_template if chat is None else chat
    if system is not None and not chat:
        raise PromptError("--system needs a model with a chat template, and no --raw")
    messages = [{"role": "system", "content": system}] if system else []
    ids = tokens.encode_chat([*messages, {"role": "user", "content": text}]) if chat else tokens.encode(text)

    result = Generation(text)
    pieces = stream_generate(network, tokens, ids, max_tokens=max_tokens, sampling=sampling, stop=stop or ())
    if sys.stdout.isatty() and not as_json and not chat:
        typer.secho(text, dim=True, nl=False)
    try:
        for piece in pieces:
            result.add(piece)
            if not as_json:
                typer.echo(piece.text, nl=False)
    except KeyboardInterrupt:
        result.finish_reason = "interrupted"
    if as_json:
        print_json(result.to_dict())
    else:
        typer.echo()
        _print_stats(result.stats)
    if result.finish_reason == "interrupted":
        raise typer.Exit(INTERRUPTED)


def chat(
    model: Model = BUILT_IN_MODEL,
    system: System = None,
    max_tokens: MaxTokens = CHAT_MAX_TOKENS,
    temperature: Temperature = SamplingConfig.temperature,
    top_p: TopP = SamplingConfig.top_p,
    top_k: TopK = SamplingConfig.top_k,
    min_p: MinP = SamplingConfig.min_p,
    repetition_penalty: RepetitionPenalty = SamplingConfig.repetition_penalty,
    repetition_context: RepetitionContext = SamplingConfig.repetition_context,
    stop: Stop = None,
    seed: Seed = SamplingConfig.seed,
    dtype: Dtype = "auto",
    tokenizer: TokenizerOption = None,
    adapter: Adapter = None,
    revision: Revision = None,
) -> None:
    """Talk with an Instruct model. /reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C cuts an answer."""
    sampling = SamplingConfig(temperature, top_p, top_k, min_p, repetition_penalty, repetition_context, seed)
    network, tokens = _load(model, dtype, tokenizer, revision, adapter)
    talk = Chat(network, tokens, system=system, sampling=sampling, max_tokens=max_tokens, stop=stop or ())
    with suppress(ImportError):
        import readline  # noqa: F401, gives input() its line editing
    interactive = sys.stdin.isatty()
    if interactive:
        say("Type a message; /reset forgets the conversation, /quit ends it.")
    while True:
        try:
            line = input(typer.style("> ", bold=True) if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return
        except UnicodeDecodeError:
            raise PromptError("the input is not valid UTF-8") from None
        if line in ("/quit", "/exit"):
            return
        if line == "/reset":
            talk.reset()
            continue
        if not line:
            continue
        stats = None
        try:
            for piece in talk.reply(line):
                typer.echo(piece.text, nl=False)
                stats = piece.stats
        except KeyboardInterrupt:
            pass
        typer.echo()
        _print_stats(stats)


def _load(
    model: str, dtype: str, tokenizer: str | None, revision: str | None, adapter: str | None
) -> tuple[OpenELM, Tokenizer]:
    """Network and tokenizer; going without one is an error here, where there is text to read."""
    network, tokens = load(model, dtype=dtype_named(dtype), tokenizer=tokenizer, revision=revision, adapter=adapter)
    if tokens is None:
        raise TokenizerError(f"{model} was converted without a tokenizer; give one with --tokenizer FILE_OR_REPO")
    return network, tokens


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"the input is not valid UTF-8 at byte {error.start:,}") from error


def _print_stats(stats: Stats | None) -> None:
    if stats is None or not sys.stderr.isatty():
        return
    typer.secho(
        f"{stats.prompt_tokens} + {stats.generated_tokens} tokens, prompt {stats.prefill_tokens_per_second:,.1f} "
        f"and text {stats.decode_tokens_per_second:,.1f} tokens/s, peak memory {mib(stats.peak_memory_bytes)}",
        dim=True,
        err=True,
    )
