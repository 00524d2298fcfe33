// The shrinkage ops, once for every dispatch key: check the arguments, describe the work, run it.
//
// soft_threshold, group_shrink and sparse_group_shrink are one computation, L1 and then rows, with a stage left out;
// the forms with a trailing underscore do it for a ragged list, in place. A dispatch key brings `run` and calls
// `register_shrink<DeviceType::..., run>(m)`.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "shrink.h"

namespace compaware {

using torch::headeronly::DeviceType;
using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using MaybeTau = std::optional<Tensor>;
using Run = void (*)(const std::vector<Shrink>& work, int32_t device);

constexpr int64_t kSpan = 4096;  // elements, where rows do not matter

inline std::string text(IntHeaderOnlyArrayRef sizes) {
  std::ostringstream out;
  out << '[';
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "") << sizes[i];
  out << ']';
  return out.str();
}

inline std::optional<DType> dtype_of(const Tensor& W) {
  switch (W.scalar_type()) {
    case ScalarType::Double: return DType::f64;
    case ScalarType::Float: return DType::f32;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    default: return std::nullopt;
  }
}

inline const char* name_of(DeviceType device) { return device == DeviceType::CPU ? "the CPU" : "a CUDA device"; }

inline void check_weight(const Tensor& W, const std::string& name, DeviceType device) {
  STD_TORCH_CHECK(W.device().type() == device,
                  name, ": wanted a tensor on ", name_of(device), "; got one on ", name_of(W.device().type()));
  STD_TORCH_CHECK(dtype_of(W), name, ": wanted fp64, fp32, bf16 or fp16; got ", W.scalar_type());
  STD_TORCH_CHECK(W.dim() >= 2, name, ": wanted a matrix or a batch of them, [..., m, n]; got shape ", text(W.sizes()));
}

// What is written through must not have elements that share memory, as an expanded tensor has.
inline void check_writable(const Tensor& W, const std::string& name) {
  for (int64_t axis = 0; W.numel() && axis < W.dim(); ++axis)
    STD_TORCH_CHECK(W.size(axis) == 1 || W.stride(axis) != 0,
                    name, ": wanted a tensor that can be written through; got stride 0 along axis ", axis);
}

// `sizes`: one number, or one per matrix of W.
inline void check_tau(IntHeaderOnlyArrayRef sizes, const Tensor& W, const std::string& name) {
  const auto batch = W.sizes().slice(0, W.dim() - 2);
  int64_t count = 1;
  for (int64_t size : sizes) count *= size;
  STD_TORCH_CHECK(count == 1 || sizes == batch,
                  name, ": wanted one number, or shape ", text(batch), "; got shape ", text(sizes));
}

// Thresholds as the kernels read them: contiguous fp64, beside the weights. Every narrower float is exact in fp64, so
// the kernels round once to the compute dtype, whatever came.
inline MaybeTau to_fp64(const MaybeTau& tau, const Tensor& W) {
  if (!tau) return std::nullopt;
  return torch::stable::contiguous(torch::stable::to(*tau, ScalarType::Double, std::nullopt, W.device()));
}

// The thresholds of entry i of L.
inline Tau entry(const MaybeTau& tau, int64_t i, int64_t L) {
  if (!tau) return {nullptr, 0};
  const int64_t count = tau->numel() / L;
  return {tau->const_data_ptr<double>() + i * count, count > 1 ? 1 : 0};
}

inline Shrink describe(const Tensor& from, Tensor& to, Tau l1, Tau tau) {
  const int64_t n = from.size(-1), size = from.size(-2) * n;
  void* out = to.mutable_data_ptr();  // first: where `from` is `to`, this may move it (copy on write)
  return {*dtype_of(from), from.const_data_ptr(), out, from.numel() / size, size,
          tau.data ? n : std::min(size, kSpan), l1, tau, nullptr};
}

template <DeviceType device, Run run>
Tensor shrink(const Tensor& W, const MaybeTau& l1, const MaybeTau& tau) {
  check_weight(W, "W", device);
  if (l1) check_tau(l1->sizes(), W, "l1");
  if (tau) check_tau(tau->sizes(), W, "tau");
  const Tensor X = torch::stable::contiguous(W);
  Tensor P = W.is_contiguous() ? torch::stable::new_empty(W, W.sizes()) : X;  // X is a copy already
  if (W.numel() == 0) return P;
  const MaybeTau a = to_fp64(l1, W), t = to_fp64(tau, W);
  run({describe(X, P, entry(a, 0, 1), entry(t, 0, 1))}, W.get_device_index());
  return P;
}

using Extent = std::pair<const char*, const char*>;  // the bytes between the first and the last element

inline Extent extent(const Tensor& W) {
  int64_t last = 0;
  for (int64_t axis = 0; axis < W.dim(); ++axis) last += (W.size(axis) - 1) * W.stride(axis);
  const auto first = static_cast<const char*>(W.const_data_ptr());
  return {first, W.numel() ? first + (last + 1) * W.element_size() : first};
}

// A bias per row of W, in place.
inline void check_bias(const Tensor& bias, const Tensor& W, const std::string& name) {
  STD_TORCH_CHECK(bias.scalar_type() == W.scalar_type() && bias.device() == W.device() &&
                  bias.sizes() == W.sizes().slice(0, W.dim() - 1),
                  name, ": wanted one number per row, shape ", text(W.sizes().slice(0, W.dim() - 1)),
                  ", of the weight's dtype and on its device; got shape ", text(bias.sizes()));
  check_writable(bias, name);
}

// What the kernels work on: a weight itself, or a copy where it is not contiguous or shares memory with an earlier one
// (tied weights). Copied back in the order of the list, each result is that of the weight as it came.
inline std::vector<Tensor> workspace(const std::vector<Tensor>& weights) {
  std::vector<Tensor> out;
  std::vector<Extent> seen;
  for (const Tensor& W : weights) {
    const Extent mine = extent(W);
    const bool tied = std::any_of(seen.begin(), seen.end(), [&](const Extent& other) {
      return mine.first < other.second && other.first < mine.second;
    });
    out.push_back(tied ? torch::stable::clone(torch::stable::contiguous(W)) : torch::stable::contiguous(W));
    seen.push_back(mine);
  }
  return out;
}

// Copies in the order of the list: each result is that of the weight as it came.
inline void put_back(const std::vector<Tensor>& results, const std::vector<Tensor>& weights) {
  for (size_t i = 0; i < weights.size(); ++i) {
    Tensor W = weights[i];
    if (results[i].const_data_ptr() != W.const_data_ptr()) torch::stable::copy_(W, results[i]);
  }
}

// `biases`: none, or one number per row for every weight.
template <DeviceType device, Run run>
void shrink_(const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, const MaybeTau& l1,
             const MaybeTau& tau) {
  const int64_t L = static_cast<int64_t>(weights.size());
  for (const MaybeTau& t : {l1, tau})
    STD_TORCH_CHECK(!t || (t->dim() >= 1 && t->size(0) == L),
                    "thresholds: wanted one per weight, shape [", L, "]; got shape ", text(t->sizes()));
  for (int64_t i = 0; i < L; ++i) {
    const std::string name = "weights[" + std::to_string(i) + "]";
    check_weight(weights[i], name, device);
    check_writable(weights[i], name);
    STD_TORCH_CHECK(weights[i].get_device_index() == weights[0].get_device_index(), name,
                    ": wanted all weights on one device, ", weights[0].get_device_index(), "; got ",
                    weights[i].get_device_index());
    if (l1) check_tau(l1->sizes().slice(1), weights[i], "l1 of " + name);
    if (tau) check_tau(tau->sizes().slice(1), weights[i], "tau of " + name);
    if (!biases.empty()) check_bias(biases[i], weights[i], "biases[" + std::to_string(i) + "]");
  }
  if (L == 0) return;

  const MaybeTau a = to_fp64(l1, weights[0]), t = to_fp64(tau, weights[0]);
  std::vector<Tensor> X = workspace(weights), b = workspace(biases);
  std::vector<Shrink> work;
  for (int64_t i = 0; i < L; ++i) {
    const Tau l1_here = entry(a, i, L), tau_here = entry(t, i, L);
    void* const tails = b.empty() || !b[i].numel() ? nullptr : b[i].mutable_data_ptr();
    if (X[i].numel()) {
      work.push_back(describe(X[i], X[i], l1_here, tau_here));
      work.back().tails = tails;
    } else if (tails) {  // rows of nothing but a bias
      const int64_t m = b[i].size(-1);
      work.push_back({*dtype_of(X[i]), tails, tails, b[i].numel() / m, m, 1, l1_here, tau_here, nullptr});
    }
  }
  run(work, weights[0].get_device_index());
  put_back(X, weights);
  put_back(b, biases);
}

// The signatures of the op table (compaware_kernels/ops.py).
template <DeviceType device, Run run>
struct ShrinkOps {
  using T = const Tensor&;
  using List = const std::vector<Tensor>&;
  static Tensor soft_threshold(T W, T tau) { return shrink<device, run>(W, tau, std::nullopt); }
  static Tensor group_shrink(T W, T tau) { return shrink<device, run>(W, std::nullopt, tau); }
  static Tensor sparse_group_shrink(T W, T l1, T tau) { return shrink<device, run>(W, l1, tau); }
  static void soft_threshold_(List weights, T tau) { shrink_<device, run>(weights, {}, tau, std::nullopt); }
  static void group_shrink_(List weights, T tau) { shrink_<device, run>(weights, {}, std::nullopt, tau); }
  static void neuron_shrink_(List weights, List biases, T tau) {
    STD_TORCH_CHECK(biases.size() == weights.size(), "biases: wanted one per weight, ", weights.size(), "; got ",
                    biases.size());
    shrink_<device, run>(weights, biases, std::nullopt, tau);
  }
  static void sparse_group_shrink_(List weights, T l1, T tau) { shrink_<device, run>(weights, {}, l1, tau); }
};

template <DeviceType device, Run run>
void register_shrink(torch::stable::detail::StableLibrary& m) {
  using Ops = ShrinkOps<device, run>;
  m.impl("soft_threshold", TORCH_BOX(&Ops::soft_threshold));
  m.impl("group_shrink", TORCH_BOX(&Ops::group_shrink));
  m.impl("sparse_group_shrink", TORCH_BOX(&Ops::sparse_group_shrink));
  m.impl("soft_threshold_", TORCH_BOX(&Ops::soft_threshold_));
  m.impl("group_shrink_", TORCH_BOX(&Ops::group_shrink_));
  m.impl("neuron_shrink_", TORCH_BOX(&Ops::neuron_shrink_));
  m.impl("sparse_group_shrink_", TORCH_BOX(&Ops::sparse_group_shrink_));
}

}  // namespace compaware
