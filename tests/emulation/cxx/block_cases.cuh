// What block.cuh offers, as kernels: one block per problem, all of one size.
#pragma once

#include "../../../csrc/cuda/block.cuh"

CK_KERNEL(1024) ck_case_cholesky(double* G, int64_t n, double dependent) {
  compaware::cholesky(G + blockIdx.x * n * n, int(n), dependent);
}

CK_KERNEL(1024) ck_case_inverse(const double* L, int64_t n, double* S) {
  compaware::inverse_transposed(L + blockIdx.x * n * n, int(n), S + blockIdx.x * n * n);
}

template <class C>
CK_DEVICE void jacobi_case(C* A, int64_t count, int64_t length, int64_t stride, C* V, int64_t v_length,
                           int64_t v_stride, int64_t sweeps, int64_t in_shared, int64_t* used) {
  CK_SHARED(C, rows);
  for (int64_t i = threadIdx.x; in_shared && i < count * stride; i += blockDim.x) rows[i] = A[i];
  __syncthreads();
  const int found = compaware::jacobi<C>(in_shared ? rows : A, int(count), int(length), int(stride), V, int(v_length),
                                         int(v_stride), int(sweeps));
  for (int64_t i = threadIdx.x; in_shared && i < count * stride; i += blockDim.x) A[i] = rows[i];
  if (threadIdx.x == 0) *used = found;
}

CK_KERNEL(256) ck_case_jacobi32(float* A, int64_t count, int64_t length, int64_t stride, float* V, int64_t v_length,
                                int64_t v_stride, int64_t sweeps, int64_t in_shared, int64_t* used) {
  jacobi_case<float>(A, count, length, stride, V, v_length, v_stride, sweeps, in_shared, used);
}

CK_KERNEL(256) ck_case_jacobi64(double* A, int64_t count, int64_t length, int64_t stride, double* V, int64_t v_length,
                                int64_t v_stride, int64_t sweeps, int64_t in_shared, int64_t* used) {
  jacobi_case<double>(A, count, length, stride, V, v_length, v_stride, sweeps, in_shared, used);
}

// sums [2]: of x [n], and of its squares; largest: of x.
CK_KERNEL(1024) ck_case_sums(const double* x, int64_t n, double* sums, double* largest) {
  double sum = 0, squares = 0, top = -INFINITY;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    sum += x[i];
    squares += x[i] * x[i];
    top = x[i] > top ? x[i] : top;
  }
  sum = compaware::block_sum(sum);
  squares = compaware::block_sum(squares);
  top = compaware::block_max(top);
  if (threadIdx.x != blockDim.x - 1) return;  // every thread has them
  sums[0] = sum;
  sums[1] = squares;
  *largest = top;
}

CK_KERNEL(256) ck_case_order(const double* norms, int64_t n, int32_t* place) {
  compaware::order(norms, int(n), place);
}

CK_KERNEL(256) ck_case_philox(const int64_t* counter, int64_t key, int64_t* words) {
  using namespace compaware;
  Philox in;
  for (int i = 0; i < 4; ++i) in.word[i] = uint32_t(counter[i]);
  const Philox out = philox(in, uint32_t(key), uint32_t(key >> 32));
  for (int i = 0; i < 4; ++i) words[i] = out.word[i];
}

CK_KERNEL(256) ck_case_normal(int64_t seed, int64_t call, int64_t stream, int64_t n, double* x) {
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) x[i] = compaware::normal(seed, call, stream, i);
}

#define CK_BLOCK_CASES(X)                                                                                    \
  X(ck_case_cholesky) X(ck_case_inverse) X(ck_case_jacobi32) X(ck_case_jacobi64) X(ck_case_sums)            \
  X(ck_case_order) X(ck_case_philox) X(ck_case_normal)
