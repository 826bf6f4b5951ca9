"""`openelm-mlx chat`."""

import signal
import sys
from pathlib import Path
from typing import Any

import typer

from ..cache.config import CacheConfig
from ..files.output import output_file
from ..generation.chat import Chat
from ..generation.defaults import default_sampling, given_sampling
from ..generation.sampling import SamplingConfig
from ..hub import BUILT_IN_CHAT_MODEL
from ..loading import dtype_named, load
from .conversation import Conversation
from .generate import check_prompt_cache, open_prompt_cache
from .options import (
    Adapter,
    Dtype,
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
from .terminal import say
from .text_view import loading

EXAMPLES = examples(
    "openelm-mlx chat",
    'openelm-mlx chat -m OpenELM-1_1B-Instruct --system "Answer in one sentence."',
)
MAX_TOKENS = 1024


def chat(
    context: typer.Context,
    model: Model = BUILT_IN_CHAT_MODEL,
    system: System = None,
    max_tokens: MaxTokens = MAX_TOKENS,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    repetition_context: RepetitionContext = SamplingConfig.repetition_context,
    stop: Stop = None,
    seed: Seed = SamplingConfig.seed,
    dtype: Dtype = "auto",
    tokenizer: NeededTokenizer = None,
    adapter: Adapter = None,
    revision: Revision = None,
    kv_bits: KvBits = CacheConfig.bits,
    quantized_kv_start: QuantizedKvStart = CacheConfig.quantize_after,
    max_kv_size: MaxKvSize = CacheConfig.window,
    kv_sinks: KvSinks = CacheConfig.sinks,
    prompt_cache: PromptCacheFile = None,
) -> None:
    """Chat with an Instruct model.

    /help lists the commands within the chat. Ctrl-C stops an answer, or clears the line; Ctrl-D ends the chat. What
    you type is kept for the next chat; OPENELM_MLX_CHAT_HISTORY names the file, or is off.
    """
    chosen = given_sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        repetition_context=repetition_context,
        seed=seed,
    )
    check_prompt_cache(prompt_cache)
    cache_file = None
    if prompt_cache is not None:
        cache_file = context.with_resource(output_file(prompt_cache, overwrite=True))  # before the model is loaded
        for number in (signal.SIGTERM, signal.SIGHUP):  # save the KV cache however the chat ends
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    with loading(model, tokenizer, adapter):
        network, tokens = load(model, dtype=dtype_named(dtype), tokenizer=tokenizer, revision=revision, adapter=adapter)
    sampling = default_sampling(network, **chosen)
    with open_prompt_cache(
        network, cache_file, CacheConfig(kv_bits, quantized_kv_start, max_kv_size, kv_sinks)
    ) as cache:
        options: dict[str, Any] = {"sampling": sampling, "max_tokens": max_tokens, "stop": stop or (), "cache": cache}
        conversation = Chat(network, tokens, system=system, **options)
        if conversation.answers_alone:
            say("each message is answered alone, as in the examples that this model was tuned on")
        talk = Conversation(conversation)
        talk.run(Path(model).resolve().name, seed_is_drawn=sampling.with_seed() != sampling)
