// wide_product on the CPU: a matrix times a few columns, in fp64.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#define CK_KERNEL "wide_product_kernel.h"
#include "each_isa.h"
#include "isa.h"

namespace compaware {
namespace {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPad = 8;  // doubles in the widest vector

// Copies Y [n, p] of any strides to [n, width] in fp64, padded with zero columns.
template <class T>
void widen(const Tensor& Y, double* out, int64_t width) {
  const T* y = Y.const_data_ptr<T>();
  const int64_t n = Y.size(0), p = Y.size(1), row = Y.stride(0), column = Y.stride(1);
  torch::stable::parallel_for(0, n, 1 + (1 << 15) / width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j < width; ++j)
        out[i * width + j] = j < p ? static_cast<double>(y[i * row + j * column]) : 0.0;
  });
}

template <class T>
void run(const Tensor& X, const double* Y, int64_t width, double* out) {
  const int64_t m = X.size(0), n = X.size(1), row = X.stride(0), column = X.stride(1);
  const T* x = X.const_data_ptr<T>();
  const auto kernel = CK_OF_ISA(wide_product<T>);
  const int64_t blocks = (m + kPad - 1) / kPad, grain = 1 + (1 << 17) / (n * width * kPad + 1);
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPad, last = std::min(m, end * kPad);
    kernel(x + first * row, row, column, Y, width, last - first, n, out + first * width);
  });
}

bool is_single(const Tensor& A, const char* name) {
  const auto dtype = A.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "wide_product: wanted ", name, " in fp32 or fp64; got ", dtype);
  return dtype == ScalarType::Float;
}

// X [m, n], Y [n, p], each in fp32 or fp64 and of any strides -> [m, p] in fp64.
Tensor wide_product(const Tensor& X, const Tensor& Y) {
  STD_TORCH_CHECK(X.dim() == 2 && Y.dim() == 2 && X.size(1) == Y.size(0),
                  "wide_product: wanted X [m, n] and Y [n, p]; got axes ", X.dim(), " and ", Y.dim());
  const bool single_X = is_single(X, "X"), single_Y = is_single(Y, "Y");
  const int64_t m = X.size(0), n = X.size(1), p = Y.size(1), width = (p + kPad - 1) / kPad * kPad;
  Tensor out = torch::stable::new_zeros(Y, {m, width}, ScalarType::Double);
  if (m && n && p) {
    Tensor wide = torch::stable::new_empty(Y, {n, width}, ScalarType::Double);
    double* y = wide.mutable_data_ptr<double>();
    single_Y ? widen<float>(Y, y, width) : widen<double>(Y, y, width);
    double* o = out.mutable_data_ptr<double>();
    single_X ? run<float>(X, y, width, o) : run<double>(X, y, width, o);
  }
  return p == width ? out : torch::stable::contiguous(torch::stable::narrow(out, 1, 0, p));
}

}  // namespace
}  // namespace compaware

STABLE_TORCH_LIBRARY_IMPL(compaware, CPU, m) { m.impl("wide_product", TORCH_BOX(&compaware::wide_product)); }
