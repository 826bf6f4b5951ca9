#include "operation.h"

#include <cstring>
#include <mutex>
#include <stdexcept>

#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx/scheduler.h"
#include "mlx/transforms.h"
#include "operations.h"
#include "product.h"

namespace openelm {
namespace {

constexpr size_t kLarge = 1 << 20;  // bytes of outputs

std::mutex pool_mutex;
std::shared_ptr<Pool> pool;
const Kernels* kernels = nullptr;

std::vector<array> chosen(const std::vector<array>& all, const std::vector<int>& numbers) {
  std::vector<array> some;
  for (int number : numbers) some.push_back(all[number]);
  return some;
}

}  // namespace

void Operation::eval_gpu(const std::vector<array>&, std::vector<array>&) {
  throw std::runtime_error(std::string(name()) + " runs on the CPU only");
}

void Operation::eval_cpu(const std::vector<array>& inputs, std::vector<array>& outputs) {
  auto& encoder = mx::cpu::get_command_encoder(stream());
  std::vector<array> kept, results;
  size_t nbytes = 0;
  for (auto& output : outputs) {
    output.set_data(mx::allocator::malloc(output.nbytes()));
    encoder.set_output_array(output);
    results.push_back(array::unsafe_weak_copy(output));
    nbytes += output.nbytes();
  }
  if (nbytes == 0) return;
  for (const auto& input : inputs) {
    encoder.set_input_array(input);
    kept.push_back(array::unsafe_weak_copy(input));
  }
  encoder.dispatch([kept = std::move(kept), results = std::move(results), compute = compute()]() mutable {
    compute(kept, results);
  });
  // MLX allocates the outputs of a hundred operations ahead of their computation, but of ten tasks only.
  if (nbytes < kLarge) return;
  mx::scheduler::notify_new_task(stream());
  mx::scheduler::enqueue(stream(), [stream = stream()] { mx::scheduler::notify_task_completion(stream); });
}

std::vector<array> Operation::vjp(const std::vector<array>& primals, const std::vector<array>& cotangents,
                                  const std::vector<int>& argnums, const std::vector<array>&) {
  return mx::vjp(only(primals, argnums), chosen(primals, argnums), cotangents).second;
}

std::vector<array> Operation::jvp(const std::vector<array>& primals, const std::vector<array>& tangents,
                                  const std::vector<int>& argnums) {
  return mx::jvp(only(primals, argnums), chosen(primals, argnums), tangents).second;
}

Fallback Operation::only(const std::vector<array>& all, const std::vector<int>& numbers) const {
  return [=, fallback = fallback_](const std::vector<array>& some) {
    auto inputs = all;
    for (size_t i = 0; i < numbers.size(); ++i) inputs[numbers[i]] = some[i];
    return fallback(inputs);
  };
}

std::pair<std::vector<array>, std::vector<int>> ByRow::vmap(const std::vector<array>& inputs,
                                                           const std::vector<int>& axes) {
  if (std::any_of(axes.begin() + 1, axes.end(), [](int axis) { return axis >= 0; }))
    throw std::invalid_argument(std::string(name()) + " can be vectorized over its first input only");
  auto moved = inputs;
  moved[0] = mx::moveaxis(inputs[0], axes[0], 0, stream());
  return {outputs_of(again(), moved), {0}};
}

std::vector<array> outputs_of(const std::shared_ptr<Operation>& operation, const std::vector<array>& inputs) {
  auto shapes = operation->output_shapes(inputs);
  const std::vector<mx::Dtype> types(shapes.size(), mx::float32);
  return array::make_arrays(std::move(shapes), types, operation, inputs);
}

void refuse(const std::string& message) { throw std::invalid_argument(message); }

std::string text(const array& a) {
  std::string shape;
  for (auto size : a.shape()) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
  return "(" + shape + ")";
}

mx::Stream cpu_stream(mx::StreamOrDevice s) {
  const auto stream = mx::to_stream(s, mx::Device(mx::Device::cpu));
  if (stream.device != mx::Device::cpu) refuse("these operations run on the CPU; got a stream of another device");
  return stream;
}

const uint8_t* in_order(const array& a, std::vector<uint8_t>& copy) {
  const auto* source = a.data<uint8_t>();
  if (a.flags().row_contiguous) return source;
  const size_t width = a.itemsize();
  copy.resize(a.size() * width);
  std::vector<int64_t> index(a.ndim());
  for (size_t i = 0; i < a.size(); ++i) {
    int64_t at = 0;
    for (int d = 0; d < static_cast<int>(a.ndim()); ++d) at += index[d] * a.strides(d);
    std::memcpy(copy.data() + i * width, source + at * static_cast<int64_t>(width), width);
    for (int d = static_cast<int>(a.ndim()) - 1; d >= 0 && ++index[d] == a.shape(d); --d) index[d] = 0;
  }
  return copy.data();
}

std::pair<std::shared_ptr<Pool>, const Kernels*> team() {
  std::lock_guard<std::mutex> lock(pool_mutex);
  if (!pool) pool = std::make_shared<Pool>(usable_cores());
  if (!kernels) kernels = kernels_for();
  return {pool, kernels};
}

int threads() { return team().first->threads(); }

void set_threads(int count) {
  if (count < 1 || count > 1024) refuse("the number of threads must be from 1 to 1,024; got " + std::to_string(count));
  auto fresh = std::make_shared<Pool>(count);
  std::lock_guard<std::mutex> lock(pool_mutex);
  std::swap(pool, fresh);
}

std::string instructions() { return team().second->name; }

void set_instructions(const std::string& name) {
  const Kernels* found = kernels_for(name == "auto" ? nullptr : name.c_str());
  if (!found) refuse("this processor or build has no kernels named '" + name + "' (choose from auto, avx512, avx2, neon, plain)");
  std::lock_guard<std::mutex> lock(pool_mutex);
  kernels = found;
}

}  // namespace openelm
