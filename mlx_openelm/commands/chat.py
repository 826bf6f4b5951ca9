"""`openelm-mlx chat`."""

import sys
from contextlib import suppress
from typing import Any

import typer

from ..cache import CacheConfig
from ..chat import Chat
from ..errors import PromptError
from ..hub import BUILT_IN_MODEL
from ..sampling import SamplingConfig
from .generate import load_for_text, open_prompt_cache, print_stats
from .options import (
    Adapter,
    Dtype,
    KvBits,
    KvSinks,
    KvStart,
    KvWindow,
    MaxTokens,
    MinP,
    Model,
    PromptCacheFile,
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
from .terminal import say

EXAMPLES = examples('openelm-mlx chat -m OpenELM-1_1B-Instruct --system "Answer in one sentence."')
MAX_TOKENS = 1024


def chat(
    model: Model = BUILT_IN_MODEL,
    system: System = None,
    max_tokens: MaxTokens = MAX_TOKENS,
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
    kv_bits: KvBits = CacheConfig.bits,
    kv_start: KvStart = CacheConfig.quantize_after,
    kv_window: KvWindow = CacheConfig.window,
    kv_sinks: KvSinks = CacheConfig.sinks,
    prompt_cache: PromptCacheFile = None,
) -> None:
    """Talk with an Instruct model. /reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C cuts an answer."""
    sampling = SamplingConfig(temperature, top_p, top_k, min_p, repetition_penalty, repetition_context, seed)
    network, tokens = load_for_text(model, dtype, tokenizer, revision, adapter)
    with open_prompt_cache(network, prompt_cache, CacheConfig(kv_bits, kv_start, kv_window, kv_sinks)) as cache:
        options: dict[str, Any] = {"sampling": sampling, "max_tokens": max_tokens, "stop": stop or (), "cache": cache}
        _talk(Chat(network, tokens, system=system, **options))


def _talk(conversation: Chat) -> None:
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
            conversation.reset()
            continue
        if not line:
            continue
        stats = None
        try:
            for piece in conversation.reply(line):
                typer.echo(piece.text, nl=False)
                stats = piece.stats
        except KeyboardInterrupt:
            pass
        typer.echo()
        print_stats(stats)
