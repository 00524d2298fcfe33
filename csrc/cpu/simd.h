// Vectors of the instruction set that is compiled for, and what C++ does not offer for them.
//
// Included once per instruction set, whose namespace is CK_ISA (each_isa.h): GCC cuts vectors to the size that the function
// around them is compiled for, before it inlines that function into one compiled for more.
#include <cmath>
#include <cstdint>
#include <cstring>

#undef CK_INLINE
#define CK_INLINE inline __attribute__((always_inline))

namespace compaware::CK_ISA {

template <class T>
constexpr int kLanes = CK_VECTOR_BYTES / sizeof(T);

// Arithmetic, comparisons and ?: act lane by lane; a vector may alias its elements.
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

// Is any lane of a comparison true?
template <class Mask>
CK_INLINE bool any(Mask mask) {
  int64_t words[sizeof(Mask) / sizeof(int64_t)], all = 0;
  std::memcpy(words, &mask, sizeof(Mask));
  for (int64_t word : words) all |= word;
  return all != 0;
}

// Dot products [lanes] of x [m, lanes] and y. Four partial sums: a single one would wait for each addition to end.
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
