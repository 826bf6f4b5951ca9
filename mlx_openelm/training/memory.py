"""Predicts the memory of training from shapes alone.

The peak of a step is counted in numbers per token, relative to the widths of each layer's parts. The factors are fitted
to 112 measured steps of networks of many shapes, on MLX's CPU backend in float32 (largest error 11 %);
`benchmarks/tune_memory.py` compares predictions with measurements.
"""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..config import OpenELMConfig
from ..data.example_batches import row_width
from ..machine.device import DTYPES, memory_limit_bytes, on_cpu, peak_memory_bytes
from .loss import DEFAULT_CHUNK
from .pretrain_recipe import PretrainRecipe

if TYPE_CHECKING:
    from .tune import Tuning

_STATE_BYTES = 12  # per trained parameter: its gradient and two moments
_UPDATE_BYTES = 16  # per trained parameter during the update: its gradient, two moments, and the new value
_FEED_FORWARD = (15.7, 5.3, 13.0)  # held per token in the FFN: times model_dim, the qkv width, the FFN width
_ATTENTION = (5.5, 14.3, 3.8)  # the same in attention
_LONG_ATTENTION = (17.0, 0.0063)  # in place of 14.3 if larger: a constant, plus a factor times the row length
_SAVED = (4.1, 2.2, 5.1)  # kept of a layer for the backward pass: times the same widths
_SAVED_LONG = 0.0006  # in addition: times the row length and the qkv width
_LOGITS = 10.5  # copies of a chunk's logits that exist at once
_MAGNITUDES = 2.0  # times the output widths of all matrices of a DoRA layer


@dataclass(frozen=True)
class StepMemory:
    """Predicted memory of a step in one process, in bytes."""

    weights_bytes: int  # the model, with its adapter
    state_bytes: int  # gradients and moments
    activation_bytes: int  # everything else that a step holds at its peak
    limit_bytes: int  # memory that this machine has for it
    process_bytes: int = 0  # on the CPU, what the process takes besides: Python, MLX and the examples

    @property
    def total_bytes(self) -> int:
        """What the metrics of the run will give as its peak, in bytes."""
        return self.peak_bytes + self.process_bytes

    @property
    def peak_bytes(self) -> int:
        """Weights, state and activations together, in bytes."""
        return self.weights_bytes + self.state_bytes + self.activation_bytes

    @property
    def fits(self) -> bool:
        """Whether the peak is within this machine's limit."""
        return self.total_bytes <= self.limit_bytes

    def to_dict(self) -> dict[str, Any]:
        """All fields, the sums and whether it fits, for JSON."""
        return {**asdict(self), "peak_bytes": self.peak_bytes, "total_bytes": self.total_bytes, "fits": self.fits}


@dataclass(frozen=True)
class StepShape:
    """What determines the memory of a step.

    Attributes:
        rows, length: rows computed at once, and tokens that each row predicts.
        num_logits: number of tokens whose logits are computed.
        method: `lora`, `dora` or `full`.
    """

    config: OpenELMConfig
    rows: int
    length: int
    num_logits: int
    method: str = "lora"
    gradient_checkpointing: bool = False
    is_quantized: bool = False
    loss_chunk: int = DEFAULT_CHUNK
    dtype: mx.Dtype = mx.float32


def tuning_memory(tuning: "Tuning", processes: int = 1) -> StepMemory:
    """Predicted memory of a run's largest step, in each of its processes."""
    recipe, entries = tuning.recipe, tuning.rows.rows_per_entry
    own = dict(tree_flatten(tuning.model.parameters()))
    sides = [side for example in tuning.train.examples for side in example.sequences]
    rows = max(1, recipe.batch_size // processes) * entries
    length = recipe.max_length if recipe.pack else row_width(max(len(side.tokens) for side in sides), recipe.max_length)
    answers = sorted((int(side.completion_mask.sum()) for side in sides), reverse=True)[:rows]
    shape = StepShape(
        tuning.model.config,
        rows,
        length,
        rows * length if recipe.pack else min(sum(answers), rows * length),
        recipe.method,
        recipe.gradient_checkpointing,
        any(name.endswith(".scales") for name in own),
        recipe.loss_chunk,
        DTYPES[recipe.dtype],
    )
    weights = sum(array.nbytes for array in own.values())
    process = max(0, peak_memory_bytes() - weights) if on_cpu() else 0  # there, the peak is that of the process
    return replace(step_memory(shape, weights, tuning.num_parameters), process_bytes=process)


def pretraining_memory(recipe: PretrainRecipe, processes: int = 1) -> StepMemory:
    """Predicted memory of a step of pre-training, in each of its processes.

    Args:
        recipe: without open fields.
    """
    config, length = recipe.model, recipe.sequence_length
    own = max(1, recipe.batch_size // processes)
    rows = min(recipe.micro_batch_size or own, own)
    dtype = DTYPES[recipe.dtype]
    shape = StepShape(
        config,
        rows,
        length,
        rows * length,
        "full",
        recipe.gradient_checkpointing,
        loss_chunk=recipe.loss_chunk,
        dtype=dtype,
    )
    copies = dtype.size if dtype != mx.float32 else 0
    of_parts = mx.float32.size if rows < own else 0  # the gradients of two micro-batches exist at once
    weights = (mx.float32.size + copies + of_parts) * config.num_parameters
    return step_memory(shape, weights, config.num_parameters)


def fitting_rows(recipe: PretrainRecipe, processes: int = 1) -> int:
    """The micro-batch size whose steps take at most half of this machine's memory, for `micro_batch_size`; 0: all rows.

    Args:
        recipe: without other open fields.
    """
    own = rows = max(1, recipe.batch_size // processes)

    def fits() -> bool:
        found = pretraining_memory(replace(recipe, micro_batch_size=rows), processes)
        return found.peak_bytes <= found.limit_bytes // 2

    while rows > 1 and not fits():
        rows = -(-rows // 2)
    return 0 if rows == own else rows


def step_memory(shape: StepShape, weights_bytes: int, num_trained: int) -> StepMemory:
    """Predicted memory of a step.

    Args:
        weights_bytes: size of the model with its adapter.
        num_trained: number of trained parameters.
    """
    activations = _activation_bytes(shape)
    state = _STATE_BYTES * num_trained
    activations = max(activations, _UPDATE_BYTES * num_trained - state)  # the two peaks do not coincide
    return StepMemory(weights_bytes, state, int(activations), memory_limit_bytes())


def _activation_bytes(shape: StepShape) -> float:
    config, tokens = shape.config, shape.rows * shape.length
    layers = [
        (config.model_dim, (queries + 2 * keys) * config.head_dim, ffn_dim)
        for queries, keys, ffn_dim in zip(config.num_query_heads, config.num_kv_heads, config.ffn_dims, strict=True)
    ]
    at_work = [_at_work(widths, shape) for widths in layers]
    inputs = float(tokens * config.model_dim)
    saved = [inputs if shape.gradient_checkpointing else _saved(widths, shape) for widths in layers]
    largest = max(layers, key=sum)
    weights = config.model_dim * (largest[1] * 5 // 3 + 3 * largest[2])  # roughly the weights of the largest layer
    vocabulary = config.vocab_size * config.model_dim
    # The peak is in a layer, with what the layers before it saved, or in a chunk's logits, with what all layers saved.
    layer, head = [sum(saved[:number]) + work for number, work in enumerate(at_work)], sum(saved)
    if shape.is_quantized:
        layer = [numbers + 1.6 * weights for numbers in layer]
        head += 1.6 * weights + vocabulary
    size = shape.dtype.size
    logits = (
        _LOGITS * min(shape.loss_chunk, shape.num_logits) * config.vocab_size + 2 * shape.num_logits * config.model_dim
    )
    stages = [*(numbers * size for numbers in layer), head * size + logits * mx.float32.size]
    if shape.method == "full" and shape.gradient_checkpointing:  # earlier layers have no gradients yet
        to_come = [mx.float32.size * sum(config.layer_parameters[:number]) for number in range(len(stages))]
        stages = [nbytes - gradients for nbytes, gradients in zip(stages, to_come, strict=True)]
    return max(stages)


def _at_work(widths: tuple[int, int, int], shape: StepShape) -> float:
    """Numbers that a layer holds during its backward pass."""
    model_dim, qkv, ffn_dim = widths
    tokens = shape.rows * shape.length
    feed_forward = sum(factor * width for factor, width in zip(_FEED_FORWARD, widths, strict=True))
    first, of_qkv, last = _ATTENTION
    of_qkv = max(of_qkv, _LONG_ATTENTION[0] + _LONG_ATTENTION[1] * shape.length)
    attention = first * model_dim + of_qkv * qkv + last * ffn_dim
    return tokens * (max(feed_forward, attention) + _of_magnitudes(widths, shape))


def _saved(widths: tuple[int, int, int], shape: StepShape) -> float:
    """Numbers that are kept of a layer for the backward pass."""
    kept = sum(factor * width for factor, width in zip(_SAVED, widths, strict=True))
    kept += _SAVED_LONG * shape.length * widths[1]
    return shape.rows * shape.length * (kept + _of_magnitudes(widths, shape) / 2)


def _of_magnitudes(widths: tuple[int, int, int], shape: StepShape) -> float:
    model_dim, qkv, ffn_dim = widths
    return _MAGNITUDES * (2 * model_dim + qkv + 2 * ffn_dim) if shape.method == "dora" else 0.0
