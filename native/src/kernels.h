// What a set of kernels offers, one set per instruction set. Nothing here depends on MLX.
#pragma once

#include <cstddef>
#include <cstdint>

namespace openelm {

enum class Values : uint8_t { affine, fp4, fp8, float32 };
enum class Scales : uint8_t { none, float32, float16, bfloat16, e8m0, e4m3 };

struct Format {
  Values values = Values::float32;
  Scales scales = Scales::none;
  int bits = 32;
  int group = 0;  // columns that share a scale; 0 for float32
  bool int8_inputs = false;  // round many inputs to 8 bits

  bool operator==(const Format&) const = default;
};

// A matrix in MLX's layout: rows of packed bits, little-endian, without gaps.
struct Matrix {
  const uint8_t* words = nullptr;
  const uint8_t* scales = nullptr;
  const uint8_t* biases = nullptr;
  int64_t rows = 0;
  int64_t columns = 0;
  Format format;

  int64_t row_bytes() const { return columns * format.bits / 8; }
  int64_t groups() const { return format.group ? columns / format.group : 0; }
};

constexpr int kSlack = 64;  // bytes behind a row that kernels may read; the last row is copied for that
constexpr int kTileRows = 32;  // rows of a matrix that are unpacked together for many inputs
constexpr int kTileDepth = 256;  // columns of such a tile

struct Kernels {
  const char* name;
  int lanes;  // floats of a vector
  int panel;  // inputs that a tile is multiplied with at once

  // A few inputs: each is prepared once (reordered, scaled by powers of two, its sums per group), then multiplied with
  // all rows. The order of summation for an input does not depend on the others.
  int64_t (*prepared_size)(const Format&, int64_t columns);  // floats
  void (*prepare)(const Format&, int64_t columns, const float* x, float* prepared);
  void (*multiply)(const Matrix&, const float* prepared, int64_t inputs, int64_t first, int64_t last, float* y);

  // Many inputs: panels of inputs, transposed, times unpacked tiles; the result is transposed, too.
  void (*pack)(const float* x, int64_t stride, int64_t inputs, int64_t depth, int64_t width, float* panel);
  void (*unpack)(const Matrix&, int64_t row, int64_t from, int64_t to, float* out);
  void (*tile)(const float* w, int64_t w_stride, int64_t rows, const float* panel, int64_t panel_stride, int64_t inputs,
               int64_t depth, float* result, int64_t result_stride, bool add);

  // Elements of a row, from its beginning on: what is before and behind them changes nothing.
  float (*largest)(const float* x, int64_t count);
  float (*exponentials)(const float* x, int64_t count, float scale, float shift, float* out);  // e^(scale x - shift); sum
  void (*gate)(const float* gate, const float* x, int64_t count, float* out);  // gate / (1 + e^-gate) * x

  // Many inputs, rounded to 8 bits: whole numbers with a scale for each group of the matrix.
  void (*quantize)(const float* x, int64_t columns, int group, int8_t* values, float* scales, float* sums);
  void (*multiply_int8)(const Matrix&, const int8_t* values, const float* scales, const float* sums, int64_t inputs,
                        int64_t first, int64_t last, float* y);
};

const Kernels& plain_kernels();
#if defined(__x86_64__) || defined(_M_X64)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#elif defined(__aarch64__)
const Kernels& neon_kernels();
#endif

}  // namespace openelm
