#include "bytes_neon.h"
#include "vector_neon.h"
// The vectors come first: the kernels are written in terms of them.
#include "int8_impl.h"
#include "kernels_impl.h"

namespace openelm {

const Kernels& neon_kernels() {
  static constexpr Kernels kernels = kernels_named("neon");
  return kernels;
}

}  // namespace openelm
