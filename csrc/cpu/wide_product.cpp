// Products and norms in fp64 on the CPU: wide_product, a matrix times a few columns, and sum_of_squares.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "narrow_product.h"

namespace compaware {
namespace {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
void run(const Tensor& X, double* Y, int64_t width, double* out) {
  const Rows<double> from{Y, width, width}, to{out, width, width};
  narrow_product(X.const_data_ptr<T>(), X.stride(0), X.stride(1), from, X.size(0), X.size(1), to);
}

bool is_single(const Tensor& A, const char* op, const char* name) {
  const auto dtype = A.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  op, ": wanted ", name, " in fp32 or fp64; got ", dtype);
  return dtype == ScalarType::Float;
}

// X [m, n], Y [n, p], each in fp32 or fp64 and of any strides -> [m, p] in fp64.
Tensor wide_product(const Tensor& X, const Tensor& Y) {
  STD_TORCH_CHECK(X.dim() == 2 && Y.dim() == 2 && X.size(1) == Y.size(0),
                  "wide_product: wanted X [m, n] and Y [n, p]; got axes ", X.dim(), " and ", Y.dim());
  const bool single_X = is_single(X, "wide_product", "X"), single_Y = is_single(Y, "wide_product", "Y");
  const int64_t m = X.size(0), n = X.size(1), p = Y.size(1), width = padded<double>(p);
  Tensor out = torch::stable::new_zeros(Y, {m, width}, ScalarType::Double);
  if (m && n && p) {
    Tensor wide = torch::stable::new_empty(Y, {n, width}, ScalarType::Double);
    double* y = wide.mutable_data_ptr<double>();
    single_Y ? copy_padded<float>(Y, y, width) : copy_padded<double>(Y, y, width);
    double* o = out.mutable_data_ptr<double>();
    single_X ? run<float>(X, y, width, o) : run<double>(X, y, width, o);
  }
  return p == width ? out : torch::stable::contiguous(torch::stable::narrow(out, 1, 0, p));
}

constexpr int64_t kBlock = 1 << 16;  // elements of one partial sum, whatever the number of threads

template <class T>
double square(const T* x, int64_t n) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  std::vector<double> sums(blocks);
  const auto kernel = CK_OF_ISA(square<T>);
  torch::stable::parallel_for(0, blocks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) sums[b] = kernel(x + b * kBlock, std::min(kBlock, n - b * kBlock));
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

// The sum of squares of W, contiguous, in fp32 or fp64 -> a scalar in fp64.
Tensor sum_of_squares(const Tensor& W) {
  const bool single = is_single(W, "sum_of_squares", "W");
  STD_TORCH_CHECK(W.is_contiguous(), "sum_of_squares: wanted a contiguous W");
  const int64_t n = W.numel();
  Tensor out = torch::stable::new_empty(W, {}, ScalarType::Double);
  *out.mutable_data_ptr<double>() = single ? square(W.const_data_ptr<float>(), n) : square(W.const_data_ptr<double>(), n);
  return out;
}

}  // namespace
}  // namespace compaware

STABLE_TORCH_LIBRARY_IMPL(compaware, CPU, m) {
  m.impl("wide_product", TORCH_BOX(&compaware::wide_product));
  m.impl("sum_of_squares", TORCH_BOX(&compaware::sum_of_squares));
}
