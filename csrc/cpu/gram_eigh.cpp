// gram_eigh on the CPU: a list of small matrices, each computed by one thread.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <tuple>
#include <vector>

#define CK_KERNEL "gram_eigh_kernel.h"
#include "each_isa.h"
#include "isa.h"

namespace compaware {
namespace {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
using Kernel = double (*)(const T*, int64_t, int64_t, int64_t, int64_t, double, double*, double*);

template <class T>
double run(Kernel<T> kernel, const Tensor& X, double floor, double* values, double* vectors) {
  const int64_t tall = X.size(0) >= X.size(1) ? 0 : 1, wide = 1 - tall;  // axes
  return kernel(X.const_data_ptr<T>(), X.size(tall), X.size(wide), X.stride(tall), X.stride(wide), floor, values,
                vectors);
}

// X: matrices [m, n] in fp32 or fp64, floor [L] fp64 -> eigenvalues [L, K], eigenvectors, flat, residuals [L], in fp64.
std::tuple<Tensor, Tensor, Tensor> gram_eigh(const std::vector<Tensor>& X, const Tensor& floor) {
  const int64_t L = static_cast<int64_t>(X.size());
  STD_TORCH_CHECK(floor.dim() == 1 && floor.size(0) == L && floor.scalar_type() == ScalarType::Double &&
                  floor.device().type() == DeviceType::CPU && floor.is_contiguous(),
                  "floor: wanted one fp64 number per matrix, on the CPU");
  std::vector<int64_t> order(L), start{0};
  int64_t K = 0;
  for (const Tensor& x : X) {
    STD_TORCH_CHECK(x.device().type() == DeviceType::CPU && x.dim() == 2, "X: wanted matrices [m, n] on the CPU");
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
                    "X: wanted fp64 or fp32; got ", x.scalar_type());
    const int64_t k = std::min(x.size(0), x.size(1));
    K = std::max(K, k), start.push_back(start.back() + k * k);
  }
  Tensor values = torch::stable::new_zeros(floor, {L, K}), vectors = torch::stable::new_zeros(floor, {start.back()}),
         residuals = torch::stable::new_zeros(floor, {L});
  const double* const above = floor.const_data_ptr<double>();
  double *const s = values.mutable_data_ptr<double>(), *const V = vectors.mutable_data_ptr<double>(),
         *const left = residuals.mutable_data_ptr<double>();
  std::iota(order.begin(), order.end(), 0);
  const auto work = [&](int64_t i) { return X[i].numel() * std::min(X[i].size(0), X[i].size(1)); };
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return work(i) > work(j); });
  const Kernel<float> single = CK_OF_ISA(gram_eigh<float>);  // may raise, which threads must not
  const Kernel<double> wide = CK_OF_ISA(gram_eigh<double>);
  std::atomic<int64_t> next{0};  // threads take the largest that is left
  torch::stable::parallel_for(0, L, 1, [&](int64_t begin, int64_t end) {
    for (int64_t at; begin < end && (at = next++) < L;) {
      const int64_t i = order[at];
      if (!X[i].numel()) continue;
      left[i] = X[i].scalar_type() == ScalarType::Float ? run(single, X[i], above[i], s + i * K, V + start[i])
                                                        : run(wide, X[i], above[i], s + i * K, V + start[i]);
    }
  });
  return {values, vectors, residuals};
}

}  // namespace
}  // namespace compaware

STABLE_TORCH_LIBRARY_IMPL(compaware, CPU, m) { m.impl("gram_eigh", TORCH_BOX(&compaware::gram_eigh)); }
