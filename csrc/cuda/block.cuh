// Linear algebra by one block per matrix: Cholesky factors, inverses of triangular matrices, random numbers; and, in
// headers of their own, reductions and Jacobi rotations.
//
// All threads of a block call these functions, with blockDim.x a multiple of 32. Inputs must be visible to the block at
// the call (__syncthreads), and outputs are on return. Results do not depend on the number of threads.
#pragma once

#include "jacobi.cuh"
#include "portable.h"
#include "sums.cuh"

namespace compaware {

// --- random numbers -------------------------------------------------------------------------------------------------

struct Philox {
  uint32_t word[4];
};

// Philox4x32-10: Salmon, Moraes, Dror & Shaw, SC 2011.
CK_DEVICE Philox philox(Philox counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint32_t* c = counter.word;
    const uint64_t a = uint64_t(0xD2511F53u) * c[0], b = uint64_t(0xCD9E8D57u) * c[2];
    counter = {uint32_t(b >> 32) ^ c[1] ^ key0, uint32_t(b), uint32_t(a >> 32) ^ c[3] ^ key1, uint32_t(a)};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// The standard normal number of (seed, call, stream, index); call and stream count with their low 32 bits.
__noinline__ CK_DEVICE double normal(uint64_t seed, uint64_t call, uint64_t stream, uint64_t index) {
  const uint64_t pair = index / 2;
  const Philox bits = philox({{uint32_t(pair), uint32_t(pair >> 32), uint32_t(stream), uint32_t(call)}},
                             uint32_t(seed), uint32_t(seed >> 32));
  const uint64_t first = uint64_t(bits.word[0]) << 32 | bits.word[1];
  const uint64_t second = uint64_t(bits.word[2]) << 32 | bits.word[3];
  const double unit = 1.1102230246251565e-16;  // 2^-53
  const double radius = sqrt(-2 * log(double((first >> 11) + 1) * unit));
  const double angle = 2 * (double(second >> 11) * unit);  // in units of pi: sinpi and cospi need no local memory
  return radius * (index % 2 ? sinpi(angle) : cospi(angle));
}

// --- triangular factors ---------------------------------------------------------------------------------------------

constexpr int kPanel = 16;              // columns at a time
constexpr int kScratch = kPanel * 161;  // numbers: a panel of 16 columns up to n = 160, of 8 up to 321, of 4 up to 643

using Scratch = double[kScratch];

CK_DEVICE Scratch& scratch() {
  __shared__ Scratch memory;
  return memory;
}

// Factorizes a panel: `panel` [width, stride] has columns of G from their diagonal on, which become those of L. A pivot
// below its number in `limits` counts as zero. Each warp factorizes the diagonal block for itself, one row per lane:
// no barriers are needed.
CK_DEVICE void factorize_panel(Scratch& panel, int stride, int rows, int width, const double* limits) {
  const int lane = lane_index(), corner = lane % kPanel;
  const double limit = corner < width ? limits[corner] : 0;
  // Backwards, so that the diagonal block, which all warps read, is overwritten last.
  for (int first = (rows - 1) / blockDim.x * blockDim.x; first >= 0; first -= blockDim.x) {
    const int row = first + threadIdx.x;
    double x[kPanel], diagonal[kPanel];
#pragma unroll
    for (int c = 0; c < kPanel; ++c) {
      x[c] = c < width && row < rows ? panel[c * stride + row] : 0;
      diagonal[c] = c < width && corner < rows ? panel[c * stride + corner] : 0;
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kPanel; ++c) {
      if (c >= width) break;
      const double own = diagonal[c] > limit ? rsqrt(diagonal[c]) : 0, scale = __shfl_sync(kAllLanes, own, c);
      diagonal[c] = scale > 0 ? diagonal[c] * scale : 0;
      x[c] = scale > 0 ? x[c] * scale : 0;
#pragma unroll
      for (int d = c + 1; d < kPanel; ++d) {
        const double pivot = __shfl_sync(kAllLanes, diagonal[c], d);
        diagonal[d] -= diagonal[c] * pivot;
        x[d] -= x[c] * pivot;
      }
    }
#pragma unroll
    for (int c = 0; c < kPanel; ++c)
      if (c < width && row < rows) panel[c * stride + row] = x[c];
  }
  __syncthreads();
}

// G -= L L^T on and below the diagonal; G [rows, rows] with row stride n, L the last rows of `panel`. A warp computes
// tiles of 16 x 16, a lane 4 x 2 numbers of each.
CK_DEVICE void update(double* G, int n, int rows, const Scratch& panel, int stride, int width) {
  constexpr int kTile = 16, kDown = 4, kAcross = 2;
  const int lane = lane_index(), down = lane / 8, across = lane % 8, last = rows - 1;
  int tile = 0;
  for (int top = 0; top < rows; top += kTile)
    for (int left = 0; left <= top; left += kTile) {
      if (tile++ % warp_count() != warp_index()) continue;
      int r[kDown], c[kAcross];
      double sum[kDown][kAcross] = {};
      for (int i = 0; i < kDown; ++i) r[i] = min(top + down + 4 * i, last);
      for (int j = 0; j < kAcross; ++j) c[j] = min(left + across + 8 * j, last);
      for (int at = width; at < width + width * stride; at += stride)
        for (int i = 0; i < kDown; ++i)
          for (int j = 0; j < kAcross; ++j) sum[i][j] += panel[at + r[i]] * panel[at + c[j]];
      for (int i = 0; i < kDown; ++i)
        for (int j = 0; j < kAcross; ++j)
          if (top + down + 4 * i < rows && left + across + 8 * j <= r[i]) G[r[i] * n + c[j]] -= sum[i][j];
    }
}

// Cholesky factor L of G = L L^T [n, n], symmetric and positive semidefinite, in place; only the lower triangle is
// read, and the upper one becomes 0. A column whose pivot is at most `dependent` times G_jj (or NaN) is linearly
// dependent on those before it: its column of L becomes 0. Right-looking, in panels.
CK_DEVICE void cholesky(double* G, int n, double dependent) {
  Scratch& panel = scratch();
  int width = kPanel;
  while (width * (n | 1) > kScratch) width /= 2;
  const int lane = lane_index(), part = lane / kPanel, column = lane % kPanel;
  // The limits of the pivots are stored above the diagonal.
  for (int j = 1 + threadIdx.x; j < n; j += blockDim.x) G[j] = dependent * G[j * n + j];
  __shared__ double limits[kPanel];
  for (int first = 0; first < n; first += width) {
    const int rows = n - first, columns = min(width, rows), stride = rows | 1;
    double* corner = G + first * n + first;
    for (int row = 2 * warp_index() + part; row < rows; row += 2 * warp_count())
      if (column < columns) panel[column * stride + row] = column <= row ? corner[row * n + column] : 0;
    __syncthreads();
    for (int j = threadIdx.x; j < columns; j += blockDim.x) limits[j] = first + j ? G[first + j] : dependent * G[0];
    __syncthreads();
    factorize_panel(panel, stride, rows, columns, limits);
    for (int row = 2 * warp_index() + part; row < rows; row += 2 * warp_count())
      if (column < columns && column <= row) corner[row * n + column] = panel[column * stride + row];
    update(corner + columns * n + columns, n, rows - columns, panel, stride, columns);
    __syncthreads();
  }
  for (int row = warp_index(); row < n; row += warp_count())
    for (int j = row + 1 + lane; j < n; j += kWarp) G[row * n + j] = 0;
  __syncthreads();
}

// S = L^(-T) [n, n], upper triangular; rows and columns of S are 0 where the diagonal of L is. One thread computes one
// column of L^(-1), 16 numbers at a time; S is transposed at the end.
CK_DEVICE void inverse_transposed(const double* L, int n, double* S) {
  constexpr int kDeep = kScratch / kPanel;  // columns of L staged at a time
  Scratch& staged = scratch();              // [kPanel, kDeep]
  const auto stage = [&](int top, int left, int right) {
    __syncthreads();
    for (int i = warp_index(); i < kPanel; i += warp_count())
      for (int k = left + lane_index(); k < right; k += kWarp)
        staged[i * kDeep + k - left] = top + i < n ? L[(top + i) * n + k] : 0;
    __syncthreads();
  };
  for (int first = 0; first < n; first += blockDim.x) {
    const int j = first + threadIdx.x, above = first + kWarp * warp_index();  // before: zeros in this warp
    for (int top = 0; top < n; top += kPanel) {
      const int bottom = min(top + kPanel, n);
      double x[kPanel] = {};
      for (int left = 0; left < top; left += kDeep) {
        const int right = min(left + kDeep, top);
        stage(top, left, right);
        for (int k = max(left, above); k < right; ++k) {
          const double found = j < n ? S[k * n + j] : 0;
#pragma unroll
          for (int i = 0; i < kPanel; ++i) x[i] -= staged[i * kDeep + k - left] * found;
        }
      }
      stage(top, top, bottom);
      const int corner = lane_index() % kPanel;
      const double pivot = top + corner < n ? staged[corner * kDeep + corner] : 0, own = pivot == 0 ? 0 : 1 / pivot;
#pragma unroll
      for (int i = 0; i < kPanel; ++i) {
        if (top + i >= n) break;
        x[i] = (x[i] + (top + i == j)) * __shfl_sync(kAllLanes, own, i);
#pragma unroll
        for (int l = i + 1; l < kPanel; ++l) x[l] -= staged[l * kDeep + i] * x[i];
        if (j < n) S[(top + i) * n + j] = x[i];
      }
    }
  }
  __syncthreads();
  for (int row = warp_index(); row < n; row += warp_count())
    for (int j = lane_index(); j < row; j += kWarp) {
      S[j * n + row] = S[row * n + j];
      S[row * n + j] = 0;
    }
  __syncthreads();
}

}  // namespace compaware
