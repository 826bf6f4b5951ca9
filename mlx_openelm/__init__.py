"""Apple's OpenELM language models with MLX; everything public is imported from here."""

from .cache.config import CacheConfig, kv_cache_bytes
from .cache.kv_cache import KVCache
from .config import PRESETS, OpenELMConfig
from .conversion.convert import (  # a function in place of the folder of its name, and below of the file
    Conversion,
    convert,
)
from .conversion.read.config import config_from_dict, read_config
from .errors import OpenELMError
from .generation.batch import generate_batch
from .generation.chat import Chat
from .generation.engine import Step, generate_tokens
from .generation.prompt_cache import PromptCache
from .generation.sampling import SamplingConfig
from .generation.speculative import DraftModel, PromptLookup, speculate_tokens
from .generation.text import GenerationChunk, Stats, generate, stream_generate
from .loading import load, load_model
from .model.openelm import ContextLengthWarning, OpenELM
from .quantization import Quantization
from .tokenizer.tokenizer import Tokenizer
from .version import __version__

__all__ = [
    "PRESETS",
    "CacheConfig",
    "Chat",
    "ContextLengthWarning",
    "Conversion",
    "DraftModel",
    "GenerationChunk",
    "KVCache",
    "OpenELM",
    "OpenELMConfig",
    "OpenELMError",
    "PromptCache",
    "PromptLookup",
    "Quantization",
    "SamplingConfig",
    "Stats",
    "Step",
    "Tokenizer",
    "__version__",
    "config_from_dict",
    "convert",
    "generate",
    "generate_batch",
    "generate_tokens",
    "kv_cache_bytes",
    "load",
    "load_model",
    "read_config",
    "speculate_tokens",
    "stream_generate",
]
