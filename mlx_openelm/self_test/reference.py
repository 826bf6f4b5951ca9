"""Results to compare with: from the CPU, in plain operations."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import mlx.core as mx

from ..machine.compiler import uncompiled
from ..machine.device import Choices, replaced_choices


@contextmanager
def on_reference() -> Iterator[None]:
    """Compute on the CPU within this context, uncompiled and with no choice that is meant for other devices.

    Evaluate results within the context. A graph that is evaluated later computes where it was built.
    """
    plain: dict[str, Any] = {field.name: False for field in fields(Choices) if field.type in (bool, bool | None)}
    before = mx.default_device()
    mx.synchronize()
    mx.set_default_device(mx.cpu)
    try:
        with replaced_choices(backend="cpu", **plain), uncompiled():
            yield
    finally:
        mx.synchronize()
        mx.set_default_device(before)
