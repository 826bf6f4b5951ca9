// Products of whole arrays, by all threads.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "pool.h"

namespace openelm {

constexpr int64_t kFew = 32;  // up to so many inputs, the result for one is the same to the bit whatever the others are

// y (inputs, rows) = x (inputs, columns) times the transposed matrix.
void product(const Kernels&, Pool&, const Matrix&, const float* x, int64_t inputs, float* y);

// Rows of the matrix by their numbers, each below `rows`: out (count, columns).
void take_rows(const Kernels&, Pool&, const Matrix&, const int32_t* numbers, int64_t count, float* out);

// The fastest set of kernels that this processor can run, or that of a name; null if there is none of that name.
const Kernels* kernels_for(const char* name = nullptr);

}  // namespace openelm
