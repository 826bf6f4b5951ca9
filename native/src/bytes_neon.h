// Sums of products of bytes with NEON.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace openelm {
namespace {

struct Bytes {
  static constexpr int lanes = 4;
  using F = float32x4_t;
  struct I { uint8x16_t low, high; };

  static F zero() { return vdupq_n_f32(0); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F set(float x) { return vdupq_n_f32(x); }
  static float sum(F a) { return vaddvq_f32(a); }
  static I load(const void* p) {
    const auto* bytes = static_cast<const uint8_t*>(p);
    return {vld1q_u8(bytes), vld1q_u8(bytes + 16)};
  }
  static int32x4_t add(int32x4_t total, uint8x8_t w, uint8x8_t x) {
    const int16x8_t wide = vreinterpretq_s16_u16(vmovl_u8(w)), inputs = vmovl_s8(vreinterpret_s8_u8(x));
    total = vmlal_s16(total, vget_low_s16(wide), vget_low_s16(inputs));
    return vmlal_s16(total, vget_high_s16(wide), vget_high_s16(inputs));
  }
  static int32x4_t pairs(I w, I x) {
    int32x4_t total = add(vdupq_n_s32(0), vget_low_u8(w.low), vget_low_u8(x.low));
    total = add(total, vget_high_u8(w.low), vget_high_u8(x.low));
    total = add(total, vget_low_u8(w.high), vget_low_u8(x.high));
    return add(total, vget_high_u8(w.high), vget_high_u8(x.high));
  }
  static int32x4_t add_pairs(int32x4_t a, int32x4_t b) { return vaddq_s32(a, b); }
  static F from_pairs(int32x4_t a) { return vcvtq_f32_s32(a); }
  static F products(I w, I x) { return from_pairs(pairs(w, x)); }
};

}  // namespace
}  // namespace openelm
