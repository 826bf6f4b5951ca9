// What attention and the feed-forward network need beside products: exponentials, in vectors.
#pragma once

#include <limits>

#include "kernels_impl.h"

namespace openelm {
namespace {

// e to the power of x, within 2 units in the last place: 2^n times a polynomial, with |r| <= ln(2) / 2 (Cephes' `expf`).
// 0 below -88, and about 1.7e38 above 88.
inline F exponential(F x) {
  x = Vector::min(Vector::set(88), Vector::max(Vector::set(-88.03f), x));
  const I n = Vector::nearest(Vector::mul(x, Vector::set(1.44269504f)));
  const F whole = Vector::to_float(n);
  F r = Vector::fma(whole, Vector::set(-0.693359375f), x);
  r = Vector::fma(whole, Vector::set(2.12194440e-4f), r);
  F p = Vector::set(1.9875691500e-4f);
  for (float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = Vector::fma(p, r, Vector::set(next));
  p = Vector::add(Vector::fma(p, Vector::mul(r, r), r), Vector::set(1));
  return Vector::mul(p, Vector::as_floats(Vector::left<23>(Vector::plus(n, Vector::set_int(127)))));
}

// The last vector of a row, which others follow or nothing: behind its end it holds `filled`.
inline F load_some(const float* x, int64_t count, float filled) {
  float values[L];
  std::fill(std::copy(x, x + count, values), values + L, filled);
  return Vector::load(values);
}

inline void store_some(float* out, int64_t count, F a) {
  float values[L];
  Vector::store(values, a);
  std::copy(values, values + count, out);
}

float largest(const float* x, int64_t count) {
  constexpr float least = -std::numeric_limits<float>::infinity();
  F most = Vector::set(least);
  int64_t i = 0;
  for (; i + L <= count; i += L) most = Vector::max(most, Vector::load(x + i));
  if (i < count) most = Vector::max(most, load_some(x + i, count - i, least));
  float values[L];
  Vector::store(values, most);
  return *std::max_element(values, values + L);
}

float exponentials(const float* x, int64_t count, float scale, float shift, float* out) {
  const F times = Vector::set(scale), less = Vector::set(-shift);
  F total = Vector::zero();
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    const F value = exponential(Vector::fma(Vector::load(x + i), times, less));
    total = Vector::add(total, value);
    Vector::store(out + i, value);
  }
  if (i < count) {
    const F last = load_some(x + i, count - i, -std::numeric_limits<float>::infinity());
    const F value = exponential(Vector::fma(last, times, less));
    total = Vector::add(total, value);
    store_some(out + i, count - i, value);
  }
  return Vector::sum(total);
}

void gate(const float* gate, const float* x, int64_t count, float* out) {
  const auto gated = [](F g, F value) {
    const F below = Vector::add(Vector::set(1), exponential(Vector::sub(Vector::zero(), g)));
    return Vector::mul(Vector::div(g, below), value);
  };
  int64_t i = 0;
  for (; i + L <= count; i += L) Vector::store(out + i, gated(Vector::load(gate + i), Vector::load(x + i)));
  if (i < count) {
    const int64_t left = count - i;
    store_some(out + i, left, gated(load_some(gate + i, left, 0), load_some(x + i, left, 0)));
  }
}

}  // namespace
}  // namespace openelm
