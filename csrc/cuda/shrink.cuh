// ck_shrink: L1 and group-lasso shrinkage of a ragged list in one launch. Spans are read twice, then from cache.
#pragma once

#include "portable.h"
#include "shrink.h"
#include "sums.cuh"

namespace compaware {

// Index of the job that this block works on.
CK_DEVICE int job_of(const ShrinkJobs& list, int64_t block) {
  int low = 0, high = static_cast<int>(list.count);
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (list.jobs[middle].first <= block ? low : high) = middle;
  }
  return low;
}

// Shrinks one span with `width` threads, computing in C; thresholds are rounded once, to C, as in the reference.
template <class C>
CK_DEVICE void shrink_span(const Shrink& w, int64_t span, int lane, int width) {
  const int64_t per_matrix = w.spans_per_matrix(), k = span / per_matrix, offset = span % per_matrix * w.span;
  const int64_t left = w.size - offset, n = left < w.span ? left : w.span, start = k * w.size + offset;
  const C l1 = w.l1.data ? static_cast<C>(w.l1.data[k * w.l1.step]) : C(0);
  const auto at = [&](int64_t j) { return j < n ? start + j : span; };  // element of the span; the last one is its bias
  const auto soft_at = [&](int64_t j) { return soft(load_as<C>(j < n ? w.in : w.bias, w.dtype, at(j)), l1); };
  const int64_t count = n + (w.bias != nullptr);
  C scale = 1;
  if (w.tau.data) {
    C sum = 0;
    for (int64_t j = lane; j < count; j += width) {
      const C v = soft_at(j);
      sum += v * v;
    }
    sum = width == kWarp ? warp_sum(sum) : block_sum(sum);
    scale = group_scale(static_cast<C>(sqrt(sum)), static_cast<C>(w.tau.data[k * w.tau.step]));
  }
  for (int64_t j = lane; j < count; j += width)
    store_as(j < n ? w.out : w.bias, w.dtype, at(j), soft_at(j) * scale);
}

// With the dtype as a compile-time constant: no branch per element.
template <DType dtype, class C>
CK_DEVICE void shrink_typed(Shrink w, int64_t block) {
  w.dtype = dtype;
  const int width = ShrinkJob::narrow(w) ? kWarp : kThreads;
  const int64_t span = block * (kThreads / width) + threadIdx.x / width;
  if (span < w.spans()) shrink_span<C>(w, span, threadIdx.x % width, width);
}

}  // namespace compaware

CK_KERNEL(compaware::kThreads) ck_shrink(const __grid_constant__ compaware::ShrinkJobs list) {
  using namespace compaware;
  const ShrinkJob& job = list.jobs[job_of(list, blockIdx.x)];
  const int64_t block = blockIdx.x - job.first;
  switch (job.weight.dtype) {
    case DType::f64: return shrink_typed<DType::f64, double>(job.weight, block);
    case DType::f32: return shrink_typed<DType::f32, float>(job.weight, block);
    case DType::f16: return shrink_typed<DType::f16, float>(job.weight, block);
    case DType::bf16: return shrink_typed<DType::bf16, float>(job.weight, block);
  }
}
