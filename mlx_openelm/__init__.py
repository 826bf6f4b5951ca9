"""Apple's OpenELM language models with MLX; everything public is imported from here."""

from .cache import CacheConfig, KVCache, kv_cache_bytes
from .cache.prompt_cache import PromptCache
from .chat import Chat
from .config import PRESETS, OpenELMConfig
from .config_files import config_from_dict, read_config
from .convert import Conversion, convert  # a function in place of the folder of its name, and below of the file
from .engine import Step, generate_tokens
from .errors import OpenELMError
from .generate import Piece, Stats, generate, stream_generate
from .generate_batch import generate_batch
from .model import ContextLengthWarning, OpenELM
from .quantize import Quantization
from .sampling import SamplingConfig
from .speculate import DraftModel, PromptLookup, speculate_tokens
from .tokenizer import Tokenizer
from .version import __version__
from .weights import load

__all__ = [
    "PRESETS",
    "CacheConfig",
    "Chat",
    "ContextLengthWarning",
    "Conversion",
    "DraftModel",
    "KVCache",
    "OpenELM",
    "OpenELMConfig",
    "OpenELMError",
    "Piece",
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
    "read_config",
    "speculate_tokens",
    "stream_generate",
]
