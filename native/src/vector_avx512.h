// Sixteen lanes: AVX-512 F, BW, DQ and VL.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "transpose_avx2.h"

namespace openelm {
namespace {

struct Vector {
  static constexpr int lanes = 16;
  static constexpr int rows = 2, inputs = 4;
  static constexpr int tile_rows = 8;
  using F = __m512;
  using I = __m512i;

  static F zero() { return _mm512_setzero_ps(); }
  static F set(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F gather(const float* p, const int32_t* index) {
    return _mm512_i32gather_ps(_mm512_loadu_si512(index), p, 4);
  }
  static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  // out[i][j] = x[j][i] for a square of as many lanes
  static void transpose(const float* x, int64_t stride, float* out, int64_t out_stride) {
    for (int i = 0; i < 16; i += 8)
      for (int j = 0; j < 16; j += 8) transpose_eight(x + j * stride + i, stride, out + i * out_stride + j, out_stride);
  }
  static float sum(F a) { return _mm512_reduce_add_ps(a); }
  static F repeat(const float* p, int share) {
    alignas(64) static const int index[3][16] = {{0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7},
                                                 {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3},
                                                 {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1}};
    const __m512i by = _mm512_load_si512(index[share == 2 ? 0 : share == 4 ? 1 : 2]);
    return _mm512_permutexvar_ps(by, _mm512_castps256_ps512(_mm256_loadu_ps(p)));
  }

  static I load_int(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static I set_int(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  static I either(I a, I b) { return _mm512_or_si512(a, b); }
  static I both(I a, I b) { return _mm512_and_si512(a, b); }
  template <int N> static I right(I a) { return _mm512_srli_epi32(a, N); }
  template <int N> static I left(I a) { return _mm512_slli_epi32(a, N); }
  static I plus(I a, I b) { return _mm512_add_epi32(a, b); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static I nearest(F a) { return _mm512_cvtps_epi32(a); }
  static F as_floats(I a) { return _mm512_castsi512_ps(a); }
  static I pick(const uint8_t* p, const uint8_t* index) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes), load_int(index));
  }
  static I look_up(const uint8_t* table, I index) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes), index);
  }
  static F from_half(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F from_bfloat16(const uint8_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static F from_e8m0(const uint8_t* p) {
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_slli_epi32(wide, 23), _mm512_set1_epi32(0x00400000)));
  }
  static F from_fp8(const uint8_t* p) {
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<short>(0xBF80))));
  }
};

}  // namespace
}  // namespace openelm
