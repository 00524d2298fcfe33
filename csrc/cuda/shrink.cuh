// The shrinkage kernel: one block per span, which is read twice (the second time from cache) and written once.
#pragma once

#include "../core/shrink.h"

namespace compaware {

constexpr int kWarp = 32, kMaxWarps = 8;

template <class C>
__device__ inline C warp_sum(C v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// The sum over the block, in every thread. Called once per kernel: the shared memory is not reused.
template <class C>
__device__ inline C block_sum(C v) {
  __shared__ C sums[kMaxWarps];
  v = warp_sum(v);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = v;
  __syncthreads();
  C total = 0;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) total += sums[warp];
  return total;
}

// T: as stored, C: as computed. Thresholds are rounded to C, once, as in the reference.
template <class T, class C>
__global__ void __launch_bounds__(kWarp* kMaxWarps) shrink_kernel(Shrink w) {
  const int64_t per_matrix = w.spans_per_matrix();
  const int64_t k = blockIdx.x / per_matrix, start = blockIdx.x % per_matrix * w.span;
  const int64_t left = w.size - start, n = left < w.span ? left : w.span;
  const T* x = static_cast<const T*>(w.in) + k * w.size + start;
  T* y = static_cast<T*>(w.out) + k * w.size + start;
  const C l1 = w.l1.data ? static_cast<C>(w.l1.data[k * w.l1.step]) : C(0);

  C scale = 1;
  if (w.tau.data) {
    C sum = 0;
    for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
      const C v = soft(static_cast<C>(x[j]), l1);
      sum += v * v;
    }
    const C norm = sqrt(block_sum(sum));
    scale = group_scale(norm, static_cast<C>(w.tau.data[k * w.tau.step]));
  }
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x) y[j] = static_cast<T>(soft(static_cast<C>(x[j]), l1) * scale);
}

}  // namespace compaware
