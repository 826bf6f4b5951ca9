#include "vector_neon.h"
// The vectors come first: the kernels are written in terms of them.
#include "kernels_impl.h"

namespace openelm {

const Kernels& neon_kernels() {
  static constexpr Kernels kernels = kernels_named("neon");
  return kernels;
}

}  // namespace openelm
