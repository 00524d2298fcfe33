// Both products of a low-rank convolution, a tile of pixels at a time: the intermediate of rank r stays in the cache.
// Free of torch. Included once per instruction set, whose namespace is CK_ISA (each_isa.h).
//
// Each product multiplies rows, found through one pointer per pixel and tap of the kernel (no im2col; padding points to
// zeros), by a weight packed in panels of as many columns as the registers hold.
#include <algorithm>
#include <cstdint>
#include <utility>

#include "simd.h"
#include "lowrank_work.h"

namespace compaware::CK_ISA {

// Left operand of a product: row i of tap t is at[t * stride + i] + offset, `depth` floats long.
struct Rows {
  const float* const* at;
  int64_t stride, taps, depth, offset;
  int64_t fresh;  // taps from `fresh` on prefetch the rows of the next tile
};

// Epilogue of a tile: bias and `from` (in the layout of C: the residual, or C itself) are added to the sums unless they
// are null, and the sums are clamped.
struct Ends {
  const float *from = nullptr, *bias = nullptr;
  bool clamp = false;
  float low = 0, high = 0;
  int64_t ahead = 0;  // distance of the next tile in floats, which is prefetched; 0: none
};

constexpr int64_t kPiece = 8192;  // floats of a panel that fit in L1
constexpr int64_t kLine = 16;     // floats per cache line

constexpr int L = kLanes<float>;
constexpr int kNarrow = L < kPackColumns ? L : kPackColumns;
static_assert(kPackColumns % kNarrow == 0 && L % kNarrow == 0);

using Wide = Vector<float>;
typedef float Narrow __attribute__((vector_size(kNarrow * sizeof(float))));
template <class P>
constexpr int kWidth = sizeof(P) / sizeof(float);

// A panel is 1 to kVectors vectors wide, or one narrow vector, where whole ones would waste half of their lanes. The
// sums of rows_at_once rows, one row of the panel and one input fill the registers (32 with AVX-512, else 16).
constexpr int kVectors = L == 16 ? 4 : 2;
constexpr int64_t kPanel = kVectors * L;
constexpr int rows_at_once(int V) { return L == 16 ? (V == 4 ? 6 : V == 3 ? 8 : 10) : (V == 2 ? 6 : 8); }

// Width of the next panel, of `left` columns (padded).
inline int64_t panel_width(int64_t left) { return left >= kPanel ? kPanel : left > L ? left / L * L : left; }

// f(0), ..., f(N - 1), with constants: arrays that they index stay in registers.
template <int N, class F>
CK_INLINE void unrolled(F f) {
  [&]<int... n>(std::integer_sequence<int, n...>) CK_ALWAYS {
    (f(std::integral_constant<int, n>()), ...);
  }(std::make_integer_sequence<int, N>());
}

template <class P>
CK_INLINE P load(const float* p) {
  P v;
  std::memcpy(&v, p, sizeof(P));
  return v;
}

// C [R, V vectors] = rows i .. i + R of A times B [taps depth, V vectors], with epilogue.
template <class P, int V, int R>
__attribute__((noinline)) void tile(const Rows& A, int64_t i, const float* B, int64_t B_tap, float* C, int64_t ldc,
                                    const Ends& ends) {
  constexpr int W = kWidth<P>;
  P sum[R * V] = {};
  const auto each = [&](auto change) CK_ALWAYS {  // change(sum, its offset in C, its column)
    unrolled<R * V>([&](auto n) CK_ALWAYS { change(sum[n], n / V * ldc + n % V * W, n % V * W); });
  };
  if (ends.ahead) {
    each([&](P&, int64_t at, int) CK_ALWAYS { __builtin_prefetch(C + ends.ahead + at, 1, 3); });
    if (ends.from) each([&](P&, int64_t at, int) CK_ALWAYS { __builtin_prefetch(ends.from + ends.ahead + at, 0, 3); });
  }
  int64_t t = 0;
  do {
    const float* a[R];
    unrolled<R>([&](auto m) CK_ALWAYS { a[m] = A.at[t * A.stride + i + m] + A.offset; });
    if (t >= A.fresh)
      for (int64_t m = i + R; m < std::min(i + 2 * R, A.stride); ++m)
        for (int64_t k = 0; k < A.depth; k += kLine) __builtin_prefetch(A.at[t * A.stride + m] + A.offset + k, 0, 3);
    const float* b = B + t * B_tap;
    int64_t k = 0;
    do {
      P row[V];
      unrolled<V>([&](auto v) CK_ALWAYS { row[v] = load<P>(b + v * W); });
      unrolled<R>([&](auto m) CK_ALWAYS {
        const float x = a[m][k];
        unrolled<V>([&](auto v) CK_ALWAYS { sum[m * V + v] += x * row[v]; });
      });
      b += V * W;
    } while (++k < A.depth);
  } while (++t < A.taps);
  if (ends.bias) each([&](P& s, int64_t, int column) CK_ALWAYS { s += load<P>(ends.bias + column); });
  if (ends.from) each([&](P& s, int64_t at, int) CK_ALWAYS { s += load<P>(ends.from + at); });
  if (ends.clamp)
    each([&](P& s, int64_t, int) CK_ALWAYS {  // this form propagates NaN
      s = s < ends.low ? P{} + ends.low : s;
      s = s > ends.high ? P{} + ends.high : s;
    });
  each([&](const P& s, int64_t at, int) CK_ALWAYS { std::memcpy(C + at, &s, sizeof(P)); });
}

template <class P, int V, int R, class... Args>
CK_INLINE void tile_of(int64_t rows, const Args&... args) {
  if constexpr (R > 1)
    if (rows < R) return tile_of<P, V, R - 1>(rows, args...);
  tile<P, V, R>(args...);
}

// A tile at the right edge of C, whose rows are not padded: computed in a padded buffer.
template <class P, int V, int R>
void edge(int64_t rows, int64_t columns, const Rows& A, int64_t i, const float* B, int64_t B_tap, float* C, int64_t ldc,
          Ends ends) {
  constexpr int64_t ld = V * kWidth<P>;
  float sums[R * ld] = {}, bias[ld] = {};
  const auto move = [&](float* to, int64_t to_ld, const float* from, int64_t from_ld, int64_t count) {
    for (int64_t m = 0; m < count; ++m) std::memcpy(to + m * to_ld, from + m * from_ld, columns * sizeof(float));
  };
  if (ends.from) move(sums, ld, ends.from, ldc, rows), ends.from = sums;
  if (ends.bias) move(bias, 0, ends.bias, 0, 1), ends.bias = bias;
  tile_of<P, V, R>(rows, A, i, B, B_tap, static_cast<float*>(sums), ld, ends);
  move(C, ldc, sums, ld, rows);
}

// One panel of V vectors, of which `columns` columns are stored: rows i .. i + count, in tiles of nearly equal height.
template <class P, int V>
void panel(int64_t i, int64_t count, int64_t columns, const Rows& A, const float* B, int64_t B_tap, float* C,
           int64_t ldc, Ends ends) {
  constexpr int R = rows_at_once(V);
  const int64_t groups = (count + R - 1) / R;
  const float* from = ends.from;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t rows = groups == 1 ? count : count / groups + (g < count % groups);
    float* c = C + i * ldc;
    if (from) ends.from = from + i * ldc;
    if (columns == V * kWidth<P>) tile_of<P, V, R>(rows, A, i, B, B_tap, c, ldc, ends);
    else edge<P, V, R>(rows, columns, A, i, B, B_tap, c, ldc, ends);
    i += rows;
  }
}

template <int V = kVectors, class... Args>
CK_INLINE void panel_of(int64_t wide, const Args&... args) {
  if constexpr (V > 1) {
    if (wide < V * L) return panel_of<V - 1>(wide, args...);
  } else if constexpr (kNarrow < L) {
    if (wide < L) return panel<Narrow, 1>(args...);
  }
  panel<Wide, V>(args...);
}

// C [count, columns] = clamp(A B + bias + from), `step` rows at a time; split along the sum so that each piece of a
// panel stays in L1.
inline void product(int64_t count, int64_t step, const Rows& A, const float* B, int64_t columns, float* C, int64_t ldc,
                    const Ends& ends) {
  const int64_t most = kPiece / std::min(kPanel, padded(columns));
  const int64_t cuts = (A.depth + most - 1) / most, depth = (A.depth + cuts - 1) / cuts;
  const int64_t taps = std::max<int64_t>(1, most / A.depth);
  for (int64_t i = 0; i < count; i += step)
    for (int64_t t = 0; t < A.taps; t += taps)
      for (int64_t k = 0; k < A.depth; k += depth) {
        const int64_t rows = std::min(step, count - i);
        const Rows part{A.at + t * A.stride, A.stride, std::min(taps, A.taps - t), std::min(depth, A.depth - k),
                        A.offset + k, A.fresh - t};
        const bool first = t == 0 && k == 0, last = t + taps >= A.taps && k + depth >= A.depth;
        const float *from = first ? ends.from : C, *bias = first ? ends.bias : nullptr;
        for (int64_t j = 0, wide; j < columns; j += wide) {
          wide = panel_width(padded(columns) - j);
          const float* b = B + j * A.taps * A.depth + (t * A.depth + k) * wide;
          const Ends at{from ? from + j : nullptr, bias ? bias + j : nullptr, last && ends.clamp,
                        ends.low, ends.high, !ends.ahead ? 0 : j + wide < columns ? wide : rows * ldc - j};
          panel_of(wide, i, rows, std::min(wide, columns - j), part, b, A.depth * wide, C + j, ldc, at);
        }
      }
}

// Input pointers of a tile: rows[tap * count + i] for its i-th pixel, `zeros` in the padding.
inline void find_rows(const LowRankConv& conv, int64_t first, int64_t count, const float* zeros,
                      const float** rows) {
  const Axis &h = conv.h, &w = conv.w;
  for (int64_t i = 0, run; i < count; i += run) {  // pixels of one row of one image
    const int64_t line = (first + i) / w.out, ow = (first + i) % w.out, oh = line % h.out, n = line / h.out;
    run = std::min(count - i, w.out - ow);
    for (int64_t tap = 0; tap < conv.taps(); ++tap) {
      const int64_t ih = oh * h.stride - h.padding + tap / w.kernel * h.dilation;
      const int64_t iw = ow * w.stride - w.padding + tap % w.kernel * w.dilation;
      const int64_t width = ih >= 0 && ih < h.in ? w.in : 0;
      const float* line_at = conv.x + (n * h.in + ih) * w.in * conv.C;
      const float** out = rows + tap * count + i;
      for (int64_t p = 0; p < run; ++p) {
        const int64_t column = iw + p * w.stride;
        out[p] = column >= 0 && column < width ? line_at + column * conv.C : zeros;
      }
    }
  }
}

// Pixels first .. first + count. Scratch: T [count, padded r], aligned; rows: (taps + 1) * count pointers.
inline void lowrank_tile(const LowRankConv& conv, int64_t first, int64_t count, const float* zeros, const float** rows,
                         float* T) {
  const int64_t C = conv.C / conv.G, O = conv.O / conv.G, r = conv.r, ldt = padded(r), taps = conv.taps();
  const float** T_rows = rows + taps * count;
  for (int64_t i = 0; i < count; ++i) T_rows[i] = T + i * ldt;
  find_rows(conv, first, count, zeros, rows);
  for (int64_t g = 0; g < conv.G; ++g) {
    const float* V = conv.packed + g * packed_group(taps, C, r, O);
    const Rows input{rows, count, taps, C, g * C, taps - conv.w.kernel};
    product(count, count, input, V, ldt, T, ldt, Ends{});
    const int64_t at = first * conv.O + g * O;
    const Ends ends{conv.residual ? conv.residual + at : nullptr, conv.bias ? conv.bias + g * O : nullptr,
                    conv.low > -INFINITY, conv.low, conv.high, 1};
    // Whole rows of y, a few at a time: sequential writes are fastest.
    product(count, rows_at_once(kVectors), {T_rows, count, 1, r, 0, 1}, V + packed_first(taps, C, r), O, conv.y + at,
            conv.O, ends);
  }
}

// Packs a factor in panels; padded columns are zero.
inline void pack(const Factor& W, float* out) {
  for (int64_t j = 0, wide; j < padded(W.columns); j += wide) {
    wide = panel_width(padded(W.columns) - j);
    for (int64_t k = 0; k < W.depth(); ++k)
      for (int64_t c = 0; c < wide; ++c) *out++ = j + c < W.columns ? W.at(j + c, k) : 0.0f;
  }
}

// Whether `samples` entries, spread over the factor, agree with the packed ones.
inline bool is_packed(const Factor& W, const float* packed, int64_t samples) {
  const int64_t size = W.columns * W.depth(), step = std::max<int64_t>(1, size / samples);
  for (int64_t i = 0; i < size; i += step) {
    const int64_t j = i / W.depth(), k = (i + j) % W.depth();
    int64_t panel = j / kPanel * kPanel, wide = panel_width(padded(W.columns) - panel);
    if (j >= panel + wide) panel += wide, wide = panel_width(padded(W.columns) - panel);  // the narrow one
    const float value = W.at(j, k);
    if (std::memcmp(&value, packed + panel * W.depth() + k * wide + j - panel, sizeof(float)) != 0) return false;
  }
  return true;
}

}  // namespace compaware::CK_ISA
