"""What differs between Metal and CUDA for the kernels of `sources.py`, which are written in what both have in common.

A body may use: `group` (number of its threadgroup), `member` (number of a thread in the group), `lane` (of its team of
32 threads) and `team` (of the group); `lane_sum(x)`, over the lanes of a team; `GROUP_SHARED`, memory that a group
shares; `GROUP_BARRIER()` and `TEAM_BARRIER()`; and `e_to`, `two_to`, `inverse_root`, `sine`, `cosine`, `nearest` of a
float.
"""

from dataclasses import dataclass

TEAM = 32  # threads of a simdgroup on Metal and of a warp on CUDA


@dataclass(frozen=True)
class Dialect:
    """Code before a kernel, and at the beginning of its body."""

    header: str
    prologue: str


_METAL = Dialect(
    header="""
#define GROUP_SHARED threadgroup
#define GROUP_BARRIER() threadgroup_barrier(metal::mem_flags::mem_threadgroup)
#define TEAM_BARRIER() simdgroup_barrier(metal::mem_flags::mem_threadgroup)
inline float lane_sum(float x) { return metal::simd_sum(x); }
inline float e_to(float x) { return metal::exp(x); }
inline float two_to(float x) { return metal::precise::exp2(x); }
inline float inverse_root(float x) { return metal::precise::rsqrt(x); }
inline float sine(float x) { return metal::precise::sin(x); }
inline float cosine(float x) { return metal::precise::cos(x); }
inline float nearest(float x) { return metal::round(x); }
""",
    prologue="""
    const int group = threadgroup_position_in_grid.x;
    const int member = thread_position_in_threadgroup.x;
    const int lane = thread_index_in_simdgroup;
    const int team = simdgroup_index_in_threadgroup;
""",
)

_CUDA = Dialect(
    header="""
#define GROUP_SHARED __shared__
#define GROUP_BARRIER() __syncthreads()
#define TEAM_BARRIER() __syncwarp()
__device__ inline float lane_sum(float x) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}
__device__ inline float e_to(float x) { return expf(x); }
__device__ inline float two_to(float x) { return exp2f(x); }
__device__ inline float inverse_root(float x) { return rsqrtf(x); }
__device__ inline float sine(float x) { return sinf(x); }
__device__ inline float cosine(float x) { return cosf(x); }
__device__ inline float nearest(float x) { return roundf(x); }
""",
    prologue="""
    const int group = blockIdx.x;
    const int member = threadIdx.x;
    const int lane = member % 32;
    const int team = member / 32;
""",
)

DIALECTS = {"metal": _METAL, "cuda": _CUDA}
