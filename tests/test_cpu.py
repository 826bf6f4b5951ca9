"""The network's operations on the CPU, with `openelm-mlx-native` where it is installed."""

import mlx.core as mx
import pytest
from hypothesis import given, settings, strategies as st
from test_native import cpu, installed, instructions as instructions, kernels, normal, on_the_cpu as on_the_cpu

from conftest import assert_close
from mlx_openelm.kernels import cpu as ops

EPS = 1e-6


def heads(batch, queries, groups, length, keys, size):
    return normal(batch, queries, length, size), *(normal(batch, groups, keys, size, seed=n) for n in (1, 2))


def mlx_attention(queries, keys, values, mask=None):
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=queries.shape[-1] ** -0.5, mask=mask)


def assert_attends_like_mlx(queries, keys, values, mask=None):
    found = ops.attention(queries, keys, values, mask)
    expected = mlx_attention(queries, keys, values, "causal" if mask is None and queries.shape[2] > 1 else mask)
    assert found.shape == expected.shape
    assert_close(found, expected, 1e-5 * mx.abs(expected).max().item())


def turned(qkv, norms, table, H):
    """The formula of `normalize_and_rotate`."""
    K = (qkv.shape[2] - H) // 2
    queries, keys, values = mx.split(qkv.swapaxes(1, 2), [H, H + K], axis=1)
    if norms is not None:
        queries, keys = (mx.fast.rms_norm(x, w, EPS) for x, w in zip((queries, keys), norms, strict=True))
    cosine, sine = table

    def rotated(x):
        first, second = mx.split(x, 2, axis=-1)
        return mx.concatenate([first * cosine - second * sine, first * sine + second * cosine], axis=-1)

    return rotated(queries), rotated(keys), values


class TestAttention:
    @pytest.mark.parametrize(
        "sizes", [(1, 4, 1, 1, 1, 64), (1, 12, 3, 1, 77, 64), (2, 6, 3, 5, 40, 16), (1, 4, 2, 70, 130, 64),
                  (1, 2, 1, 33, 33, 12), (3, 4, 4, 1, 300, 20), (1, 2, 2, 3, 7, 6)]
    )  # fmt: skip
    def test_is_mlxs(self, instructions, sizes):
        given = heads(*sizes)
        assert_attends_like_mlx(*given)
        B, _, _, L, S, _ = sizes
        first = mx.array([row * S // (2 * B) for row in range(B)])[:, None, None, None]
        assert_attends_like_mlx(*given, mx.arange(S) >= first)
        gaps = mx.random.uniform(shape=(L, S), key=mx.random.key(5)) < 0.3
        gaps[:, S // 2] = True
        assert_attends_like_mlx(*given, gaps)
        assert_close(kernels.attention(*given, sizes[-1] ** -0.5), mlx_attention(*given), 1e-5)

    @installed
    @settings(max_examples=60, deadline=None)
    @given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 40), st.integers(0, 60),
           st.sampled_from([2, 6, 16, 24, 64]), st.integers(0, 99))  # fmt: skip
    def test_is_mlxs_for_any_sizes_and_masks(self, batch, groups, share, length, before, size, seed):
        with mx.stream(cpu):
            given = heads(batch, groups * share, groups, length, before + length, size)
            assert_attends_like_mlx(*given)
            mask = mx.random.uniform(shape=(batch, 1, length, before + length), key=mx.random.key(seed)) < seed / 100
            mask[..., seed % (before + length)] = True
            assert_attends_like_mlx(*given, mask)

    @installed
    def test_reads_views_of_buffers(self):
        queries, keys, values = heads(2, 4, 2, 3, 90, 16)
        assert_attends_like_mlx(queries, keys[:, :, 5:50], values[:, :, 5:50])
        assert_attends_like_mlx(queries.swapaxes(1, 2).swapaxes(1, 2)[:, :, ::-1], keys[:, :, ::2], values[:, :, ::2])
        columns = normal(2, 2, 16, 90, seed=4).swapaxes(2, 3)
        assert_attends_like_mlx(queries[:, :, -1:], columns, columns)

    def test_a_query_is_equal_to_the_bit_in_any_batch_and_at_any_place(self, instructions):
        queries, keys, values = heads(1, 6, 3, 70, 150, 64)
        whole = kernels.attention(queries, keys, values, 0.125, causal=True)
        for place in (0, 1, 33, 69):
            end = 150 - 70 + place + 1
            alone = kernels.attention(queries[:, :, place : place + 1], keys[:, :, :end], values[:, :, :end], 0.125)
            assert mx.array_equal(alone[:, :, 0], whole[:, :, place])
        room = normal(1, 3, 37, 64, seed=9)  # behind other slots that it does not see, as in a padded batch
        moved = [mx.concatenate([room, part, room], axis=2) for part in (keys, values)]
        slots = mx.arange(37 + 150 + 37)
        seen = (slots >= 37) & (slots < 187)
        alone = kernels.attention(queries[:, :, -1:], *moved, 0.125, mask=seen)
        assert mx.array_equal(alone[:, :, 0], whole[:, :, -1])

    @installed
    def test_a_query_that_sees_nothing_reads_zeros(self):
        queries, keys, values = heads(1, 2, 1, 2, 9, 16)
        mask = mx.array([[False] * 9, [True] * 9])
        read = kernels.attention(queries, keys, values, 0.25, mask=mask)
        assert mx.array_equal(read[:, :, 0], mx.zeros((1, 2, 16)))
        assert_close(read[:, :, 1:], mlx_attention(queries[:, :, 1:], keys, values), 1e-5)

    @installed
    def test_large_scores_do_not_overflow(self):
        queries, keys, values = heads(1, 2, 1, 4, 50, 16)
        assert_attends_like_mlx(queries * 1e4, keys, values)

    @installed
    def test_gradients_are_mlxs(self):
        given = heads(1, 4, 2, 5, 9, 16)
        for argument in range(3):
            by = lambda f: mx.grad(lambda *a: f(*a).square().sum(), argument)(*given)  # noqa: B023, E731
            found = by(lambda *a: kernels.attention(*a, 0.25, causal=True))
            assert_close(found, by(lambda *a: mlx_attention(*a, "causal")), 1e-4)

    @installed
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"queries": normal(2, 4, 3, 16)}, "do not fit together"),
            ({"keys": normal(1, 2, 9, 8)}, "do not fit together"),
            ({"queries": normal(1, 3, 3, 16)}, "do not fit together"),
            ({"queries": normal(4, 3, 16)}, "too few axes"),
            ({"values": normal(1, 2, 9, 16).astype(mx.float16)}, "must be float32"),
            ({"scale": 0.0}, "scale must be positive"),
            ({"mask": mx.zeros((3, 9))}, "mask must be bool"),
            ({"mask": mx.ones((3, 9), mx.bool_), "causal": True}, "not both"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, change, said):
        given = dict(zip(("queries", "keys", "values"), heads(1, 4, 2, 3, 9, 16), strict=True))
        with pytest.raises(ValueError, match=said):
            kernels.attention(**{**given, "scale": 0.25, **change})


class TestNormalizeAndRotate:
    @pytest.mark.parametrize("own_positions", [False, True])
    @pytest.mark.parametrize("normed", [False, True])
    def test_is_the_formula(self, instructions, own_positions, normed):
        B, L, H, K, D = 3, 5, 6, 2, 16
        qkv = normal(B, L, H + 2 * K, D)
        norms = (normal(D, seed=1), normal(D, seed=2)) if normed else None
        angles = 3 * (normal(B, 1, L, D // 2, seed=3) if own_positions else normal(L, D // 2, seed=3))
        table = mx.cos(angles), mx.sin(angles)
        found = ops.normalize_and_rotate(qkv, norms, table, H, EPS)
        for own, expected in zip(found, turned(qkv, norms, table, H), strict=True):
            assert own.shape == expected.shape
            assert_close(own, expected, 1e-5)

    @installed
    def test_gradients_are_the_formulas(self):
        qkv, norms = normal(2, 3, 8, 16), (normal(16, seed=1), normal(16, seed=2))
        angles = normal(3, 8, seed=3)
        table = mx.cos(angles), mx.sin(angles)

        def loss(rotate):
            return lambda qkv, q, k: sum(part.square().sum() * n for n, part in enumerate(rotate(qkv, (q, k)), 1))

        of_ours = loss(lambda qkv, norms: ops.normalize_and_rotate(qkv, norms, table, 4, EPS))
        of_formula = loss(lambda qkv, norms: turned(qkv, norms, table, 4))
        for argument in range(3):
            found, expected = (mx.grad(f, argument)(qkv, *norms) for f in (of_ours, of_formula))
            assert_close(found, expected, 1e-4 * mx.abs(expected).max().item())

    @installed
    @pytest.mark.parametrize(
        ("qkv", "table", "said"),
        [
            (normal(1, 3, 7, 16), normal(3, 8), "heads must be"),
            (normal(1, 3, 4, 16), normal(3, 8), "heads must be"),
            (normal(1, 3, 8, 15), normal(3, 7), "heads must be"),
            (normal(1, 3, 8, 16), normal(2, 8), "cosines and sines must be"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, qkv, table, said):
        with pytest.raises(ValueError, match=said):
            ops.normalize_and_rotate(qkv, None, (table, table), 4, EPS)


class TestRows:
    def test_norms_and_sums_are_the_formulas(self):
        x, update, weight = normal(2, 3, 71), normal(2, 3, 71, seed=1), normal(71, seed=2)
        total, normed = ops.add_and_normalize(x, update, weight, EPS)
        assert mx.array_equal(total, x + update)
        assert_close(normed, mx.fast.rms_norm(x + update, weight, EPS), 1e-5)
        assert_close(ops.rms_norm(x, None, EPS), mx.fast.rms_norm(x, None, EPS), 1e-5)
        half = x.astype(mx.float16)
        assert ops.add_and_normalize(half, half, weight.astype(mx.float16), EPS)[1].dtype == mx.float16

    def test_the_gate_is_silu(self, instructions):
        for columns in (1, 8, 33, 640):
            x = 6 * normal(3, 2, 2 * columns)
            gate, given = mx.split(x, 2, axis=-1)
            assert_close(ops.gated(x), gate * mx.sigmoid(gate) * given, 2e-5)
        ends = mx.array([-1e30, -100.0, -88.0, 0.0, 88.0, 1e30, mx.inf, mx.nan])
        found = ops.gated(mx.concatenate([ends, mx.ones(8)]))
        assert_close(found[:4], mx.zeros(4), 1e-6)
        assert mx.array_equal(found[4:7], ends[4:7])
        assert mx.isnan(found[7]).item()

    def test_log_sum_exp_is_mlxs(self, instructions):
        for columns in (1, 7, 32_001):
            x = 5 * normal(2, 3, columns)
            assert_close(ops.log_sum_exp(x), mx.logsumexp(x.astype(mx.float64), axis=-1).astype(mx.float32), 2e-5)
        ends = mx.array([[-mx.inf, -mx.inf], [0.0, -mx.inf], [1e30, 0.0], [mx.nan, 0.0], [-200.0, -200.0]])
        found = ops.log_sum_exp(ends).tolist()
        assert found[:3] == [-mx.inf, 0.0, mx.array(1e30).item()]
        assert found[3] != found[3]
        assert abs(found[4] + 200 - 0.6931472) < 2e-5

    def test_rows_are_equal_to_the_bit_in_any_batch(self, instructions):
        x = normal(40, 66)
        for function in (ops.gated, ops.log_sum_exp, lambda x: ops.rms_norm(x, None, EPS)):
            together = function(x)
            for row in (0, 7, 39):
                assert mx.array_equal(function(x[row : row + 1])[0], together[row])

    @installed
    def test_gradients_and_vectorization_are_mlxs(self):
        x = normal(4, 6)
        pairs = (ops.gated, lambda x: x[..., :3] * mx.sigmoid(x[..., :3]) * x[..., 3:]), (
            ops.log_sum_exp, lambda x: mx.logsumexp(x, axis=-1))  # fmt: skip
        for ours, mlxs in pairs:
            found, expected = (mx.grad(lambda x, f=f: f(x).square().sum())(x) for f in (ours, mlxs))
            assert_close(found, expected, 1e-5)
            assert_close(mx.vmap(ours)(x), mlxs(x), 1e-5)
            assert_close(mx.vmap(ours, in_axes=1)(x.T), mlxs(x), 1e-5)
        both = lambda f: lambda x, u: sum(part.square().sum() for part in f(x, u))  # noqa: E731
        weight = normal(6, seed=1)
        ours = both(lambda x, u: ops.add_and_normalize(x, u, weight, EPS))
        plain = both(lambda x, u: (x + u, mx.fast.rms_norm(x + u, weight, EPS)))
        assert_close(mx.grad(ours)(x, x), mx.grad(plain)(x, x), 1e-4)

    def test_other_types_are_computed_by_mlx(self):
        x = normal(2, 8).astype(mx.bfloat16)
        assert ops.gated(x) is None
        assert ops.attention(x[None, None], x[None, None], x[None, None], None) is None
        assert ops.log_sum_exp(x).dtype == mx.bfloat16
