// Reductions over a warp or a block, and ranks of numbers. Calling conventions: block.cuh.
#pragma once

#include "portable.h"

namespace compaware {

constexpr int kMostWarps = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

CK_DEVICE int lane_index() { return threadIdx.x % kWarp; }
CK_DEVICE int warp_index() { return threadIdx.x / kWarp; }
CK_DEVICE int warp_count() { return blockDim.x / kWarp; }

template <class C>
CK_DEVICE C warp_sum(C v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kAllLanes, v, offset);
  return v;
}

// Reduces the warps' results, in every thread.
template <class C, class Join>
CK_DEVICE C block_join(C of_warp, Join join) {
  __shared__ C found[kMostWarps];
  __syncthreads();  // the results of the last call must have been read
  if (lane_index() == 0) found[warp_index()] = of_warp;
  __syncthreads();
  C all = found[0];
  for (int warp = 1; warp < warp_count(); ++warp) all = join(all, found[warp]);
  return all;
}

template <class C>
CK_DEVICE C block_sum(C v) {
  return block_join(warp_sum(v), [](C a, C b) { return a + b; });
}

// Maximum, ignoring NaN.
template <class C>
CK_DEVICE C block_max(C v) {
  const auto larger = [](C a, C b) { return b > a ? b : a; };
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v = larger(v, __shfl_xor_sync(kAllLanes, v, offset));
  return block_join(v, larger);
}

// place [n]: position of each of norms [n] in descending order, stable, NaN last.
template <class C>
CK_DEVICE void order(const C* norms, int n, int* place) {
  const auto before = [=](int i, int j) {
    const C a = norms[i], b = norms[j];
    return a > b || (a == a && b != b);
  };
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    int count = 0;
    for (int j = 0; j < n; ++j) count += before(j, i) || (j < i && !before(i, j));
    place[i] = count;
  }
  __syncthreads();
}

}  // namespace compaware
