"""Runs the kernels for GPUs on the CPU: their bodies are C++, and each thread of a group becomes a coroutine.

In place of `mx.fast.metal_kernel`, so that what is tested is all but Metal's own compiler.
"""

import ctypes
import subprocess

import mlx.core as mx
import numpy as np

from mlx_openelm.kernels.dialects import DIALECTS

TYPES = {mx.float32: "float", mx.bfloat16: "bfloat16", mx.int32: "int32_t", mx.uint32: "uint32_t"}
_POISON = 0x7F  # bytes of an output that a kernel did not write

_HEADER = r"""
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

struct bfloat16 {
    uint16_t bits;
    bfloat16() = default;
    explicit bfloat16(float value) {
        uint32_t word;
        memcpy(&word, &value, 4);
        bits = (word + 0x7fff + (word >> 16 & 1)) >> 16;
    }
    operator float() const {
        const uint32_t word = uint32_t(bits) << 16;
        float value;
        memcpy(&value, &word, 4);
        return value;
    }
};

static ucontext_t scheduler, threads[1024];
static bool finished[1024];
static float of_lane[1024];
static int current_group, current, count, arrived, generation;

static void yield() { swapcontext(&threads[current], &scheduler); }

static float lane_sum(float x) {
    of_lane[current] = x;
    yield();
    float sum = 0;
    for (int i = current / 32 * 32; i < current / 32 * 32 + 32; i++) sum += of_lane[i];
    yield();
    return sum;
}

static void barrier() {
    const int before = generation;
    if (++arrived == count) {
        arrived = 0;
        generation++;
    }
    do yield(); while (generation == before);
}

#define GROUP_SHARED static
#define GROUP_BARRIER() barrier()
#define TEAM_BARRIER() yield()
static float e_to(float x) { return expf(x); }
static float two_to(float x) { return exp2f(x); }
static float inverse_root(float x) { return 1 / sqrtf(x); }
static float sine(float x) { return sinf(x); }
static float cosine(float x) { return cosf(x); }
static float nearest(float x) { return roundf(x); }
static void **arrays;
"""

_PROLOGUE = """
    const int group = current_group, member = current, lane = member % 32, team = member / 32;
"""

_FOOTER = """
static void run_thread() {
    body();
    finished[current] = true;
    yield();
}

extern "C" void run(void **given, int groups, int threads_per_group) {
    arrays = given;
    count = threads_per_group;
    char *stacks = static_cast<char *>(malloc(size_t(count) << 16));
    for (current_group = 0; current_group < groups; current_group++) {
        for (int i = 0; i < count; i++) {
            finished[i] = false;
            getcontext(&threads[i]);
            threads[i].uc_stack.ss_sp = &stacks[size_t(i) << 16];
            threads[i].uc_stack.ss_size = 1 << 16;
            makecontext(&threads[i], run_thread, 0);
        }
        for (bool busy = true; busy;) {
            busy = false;
            for (current = 0; current < count; current++)
                if (!finished[current]) {
                    busy = true;
                    swapcontext(&scheduler, &threads[current]);
                }
        }
    }
    free(stacks);
}
"""


class HostKernels:
    """Creates kernels as `mx.fast.metal_kernel` and `mx.fast.cuda_kernel` do.

    Attributes:
        calls: names of the kernels that were called.

    Args:
        folder: for what the C++ compiler writes.
    """

    def __init__(self, folder):
        self.calls = []
        self._folder = folder
        self._built = {}

    def __call__(self, *, name, input_names, output_names, source, header):
        """As `mx.fast.metal_kernel`."""
        (dialect,) = (dialect for dialect in DIALECTS.values() if dialect.header == header)
        assert source.startswith(dialect.prologue)
        body = source.removeprefix(dialect.prologue)

        def kernel(*, inputs, template, grid, threadgroup, output_shapes, output_dtypes):
            self.calls.append(name)
            types = [TYPES[array.dtype] for array in inputs], [TYPES[dtype] for dtype in output_dtypes]
            run = self._library(name, _code(body, template, input_names, output_names, *types))
            given = [_to_numpy(array) for array in inputs]
            found = [np.full(shape, _POISON, np.uint8) for shape in _byte_shapes(output_shapes, output_dtypes)]
            pointers = (ctypes.c_void_p * (len(given) + len(found)))(
                *(array.ctypes.data_as(ctypes.c_void_p) for array in (*given, *found))
            )
            assert grid[0] % threadgroup[0] == 0
            run(pointers, grid[0] // threadgroup[0], threadgroup[0])
            return [_to_mlx(*parts) for parts in zip(found, output_shapes, output_dtypes, strict=True)]

        return kernel

    def _library(self, name, code):
        if code not in self._built:
            path = self._folder / f"{name}{len(self._built)}.cpp"
            path.write_text(code)
            library = path.with_suffix(".so")
            options = ("-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off")
            subprocess.run(["g++", *options, path, "-o", library], check=True)
            self._built[code] = ctypes.CDLL(str(library)).run
        return self._built[code]


def _code(body, template, input_names, output_names, input_types, output_types):
    constants = [
        f"using {name} = {TYPES[value]};" if isinstance(value, mx.Dtype) else f"constexpr int {name} = {int(value)};"
        for name, value in template
    ]
    names, types = [*input_names, *output_names], [*(f"const {kind}" for kind in input_types), *output_types]
    arrays = [
        f"auto {name} = static_cast<{kind} *>(arrays[{number}]);"
        for number, (name, kind) in enumerate(zip(names, types, strict=True))
    ]
    return "\n".join([_HEADER, "static void body() {", *constants, *arrays, _PROLOGUE, body, "}", _FOOTER])


def _to_numpy(array):
    plain = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.ascontiguousarray(np.array(plain))


def _byte_shapes(shapes, dtypes):
    return [(int(np.prod(shape)) * dtype.size,) for shape, dtype in zip(shapes, dtypes, strict=True)]


def _to_mlx(found, shape, dtype):
    raw = {mx.bfloat16: np.uint16, mx.float32: np.float32, mx.uint32: np.uint32}[dtype]
    array = mx.array(found.view(raw).reshape(shape))
    return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array
