// Four lanes in plain C++. This header and its siblings define the same operations for one instruction set each.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace openelm {
namespace {

struct Vector {
  static constexpr int lanes = 4;
  static constexpr int rows = 2, inputs = 2;  // of a block of products that fits into registers
  static constexpr int tile_rows = 4;
  struct F { float v[lanes]; };
  struct I { uint32_t v[lanes]; };

  template <class Op> static F each(Op op) { F r; for (int i = 0; i < lanes; ++i) r.v[i] = op(i); return r; }
  template <class Op> static I each_int(Op op) { I r; for (int i = 0; i < lanes; ++i) r.v[i] = op(i); return r; }

  static F zero() { return each([](int) { return 0.0f; }); }
  static F set(float x) { return each([=](int) { return x; }); }
  static F load(const float* p) { F r; std::memcpy(r.v, p, sizeof r.v); return r; }
  static F gather(const float* p, const int32_t* index) {
    const float values[lanes] = {p[index[0]], p[index[1]], p[index[2]], p[index[3]]};
    return load(values);
  }
  static void store(float* p, F a) { std::memcpy(p, a.v, sizeof a.v); }
  static F add(F a, F b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
  static F mul(F a, F b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
  static F fma(F a, F b, F c) { return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
  static F sub(F a, F b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
  static F div(F a, F b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
  static F min(F a, F b) { return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }  // b if it is NaN
  static F max(F a, F b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
  // out[i][j] = x[j][i] for a square of as many lanes
  static void transpose(const float* x, int64_t stride, float* out, int64_t out_stride) {
    for (int i = 0; i < lanes; ++i)
      for (int j = 0; j < lanes; ++j) out[i * out_stride + j] = x[j * stride + i];
  }
  static float sum(F a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
  // p[0] in the first `share` lanes, p[1] in the next
  static F repeat(const float* p, int share) { return each([=](int i) { return p[i / share]; }); }

  static I load_int(const uint8_t* p) { I r; std::memcpy(r.v, p, sizeof r.v); return r; }
  static I set_int(uint32_t x) { return each_int([=](int) { return x; }); }
  static I either(I a, I b) { return each_int([&](int i) { return a.v[i] | b.v[i]; }); }
  static I both(I a, I b) { return each_int([&](int i) { return a.v[i] & b.v[i]; }); }
  template <int N> static I right(I a) { return each_int([&](int i) { return a.v[i] >> N; }); }
  template <int N> static I left(I a) { return each_int([&](int i) { return a.v[i] << N; }); }
  static I plus(I a, I b) { return each_int([&](int i) { return a.v[i] + b.v[i]; }); }
  static I nearest(F a) {  // zero for NaN
    return each_int([&](int i) {
      return a.v[i] == a.v[i] ? static_cast<uint32_t>(static_cast<int32_t>(std::nearbyint(a.v[i]))) : 0;
    });
  }
  static F as_floats(I bits) { F r; std::memcpy(r.v, bits.v, sizeof r.v); return r; }
  static F to_float(I a) { return each([&](int i) { return static_cast<float>(static_cast<int32_t>(a.v[i])); }); }
  // Bytes of p, at most 16, by index (0x80: zero); four for each lane
  static I pick(const uint8_t* p, const uint8_t* index) {
    uint8_t out[4 * lanes];
    for (int i = 0; i < 4 * lanes; ++i) out[i] = index[i] & 0x80 ? 0 : p[index[i]];
    return load_int(out);
  }
  // Each byte of `index`, below 16, replaced by that byte of the table
  static I look_up(const uint8_t* table, I index) {
    return each_int([&](int i) {
      uint32_t r = 0;
      for (int b = 0; b < 4; ++b) r |= static_cast<uint32_t>(table[index.v[i] >> (8 * b) & 15]) << (8 * b);
      return r;
    });
  }
  static F from_half(const uint8_t* p) {
    return each([=](int i) {
      const int half = p[2 * i] | p[2 * i + 1] << 8, exponent = half >> 10 & 31, fraction = half & 1023;
      float size = exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(1.0f * fraction, -24);
      if (exponent == 31) size = fraction ? NAN : INFINITY;
      return half & 0x8000 ? -size : size;
    });
  }
  static F from_bfloat16(const uint8_t* p) {
    return as_floats(each_int([=](int i) { return static_cast<uint32_t>(p[2 * i] | p[2 * i + 1] << 8) << 16; }));
  }
  static F from_e8m0(const uint8_t* p) {
    return as_floats(each_int([=](int i) { return p[i] ? static_cast<uint32_t>(p[i]) << 23 : 0x00400000u; }));
  }
  // Numbers of 8 bits (e4m3), divided by 256
  static F from_fp8(const uint8_t* p) {
    return each([=](int i) {
      const int exponent = p[i] >> 3 & 15, fraction = p[i] & 7;
      const float size = exponent ? std::ldexp(8.0f + fraction, exponent - 18) : std::ldexp(1.0f * fraction, -17);
      return p[i] & 0x80 ? -size : size;
    });
  }
};

}  // namespace
}  // namespace openelm
