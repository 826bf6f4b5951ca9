"""`openelm-mlx chat`."""

import signal
import sys
from contextlib import suppress
from typing import Any

import typer

from ..cache.config import CacheConfig
from ..errors import OpenELMError
from ..files.output import output_file
from ..generation.chat import Chat
from ..generation.sampling import SamplingConfig
from ..hub import BUILT_IN_MODEL
from ..loading import dtype_named, load
from .generate import open_prompt_cache, print_stats
from .options import (
    Adapter,
    Dtype,
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
from .terminal import say

EXAMPLES = examples('openelm-mlx chat -m OpenELM-1_1B-Instruct --system "Answer in one sentence."')
MAX_TOKENS = 1024


def chat(
    context: typer.Context,
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
    quantized_kv_start: QuantizedKvStart = CacheConfig.quantize_after,
    max_kv_size: MaxKvSize = CacheConfig.window,
    kv_sinks: KvSinks = CacheConfig.sinks,
    prompt_cache: PromptCacheFile = None,
) -> None:
    """Chat with an Instruct model. /reset clears the conversation, /quit or Ctrl-D exits, Ctrl-C stops an answer."""
    sampling = SamplingConfig(temperature, top_p, top_k, min_p, repetition_penalty, repetition_context, seed)
    cache_file = None
    if prompt_cache is not None:
        cache_file = context.with_resource(output_file(prompt_cache, overwrite=True))  # before the model is loaded
        for number in (signal.SIGTERM, signal.SIGHUP):  # save the KV cache however the chat ends
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    network, tokens = load(model, dtype=dtype_named(dtype), tokenizer=tokenizer, revision=revision, adapter=adapter)
    with open_prompt_cache(
        network, cache_file, CacheConfig(kv_bits, quantized_kv_start, max_kv_size, kv_sinks)
    ) as cache:
        options: dict[str, Any] = {"sampling": sampling, "max_tokens": max_tokens, "stop": stop or (), "cache": cache}
        _talk(Chat(network, tokens, system=system, **options))


def _talk(conversation: Chat) -> None:
    interactive = sys.stdin.isatty()
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401, gives input() its line editing
        say("Type a message; /reset clears the conversation, /quit exits.")
    while True:
        try:
            line = _read_line(interactive).strip()
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return
        except UnicodeError:
            say("error: line skipped: not valid UTF-8")
            continue
        if line in ("/quit", "/exit"):
            return
        if line == "/reset":
            conversation.reset()
            continue
        if not line:
            continue
        stats = None
        try:
            for chunk in conversation.reply(line):
                typer.echo(chunk.text, nl=False)
                stats = chunk.stats
        except KeyboardInterrupt:
            pass
        except OpenELMError as error:
            say(f"error: {error}")
            continue
        typer.echo()
        print_stats(stats)


def _read_line(interactive: bool) -> str:
    """Read one message. Invalid UTF-8 is an error whatever the locale.

    Raises:
        EOFError: at the end of the input.
        UnicodeError: if the line is not valid UTF-8.
    """
    if interactive:
        line = input(typer.style("> ", bold=True))
        line.encode()
        return line
    raw = sys.stdin.buffer.readline()
    if not raw:
        raise EOFError
    return raw.decode()
