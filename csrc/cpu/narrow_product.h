// Product of a matrix with a few columns on all threads: narrow_product_kernel.h by rows, for any instruction set.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#define CK_KERNEL "narrow_product_kernel.h"
#include "each_isa.h"
#include "isa.h"

namespace compaware {
namespace {

// Columns padded to whole vectors of the widest instruction set.
template <class A>
constexpr int64_t padded(int64_t columns) {
  constexpr int64_t lanes = 64 / sizeof(A);
  return (columns + lanes - 1) / lanes * lanes;
}

// Copies Y [n, p] of any strides to out [n, width], with zero columns after p.
template <class T, class A>
void copy_padded(const torch::stable::Tensor& Y, A* out, int64_t width) {
  const T* y = Y.const_data_ptr<T>();
  const int64_t n = Y.size(0), p = Y.size(1), row = Y.stride(0), column = Y.stride(1);
  torch::stable::parallel_for(0, n, 1 + (1 << 15) / width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j < width; ++j) out[i * width + j] = j < p ? static_cast<A>(y[i * row + j * column]) : A(0);
  });
}

// Rows of `stride` numbers, whose first `width` are used.
template <class A>
struct Rows {
  A* data;
  int64_t stride, width;
};

// out [m, width] += X [m, n] Y [n, width], strides of X given: the same sums for any number of threads.
template <class A, class T>
void narrow_product(const T* X, int64_t row, int64_t column, const Rows<A>& Y, int64_t m, int64_t n,
                    const Rows<A>& out) {
  constexpr int64_t rows = 16;  // of a block
  const int64_t blocks = (m + rows - 1) / rows, grain = 1 + (1 << 20) / (n * Y.width * rows + 1);
  const auto kernel = CK_OF_ISA(narrow_product<A, T>);
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * rows, last = std::min(m, end * rows);
    kernel(X + first * row, row, column, Y.data, Y.stride, Y.width, last - first, n,
           out.data + first * out.stride, out.stride);
  });
}

}  // namespace
}  // namespace compaware
