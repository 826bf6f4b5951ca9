// What a layer computes beside products, as operations of MLX.
#include "mlx/fast.h"
#include "mlx/mlx.h"
#include "network.h"
#include "operation.h"
#include "operations.h"

namespace openelm {
namespace {

void check_floats(const array& a, const char* name, int axes) {
  if (a.dtype() != mx::float32) refuse(std::string(name) + " must be float32");
  if (static_cast<int>(a.ndim()) < axes) refuse(std::string(name) + " has too few axes; got " + text(a));
}

void check_weight(const std::optional<array>& weight, int size) {
  if (weight && (weight->dtype() != mx::float32 || weight->shape() != mx::Shape{size}))
    refuse("weight must be float32 of shape (" + std::to_string(size) + "); got " + text(*weight));
}

// The root mean square of the last axis, in one pass over a row where MLX's operation on the CPU is several.
class RmsNorm : public ByRow {
 public:
  RmsNorm(mx::Stream stream, float eps, Fallback fallback) : ByRow(stream, std::move(fallback)), eps_(eps) {}
  const char* name() const override { return "OpenELMRmsNorm"; }
  std::vector<mx::Shape> output_shapes(const std::vector<array>& inputs) override { return {inputs[0].shape()}; }
  bool is_equivalent(const Primitive& other) const override { return static_cast<const RmsNorm&>(other).eps_ == eps_; }

 protected:
  std::shared_ptr<Operation> again() override { return std::make_shared<RmsNorm>(stream(), eps_, fallback_); }
  Compute compute() const override {
    return [eps = eps_](const std::vector<array>& inputs, std::vector<array>& outputs) {
      const Floats x(inputs[0]), weight(inputs.back());
      const int64_t columns = inputs[0].shape(-1);
      normalize_rows(x, inputs.size() > 1 ? static_cast<const float*>(weight) : nullptr, eps, inputs[0].size() / columns,
                     columns, outputs[0].data<float>());
    };
  }

 private:
  float eps_;
};

class AddAndNormalize : public Operation {
 public:
  AddAndNormalize(mx::Stream stream, float eps, Fallback fallback) : Operation(stream, std::move(fallback)), eps_(eps) {}
  const char* name() const override { return "OpenELMAddAndNormalize"; }
  std::vector<mx::Shape> output_shapes(const std::vector<array>& inputs) override {
    return {inputs[0].shape(), inputs[0].shape()};
  }
  bool is_equivalent(const Primitive& other) const override {
    return static_cast<const AddAndNormalize&>(other).eps_ == eps_;
  }

 protected:
  Compute compute() const override {
    return [eps = eps_](const std::vector<array>& inputs, std::vector<array>& outputs) {
      const auto [threads, set] = team();
      const Floats x(inputs[0]), update(inputs[1]), weight(inputs[2]);
      const int64_t columns = inputs[0].shape(-1);
      add_and_normalize(*threads, x, update, weight, eps, inputs[0].size() / columns, columns, outputs[0].data<float>(),
                        outputs[1].data<float>());
    };
  }

 private:
  float eps_;
};

class NormalizeAndRotate : public Operation {
 public:
  NormalizeAndRotate(mx::Stream stream, int query_heads, float eps, Fallback fallback)
      : Operation(stream, std::move(fallback)), query_heads_(query_heads), eps_(eps) {}
  const char* name() const override { return "OpenELMNormalizeAndRotate"; }
  std::vector<mx::Shape> output_shapes(const std::vector<array>& inputs) override {
    const auto& x = inputs[0];
    const int B = x.shape(0), L = x.shape(1), K = (x.shape(2) - query_heads_) / 2, D = x.shape(3);
    return {{B, query_heads_, L, D}, {B, K, L, D}, {B, K, L, D}};
  }
  bool is_equivalent(const Primitive& other) const override {
    const auto& its = static_cast<const NormalizeAndRotate&>(other);
    return its.query_heads_ == query_heads_ && its.eps_ == eps_;
  }

 protected:
  Compute compute() const override {
    return [H = query_heads_, eps = eps_](const std::vector<array>& inputs, std::vector<array>& outputs) {
      const auto [threads, set] = team();
      const array& heads = inputs[0];
      const bool is_normed = inputs.size() > 3;
      const Floats x(heads), cosines(inputs[1]), sines(inputs[2]);
      const Floats query_weight(inputs[is_normed ? 3 : 1]), key_weight(inputs[is_normed ? 4 : 1]);
      Rotation r;
      r.batch = heads.shape(0);
      r.length = heads.shape(1);
      r.query_heads = H;
      r.kv_heads = (heads.shape(2) - H) / 2;
      r.size = heads.shape(3);
      r.query_weight = is_normed ? static_cast<const float*>(query_weight) : nullptr;
      r.key_weight = is_normed ? static_cast<const float*>(key_weight) : nullptr;
      r.eps = eps;
      r.cosines = cosines;
      r.sines = sines;
      r.batch_stride = inputs[1].ndim() > 2 ? r.length * r.size / 2 : 0;
      normalize_and_rotate(*threads, r, x, outputs[0].data<float>(), outputs[1].data<float>(), outputs[2].data<float>());
    };
  }

 private:
  int query_heads_;
  float eps_;
};

// Heads where they lie in memory, or a copy if their elements do not lie side by side.
class Strided {
 public:
  explicit Strided(const array& a) {
    heads.batch = a.shape(0);
    heads.heads = a.shape(1);
    heads.length = a.shape(2);
    heads.size = a.shape(3);
    if (a.strides(3) == 1 || heads.size == 1) {
      heads.data = a.data<float>();
      heads.batch_stride = a.strides(0);
      heads.head_stride = a.strides(1);
      heads.stride = a.strides(2);
    } else {
      fill(a);
    }
  }
  void fill(const array& a) {
    heads.data = reinterpret_cast<const float*>(in_order(a, copy_));
    heads.stride = heads.size;
    heads.head_stride = heads.length * heads.size;
    heads.batch_stride = heads.heads * heads.head_stride;
  }

  Heads heads;

 private:
  std::vector<uint8_t> copy_;
};

class Attention : public Operation {
 public:
  Attention(mx::Stream stream, float scale, bool causal, Fallback fallback)
      : Operation(stream, std::move(fallback)), scale_(scale), causal_(causal) {}
  const char* name() const override { return "OpenELMAttention"; }
  std::vector<mx::Shape> output_shapes(const std::vector<array>& inputs) override {
    const auto& queries = inputs[0].shape();
    return {{queries[0], queries[2], queries[1], queries[3]}};
  }
  bool is_equivalent(const Primitive& other) const override {
    const auto& its = static_cast<const Attention&>(other);
    return its.scale_ == scale_ && its.causal_ == causal_;
  }

 protected:
  Compute compute() const override {
    return [scale = scale_, causal = causal_](const std::vector<array>& inputs, std::vector<array>& outputs) {
      const auto [threads, set] = team();
      Strided queries(inputs[0]);
      queries.fill(inputs[0]);
      const Strided keys(inputs[1]), values(inputs[2]);
      Mask mask;
      mask.causal = causal;
      if (inputs.size() > 3) {
        const array& allowed = inputs[3];
        mask.allowed = allowed.data<uint8_t>();
        mask.batch_stride = allowed.strides(0);
        mask.head_stride = allowed.strides(1);
        mask.stride = allowed.strides(2);
        mask.key_stride = allowed.strides(3);
      }
      attend(*set, *threads, queries.heads, keys.heads, values.heads, mask, scale, outputs[0].data<float>());
    };
  }

 private:
  float scale_;
  bool causal_;
};

class Gated : public ByRow {
 public:
  using ByRow::ByRow;
  const char* name() const override { return "OpenELMGated"; }
  std::vector<mx::Shape> output_shapes(const std::vector<array>& inputs) override {
    auto shape = inputs[0].shape();
    shape.back() /= 2;
    return {shape};
  }
  bool is_equivalent(const Primitive&) const override { return true; }

 protected:
  std::shared_ptr<Operation> again() override { return std::make_shared<Gated>(stream(), fallback_); }
  Compute compute() const override {
    return [](const std::vector<array>& inputs, std::vector<array>& outputs) {
      const auto [threads, set] = team();
      const int64_t columns = inputs[0].shape(-1) / 2;
      gate_rows(*set, *threads, Floats(inputs[0]), inputs[0].size() / (2 * columns), columns, outputs[0].data<float>());
    };
  }
};

class LogSumExp : public ByRow {
 public:
  using ByRow::ByRow;
  const char* name() const override { return "OpenELMLogSumExp"; }
  std::vector<mx::Shape> output_shapes(const std::vector<array>& inputs) override {
    auto shape = inputs[0].shape();
    shape.pop_back();
    return {shape};
  }
  bool is_equivalent(const Primitive&) const override { return true; }

 protected:
  std::shared_ptr<Operation> again() override { return std::make_shared<LogSumExp>(stream(), fallback_); }
  Compute compute() const override {
    return [](const std::vector<array>& inputs, std::vector<array>& outputs) {
      const auto [threads, set] = team();
      const int64_t columns = inputs[0].shape(-1);
      log_sum_exp(*set, *threads, Floats(inputs[0]), inputs[0].size() / columns, columns, outputs[0].data<float>());
    };
  }
};

}  // namespace

array rms_norm(const array& x, const std::optional<array>& weight, float eps, mx::StreamOrDevice s) {
  const auto stream = cpu_stream(s);
  check_floats(x, "x", 1);
  check_weight(weight, x.shape(-1));
  Fallback fallback = [eps, stream](const std::vector<array>& in) {
    std::optional<array> scale;
    if (in.size() > 1) scale = in[1];
    return std::vector<array>{mx::fast::rms_norm(in[0], scale, eps, stream)};
  };
  std::vector<array> inputs{x};
  if (weight) inputs.push_back(*weight);
  return outputs_of(std::make_shared<RmsNorm>(stream, eps, fallback), inputs)[0];
}

std::vector<array> add_and_normalize(const array& x, const array& update, const array& weight, float eps,
                                     mx::StreamOrDevice s) {
  const auto stream = cpu_stream(s);
  check_floats(x, "x", 1);
  check_floats(update, "update", 1);
  if (x.shape() != update.shape()) refuse("x and update must have one shape; got " + text(x) + " and " + text(update));
  check_weight(weight, x.shape(-1));
  Fallback fallback = [eps, stream](const std::vector<array>& in) {
    const array sum = mx::add(in[0], in[1], stream);
    return std::vector<array>{sum, mx::fast::rms_norm(sum, in[2], eps, stream)};
  };
  return outputs_of(std::make_shared<AddAndNormalize>(stream, eps, fallback), {x, update, weight});
}

std::vector<array> normalize_and_rotate(const array& heads, const std::optional<array>& query_weight,
                                        const std::optional<array>& key_weight, const array& cosines, const array& sines,
                                        int num_query_heads, float eps, mx::StreamOrDevice s) {
  const auto stream = cpu_stream(s);
  check_floats(heads, "heads", 4);
  const int H = num_query_heads, N = heads.shape(2), D = heads.shape(3), L = heads.shape(1);
  if (H < 1 || N <= H || (N - H) % 2 || D % 2)
    refuse("heads must be (B, L, " + std::to_string(H) + " + 2 K, D), D even; got " + text(heads));
  check_weight(query_weight, D);
  check_weight(key_weight, D);
  if (query_weight.has_value() != key_weight.has_value()) refuse("queries and keys must both have a weight or none");
  for (const array* table : {&cosines, &sines}) {
    check_floats(*table, "cosines and sines", 2);
    if (table->shape() != mx::Shape{L, D / 2} && table->shape() != mx::Shape{heads.shape(0), L, D / 2})
      refuse("cosines and sines must be (L, D / 2) or (B, L, D / 2); got " + text(*table) + " for heads of " + text(heads));
  }
  if (cosines.shape() != sines.shape()) refuse("cosines and sines must have one shape");
  Fallback fallback = [H, eps, stream](const std::vector<array>& in) {
    const int K = (in[0].shape(2) - H) / 2;
    const auto parts = mx::split(mx::swapaxes(in[0], 1, 2, stream), mx::Shape{H, H + K}, 1, stream);
    std::vector<array> found;
    for (int i = 0; i < 2; ++i) {
      const array normed = in.size() > 3 ? mx::fast::rms_norm(parts[i], in[3 + i], eps, stream) : parts[i];
      const auto halves = mx::split(normed, 2, -1, stream);
      const auto table = [&](int n) { return in[n].ndim() > 2 ? mx::expand_dims(in[n], 1, stream) : in[n]; };
      const array c = table(1), s = table(2);
      const array first = mx::subtract(mx::multiply(halves[0], c, stream), mx::multiply(halves[1], s, stream), stream);
      const array second = mx::add(mx::multiply(halves[0], s, stream), mx::multiply(halves[1], c, stream), stream);
      found.push_back(mx::concatenate({first, second}, -1, stream));
    }
    found.push_back(parts[2]);
    return found;
  };
  std::vector<array> inputs{heads, cosines, sines};
  if (query_weight) inputs.insert(inputs.end(), {*query_weight, *key_weight});
  return outputs_of(std::make_shared<NormalizeAndRotate>(stream, H, eps, fallback), inputs);
}

array attention(const array& queries, const array& keys, const array& values, float scale, bool causal,
                const std::optional<array>& mask, mx::StreamOrDevice s) {
  const auto stream = cpu_stream(s);
  for (const array* a : {&queries, &keys, &values}) {
    check_floats(*a, "queries, keys and values", 4);
    if (a->ndim() != 4) refuse("queries, keys and values must have four axes; got " + text(*a));
  }
  const bool fits = keys.shape() == values.shape() && keys.shape(0) == queries.shape(0) && keys.shape(1) > 0 &&
                    keys.shape(3) == queries.shape(3) && queries.shape(1) % keys.shape(1) == 0 && keys.shape(2) > 0;
  if (!fits)
    refuse("queries (B, H, L, D), keys and values (B, K, S, D) do not fit together; got " + text(queries) + ", " +
           text(keys) + " and " + text(values));
  if (!(scale > 0)) refuse("scale must be positive");
  if (causal && mask) refuse("attention is causal or has a mask, not both");
  std::vector<array> inputs{queries, keys, values};
  if (mask) {
    if (mask->dtype() != mx::bool_) refuse("mask must be bool");
    inputs.push_back(mx::broadcast_to(
        *mask, {queries.shape(0), queries.shape(1), queries.shape(2), keys.shape(2)}, stream));
  }
  Fallback fallback = [scale, causal, stream](const std::vector<array>& in) {
    std::optional<array> allowed;
    if (in.size() > 3) allowed = in[3];
    const array read = mx::fast::scaled_dot_product_attention(in[0], in[1], in[2], scale, causal ? "causal" : "", allowed,
                                                              std::nullopt, false, stream);
    return std::vector<array>{mx::swapaxes(read, 1, 2, stream)};
  };
  const auto operation = std::make_shared<Attention>(stream, scale, causal, fallback);
  return mx::swapaxes(outputs_of(operation, inputs)[0], 1, 2, stream);
}

array gated(const array& x, mx::StreamOrDevice s) {
  const auto stream = cpu_stream(s);
  check_floats(x, "x", 1);
  if (x.shape(-1) % 2) refuse("the last axis of x must be even; got " + text(x));
  Fallback fallback = [stream](const std::vector<array>& in) {
    const auto halves = mx::split(in[0], 2, -1, stream);
    const array active = mx::multiply(halves[0], mx::sigmoid(halves[0], stream), stream);
    return std::vector<array>{mx::multiply(active, halves[1], stream)};
  };
  return outputs_of(std::make_shared<Gated>(stream, fallback), {x})[0];
}

array log_sum_exp(const array& x, mx::StreamOrDevice s) {
  const auto stream = cpu_stream(s);
  check_floats(x, "x", 1);
  if (x.shape(-1) == 0) refuse("x has an empty last axis; got " + text(x));
  Fallback fallback = [stream](const std::vector<array>& in) {
    return std::vector<array>{mx::logsumexp(in[0], -1, false, stream)};
  };
  return outputs_of(std::make_shared<LogSumExp>(stream, fallback), {x})[0];
}

}  // namespace openelm
