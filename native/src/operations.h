// The operations of this package, as Python calls them.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "mlx/array.h"
#include "mlx/utils.h"

namespace openelm {

namespace mx = mlx::core;

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

// (..., M), and a weight (M,) or none.
mx::array rms_norm(const mx::array& x, const std::optional<mx::array>& weight, float eps, mx::StreamOrDevice);
// x + update, and its norm.
std::vector<mx::array> add_and_normalize(const mx::array& x, const mx::array& update, const mx::array& weight, float eps,
                                         mx::StreamOrDevice);
// Heads (B, L, H + 2K, D) to queries (B, H, L, D), keys and values (B, K, L, D): norms, then rotation by cosines and sines
// (L, D / 2) or (B, L, D / 2).
std::vector<mx::array> normalize_and_rotate(const mx::array& heads, const std::optional<mx::array>& query_weight,
                                            const std::optional<mx::array>& key_weight, const mx::array& cosines,
                                            const mx::array& sines, int num_query_heads, float eps, mx::StreamOrDevice);
// Attention (B, H, L, D) over keys and values (B, K, S, D); mask: bool, broadcast to (B, H, L, S).
mx::array attention(const mx::array& queries, const mx::array& keys, const mx::array& values, float scale, bool causal,
                    const std::optional<mx::array>& mask, mx::StreamOrDevice);
// A gate and an input side by side (..., 2F) to silu(gate) * input (..., F).
mx::array gated(const mx::array& x, mx::StreamOrDevice);
// (..., V) to (...).
mx::array log_sum_exp(const mx::array& x, mx::StreamOrDevice);

int threads();
void set_threads(int count);
std::string instructions();
void set_instructions(const std::string& name);

}  // namespace openelm
