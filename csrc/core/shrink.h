// L1 and group-lasso shrinkage, free of torch: the arithmetic and the job that the CPU and the CUDA kernels share.
#pragma once

#include "constants.h"

#ifdef __CUDACC__
#define CK_HOST_DEVICE __host__ __device__
#else
#define CK_HOST_DEVICE
#endif

namespace compaware {

struct Tau {
  const double* data;  // null: without this stage
  int64_t step;        // 0: one threshold for all matrices, 1: one per matrix
};

// One weight: `matrices` of `size` contiguous elements each, cut into spans. A span is a group: a row, or, without the
// group stage, any run of elements. `in` and `out` may be the same memory. `bias`: null, or one more element of each
// group, shrunk in place.
struct Shrink {
  DType dtype;
  const void* in;
  void* out;
  int64_t matrices, size, span;
  Tau l1, tau;
  void* bias;

  CK_HOST_DEVICE int64_t spans_per_matrix() const { return (size + span - 1) / span; }
  CK_HOST_DEVICE int64_t spans() const { return matrices * spans_per_matrix(); }
};

// Soft threshold sign(x) max(|x| - t, 0). The comparisons compile to min and max instructions; NaN in x or t gives NaN.
template <class T>
CK_HOST_DEVICE inline T soft(T x, T t) {
  const T above = x > -t ? x : -t;
  const T clamped = above < t ? above : t;
  return x - clamped;
}

// Group shrinkage factor of a row, max(1 - t / norm, 0), without 0 / 0 at a row of zeros. NaN in t or norm gives NaN,
// except that t = 0 leaves any row unchanged.
template <class T>
CK_HOST_DEVICE inline T group_scale(T norm, T t) {
  return t == 0 ? T(1) : norm <= t ? T(0) : T(1) - t / norm;
}

}  // namespace compaware
