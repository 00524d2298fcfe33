// X Y in fp64 for X in fp32 or fp64, converted a tile at a time, and sums of squares in fp64. Free of torch.
//
// Included once per instruction set, whose namespace is CK_ISA (each_isa.h).
#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace compaware::CK_ISA {

constexpr int64_t kDepth = 128;  // rows of Y that stay in the cache with a tile of X

// out [R, V vectors] += x [R, depth] Y [depth, V vectors]; the sums stay in registers. Element (r, j) of x is at
// r * row + j * column.
template <int R, int V, int64_t row, int64_t column>
CK_INLINE void tile(const double* x, const double* Y, int64_t width, int64_t depth, double* out) {
  using P = Vector<double>;
  P sum[R][V] = {};
  for (int64_t j = 0; j < depth; ++j) {
    const P* y = reinterpret_cast<const P*>(Y + j * width);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sum[r][v] += x[r * row + j * column] * y[v];
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) reinterpret_cast<P*>(out + r * width)[v] += sum[r][v];
}

// out [R, width] += x [R, depth] Y [depth, width], by tiles of 3 vectors, then of 2 or 1.
template <int R, int64_t row, int64_t column>
CK_INLINE void tiles(const double* x, const double* Y, int64_t width, int64_t depth, double* out) {
  constexpr int L = kLanes<double>;
  int64_t c = 0;
  for (; c + 3 * L <= width; c += 3 * L) tile<R, 3, row, column>(x, Y + c, width, depth, out + c);
  if (c + 2 * L <= width) {
    tile<R, 2, row, column>(x, Y + c, width, depth, out + c);
    c += 2 * L;
  }
  if (c < width) tile<R, 1, row, column>(x, Y + c, width, depth, out + c);
}

// out [m, width] += X [m, n] Y [n, width]. Y and out are contiguous and aligned to vectors, and width is a multiple of
// the lanes. `row` and `column` are the strides of X, of which a tile at a time is converted.
template <class T>
void wide_product(const T* X, int64_t row, int64_t column, const double* Y, int64_t width, int64_t m, int64_t n,
                  double* out) {
  constexpr int R = kLanes<double>;  // R times 3 sums fill 24 of 32 registers, or 12 of 16
  alignas(64) double x[R * kDepth];
  for (int64_t j = 0; j < n; j += kDepth) {
    const int64_t depth = std::min(kDepth, n - j);
    for (int64_t i = 0; i < m; i += R) {
      const T* from = X + i * row + j * column;
      const double* y = Y + j * width;
      double* to = out + i * width;
      if (i + R > m) {  // the last rows, one by one
        for (; i < m; ++i, from += row, to += width) {
          for (int64_t d = 0; d < depth; ++d) x[d] = static_cast<double>(from[d * column]);
          tiles<1, kDepth, 1>(x, y, width, depth, to);
        }
      } else if (row == 1) {
        for (int64_t d = 0; d < depth; ++d)
          for (int r = 0; r < R; ++r) x[d * R + r] = static_cast<double>(from[d * column + r]);
        tiles<R, 1, R>(x, y, width, depth, to);
      } else {
        for (int r = 0; r < R; ++r)
          for (int64_t d = 0; d < depth; ++d) x[r * kDepth + d] = static_cast<double>(from[r * row + d * column]);
        tiles<R, kDepth, 1>(x, y, width, depth, to);
      }
    }
  }
}

// Sum of squares of x [n].
template <class T>
double square(const T* x, int64_t n) {
  using P = Vector<double>;
  constexpr int L = kLanes<double>;
  P sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L)
    for (int v = 0; v < 4; ++v) {
      P wide;
      for (int lane = 0; lane < L; ++lane) wide[lane] = static_cast<double>(x[i + v * L + lane]);
      sum[v] += wide * wide;
    }
  const P all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  double total = 0;
  for (int lane = 0; lane < L; ++lane) total += all[lane];
  for (; i < n; ++i) total += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return total;
}

}  // namespace compaware::CK_ISA
