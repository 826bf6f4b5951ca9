// Products of many inputs that are rounded to 8 bits, in groups of the matrix: an option, because it is less exact.
#pragma once

#include <cmath>

#include "elementwise_impl.h"

namespace openelm {
namespace {

// An input: whole numbers from -127 to 127 with a scale per group, and the sum of each group, of what was rounded: so the
// biases of the matrix cancel what they do without rounding.
void quantize(const float* x, int64_t columns, int group, int8_t* values, float* scales, float* sums) {
  for (int64_t g = 0; g < columns / group; ++g) {
    const float* from = x + g * group;
    float most = 0;
    for (int i = 0; i < group; ++i) most = std::max(most, std::abs(from[i]));
    const float inverse = most > 0 ? 127 / most : 0;
    int32_t total = 0;
    for (int i = 0; i < group; ++i) {
      const float value = from[i] * inverse;
      const int whole = static_cast<int>(value + (value < 0 ? -0.5f : 0.5f));
      values[g * group + i] = static_cast<int8_t>(whole);
      total += whole;
    }
    scales[g] = most / 127;
    sums[g] = scales[g] * static_cast<float>(total);
  }
}

// The packed values of a row as bytes; those of 4-bit floats as in `kFp4`.
template <class Code, bool FP4>
void unpack_bytes(const Matrix& matrix, int64_t row, uint8_t* out) {
  const int64_t bytes = matrix.row_bytes();
  const uint8_t* words = matrix.words + row * bytes;
  for (int64_t k = 0; k < matrix.columns; k += 32) {
    const int64_t at = k / 8 * matrix.format.bits;
    uint8_t rest[kSlack] = {};
    const uint8_t* from = words + at;
    if (row + 1 == matrix.rows && at + kSlack > bytes) {
      std::memcpy(rest, from, std::min<int64_t>(kSlack, bytes - at));
      from = rest;
    }
    static constexpr auto table = factors<Code>();
    float values[32];
    unrolled<Code::steps>([&](auto step) {
      constexpr int p = decltype(step)::value;
      Vector::store(values + p * L, Vector::mul(Code::template value<p>(from), Vector::load(table.data() + p * L)));
    });
    for (int i = 0; i < 32; ++i) {
      const auto value = static_cast<uint8_t>(static_cast<int>(values[i]));
      out[k + i] = FP4 ? kFp4[value] : value;
    }
  }
}

template <bool WIDE, int N, int M>
void multiply_bytes(const uint8_t* w, const float* w_scales, const float* w_biases, const int8_t* x,
                    const float* x_scales, const float* x_sums, int64_t columns, int group, float* y, int64_t y_stride) {
  const int64_t groups = columns / group;
  Bytes::F totals[N][M];
  float offsets[N][M];
  OPENELM_UNROLL for (int n = 0; n < N; ++n)
    OPENELM_UNROLL for (int m = 0; m < M; ++m) {
      totals[n][m] = Bytes::zero();
      offsets[n][m] = 0;
      for (int64_t g = 0; g < groups; ++g) offsets[n][m] += w_biases[n * groups + g] * x_sums[m * groups + g];
    }
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t k = g * group; k < (g + 1) * group;) {
      const bool two = !WIDE && group >= 64;
      OPENELM_UNROLL for (int n = 0; n < N; ++n) {
        const auto first = Bytes::load(w + n * columns + k), second = Bytes::load(w + n * columns + k + (two ? 32 : 0));
        OPENELM_UNROLL for (int m = 0; m < M; ++m) {
          const int8_t* at = x + m * columns + k;
          Bytes::F sum;
          if (WIDE) {
            sum = Bytes::products(first, Bytes::load(at));
          } else {
            auto pairs = Bytes::pairs(first, Bytes::load(at));
            if (two) pairs = Bytes::add_pairs(pairs, Bytes::pairs(second, Bytes::load(at + 32)));
            sum = Bytes::from_pairs(pairs);
          }
          const auto scale = Bytes::set(w_scales[n * groups + g] * x_scales[m * groups + g]);
          totals[n][m] = Bytes::fma(sum, scale, totals[n][m]);
        }
      }
      k += two ? 64 : 32;
    }
  OPENELM_UNROLL for (int n = 0; n < N; ++n)
    OPENELM_UNROLL for (int m = 0; m < M; ++m) y[m * y_stride + n] = Bytes::sum(totals[n][m]) + offsets[n][m];
}

void multiply_int8(const Matrix& matrix, const int8_t* values, const float* scales, const float* sums, int64_t inputs,
                   int64_t first, int64_t last, float* y) {
  thread_local std::vector<uint8_t> byte_buffer;
  thread_local std::vector<float> scale_buffer, bias_buffer;
  const int64_t columns = matrix.columns, groups = matrix.groups();
  const int group = matrix.format.group;
  uint8_t* bytes = scratch(byte_buffer, kRows * columns);
  float* w_scales = scratch(scale_buffer, kRows * groups + L);
  float* w_biases = scratch(bias_buffer, kRows * groups + L);
  for (int64_t row = first; row < last; row += kRows) {
    const int64_t count = std::min<int64_t>(kRows, last - row);
    decode_groups(matrix, row * groups, count * groups, w_scales, w_biases);
    for (int64_t n = 0; n < count; ++n) {
      uint8_t* out = bytes + n * columns;
      if (matrix.format.values == Values::fp4) {
        unpack_bytes<ByteCode<4>, true>(matrix, row + n, out);
        continue;
      }
      switch (matrix.format.bits) {
        case 2: unpack_bytes<ByteCode<2>, false>(matrix, row + n, out); break;
        case 3: unpack_bytes<ByteCode<3>, false>(matrix, row + n, out); break;
        case 4: unpack_bytes<ByteCode<4>, false>(matrix, row + n, out); break;
        case 5: unpack_bytes<ByteCode<5>, false>(matrix, row + n, out); break;
        case 6: unpack_bytes<ByteCode<6>, false>(matrix, row + n, out); break;
        default: std::memcpy(out, matrix.words + (row + n) * columns, columns);
      }
    }
    const auto block = [&](auto wide, auto rows, auto at_once, int64_t n, int64_t m) {
      multiply_bytes<decltype(wide)::value, decltype(rows)::value, decltype(at_once)::value>(
          bytes + n * columns, w_scales + n * groups, w_biases + n * groups, values + m * columns, scales + m * groups,
          sums + m * groups, columns, group, y + m * matrix.rows + row + n, matrix.rows);
    };
    const auto all = [&](auto wide) {
      constexpr std::integral_constant<int, 1> one;
      constexpr std::integral_constant<int, 2> two;
      constexpr std::integral_constant<int, 4> four;
      for (int64_t m = 0; m < inputs; m += m + 4 <= inputs ? 4 : 1)
        for (int64_t n = 0; n < count; n += n + 2 <= count ? 2 : 1) {
          if (m + 4 <= inputs && n + 2 <= count) block(wide, two, four, n, m);
          else if (m + 4 <= inputs) block(wide, one, four, n, m);
          else if (n + 2 <= count) block(wide, two, one, n, m);
          else block(wide, one, one, n, m);
        }
    };
    if (matrix.format.bits == 8) all(std::true_type{});
    else all(std::false_type{});
  }
}

constexpr Kernels kernels_named(const char* name) {
  return {name, L, kPanel, prepared_size, prepare, multiply, pack, unpack, tile, largest, exponentials, gate, quantize, multiply_int8};
}

}  // namespace
}  // namespace openelm
