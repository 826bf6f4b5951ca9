#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "mlx/array.h"
#include "mlx/utils.h"
#include "product.h"

namespace openelm {

namespace mx = mlx::core;
using Fallback = std::function<std::vector<mx::array>(const std::vector<mx::array>&)>;

struct Packing {
  int group_size;
  int bits;
  std::string mode;
  std::string activations = "float32";
};

mx::array quantized_matmul(const mx::array& x, const mx::array& w, const mx::array& scales,
                           const std::optional<mx::array>& biases, const Packing&, mx::StreamOrDevice);
mx::array matmul_transposed(const mx::array& x, const mx::array& w, mx::StreamOrDevice);
mx::array quantized_rows(const mx::array& numbers, const mx::array& w, const mx::array& scales,
                         const std::optional<mx::array>& biases, const Packing&, mx::StreamOrDevice);
mx::array rms_norm(const mx::array& x, const std::optional<mx::array>& weight, float eps, mx::StreamOrDevice);

int threads();
void set_threads(int count);
std::string instructions();
void set_instructions(const std::string& name);

}  // namespace openelm
