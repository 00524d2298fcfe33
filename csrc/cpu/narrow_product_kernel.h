// Products of a matrix with a few columns, and sums of squares. Sums are in fp32 or fp64, whatever the matrix is in.
// Free of torch.
//
// Included once per instruction set, whose namespace is CK_ISA (each_isa.h).
#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace compaware::CK_ISA {

// out [R, V vectors] += x [R, depth] Y [depth, V vectors]; the sums stay in registers. Element (r, j) of x is at
// r * row + j * column.
template <int R, int V, int64_t row, int64_t column, class A>
CK_INLINE void tile(const A* x, const A* Y, int64_t stride, int64_t depth, A* out, int64_t out_stride) {
  using P = Vector<A>;
  P sum[R][V] = {};
  for (int64_t j = 0; j < depth; ++j) {
    const P* y = reinterpret_cast<const P*>(Y + j * stride);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sum[r][v] += x[r * row + j * column] * y[v];
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) reinterpret_cast<P*>(out + r * out_stride)[v] += sum[r][v];
}

// out [R, width] += x [R, depth] Y [depth, width], by tiles of 3 vectors, then of 2 or 1.
template <int R, int64_t row, int64_t column, class A>
CK_INLINE void tiles(const A* x, const A* Y, int64_t stride, int64_t width, int64_t depth, A* out, int64_t out_stride) {
  constexpr int L = kLanes<A>;
  int64_t c = 0;
  for (; c + 3 * L <= width; c += 3 * L) tile<R, 3, row, column>(x, Y + c, stride, depth, out + c, out_stride);
  if (c + 2 * L <= width) {
    tile<R, 2, row, column>(x, Y + c, stride, depth, out + c, out_stride);
    c += 2 * L;
  }
  if (c < width) tile<R, 1, row, column>(x, Y + c, stride, depth, out + c, out_stride);
}

// out [m, width] += X [m, n] Y [n, width]. Rows of Y and out have `stride` and `out_stride` numbers, and are aligned to
// vectors; width is a multiple of the lanes. `row` and `column` are the strides of X, of which a tile at a time is
// copied, and the next one prefetched.
template <class A, class T>
void narrow_product(const T* X, int64_t row, int64_t column, const A* Y, int64_t stride, int64_t width, int64_t m,
                    int64_t n, A* out, int64_t out_stride) {
  constexpr int R = CK_VECTOR_BYTES / 8;       // R times 3 sums fill 24 of 32 registers, or 12 of 16
  constexpr int both = 2 * R;                  // rows of a copied tile
  constexpr int64_t depth = 1024 / sizeof(A);  // rows of Y that stay in the cache with a tile of X
  constexpr int64_t line = 64 / sizeof(T);
  alignas(64) A x[both * depth];
  for (int64_t j = 0; j < n; j += depth) {
    const int64_t here = std::min(depth, n - j);
    const A* y = Y + j * stride;
    int64_t i = 0;
    for (; i + both <= m; i += both) {
      const T* from = X + i * row + j * column;
      if (row == 1) {
        for (int64_t d = 0; d < here; ++d) {
          __builtin_prefetch(from + d * column + both, 0, 2);
          for (int r = 0; r < both; ++r) x[d * both + r] = static_cast<A>(from[d * column + r]);
        }
        tiles<R, 1, both>(x, y, stride, width, here, out + i * out_stride, out_stride);
        tiles<R, 1, both>(x + R, y, stride, width, here, out + (i + R) * out_stride, out_stride);
      } else {
        for (int r = 0; r < both; ++r) {
          for (int64_t d = 0; d < here; d += line) __builtin_prefetch(from + (r + both) * row + d * column, 0, 2);
          for (int64_t d = 0; d < here; ++d) x[r * depth + d] = static_cast<A>(from[r * row + d * column]);
        }
        tiles<R, depth, 1>(x, y, stride, width, here, out + i * out_stride, out_stride);
        tiles<R, depth, 1>(x + R * depth, y, stride, width, here, out + (i + R) * out_stride, out_stride);
      }
    }
    for (; i < m; ++i) {  // the last rows, one by one
      for (int64_t d = 0; d < here; ++d) x[d] = static_cast<A>(X[i * row + (j + d) * column]);
      tiles<1, depth, 1>(x, y, stride, width, here, out + i * out_stride, out_stride);
    }
  }
}

// G [k, wide] = Y^T Y of the first k columns of Y [m, stride], in fp64; both triangles.
inline void gram(const float* Y, int64_t stride, int64_t m, int64_t k, double* G, int64_t wide, double* copy) {
  constexpr int64_t depth = 128, block = 48;
  for (int64_t j = 0; j < m; j += depth) {
    const int64_t here = std::min(depth, m - j);
    const float* y = Y + j * stride;
    for (int64_t d = 0; d < here; ++d)
      for (int64_t c = 0; c < k; ++c) copy[d * wide + c] = y[d * stride + c];
    for (int64_t c = 0; c < k; c += block)
      narrow_product(y + c, 1, stride, copy + c, wide, std::min(block, wide - c), k - c, here, G + c * wide + c, wide);
  }
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < i; ++j) G[j * wide + i] = G[i * wide + j];
}

// squares [width] += the squared lengths of the columns of Y [m, stride].
inline void add_squares(const float* Y, int64_t stride, int64_t m, int64_t width, double* squares) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < width; ++j) squares[j] += static_cast<double>(Y[i * stride + j]) * Y[i * stride + j];
}

// Y [m, stride]: column j *= scale[j].
inline void scale_columns(float* Y, int64_t stride, int64_t m, int64_t width, const float* scale) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < width; ++j) Y[i * stride + j] *= scale[j];
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
