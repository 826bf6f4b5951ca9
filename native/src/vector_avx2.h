// Eight lanes: AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "transpose_avx2.h"

namespace openelm {
namespace {

struct Vector {
  static constexpr int lanes = 8;
  static constexpr int rows = 2, inputs = 4;
  static constexpr int tile_rows = 4;
  using F = __m256;
  using I = __m256i;

  static F zero() { return _mm256_setzero_ps(); }
  static F set(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F gather(const float* p, const int32_t* index) {
    return _mm256_i32gather_ps(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)), 4);
  }
  static void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  // out[i][j] = x[j][i] for a square of as many lanes
  static void transpose(const float* x, int64_t stride, float* out, int64_t out_stride) {
    transpose_eight(x, stride, out, out_stride);
  }
  static float sum(F a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static F repeat(const float* p, int share) {
    if (share == 4) return _mm256_set_m128(_mm_set1_ps(p[1]), _mm_set1_ps(p[0]));
    const __m256i pairs = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), pairs);
  }

  static I load_int(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static I set_int(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
  static I either(I a, I b) { return _mm256_or_si256(a, b); }
  static I both(I a, I b) { return _mm256_and_si256(a, b); }
  template <int N> static I right(I a) { return _mm256_srli_epi32(a, N); }
  template <int N> static I left(I a) { return _mm256_slli_epi32(a, N); }
  static I plus(I a, I b) { return _mm256_add_epi32(a, b); }
  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static I nearest(F a) { return _mm256_cvtps_epi32(a); }
  static F as_floats(I a) { return _mm256_castsi256_ps(a); }
  static I pick(const uint8_t* p, const uint8_t* index) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), load_int(index));
  }
  static I look_up(const uint8_t* table, I index) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), index);
  }
  static F from_half(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F from_bfloat16(const uint8_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static F from_e8m0(const uint8_t* p) {  // powers of two; a byte of 0 is 2^-127
    const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_max_epu32(_mm256_slli_epi32(wide, 23), _mm256_set1_epi32(0x00400000)));
  }
  static F from_fp8(const uint8_t* p) {  // as half-precision numbers, whose exponent has one bit more
    const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(static_cast<short>(0xBF80))));
  }
};

}  // namespace
}  // namespace openelm
