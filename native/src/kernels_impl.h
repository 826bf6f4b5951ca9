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

// Sums are arrays of vectors; without this, they would not be kept in registers.
#define OPENELM_UNROLL _Pragma("GCC unroll 16")

constexpr int kRows = 16;  // rows whose scales are decoded together
constexpr int64_t kAhead = 4096;  // bytes
constexpr int64_t kResident = 6144;  // floats of prepared inputs that stay in the first cache

constexpr int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// How the columns of a format divide into segments: as many blocks as share a scale, or one block with several scales.
template <class Code>
struct Segments {
  int blocks = 1;  // per segment
  int share = L;  // lanes that share a scale
  int64_t count;  // of segments
  int64_t groups;  // per row, padded to whole vectors
  int64_t row_groups;
  int64_t ahead;  // bytes between a row and the one that is fetched meanwhile

  Segments(const Format& format, int64_t columns) {
    if (format.group >= Code::block) blocks = format.group / Code::block;
    else if (format.group) share = L * format.group / Code::block;
    count = up(columns, blocks * Code::block) / (blocks * Code::block);
    row_groups = Code::scaled ? columns / format.group : 0;
    groups = up(row_groups, L);
    ahead = up(kAhead, 4 * columns * Code::bits / 8);
  }
  int64_t stride() const { return row_groups; }
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

template <class Code>
constexpr auto factors() {
  std::array<float, Code::block> table{};
  for (int i = 0; i < Code::block; ++i) table[i] = Code::factor(i / L, i % L);
  return table;
}

template <class Code>
constexpr auto column_numbers() {
  std::array<int32_t, Code::block> table{};
  for (int i = 0; i < Code::block; ++i) table[i] = Code::column(i / L, i % L);
  return table;
}

// A block of an input in the order and with the factors of a code.
template <class Code>
void prepare_block(const float* x, float* out) {
  static constexpr auto table = factors<Code>();
  static constexpr auto columns = column_numbers<Code>();
  for (int i = 0; i < Code::block; i += L) {
    const F values = Code::in_order ? Vector::load(x + i) : Vector::gather(x, columns.data() + i);
    Vector::store(out + i, Vector::mul(values, Vector::load(table.data() + i)));
  }
}

float sum_of(const float* x, int count) {
  F total = Vector::zero();
  for (int i = 0; i < count; i += L) total = Vector::add(total, Vector::load(x + i));
  return Vector::sum(total);
}

constexpr int bytes_of(Scales type) { return type == Scales::float32 ? 4 : type >= Scales::e8m0 ? 1 : 2; }

template <Scales TYPE>
F decoded(const uint8_t* p) {
  if constexpr (TYPE == Scales::float16) return Vector::from_half(p);
  else if constexpr (TYPE == Scales::bfloat16) return Vector::from_bfloat16(p);
  else if constexpr (TYPE == Scales::e8m0) return Vector::from_e8m0(p);
  else if constexpr (TYPE == Scales::e4m3) return Vector::mul(Vector::from_fp8(p), Vector::set(256));
  else return Vector::load(reinterpret_cast<const float*>(p));
}

template <Scales TYPE>
void decode_as(const uint8_t* source, int64_t count, float factor, float* out) {
  constexpr int width = bytes_of(TYPE);
  const F times = Vector::set(factor);
  int64_t i = 0;
  for (; i + L <= count; i += L) Vector::store(out + i, Vector::mul(decoded<TYPE>(source + i * width), times));
  if (i == count) return;
  uint8_t rest[4 * L] = {};
  std::memcpy(rest, source + i * width, (count - i) * width);
  Vector::store(out + i, Vector::mul(decoded<TYPE>(rest), times));
}

// `count` scales from the `start`-th on, as floats, times `factor`, which is a power of two. `out` has room for whole
// vectors.
void decode(Scales type, const uint8_t* source, int64_t start, int64_t count, float factor, float* out) {
  source += start * bytes_of(type);
  switch (type) {
    case Scales::float16: return decode_as<Scales::float16>(source, count, factor, out);
    case Scales::bfloat16: return decode_as<Scales::bfloat16>(source, count, factor, out);
    case Scales::e8m0: return decode_as<Scales::e8m0>(source, count, factor, out);
    case Scales::e4m3: return decode_as<Scales::e4m3>(source, count, factor, out);
    default: return decode_as<Scales::float32>(source, count, factor, out);
  }
}

// Some scales and biases, for the values that a code gives.
void decode_groups(const Matrix& matrix, int64_t start, int64_t count, float* scales, float* biases) {
  const Scales type = matrix.format.scales;
  if (matrix.format.values == Values::fp4) {
    decode(type, matrix.scales, start, count, 0.5f, scales);
    for (int64_t g = 0; g < count; ++g) biases[g] = -12 * scales[g];
  } else if (matrix.format.values == Values::fp8) {
    decode(type, matrix.scales, start, count, 256, scales);
  } else {
    decode(type, matrix.scales, start, count, 1, scales);
    decode(type, matrix.biases, start, count, 1, biases);
  }
}

template <class T>
T* scratch(std::vector<T>& buffer, int64_t size) {
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
}

// Some segments of N rows with M inputs, added to `totals` (N, inputs, L). SHARED: a block has one scale, not several.
template <class Code, bool SHARED, int N, int M>
void add_segments(const Segments<Code>& segments, const uint8_t* const* rows, const float* scales, int64_t scale_stride,
                  const float* x, int64_t x_stride, int64_t from, int64_t to, float* totals, int64_t total_stride) {
  constexpr int bytes = Code::block / 8 * Code::bits;
  const int64_t blocks = SHARED ? segments.blocks : 1;
  const int share = segments.share;
  const int64_t per_block = L / share;  // scales, if a block has several
  F all[N][M];
  const uint8_t* at[N];
  OPENELM_UNROLL for (int n = 0; n < N; ++n) {
    at[n] = rows[n] + from * blocks * bytes;
    OPENELM_UNROLL for (int m = 0; m < M; ++m) all[n][m] = Vector::load(totals + n * total_stride + m * L);
  }
  x += from * blocks * Code::block;
  for (int64_t segment = from; segment < to; ++segment) {
    F sums[N][M];
    OPENELM_UNROLL for (int n = 0; n < N; ++n)
      OPENELM_UNROLL for (int m = 0; m < M; ++m) sums[n][m] = Vector::zero();
    for (int64_t block = 0; block < blocks; ++block) {
      typename Code::State states[N];
      OPENELM_UNROLL for (int n = 0; n < N; ++n) {
        states[n] = Code::load(at[n]);
        // The processor does not foresee several rows that are read side by side: ask for the rows that come next.
        for (int line = 0; line < bytes; line += 64) __builtin_prefetch(at[n] + segments.ahead + line);
        at[n] += bytes;
      }
      unrolled<Code::steps>([&](auto step) {
        constexpr int p = decltype(step)::value;
        F weights[N];
        OPENELM_UNROLL for (int n = 0; n < N; ++n) weights[n] = Code::template value<p>(states[n]);
        OPENELM_UNROLL for (int m = 0; m < M; ++m) {
          const F input = Vector::load(x + m * x_stride + p * L);
          OPENELM_UNROLL for (int n = 0; n < N; ++n) sums[n][m] = Vector::fma(weights[n], input, sums[n][m]);
        }
      });
      x += Code::block;
    }
    OPENELM_UNROLL for (int n = 0; n < N; ++n) {
      F scale = Vector::zero();
      if constexpr (Code::scaled) {
        const float* row = scales + n * scale_stride;
        scale = SHARED ? Vector::set(row[segment]) : Vector::repeat(row + segment * per_block, share);
      }
      OPENELM_UNROLL for (int m = 0; m < M; ++m) {
        if constexpr (Code::scaled) all[n][m] = Vector::fma(sums[n][m], scale, all[n][m]);
        else all[n][m] = Vector::add(sums[n][m], all[n][m]);
      }
    }
  }
  OPENELM_UNROLL for (int n = 0; n < N; ++n)
    OPENELM_UNROLL for (int m = 0; m < M; ++m) Vector::store(totals + n * total_stride + m * L, all[n][m]);
}

// Rows that are multiplied at once with M inputs, as the registers allow.
constexpr int rows_with(int inputs) { return inputs == 1 ? 4 : 2; }

// Some segments of rows (count) with all inputs. An input meets a row in one order, however many of both there are.
template <class Code>
void add_block(const Segments<Code>& segments, const uint8_t* const* rows, int count, const float* scales,
               const float* x, int64_t x_stride, int64_t inputs, int64_t from, int64_t to, float* totals) {
  const auto add = [&](auto shared, auto number, int64_t m) {
    constexpr int M = decltype(number)::value, N = rows_with(M);
    const auto call = [&](auto rows_at_once, int n) {
      add_segments<Code, decltype(shared)::value, decltype(rows_at_once)::value, M>(
          segments, rows + n, scales + n * segments.stride(), segments.stride(), x + m * x_stride, x_stride, from, to,
          totals + (n * inputs + m) * L, inputs * L);
    };
    int n = 0;
    for (; n + N <= count; n += N) call(std::integral_constant<int, N>{}, n);
    for (; n < count; ++n) call(std::integral_constant<int, 1>{}, n);
  };
  const auto with_inputs = [&](auto shared) {
    int64_t m = 0;
    for (; m + Vector::inputs <= inputs; m += Vector::inputs) add(shared, std::integral_constant<int, Vector::inputs>{}, m);
    for (; Vector::inputs == 4 && m + 2 <= inputs; m += 2) add(shared, std::integral_constant<int, 2>{}, m);
    if (m < inputs) add(shared, std::integral_constant<int, 1>{}, m);
  };
  if (segments.share == L) return with_inputs(std::true_type{});
  if constexpr (Code::block > Code::smallest_group) with_inputs(std::false_type{});
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

}  // namespace
}  // namespace openelm

#if defined(__AVX2__)
#include "fixed_avx2.h"
#else
namespace openelm {
namespace {
bool takes_fixed(const Format&) { return false; }
int64_t fixed_size(const Format&, int64_t) { return 0; }
void prepare_fixed(const Format&, int64_t, const float*, float*) {}
void multiply_fixed(const Matrix&, const float*, int64_t, int64_t, int64_t, float*) {}
}  // namespace
}  // namespace openelm
#endif

namespace openelm {
namespace {

template <class Code>
void multiply_rows(const Matrix& matrix, const float* prepared, int64_t inputs, int64_t first, int64_t last, float* y) {
  thread_local std::vector<float> scale_buffer, bias_buffer, total_buffer;
  thread_local std::vector<uint8_t> copies;
  const Segments<Code> segments(matrix.format, matrix.columns);
  const int64_t padded = segments.padded(), x_stride = padded + (Code::biased ? segments.groups : 0);
  float* scales = scratch(scale_buffer, kRows * segments.stride() + 4 * L);
  float* biases = scratch(bias_buffer, kRows * segments.stride() + 4 * L);
  float* totals = scratch(total_buffer, kRows * inputs * L);
  const int64_t width = padded / segments.count;
  const int64_t chunk = inputs <= Vector::inputs ? segments.count : std::max<int64_t>(1, kResident / (inputs * width));
  for (int64_t row = first; row < last; row += kRows) {
    const int count = static_cast<int>(std::min<int64_t>(kRows, last - row));
    const uint8_t* rows[kRows];
    if constexpr (Code::scaled)
      decode_groups(matrix, row * segments.stride(), count * segments.stride(), scales, biases);
    for (int n = 0; n < count; ++n) {
      rows[n] = readable<Code>(matrix, row + n, copies, n);
      for (int64_t m = 0; m < inputs; ++m) {
        F total = Vector::zero();
        if constexpr (Code::biased)
          for (int64_t g = 0; g < segments.groups; g += L)  // what is read of the next row meets sums of zero
            total = Vector::fma(Vector::load(biases + n * segments.stride() + g),
                                Vector::load(prepared + m * x_stride + padded + g), total);
        Vector::store(totals + (n * inputs + m) * L, total);
      }
    }
    for (int64_t from = 0; from < segments.count; from += chunk)
      add_block<Code>(segments, rows, count, scales, prepared, x_stride, inputs, from, std::min(segments.count, from + chunk),
                      totals);
    for (int n = 0; n < count; ++n)
      for (int64_t m = 0; m < inputs; ++m)
        y[m * matrix.rows + row + n] = Vector::sum(Vector::load(totals + (n * inputs + m) * L));
  }
}

int64_t prepared_size(const Format& format, int64_t columns) {
  if (takes_fixed(format)) return fixed_size(format, columns);
  return with_code(format, [&](auto code) {
    using Code = decltype(code);
    const Segments<Code> segments(format, columns);
    return segments.padded() + (Code::biased ? segments.groups : 0);
  });
}

void prepare(const Format& format, int64_t columns, const float* x, float* prepared) {
  if (takes_fixed(format)) return prepare_fixed(format, columns, x, prepared);
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

void multiply(const Matrix& matrix, const float* prepared, int64_t inputs, int64_t first, int64_t last, float* y) {
  if (takes_fixed(matrix.format)) return multiply_fixed(matrix, prepared, inputs, first, last, y);
  with_code(matrix.format, [&](auto code) {
    multiply_rows<decltype(code)>(matrix, prepared, inputs, first, last, y);
  });
}

// 32 columns of a row in their order, with the scales and biases of their groups.
template <class Code, bool FP4>
void unpack_block(const uint8_t* bytes, const float* scales, const float* biases, int group, float* out) {
  unrolled<Code::steps>([&](auto step) {
    constexpr int p = decltype(step)::value;
    const int g = p * L / group;
    const F scale = Vector::set(scales[g]);
    F value;
    if constexpr (std::is_same_v<Code, Fp8Code>) {
      value = Vector::mul(Code::template value<p>(bytes), scale);
    } else if constexpr (FP4) {
      alignas(64) static constexpr auto odd = [] {
        std::array<uint32_t, L> mask{};
        for (int i = 0; i < L; ++i) mask[i] = i % 2 ? 15 : 0;
        return mask;
      }();
      const I raw = Code::template raw<p>(bytes);
      const I low = Vector::both(raw, Vector::set_int(15));
      const I high = Vector::both(Vector::template right<4>(raw), Vector::load_int(reinterpret_cast<const uint8_t*>(odd.data())));
      const I twice = Vector::both(Vector::look_up(kFp4, Vector::either(low, high)), Vector::set_int(255));
      value = Vector::mul(Vector::add(Vector::to_float(twice), Vector::set(-12)), scale);
    } else {
      static constexpr auto table = factors<Code>();
      const F whole = Vector::mul(Code::template value<p>(bytes), Vector::load(table.data() + p * L));
      value = Vector::add(Vector::mul(whole, scale), Vector::set(biases[g]));
    }
    Vector::store(out + p * L, value);
  });
}

template <class Code, bool FP4 = false>
void unpack_row(const Matrix& matrix, int64_t row, int64_t from, int64_t to, float* out) {
  const int group = matrix.format.group;
  const int64_t bytes = matrix.row_bytes(), groups = matrix.groups();
  const uint8_t* words = matrix.words + row * bytes;
  float scales[kTileDepth / 16 + 2 * L], biases[kTileDepth / 16 + 2 * L];
  for (int64_t start = from; start < to; start += kTileDepth) {
    const int64_t end = std::min(to, start + kTileDepth), first = start / group;
    decode_groups(matrix, row * groups + first, up(end, group) / group - first, scales, biases);
    for (int64_t k = start; k < end; k += 32) {
      const int64_t at = k / 8 * matrix.format.bits, g = k / group - first;
      if (k + 32 <= end && (row + 1 < matrix.rows || at + kSlack <= bytes)) {
        unpack_block<Code, FP4>(words + at, scales + g, biases + g, group, out + k - from);
        continue;
      }
      uint8_t rest[kSlack] = {};
      float values[32];
      std::memcpy(rest, words + at, std::min<int64_t>(kSlack, bytes - at));
      unpack_block<Code, FP4>(rest, scales + g, biases + g, group, values);
      std::copy(values, values + std::min<int64_t>(32, end - k), out + k - from);
    }
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
    case 4:
      if (format.values == Values::fp4) return unpack_row<ByteCode<4>, true>(matrix, row, from, to, out);
      return unpack_row<ByteCode<4>>(matrix, row, from, to, out);
    case 5: return unpack_row<ByteCode<5>>(matrix, row, from, to, out);
    case 6: return unpack_row<ByteCode<6>>(matrix, row, from, to, out);
    default: return unpack_row<ByteCode<8>>(matrix, row, from, to, out);
  }
}

constexpr int kPanel = 3 * L;

// Inputs (rows) to columns, `width` of them side by side and filled with zeros.
void pack(const float* x, int64_t stride, int64_t inputs, int64_t depth, int64_t width, float* panel) {
  int64_t m = 0;
  for (; m + L <= inputs; m += L) {
    const float* rows = x + m * stride;
    int64_t k = 0;
    for (; k + L <= depth; k += L) Vector::transpose(rows + k, stride, panel + k * width + m, width);
    for (; k < depth; ++k)
      for (int i = 0; i < L; ++i) panel[k * width + m + i] = rows[i * stride + k];
  }
  for (; m < width; ++m)
    for (int64_t k = 0; k < depth; ++k) panel[k * width + m] = m < inputs ? x[m * stride + k] : 0.0f;
}

template <int N, int M>
void tile_block(const float* w, int64_t w_stride, const float* panel, int64_t panel_stride, int64_t depth,
                float* result, int64_t stride, bool add) {
  F sums[N][M];
  OPENELM_UNROLL for (int n = 0; n < N; ++n)
    OPENELM_UNROLL for (int m = 0; m < M; ++m) sums[n][m] = add ? Vector::load(result + n * stride + m * L) : Vector::zero();
  for (int64_t k = 0; k < depth; ++k) {
    F inputs[M];
    OPENELM_UNROLL for (int m = 0; m < M; ++m) inputs[m] = Vector::load(panel + k * panel_stride + m * L);
    OPENELM_UNROLL for (int n = 0; n < N; ++n) {
      const F weight = Vector::set(w[n * w_stride + k]);
      OPENELM_UNROLL for (int m = 0; m < M; ++m) sums[n][m] = Vector::fma(weight, inputs[m], sums[n][m]);
    }
  }
  OPENELM_UNROLL for (int n = 0; n < N; ++n)
    OPENELM_UNROLL for (int m = 0; m < M; ++m) Vector::store(result + n * stride + m * L, sums[n][m]);
}

template <int M>
void tile_rows(const float* w, int64_t w_stride, int64_t rows, const float* panel, int64_t panel_stride, int64_t depth,
               float* result, int64_t stride, bool add) {
  int64_t n = 0;
  for (; n + Vector::tile_rows <= rows; n += Vector::tile_rows)
    tile_block<Vector::tile_rows, M>(w + n * w_stride, w_stride, panel, panel_stride, depth, result + n * stride, stride, add);
  for (; n < rows; ++n) tile_block<1, M>(w + n * w_stride, w_stride, panel, panel_stride, depth, result + n * stride, stride, add);
}

void tile(const float* w, int64_t w_stride, int64_t rows, const float* panel, int64_t panel_stride, int64_t inputs,
          int64_t depth, float* result, int64_t stride, bool add) {
  switch (up(inputs, L) / L) {
    case 1: return tile_rows<1>(w, w_stride, rows, panel, panel_stride, depth, result, stride, add);
    case 2: return tile_rows<2>(w, w_stride, rows, panel, panel_stride, depth, result, stride, add);
    default: return tile_rows<3>(w, w_stride, rows, panel, panel_stride, depth, result, stride, add);
  }
}

}  // namespace
}  // namespace openelm
