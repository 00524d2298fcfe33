// small_svd on the CPU: the matrices of a batch are decomposed in groups, one matrix per SIMD lane.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <tuple>
#include <vector>

#define CK_KERNEL "small_svd_kernel.h"
#include "each_isa.h"
#include "isa.h"

namespace compaware {
namespace {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using baseline::kNullNorm, baseline::kScaleExponent;

template <class T>
struct Kernel {
  int64_t lanes;
  void (*solve)(T* X, T* Y, T* norms, int* exponents, int64_t m, int64_t n, int64_t stride);
};

template <class T>
Kernel<T> kernel() {
  return {CK_OF_ISA(kLanes<T>), CK_OF_ISA(jacobi<T>)};
}

// W [B, m, n] of any strides, transposed if that makes it tall. U [B, m, n], s [B, n], V [B, n, n], contiguous. If
// scaled, V is V diag(s), and the columns of U that belong to zero singular values are zero.
template <class T>
struct Job {
  int64_t B, m, n;  // m >= n
  const T* W;
  int64_t matrix, row, column;  // strides of W
  T *U, *s, *V;
  bool scaled;
};

// Dot product of x [n] and y [n], in independent partial sums that vectorize.
template <class T>
T inner(const T* x, const T* y, int64_t n) {
  constexpr int lanes = 8;
  T sums[lanes] = {}, total = 0;
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes)
    for (int lane = 0; lane < lanes; ++lane) sums[lane] += x[j + lane] * y[j + lane];
  for (; j < n; ++j) total += x[j] * y[j];
  for (T sum : sums) total += sum;
  return total;
}

// Completes U [m, n], whose first `rank` columns are orthonormal. Each new column starts from the unit vector that is
// farthest from their span; Gram-Schmidt runs twice, as one pass loses digits to cancellation.
template <class T>
void complete(T* U, int64_t m, int64_t n, int64_t rank) {
  if (rank == n) return;
  std::vector<T> left(m, T(1)), v(m), along(n);
  for (int64_t i = 0; i < m; ++i) left[i] -= inner(U + i * n, U + i * n, rank);
  for (; rank < n; ++rank) {
    std::fill(v.begin(), v.end(), T(0));
    v[std::max_element(left.begin(), left.end()) - left.begin()] = 1;
    for (int pass = 0; pass < 2; ++pass) {
      std::fill(along.begin(), along.end(), T(0));
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < rank; ++j) along[j] += U[i * n + j] * v[i];
      for (int64_t i = 0; i < m; ++i) v[i] -= inner(U + i * n, along.data(), rank);
    }
    const T norm = std::sqrt(inner(v.data(), v.data(), m));
    for (int64_t i = 0; i < m; ++i) {
      U[i * n + rank] = v[i] / norm;
      left[i] -= U[i * n + rank] * U[i * n + rank];
    }
  }
}

// One thread's buffers, which hold matrices first, first + 1, ... of a job, one per lane. Rows are copied for all lanes
// at once: 16 neighboring elements of the buffer come from 16 cache lines of W.
template <class T>
struct Group {
  struct alignas(64) Line {
    char bytes[64];
  };
  const Job<T>& job;
  const Kernel<T> kernel;
  const int64_t m, n, even, stride, lanes;  // even: n, or n + 1, with a column of zeros
  std::vector<Line> memory;
  T *X, *norms;
  std::vector<int> exponents;
  std::vector<int64_t> place;  // [n, lanes] position of each column in descending order
  std::vector<T> rows;         // [lanes, n]

  // The stride is odd: columns a large power of two apart would compete for the same cache lines.
  Group(const Job<T>& job, const Kernel<T>& kernel)
      : job(job), kernel(kernel), m(job.m), n(job.n), even(n + n % 2), stride((m + even) | 1), lanes(kernel.lanes),
        memory((stride + 1 + (job.scaled ? m : 0)) * even * lanes * sizeof(T) / sizeof(Line) + 1),
        X(reinterpret_cast<T*>(memory.data())), norms(X + stride * even * lanes), exponents(lanes), place(n * lanes),
        rows(n * lanes) {}

  T& x(int64_t i, int64_t j, int64_t lane) { return X[(j * stride + i) * lanes + lane]; }

  T* original() { return job.scaled ? norms + even * lanes : nullptr; }  // a buffer for W

  void load(int64_t first, int64_t count) {
    std::fill(memory.begin(), memory.end(), Line{});
    for (int64_t i = 0; i < m; ++i)
      for (int64_t lane = 0; lane < count; ++lane)
        for (int64_t j = 0; j < n; ++j)
          x(i, j, lane) = job.W[(first + lane) * job.matrix + i * job.row + j * job.column];
    for (int64_t j = 0; !job.scaled && j < n; ++j) std::fill_n(&x(m + j, j, 0), lanes, T(1));
  }

  // Descending insertion sort, which stays in bounds even with NaN.
  void sort(int64_t lane) {
    std::vector<int64_t> order(n);
    for (int64_t j = 0; j < n; ++j) {
      int64_t k = j;
      for (; k > 0 && norms[order[k - 1] * lanes + lane] < norms[j * lanes + lane]; --k) order[k] = order[k - 1];
      order[k] = j;
    }
    for (int64_t k = 0; k < n; ++k) place[order[k] * lanes + lane] = k;
  }

  // Copies rows start .. start + size of X to out [count, size, n], columns in descending order.
  void store_rows(T* out, int64_t count, int64_t start, int64_t size) {
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t j = 0; j < n; ++j)
        for (int64_t lane = 0; lane < lanes; ++lane) rows[lane * n + place[j * lanes + lane]] = x(start + i, j, lane);
      for (int64_t lane = 0; lane < count; ++lane) std::copy_n(&rows[lane * n], n, out + (lane * size + i) * n);
    }
  }

  void store(int64_t first, int64_t count) {
    for (int64_t lane = 0; lane < lanes; ++lane) sort(lane);
    store_rows(job.U + first * m * n, count, 0, m);
    store_rows(job.V + first * n * n, count, m, n);
    for (int64_t lane = 0; lane < count; ++lane) {
      int64_t rank = 0;
      for (int64_t j = 0; j < n; ++j) {
        const T norm = norms[j * lanes + lane];
        rank += !(norm <= kNullNorm<T>);
        job.s[(first + lane) * n + place[j * lanes + lane]] = std::ldexp(norm, exponents[lane] - kScaleExponent);
      }
      if (!job.scaled) complete(job.U + (first + lane) * m * n, m, n, rank);
    }
  }
};

// The grouping does not depend on the number of threads; the last group is padded with zeros.
template <class T>
void run(const Job<T>& job) {
  const Kernel<T> k = kernel<T>();
  torch::stable::parallel_for(0, (job.B + k.lanes - 1) / k.lanes, 1, [&](int64_t begin, int64_t end) {
    Group<T> group(job, k);
    for (int64_t first = begin * k.lanes; first < std::min(job.B, end * k.lanes); first += k.lanes) {
      const int64_t count = std::min(k.lanes, job.B - first);
      group.load(first, count);
      k.solve(group.X, group.original(), group.norms, group.exponents.data(), group.m, group.even, group.stride);
      group.store(first, count);
    }
  });
}

template <class T>
void decompose(const Tensor& W, Tensor& U, Tensor& s, Tensor& V, bool scaled) {
  const int64_t tall = W.size(1) >= W.size(2) ? 1 : 2, wide = 3 - tall;  // axes
  run<T>({W.size(0), W.size(tall), W.size(wide), W.const_data_ptr<T>(), W.stride(0), W.stride(tall), W.stride(wide),
          (tall == 1 ? U : V).mutable_data_ptr<T>(), s.mutable_data_ptr<T>(),
          (tall == 1 ? V : U).mutable_data_ptr<T>(), scaled});
}

std::tuple<Tensor, Tensor, Tensor> small_svd(const Tensor& W, bool scaled) {
  STD_TORCH_CHECK(W.device().type() == DeviceType::CPU, "W: wanted a tensor on the CPU; got one on another device");
  STD_TORCH_CHECK(W.dim() == 3, "W: wanted a batch of matrices, [B, m, n]; got ", W.dim(), " axes");
  STD_TORCH_CHECK(W.scalar_type() == ScalarType::Float || W.scalar_type() == ScalarType::Double,
                  "W: wanted fp64 or fp32; got ", W.scalar_type());
  const int64_t B = W.size(0), m = W.size(1), n = W.size(2), k = std::min(m, n);
  Tensor U = torch::stable::new_empty(W, {B, m, k}), s = torch::stable::new_empty(W, {B, k}),
         V = torch::stable::new_empty(W, {B, n, k});
  if (s.numel() == 0) return {U, s, V};
  W.scalar_type() == ScalarType::Float ? decompose<float>(W, U, s, V, scaled) : decompose<double>(W, U, s, V, scaled);
  return {U, s, V};
}

}  // namespace
}  // namespace compaware

STABLE_TORCH_LIBRARY_IMPL(compaware, CPU, m) { m.impl("small_svd", TORCH_BOX(&compaware::small_svd)); }
