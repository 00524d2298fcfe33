// wide_product on the CPU: an fp32 matrix times a few columns, in fp64.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#define CK_ISA baseline
#include "../core/wide.h"
#undef CK_ISA
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define CK_X86_LEVELS
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define CK_ISA avx2
#include "../core/wide.h"
#undef CK_ISA
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define CK_ISA avx512
#include "../core/wide.h"
#undef CK_ISA
#pragma GCC pop_options
#endif

namespace compaware {
namespace {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPad = 8;  // doubles in the widest vector

template <class T>
using Kernel = void (*)(const T*, int64_t, int64_t, const double*, int64_t, int64_t, int64_t, double*);

template <class T>
Kernel<T> kernel() {
#ifdef CK_X86_LEVELS
  if (__builtin_cpu_supports("x86-64-v4")) return avx512::wide_product<T, 8>;
  if (__builtin_cpu_supports("x86-64-v3")) return avx2::wide_product<T, 4>;
#endif
  return baseline::wide_product<T, 2>;
}

template <class T>
void run(const Tensor& X, const Tensor& Y, Tensor& out) {
  const int64_t m = X.size(0), n = X.size(1), width = Y.size(1);
  const T* x = X.const_data_ptr<T>();
  const double* y = Y.const_data_ptr<double>();
  double* o = out.mutable_data_ptr<double>();
  const int64_t row = X.stride(0), column = X.stride(1);
  const int64_t grain = std::max<int64_t>(8, (1 << 16) / std::max<int64_t>(1, n * width) / 8 * 8);
  torch::stable::parallel_for(0, (m + 7) / 8, (grain + 7) / 8, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * 8, last = std::min(m, end * 8);
    kernel<T>()(x + first * row, row, column, y, width, last - first, n, o + first * width);
  });
}

// X [m, n] fp32 or fp64, in any strides; Y [n, p] fp64 -> [m, p] fp64.
Tensor wide_product(const Tensor& X, const Tensor& Y) {
  STD_TORCH_CHECK(X.dim() == 2 && Y.dim() == 2 && X.size(1) == Y.size(0),
                  "wide_product: wanted X [m, n] and Y [n, p]; got axes ", X.dim(), " and ", Y.dim());
  STD_TORCH_CHECK(Y.scalar_type() == ScalarType::Double, "wide_product: wanted Y in fp64; got ", Y.scalar_type());
  const bool single = X.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(single || X.scalar_type() == ScalarType::Double,
                  "wide_product: wanted X in fp32 or fp64; got ", X.scalar_type());
  const int64_t p = Y.size(1), width = (p + kPad - 1) / kPad * kPad;
  Tensor padded = torch::stable::contiguous(Y);
  if (p != width) {
    Tensor zeros = torch::stable::new_zeros(Y, {Y.size(0), width});
    Tensor part = torch::stable::narrow(zeros, 1, 0, p);
    torch::stable::copy_(part, Y);
    padded = zeros;
  }
  Tensor out = torch::stable::new_zeros(padded, {X.size(0), width});
  if (X.numel() && width) single ? run<float>(X, padded, out) : run<double>(X, padded, out);
  return p == width ? out : torch::stable::contiguous(torch::stable::narrow(out, 1, 0, p));
}

}  // namespace
}  // namespace compaware

STABLE_TORCH_LIBRARY_IMPL(compaware, CPU, m) { m.impl("wide_product", TORCH_BOX(&compaware::wide_product)); }
