// What a layer of the network computes beside products, by all threads. A row's result is the same to the bit whatever
// other rows there are.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "pool.h"

namespace openelm {

// Vectors (batch, heads, length, size) whose elements lie side by side; strides in floats.
struct Heads {
  const float* data;
  int64_t batch, heads, length, size;
  int64_t batch_stride, head_stride, stride;

  const float* at(int64_t b, int64_t h) const { return data + b * batch_stride + h * head_stride; }
};

// Which keys a query sees: all, those up to its own place if the last query is at the last key, or as a mask of bytes
// says, whose strides may be 0.
struct Mask {
  bool causal = false;
  const uint8_t* allowed = nullptr;
  int64_t batch_stride = 0, head_stride = 0, stride = 0, key_stride = 0;
};

// Scaled attention of queries (B, H, L, D), without gaps, over keys and values (B, K, S, D) where K divides H. A query
// without a key gives zeros. out (B, L, H, D).
void attend(const Kernels&, Pool&, const Heads& queries, const Heads& keys, const Heads& values, const Mask&, float scale,
            float* out);

// From vectors (B, L, H + 2K, D): queries (B, H, L, D) and keys (B, K, L, D), divided by their root mean squares and
// rotated, and values (B, K, L, D).
struct Rotation {
  int64_t batch, length, query_heads, kv_heads, size;
  const float* query_weight;  // (D,); null: no norm
  const float* key_weight;
  float eps;
  const float* cosines;  // (L, D / 2) or (B, L, D / 2)
  const float* sines;
  int64_t batch_stride;  // of cosines and sines
};
void normalize_and_rotate(Pool&, const Rotation&, const float* x, float* queries, float* keys, float* values);

// Each row (columns) divided by its root mean square, times `weight` unless that is null.
void normalize_rows(const float* x, const float* weight, float eps, int64_t rows, int64_t columns, float* out);

// x + update, and that normalized.
void add_and_normalize(Pool&, const float* x, const float* update, const float* weight, float eps, int64_t rows,
                       int64_t columns, float* sum, float* normed);

// From rows of a gate and then an input, (rows, 2 columns): the input times the gate's SiLU (rows, columns).
void gate_rows(const Kernels&, Pool&, const float* x, int64_t rows, int64_t columns, float* out);

// The logarithm of the sum of the exponentials of each row.
void log_sum_exp(const Kernels&, Pool&, const float* x, int64_t rows, int64_t columns, float* out);

}  // namespace openelm
