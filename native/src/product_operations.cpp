// The products as operations of MLX: lazy, compiled, differentiable, on the CPU.
#include <cstring>
#include <stdexcept>

#include "mlx/mlx.h"
#include "operation.h"
#include "operations.h"
#include "product.h"

namespace openelm {
namespace {

Scales scale_type(const std::string& mode, mx::Dtype type) {
  if (mode == "nvfp4") return Scales::e4m3;
  if (mode != "affine") return Scales::e8m0;
  if (type == mx::float32) return Scales::float32;
  return type == mx::float16 ? Scales::float16 : Scales::bfloat16;
}

Format checked_format(const std::string& mode, int group, int bits) {
  if (mode == "affine") {
    if (bits < 2 || bits > 8 || bits == 7) refuse("bits must be one of 2, 3, 4, 5, 6, 8; got " + std::to_string(bits));
    if (group != 32 && group != 64 && group != 128)
      refuse("group_size must be one of 32, 64, 128; got " + std::to_string(group));
    return {Values::affine, Scales::float32, bits, group};
  }
  const bool known = mode == "mxfp4" || mode == "mxfp8" || mode == "nvfp4";
  if (!known) refuse("unknown mode '" + mode + "' (choose from affine, mxfp4, mxfp8, nvfp4)");
  const int width = mode == "mxfp8" ? 8 : 4, size = mode == "nvfp4" ? 16 : 32;
  if (bits != width || group != size)
    refuse(mode + " needs " + std::to_string(width) + " bits and groups of " + std::to_string(size) + "; got " +
           std::to_string(bits) + " and " + std::to_string(group));
  return {width == 8 ? Values::fp8 : Values::fp4, Scales::e8m0, bits, group};
}

// Checks the parts of a matrix and gives its format and its columns.
std::pair<Format, int> checked_matrix(const array& w, const array& scales, const std::optional<array>& biases,
                                      const Packing& packing) {
  Format format = checked_format(packing.mode, packing.group_size, packing.bits);
  if (w.ndim() != 2 || w.dtype() != mx::uint32) refuse("w must be a matrix of uint32; got shape " + text(w));
  const bool affine = format.values == Values::affine;
  if (affine != biases.has_value()) refuse(packing.mode + (affine ? " needs biases" : " has no biases"));
  const int64_t bits = static_cast<int64_t>(w.shape(1)) * 32;
  const int columns = static_cast<int>(bits / format.bits);
  if (bits % format.bits || columns % format.group || scales.shape() != mx::Shape{w.shape(0), columns / format.group})
    refuse("w of shape " + text(w) + " and scales of shape " + text(scales) + " do not fit together with " +
           std::to_string(format.bits) + " bits in groups of " + std::to_string(format.group));
  const auto type = scales.dtype();
  if (affine ? type != mx::float32 && type != mx::float16 && type != mx::bfloat16 : type != mx::uint8)
    refuse(std::string("scales must be ") + (affine ? "float32, float16 or bfloat16" : "uint8"));
  if (affine && (biases->dtype() != type || biases->shape() != scales.shape()))
    refuse("biases must have the shape and type of the scales; got shape " + text(*biases));
  format.scales = scale_type(packing.mode, type);
  return {format, columns};
}

// The arrays of a call, with all values in order.
struct Inputs {
  std::vector<std::vector<uint8_t>> copies;
  const uint8_t* first;
  Matrix matrix;

  Inputs(const Format& format, const std::vector<array>& inputs) : copies(inputs.size()) {
    first = in_order(inputs[0], copies[0]);
    matrix.format = format;
    matrix.words = in_order(inputs[1], copies[1]);
    matrix.rows = inputs[1].shape(0);
    matrix.columns = static_cast<int64_t>(inputs[1].shape(1)) * 32 / format.bits;
    if (inputs.size() > 2) matrix.scales = in_order(inputs[2], copies[2]);
    if (inputs.size() > 3) matrix.biases = in_order(inputs[3], copies[3]);
  }
};

class WithMatrix : public ByRow {
 public:
  WithMatrix(mx::Stream stream, Format format, Fallback fallback)
      : ByRow(stream, std::move(fallback)), format_(format) {}

  bool is_equivalent(const Primitive& other) const override {
    return static_cast<const WithMatrix&>(other).format_ == format_;
  }

 protected:
  Format format_;
};

class TakeRows : public WithMatrix {
 public:
  using WithMatrix::WithMatrix;
  const char* name() const override { return "OpenELMTakeRows"; }
  std::vector<mx::Shape> output_shapes(const std::vector<array>& inputs) override {
    auto shape = inputs[0].shape();
    shape.push_back(static_cast<int>(static_cast<int64_t>(inputs[1].shape(1)) * 32 / format_.bits));
    return {shape};
  }
 protected:
  std::shared_ptr<Operation> again() override { return std::make_shared<TakeRows>(stream(), format_, fallback_); }
  Compute compute() const override {
    return [format = format_](const std::vector<array>& inputs, std::vector<array>& outputs) {
      const auto [threads, set] = team();
      const Inputs given(format, inputs);
      const Matrix& matrix = given.matrix;
      std::vector<int32_t> numbers(inputs[0].size());
      std::memcpy(numbers.data(), given.first, 4 * numbers.size());
      for (auto& number : numbers) {  // as MLX does: negative numbers count from the end, and the rest is kept in range
        if (number < 0) number += static_cast<int32_t>(matrix.rows);
        number = std::clamp<int32_t>(number, 0, static_cast<int32_t>(matrix.rows) - 1);
      }
      take_rows(*set, *threads, matrix, numbers.data(), static_cast<int64_t>(numbers.size()), outputs[0].data<float>());
    };
  }
};

constexpr int64_t kUnpacked = 3 << 18;  // weights unpacked at once for a gradient; a whole matrix may be large

// The gradient of the inputs of a product: the cotangent times the matrix, unpacked some rows at a time.
array input_gradient(const std::vector<array>& primals, const array& cotangent, const Format& format,
                     mx::Stream stream) {
  const int rows = primals[1].shape(0), columns = primals[0].shape(-1);
  const int share = static_cast<int>(std::max<int64_t>(1, kUnpacked / columns));
  std::optional<array> total;
  for (int row = 0; row < rows; row += share) {
    const int end = std::min(rows, row + share);
    auto inputs = primals;
    inputs[0] = mx::arange(row, end, mx::int32, stream);
    // Depends on the sum so far: otherwise all parts might be unpacked before the first is used.
    inputs[1] = mx::depends({inputs[1]}, {mx::stop_gradient(total ? *total : cotangent, stream)})[0];
    const array part(mx::Shape{end - row, columns}, mx::float32, std::make_shared<TakeRows>(stream, format, nullptr),
                     inputs);
    auto from = mx::Shape(cotangent.ndim(), 0), to = cotangent.shape();
    from.back() = row;
    to.back() = end;
    const array product = mx::matmul(mx::slice(cotangent, from, to, stream), part, stream);
    total = total ? mx::add(*total, product, stream) : product;
  }
  return *total;
}

class Product : public WithMatrix {
 public:
  using WithMatrix::WithMatrix;
  const char* name() const override { return "OpenELMProduct"; }

  std::vector<array> vjp(const std::vector<array>& primals, const std::vector<array>& cotangents,
                         const std::vector<int>& argnums, const std::vector<array>& outputs) override {
    if (format_.values == Values::float32 || argnums != std::vector<int>{0} || primals[1].shape(0) == 0)
      return Operation::vjp(primals, cotangents, argnums, outputs);
    return {input_gradient(primals, cotangents[0], format_, stream())};
  }

  std::vector<mx::Shape> output_shapes(const std::vector<array>& inputs) override {
    auto shape = inputs[0].shape();
    shape.back() = inputs[1].shape(0);
    return {shape};
  }

 protected:
  std::shared_ptr<Operation> again() override { return std::make_shared<Product>(stream(), format_, fallback_); }
  Compute compute() const override {
    return [format = format_](const std::vector<array>& inputs, std::vector<array>& outputs) {
      const auto [threads, set] = team();
      const Inputs given(format, inputs);
      const int64_t count = static_cast<int64_t>(inputs[0].size()) / given.matrix.columns;
      product(*set, *threads, given.matrix, reinterpret_cast<const float*>(given.first), count, outputs[0].data<float>());
    };
  }
};

void check_input(const array& x, int columns) {
  if (x.dtype() != mx::float32) refuse("x must be float32");
  if (x.ndim() < 1 || x.shape(-1) != columns)
    refuse("x must have shape (..., " + std::to_string(columns) + "); got " + text(x));
}

}  // namespace

array quantized_matmul(const array& x, const array& w, const array& scales, const std::optional<array>& biases,
                       const Packing& packing, mx::StreamOrDevice s) {
  const auto stream = cpu_stream(s);
  auto [format, columns] = checked_matrix(w, scales, biases, packing);
  check_input(x, columns);
  if (packing.activations != "float32" && packing.activations != "int8")
    refuse("activations must be float32 or int8; got '" + packing.activations + "'");
  format.int8_inputs = packing.activations == "int8";
  std::vector<array> inputs{x, w, scales};
  if (biases) inputs.push_back(*biases);
  Fallback fallback = [packing, stream](const std::vector<array>& in) {
    std::optional<array> offsets;
    if (in.size() > 3) offsets = in[3];
    const auto& p = packing;
    return std::vector<array>{
        mx::quantized_matmul(in[0], in[1], in[2], offsets, true, p.group_size, p.bits, p.mode, stream)};
  };
  auto shape = x.shape();
  shape.back() = w.shape(0);
  return array(shape, mx::float32, std::make_shared<Product>(stream, format, fallback), std::move(inputs));
}

array matmul_transposed(const array& x, const array& w, mx::StreamOrDevice s) {
  const auto stream = cpu_stream(s);
  if (w.ndim() != 2 || w.dtype() != mx::float32) refuse("w must be a matrix of float32; got shape " + text(w));
  check_input(x, w.shape(1));
  Fallback fallback = [stream](const std::vector<array>& in) {
    return std::vector<array>{mx::matmul(in[0], mx::transpose(in[1], stream), stream)};
  };
  auto shape = x.shape();
  shape.back() = w.shape(0);
  return array(shape, mx::float32, std::make_shared<Product>(stream, Format{}, fallback),
               {x, w});
}

array quantized_rows(const array& numbers, const array& w, const array& scales, const std::optional<array>& biases,
                     const Packing& packing, mx::StreamOrDevice s) {
  const auto stream = cpu_stream(s);
  const auto [format, columns] = checked_matrix(w, scales, biases, packing);
  if (!mx::issubdtype(numbers.dtype(), mx::integer)) refuse("the numbers of rows must be integers");
  if (w.shape(0) == 0) refuse("w has no rows to take");
  std::vector<array> inputs{mx::astype(numbers, mx::int32, stream), w, scales};
  if (biases) inputs.push_back(*biases);
  Fallback fallback = [packing, stream](const std::vector<array>& in) {
    std::vector<array> taken;
    for (size_t i = 1; i < in.size(); ++i) taken.push_back(mx::take(in[i], in[0], 0, stream));
    std::optional<array> offsets;
    if (taken.size() > 2) offsets = taken[2];
    const auto& p = packing;
    return std::vector<array>{mx::dequantize(taken[0], taken[1], offsets, p.group_size, p.bits, p.mode, std::nullopt,
                                             mx::float32, stream)};
  };
  auto shape = numbers.shape();
  shape.push_back(columns);
  return array(shape, mx::float32, std::make_shared<TakeRows>(stream, format, fallback), std::move(inputs));
}

}  // namespace openelm
