// Sums and the like over a warp or a block. See block.cuh.
#pragma once

#include "portable.h"

namespace compaware {

constexpr int kLanes = 32, kMostWarps = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

CK_DEVICE int lane_index() { return threadIdx.x % kLanes; }
CK_DEVICE int warp_index() { return threadIdx.x / kLanes; }
CK_DEVICE int warp_count() { return blockDim.x / kLanes; }

template <class C>
CK_DEVICE C warp_sum(C v) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kAllLanes, v, offset);
  return v;
}

// What all warps found, in every thread.
template <class C, class Join>
CK_DEVICE C block_join(C of_warp, Join join) {
  __shared__ C found[kMostWarps];
  __syncthreads();  // of the last call, all must have been read
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

// NaN is passed over.
template <class C>
CK_DEVICE C block_max(C v) {
  const auto larger = [](C a, C b) { return b > a ? b : a; };
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) v = larger(v, __shfl_xor_sync(kAllLanes, v, offset));
  return block_join(v, larger);
}

// place [n]: where each of norms [n] comes in descending order; NaN last, equal ones as they stand.
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
