// How each format becomes floats: a block of columns at a time, in steps of one vector. `Vector` is defined before.
//
// Shifting bits into place costs an instruction per vector. Instead the bits stay where they are, so that a value is
// 2^s times too large, and the input that it meets is divided by 2^s, once for all rows: both are exact.
#pragma once

#include <array>
#include <cstdint>

#include "kernels.h"

namespace openelm {
namespace {

using F = Vector::F;
using I = Vector::I;
constexpr int L = Vector::lanes;

constexpr float inverse_power(int n) {
  float r = 1;
  while (n-- > 0) r /= 2;
  return r;
}

template <uint32_t WORD>
struct Repeated {
  alignas(64) uint32_t words[L];
  constexpr Repeated() : words() {
    for (auto& word : words) word = WORD;
  }
};
template <uint32_t WORD> constexpr Repeated<WORD> kRepeated;

// A word in every lane, from memory: compilers spend several instructions on making one.
template <uint32_t WORD>
I repeated() {
  return Vector::load_int(reinterpret_cast<const uint8_t*>(kRepeated<WORD>.words));
}

// 2, 4 and 8 bits: a lane holds a word, and step p takes the p-th value of every word.
template <int BITS>
struct WordCode {
  static constexpr int bits = BITS, steps = 32 / BITS, block = L * steps;
  static constexpr int smallest_group = 32;
  static constexpr bool scaled = true, biased = true, in_order = false;
  using State = I;
  static State load(const uint8_t* p) { return Vector::load_int(p); }
  template <int P> static F value(const State& words) {
    if constexpr (P == steps - 1) return Vector::to_float(Vector::right<32 - BITS>(words));
    else return Vector::to_float(Vector::both(words, repeated<((1u << BITS) - 1) << (BITS * P)>()));
  }
  static constexpr int column(int p, int lane) { return lane * steps + p; }
  static constexpr float factor(int p, int) { return p == steps - 1 ? 1.0f : inverse_power(BITS * p); }
};

// Which bytes hold the values of a vector that starts at bit START of a byte, and which of their bits.
template <int BITS, int START>
struct Picks {
  alignas(64) uint8_t index[4 * L];
  alignas(64) uint32_t mask[L];
  constexpr Picks() : index(), mask() {
    for (int i = 0; i < L; ++i) {
      const int bit = START + i * BITS, shift = bit % 8;
      for (int b = 0; b < 4; ++b) index[4 * i + b] = 0x80;
      index[4 * i] = static_cast<uint8_t>(bit / 8);
      if (shift + BITS > 8) index[4 * i + 1] = static_cast<uint8_t>(bit / 8 + 1);
      mask[i] = ((1u << BITS) - 1) << shift;
    }
  }
};
template <int BITS, int START> constexpr Picks<BITS, START> kPicks;

// Any number of bits, columns in their order.
template <int BITS>
struct ByteCode {
  static constexpr int bits = BITS, steps = 32 / L, block = 32;
  static constexpr int smallest_group = 32;
  static constexpr bool scaled = true, biased = true, in_order = true;
  using State = const uint8_t*;
  static State load(const uint8_t* p) { return p; }
  template <int P> static I raw(const State& p) {
    constexpr auto& picks = kPicks<BITS, P * L * BITS % 8>;
    const auto mask = reinterpret_cast<const uint8_t*>(picks.mask);
    return Vector::both(Vector::pick(p + P * L * BITS / 8, picks.index), Vector::load_int(mask));
  }
  template <int P> static F value(const State& p) { return Vector::to_float(raw<P>(p)); }
  static constexpr int column(int p, int lane) { return p * L + lane; }
  static constexpr float factor(int p, int lane) { return inverse_power(column(p, lane) * BITS % 8); }
};

// 4-bit floats (e2m1): twice their value plus 12 is a whole number from 0 to 24. Scale and bias make up for that.
alignas(16) constexpr uint8_t kFp4[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

struct Fp4Code {
  static constexpr int bits = 4, steps = 8, block = L * steps;
  static constexpr int smallest_group = 16;
  static constexpr bool scaled = true, biased = true, in_order = false;
  struct State { I even, odd; };
  static State load(const uint8_t* p) {
    const I words = Vector::load_int(p), mask = Vector::set_int(0x0F0F0F0F);
    return {Vector::look_up(kFp4, Vector::both(words, mask)),
            Vector::look_up(kFp4, Vector::both(Vector::right<4>(words), mask))};
  }
  template <int P> static F value(const State& state) {
    const I bytes = P % 2 ? state.odd : state.even;
    if constexpr (P / 2 == 3) return Vector::to_float(Vector::right<24>(bytes));
    else return Vector::to_float(Vector::both(bytes, repeated<(0xFFu << (8 * (P / 2)))>()));
  }
  static constexpr int column(int p, int lane) { return lane * steps + p; }
  static constexpr float factor(int p, int) { return p / 2 == 3 ? 1.0f : inverse_power(8 * (p / 2)); }
};

struct Fp8Code {
  static constexpr int bits = 8, steps = 32 / L, block = 32;
  static constexpr int smallest_group = 32;
  static constexpr bool scaled = true, biased = false, in_order = true;
  using State = const uint8_t*;
  static State load(const uint8_t* p) { return p; }
  template <int P> static F value(const State& p) { return Vector::from_fp8(p + P * L); }
  static constexpr int column(int p, int lane) { return p * L + lane; }
  static constexpr float factor(int, int) { return 1; }
};

struct FloatCode {
  static constexpr int bits = 32, steps = 64 / L, block = 64;
  static constexpr int smallest_group = block;
  static constexpr bool scaled = false, biased = false, in_order = true;
  using State = const uint8_t*;
  static State load(const uint8_t* p) { return p; }
  template <int P> static F value(const State& p) { return Vector::load(reinterpret_cast<const float*>(p) + P * L); }
  static constexpr int column(int p, int lane) { return p * L + lane; }
  static constexpr float factor(int, int) { return 1; }
};

// Calls body(std::integral_constant<int, 0>) to N - 1, unrolled.
template <int N, class Body>
[[gnu::always_inline]] inline void unrolled(const Body& body) {
  [&]<int... P>(std::integer_sequence<int, P...>) { (body(std::integral_constant<int, P>{}), ...); }
  (std::make_integer_sequence<int, N>{});
}

}  // namespace
}  // namespace openelm
