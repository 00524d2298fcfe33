// X Y in fp64 for X in fp32 or fp64, whose elements are converted in registers. Free of torch.
//
// Included once per instruction set, whose namespace is CK_ISA (each_isa.h).
#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace compaware::CK_ISA {

// out [R, V vectors] += X [R, n] Y [n, V vectors]; the sums stay in registers.
template <int R, int V, class T>
CK_INLINE void tile(const T* X, int64_t row, int64_t column, const double* Y, int64_t width, int64_t n, double* out) {
  using P = Vector<double>;
  P sum[R][V] = {};
  for (int64_t j = 0; j < n; ++j) {
    const P* y = reinterpret_cast<const P*>(Y + j * width);
    for (int r = 0; r < R; ++r) {
      const double x = static_cast<double>(X[r * row + j * column]);
      for (int v = 0; v < V; ++v) sum[r][v] += x * y[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) reinterpret_cast<P*>(out + r * width)[v] += sum[r][v];
}

// out [m, width] += X [m, n] Y [n, width]. Y and out are contiguous and aligned to vectors, and width is a multiple of
// the lanes. `row` and `column` are the strides of X.
template <class T>
void wide_product(const T* X, int64_t row, int64_t column, const double* Y, int64_t width, int64_t m, int64_t n,
                  double* out) {
  constexpr int L = kLanes<double>, R = L, V = 3;  // R * V sums fill 24 of 32 registers, or 12 of 16
  constexpr int64_t depth = 512;                   // rows of Y that stay in the cache
  const auto tiles = [&]<int rows>(int64_t i, int64_t j, int64_t depth_here) {
    const T* x = X + i * row + j * column;
    int64_t c = 0;
    for (; c + V * L <= width; c += V * L)
      tile<rows, V>(x, row, column, Y + j * width + c, width, depth_here, out + i * width + c);
    for (; c < width; c += L)
      tile<rows, 1>(x, row, column, Y + j * width + c, width, depth_here, out + i * width + c);
  };
  for (int64_t j = 0; j < n; j += depth) {
    const int64_t here = std::min(depth, n - j);
    int64_t i = 0;
    for (; i + R <= m; i += R) tiles.template operator()<R>(i, j, here);
    for (; i < m; ++i) tiles.template operator()<1>(i, j, here);
  }
}

}  // namespace compaware::CK_ISA
