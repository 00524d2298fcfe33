// Shrinkage, free of torch: the arithmetic and the job description that the CPU and the CUDA kernels share.
#pragma once

#ifndef __CUDACC_RTC__  // NVRTC has no standard headers; csrc/cuda/portable.h names the integers
#include <cstdint>
#endif

#ifdef __CUDACC__
#define CK_HOST_DEVICE __host__ __device__
#else
#define CK_HOST_DEVICE
#endif

namespace compaware {

enum class DType { f64, f32, f16, bf16 };

struct Tau {
  const double* data;  // null: this stage is left out
  int64_t step;        // 0: one number for all matrices, 1: one per matrix
};

// One weight: `matrices` of `size` contiguous elements each, cut into spans. A span is what is shrunk as one: a row,
// or, where rows do not matter, any run of elements. `in` and `out` may be the same memory. `tails`: null, or one more
// element of each span, a neuron's bias, shrunk where it lies.
struct Shrink {
  DType dtype;
  const void* in;
  void* out;
  int64_t matrices, size, span;
  Tau l1, tau;
  void* tails;

  CK_HOST_DEVICE int64_t spans_per_matrix() const { return (size + span - 1) / span; }
  CK_HOST_DEVICE int64_t spans() const { return matrices * spans_per_matrix(); }
};

// sign(x) max(|x| - t, 0). The comparisons are those of the min and max instructions; NaN in x or t gives NaN.
template <class T>
CK_HOST_DEVICE inline T soft(T x, T t) {
  const T above = x > -t ? x : -t;
  const T clamped = above < t ? above : t;
  return x - clamped;
}

// The factor of a row: max(1 - t / norm, 0), without 0 / 0 at a row of zeros. NaN in t gives NaN; in norm, too, but for
// t = 0, which changes nothing, whatever there is.
template <class T>
CK_HOST_DEVICE inline T group_scale(T norm, T t) {
  return t == 0 ? T(1) : norm <= t ? T(0) : T(1) - t / norm;
}

}  // namespace compaware
