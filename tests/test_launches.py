"""The launches of a decoding step on Metal, counted without one, stay few; and the counter counts right."""

import re
import sys
from collections import Counter
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from launches import Case, our_step, peer_step
from memory_layout import Layout, contiguous
from metal_costs import COSTS, count
from step_graph import Value, as_on_metal, blank, drawn, fused, traced
from weightless import our_network

from mlx_openelm import OpenELMConfig

MOST = {  # launches of one token
    Case("270M"): 185,
    Case("450M"): 229,
    Case("1.1B"): 317,
    Case("3B"): 405,
    Case("270M", bits=4): 188,
    Case("1.1B", bits=4): 320,
    Case("3B", bits=4): 408,
    Case("270M", kv="8"): 248,
    Case("270M", kv="4"): 248,
    Case("3B", kv="8"): 548,
    Case("270M", kv="8", tokens=5000): 329,  # more slots than the kernel for quantized keys takes
    Case("270M", kv="window"): 236,
    Case("270M", tokens=1500, large_chip=True): 201,
    Case("270M", rows=4): 216,
    Case("270M", bits=4, rows=4): 196,
    Case("270M", rows=4, kv="8"): 275,
}


def cost(function, *arrays, compiled=False, large_chip=False):
    """Of a function of arrays."""
    with as_on_metal() as recorder:
        graph = traced(function, list(arrays), recorder)
        return count(fused(graph) if compiled else graph, large_chip).total


def launches(function, *arrays, **options):
    return cost(function, *arrays, **options).launches


@pytest.mark.parametrize("case", MOST, ids=repr)
def test_a_token_takes_no_more_launches_than_it_did(case):
    assert our_step(case).total.launches <= MOST[case]


def test_without_its_own_kernels_it_takes_more():
    assert our_step(Case("270M"), fused_kernels=False).total.launches > our_step(Case("270M")).total.launches


def test_the_launches_of_mlx_lm_are_those_counted_by_hand():
    """Per layer 4 norms, 4 products, 2 rotations, 2 writes, attention, SwiGLU and 2 sums; and 6 around the layers."""
    pytest.importorskip("mlx_lm")
    assert peer_step(Case("270M")).total.launches == 16 * 16 + 6
    assert peer_step(Case("270M", kv="8")).total.launches == 16 * 25 + 6


def test_nothing_is_computed_and_no_weight_takes_memory():
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    read = our_step(Case("3B")).total.bytes_read
    assert read > 6e9  # the weights, once
    assert mx.get_peak_memory() - before < 10e6


def test_a_network_reads_each_of_its_weights_once():
    total = our_step(Case("270M", tokens=10)).total
    config = OpenELMConfig.preset("270M")
    weights = sum(array.nbytes for _, array in tree_flatten(our_network(config, 0).parameters()))
    assert weights < total.bytes_read < 1.01 * weights


class TestLaunches:
    """Of single operations."""

    X = mx.zeros((2, 64))

    def test_views_are_free(self):
        assert launches(lambda x: [x.T, x[1:, ::2], x[None], x.reshape(4, 32), *mx.split(x, 2, axis=1)], self.X) == 0

    def test_a_transposed_array_is_copied_to_be_reshaped(self):
        found = cost(lambda x: x.T.reshape(-1), self.X)
        assert (found.launches, found.copies) == (1, 1)
        assert found.bytes_read == found.bytes_written == 2 * 64 * 4

    def test_elementwise_operations_are_one_when_compiled(self):
        swish = lambda x: x * mx.sigmoid(x) + 1  # noqa: E731
        assert launches(swish, self.X) == 3
        assert launches(swish, self.X, compiled=True) == 1

    def test_a_sum_reads_two_arrays_and_writes_one(self):
        found = cost(lambda x, y: x + y, self.X, self.X[:1])
        assert (found.bytes_read, found.bytes_written) == ((2 + 1) * 64 * 4, 2 * 64 * 4)

    def test_concatenation_is_one_for_each_part(self):
        assert launches(lambda x: mx.concatenate([x, x, x]), self.X) == 3

    def test_kernels_of_mlx_are_one_each(self):
        def norm_and_rotate(x, weight, offset):
            return mx.fast.rope(
                mx.fast.rms_norm(x, weight, 1e-6)[None],
                64,
                traditional=False,
                base=1e4,
                scale=1.0,
                offset=offset,
            )

        assert launches(norm_and_rotate, self.X, mx.ones(64), mx.array(3)) == 2

    def test_a_norm_copies_rows_with_gaps(self):
        heads = mx.zeros((4, 12, 1, 64))
        norm = lambda x: mx.fast.rms_norm(mx.split(x, [8], axis=1)[0], None, 1e-6)  # noqa: E731
        assert launches(norm, heads) == 2
        assert launches(norm, heads[:1]) == 1

    @pytest.mark.parametrize(
        ("heads", "slots", "large_chip", "expected"),
        [(4, 512, True, 1), (4, 1024, True, 2), (4, 4095, False, 1), (4, 4096, False, 2), (2, 4096, False, 1)],
    )
    def test_attention_over_many_keys_is_two(self, heads, slots, large_chip, expected):
        attend = lambda q, k: mx.fast.scaled_dot_product_attention(q, k, k, scale=1.0)  # noqa: E731
        queries, keys = mx.zeros((1, heads, 1, 64)), mx.zeros((1, 2, slots, 64))
        assert launches(attend, queries, keys, large_chip=large_chip) == expected

    def test_attention_copies_a_mask_that_is_broadcast_over_heads(self):
        attend = lambda q, k, mask: mx.fast.scaled_dot_product_attention(q, k, k, scale=1.0, mask=mask)  # noqa: E731
        for rows, expected in ((1, 1), (3, 2)):
            parts = mx.zeros((rows, 4, 1, 64)), mx.zeros((rows, 2, 32, 64)), mx.zeros((rows, 1, 1, 32), mx.bool_)
            assert launches(attend, *parts) == expected

    def test_a_product_of_several_rows_may_be_split(self):
        product = lambda x, w: x @ w.T  # noqa: E731
        assert launches(product, mx.zeros((1, 512)), mx.zeros((256, 512))) == 1
        assert launches(product, mx.zeros((4, 512)), mx.zeros((256, 512))) == 2
        assert launches(product, mx.zeros((4, 512)), mx.zeros((1024, 512))) == 1

    def test_a_quantized_product_copies_a_row_whose_stride_is_not_its_length(self):
        words, scales = blank((8, 8), mx.uint32), blank((8, 1), mx.float32)

        def product(x):
            return mx.quantized_matmul(mx.split(x, 2, axis=-1)[0], words, scales, scales, bits=4)

        assert launches(product, mx.zeros((1, 128))) == 2
        assert launches(lambda x: product(x.reshape(1, -1)), mx.zeros(128)) == 2
        assert launches(lambda x: mx.quantized_matmul(x, words, scales, scales, bits=4), self.X) == 1

    def test_a_quantized_product_over_many_slots_is_split(self):
        def read(weights, words, scales):
            return mx.quantized_matmul(weights, words, scales, scales, transpose=False, bits=8)

        for slots, expected in ((512, 1), (1024, 2)):
            buffers = mx.zeros((1, 1, slots, 16), mx.uint32), mx.zeros((1, 1, slots, 1))
            assert launches(read, mx.zeros((1, 1, 1, slots)), *buffers) == expected

    def test_a_write_by_index_is_one_and_by_an_array_of_starts_two(self):
        def by_index(buffer, new, slot):
            return mx.put_along_axis(buffer, mx.broadcast_to(slot.reshape(1, 1), new.shape), new, axis=0)

        def by_start(buffer, new, slot):
            return mx.slice_update(buffer, new, slot, axes=(0,))

        parts = mx.zeros((100, 8)), mx.ones((1, 8)), mx.array(3)
        for write, expected in ((by_index, 1), (by_start, 2)):
            found = cost(write, *parts)
            assert (found.launches, found.copies) == (expected, 0)
            assert (found.launches_in_flight, found.bytes_in_flight) == (1, 2 * 100 * 8 * 4)
            assert found.bytes_written == 8 * 4

    def test_a_buffer_that_is_read_elsewhere_is_copied_before_it_is_written(self):
        found = cost(lambda x, new: [mx.slice_update(x, new, mx.array(0), axes=(0,)), x + 1], self.X, self.X[:1])
        assert (found.launches, found.copies) == (2 + 1 + 1, 1)

    def test_a_custom_kernel_is_one_and_copies_what_is_not_in_row_order(self):
        def run(x, **options):
            kernel = mx.fast.metal_kernel(name="k", input_names=["x"], output_names=["y", "z"], source="", **options)
            return kernel(
                inputs=[x],
                grid=(1, 1, 1),
                threadgroup=(1, 1, 1),
                output_shapes=[x.shape, (1,)],
                output_dtypes=[mx.float32, mx.int32],
            )

        assert launches(run, self.X) == 1
        assert launches(lambda x: run(x.T), self.X) == 2
        assert launches(lambda x: run(x.T, ensure_row_contiguous=False), self.X) == 1

    def test_a_primitive_without_a_cost_is_an_error(self):
        with pytest.raises(KeyError, match="Sort"):
            launches(lambda x: mx.sort(x), self.X)

    def test_every_cost_names_its_place_in_mlx(self):
        for name, (_, place) in COSTS.items():
            assert re.search(r"mlx/\w+/.*\.cpp, \w+", place), name


FUNCTIONS = {
    "a chain": lambda x, y, s: mx.exp(x * 2 + 1) - y,
    "an inner result is an output": lambda x, y, s: [z := x * y, mx.sigmoid(z) + 1],
    "an inner result is used by a reduction": lambda x, y, s: [(z := x + y).sum(), mx.abs(z) * 2],
    "one operand of two chains": lambda x, y, s: [mx.exp(z := mx.sin(x)) + y, mx.log(z) * y],
    "two outputs of other shapes": lambda x, y, s: [mx.exp(x), mx.exp(x)[:1] * s],
    "a broadcast in two chains": lambda x, y, s: [(b := mx.broadcast_to(s, x.shape)) * x + 1, b - y * 3],
    "a broadcast that is read elsewhere": lambda x, y, s: [(b := mx.broadcast_to(s, x.shape)).sum(axis=0), b * x + 1],
    "a long chain": lambda x, y, s: sum((mx.sin(x * number) for number in range(30)), y),
    "deeper than is fused": lambda x, y, s: deep(x, 25),
    "a condition": lambda x, y, s: mx.where(x > y, x, -mx.inf).max(),
    "bits": lambda x, y, s: ((x > 0) & (y < 1)) | (x == y),
    "a product between": lambda x, y, s: mx.sigmoid(x @ y.T * 2 + 1),
    "a view between": lambda x, y, s: mx.exp((x * 2 + y).reshape(-1)) + 1,
    "squeezed": lambda x, y, s: mx.exp((x * y)[None]) + (x * y)[None],
    "rounded": lambda x, y, s: (x.astype(mx.bfloat16) * 2).astype(mx.float32) + y,
}


def deep(x, depth):
    for _ in range(depth):
        x = mx.sin(x)
    return x


ANY = [
    lambda a, b, s: mx.sin(a),
    lambda a, b, s: a * b,
    lambda a, b, s: a + mx.broadcast_to(s, a.shape),
    lambda a, b, s: mx.maximum(a, 0),
    lambda a, b, s: a @ b,
    lambda a, b, s: mx.where(a > b, a, b),
    lambda a, b, s: a.T,
    lambda a, b, s: a.sum(axis=0, keepdims=True) + b,
]


def random_function(seed):
    """A function of up to 30 operations, and up to 3 results."""

    def function(x, y, s):
        rng = np.random.default_rng(seed)
        values = [x, y]
        for kind in rng.integers(len(ANY), size=rng.integers(4, 30)):
            recent = values[rng.integers(max(0, len(values) - 6), len(values))]
            values.append(ANY[kind](recent, values[rng.integers(len(values))], s))
        return values[-rng.integers(1, 4) :]

    return function


class TestFused:
    def check(self, function):
        arrays = mx.ones((4, 4)), mx.zeros((4, 4)), mx.array([2.0])
        mx.eval(arrays)
        with as_on_metal() as recorder:
            expected = drawn(mx.compile(function)(*arrays))
            assert fused(traced(function, list(arrays), recorder)).names() == expected

    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_it_is_what_mlx_fuses(self, name):
        def function(*arrays):
            found = FUNCTIONS[name](*arrays)
            return found if isinstance(found, list) else [found]

        self.check(function)

    def test_it_is_what_mlx_fuses_in_any_graph(self):
        for seed in range(100):
            self.check(random_function(seed))

    def test_stand_ins_are_told_from_what_they_depend_on(self):
        with as_on_metal() as recorder:
            function = lambda x: mx.depends([mx.fast.rms_norm(x, None, 1e-6)], [x])[0] + mx.array([1], mx.int32)  # noqa: E731
            graph = traced(function, [mx.zeros((1, 64))], recorder)
        assert graph.names() == Counter(RMSNorm=1, Depends=1, AsType=1, Broadcast=1, Add=1)

    def test_what_was_replaced_is_restored(self):
        before = mx.fast.rms_norm, mx.fast.metal_kernel, mx.quantize
        with as_on_metal():
            assert mx.fast.rms_norm is not before[0]
        assert (mx.fast.rms_norm, mx.fast.metal_kernel, mx.quantize) == before

    def test_a_blank_array_of_any_size_takes_no_memory(self):
        before = mx.get_active_memory()
        assert blank((1 << 20, 1 << 20), mx.float32).nbytes == 1 << 42
        assert mx.get_active_memory() - before < 1 << 16


OPERATIONS = [
    lambda x, rng: mx.exp(x),
    lambda x, rng: x * x,
    lambda x, rng: x + mx.ones(x.shape),
    lambda x, rng: mx.ones(x.shape) + x[..., :1] if x.ndim else x,
    lambda x, rng: x.transpose(*rng.permutation(x.ndim).tolist()),
    lambda x, rng: x[tuple(slice(rng.integers(size), None, int(rng.integers(1, 3))) for size in x.shape)],
    lambda x, rng: mx.expand_dims(x, int(rng.integers(x.ndim + 1))),
    lambda x, rng: x.squeeze(),
    lambda x, rng: mx.broadcast_to(x[None], (3, *x.shape)),
    lambda x, rng: x.flatten(),
    lambda x, rng: x.reshape(*reversed(x.shape)),
    lambda x, rng: x.reshape(-1, x.shape[-1]) if x.ndim else x,
    lambda x, rng: x.reshape(*x.shape[:-1], 2, -1) if x.ndim and x.shape[-1] % 2 == 0 else x,
    lambda x, rng: mx.split(x, 2, axis=0)[1] if x.ndim and x.shape[0] % 2 == 0 else x,
    lambda x, rng: mx.split(x, 2, axis=-1)[0] if x.ndim and x.shape[-1] % 2 == 0 else x,
]


class TestLayouts:
    @pytest.mark.parametrize("seed", range(60))
    def test_strides_are_those_of_mlx_after_any_operations(self, seed):
        """Of what it computes on the CPU: this code is common to all backends."""
        rng = np.random.default_rng(seed)
        chosen = [OPERATIONS[number] for number in rng.integers(len(OPERATIONS), size=5)]
        x = mx.zeros([int(size) for size in rng.integers(1, 5, size=3) * 2])
        state = rng.bit_generator.state

        def function(x):
            rng.bit_generator.state = state
            for operation in chosen:
                x = operation(x, rng)
            return x

        result = function(x)
        mx.eval(result)
        with as_on_metal() as recorder:
            graph = traced(function, [x], recorder)
        layout = count(graph).layout(graph.outputs[0])
        ours = [stride * 4 for stride, size in zip(layout.strides, layout.shape, strict=True) if size > 1]
        theirs = memoryview(result)
        assert ours == [stride for stride, size in zip(theirs.strides, theirs.shape, strict=True) if size > 1]

    def test_a_compiled_result_lies_as_its_inputs(self):
        """So one row that is half of another keeps the other's length as its stride, which later costs a copy."""

        def swiglu(x):
            gate, hidden = mx.split(x, 2, axis=-1)
            return gate * mx.sigmoid(gate) * hidden

        x = mx.zeros((1, 64))
        result = mx.compile(swiglu)(x)
        mx.eval(result)
        with as_on_metal() as recorder:
            graph = fused(traced(swiglu, [x], recorder))
        assert count(graph).layout(graph.outputs[0]).strides == (64, 1)
        assert memoryview(result).strides == (64 * 4, 4)

    def test_layout_by_hand(self):
        plain = Layout(Value((2, 3, 4), mx.float32), contiguous((2, 3, 4)))
        assert (plain.strides, plain.nbytes, plain.is_row_contiguous, plain.is_dense) == ((12, 4, 1), 96, True, True)
        turned = Layout(Value((4, 3), mx.bfloat16), (1, 4))
        assert (turned.nbytes, turned.is_row_contiguous, turned.is_dense) == (24, False, True)
        repeated = Layout(Value((5, 3), mx.bfloat16), (0, 1))
        assert (repeated.nbytes, repeated.is_row_contiguous, repeated.is_dense) == (6, False, False)
        cut = Layout(Value((2, 3), mx.bfloat16), (8, 1))
        assert (cut.nbytes, cut.is_row_contiguous, cut.is_dense) == (12, False, False)
