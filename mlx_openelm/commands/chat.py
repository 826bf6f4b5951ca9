"""`openelm-mlx chat`."""

import re
import signal
import sys
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
from .interrupts import INTERRUPTED
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
from .streams import is_terminal, read_stdin, styled
from .terminal import fail, say, write, write_error

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
        conversation = Chat(network, tokens, system=system, **options)
        if conversation.answers_alone:
            say("each message is answered alone, as in the examples that this model was tuned on")
        _talk(conversation)


def _talk(conversation: Chat) -> None:
    interactive = is_terminal(sys.stdin)
    prompt = _prompt() if interactive else ""
    if interactive:
        say("Type a message; /reset clears the conversation, /quit exits.")
    while True:
        try:
            line = _read_line(prompt).strip()
        except EOFError:
            write("")
            return
        except KeyboardInterrupt:
            write("")
            fail("interrupted", INTERRUPTED)
        except UnicodeError:
            say("error: line skipped: not valid UTF-8")
            continue
        if line in ("/quit", "/exit"):
            return
        if line == "/reset":
            conversation.reset()
        elif line:
            _answer(conversation, line)


def _answer(conversation: Chat, line: str) -> None:
    """Print the answer to a message; what makes it fail is reported and ends only this turn."""
    stats, failure = None, ""
    try:
        for chunk in conversation.reply(line):
            write(chunk.text, end="")
            stats = chunk.stats
    except KeyboardInterrupt:
        pass
    except (OpenELMError, RuntimeError) as error:  # the backend's errors, such as of allocation, are RuntimeErrors
        failure = str(error)
    except MemoryError:
        failure = "not enough memory for this turn"
    if stats is not None or not failure:
        write("")
    if failure:
        say(f"error: {failure}")
    else:
        print_stats(stats)


def _prompt() -> str:
    """The prompt of a terminal, with line editing where Python has it.

    GNU readline has to be told which characters take no space, or it misplaces long lines; libedit would print the
    marks, so its prompt is plain.
    """
    bold = styled("> ", "bold", stream=sys.stdout)
    try:
        import readline
    except ImportError:
        return bold
    if "libedit" in (readline.__doc__ or "") or getattr(readline, "backend", "readline") == "editline":
        return "> "
    return re.sub("(\x1b[^m]*m)", "\x01\\1\x02", bold)


def _read_line(prompt: str) -> str:
    """Read one message: from a terminal if there is a prompt. Invalid UTF-8 is an error whatever the locale.

    Raises:
        EOFError: at the end of the input.
        PromptError: if stdin cannot be read.
        UnicodeError: if the line is not valid UTF-8.
    """
    if prompt and is_terminal(sys.stdout):
        line = input(prompt)
        line.encode()
        return line
    if prompt:  # stdout goes elsewhere and gets the answers alone
        write_error("> ", end="")
    raw = read_stdin(whole=False)
    if not raw:
        raise EOFError
    return raw.decode()
