"""Apple's OpenELM language models with MLX; everything public is imported from here.

A name is loaded from its module when it is first used, so that one function does not wait for the modules of all.
"""

from .version import __version__ as __version__

TYPE_CHECKING = False  # that of `typing`, whose import would take longer than all of this one
if TYPE_CHECKING:  # for type checkers, the same names as in `_MODULES`; a test compares the two
    from .benchmark.bench import bench as bench
    from .benchmark.measure import Case as Case, Figures as Figures, Result as Result, Spread as Spread
    from .benchmark.report import BenchReport as BenchReport
    from .cache.config import CacheConfig as CacheConfig, kv_cache_bytes as kv_cache_bytes
    from .cache.kv_cache import KVCache as KVCache
    from .config import PRESETS as PRESETS, OpenELMConfig as OpenELMConfig
    from .conversion.convert import Conversion as Conversion, average as average, convert as convert
    from .conversion.read.config import config_from_dict as config_from_dict, read_config as read_config
    from .data.text_files import TextSource as TextSource
    from .errors import OpenELMError as OpenELMError
    from .evaluation.encoding import TokenRequest as TokenRequest
    from .evaluation.items import Item as Item, ItemResult as ItemResult
    from .evaluation.published import Published as Published, PublishedCell as PublishedCell
    from .evaluation.report import EvaluationReport as EvaluationReport
    from .evaluation.requests import Request as Request, Score as Score
    from .evaluation.results import (
        GroupResult as GroupResult,
        ItemRecord as ItemRecord,
        MetricValue as MetricValue,
        SuiteAverage as SuiteAverage,
        TaskResult as TaskResult,
    )
    from .evaluation.run import (
        EvaluationCallback as EvaluationCallback,
        EvaluationOptions as EvaluationOptions,
        evaluate as evaluate,
    )
    from .evaluation.scorer import Scorer as Scorer, ScorerConfig as ScorerConfig
    from .evaluation.table import ResultTable as ResultTable, TaskRow as TaskRow
    from .evaluation.task_metric import TaskMetric as TaskMetric
    from .generation.batch import generate_batch as generate_batch
    from .generation.chat import Chat as Chat
    from .generation.drafters import Drafter as Drafter, DraftModel as DraftModel, PromptLookup as PromptLookup
    from .generation.engine import Step as Step, generate_tokens as generate_tokens
    from .generation.prompt_cache import PromptCache as PromptCache
    from .generation.sampling import Sampler as Sampler, SamplingConfig as SamplingConfig
    from .generation.speculative import speculate_tokens as speculate_tokens
    from .generation.text import (
        Generation as Generation,
        GenerationChunk as GenerationChunk,
        Stats as Stats,
        generate as generate,
        stream_generate as stream_generate,
    )
    from .loading import load as load, load_model as load_model
    from .merging import Merge as Merge, merge as merge
    from .model.lora import AdapterConfig as AdapterConfig
    from .model.openelm import ContextLengthWarning as ContextLengthWarning, OpenELM as OpenELM
    from .quantization import Quantization as Quantization
    from .tokenizer.example_format import ExampleFormat as ExampleFormat
    from .tokenizer.tokenizer import StreamDecoder as StreamDecoder, Tokenizer as Tokenizer
    from .training.callback import Metrics as Metrics, TrainingCallback as TrainingCallback
    from .training.checkpoint_metric import CheckpointMetric as CheckpointMetric
    from .training.held_out import HeldOutLoss as HeldOutLoss, held_out_loss as held_out_loss
    from .training.pretrain_recipe import PretrainRecipe as PretrainRecipe
    from .training.run import (
        TrainingResult as TrainingResult,
        pretrain as pretrain,
        tune as tune,
    )
    from .training.tune_recipe import TuneRecipe as TuneRecipe

_MODULES = {
    "benchmark.bench": ("bench",),
    "benchmark.measure": (
        "Case",
        "Figures",
        "Result",
        "Spread",
    ),
    "benchmark.report": ("BenchReport",),
    "cache.config": (
        "CacheConfig",
        "kv_cache_bytes",
    ),
    "cache.kv_cache": ("KVCache",),
    "config": (
        "PRESETS",
        "OpenELMConfig",
    ),
    "conversion.convert": (
        "Conversion",
        "average",
        "convert",
    ),
    "conversion.read.config": (
        "config_from_dict",
        "read_config",
    ),
    "data.text_files": ("TextSource",),
    "errors": ("OpenELMError",),
    "evaluation.encoding": ("TokenRequest",),
    "evaluation.items": (
        "Item",
        "ItemResult",
    ),
    "evaluation.published": (
        "Published",
        "PublishedCell",
    ),
    "evaluation.report": ("EvaluationReport",),
    "evaluation.requests": (
        "Request",
        "Score",
    ),
    "evaluation.results": (
        "GroupResult",
        "ItemRecord",
        "MetricValue",
        "SuiteAverage",
        "TaskResult",
    ),
    "evaluation.run": (
        "EvaluationCallback",
        "EvaluationOptions",
        "evaluate",
    ),
    "evaluation.scorer": (
        "Scorer",
        "ScorerConfig",
    ),
    "evaluation.table": (
        "ResultTable",
        "TaskRow",
    ),
    "evaluation.task_metric": ("TaskMetric",),
    "generation.batch": ("generate_batch",),
    "generation.chat": ("Chat",),
    "generation.engine": (
        "Step",
        "generate_tokens",
    ),
    "generation.prompt_cache": ("PromptCache",),
    "generation.sampling": (
        "Sampler",
        "SamplingConfig",
    ),
    "generation.drafters": (
        "Drafter",
        "DraftModel",
        "PromptLookup",
    ),
    "generation.speculative": ("speculate_tokens",),
    "generation.text": (
        "Generation",
        "GenerationChunk",
        "Stats",
        "generate",
        "stream_generate",
    ),
    "loading": (
        "load",
        "load_model",
    ),
    "merging": (
        "Merge",
        "merge",
    ),
    "model.lora": ("AdapterConfig",),
    "model.openelm": (
        "ContextLengthWarning",
        "OpenELM",
    ),
    "quantization": ("Quantization",),
    "tokenizer.example_format": ("ExampleFormat",),
    "tokenizer.tokenizer": (
        "StreamDecoder",
        "Tokenizer",
    ),
    "training.held_out": (
        "HeldOutLoss",
        "held_out_loss",
    ),
    "training.callback": (
        "Metrics",
        "TrainingCallback",
    ),
    "training.checkpoint_metric": ("CheckpointMetric",),
    "training.pretrain_recipe": ("PretrainRecipe",),
    "training.run": (
        "TrainingResult",
        "pretrain",
        "tune",
    ),
    "training.tune_recipe": ("TuneRecipe",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
__all__ = ["__version__", *_MODULE_OF]

if not TYPE_CHECKING:  # to a type checker, it would give every name

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        found = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
