// The L1 and group-lasso ops, for every dispatch key: check the arguments, describe the work, run the one kernel.
//
// All of them are one computation, soft thresholding of elements and then group shrinkage of rows; a stage without a
// threshold is skipped. Ops with a trailing underscore shrink a ragged list in place. A dispatch key provides `run` and
// calls `register_shrink<DeviceType::..., run>(m)`.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "shrink.h"
#include "tensor.h"

namespace compaware {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;

using MaybeTau = std::optional<Tensor>;
using Run = void (*)(const std::vector<Shrink>& work, int32_t device);

constexpr int64_t kSpan = 4096;  // elements shrunk at a time without the group stage

struct Thresholds {
  MaybeTau l1, tau;  // for elements, for rows; none: the stage is skipped
};

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

// A tensor that is written in place must not have elements that share memory, as an expanded one has.
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

// Thresholds as the kernels read them: contiguous fp64 on the device of W. Narrower dtypes are exact in fp64, so the
// kernels round once, to the dtype they compute in.
inline Thresholds to_fp64(const Thresholds& given, const Tensor& W) {
  const auto convert = [&](const MaybeTau& tau) -> MaybeTau {
    if (!tau) return std::nullopt;
    return torch::stable::contiguous(torch::stable::to(*tau, ScalarType::Double, std::nullopt, W.device()));
  };
  return {convert(given.l1), convert(given.tau)};
}

// The thresholds of entry i of L.
inline Tau entry(const MaybeTau& tau, int64_t i, int64_t L) {
  if (!tau) return {nullptr, 0};
  const int64_t count = tau->numel() / L;
  return {tau->const_data_ptr<double>() + i * count, count > 1 ? 1 : 0};
}

// Entry i of L: P becomes W, shrunk. `bias`: null, or one number per row, shrunk in place.
inline Shrink describe(const Tensor& W, Tensor& P, const Thresholds& t, int64_t i, int64_t L, void* bias) {
  const int64_t n = W.size(-1), size = W.size(-2) * n, span = t.tau ? n : std::min(size, kSpan);
  void* out = P.mutable_data_ptr();  // before the const pointer: if W is P, copy on write may move the data here
  return {*dtype_of(W), W.const_data_ptr(), out, W.numel() / size, size, span, entry(t.l1, i, L), entry(t.tau, i, L),
          bias};
}

template <DeviceType device, Run run>
Tensor shrink(const Tensor& W, const Thresholds& given) {
  check_weight(W, "W", device);
  if (given.l1) check_tau(given.l1->sizes(), W, "l1");
  if (given.tau) check_tau(given.tau->sizes(), W, "tau");
  const Tensor X = torch::stable::contiguous(W);
  Tensor P = W.is_contiguous() ? torch::stable::new_empty(W, W.sizes()) : X;  // X is a copy already
  if (W.numel() == 0) return P;
  const Thresholds t = to_fp64(given, W);
  run({describe(X, P, t, 0, 1, nullptr)}, W.get_device_index());
  return P;
}

// A bias per row of W, shrunk in place.
inline void check_bias(const Tensor& bias, const Tensor& W, const std::string& name) {
  STD_TORCH_CHECK(bias.scalar_type() == W.scalar_type() && bias.device() == W.device() &&
                  bias.sizes() == W.sizes().slice(0, W.dim() - 1),
                  name, ": wanted one number per row, shape ", text(W.sizes().slice(0, W.dim() - 1)),
                  ", of the weight's dtype and on its device; got shape ", text(bias.sizes()));
  check_writable(bias, name);
}

inline void check_list(const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, const Thresholds& given,
                       DeviceType device) {
  const int64_t L = static_cast<int64_t>(weights.size());
  for (const MaybeTau& t : {given.l1, given.tau})
    STD_TORCH_CHECK(!t || (t->dim() >= 1 && t->size(0) == L),
                    "thresholds: wanted one per weight, shape [", L, "]; got shape ", text(t->sizes()));
  for (int64_t i = 0; i < L; ++i) {
    const std::string name = "weights[" + std::to_string(i) + "]";
    check_weight(weights[i], name, device);
    check_writable(weights[i], name);
    STD_TORCH_CHECK(weights[i].get_device_index() == weights[0].get_device_index(), name,
                    ": wanted all weights on one device, ", weights[0].get_device_index(), "; got ",
                    weights[i].get_device_index());
    if (given.l1) check_tau(given.l1->sizes().slice(1), weights[i], "l1 of " + name);
    if (given.tau) check_tau(given.tau->sizes().slice(1), weights[i], "tau of " + name);
    if (!biases.empty()) check_bias(biases[i], weights[i], "biases[" + std::to_string(i) + "]");
  }
}

// The tensors that the kernels write: the weight itself, or a copy if it is not contiguous or shares memory with an
// earlier one (tied weights).
inline std::vector<Tensor> workspace(const std::vector<Tensor>& weights) {
  std::vector<Tensor> out;
  std::vector<Extent> seen;
  for (const Tensor& W : weights) {
    const Extent mine = extent(W);
    const bool tied = std::any_of(seen.begin(), seen.end(), [&](const Extent& other) { return overlap(mine, other); });
    out.push_back(tied ? torch::stable::clone(torch::stable::contiguous(W)) : torch::stable::contiguous(W));
    seen.push_back(mine);
  }
  return out;
}

// Copies results back in the order of the list; of tied weights the last one wins.
inline void write_back(const std::vector<Tensor>& results, const std::vector<Tensor>& weights) {
  for (size_t i = 0; i < weights.size(); ++i) {
    Tensor W = weights[i];
    if (results[i].const_data_ptr() != W.const_data_ptr()) torch::stable::copy_(W, results[i]);
  }
}

// `biases`: none, or one number per row for every weight; each belongs to the group of its row.
template <DeviceType device, Run run>
void shrink_(const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, const Thresholds& given) {
  check_list(weights, biases, given, device);
  if (weights.empty()) return;
  const int64_t L = static_cast<int64_t>(weights.size());
  const Thresholds t = to_fp64(given, weights[0]);
  std::vector<Tensor> X = workspace(weights), b = workspace(biases);
  std::vector<Shrink> work;
  for (int64_t i = 0; i < L; ++i) {
    void* const bias = b.empty() || !b[i].numel() ? nullptr : b[i].mutable_data_ptr();
    if (X[i].numel()) {
      work.push_back(describe(X[i], X[i], t, i, L, bias));
    } else if (bias) {  // rows without elements: the group is the bias alone
      const int64_t m = b[i].size(-1), matrices = b[i].numel() / m;
      work.push_back({*dtype_of(X[i]), bias, bias, matrices, m, 1, entry(t.l1, i, L), entry(t.tau, i, L), nullptr});
    }
  }
  run(work, weights[0].get_device_index());
  write_back(X, weights);
  write_back(b, biases);
}

// The ops with the signatures of their schemas: all of them the two functions above.
template <DeviceType device, Run run>
struct ShrinkOps {
  using T = const Tensor&;
  using List = const std::vector<Tensor>&;
  static Tensor soft_threshold(T W, T tau) { return shrink<device, run>(W, {tau, {}}); }
  static Tensor group_shrink(T W, T tau) { return shrink<device, run>(W, {{}, tau}); }
  static Tensor sparse_group_shrink(T W, T l1, T tau) { return shrink<device, run>(W, {l1, tau}); }
  static void soft_threshold_(List weights, T tau) { shrink_<device, run>(weights, {}, {tau, {}}); }
  static void group_shrink_(List weights, T tau) { shrink_<device, run>(weights, {}, {{}, tau}); }
  static void neuron_shrink_(List weights, List biases, T tau) {
    STD_TORCH_CHECK(biases.size() == weights.size(), "biases: wanted one per weight, ", weights.size(), "; got ",
                    biases.size());
    shrink_<device, run>(weights, biases, {{}, tau});
  }
  static void sparse_group_shrink_(List weights, T l1, T tau) { shrink_<device, run>(weights, {}, {l1, tau}); }
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
