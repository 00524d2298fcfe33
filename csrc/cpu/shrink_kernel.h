// L1 and group shrinkage of the spans of one weight (core/shrink.h).
//
// Included once per instruction set, whose namespace is CK_ISA (each_isa.h).
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../core/shrink.h"
#include "simd.h"

namespace compaware::CK_ISA {

// ||2^exponent soft([x, bias], l1)||_2^2, accumulated in fp64 in 16 partial sums: a fixed order of additions that
// vectorizes.
template <bool scaled, class T, class C>
CK_INLINE double sum_of_squares(const T* x, int64_t n, C l1, const T* bias, int exponent) {
  constexpr int kSums = 16;
  double sums[kSums] = {};
  const auto square = [&](T element) {
    double v = soft(static_cast<C>(element), l1);
    if constexpr (scaled) v = std::ldexp(v, exponent);
    return v * v;
  };
  int64_t j = 0;
  for (; j + kSums <= n; j += kSums)
    for (int k = 0; k < kSums; ++k) sums[k] += square(x[j + k]);
  for (int k = 0; j < n; ++j, ++k) sums[k] += square(x[j]);
  double total = bias ? square(*bias) : 0;
  for (double sum : sums) total += sum;
  return total;
}

// The factor of a row, from its norm. Rows of fp64 whose squares over- or underflow are scaled by a power of two first.
template <class T, class C>
CK_INLINE C row_scale(const T* x, int64_t n, C l1, const T* bias, double tau) {
  const double total = sum_of_squares<false>(x, n, l1, bias, 0);
  if constexpr (sizeof(C) == sizeof(double)) {
    if (!(total > 1e-280 && total < 1e300)) {
      double largest = bias ? std::abs(soft<C>(*bias, l1)) : 0;
      for (int64_t j = 0; j < n; ++j) largest = std::max(largest, std::abs(soft<C>(x[j], l1)));
      if (largest > 0 && std::isfinite(largest)) {
        const int exponent = -std::ilogb(largest);
        const double norm = std::sqrt(sum_of_squares<true>(x, n, l1, bias, exponent));
        return group_scale(norm, std::ldexp(tau, exponent));
      }
    }
  }
  return static_cast<C>(group_scale(std::sqrt(total), tau));
}

// y = group_shrink(soft(x, l1), tau), computed in C. tau null: the group stage is skipped.
template <class T, class C>
void shrink_span(const T* x, T* y, int64_t n, C l1, const C* tau, T* bias) {
  const C scale = tau ? row_scale(x, n, l1, bias, static_cast<double>(*tau)) : C(1);
  for (int64_t j = 0; j < n; ++j) y[j] = static_cast<T>(soft(static_cast<C>(x[j]), l1) * scale);
  if (bias) *bias = static_cast<T>(soft(static_cast<C>(*bias), l1) * scale);
}

// Spans [begin, end).
template <class T, class C>
void shrink_spans(const Shrink& w, int64_t begin, int64_t end) {
  const int64_t per_matrix = w.spans_per_matrix();
  for (int64_t i = begin; i < end; ++i) {
    const int64_t k = i / per_matrix, start = i % per_matrix * w.span, n = std::min(w.span, w.size - start);
    const auto x = static_cast<const T*>(w.in) + k * w.size + start;
    const auto y = static_cast<T*>(w.out) + k * w.size + start;
    const C l1 = w.l1.data ? static_cast<C>(w.l1.data[k * w.l1.step]) : C(0);
    const C tau = w.tau.data ? static_cast<C>(w.tau.data[k * w.tau.step]) : C(0);
    shrink_span(x, y, n, l1, w.tau.data ? &tau : nullptr, w.bias ? static_cast<T*>(w.bias) + i : nullptr);
  }
}

inline void shrink(const Shrink& w, int64_t begin, int64_t end) {
  switch (w.dtype) {
    case DType::f64: return shrink_spans<double, double>(w, begin, end);
    case DType::f32: return shrink_spans<float, float>(w, begin, end);
    case DType::f16: return shrink_spans<torch::headeronly::Half, float>(w, begin, end);
    case DType::bf16: return shrink_spans<torch::headeronly::BFloat16, float>(w, begin, end);
  }
}

}  // namespace compaware::CK_ISA
