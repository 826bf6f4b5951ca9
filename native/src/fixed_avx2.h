// Products of a few inputs with 2 or 4 bits in whole numbers, with AVX2.
//
// Converting each weight to a float would take longer than reading it. Instead an input is rounded to 24 bits once for
// all rows, as finely as its largest element is rounded in float32, and split into three planes of signed bytes:
// x = scale * (65536 high + 256 middle + low). One instruction multiplies 32 weights with 32 bytes. The sums of a group
// are exact, so their order does not matter.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <limits>

#include "codes.h"

namespace openelm {
namespace {

constexpr float kWhole = 127 * 65536;  // the largest input: its high byte is 127
constexpr float kTiny = 1e-30f;  // inputs below this are zero
constexpr int64_t kAheadFixed = 2048;  // bytes

// Vector v holds the v-th value of each byte. FP4: as in `kFp4`.
template <int BITS, bool FP4 = false>
struct FixedWords {
  static constexpr int bits = BITS, vectors = 8 / BITS, block = 32 * vectors;
  static constexpr bool scaled = true;
  static constexpr int column(int v, int i) { return i * vectors + v; }
  static void unpack(const uint8_t* p, __m256i (&out)[vectors]) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i mask = _mm256_set1_epi8((1 << BITS) - 1);
    const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(kFp4)));
    OPENELM_UNROLL for (int v = 0; v < vectors; ++v) {
      out[v] = _mm256_and_si256(_mm256_srli_epi16(raw, BITS * v), mask);
      if constexpr (FP4) out[v] = _mm256_shuffle_epi8(table, out[v]);
    }
  }
};

template <class Call>
auto with_fixed(const Format& format, const Call& call) {
  if (format.values == Values::fp4) return call(FixedWords<4, true>{});
  return format.bits == 2 ? call(FixedWords<2>{}) : call(FixedWords<4>{});
}

// A block may have one scale, or one in each half. Values of 3, 5 and 6 bits take longer to bring into bytes than to
// convert to floats, and those of 8 bits would overflow.
bool takes_fixed(const Format& format) {
  if (format.values == Values::fp4) return format.group >= 32;
  return format.values == Values::affine && (format.bits == 4 || (format.bits == 2 && format.group >= 64));
}

// The planes of an input, then the sums of its groups, then its scale.
struct FixedInput {
  int64_t blocks, padded, groups;

  FixedInput(const Format& format, int64_t columns, int64_t block)
      : blocks((columns + block - 1) / block), padded(blocks * block), groups((columns / format.group + 7) / 8 * 8) {}
  int64_t sums_at() const { return 3 * padded / 4; }
  int64_t scale_at() const { return sums_at() + groups; }
  int64_t size() const { return scale_at() + 8; }
};

int64_t fixed_size(const Format& format, int64_t columns) {
  return with_fixed(format, [&](auto code) { return FixedInput(format, columns, decltype(code)::block).size(); });
}

void prepare_fixed(const Format& format, int64_t columns, const float* x, float* prepared) {
  with_fixed(format, [&](auto code) {
    using Code = decltype(code);
    const FixedInput layout(format, columns, Code::block);
    float most = 0, nothing = 0;
    for (int64_t k = 0; k < columns; ++k) {
      most = std::max(most, std::abs(x[k]));
      nothing += x[k] * 0;  // NaN if an element is not finite
    }
    const float inverse = most > kTiny ? kWhole / most : 0;
    auto* planes = reinterpret_cast<int8_t*>(prepared);
    for (int64_t b = 0; b < layout.blocks; ++b)
      for (int v = 0; v < Code::vectors; ++v)
        for (int i = 0; i < 32; ++i) {
          const int64_t column = b * Code::block + Code::column(v, i);
          const float value = column < columns ? x[column] * inverse : 0;
          int32_t whole = nothing == 0 ? static_cast<int32_t>(value + (value < 0 ? -0.5f : 0.5f)) : 0;
          for (int plane = 2; plane >= 0; --plane) {  // the low byte first
            const auto byte = static_cast<int8_t>(whole & 255);
            planes[(b * 3 + plane) * Code::block + v * 32 + i] = byte;
            whole = (whole - byte) / 256;
          }
        }
    float* sums = prepared + layout.sums_at();
    for (int64_t g = 0; g < layout.groups; ++g) {
      float total = 0;
      if (g < columns / format.group)
        for (int k = 0; k < format.group; ++k) total += x[g * format.group + k];
      sums[g] = total;
    }
    prepared[layout.scale_at()] = nothing == 0 ? most / kWhole : std::numeric_limits<float>::quiet_NaN();
  });
}

// N rows with M inputs: totals[n][m], to be scaled by the input's scale. HALVES: a block has two scales.
template <class Code, bool HALVES, int N, int M>
void add_fixed(const uint8_t* const* rows, const float* const* scales, int scale_shift, const int8_t* planes,
               int64_t plane_stride, int64_t blocks, __m256 (&totals)[N][M]) {
  constexpr int bytes = Code::block / 8 * Code::bits;
  const __m256i ones = _mm256_set1_epi16(1), large = _mm256_set1_epi16(256);
  const __m256 larger = _mm256_set1_ps(65536);
  for (int64_t block = 0; block < blocks; ++block) {
    const int8_t* here = planes + block * 3 * Code::block;
    OPENELM_UNROLL for (int n = 0; n < N; ++n) {
      const uint8_t* at = rows[n] + block * bytes;
      __builtin_prefetch(at + kAheadFixed);
      __m256i weights[Code::vectors];
      Code::unpack(at, weights);
      __m256 scale;
      if (HALVES) {
        const float* two = scales[n] + 2 * block;
        scale = _mm256_set_m128(_mm_broadcast_ss(two + 1), _mm_broadcast_ss(two));
      } else {
        scale = _mm256_broadcast_ss(scales[n] + (block >> scale_shift));
      }
      OPENELM_UNROLL for (int m = 0; m < M; ++m) {
        const auto plane = [&](int p) {
          const auto* at_plane = reinterpret_cast<const __m256i*>(here + m * plane_stride + p * Code::block);
          __m256i pairs = _mm256_maddubs_epi16(weights[0], _mm256_loadu_si256(at_plane));
          OPENELM_UNROLL for (int v = 1; v < Code::vectors; ++v)
            pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(weights[v], _mm256_loadu_si256(at_plane + v)));
          return pairs;
        };
        const __m256i high = _mm256_madd_epi16(plane(0), ones);
        const __m256i rest = _mm256_add_epi32(_mm256_madd_epi16(plane(1), large), _mm256_madd_epi16(plane(2), ones));
        const __m256 value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(high), larger, _mm256_cvtepi32_ps(rest));
        totals[n][m] = _mm256_fmadd_ps(value, scale, totals[n][m]);
      }
    }
  }
}

template <class Code>
void multiply_fixed_rows(const Matrix& matrix, const float* prepared, int64_t inputs, int64_t first, int64_t last,
                         float* y) {
  thread_local std::vector<float> scale_buffer, bias_buffer;
  thread_local std::vector<uint8_t> copies;
  const FixedInput layout(matrix.format, matrix.columns, Code::block);
  const int64_t size = layout.size(), groups = matrix.groups();
  float* scales = scratch(scale_buffer, kRows * groups + 16);
  float* biases = scratch(bias_buffer, kRows * groups + 16);
  const int scale_shift = matrix.format.group > Code::block ? 1 : 0;  // two blocks share a scale
  for (int64_t row = first; row < last; row += kRows) {
    const int64_t count = std::min<int64_t>(kRows, last - row);
    const uint8_t* rows[kRows];
    const float* row_scales[kRows];
    decode_groups(matrix, row * groups, count * groups, scales, biases);
    for (int64_t n = 0; n < count; ++n) {
      rows[n] = readable<Code>(matrix, row + n, copies, n);
      row_scales[n] = scales + n * groups;
    }
    const auto add = [&](auto rows_at_once, auto inputs_at_once, int64_t n, int64_t m) {
      constexpr int N = decltype(rows_at_once)::value, M = decltype(inputs_at_once)::value;
      __m256 totals[N][M];
      OPENELM_UNROLL for (int i = 0; i < N; ++i)
        OPENELM_UNROLL for (int j = 0; j < M; ++j) totals[i][j] = _mm256_setzero_ps();
      const auto* planes = reinterpret_cast<const int8_t*>(prepared + m * size);
      if (matrix.format.group < Code::block)
        add_fixed<Code, true>(rows + n, row_scales + n, 0, planes, 4 * size, layout.blocks, totals);
      else
        add_fixed<Code, false>(rows + n, row_scales + n, scale_shift, planes, 4 * size, layout.blocks, totals);
      for (int i = 0; i < N; ++i)
        for (int j = 0; j < M; ++j) {
          const float* input = prepared + (m + j) * size;
          __m256 total = _mm256_mul_ps(totals[i][j], _mm256_set1_ps(input[layout.scale_at()]));
          for (int64_t g = 0; g < layout.groups; g += 8)  // what is read of the next row meets sums of zero
            total = _mm256_fmadd_ps(_mm256_loadu_ps(biases + (n + i) * groups + g),
                                    _mm256_loadu_ps(input + layout.sums_at() + g), total);
          y[(m + j) * matrix.rows + row + n + i] = Bytes::sum(total);
        }
    };
    constexpr std::integral_constant<int, 1> one;
    constexpr std::integral_constant<int, 2> two;
    constexpr std::integral_constant<int, 4> four;
    for (int64_t m = 0; m < inputs;) {
      const int64_t left = inputs - m;
      for (int64_t n = 0; n < count; n += left >= 2 && n + 2 <= count ? 2 : 1) {
        const bool pair = n + 2 <= count;
        if (left >= 4) pair ? add(two, four, n, m) : add(one, four, n, m);
        else if (left >= 2) pair ? add(two, two, n, m) : add(one, two, n, m);
        else add(one, one, n, m);  // one stream of memory, which the processor foresees
      }
      m += left >= 4 ? 4 : left >= 2 ? 2 : 1;
    }
  }
}

void multiply_fixed(const Matrix& matrix, const float* prepared, int64_t inputs, int64_t first, int64_t last,
                    float* y) {
  with_fixed(matrix.format, [&](auto code) {
    multiply_fixed_rows<decltype(code)>(matrix, prepared, inputs, first, last, y);
  });
}

}  // namespace
}  // namespace openelm
