"""Keys and values of the tokens that a model has seen already."""

from .config import CacheConfig, kv_bytes_per_layer, kv_cache_bytes
from .kv_cache import GROWTH_STEP, KVCache, StepCache

__all__ = ["GROWTH_STEP", "CacheConfig", "KVCache", "StepCache", "kv_bytes_per_layer", "kv_cache_bytes"]
