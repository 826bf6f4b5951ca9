#include "bytes_avx2.h"
#include "vector_avx512.h"
// The vectors come first: the kernels are written in terms of them.
#include "int8_impl.h"
#include "kernels_impl.h"

namespace openelm {

const Kernels& avx512_kernels() {
  static constexpr Kernels kernels = kernels_named("avx512");
  return kernels;
}

}  // namespace openelm
