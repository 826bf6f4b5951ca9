"""Whether the fused kernels compile on this device and agree with MLX's own operations."""

import warnings
from collections.abc import Iterator

from ..config import PRESETS
from ..kernels.dialects import DIALECTS
from ..kernels.fused import forget_kernels, kernels_work
from ..machine.device import choices, replaced_choices
from ..tensors import dtype_name
from .check import FAILED, PASSED, Check, Outcome, Skip
from .session import Session


def checks() -> Iterator[Check]:
    """Checks of fused kernels alone."""
    yield Check("fused kernels", _work)


def _work(session: Session) -> Outcome:
    if choices().backend not in DIALECTS:
        raise Skip("there are no fused kernels for this device")
    found: dict[str, bool] = {}
    forget_kernels()
    with replaced_choices(fused_kernels=True), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for dtype in session.dtypes:
            for size, config in PRESETS.items():
                found[f"{size}, {dtype_name(dtype)}"] = kernels_work(dtype, config.head_dim, config.model_dim)
    failed = [name for name, works in found.items() if not works]
    if failed:
        reasons = [str(warning.message) for warning in caught]
        return Outcome(FAILED, f"do not work for {failed[0]}", "all work", {"works": found, "reasons": reasons})
    return Outcome(PASSED, f"work for all {len(found)} shapes and types", "all work", {"works": found})
