// Orthogonal rows by one-sided Jacobi rotations (Hestenes 1958), in one block. Calling conventions: block.cuh.
//
// Rows are in groups of kGroup. A warp rotates all pairs of two groups while it holds their rows in registers, a lane
// every 32nd element of each row. Pairs without a common row are rotated together: the latencies of a step (products,
// sum over the lanes, angle, rotation) are paid once for kGroup pairs, and each lane computes the angle of one pair.
#pragma once

#include "sums.cuh"

namespace compaware {

// Rows [count, length] in memory, `stride` numbers apart.
template <class C>
struct Rows {
  C* at;
  int count, length, stride;
};

// Makes the compiler recompute what depends on x instead of keeping it in registers.
CK_DEVICE void forget([[maybe_unused]] int& x) {
#ifndef CK_EMULATED
  asm volatile("" : "+r"(x));
#endif
}

// Sums of kCount numbers over the warp: lane l gets the sum of number l % kCount.
template <int kCount, class C>
CK_DEVICE C spread_sum(C (&v)[kCount]) {
  const int lane = lane_index();
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2)
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const bool upper = lane & half;
      const C given = upper ? v[i] : v[i + half];
      v[i] = (upper ? v[i + half] : v[i]) + __shfl_xor_sync(kAllLanes, given, half);
    }
  C sum = v[0];
#pragma unroll
  for (int offset = kCount; offset < kWarp; offset *= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  return sum;
}

// The pairs of a step: row_x(i) and row_y(i), i < kPairs. Across: all rows of one group with all rows of another.
template <int kPairs>
struct Across {
  int x, y;  // the first rows
  static constexpr int kSteps = kPairs;

  CK_DEVICE int row_x(int i, int) const { return x + i; }
  CK_DEVICE int row_y(int i, int step) const { return y + (2 * kPairs - 1 - i + step) % kPairs; }
};

// Within: all rows of one group with each other; in a step, rows whose indices differ in the same bits.
template <int kPairs>
struct Within {
  int first;
  static constexpr int kSteps = 2 * kPairs - 1;

  CK_DEVICE int row_x(int i, int step) const {
    const int bits = kSteps - step, top = bits >= 4 ? 4 : bits >= 2 ? 2 : 1;
    return first + (i / top * 2 * top + i % top);
  }
  CK_DEVICE int row_y(int i, int step) const { return first + ((row_x(i, step) - first) ^ (kSteps - step)); }
};

// A rotation by at most 45 degrees as three shears, tan(angle / 2), sin(angle), tan(angle / 2), after which the two
// rows may be swapped. Each pair has its own lane.
template <class C>
struct Rotation {
  C half, sine;
  bool swap;
};

// Elements start + lane, start + lane + 32, ... of the pairs of a step, in registers.
template <int kPairs, int kDeep, class C>
struct Tile {
  C x[kPairs][kDeep], y[kPairs][kDeep];

  template <class Meeting>
  CK_DEVICE void load(Rows<C> M, const Meeting& meeting, int step, int start) {
    forget(M.count), forget(M.length), forget(M.stride), forget(start);
#pragma unroll
    for (int i = 0; i < 2 * kPairs; ++i) {
      const int row = i < kPairs ? meeting.row_x(i, step) : meeting.row_y(i - kPairs, step);
#pragma unroll
      for (int e = 0; e < kDeep; ++e) {
        const int at = start + kWarp * e + lane_index();
        C& element = i < kPairs ? x[i % kPairs][e] : y[i % kPairs][e];
        element = row < M.count && at < M.length ? M.at[row * M.stride + at] : C(0);
      }
    }
  }
  template <class Meeting>
  CK_DEVICE void store(Rows<C> M, const Meeting& meeting, int step, int start) const {
    forget(M.count), forget(M.length), forget(M.stride), forget(start);
#pragma unroll
    for (int i = 0; i < 2 * kPairs; ++i) {
      const int row = i < kPairs ? meeting.row_x(i, step) : meeting.row_y(i - kPairs, step);
#pragma unroll
      for (int e = 0; e < kDeep; ++e) {
        const int at = start + kWarp * e + lane_index();
        const C element = i < kPairs ? x[i % kPairs][e] : y[i % kPairs][e];
        if (row < M.count && at < M.length) M.at[row * M.stride + at] = element;
      }
    }
  }

  CK_DEVICE void add_squares(C (&a)[kPairs], C (&b)[kPairs]) const {
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
#pragma unroll
      for (int e = 0; e < kDeep; ++e) a[i] += x[i][e] * x[i][e], b[i] += y[i][e] * y[i][e];
  }

  CK_DEVICE void add_products(C (&d)[kPairs]) const {
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
#pragma unroll
      for (int e = 0; e < kDeep; ++e) d[i] += x[i][e] * y[i][e];
  }

  CK_DEVICE void rotate(const Rotation<C>& own, unsigned swaps) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const C half = __shfl_sync(kAllLanes, own.half, i), sine = __shfl_sync(kAllLanes, own.sine, i);
#pragma unroll
      for (int e = 0; e < kDeep; ++e) {
        x[i][e] -= half * y[i][e];
        y[i][e] += sine * x[i][e];
        x[i][e] -= half * y[i][e];
      }
    }
    if (!swaps) return;
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
      if (swaps >> i & 1)
#pragma unroll
        for (int e = 0; e < kDeep; ++e) {
          const C kept = x[i][e];
          x[i][e] = y[i][e];
          y[i][e] = kept;
        }
  }

  // Moves on to the next step of Across.
  CK_DEVICE void move_on() {
#pragma unroll
    for (int e = 0; e < kDeep; ++e) {
      const C last = y[kPairs - 1][e];
#pragma unroll
      for (int i = kPairs - 1; i > 0; --i) y[i][e] = y[i - 1][e];
      y[0][e] = last;
    }
  }
};

constexpr int kTopExponent = 48;       // rows are scaled to entries below 2^48
constexpr float kNullRow = 0x1p-104f;  // above: squared norms, and ratios of norms, are in the range of fp32

CK_DEVICE float inverse(float x) { return rsqrt(x) * rsqrt(x); }  // of a positive number; faster than a division

// The rotation that makes rows with squared norms a, b and dot product d orthogonal; a and b become the new squared
// norms, the larger one first (de Rijk 1989: saves sweeps). fp32 is enough for the angle: its error leaves part of d to
// the next sweep. But the sine must match tan(angle / 2) in C, or the rotation would change the norms.
template <class C>
CK_DEVICE Rotation<C> find_rotation(C& a, C& b, C d, C tol) {
  const float scale = rsqrt(static_cast<float>(a)) * rsqrt(static_cast<float>(b));
  const C cosine = d * C(scale);
  if (!(min(a, b) > kNullRow && fabs(cosine) > tol)) return {0, 0, false};
  const float g = 2 * static_cast<float>(cosine), w = static_cast<float>(b - a) * scale, size = fabs(w);
  const float r = size < 1e9f ? rsqrt(size * size + g * g) : inverse(size);  // tan(2 angle) = g / w
  const float square = 0.5f + 0.5f * size * r, secant = rsqrt(square);       // of cos(angle), and its inverse
  const float slope = copysign(r * secant, w);                               // sin(angle) / cosine
  const C half = cosine * C(slope * inverse(1 + square * secant)), x = 1 + half * half;
  C y = C(inverse(static_cast<float>(x)));
  for (unsigned i = 4; i <= sizeof(C); i += 4) y += y * (1 - x * y);  // Newton: to 1 / x
  const C shift = cosine * C(slope * secant) * d, u = a - shift, v = b + shift;
  const bool swap = u < v;
  a = swap ? v : u;
  b = swap ? u : v;
  return {half, 2 * half * y, swap};
}

// The rotations of a step, of rows that are not in registers.
template <int kPairs, class C, class Meeting>
CK_DEVICE void rotate_in_place(const Rows<C>& M, const Meeting& meeting, int step, const Rotation<C>& own,
                               unsigned swaps) {
  for (int start = 0; start < M.length; start += kWarp) {
    Tile<kPairs, 1, C> tile;
    tile.load(M, meeting, step, start);
    tile.rotate(own, swaps);
    tile.store(M, meeting, step, start);
  }
}

// All pairs of two groups, by a warp. Returns whether any was rotated. V: rows that take the same rotations.
template <int kPairs, int kDeep, class C>
CK_DEVICE bool meet(const Rows<C>& A, const Rows<C>& V, const Across<kPairs>& meeting, C tol) {
  Tile<kPairs, kDeep, C> tile;
  tile.load(A, meeting, 0, 0);
  C x[kPairs] = {}, y[kPairs] = {};
  tile.add_squares(x, y);
  C a = spread_sum(x), b = spread_sum(y);
  bool rotated = false;
#pragma unroll 1
  for (int step = 0; step < meeting.kSteps; ++step) {
    C products[kPairs] = {};
    tile.add_products(products);
    const Rotation<C> own = find_rotation(a, b, spread_sum(products), tol);
    if (__any_sync(kAllLanes, own.half != 0)) {
      const unsigned swaps = __ballot_sync(kAllLanes, own.swap);
      tile.rotate(own, swaps);
      rotate_in_place<kPairs>(V, meeting, step, own, swaps);
      rotated = true;
    }
    tile.move_on();
    b = __shfl_sync(kAllLanes, b, (lane_index() + kPairs - 1) % kPairs);
  }
  if (rotated) tile.store(A, meeting, 0, 0);
  return rotated;
}
// The same with rows in memory, not in registers.
template <int kPairs, class C, class Meeting>
CK_DEVICE bool meet_in_place(const Rows<C>& A, const Rows<C>& V, const Meeting& meeting, C tol) {
  bool rotated = false;
  for (int step = 0; step < meeting.kSteps; ++step) {
    C x[kPairs] = {}, y[kPairs] = {}, products[kPairs] = {};
    for (int start = 0; start < A.length; start += kWarp) {
      Tile<kPairs, 1, C> tile;
      tile.load(A, meeting, step, start);
      tile.add_squares(x, y);
      tile.add_products(products);
    }
    C a = spread_sum(x), b = spread_sum(y);
    const Rotation<C> own = find_rotation(a, b, spread_sum(products), tol);
    if (!__any_sync(kAllLanes, own.half != 0)) continue;
    const unsigned swaps = __ballot_sync(kAllLanes, own.swap);
    rotate_in_place<kPairs>(A, meeting, step, own, swaps);
    rotate_in_place<kPairs>(V, meeting, step, own, swaps);
    rotated = true;
  }
  return rotated;
}

// All pairs of rows. Groups p and q are paired in round p + q modulo their number, and p with itself in round 2 p: this
// converges like a loop over p < q (the usual round-robin order needs more sweeps). Returns whether any was rotated.
template <int kGroup, int kDeep, class C>
__noinline__ CK_DEVICE bool sweep(Rows<C> A, Rows<C> V, C tol) {
  const int groups = (A.count + kGroup - 1) / kGroup;
  bool rotated = false;
  for (int round = 0; round < groups; ++round) {
    const int meetings = round % 2 ? (groups + 1) / 2 : groups / 2 + 1;
    for (int i = warp_index(); i < meetings; i += warp_count()) {
      const int p = (round / 2 + groups - i) % groups, q = (round - round / 2 + i) % groups;
      const int x = min(p, q) * kGroup, y = max(p, q) * kGroup;
      if constexpr (kDeep == 0) rotated |= x < y && meet_in_place<1>(A, V, Across<1>{x, y}, tol);
      else if (x < y) rotated |= meet<kGroup, kDeep>(A, V, Across<kGroup>{x, y}, tol);
      else rotated |= meet_in_place<kGroup / 2>(A, V, Within<kGroup / 2>{x}, tol);
    }
    __syncthreads();
  }
  return __syncthreads_or(rotated);
}

// As many rows at a time as fit in registers.
template <class C>
CK_DEVICE bool sweep(const Rows<C>& A, const Rows<C>& V, C tol) {
  if (A.length <= 2 * kWarp) return sweep<8, 2>(A, V, tol);
  if (A.length <= 4 * kWarp) return sweep<8, 4>(A, V, tol);
  if (A.length <= 5 * kWarp) return sweep<sizeof(C) == 4 ? 8 : 4, 5>(A, V, tol);
  if (A.length <= 8 * kWarp) return sweep<4, 8>(A, V, tol);
  return sweep<1, 0>(A, V, tol);
}

template <class C>
CK_DEVICE void scale_rows(const Rows<C>& A, int exponent) {
  for (int row = warp_index(); row < A.count; row += warp_count())
    for (int i = lane_index(); i < A.length; i += kWarp) {
      C& x = A.at[row * A.stride + i];
      x = ldexp(x, exponent);
    }
  __syncthreads();
}

template <class C>
CK_DEVICE C largest_entry(const Rows<C>& A) {
  C largest = 0;
  for (int row = warp_index(); row < A.count; row += warp_count())
    for (int i = lane_index(); i < A.length; i += kWarp) {
      const C x = fabs(A.at[row * A.stride + i]);
      largest = x > largest ? x : largest;
    }
  return block_max(largest);
}

// Rotates pairs of rows of A [count, length] until all are orthogonal up to roundoff, |a_i a_j| <= c |a_i| |a_j| with
// c = eps sqrt(length), down to rows 2^-100 as long as the longest. The rows of V [count, v_length] (null: none) take
// the same rotations. Returns how many of at most `sweeps` sweeps rotated anything.
template <class C>
CK_DEVICE int jacobi(C* A, int count, int length, int stride, C* V, int v_length, int v_stride, int sweeps) {
  const Rows<C> rows{A, count, length, stride}, others{V, count, V ? v_length : 0, v_stride};
  const C largest = largest_entry(rows);
  if (!(largest > 0 && is_finite(largest))) return 0;
  int exponent = 0, used = 0;
  frexp(largest, &exponent);
  scale_rows(rows, kTopExponent - exponent);
  const C tol = (sizeof(C) == 4 ? C(0x1p-23) : C(0x1p-52)) * sqrt(C(max(length, 16)));
  while (used < sweeps && sweep(rows, others, tol)) ++used;
  scale_rows(rows, exponent - kTopExponent);
  return used;
}

}  // namespace compaware
