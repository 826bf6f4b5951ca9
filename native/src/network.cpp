#include "network.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "buffer.h"

namespace openelm {
namespace {

constexpr int64_t kSmallest = 1 << 14;  // elements from which sharing the work pays
constexpr int64_t kQueries = 32;  // that are scored together
constexpr int64_t kKeys = 256;  // whose values are added at once
constexpr float kLeast = -std::numeric_limits<float>::infinity();

// Calls task(first, last) with shares of `count` rows of `size` elements.
template <class Task>
void share_rows(Pool& pool, int64_t count, int64_t size, const Task& task) {
  const int64_t share = std::max<int64_t>(1, std::max(kSmallest / size, ceil_div(count, 8 * pool.threads())));
  pool.run(ceil_div(count, share), [&](int64_t part) { task(part * share, std::min(count, (part + 1) * share)); });
}

// The keys that a query sees: within a range and, if there are gaps, by a mask.
struct Seen {
  int64_t first, end;
  const uint8_t* allowed = nullptr;  // if there are gaps
};

Seen seen_in(const uint8_t* allowed, int64_t stride, int64_t keys) {
  const auto sees = [&](int64_t key) { return allowed[key * stride] != 0; };
  int64_t first = 0, end = keys;
  while (end > 0 && !sees(end - 1)) --end;
  while (first < end && !sees(first)) ++first;
  for (int64_t key = first; key < end; ++key)
    if (!sees(key)) return {first, end, allowed};
  return {first, end};
}

// Attention of some queries that share keys and values.
class Block {
 public:
  Block(const Kernels& kernels, const Mask& mask, const Heads& keys, const Heads& values, float scale)
      : kernels_(kernels), mask_(mask), keys_(keys), values_(values), scale_(scale) {}

  // Queries `first` to `last` of the heads of group k, counted through all of them.
  void run(const Heads& queries, const float* packed, int64_t b, int64_t k, int64_t first, int64_t last, float* out) const {
    thread_local Buffer score_buffer, sum_buffer, value_buffer;
    const int64_t count = last - first, per_head = queries.heads / keys_.heads, width = kernels_.panel;
    const int64_t size = queries.size, padded = ceil_div(size, kernels_.lanes) * kernels_.lanes;
    std::vector<Seen> seen(count);
    const uint8_t* allowed = nullptr;  // the row of the mask that was read last
    int64_t start = keys_.length, end = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = first + i;
      const int64_t h = k * per_head + row / queries.length, l = row % queries.length;
      if (mask_.allowed) {
        const uint8_t* next = mask_.allowed + b * mask_.batch_stride + h * mask_.head_stride + l * mask_.stride;
        seen[i] = next == allowed ? seen[i - 1] : seen_in(next, mask_.key_stride, keys_.length);
        allowed = next;
      } else {
        seen[i] = {0, mask_.causal ? std::max<int64_t>(0, keys_.length - queries.length + l + 1) : keys_.length};
      }
      if (seen[i].first == seen[i].end) continue;
      start = std::min(start, seen[i].first);
      end = std::max(end, seen[i].end);
    }
    const int64_t panel = start / width, panels = std::max<int64_t>(0, ceil_div(end, width) - panel);
    const int64_t origin = panel * width, stride = panels * width;
    float* scores = score_buffer.floats(count * stride);  // of the keys from `origin` on
    const float* rows = queries.at(b, k * per_head) + first * size;
    std::vector<uint8_t> needed(panels);
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t from = origin + p * width, to = std::min(from + width, keys_.length);
      needed[p] = std::any_of(seen.begin(), seen.end(), [&](const Seen& s) { return sees_any(s, from, to); });
      if (needed[p])
        kernels_.tile(rows, size, count, packed + from * size, width, width, size, scores + p * width, stride, false);
      else
        for (int64_t i = 0; i < count; ++i) std::fill_n(scores + i * stride + p * width, width, kLeast);
    }
    std::vector<float> totals(count);
    for (int64_t i = 0; i < count; ++i) totals[i] = weigh(seen[i], origin, stride, scores + i * stride);
    float* sums = sum_buffer.floats(count * padded);
    std::fill_n(sums, count * padded, 0.0f);
    for (int64_t p = 0; p < panels;) {
      int64_t until = p + 1;
      if (needed[p]) {
        while (until < panels && needed[until] && (until - p) * width < kKeys) ++until;
        const int64_t from = origin + p * width, depth = std::min(until * width + origin, end) - from;
        add_values(scores + p * width, stride, count, values_.at(b, k) + from * values_.stride, depth, padded,
                   value_buffer, sums);
      }
      p = until;
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t head = k * per_head + (first + i) / queries.length, l = (first + i) % queries.length;
      float* to = out + ((b * queries.length + l) * queries.heads + head) * size;
      for (int64_t d = 0; d < size; ++d) to[d] = totals[i] != 0 ? sums[i * padded + d] / totals[i] : 0.0f;
    }
  }

 private:
  bool sees_any(const Seen& seen, int64_t from, int64_t to) const {
    from = std::max(from, seen.first);
    to = std::min(to, seen.end);
    if (!seen.allowed) return from < to;
    for (int64_t key = from; key < to; ++key)
      if (seen.allowed[key * mask_.key_stride]) return true;
    return false;
  }

  // Turns scores into exponentials, zero for keys that are not seen; their sum.
  float weigh(const Seen& seen, int64_t origin, int64_t count, float* scores) const {
    const int64_t first = std::max<int64_t>(0, seen.first - origin), size = seen.end - seen.first;
    if (size <= 0) {
      std::fill_n(scores, count, 0.0f);
      return 0;
    }
    if (seen.allowed)
      for (int64_t key = seen.first; key < seen.end; ++key)
        if (!seen.allowed[key * mask_.key_stride]) scores[key - origin] = kLeast;
    std::fill_n(scores, first, 0.0f);
    std::fill(scores + first + size, scores + count, 0.0f);
    const float most = scale_ * kernels_.largest(scores + first, size);
    return kernels_.exponentials(scores + first, size, scale_, most, scores + first);
  }

  // Adds `depth` values times the weights of `count` queries to their sums (count, padded).
  void add_values(const float* weights, int64_t stride, int64_t count, const float* values, int64_t depth, int64_t padded,
                  Buffer& buffer, float* sums) const {
    int64_t value_stride = values_.stride;
    if (padded != values_.size) {  // vectors would read past the end
      float* copy = buffer.floats(depth * padded);
      for (int64_t key = 0; key < depth; ++key) {
        std::fill_n(std::copy_n(values + key * value_stride, values_.size, copy + key * padded), padded - values_.size, 0.0f);
      }
      values = copy;
      value_stride = padded;
    }
    for (int64_t d = 0; d < padded; d += kernels_.panel)
      kernels_.tile(weights, stride, count, values + d, value_stride, std::min<int64_t>(kernels_.panel, padded - d), depth,
                    sums + d, padded, true);
  }

  const Kernels& kernels_;
  const Mask& mask_;
  const Heads& keys_;
  const Heads& values_;
  float scale_;
};

void rotate(const float* x, const float* cosines, const float* sines, int64_t half, float* out) {
  for (int64_t i = 0; i < half; ++i) {
    out[i] = x[i] * cosines[i] - x[i + half] * sines[i];
    out[i + half] = x[i] * sines[i] + x[i + half] * cosines[i];
  }
}

}  // namespace

void attend(const Kernels& kernels, Pool& pool, const Heads& queries, const Heads& keys, const Heads& values,
            const Mask& mask, float scale, float* out) {
  thread_local Buffer buffer;
  const int64_t size = keys.size, panels = ceil_div(keys.length, kernels.panel), groups = keys.batch * keys.heads;
  const int64_t packed_size = panels * kernels.panel * size;  // of a group's keys, in panels (size, panel)
  float* packed = buffer.floats(groups * packed_size);
  share_rows(pool, groups * panels, kernels.panel * size, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const int64_t group = i / panels, start = i % panels * kernels.panel;
      const float* rows = keys.at(group / keys.heads, group % keys.heads) + start * keys.stride;
      kernels.pack(rows, keys.stride, std::min<int64_t>(kernels.panel, keys.length - start), size, kernels.panel,
                   packed + group * packed_size + start * size);
    }
  });
  const Block block(kernels, mask, keys, values, scale);
  const int64_t rows = queries.heads / keys.heads * queries.length, blocks = ceil_div(rows, kQueries);
  const auto compute = [&](int64_t i) {
    const int64_t group = i / blocks, first = i % blocks * kQueries;
    block.run(queries, packed + group * packed_size, group / keys.heads, group % keys.heads, first,
              std::min(rows, first + kQueries), out);
  };
  if (groups * std::min(rows, kQueries) * keys.length < kSmallest / 16 && blocks == 1)
    for (int64_t i = 0; i < groups; ++i) compute(i);
  else
    pool.run(groups * blocks, compute);
}

void normalize_and_rotate(Pool& pool, const Rotation& r, const float* x, float* queries, float* keys, float* values) {
  const int64_t H = r.query_heads, K = r.kv_heads, D = r.size, half = D / 2;
  share_rows(pool, r.batch * r.length, (H + 2 * K) * D, [&](int64_t from, int64_t to) {
    std::vector<float> normed(D);
    for (int64_t row = from; row < to; ++row) {
      const int64_t b = row / r.length, l = row % r.length;
      const float* cosines = r.cosines + b * r.batch_stride + l * half;
      const float* sines = r.sines + b * r.batch_stride + l * half;
      for (int64_t n = 0; n < H + 2 * K; ++n) {
        const float* head = x + (row * (H + 2 * K) + n) * D;
        if (n >= H + K) {
          std::copy_n(head, D, values + ((b * K + n - H - K) * r.length + l) * D);
          continue;
        }
        float* to = n < H ? queries + ((b * H + n) * r.length + l) * D : keys + ((b * K + n - H) * r.length + l) * D;
        if (const float* weight = n < H ? r.query_weight : r.key_weight) {
          normalize_rows(head, weight, r.eps, 1, D, normed.data());
          head = normed.data();
        }
        rotate(head, cosines, sines, half, to);
      }
    }
  });
}

void normalize_rows(const float* x, const float* weight, float eps, int64_t rows, int64_t columns, float* out) {
  constexpr int lanes = 8;  // sums that run side by side, always in one order
  for (int64_t row = 0; row < rows; ++row, x += columns, out += columns) {
    float sums[lanes] = {};
    int64_t k = 0;
    for (; k + lanes <= columns; k += lanes)
      for (int i = 0; i < lanes; ++i) sums[i] += x[k + i] * x[k + i];
    for (; k < columns; ++k) sums[k % lanes] += x[k] * x[k];
    float total = 0;
    for (float sum : sums) total += sum;
    const float scale = 1 / std::sqrt(total / static_cast<float>(columns) + eps);
    if (weight) for (k = 0; k < columns; ++k) out[k] = x[k] * scale * weight[k];
    else for (k = 0; k < columns; ++k) out[k] = x[k] * scale;
  }
}

void add_and_normalize(Pool& pool, const float* x, const float* update, const float* weight, float eps, int64_t rows,
                       int64_t columns, float* sum, float* normed) {
  share_rows(pool, rows, columns, [&](int64_t from, int64_t to) {
    for (int64_t i = from * columns; i < to * columns; ++i) sum[i] = x[i] + update[i];
    normalize_rows(sum + from * columns, weight, eps, to - from, columns, normed + from * columns);
  });
}

void gate_rows(const Kernels& kernels, Pool& pool, const float* x, int64_t rows, int64_t columns, float* out) {
  share_rows(pool, rows, columns, [&](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row)
      kernels.gate(x + 2 * row * columns, x + (2 * row + 1) * columns, columns, out + row * columns);
  });
}

void log_sum_exp(const Kernels& kernels, Pool& pool, const float* x, int64_t rows, int64_t columns, float* out) {
  share_rows(pool, rows, columns, [&](int64_t from, int64_t to) {
    thread_local Buffer buffer;
    for (int64_t row = from; row < to; ++row) {
      const float* of = x + row * columns;
      const float most = kernels.largest(of, columns);
      const float shift = std::isfinite(most) ? most : 0;
      out[row] = shift + std::log(kernels.exponentials(of, columns, 1, shift, buffer.floats(columns)));
    }
  });
}

}  // namespace openelm
