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

#include "../src/network.h"
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

void expect_close(const Kernels& kernels, const char* what, const std::vector<float>& found,
                  const std::vector<double>& expected) {
  double error = 0, size = 1e-3;
  for (size_t i = 0; i < found.size(); ++i) {
    error = std::isfinite(found[i]) ? std::max(error, std::abs(found[i] - expected[i])) : 1e30;
    size = std::max(size, std::abs(expected[i]));
  }
  if (error <= 1e-5 * size) return;
  ++failures;
  std::printf("FAILED %s: %s differs by %g of %g\n", kernels.name, what, error, size);
}

// Attention over keys and values within larger buffers, which end where the last value does.
void check_attention(const Kernels& kernels, Pool& pool, int64_t length, int64_t slots, int64_t size, int kind) {
  const int64_t B = 2, H = 4, K = 2, stride = size + 3;
  const auto q = random_inputs(B * H * length * size);
  const auto k = random_inputs((B * K * slots - 1) * stride + size), v = random_inputs(k.size());
  const Heads queries{q.data(), B, H, length, size, H * length * size, length * size, size};
  const Heads keys{k.data(), B, K, slots, size, K * slots * stride, slots * stride, stride};
  Heads values = keys;
  values.data = v.data();
  std::vector<uint8_t> allowed(length * slots);
  for (auto& byte : allowed) byte = random_bits() % 3 == 0;
  Mask mask;
  mask.causal = kind == 1;
  if (kind == 2) mask = {false, allowed.data(), 0, 0, slots, 1};
  std::vector<float> out(q.size());
  attend(kernels, pool, queries, keys, values, mask, 0.3f, out.data());
  std::vector<double> expected(q.size());
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < H; ++h)
      for (int64_t l = 0; l < length; ++l) {
        std::vector<double> weights(slots);
        double total = 0;
        for (int64_t s = 0; s < slots; ++s) {
          if (kind == 1 ? s > slots - length + l : kind == 2 && !allowed[l * slots + s]) continue;
          double score = 0;
          for (int64_t d = 0; d < size; ++d)
            score += static_cast<double>(queries.at(b, h)[l * size + d]) * keys.at(b, h / 2)[s * stride + d];
          total += weights[s] = std::exp(0.3 * score);
        }
        for (int64_t d = 0; d < size; ++d) {
          double sum = 0;
          for (int64_t s = 0; s < slots; ++s) sum += weights[s] * values.at(b, h / 2)[s * stride + d];
          expected[((b * length + l) * H + h) * size + d] = total > 0 ? sum / total : 0;
        }
      }
  expect_close(kernels, "attention", out, expected);
}

void check_network(const Kernels& kernels, Pool& pool) {
  for (int64_t length : {1, 5, 40})
    for (int64_t slots : {40, 75})
      for (int64_t size : {6, 64})
        for (int kind : {0, 1, 2}) check_attention(kernels, pool, length, slots, size, kind);
  const int64_t rows = 7, columns = 643;
  const auto x = random_inputs(rows * 2 * columns), update = random_inputs(x.size()), weight = random_inputs(2 * columns);
  std::vector<float> gated(rows * columns), sums(rows), total(x.size()), normed(x.size());
  std::vector<double> gates(gated.size()), logs(rows), expected(x.size());
  gate_rows(kernels, pool, x.data(), rows, columns, gated.data());
  log_sum_exp(kernels, pool, x.data(), rows, 2 * columns, sums.data());
  add_and_normalize(pool, x.data(), update.data(), weight.data(), 1e-6f, rows, 2 * columns, total.data(), normed.data());
  for (int64_t row = 0; row < rows; ++row) {
    double exponentials = 0, squares = 0;
    for (int64_t k = 0; k < 2 * columns; ++k) {
      exponentials += std::exp(static_cast<double>(x[row * 2 * columns + k]));
      squares += static_cast<double>(total[row * 2 * columns + k]) * total[row * 2 * columns + k];
    }
    logs[row] = std::log(exponentials);
    for (int64_t k = 0; k < 2 * columns; ++k)
      expected[row * 2 * columns + k] =
          total[row * 2 * columns + k] / std::sqrt(squares / (2.0 * columns) + 1e-6) * weight[k];
    for (int64_t k = 0; k < columns; ++k) {
      const double gate = x[row * 2 * columns + k];
      gates[row * columns + k] = gate / (1 + std::exp(-gate)) * x[(row * 2 + 1) * columns + k];
    }
  }
  expect_close(kernels, "the gate", gated, gates);
  expect_close(kernels, "the logarithm of sums", sums, logs);
  expect_close(kernels, "the norm of a sum", normed, expected);

  Rotation r{2, 3, 4, 2, 10, weight.data(), weight.data() + 10, 1e-6f, update.data(), update.data() + 100, 15};
  std::vector<float> queries(2 * 3 * 4 * 10), keys(2 * 3 * 2 * 10), values(keys.size());
  normalize_and_rotate(pool, r, x.data(), queries.data(), keys.data(), values.data());
  std::vector<double> turned(queries.size());
  for (int64_t b = 0; b < 2; ++b)
    for (int64_t l = 0; l < 3; ++l)
      for (int64_t h = 0; h < 4; ++h) {
        const float* head = x.data() + ((b * 3 + l) * 8 + h) * 10;
        double squares = 0;
        for (int i = 0; i < 10; ++i) squares += static_cast<double>(head[i]) * head[i];
        const auto at = [&](int i) { return head[i] / std::sqrt(squares / 10 + 1e-6) * weight[i]; };
        for (int i = 0; i < 5; ++i) {
          const double c = update[b * 15 + l * 5 + i], s = update[100 + b * 15 + l * 5 + i];
          double* to = turned.data() + ((b * 4 + h) * 3 + l) * 10;
          to[i] = at(i) * c - at(i + 5) * s;
          to[i + 5] = at(i) * s + at(i + 5) * c;
        }
      }
  expect_close(kernels, "queries", queries, turned);
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
      check_network(*kernels, pool);
      check_callers(*kernels, pool);
    }
    std::printf("%s: %s\n", kernels->name, failures ? "FAILED" : "ok");
  }
  return failures != 0;
}
