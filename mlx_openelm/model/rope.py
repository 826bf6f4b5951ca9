"""Rotary position embedding (Su et al., arXiv:2104.09864)."""

import math

import mlx.core as mx

from ..machine.device import on_cpu


class Rope:
    """Rotates heads by the positions of a pass; pairs are formed across the two halves of a head.

    Args:
        base: base of the wavelengths.
        positions: position of the first token: an int or an array () for all rows, or an array (B,), one per row.
    """

    def __init__(self, base: float, positions: int | mx.array):
        self._base = base
        self._positions = positions
        self._table: tuple[mx.array, mx.array] | None = None

    def __call__(self, heads: mx.array) -> mx.array:
        """Rotate heads (B, N, L, D), whose positions increase by 1 along L."""
        if on_cpu() and isinstance(self._positions, mx.array):  # as MLX does it, but the angles are those of all layers
            return _rotated(heads, self.table(*heads.shape[2:]))
        return mx.fast.rope(
            heads, heads.shape[-1], traditional=False, base=self._base, scale=1.0, offset=self._positions
        )

    def table(self, length: int, head_dim: int) -> tuple[mx.array, mx.array]:
        """Cosines and sines, (L, D / 2), or (B, 1, L, D / 2) if each row has its own position."""
        if self._table is None:
            positions = self._positions if isinstance(self._positions, mx.array) else mx.array(self._positions)
            self._table = _table(_angles(positions, length, head_dim // 2, self._base))
        return self._table


class TokenRope:
    """Rotates heads, each token by a position of its own; arguments as for `Rope`, with positions (L,)."""

    def __init__(self, base: float, positions: mx.array, head_dim: int):
        self._table = _table(positions[:, None] * _frequencies(head_dim // 2, base))

    def __call__(self, heads: mx.array) -> mx.array:
        """Rotate heads (B, N, L, D)."""
        return _rotated(heads, self._table)

    def table(self, length: int, head_dim: int) -> tuple[mx.array, mx.array]:
        """Cosines and sines (L, D / 2)."""
        return self._table


def _table(angles: mx.array) -> tuple[mx.array, mx.array]:
    return mx.cos(angles), mx.sin(angles)


def _rotated(heads: mx.array, table: tuple[mx.array, mx.array]) -> mx.array:
    cosine, sine = table
    first, second = mx.split(heads, 2, axis=-1)
    rotated = mx.concatenate([first * cosine - second * sine, first * sine + second * cosine], axis=-1)
    return rotated.astype(heads.dtype)


def _angles(positions: mx.array, length: int, half: int, base: float) -> mx.array:
    """In radians, (L, D / 2), or (B, 1, L, D / 2) if each row has its own position."""
    each = positions[..., None] + mx.arange(length) if length > 1 else positions[..., None]
    angles = each[..., None] * _frequencies(half, base)
    return angles[:, None] if angles.ndim == 3 else angles


def _frequencies(half: int, base: float) -> mx.array:
    return mx.exp(mx.arange(half) * (-math.log(base) / half))
