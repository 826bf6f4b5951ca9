#include "product.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "buffer.h"

namespace openelm {
namespace {

constexpr int64_t kSmallest = 1 << 15;  // weights of a share of the work; with fewer, sharing takes longer than the work
constexpr int64_t kBlock = 768;  // inputs whose results are collected before they are transposed

void few(const Kernels& kernels, Pool& pool, const Matrix& matrix, const float* x, int64_t inputs, float* y) {
  thread_local Buffer buffer;
  const int64_t size = kernels.prepared_size(matrix.format, matrix.columns);
  float* prepared = buffer.floats(size * inputs);
  const auto prepare = [&](int64_t m) {
    kernels.prepare(matrix.format, matrix.columns, x + m * matrix.columns, prepared + m * size);
  };
  if (inputs * matrix.columns < kSmallest) {
    for (int64_t m = 0; m < inputs; ++m) prepare(m);
  } else {
    pool.run(inputs, prepare);
  }
  const int64_t smallest = std::max<int64_t>(1, kSmallest / (matrix.columns * inputs));
  int64_t share = std::max(smallest, ceil_div(matrix.rows, 8 * pool.threads()));
  share = ceil_div(share, 16) * 16;
  pool.run(ceil_div(matrix.rows, share), [&](int64_t number) {
    kernels.multiply(matrix, prepared, inputs, number * share, std::min(matrix.rows, (number + 1) * share), y);
  });
}

// Results (rows, inputs) to y (inputs, rows).
void transpose(const float* results, int64_t stride, int64_t rows, int64_t inputs, float* y, int64_t y_stride) {
  for (int64_t m = 0; m < inputs; m += 8)
    for (int64_t i = m; i < std::min(inputs, m + 8); ++i)
      for (int64_t n = 0; n < rows; ++n) y[i * y_stride + n] = results[n * stride + i];
}

void many(const Kernels& kernels, Pool& pool, const Matrix& matrix, const float* x, int64_t inputs, float* y) {
  thread_local Buffer packed_buffer;
  const int64_t columns = matrix.columns, panels = ceil_div(inputs, kernels.panel);
  const int64_t width = ceil_div(inputs, 16) * 16 + 3 * 16;
  float* packed = packed_buffer.floats(panels * kernels.panel * columns);
  const auto lanes_of = [&](int64_t count) { return ceil_div(count, kernels.lanes) * kernels.lanes; };
  // The panels of a range of columns lie together, each (depth, inputs).
  const auto panel_at = [&](int64_t panel, int64_t from, int64_t depth) {
    return packed + from * panels * kernels.panel + panel * kernels.panel * depth;
  };
  pool.run(panels, [&](int64_t panel) {
    const int64_t start = panel * kernels.panel, count = std::min<int64_t>(kernels.panel, inputs - start);
    for (int64_t from = 0; from < columns; from += kTileDepth) {
      const int64_t depth = std::min<int64_t>(kTileDepth, columns - from);
      kernels.pack(x + start * columns + from, columns, count, depth, lanes_of(count), panel_at(panel, from, depth));
    }
  });
  const bool unpacked = matrix.format.values == Values::float32;
  pool.run(ceil_div(matrix.rows, kTileRows), [&](int64_t number) {
    thread_local Buffer tile_buffer, result_buffer;
    const int64_t row = number * kTileRows, rows = std::min<int64_t>(kTileRows, matrix.rows - row);
    float* tile = tile_buffer.floats(kTileRows * kTileDepth);
    float* results = result_buffer.floats(kTileRows * width);
    for (int64_t from = 0; from < columns; from += kTileDepth) {
      const int64_t depth = std::min<int64_t>(kTileDepth, columns - from);
      const float* weights = tile;
      int64_t stride = kTileDepth;
      if (unpacked) {
        weights = reinterpret_cast<const float*>(matrix.words) + row * columns + from;
        stride = columns;
      } else {
        for (int64_t n = 0; n < rows; ++n) kernels.unpack(matrix, row + n, from, from + depth, tile + n * kTileDepth);
      }
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t start = panel * kernels.panel, count = std::min<int64_t>(kernels.panel, inputs - start);
        kernels.tile(weights, stride, rows, panel_at(panel, from, depth), lanes_of(count), count, depth, results + start,
                     width, from > 0);
      }
    }
    transpose(results, width, rows, inputs, y + row, matrix.rows);
  });
}

// Groups must hold whole vectors of bytes, and weights must be whole numbers.
bool takes_int8(const Format& format) {
  return format.values == Values::affine || (format.values == Values::fp4 && format.group >= 32);
}

void many_int8(const Kernels& kernels, Pool& pool, const Matrix& matrix, const float* x, int64_t inputs, float* y) {
  const int64_t columns = matrix.columns, groups = matrix.groups();
  std::vector<int8_t> values(inputs * columns);
  std::vector<float> scales(inputs * groups), sums(inputs * groups);
  const int64_t share = 8;
  pool.run(ceil_div(inputs, share), [&](int64_t part) {
    for (int64_t m = part * share; m < std::min(inputs, (part + 1) * share); ++m)
      kernels.quantize(x + m * columns, columns, matrix.format.group, values.data() + m * columns,
                       scales.data() + m * groups, sums.data() + m * groups);
  });
  const int64_t rows = 16;
  pool.run(ceil_div(matrix.rows, rows), [&](int64_t number) {
    kernels.multiply_int8(matrix, values.data(), scales.data(), sums.data(), inputs, number * rows,
                          std::min(matrix.rows, (number + 1) * rows), y);
  });
}

}  // namespace

void product(const Kernels& kernels, Pool& pool, const Matrix& matrix, const float* x, int64_t inputs, float* y) {
  if (inputs <= kFew) return few(kernels, pool, matrix, x, inputs, y);
  if (matrix.format.int8_inputs && takes_int8(matrix.format)) return many_int8(kernels, pool, matrix, x, inputs, y);
  const int64_t blocks = ceil_div(inputs, kBlock), size = ceil_div(inputs, blocks);
  for (int64_t start = 0; start < inputs; start += size)
    many(kernels, pool, matrix, x + start * matrix.columns, std::min(size, inputs - start), y + start * matrix.rows);
}

void take_rows(const Kernels& kernels, Pool& pool, const Matrix& matrix, const int32_t* numbers, int64_t count,
               float* out) {
  const int64_t share = std::max<int64_t>(1, kSmallest / matrix.columns);
  pool.run(ceil_div(count, share), [&](int64_t part) {
    for (int64_t i = part * share; i < std::min(count, (part + 1) * share); ++i)
      kernels.unpack(matrix, numbers[i], 0, matrix.columns, out + i * matrix.columns);
  });
}

const Kernels* kernels_for(const char* name) {
  std::vector<const Kernels*> usable;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    usable.push_back(&avx512_kernels());
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    usable.push_back(&avx2_kernels());
#elif defined(__aarch64__)
  usable.push_back(&neon_kernels());
#endif
  usable.push_back(&plain_kernels());
  if (name == nullptr) return usable.front();
  for (const Kernels* kernels : usable)
    if (std::strcmp(kernels->name, name) == 0) return kernels;
  return nullptr;
}

}  // namespace openelm
