#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "operations.h"
#include "product.h"

namespace nb = nanobind;
using namespace nb::literals;
namespace mx = mlx::core;

NB_MODULE(_kernels, m) {
  m.def(
      "quantized_matmul",
      [](const mx::array& x, const mx::array& w, const mx::array& scales, const std::optional<mx::array>& biases,
         int group_size, int bits, const std::string& mode, const std::string& activations, mx::StreamOrDevice stream) {
        return openelm::quantized_matmul(x, w, scales, biases, {group_size, bits, mode, activations}, stream);
      },
      "x"_a, "w"_a, "scales"_a, "biases"_a = nb::none(), "group_size"_a = 64, "bits"_a = 4, "mode"_a = "affine",
      nb::kw_only(), "activations"_a = "float32", "stream"_a = nb::none());
  m.def(
      "quantized_rows",
      [](const mx::array& rows, const mx::array& w, const mx::array& scales, const std::optional<mx::array>& biases,
         int group_size, int bits, const std::string& mode, mx::StreamOrDevice stream) {
        return openelm::quantized_rows(rows, w, scales, biases, {group_size, bits, mode}, stream);
      },
      "rows"_a, "w"_a, "scales"_a, "biases"_a = nb::none(), "group_size"_a = 64, "bits"_a = 4, "mode"_a = "affine",
      nb::kw_only(), "stream"_a = nb::none());
  m.def("matmul_transposed", &openelm::matmul_transposed, "x"_a, "w"_a, nb::kw_only(), "stream"_a = nb::none());
  m.def("rms_norm", &openelm::rms_norm, "x"_a, "weight"_a.none(), "eps"_a, nb::kw_only(), "stream"_a = nb::none());
  m.def("add_and_normalize", &openelm::add_and_normalize, "x"_a, "update"_a, "weight"_a, "eps"_a, nb::kw_only(),
        "stream"_a = nb::none());
  m.def("normalize_and_rotate", &openelm::normalize_and_rotate, "heads"_a, "query_weight"_a.none(), "key_weight"_a.none(),
        "cosines"_a, "sines"_a, "num_query_heads"_a, "eps"_a, nb::kw_only(), "stream"_a = nb::none());
  m.def("attention", &openelm::attention, "queries"_a, "keys"_a, "values"_a, "scale"_a, "causal"_a = false,
        "mask"_a = nb::none(), nb::kw_only(), "stream"_a = nb::none());
  m.def("gated", &openelm::gated, "x"_a, nb::kw_only(), "stream"_a = nb::none());
  m.def("log_sum_exp", &openelm::log_sum_exp, "x"_a, nb::kw_only(), "stream"_a = nb::none());
  m.def("threads", &openelm::threads);
  m.def("set_threads", &openelm::set_threads, "count"_a);
  m.def("instructions", &openelm::instructions);
  m.def("set_instructions", &openelm::set_instructions, "name"_a);
  m.attr("largest_batch") = openelm::kFew;
}
