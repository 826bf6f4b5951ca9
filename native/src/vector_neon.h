// Four lanes: NEON, as every 64-bit ARM processor has it.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace openelm {
namespace {

struct Vector {
  static constexpr int lanes = 4;
  static constexpr int rows = 2, inputs = 4;
  static constexpr int tile_rows = 8;
  using F = float32x4_t;
  using I = uint32x4_t;

  static F zero() { return vdupq_n_f32(0); }
  static F set(float x) { return vdupq_n_f32(x); }
  static F load(const float* p) { return vld1q_f32(p); }
  static F gather(const float* p, const int32_t* index) {
    const float values[lanes] = {p[index[0]], p[index[1]], p[index[2]], p[index[3]]};
    return load(values);
  }
  static void store(float* p, F a) { vst1q_f32(p, a); }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F sub(F a, F b) { return vsubq_f32(a, b); }
  static F div(F a, F b) { return vdivq_f32(a, b); }
  static F min(F a, F b) { return vminq_f32(a, b); }
  static F max(F a, F b) { return vmaxq_f32(a, b); }
  // out[i][j] = x[j][i] for a square of four
  static void transpose(const float* x, int64_t stride, float* out, int64_t out_stride) {
    const float32x4x2_t low = vzipq_f32(load(x), load(x + 2 * stride));
    const float32x4x2_t high = vzipq_f32(load(x + stride), load(x + 3 * stride));
    for (int i = 0; i < 2; ++i) {
      const float32x4x2_t rows = vzipq_f32(low.val[i], high.val[i]);
      store(out + 2 * i * out_stride, rows.val[0]);
      store(out + (2 * i + 1) * out_stride, rows.val[1]);
    }
  }
  static float sum(F a) { return vaddvq_f32(a); }
  static F repeat(const float* p, int) { return vcombine_f32(vdup_n_f32(p[0]), vdup_n_f32(p[1])); }

  static I load_int(const uint8_t* p) { return vreinterpretq_u32_u8(vld1q_u8(p)); }
  static I set_int(uint32_t x) { return vdupq_n_u32(x); }
  static I either(I a, I b) { return vorrq_u32(a, b); }
  static I both(I a, I b) { return vandq_u32(a, b); }
  template <int N> static I right(I a) {
    if constexpr (N == 0) return a;
    else return vshrq_n_u32(a, N);
  }
  template <int N> static I left(I a) { return vshlq_n_u32(a, N); }
  static I plus(I a, I b) { return vaddq_u32(a, b); }
  static I nearest(F a) { return vreinterpretq_u32_s32(vcvtnq_s32_f32(a)); }
  static F as_floats(I a) { return vreinterpretq_f32_u32(a); }
  static F to_float(I a) { return vcvtq_f32_s32(vreinterpretq_s32_u32(a)); }
  static I pick(const uint8_t* p, const uint8_t* index) {
    return vreinterpretq_u32_u8(vqtbl1q_u8(vld1q_u8(p), vld1q_u8(index)));
  }
  static I look_up(const uint8_t* table, I index) {
    return vreinterpretq_u32_u8(vqtbl1q_u8(vld1q_u8(table), vreinterpretq_u8_u32(index)));
  }
  static F from_half(const uint8_t* p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }
  static F from_bfloat16(const uint8_t* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(p)), 16));
  }
  static F from_e8m0(const uint8_t* p) {
    uint32_t powers[lanes];
    for (int i = 0; i < lanes; ++i) powers[i] = p[i] ? static_cast<uint32_t>(p[i]) << 23 : 0x00400000;
    return vreinterpretq_f32_u32(vld1q_u32(powers));
  }
  static F from_fp8(const uint8_t* p) {
    uint64_t four = 0;
    std::memcpy(&four, p, 4);
    const int16x4_t wide = vget_low_s16(vmovl_s8(vcreate_s8(four)));
    const uint16x4_t half = vand_u16(vreinterpret_u16_s16(vshl_n_s16(wide, 7)), vdup_n_u16(0xBF80));
    return vcvt_f32_f16(vreinterpret_f16_u16(half));
  }
};

}  // namespace
}  // namespace openelm
