// Sums of products of bytes in plain C++.
#pragma once

#include <cstdint>
#include <cstring>

namespace openelm {
namespace {

struct Bytes {
  static constexpr int lanes = 1;
  using F = float;
  struct I { uint8_t v[32]; };
  struct P { int32_t sum; };

  static F zero() { return 0; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F mul(F a, F b) { return a * b; }
  static F set(float x) { return x; }
  static float sum(F a) { return a; }
  static I load(const void* p) { I r; std::memcpy(r.v, p, sizeof r.v); return r; }
  static P pairs(const I& w, const I& x) {
    int32_t total = 0;
    for (int i = 0; i < 32; ++i) total += w.v[i] * static_cast<int8_t>(x.v[i]);
    return {total};
  }
  static P add_pairs(P a, P b) { return {a.sum + b.sum}; }
  static F from_pairs(P a) { return static_cast<float>(a.sum); }
  static F products(const I& w, const I& x) { return from_pairs(pairs(w, x)); }
};

}  // namespace
}  // namespace openelm
