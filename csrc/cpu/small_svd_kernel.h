// Singular values by one-sided Jacobi rotations (Hestenes 1958) of L equally large matrices at once, one per lane.
//
// Columns are rotated in pairs until all are orthogonal: X V = U diag(s). Every lane goes through the same pairs, and
// one whose pair is orthogonal already is turned by nothing, so no matrix depends on its neighbours. Included once for
// every instruction set: see lanes.h.
#include <limits>

#include "simd.h"

namespace compaware::CK_ISA {

constexpr int kMaxSweeps = 30;      // 5 to 10 are usual; NaN and Inf must end too
constexpr int kScaleExponent = 20;  // matrices are scaled to max |x| in [2^19, 2^20): no square over- or underflows

// Columns shorter than this, far below the rounding of the longest, are null: they are left alone.
template <class T>
constexpr T kNullNorm = sizeof(T) == 4 ? T(0x1p-14) : T(0x1p-58);

// A rotation by an angle in [-90, 90] degrees as three shears: tan(angle / 2), sin(angle), tan(angle / 2). One
// operation less than c x - s y, s x + c y, and a turn by 0 changes no bit.
template <class P>
struct Turn {
  P half, sine;
};

template <class P>
CK_INLINE void turn(P& x, P& y, const Turn<P>& r) {
  x -= r.half * y;
  y += r.sine * x;
  x -= r.half * y;
}

// The turn that makes two columns with squared norms a, b and dot product d orthogonal, where `mask` says so, and its
// effect on a and b. The longer column comes first (de Rijk 1989): this saves two sweeps of nine.
template <class P, class Mask>
CK_INLINE Turn<P> orthogonalize(P& a, P& b, P d, Mask mask) {
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

  P* X;              // [n, stride]: a column, [m], and below it that of V, [n], which takes the same turns
  P* norms;          // [n]: squared norms of the columns
  int64_t m, n;      // n is even
  int64_t stride;
  T tol;             // squared cosine up to which two columns are orthogonal

  CK_INLINE auto coupled(P a, P b, P d) const {
    const T null = kNullNorm<T> * kNullNorm<T>;
    return (d * d > tol * (a * b)) & (a > null) & (b > null);
  }

  CK_INLINE bool pair(int64_t p) {
    const int64_t length = m + n;
    P *x = X + p * stride, *y = x + stride, d = dot(x, y, m);
    const auto mask = coupled(norms[p], norms[p + 1], d);
    if (!any(mask)) return false;
    const Turn<P> r = orthogonalize(norms[p], norms[p + 1], d, mask);
    for (int64_t i = 0; i < length; ++i) turn(x[i], y[i], r);
    return true;
  }

  // Columns p, p + 1 against q, q + 1: four turns in one pass over the memory. The last two follow from the dot
  // products before the first two, which costs accuracy of the angles only: fresh dot products judge convergence.
  CK_INLINE bool block(int64_t p, int64_t q) {
    const int64_t rows = m, length = m + n;
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

    const Turn<P> r00 = orthogonalize(a0, b0, d00, mask00), r11 = orthogonalize(a1, b1, d11, mask11);
    turn(xx, d10, r00);
    turn(d01, yy, r00);
    turn(xx, d01, r11);
    turn(d10, yy, r11);
    const Turn<P> r01 = orthogonalize(a0, b1, d01, coupled(a0, b1, d01));
    const Turn<P> r10 = orthogonalize(a1, b0, d10, coupled(a1, b0, d10));
    for (int64_t i = 0; i < length; ++i) {
      P u0 = x0[i], u1 = x1[i], v0 = y0[i], v1 = y1[i];
      turn(u0, v0, r00);
      turn(u1, v1, r11);
      turn(u0, v1, r01);
      turn(u1, v0, r10);
      x0[i] = u0, x1[i] = u1, y0[i] = v0, y1[i] = v1;
    }
    return true;
  }

  CK_INLINE bool sweep() {
    for (int64_t j = 0; j < n; ++j) norms[j] = dot(X + j * stride, X + j * stride, m);
    bool turned = false;
    for (int64_t p = 0; p < n; p += 2) {
      turned |= pair(p);
      for (int64_t q = p + 2; q < n; q += 2) turned |= block(p, q);
    }
    return turned;
  }

  // A power of two changes no digit. In two factors: one alone can be out of range.
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

// X: [n, stride], the columns of W, [m], and below each that of the identity, [n]; n is even. Leaves U in X, with zeros
// for null columns, V below it, and in norms, [n], s scaled by 2^(kScaleExponent - exponents), [L], in no order.
template <class T>
void jacobi(T* X, T* norms, int* exponents, int64_t m, int64_t n, int64_t stride) {
  using P = Vector<T>;
  const T tol = std::numeric_limits<T>::epsilon() * std::sqrt(static_cast<T>(m));
  Jacobi<T> group{reinterpret_cast<P*>(X), reinterpret_cast<P*>(norms), m, n, stride, tol * tol};
  group.scale(exponents);
  for (int k = 0; k < kMaxSweeps && group.sweep(); ++k) {
  }
  group.normalize();
}

}  // namespace compaware::CK_ISA
