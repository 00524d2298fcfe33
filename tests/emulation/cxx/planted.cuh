// Kernels that are right, and wrong in the one way that `bug` names: what the emulator and the sanitizers must notice.
#pragma once

#include "../../../csrc/cuda/portable.h"

enum Bug {
  kNone,
  kNoBarrier,
  kAhead,
  kTwoBarriers,
  kUnwritten,
  kBeyond,
  kMisaligned,
  kPlainSum,
  kNoFence,
  kForeignMask,
  kHalfMask,
  kOutsideMask,
  kHalfWarp,
  kTwoShuffles,
  kShuffleAsBarrier
};

// out[b, i] = in[b, threads - 1 - i]
CK_KERNEL(256) ck_planted_reverse(const float* in, float* out, int64_t bug) {
  CK_SHARED(float, kept);
  const int i = threadIdx.x, n = blockDim.x;
  in += int64_t(blockIdx.x) * n;
  if (bug == kMisaligned) in = reinterpret_cast<const float*>(reinterpret_cast<const char*>(in) + (i < n - 1));
  if (bug != kUnwritten || i != 1) kept[i] = in[i];
  if (bug == kTwoBarriers) {
    if (i % 2) __syncthreads();
    else __syncthreads();
  } else if (bug != kNoBarrier) {
    __syncthreads();
  }
  if (bug == kAhead && i == 0) kept[n - 2] = 0;  // and on to the next barrier, while thread 1 has yet to leave the last
  out[int64_t(blockIdx.x) * n + i + (bug == kBeyond)] = kept[n - 1 - i];
  if (bug == kAhead) __syncthreads();
}

// The same, 64 threads.
CK_KERNEL(64) ck_planted_static(const float* in, float* out, int64_t bug) {
  __shared__ float kept[64];
  const int i = threadIdx.x;
  if (bug != kUnwritten || i != 1) kept[i] = in[i];
  if (bug != kNoBarrier) __syncthreads();
  out[i] = kept[63 - i + (bug == kBeyond)];
}

// *sum = how many threads there are.
CK_KERNEL(256) ck_planted_count(int32_t* sum, int64_t bug) {
  if (bug == kPlainSum) *sum += 1;
  else atomicAdd(sum, 1);
}

// The last block to come adds up what the others have left.
CK_KERNEL(32) ck_planted_last(int64_t* partial, int32_t* arrived, int64_t bug) {
  if (threadIdx.x) return;
  partial[1 + blockIdx.x] = blockIdx.x;
  if (bug != kNoFence) __threadfence();
  if (atomicAdd(arrived, 1) != int(gridDim.x) - 1) return;
  if (bug != kNoFence) __threadfence();
  partial[0] = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) partial[0] += partial[1 + i];
}

// x[i] = the sum over the lanes of i's half of a warp.
CK_KERNEL(64) ck_planted_half_sum(float* x, int64_t bug) {
  const int lane = threadIdx.x % 32, offset = bug == kOutsideMask ? 16 : 8;
  unsigned mask = lane < 16 ? 0xffff : 0xffff0000;
  if (bug == kForeignMask) mask = 0xffff;
  if (bug == kHalfMask && lane < 16) mask = 0xff;
  if (bug == kHalfWarp && lane == 3) return;
  float v = x[threadIdx.x];
  if (bug == kTwoShuffles && lane == 0) v += __shfl_xor_sync(mask, v, 1);
  for (int d = offset; d; d /= 2) v += __shfl_xor_sync(mask, v, d);
  x[threadIdx.x] = v;
}

// out[i] = in[i ^ 1], from neighbor to neighbor through shared memory.
CK_KERNEL(32) ck_planted_neighbor(const float* in, float* out, int64_t bug) {
  CK_SHARED(float, kept);
  const int i = threadIdx.x;
  kept[i] = in[i];
  if (bug == kShuffleAsBarrier) __shfl_sync(~0u, i, 0);
  else __syncwarp();
  if (bug == kAhead && i == 0) kept[0] = 0;
  out[i] = kept[i ^ 1];
  if (bug == kAhead) __syncwarp();
}

// out[i] = i, by way of two arrays.
CK_KERNEL(32) ck_planted_either(float* out) {
  float x[2][4] = {}, y[2][4] = {};
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) (i < 2 ? x : y)[i % 2][j] = 4 * i + j;
  if (threadIdx.x < 16) out[threadIdx.x] = (threadIdx.x < 8 ? x : y)[threadIdx.x / 4 % 2][threadIdx.x % 4];
}

// From where the table says to where it says.
CK_KERNEL(32) ck_planted_through(const int64_t* table) {
  const int64_t* const row = table + 2 * blockIdx.x;
  reinterpret_cast<float*>(row[1])[threadIdx.x] = reinterpret_cast<const float*>(row[0])[threadIdx.x];
}

// Which lane each gets: out [4, 32].
CK_KERNEL(32) ck_shuffles(int32_t* out, int64_t width, int64_t by) {
  const int lane = threadIdx.x, w = int(width), d = int(by);
  out[lane] = __shfl_sync(~0u, lane, d, w);
  out[32 + lane] = __shfl_up_sync(~0u, lane, d, w);
  out[64 + lane] = __shfl_down_sync(~0u, lane, d, w);
  out[96 + lane] = __shfl_xor_sync(~0u, lane, d, w);
}

// out [10]: of 64 threads of which those with x != 0 say yes.
CK_KERNEL(64) ck_votes(const int32_t* x, int32_t* out) {
  const int i = threadIdx.x, yes = x[i];
  const int any = __syncthreads_or(yes), all = __syncthreads_and(yes), count = __syncthreads_count(yes);
  const unsigned ballot = __ballot_sync(~0u, yes);
  const int any_lane = __any_sync(~0u, yes), all_lanes = __all_sync(~0u, yes);
  atomicMax(out + 6, yes ? i : -1);
  atomicMin(out + 7, yes ? i : 64);
  atomicCAS(out + 8, 0, yes);
  atomicOr(out + 9, yes << i % 31);
  if (i) return;
  const int found[] = {any, all, count, __popc(ballot), any_lane, all_lanes};
  for (int k = 0; k < 6; ++k) out[k] = found[k];
}

// Elements of one type as another. No bug in it.
CK_KERNEL(256) ck_convert(const void* in, int64_t from, void* out, int64_t to, int64_t count, int64_t wide) {
  using namespace compaware;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    if (wide) store_wide(out, to, i, load_wide(in, from, i));
    else store(out, to, i, load(in, from, i));
  }
}

#define CK_PLANTED(X)                                                                                      \
  X(ck_planted_reverse) X(ck_planted_static) X(ck_planted_count) X(ck_planted_last) X(ck_planted_half_sum) \
  X(ck_planted_neighbor) X(ck_planted_through) X(ck_planted_either)                                       \
  X(ck_shuffles) X(ck_votes) X(ck_convert)
