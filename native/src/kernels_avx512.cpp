#include "vector_avx512.h"
// The vectors come first: the kernels are written in terms of them.
#include "kernels_impl.h"

namespace openelm {

const Kernels& avx512_kernels() {
  static constexpr Kernels kernels = kernels_named("avx512");
  return kernels;
}

}  // namespace openelm
