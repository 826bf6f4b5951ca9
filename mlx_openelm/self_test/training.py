"""Steps of training: against the CPU's, and layer by layer against all layers at once."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ..data.batch import TokenBatch
from ..loading import assemble
from ..model.lora import AdapterConfig, adapter_parameters, add_adapter
from ..model.openelm import OpenELM
from ..quantization import Quantization
from ..tensors import dtype_name
from ..training.loss import CrossEntropy
from ..training.optimizer import Tensors
from ..training.trainer import Trainer
from ..training.tune_recipe import TuneRecipe
from .check import Check, Comparison, Outcome, as_numpy, judged
from .reference import on_reference
from .samples import packed_arrays, sample_arrays, sample_config, sample_network, sample_tokens
from .session import Session

_ROWS, _LENGTH = 2, 64
_STEPS = 2
_LOOSER = 2  # than for logits: gradients are sums over many tokens that partly cancel out
_LEAST_ALLOWED = 1e-3
# A large epsilon makes AdamW's update proportional to the gradient; otherwise rounding may turn the smallest around.
_RECIPE: dict[str, Any] = {"eps": 1.0, "learning_rate": 1.0, "warmup_share": 0.0, "steps": 10, "batch_size": _ROWS}

# From the types to store and to compute in to a network and the parameters to train.
_Make = Callable[[Session, mx.Dtype, mx.Dtype], tuple[OpenELM, Tensors]]


def checks() -> Iterator[Check]:
    """Checks of training."""
    yield Check("LoRA step on 4 bits as the CPU's", partial(_as_reference, _adapted))
    yield Check("full step as the CPU's", partial(_as_reference, _whole))
    yield Check("full step layer by layer as at once", _layer_by_layer)


class _TwoDocuments:
    """Rows of two documents that do not attend to one another; half of the tokens count."""

    rows_per_step = _ROWS
    rows_per_entry = 1
    fingerprint = ""

    def step(self, step: int, first: int = 0, count: int | None = None) -> TokenBatch:
        tokens = np.array(sample_tokens(_ROWS, _LENGTH + 1 + step)[:, : _LENGTH + 1])
        segments = np.broadcast_to((np.arange(_LENGTH + 1) >= _LENGTH // 3).astype(np.int32), tokens.shape)
        loss_mask = np.broadcast_to(np.arange(_LENGTH) % 2 == 0, (_ROWS, _LENGTH))
        return TokenBatch(tokens, segments, loss_mask, isolated=True)

    def validation(self, first: int, stride: int) -> Iterator[TokenBatch]:
        yield from ()


def _whole(session: Session, stored: mx.Dtype, dtype: mx.Dtype) -> tuple[OpenELM, Tensors]:
    config = sample_config(session.extent.trained_size)
    return sample_network(config, dtype), {name: mx.array(array) for name, array in sample_arrays(config).items()}


def _adapted(session: Session, stored: mx.Dtype, dtype: mx.Dtype) -> tuple[OpenELM, Tensors]:
    config = sample_config(session.extent.trained_size)
    network = assemble(config, *packed_arrays(config, Quantization(), stored), dtype)
    add_adapter(network, AdapterConfig())
    random = np.random.default_rng(1)
    shapes = {name: array.shape for name, array in adapter_parameters(network).items()}
    values = {name: 0.05 * random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return network, {name: mx.array(array) for name, array in values.items()}


def _as_reference(make: _Make, session: Session) -> Outcome:
    comparisons: list[Comparison] = []
    for dtype in session.dtypes:
        with on_reference():
            expected = _trained(make, session, dtype, mx.float32)  # 16-bit types are slow on a CPU
        comparisons += _compared(_trained(make, session, dtype, dtype), expected, session, dtype)
    return judged(comparisons)


def _layer_by_layer(session: Session) -> Outcome:
    comparisons: list[Comparison] = []
    for dtype in session.dtypes:
        found, expected = (_trained(_whole, session, dtype, dtype, layerwise) for layerwise in (True, False))
        comparisons += _compared(found, expected, session, dtype)
    return judged(comparisons)


def _trained(
    make: _Make, session: Session, stored: mx.Dtype, dtype: mx.Dtype, layerwise: bool = False
) -> dict[str, np.ndarray]:
    """The loss, the gradient norm and the change of each parameter after a few steps."""
    network, parameters = make(session, stored, dtype)
    before = {name: as_numpy(array) for name, array in parameters.items()}
    recipe = TuneRecipe(dtype=dtype_name(dtype), gradient_checkpointing=layerwise, **_RECIPE)
    trainer = Trainer(recipe, network, parameters, _TwoDocuments(), CrossEntropy())
    for _ in range(_STEPS):
        metrics = trainer.take_step()
    figures = {name: np.array([metrics[name]], np.float32) for name in ("loss", "gradient_norm")}
    return {**figures, **{name: as_numpy(array) - before[name] for name, array in trainer.parameters.items()}}


def _compared(
    found: dict[str, np.ndarray], expected: dict[str, np.ndarray], session: Session, dtype: mx.Dtype
) -> list[Comparison]:
    allowed = max(_LOOSER * session.tolerance(dtype), _LEAST_ALLOWED)
    return [
        Comparison.of(f"{dtype_name(dtype)}, {name}", found[name], array, allowed) for name, array in expected.items()
    ]
