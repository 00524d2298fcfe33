// SVD by one-sided Jacobi rotations (Hestenes 1958) of equally large matrices, one per SIMD lane.
//
// Pairs of columns are rotated until all are orthogonal: X V = U diag(s). All lanes go through the same pairs; a lane
// whose pair is orthogonal already rotates by zero, so no matrix depends on its neighbors. Included once per
// instruction set, whose namespace is CK_ISA (each_isa.h).
#include <algorithm>
#include <limits>

#include "simd.h"

namespace compaware::CK_ISA {

constexpr int kMaxSweeps = 30;      // 5 to 10 are usual; the limit is for NaN and Inf
constexpr int kScaleExponent = 20;  // matrices are scaled to max |x| in [2^19, 2^20): no square over- or underflows

// Columns with a smaller norm, far below the roundoff of the largest, count as zero and are not rotated.
template <class T>
constexpr T kNullNorm = sizeof(T) == 4 ? T(0x1p-14) : T(0x1p-58);

// A rotation by an angle in [-90, 90] degrees as three shears: tan(angle / 2), sin(angle), tan(angle / 2). It takes one
// operation less than c x - s y, s x + c y, and a rotation by zero changes no bit.
template <class P>
struct Rotation {
  P half, sine;
};

template <class P>
CK_INLINE void rotate(P& x, P& y, const Rotation<P>& r) {
  x -= r.half * y;
  y += r.sine * x;
  x -= r.half * y;
}

// The rotation that makes two columns with squared norms a, b and dot product d orthogonal, in the lanes of `mask`;
// a and b become the new squared norms, the larger one first (de Rijk 1989: saves two sweeps of nine).
template <class P, class Mask>
CK_INLINE Rotation<P> orthogonalize(P& a, P& b, P d, Mask mask) {
  const P zero{}, one = zero + 1, zeta = (b - a) / (d + d), sign = zeta < 0 ? -one : one;
  const P size = mask ? one / (sign * zeta + square_root(one + zeta * zeta)) : zero, t = sign * size;
  const P r = square_root(one + t * t), u = a - t * d, v = b + t * d;
  const auto swap = mask & (u < v);
  a = swap ? v : u;
  b = swap ? u : v;
  const P num = swap ? -sign : t;
  return {num / (r + (swap ? size : one)), num / r};
}

template <class T>
struct Jacobi {
  using P = Vector<T>;

  P* X;              // [n, stride]: a column [m], and below it that of V, which takes the same rotations
  P* norms;          // [n] squared norms of the columns
  int64_t m, n;      // n is even
  int64_t length;    // of a column with that of V, m + n, or m: without V
  int64_t stride;
  T tol;             // squared cosine up to which two columns are orthogonal

  CK_INLINE auto coupled(P a, P b, P d) const {
    const T null = kNullNorm<T> * kNullNorm<T>;
    return (d * d > tol * (a * b)) & (a > null) & (b > null);
  }

  CK_INLINE bool pair(int64_t p) {
    const int64_t size = length;
    P *x = X + p * stride, *y = x + stride, d = dot(x, y, m);
    const auto mask = coupled(norms[p], norms[p + 1], d);
    if (!any(mask)) return false;
    const Rotation<P> r = orthogonalize(norms[p], norms[p + 1], d, mask);
    for (int64_t i = 0; i < size; ++i) rotate(x[i], y[i], r);
    return true;
  }

  // Columns p, p + 1 against q, q + 1: four rotations in one pass over the memory. Dot products for the last two are
  // updated, not computed anew; this affects only the accuracy of the angles, as each sweep measures convergence anew.
  CK_INLINE bool block(int64_t p, int64_t q) {
    const int64_t rows = m, size = length;
    P *x0 = X + p * stride, *x1 = x0 + stride, *y0 = X + q * stride, *y1 = y0 + stride;
    P xx{}, yy{}, d00{}, d01{}, d10{}, d11{};
    for (int64_t i = 0; i < rows; ++i) {
      d00 += x0[i] * y0[i];
      d01 += x0[i] * y1[i];
      d10 += x1[i] * y0[i];
      d11 += x1[i] * y1[i];
      xx += x0[i] * x1[i];
      yy += y0[i] * y1[i];
    }
    P &a0 = norms[p], &a1 = norms[p + 1], &b0 = norms[q], &b1 = norms[q + 1];
    const auto mask00 = coupled(a0, b0, d00), mask11 = coupled(a1, b1, d11);
    if (!any(mask00 | mask11 | coupled(a0, b1, d01) | coupled(a1, b0, d10))) return false;

    const Rotation<P> r00 = orthogonalize(a0, b0, d00, mask00), r11 = orthogonalize(a1, b1, d11, mask11);
    rotate(xx, d10, r00);
    rotate(d01, yy, r00);
    rotate(xx, d01, r11);
    rotate(d10, yy, r11);
    const Rotation<P> r01 = orthogonalize(a0, b1, d01, coupled(a0, b1, d01));
    const Rotation<P> r10 = orthogonalize(a1, b0, d10, coupled(a1, b0, d10));
    for (int64_t i = 0; i < size; ++i) {
      P u0 = x0[i], u1 = x1[i], v0 = y0[i], v1 = y1[i];
      rotate(u0, v0, r00);
      rotate(u1, v1, r11);
      rotate(u0, v1, r01);
      rotate(u1, v0, r10);
      x0[i] = u0, x1[i] = u1, y0[i] = v0, y1[i] = v1;
    }
    return true;
  }

  CK_INLINE bool sweep() {
    for (int64_t j = 0; j < n; ++j) norms[j] = dot(X + j * stride, X + j * stride, m);
    bool rotated = false;
    for (int64_t p = 0; p < n; p += 2) {
      rotated |= pair(p);
      for (int64_t q = p + 2; q < n; q += 2) rotated |= block(p, q);
    }
    return rotated;
  }

  // Scales by a power of two, which is exact; by two factors, as a single one can be out of range.
  CK_INLINE void scale(int* exponents) {
    P largest{}, first{}, second{};
    for (int64_t j = 0; j < n; ++j)
      for (int64_t i = 0; i < m; ++i) {
        const P x = X[j * stride + i], size = x < 0 ? -x : x;
        largest = size > largest ? size : largest;
      }
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      std::frexp(largest[lane], exponents + lane);
      const int shift = kScaleExponent - exponents[lane];
      first[lane] = std::ldexp(T(1), shift / 2);
      second[lane] = std::ldexp(T(1), shift - shift / 2);
    }
    for (int64_t j = 0; j < n; ++j)
      for (int64_t i = 0; i < m; ++i) X[j * stride + i] = X[j * stride + i] * first * second;
  }

  CK_INLINE void normalize() {
    for (int64_t j = 0; j < n; ++j) {
      P* x = X + j * stride;
      norms[j] = square_root(dot(x, x, m));
      const P zero{}, scale = norms[j] <= kNullNorm<T> ? zero : (zero + 1) / norms[j];
      for (int64_t i = 0; i < m; ++i) x[i] *= scale;
    }
  }
};

// X [n, stride]: the columns of W [m], and below each that of the identity [n], or room for it; n is even. Leaves U in
// X, with zeros for zero singular values, and below it V, or, if there is a buffer Y [n, m], W^T U = V diag(s), for
// which no rotations of V are needed. norms [n]: unsorted, s times 2^(kScaleExponent - exponents [lanes]).
template <class T>
void jacobi(T* X, T* Y, T* norms, int* exponents, int64_t m, int64_t n, int64_t stride) {
  using P = Vector<T>;
  const T tol = std::numeric_limits<T>::epsilon() * std::sqrt(static_cast<T>(m));
  P *const x = reinterpret_cast<P*>(X), *const y = reinterpret_cast<P*>(Y);
  Jacobi<T> group{x, reinterpret_cast<P*>(norms), m, n, Y ? m : m + n, stride, tol * tol};
  group.scale(exponents);
  for (int64_t j = 0; Y && j < n; ++j) std::copy_n(x + j * stride, m, y + j * m);
  for (int k = 0; k < kMaxSweeps && group.sweep(); ++k) {
  }
  group.normalize();
  if (!Y) return;
  P first{}, second{};
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    const int shift = exponents[lane] - kScaleExponent;
    first[lane] = std::ldexp(T(1), shift / 2), second[lane] = std::ldexp(T(1), shift - shift / 2);
  }
  for (int64_t k = 0; k < n; ++k)
    for (int64_t j = 0; j < n; ++j) x[k * stride + m + j] = dot(x + k * stride, y + j * m, m) * first * second;
}

}  // namespace compaware::CK_ISA
