// The kernels, for the instruction set whose `Vector` is defined before.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "codes.h"
#include "kernels.h"

namespace openelm {
namespace {

constexpr int kRows = 16;  // rows whose scales are decoded together
constexpr int64_t kResident = 6144;  // floats of prepared inputs that stay in the first cache

constexpr int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// How the columns of a format divide into segments: as many blocks as share a scale, or one block with several scales.
template <class Code>
struct Segments {
  int blocks = 1;  // per segment
  int share = L;  // lanes that share a scale
  int64_t count;  // of segments
  int64_t groups;  // per row, padded

  Segments(const Format& format, int64_t columns) {
    if (format.group >= Code::block) blocks = format.group / Code::block;
    else if (format.group) share = L * format.group / Code::block;
    count = up(columns, blocks * Code::block) / (blocks * Code::block);
    groups = Code::scaled ? up(columns / format.group, L) : 0;
  }
  int64_t padded() const { return count * blocks * Code::block; }
};

template <class Call>
auto with_code(const Format& format, const Call& call) {
  switch (format.values) {
    case Values::fp4: return call(Fp4Code{});
    case Values::fp8: return call(Fp8Code{});
    case Values::float32: return call(FloatCode{});
    default: break;
  }
  switch (format.bits) {
    case 2: return call(WordCode<2>{});
    case 3: return call(ByteCode<3>{});
    case 4: return call(WordCode<4>{});
    case 5: return call(ByteCode<5>{});
    case 6: return call(ByteCode<6>{});
    default: return call(WordCode<8>{});
  }
}

int64_t prepared_size(const Format& format, int64_t columns) {
  return with_code(format, [&](auto code) {
    using Code = decltype(code);
    const Segments<Code> segments(format, columns);
    return segments.padded() + (Code::biased ? segments.groups : 0);
  });
}

template <class Code>
constexpr auto factors() {
  std::array<float, Code::block> table{};
  for (int p = 0; p < Code::steps; ++p)
    for (int lane = 0; lane < L; ++lane) table[p * L + lane] = Code::factor(p, lane);
  return table;
}

template <class Code>
void prepare_block(const float* x, float* out) {
  static constexpr auto table = factors<Code>();
  for (int p = 0; p < Code::steps; ++p)
    for (int lane = 0; lane < L; ++lane) out[p * L + lane] = x[Code::column(p, lane)] * table[p * L + lane];
}

float sum_of(const float* x, int count) {
  F total = Vector::zero();
  for (int i = 0; i < count; i += L) total = Vector::add(total, Vector::load(x + i));
  return Vector::sum(total);
}

void prepare(const Format& format, int64_t columns, const float* x, float* prepared) {
  with_code(format, [&](auto code) {
    using Code = decltype(code);
    const Segments<Code> segments(format, columns);
    int64_t k = 0;
    for (; k + Code::block <= columns; k += Code::block) prepare_block<Code>(x + k, prepared + k);
    for (; k < segments.padded(); k += Code::block) {
      float rest[Code::block] = {};
      if (k < columns) std::copy(x + k, x + columns, rest);
      prepare_block<Code>(rest, prepared + k);
    }
    if constexpr (Code::biased) {
      float* sums = prepared + segments.padded();
      const int64_t groups = columns / format.group;
      for (int64_t g = 0; g < groups; ++g) sums[g] = sum_of(x + g * format.group, format.group);
      std::fill(sums + groups, sums + segments.groups, 0.0f);
    }
  });
}

F decoded(Scales type, const uint8_t* p) {
  switch (type) {
    case Scales::float16: return Vector::from_half(reinterpret_cast<const uint16_t*>(p));
    case Scales::e4m3: return Vector::mul(Vector::from_fp8(p), Vector::set(256));
    default: break;
  }
  uint32_t bits[L];
  for (int i = 0; i < L; ++i) {
    if (type == Scales::bfloat16) {
      uint16_t half;
      std::memcpy(&half, p + 2 * i, 2);
      bits[i] = static_cast<uint32_t>(half) << 16;
    } else {
      bits[i] = p[i] ? static_cast<uint32_t>(p[i]) << 23 : 0x00400000u;  // e8m0: a power of two
    }
  }
  float values[L];
  std::memcpy(values, bits, sizeof bits);
  return Vector::load(values);
}

constexpr int bytes_of(Scales type) { return type == Scales::float32 ? 4 : type >= Scales::e8m0 ? 1 : 2; }

// `count` scales from the `start`-th on, as floats, times `factor`; then zeros up to `padded`. `out` has room for whole
// vectors.
void decode(Scales type, const uint8_t* source, int64_t start, int64_t count, float factor, float* out, int64_t padded) {
  const int width = bytes_of(type);
  source += start * width;
  if (type == Scales::float32 && factor == 1) {
    std::memcpy(out, source, 4 * count);
    std::fill(out + count, out + padded, 0.0f);
    return;
  }
  int64_t i = 0;
  for (; i + L <= count; i += L)
    Vector::store(out + i, Vector::mul(decoded(type, source + i * width), Vector::set(factor)));
  if (i < count) {
    uint8_t rest[2 * L] = {};
    std::memcpy(rest, source + i * width, (count - i) * width);
    Vector::store(out + i, Vector::mul(decoded(type, rest), Vector::set(factor)));
    i = count;
  }
  std::fill(out + i, out + padded, 0.0f);
}

// The scales and biases of a row, for the values that its code gives.
template <class Code>
void decode_row(const Matrix& matrix, int64_t row, int64_t padded, float* scales, float* biases) {
  const int64_t groups = matrix.groups(), start = row * groups;
  const Scales type = matrix.format.scales;
  if (matrix.format.values == Values::fp4) {
    decode(type, matrix.scales, start, groups, 0.5f, scales, padded);
    for (int64_t g = 0; g < padded; ++g) biases[g] = -12 * scales[g];
  } else if (matrix.format.values == Values::fp8) {
    decode(type, matrix.scales, start, groups, 256, scales, padded);
  } else {
    decode(type, matrix.scales, start, groups, 1, scales, padded);
    decode(type, matrix.biases, start, groups, 1, biases, padded);
  }
}

template <class T>
T* scratch(std::vector<T>& buffer, int64_t size) {
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
}

// Some segments of N rows with M inputs, added to `totals` (N, inputs, L).
template <class Code, int N, int M>
void add_segments(const Segments<Code>& segments, const uint8_t* const* rows, const float* scales, int64_t scale_stride,
                  const float* x, int64_t x_stride, int64_t from, int64_t to, float* totals, int64_t total_stride) {
  constexpr int bytes = Code::block / 8 * Code::bits;
  const int64_t per_block = L / segments.share;  // scales, if a block has several
  for (int64_t segment = from; segment < to; ++segment) {
    F sums[N][M];
    for (int n = 0; n < N; ++n)
      for (int m = 0; m < M; ++m) sums[n][m] = Vector::zero();
    for (int64_t block = segment * segments.blocks; block < (segment + 1) * segments.blocks; ++block) {
      typename Code::State states[N];
      for (int n = 0; n < N; ++n) states[n] = Code::load(rows[n] + block * bytes);
      const float* at = x + block * Code::block;
      unrolled<Code::steps>([&](auto step) {
        constexpr int p = decltype(step)::value;
        F weights[N];
        for (int n = 0; n < N; ++n) weights[n] = Code::template value<p>(states[n]);
        for (int m = 0; m < M; ++m) {
          const F input = Vector::load(at + m * x_stride + p * L);
          for (int n = 0; n < N; ++n) sums[n][m] = Vector::fma(weights[n], input, sums[n][m]);
        }
      });
    }
    for (int n = 0; n < N; ++n) {
      F scale = Vector::zero();
      if constexpr (Code::scaled) {
        const float* row = scales + n * scale_stride;
        scale = segments.share == L ? Vector::set(row[segment]) : Vector::repeat(row + segment * per_block, segments.share);
      }
      for (int m = 0; m < M; ++m) {
        float* total = totals + n * total_stride + m * L;
        const F before = Vector::load(total);
        if constexpr (Code::scaled) Vector::store(total, Vector::fma(sums[n][m], scale, before));
        else Vector::store(total, Vector::add(sums[n][m], before));
      }
    }
  }
}

template <class Code, int N>
void add_inputs(const Segments<Code>& segments, const uint8_t* const* rows, const float* scales, const float* x,
                int64_t x_stride, int64_t inputs, int64_t from, int64_t to, float* totals) {
  const int64_t stride = inputs * L;
  const auto add = [&](auto count, int64_t m) {
    add_segments<Code, N, decltype(count)::value>(segments, rows, scales, segments.groups + L, x + m * x_stride, x_stride,
                                                  from, to, totals + m * L, stride);
  };
  int64_t m = 0;
  for (; m + Vector::inputs <= inputs; m += Vector::inputs) add(std::integral_constant<int, Vector::inputs>{}, m);
  if (inputs - m == 1) add(std::integral_constant<int, 1>{}, m);
  if constexpr (Vector::inputs == 4) {
    if (inputs - m == 2) add(std::integral_constant<int, 2>{}, m);
    if (inputs - m == 3) add(std::integral_constant<int, 3>{}, m);
  }
}

// Rows whose bytes may be read past their end: the last one is copied, and so are floats that do not fill a block.
template <class Code>
const uint8_t* readable(const Matrix& matrix, int64_t row, std::vector<uint8_t>& copy, int64_t slot) {
  const int64_t bytes = matrix.row_bytes();
  const uint8_t* found = matrix.words + row * bytes;
  const bool partial = !Code::scaled && matrix.columns % Code::block;
  if (row + 1 < matrix.rows && !partial) return found;
  const int64_t stride = up(bytes, Code::block / 8 * Code::bits) + kSlack;
  uint8_t* out = scratch(copy, stride * kRows) + slot * stride;
  std::memcpy(out, found, bytes);
  std::memset(out + bytes, 0, stride - bytes);
  return out;
}

template <class Code>
void multiply_rows(const Matrix& matrix, const float* prepared, int64_t inputs, int64_t first, int64_t last, float* y) {
  thread_local std::vector<float> scale_buffer, bias_buffer, total_buffer;
  thread_local std::vector<uint8_t> copies;
  const Segments<Code> segments(matrix.format, matrix.columns);
  const int64_t scale_stride = segments.groups + L, padded = segments.padded();
  const int64_t x_stride = padded + (Code::biased ? segments.groups : 0);
  float* scales = scratch(scale_buffer, kRows * scale_stride);
  float* biases = scratch(bias_buffer, scale_stride);
  float* totals = scratch(total_buffer, kRows * inputs * L);
  const int64_t width = padded / segments.count;
  const int64_t chunk = inputs <= Vector::inputs ? segments.count : std::max<int64_t>(1, kResident / (inputs * width));
  for (int64_t row = first; row < last; row += kRows) {
    const int count = static_cast<int>(std::min<int64_t>(kRows, last - row));
    const uint8_t* rows[kRows];
    for (int n = 0; n < count; ++n) {
      rows[n] = readable<Code>(matrix, row + n, copies, n);
      if constexpr (Code::scaled) decode_row<Code>(matrix, row + n, scale_stride, scales + n * scale_stride, biases);
      for (int64_t m = 0; m < inputs; ++m) {
        F total = Vector::zero();
        if constexpr (Code::biased)
          for (int64_t g = 0; g < segments.groups; g += L)
            total = Vector::fma(Vector::load(biases + g), Vector::load(prepared + m * x_stride + padded + g), total);
        Vector::store(totals + (n * inputs + m) * L, total);
      }
    }
    for (int64_t from = 0; from < segments.count; from += chunk) {
      const int64_t to = std::min(segments.count, from + chunk);
      int n = 0;
      for (; n + Vector::rows <= count; n += Vector::rows)
        add_inputs<Code, Vector::rows>(segments, rows + n, scales + n * scale_stride, prepared, x_stride, inputs, from, to,
                                       totals + n * inputs * L);
      for (; n < count; ++n)
        add_inputs<Code, 1>(segments, rows + n, scales + n * scale_stride, prepared, x_stride, inputs, from, to,
                            totals + n * inputs * L);
    }
    for (int n = 0; n < count; ++n)
      for (int64_t m = 0; m < inputs; ++m)
        y[m * matrix.rows + row + n] = Vector::sum(Vector::load(totals + (n * inputs + m) * L));
  }
}

void multiply(const Matrix& matrix, const float* prepared, int64_t inputs, int64_t first, int64_t last, float* y) {
  with_code(matrix.format, [&](auto code) {
    multiply_rows<decltype(code)>(matrix, prepared, inputs, first, last, y);
  });
}

// 32 columns of a row in their order, with their scales.
template <class Code>
void unpack_block(const Matrix& matrix, int64_t row, int64_t column, const uint8_t* bytes, float* out) {
  const int64_t groups = matrix.groups(), start = row * groups;
  const auto scale_at = [&](const uint8_t* source, int64_t k) {
    float values[L];
    decode(matrix.format.scales, source, start + std::min(groups - 1, k / matrix.format.group), 1, 1, values, 1);
    return values[0];
  };
  unrolled<Code::steps>([&](auto step) {
    constexpr int p = decltype(step)::value;
    const int64_t k = column + p * L;
    const F scale = Vector::set(scale_at(matrix.scales, k));
    F value;
    if constexpr (std::is_same_v<Code, Fp8Code>) {
      value = Vector::mul(Vector::mul(Code::template value<p>(bytes), Vector::set(256)), scale);
    } else if (matrix.format.values == Values::fp4) {
      alignas(64) static constexpr auto odd = [] {
        std::array<uint32_t, L> mask{};
        for (int i = 0; i < L; ++i) mask[i] = i % 2 ? 15 : 0;
        return mask;
      }();
      const I raw = Code::template raw<p>(bytes);
      const I low = Vector::both(raw, Vector::set_int(15));
      const I high = Vector::both(Vector::right<4>(raw), Vector::load_int(reinterpret_cast<const uint8_t*>(odd.data())));
      const I twice = Vector::both(Vector::look_up(kFp4, Vector::either(low, high)), Vector::set_int(255));
      value = Vector::mul(Vector::mul(Vector::add(Vector::to_float(twice), Vector::set(-12)), Vector::set(0.5f)), scale);
    } else {
      static constexpr auto table = factors<Code>();
      const F whole = Vector::mul(Code::template value<p>(bytes), Vector::load(table.data() + p * L));
      value = Vector::add(Vector::mul(whole, scale), Vector::set(scale_at(matrix.biases, k)));
    }
    Vector::store(out + p * L, value);
  });
}

template <class Code>
void unpack_row(const Matrix& matrix, int64_t row, int64_t from, int64_t to, float* out) {
  const int64_t bytes = matrix.row_bytes();
  const uint8_t* words = matrix.words + row * bytes;
  for (int64_t k = from; k < to; k += 32) {
    const int64_t at = k / 8 * matrix.format.bits;
    if (k + 32 <= to && (row + 1 < matrix.rows || at + kSlack <= bytes)) {
      unpack_block<Code>(matrix, row, k, words + at, out + k - from);
      continue;
    }
    uint8_t rest[kSlack] = {};
    float values[32];
    std::memcpy(rest, words + at, std::min<int64_t>(kSlack, bytes - at));
    unpack_block<Code>(matrix, row, k, rest, values);
    std::copy(values, values + std::min<int64_t>(32, to - k), out + k - from);
  }
}

void unpack(const Matrix& matrix, int64_t row, int64_t from, int64_t to, float* out) {
  const Format& format = matrix.format;
  if (format.values == Values::float32) {
    std::memcpy(out, matrix.words + 4 * (row * matrix.columns + from), 4 * (to - from));
    return;
  }
  if (format.values == Values::fp8) return unpack_row<Fp8Code>(matrix, row, from, to, out);
  switch (format.bits) {
    case 2: return unpack_row<ByteCode<2>>(matrix, row, from, to, out);
    case 3: return unpack_row<ByteCode<3>>(matrix, row, from, to, out);
    case 4: return unpack_row<ByteCode<4>>(matrix, row, from, to, out);
    case 5: return unpack_row<ByteCode<5>>(matrix, row, from, to, out);
    case 6: return unpack_row<ByteCode<6>>(matrix, row, from, to, out);
    default: return unpack_row<ByteCode<8>>(matrix, row, from, to, out);
  }
}

constexpr int kPanel = 3 * L;

void pack(const float* x, int64_t stride, int64_t inputs, int64_t depth, float* panel) {
  const int64_t width = up(inputs, L);
  for (int64_t k = 0; k < depth; k += 8) {
    const int64_t columns = std::min<int64_t>(8, depth - k);
    for (int64_t m = 0; m < width; ++m)
      for (int64_t i = 0; i < columns; ++i) panel[(k + i) * width + m] = m < inputs ? x[m * stride + k + i] : 0.0f;
  }
}

template <int N, int M>
void tile_block(const float* w, int64_t w_stride, const float* panel, int64_t depth, float* result, int64_t stride,
                bool add) {
  F sums[N][M];
  for (int n = 0; n < N; ++n)
    for (int m = 0; m < M; ++m) sums[n][m] = add ? Vector::load(result + n * stride + m * L) : Vector::zero();
  for (int64_t k = 0; k < depth; ++k) {
    F inputs[M];
    for (int m = 0; m < M; ++m) inputs[m] = Vector::load(panel + (k * M + m) * L);
    for (int n = 0; n < N; ++n) {
      const F weight = Vector::set(w[n * w_stride + k]);
      for (int m = 0; m < M; ++m) sums[n][m] = Vector::fma(weight, inputs[m], sums[n][m]);
    }
  }
  for (int n = 0; n < N; ++n)
    for (int m = 0; m < M; ++m) Vector::store(result + n * stride + m * L, sums[n][m]);
}

template <int M>
void tile_rows(const float* w, int64_t w_stride, int64_t rows, const float* panel, int64_t depth, float* result,
               int64_t stride, bool add) {
  int64_t n = 0;
  for (; n + Vector::tile_rows <= rows; n += Vector::tile_rows)
    tile_block<Vector::tile_rows, M>(w + n * w_stride, w_stride, panel, depth, result + n * stride, stride, add);
  for (; n < rows; ++n) tile_block<1, M>(w + n * w_stride, w_stride, panel, depth, result + n * stride, stride, add);
}

void tile(const float* w, int64_t w_stride, int64_t rows, const float* panel, int64_t inputs, int64_t depth,
          float* result, int64_t stride, bool add) {
  switch (up(inputs, L) / L) {
    case 1: return tile_rows<1>(w, w_stride, rows, panel, depth, result, stride, add);
    case 2: return tile_rows<2>(w, w_stride, rows, panel, depth, result, stride, add);
    default: return tile_rows<3>(w, w_stride, rows, panel, depth, result, stride, add);
  }
}

constexpr Kernels kernels_named(const char* name) {
  return {name, kPanel, prepared_size, prepare, multiply, pack, unpack, tile, nullptr, nullptr};
}

}  // namespace
}  // namespace openelm
