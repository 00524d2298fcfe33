// Singular value thresholding, soft or firm, of small matrices, in place, one block per matrix.
#pragma once

#include "block.cuh"
#include "portable.h"
#include "ramp.cuh"
#include "step.h"
#include "storage.cuh"

namespace compaware {

constexpr int kSmallColumns = 78;  // upper bound of n, as (m + n) n fp64 numbers fit in kSmallBytes
static_assert(16 * kSmallColumns * kSmallColumns <= kSmallBytes);
static_assert(16 * (kSmallColumns + 1) * (kSmallColumns + 1) > kSmallBytes);

// Calls visit(i, j) for all elements; neighboring threads visit elements that are neighbors in memory.
template <class F>
CK_DEVICE void each_element(const Small& job, F visit) {
  const bool by_rows = job.col <= job.row;
  const int size = int(job.m * job.n), length = int(by_rows ? job.n : job.m);
  for (int at = threadIdx.x; at < size; at += blockDim.x)
    by_rows ? visit(at / length, at % length) : visit(at % length, at / length);
}

// Everything is computed for W / 2^exponent, whose largest entry is in [1/2, 1): nothing over- or underflows.
struct Scale {
  int exponent;
  double norm;  // Frobenius
  Ramp f;

  CK_DEVICE double down(double x) const { return ldexp(x, -exponent); }
  CK_DEVICE double up(double x) const { return ldexp(x, exponent); }
};

CK_DEVICE double element(const Small& job, int i, int j) {
  return load_wide(job.W, job.dtype, i * job.row + j * job.col);
}

CK_DEVICE Scale scale_of(const Small& job) {
  Scale scale;
  double largest = 0, sum = 0;
  each_element(job, [&](int i, int j) { largest = max(largest, fabs(element(job, i, j))); });
  frexp(block_max(largest), &scale.exponent);
  each_element(job, [&](int i, int j) {
    const double x = scale.down(element(job, i, j));
    sum += x * x;
  });
  scale.norm = sqrt(block_sum(sum));
  scale.f = {scale.down(*job.tau), *job.slope};
  return scale;
}

// Singular values, unsorted.
struct Spectrum {
  double s[kSmallColumns], gain[kSmallColumns];  // gain: f(s) / s
  int place[kSmallColumns];
};

// In dynamic shared memory.
template <class C>
struct Factors {
  C* U;        // [n, stride], left singular vectors as rows
  int stride;  // odd, if there is room for that: no bank conflicts
  C* Y;        // [n, n], gain U^T W

  CK_DEVICE explicit Factors(const Small& job) {
    CK_SHARED(C, memory);
    const int n = int(job.n), odd = int(job.m) | 1;
    U = memory;
    stride = (odd + n) * n * int(sizeof(double)) <= kSmallBytes ? odd : int(job.m);
    Y = U + n * stride;
  }
};

template <class C>
CK_DEVICE void decompose(const Small& job, const Scale& scale, const Factors<C>& f, Spectrum& spectrum) {
  const int m = int(job.m), n = int(job.n);
  each_element(job, [&](int i, int j) { f.U[j * f.stride + i] = C(scale.down(element(job, i, j))); });
  __syncthreads();
  jacobi<C>(f.U, n, m, f.stride, nullptr, 0, 0, 30);
  for (int k = warp_index(); k < n; k += warp_count()) {
    C* u = f.U + k * f.stride;
    double sum = 0;
    for (int i = lane_index(); i < m; i += kWarp) sum += double(u[i]) * u[i];
    const double s = sqrt(warp_sum(sum));
    const bool kept = !(s <= scale.f.tau);
    for (int i = lane_index(); i < m && kept; i += kWarp) u[i] = C(u[i] / s);
    if (lane_index()) continue;
    spectrum.s[k] = s;
    spectrum.gain[k] = kept ? scale.f.gain(s) : 0;
  }
  __syncthreads();
  order(spectrum.s, n, spectrum.place);
}

// Y = gain U^T W, with W from memory: U f(s) U^T W needs no right singular vectors, which would cost as much as the
// left ones. A lane sums one k over every parts-th i, so that a few k occupy all lanes, too. Every kTerms terms are
// summed separately, or roundoff would grow with m.
template <DType dtype, class C>
CK_DEVICE void project(const Small& job, const Scale& scale, const Factors<C>& f, const Spectrum& spectrum) {
  constexpr int kAcross = 4, kTerms = 16;
  const int m = int(job.m), n = int(job.n), half = scale.exponent / 2;
  int width = kWarp;
  while (width >= 2 * n) width /= 2;
  const int parts = kWarp / width, chunks = (n + width - 1) / width;
  const C first = ldexp(C(1), -half), second = ldexp(C(1), half - scale.exponent);  // 2^-exponent can be out of range
  for (int task = warp_index(); task < chunks * ((n + kAcross - 1) / kAcross); task += warp_count()) {
    const int k = task % chunks * width + lane_index() % width, left = task / chunks * kAcross;
    const C* u = f.U + min(k, n - 1) * f.stride;
    C sum[kAcross] = {};
    for (int i = lane_index() / width; i < m;) {
      C some[kAcross] = {};
      for (const int end = min(i + kTerms * parts, m); i < end; i += parts)
        for (int j = 0; j < kAcross; ++j)
          some[j] += u[i] * (load_as<C>(job.W, dtype, i * job.row + min(left + j, n - 1) * job.col) * first);
      for (int j = 0; j < kAcross; ++j) sum[j] += some[j];
    }
    for (int j = 0; j < kAcross; ++j) {
      for (int offset = width; offset < kWarp; offset *= 2) sum[j] += __shfl_xor_sync(kAllLanes, sum[j], offset);
      if (lane_index() < width && k < n && left + j < n)
        f.Y[k * n + left + j] = sum[j] * second * C(spectrum.gain[k]);
    }
  }
  __syncthreads();
}

// W = U Y.
template <class C>
CK_DEVICE void multiply_out(const Small& job, const Scale& scale, const Factors<C>& f, const double* gain) {
  each_element(job, [&](int i, int j) {
    C sum = 0;
    for (int k = 0; k < job.n; ++k)
      if (gain[k] != 0) sum += f.U[k * f.stride + i] * f.Y[k * job.n + j];
    store_wide(job.W, job.dtype, i * job.row + j * job.col, scale.up(sum));
  });
}

CK_DEVICE void report(const Small& job, const Scale& scale, const Spectrum& spectrum, Method method) {
  double squares = 0;
  int64_t rank = 0;
  for (int k = 0; k < job.n; ++k) {
    const double s = spectrum.gain[k] == 0 ? 0 : scale.f.value(spectrum.s[k]);
    if (threadIdx.x == 0) job.s[spectrum.place[k]] = scale.up(s);
    squares += s * s;
    rank += s != 0;
  }
  const Storage storage = storage_of(job.dtype);
  const double unit = method == kJacobi32 ? 0x1p-24 : 0x1p-53;
  const double moved = (kLoss + double(job.n)) * unit * 1.01 * scale.norm * scale.f.slope;
  const double stored = storage.relative * (1.01 * sqrt(squares) + moved);
  if (threadIdx.x) return;
  *job.error = storage.bound(scale.up(moved + stored), scale.up(scale.norm), job.m * job.n);
  *job.rank = rank;
  *job.method = method;
}

template <class C>
CK_DEVICE void shrink_small(const Small& job, const Scale& scale, Spectrum& spectrum) {
  const Factors<C> f(job);
  decompose(job, scale, f, spectrum);
  if (scale.f.tau > 0) {  // 0 leaves W unchanged, bit for bit
    switch (static_cast<DType>(job.dtype)) {
      case DType::f64: project<DType::f64>(job, scale, f, spectrum); break;
      case DType::f32: project<DType::f32>(job, scale, f, spectrum); break;
      case DType::f16: project<DType::f16>(job, scale, f, spectrum); break;
      case DType::bf16: project<DType::bf16>(job, scale, f, spectrum); break;
    }
    multiply_out(job, scale, f, spectrum.gain);
  }
  report(job, scale, spectrum, sizeof(C) == 4 ? kJacobi32 : kJacobi64);
}

CK_DEVICE void clear_small(const Small& job, const Scale& scale) {
  each_element(job, [&](int i, int j) { store_wide(job.W, job.dtype, i * job.row + j * job.col, 0); });
  for (int k = threadIdx.x; k < job.n; k += blockDim.x) job.s[k] = 0;
  if (threadIdx.x) return;
  *job.error = scale.up(max(scale.norm * (1 + 1e-12) - scale.f.tau, 0.0) * scale.f.slope);  // the norm is rounded
  *job.rank = 0;
  *job.method = kZero;
}

CK_DEVICE void small_svt(const Small& job, const int32_t* refused, double tol) {
  __shared__ Spectrum spectrum;
  __shared__ Scale scale;  // in shared memory to save registers
  if (*refused) {
    if (threadIdx.x == 0) *job.rank = -1, *job.method = kRefused;
    return;
  }
  const Scale found = scale_of(job);
  if (threadIdx.x == 0) scale = found;
  __syncthreads();
  const bool coarse = kCoarse * 0x1p-24 * 1.01 * scale.norm * scale.f.slope > tol * scale.f.tau;
  if (scale.norm <= scale.f.tau) clear_small(job, scale);
  else if (coarse || job.dtype == int64_t(DType::f64)) shrink_small<double>(job, scale, spectrum);
  else shrink_small<float>(job, scale, spectrum);
}

}  // namespace compaware

// One block per matrix. Nothing is written if *refused is not 0.
CK_KERNEL(compaware::kThreads)
ck_small(const compaware::Small* jobs, int64_t count, const int32_t* refused, double tol) {
  if (blockIdx.x < count) compaware::small_svt(jobs[blockIdx.x], refused, tol);
}
