// Tests of the kernels without MLX, to run under sanitizers and emulators: `make check`, `make sanitize`, `make neon`.
//   driver            every format, odd sizes, all kernels that this processor can run, one and several threads
//   driver --speed    cycles of one core: time of the thread, which other programs disturb less than the clock
#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../src/product.h"

using namespace openelm;

namespace {

std::mt19937 random_bits(7);

struct Case {
  Format format;
  Matrix matrix;
  std::vector<uint8_t> words, scales, biases;  // exactly as long as needed: a sanitizer sees what is read behind them
  std::vector<float> values;  // the same matrix as floats
};

float from_half(uint16_t h) {
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  const float size = exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(1.0f * fraction, -24);
  return h & 0x8000 ? -size : size;
}

float from_fp8(uint8_t b) {
  const int exponent = b >> 3 & 15, fraction = b & 7;
  const float size = exponent ? std::ldexp(8.0f + fraction, exponent - 10) : std::ldexp(1.0f * fraction, -9);
  return b & 0x80 ? -size : size;
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// A random scale: its bytes are appended, its value is returned.
float random_scale(Scales type, bool is_bias, std::vector<uint8_t>& bytes) {
  const float value = std::uniform_real_distribution<float>(is_bias ? -1.0f : 0.01f, is_bias ? 1.0f : 0.1f)(random_bits);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const auto append = [&](uint32_t word, int count) {
    for (int i = 0; i < count; ++i) bytes.push_back(static_cast<uint8_t>(word >> (8 * i)));
  };
  switch (type) {
    case Scales::float32: append(bits, 4); return value;
    case Scales::bfloat16: append(bits >> 16, 2); return float_of(bits & 0xFFFF0000u);
    case Scales::float16: {
      const uint16_t half = static_cast<uint16_t>(random_bits() % 0x400 + (10 + random_bits() % 5) * 0x400);
      append(half, 2);
      return from_half(half);
    }
    case Scales::e8m0: {
      const uint32_t power = 120 + random_bits() % 8;
      append(power, 1);
      return std::ldexp(1.0f, static_cast<int>(power) - 127);
    }
    default: {
      const uint8_t byte = static_cast<uint8_t>(random_bits() % 0x70);
      append(byte, 1);
      return from_fp8(byte);
    }
  }
}

Case make(Format format, int64_t rows, int64_t columns) {
  static const float fp4[] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
  Case made;
  made.format = format;
  made.values.resize(rows * columns);
  if (format.values == Values::float32) {
    std::normal_distribution<float> normal;
    for (auto& value : made.values) value = normal(random_bits);
    made.words.resize(4 * made.values.size());
    std::memcpy(made.words.data(), made.values.data(), made.words.size());
  } else {
    made.words.resize(rows * columns * format.bits / 8);
    for (auto& byte : made.words) byte = static_cast<uint8_t>(random_bits());
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t group = 0; group < columns / format.group; ++group) {
        const float scale = random_scale(format.scales, false, made.scales);
        const float bias = format.values == Values::affine ? random_scale(format.scales, true, made.biases) : 0;
        for (int64_t k = group * format.group; k < (group + 1) * format.group; ++k) {
          const int64_t bit = (row * columns + k) * format.bits;
          uint32_t two = made.words[bit / 8];
          if (bit / 8 + 1 < static_cast<int64_t>(made.words.size())) two |= made.words[bit / 8 + 1] << 8;
          const uint32_t q = two >> (bit % 8) & ((1u << format.bits) - 1);
          float value = static_cast<float>(q);
          if (format.values == Values::fp4) value = q & 8 ? -fp4[q & 7] : fp4[q & 7];
          if (format.values == Values::fp8) value = from_fp8(static_cast<uint8_t>(q));
          made.values[row * columns + k] = value * scale + bias;
        }
      }
  }
  made.matrix = {made.words.data(), made.scales.data(), made.biases.data(), rows, columns, format};
  return made;
}

std::string name_of(const Format& format) {
  const char* values[] = {"affine", "fp4", "fp8", "float32"};
  const char* scales[] = {"", "float32", "float16", "bfloat16", "e8m0", "e4m3"};
  return std::string(values[static_cast<int>(format.values)]) + " " + std::to_string(format.bits) + " bits, groups of " +
         std::to_string(format.group) + " " + scales[static_cast<int>(format.scales)];
}

std::vector<Format> all_formats() {
  std::vector<Format> formats;
  for (int bits : {2, 3, 4, 5, 6, 8})
    for (int group : {32, 64, 128})
      for (auto scales : {Scales::float32, Scales::float16, Scales::bfloat16})
        formats.push_back({Values::affine, scales, bits, group});
  formats.push_back({Values::fp4, Scales::e8m0, 4, 32});
  formats.push_back({Values::fp8, Scales::e8m0, 8, 32});
  formats.push_back({Values::fp4, Scales::e4m3, 4, 16});
  formats.push_back({});
  return formats;
}

std::vector<float> random_inputs(int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> x(count);
  for (auto& value : x) value = normal(random_bits);
  return x;
}

int failures = 0;

void expect(bool holds, const Kernels& kernels, const Case& made, const char* what, int64_t inputs) {
  if (holds) return;
  ++failures;
  std::printf("FAILED %s, %s, %lld rows, %lld columns, %lld inputs: %s\n", kernels.name, name_of(made.format).c_str(),
              static_cast<long long>(made.matrix.rows), static_cast<long long>(made.matrix.columns),
              static_cast<long long>(inputs), what);
}

// Compares with sums in double precision; allowed is what rounding in single precision may explain.
bool close(const Case& made, const std::vector<float>& x, int64_t inputs, const std::vector<float>& y, double allowed) {
  const int64_t rows = made.matrix.rows, columns = made.matrix.columns;
  for (int64_t m = 0; m < inputs; ++m)
    for (int64_t n = 0; n < rows; ++n) {
      double sum = 0, size = 0;
      for (int64_t k = 0; k < columns; ++k) {
        const double term = static_cast<double>(x[m * columns + k]) * made.values[n * columns + k];
        sum += term;
        size += std::abs(term);
      }
      if (!(std::abs(y[m * rows + n] - sum) <= allowed * size + 1e-6)) return false;
    }
  return true;
}

void check(const Kernels& kernels, Pool& pool, const Case& made) {
  const Matrix& matrix = made.matrix;
  const int64_t most = kFew + 30;
  const auto x = random_inputs(most * matrix.columns);
  std::vector<float> all(most * matrix.rows), y(most * matrix.rows);
  product(kernels, pool, matrix, x.data(), kFew, all.data());
  expect(close(made, x, kFew, all, 2e-6), kernels, made, "a few inputs", kFew);
  for (int64_t inputs : {1, 2, 3, 4, 5, 7, 9}) {
    const int64_t start = inputs == 9 ? 20 : inputs;
    product(kernels, pool, matrix, x.data() + start * matrix.columns, inputs, y.data());
    const bool same = std::memcmp(y.data(), all.data() + start * matrix.rows, 4 * inputs * matrix.rows) == 0;
    expect(same, kernels, made, "the bits depend on the other inputs", inputs);
  }
  for (int64_t inputs : {kFew + 1, most}) {
    product(kernels, pool, matrix, x.data(), inputs, y.data());
    expect(close(made, x, inputs, y, 2e-6), kernels, made, "many inputs", inputs);
  }
  if (made.format.values == Values::float32) return;
  Matrix rounded = matrix;
  rounded.format.int8_inputs = true;
  product(kernels, pool, rounded, x.data(), most, y.data());
  expect(close(made, x, most, y, 0.01), kernels, made, "many inputs in 8 bits", most);
  const std::vector<int32_t> numbers = {0, static_cast<int32_t>(matrix.rows - 1), static_cast<int32_t>(matrix.rows / 2)};
  std::vector<float> taken(numbers.size() * matrix.columns);
  take_rows(kernels, pool, matrix, numbers.data(), static_cast<int64_t>(numbers.size()), taken.data());
  for (size_t i = 0; i < numbers.size(); ++i)
    expect(std::equal(taken.begin() + i * matrix.columns, taken.begin() + (i + 1) * matrix.columns,
                      made.values.begin() + numbers[i] * matrix.columns), kernels, made, "rows", 0);
}

// Calls from several threads at once, while the pool is busy.
void check_callers(const Kernels& kernels, Pool& pool) {
  const Case made = make({Values::affine, Scales::float32, 4, 64}, 256, 512);
  const auto x = random_inputs(512);
  std::vector<float> expected(256);
  product(kernels, pool, made.matrix, x.data(), 1, expected.data());
  std::vector<std::thread> callers;
  std::vector<int> same(4);
  for (int i = 0; i < 4; ++i)
    callers.emplace_back([&, i] {
      std::vector<float> y(256);
      for (int repeat = 0; repeat < 50; ++repeat) {
        product(kernels, pool, made.matrix, x.data(), 1, y.data());
        same[i] += y == expected;
      }
    });
  for (auto& caller : callers) caller.join();
  for (int count : same) expect(count == 50, kernels, made, "calls at once", 1);
}

double thread_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

void speed(const Kernels& kernels, int64_t rows, int64_t columns) {
  Pool alone(1);
  for (const Format& format : all_formats()) {
    if (format.values == Values::affine && (format.group != 64 || format.scales != Scales::bfloat16)) continue;
    const Case made = make(format, rows, columns);
    const auto x = random_inputs(512 * columns);
    std::vector<float> y(512 * rows);
    std::printf("%-8s %-38s", kernels.name, name_of(format).c_str());
    for (int64_t inputs : {1, 2, 4, 8, 16, 32, 64, 512}) {
      if (rows * inputs > 1 << 18) break;
      double best = 1e9;
      for (int repeat = 0; repeat < (inputs < 64 ? 9 : 3); ++repeat) {
        const double start = thread_seconds();
        product(kernels, alone, made.matrix, x.data(), inputs, y.data());
        best = std::min(best, thread_seconds() - start);
      }
      const double weights = static_cast<double>(rows * columns);
      if (inputs == 1) std::printf(" 1: %5.1f Gweights/s", weights / best / 1e9);
      else std::printf(" %lld: %5.1f GF/s", static_cast<long long>(inputs), 2 * weights * inputs / best / 1e9);
      std::fflush(stdout);
    }
    Matrix rounded = made.matrix;
    rounded.format.int8_inputs = true;
    double best = 1e9;
    for (int repeat = 0; repeat < 3 && rows * 512 <= 1 << 18; ++repeat) {
      const double start = thread_seconds();
      product(kernels, alone, rounded, x.data(), 512, y.data());
      best = std::min(best, thread_seconds() - start);
    }
    std::printf(" int8 512: %5.1f GF/s", 2.0 * rows * columns * 512 / best / 1e9);
    std::printf("\n");
  }
}

}  // namespace

int main(int count, char** arguments) {
  const bool timed = count > 1 && std::strcmp(arguments[1], "--speed") == 0;
  const char* only = count > 2 ? arguments[2] : nullptr;
  for (const char* name : {"plain", "avx2", "avx512", "neon"}) {
    const Kernels* kernels = kernels_for(name);
    if (kernels == nullptr || (only != nullptr && std::strcmp(only, name) != 0)) continue;
    if (timed) {
      speed(*kernels, count > 3 ? std::atoi(arguments[3]) : 320, 1280);
      continue;
    }
    for (int threads : {1, 3}) {
      Pool pool(threads);
      for (const Format& format : all_formats()) {
        const int64_t step = std::max(format.group, 32);  // rows of whole words
        if (threads > 1 && format.scales == Scales::float16) continue;
        check(*kernels, pool, make(format, 1, step));
        check(*kernels, pool, make(format, 37, step * 3));
        if (format.bits == 32) check(*kernels, pool, make(format, 5, 71));
        if (threads > 1) check(*kernels, pool, make(format, 180, 640));
      }
      check_callers(*kernels, pool);
    }
    std::printf("%s: %s\n", kernels->name, failures ? "FAILED" : "ok");
  }
  return failures != 0;
}
