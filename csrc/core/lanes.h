// L numbers that are computed with at once, and what C++ does not say about them. Free of torch.
//
// Included once for every instruction set, which names its namespace CK_ISA: GCC cuts vectors to the size that the
// function around them is compiled for, before it inlines that function into one compiled for more.
#include <cmath>
#include <cstdint>
#include <cstring>

#undef CK_LANES_INLINE
#define CK_LANES_INLINE inline __attribute__((always_inline))

namespace compaware::CK_ISA {

// Arithmetic, comparisons and ?: go lane by lane; a pack may alias its elements.
template <class T, int L>
struct PackOf {
  typedef T type __attribute__((vector_size(L * sizeof(T))));
};

template <class T, int L>
using Pack = typename PackOf<T, L>::type;

template <class P>
CK_LANES_INLINE P root(P x) {
  P y{};
  for (unsigned lane = 0; lane < sizeof(P) / sizeof(x[0]); ++lane) y[lane] = std::sqrt(x[lane]);
  return y;
}

// Is any lane of a comparison true?
template <class Mask>
CK_LANES_INLINE bool any(Mask mask) {
  int64_t words[sizeof(Mask) / sizeof(int64_t)], all = 0;
  std::memcpy(words, &mask, sizeof(Mask));
  for (int64_t word : words) all |= word;
  return all != 0;
}

// Four sums: one would wait for each addition to end.
template <class P>
CK_LANES_INLINE P dot(const P* x, const P* y, int64_t m) {
  P sums[4] = {};
  int64_t i = 0;
  for (; i + 4 <= m; i += 4)
    for (int k = 0; k < 4; ++k) sums[k] += x[i + k] * y[i + k];
  for (; i < m; ++i) sums[0] += x[i] * y[i];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

}  // namespace compaware::CK_ISA
