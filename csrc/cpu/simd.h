// SIMD vectors of one instruction set, and operations on them that C++ lacks.
//
// Included once per instruction set, whose namespace is CK_ISA (each_isa.h). One shared copy would not do: GCC splits
// vectors to fit the target of the function they are in before it inlines that function into a wider target.
#include <cmath>
#include <cstdint>
#include <cstring>

#undef CK_INLINE
#undef CK_ALWAYS
#define CK_ALWAYS __attribute__((always_inline))  // of a lambda
#define CK_INLINE inline CK_ALWAYS

namespace compaware::CK_ISA {

template <class T>
constexpr int kLanes = CK_VECTOR_BYTES / sizeof(T);

// Arithmetic, comparisons and ?: are elementwise. A vector may alias its elements.
template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(CK_VECTOR_BYTES)));
};

template <class T>
using Vector = typename VectorOf<T>::type;

template <class V>
CK_INLINE V square_root(V x) {
  V y{};
  for (unsigned lane = 0; lane < sizeof(V) / sizeof(x[0]); ++lane) y[lane] = std::sqrt(x[lane]);
  return y;
}

// Whether any lane of a comparison is true.
template <class Mask>
CK_INLINE bool any(Mask mask) {
  int64_t words[sizeof(Mask) / sizeof(int64_t)], all = 0;
  std::memcpy(words, &mask, sizeof(Mask));
  for (int64_t word : words) all |= word;
  return all != 0;
}

// Dot products [lanes] of x [m, lanes] and y [m, lanes]. Four partial sums hide the latency of the additions.
template <class V>
CK_INLINE V dot(const V* x, const V* y, int64_t m) {
  V sums[4] = {};
  int64_t i = 0;
  for (; i + 4 <= m; i += 4)
    for (int k = 0; k < 4; ++k) sums[k] += x[i + k] * y[i + k];
  for (; i < m; ++i) sums[0] += x[i] * y[i];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

}  // namespace compaware::CK_ISA
