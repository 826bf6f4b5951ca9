// What all operations share: how MLX calls them, and their gradients.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"
#include "mlx/array.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"
#include "pool.h"

namespace openelm {

namespace mx = mlx::core;
using mx::array;

// The same in MLX's own operations, for gradients.
using Fallback = std::function<std::vector<array>(const std::vector<array>&)>;

class Operation : public mx::Primitive {
 public:
  Operation(mx::Stream stream, Fallback fallback) : Primitive(stream), fallback_(std::move(fallback)) {}

  void eval_gpu(const std::vector<array>&, std::vector<array>&) override;
  void eval_cpu(const std::vector<array>& inputs, std::vector<array>& outputs) override;
  std::vector<array> vjp(const std::vector<array>& primals, const std::vector<array>& cotangents,
                         const std::vector<int>& argnums, const std::vector<array>&) override;
  std::vector<array> jvp(const std::vector<array>& primals, const std::vector<array>& tangents,
                         const std::vector<int>& argnums) override;

 protected:
  // Fills the outputs, on a thread of MLX; it must hold all that it needs, since the operation may be gone by then.
  using Compute = std::function<void(const std::vector<array>& inputs, std::vector<array>& outputs)>;
  virtual Compute compute() const = 0;

  Fallback fallback_;

 private:
  // MLX's own operation as a function of some of its inputs.
  Fallback only(const std::vector<array>& all, const std::vector<int>& numbers) const;
};

// An operation on each row of its first input.
class ByRow : public Operation {
 public:
  using Operation::Operation;

  std::pair<std::vector<array>, std::vector<int>> vmap(const std::vector<array>& inputs,
                                                       const std::vector<int>& axes) override;

 protected:
  virtual std::shared_ptr<Operation> again() = 0;
};

// The outputs, all float32, of an operation on some inputs.
std::vector<array> outputs_of(const std::shared_ptr<Operation>& operation, const std::vector<array>& inputs);

[[noreturn]] void refuse(const std::string& message);  // std::invalid_argument, in Python ValueError

std::string text(const array&);  // its shape

mx::Stream cpu_stream(mx::StreamOrDevice);

// The values of an array in the order of its indices: where they are, or copied to `copy`, as views may need.
const uint8_t* in_order(const array&, std::vector<uint8_t>& copy);

// As `in_order`, of floats, for as long as this lives.
class Floats {
 public:
  explicit Floats(const array& a) : data_(reinterpret_cast<const float*>(in_order(a, copy_))) {}
  Floats(const Floats&) = delete;
  Floats& operator=(const Floats&) = delete;
  operator const float*() const { return data_; }

 private:
  std::vector<uint8_t> copy_;
  const float* data_;
};

// The threads and the kernels in use, kept alive while a call runs.
std::pair<std::shared_ptr<Pool>, const Kernels*> team();

}  // namespace openelm
