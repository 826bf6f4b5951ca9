#include "bytes_plain.h"
#include "vector_plain.h"
// The vectors come first: the kernels are written in terms of them.
#include "int8_impl.h"
#include "kernels_impl.h"

namespace openelm {

const Kernels& plain_kernels() {
  static constexpr Kernels kernels = kernels_named("plain");
  return kernels;
}

}  // namespace openelm
