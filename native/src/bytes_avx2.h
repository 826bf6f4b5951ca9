// Sums of products of bytes, and bytes from floats, with AVX2.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace openelm {
namespace {

struct Bytes {
  static constexpr int lanes = 8;
  using F = __m256;
  using I = __m256i;

  static F zero() { return _mm256_setzero_ps(); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F set(float x) { return _mm256_set1_ps(x); }
  static float sum(F a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static I load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

  // 32 products of weights below 64 with inputs from -127 to 127, in pairs: two such results can be added in 16 bits.
  static I pairs(I weights, I inputs) { return _mm256_maddubs_epi16(weights, inputs); }
  static I add_pairs(I a, I b) { return _mm256_add_epi16(a, b); }
  static F from_pairs(I a) { return _mm256_cvtepi32_ps(_mm256_madd_epi16(a, _mm256_set1_epi16(1))); }
  // The same for any weights, 32 at a time
  static F products(I w, I x) {
    const auto half = [](__m128i weights, __m128i inputs) {
      return _mm256_madd_epi16(_mm256_cvtepu8_epi16(weights), _mm256_cvtepi8_epi16(inputs));
    };
    const I low = half(_mm256_castsi256_si128(w), _mm256_castsi256_si128(x));
    return _mm256_cvtepi32_ps(_mm256_add_epi32(low, half(_mm256_extracti128_si256(w, 1), _mm256_extracti128_si256(x, 1))));
  }
};

}  // namespace
}  // namespace openelm
