// Leading eigenpairs of the Gram matrix of one small matrix, in fp64: Householder tridiagonalization, bisection by
// Sturm counts, inverse iteration, and the reflections applied to its vectors.
//
// Included once per instruction set, whose namespace is CK_ISA (each_isa.h). The vectors of bisection and of inverse
// iteration hold one eigenvalue per lane.
//
// Sources: Golub & Van Loan, Matrix Computations, 8.3 and 8.4; Peters & Wilkinson, SIAM Review 21(3), 1979 (inverse
// iteration); Barlow & Demmel, SIAM J. Numer. Anal. 27(3), 1990 (bisection).
#include <algorithm>
#include <limits>
#include <vector>

#include "simd.h"

namespace compaware::CK_ISA {

template <class T>
class GramEigh {
  static constexpr int L = kLanes<double>, kRows = 32, kSolves = 6;
  using P = Vector<double>;
  struct alignas(64) Line {
    char bytes[64];
  };

  const int64_t m, n, width;  // width: n, padded to whole vectors
  std::vector<Line> memory;
  P *G, *panel, *v, *w, *next, *Z;     // G, Z: rows of `width` doubles
  P *a, *b, *c, *f, *swapped, *y;      // of inverse iteration: per lane, P (T - x I) = (I + f) U, with U = (a, b, c)
  double *d, *e, *beta;                // diagonals of the tridiagonal matrix T; factors of the reflections
  double norm = 0;                  // >= ||T||_2

  double* row(P* A, int64_t i) const { return reinterpret_cast<double*>(A + i * (width / L)); }

  static double sum(P x) {
    double total = 0;
    for (int lane = 0; lane < L; ++lane) total += x[lane];
    return total;
  }

  double inner(const double* x, const double* y) const {
    return sum(dot(reinterpret_cast<const P*>(x), reinterpret_cast<const P*>(y), width / L));
  }

  void subtract(double* y, double c, const double* x) const {  // y -= c x
    for (int64_t j = 0; j < width / L; ++j) reinterpret_cast<P*>(y)[j] -= c * reinterpret_cast<const P*>(x)[j];
  }

  // Rows i .. i + 3 of G from column i on: the sum over kRows rows of the panel.
  void add_products(int64_t i) {
    for (int64_t j = i / L; j < width / L; ++j) {
      P sums[4] = {};
      for (int64_t k = 0; k < kRows; ++k) {
        const P* x = panel + k * (width / L);
        for (int r = 0; r < 4; ++r) sums[r] += reinterpret_cast<const double*>(x)[i + r] * x[j];
      }
      for (int r = 0; r < 4 && i + r < n; ++r) reinterpret_cast<P*>(row(G, i + r))[j] += sums[r];
    }
  }

  // G = X^T X, both triangles.
  void multiply(const T* X, int64_t row_stride, int64_t column_stride) {
    for (int64_t first = 0; first < m; first += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, m - first);
      std::fill_n(row(panel, rows), (kRows - rows) * width, 0.0);
      for (int64_t k = 0; k < rows; ++k)
        for (int64_t j = 0; j < n; ++j) row(panel, k)[j] = X[(first + k) * row_stride + j * column_stride];
      for (int64_t i = 0; i < n; i += 4) add_products(i);
    }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = i + 1; j < n; ++j) row(G, j)[i] = row(G, i)[j];
  }

  // T = Q^T G Q. Reflection k, I - beta v v^T, zeroes row k behind the superdiagonal; v replaces that row of G. The
  // update of one step, A -= v w^T + w v^T, and the product with v of the next take one pass over the memory.
  void tridiagonalize() {
    double *const y = row(next, 0), *const vs = row(v, 0), *const ws = row(w, 0);
    for (int64_t k = 0; k < n; ++k) {
      double* x = row(G, k);
      for (int64_t j = k; j < n; ++j) x[j] -= vs[k] * ws[j] + ws[k] * vs[j];
      d[k] = x[k];
      if (k + 1 == n) break;
      std::fill_n(x, k + 1, 0.0);
      const double head = x[k + 1];
      x[k + 1] = 0;
      const double rest = inner(x, x);
      const bool reflects = rest > 1e-280;  // else no more than rounding, as norms are near 1
      e[k] = reflects ? -std::copysign(std::sqrt(head * head + rest), head) : head;
      x[k + 1] = head - e[k];
      beta[k] = reflects ? 2 / (rest + x[k + 1] * x[k + 1]) : 0;
      std::fill_n(y, width, 0.0);
      for (int64_t i = k + 1; i < n; ++i) {
        P *a = reinterpret_cast<P*>(row(G, i)), total{};
        const P* u = reinterpret_cast<const P*>(x);
        const double vi = vs[i], wi = ws[i];
        for (int64_t j = (k + 1) / L; j < width / L; ++j) {
          a[j] -= vi * w[j] + wi * v[j];
          total += a[j] * u[j];
        }
        y[i] = beta[k] * sum(total);
      }
      subtract(y, beta[k] / 2 * inner(y, x), x);
      std::copy_n(x, width, vs);
      std::copy_n(y, width, ws);
    }
    for (int64_t i = 0; i < n; ++i)
      norm = std::max(norm, std::abs(d[i]) + (i ? std::abs(e[i - 1]) : 0) + (i + 1 < n ? std::abs(e[i]) : 0));
  }

  // Number of eigenvalues of T at or above x, per lane: of pivots of T - x I that are not negative.
  void count(const P (&x)[2], P (&found)[2]) const {
    const P zero{}, one = zero + 1, tiny = zero + norm * std::numeric_limits<double>::epsilon() * 1e-3;
    P q[2] = {one, one};
    found[0] = found[1] = zero;
    for (int64_t i = 0; i < n; ++i) {
      const double ee = i ? e[i - 1] * e[i - 1] : 0;
      for (int g = 0; g < 2; ++g) {  // two chains hide the latency of the division
        q[g] = d[i] - x[g] - ee / q[g];
        q[g] = (q[g] < tiny) & (q[g] > -tiny) ? -tiny : q[g];
        found[g] += q[g] < zero ? zero : one;
      }
    }
  }

  // The r largest eigenvalues, descending.
  void bisect(double floor, int64_t r, double* values) const {
    for (int64_t first = 0; first < r; first += 2 * L) {
      const P zero{};
      const P bottom = zero + floor, top = zero + norm * (1 + 1e-15) + std::numeric_limits<double>::min();
      P low[2] = {bottom, bottom}, high[2] = {top, top}, index[2], found[2];
      double wanted[2 * L];
      for (int64_t j = 0; j < 2 * L; ++j) wanted[j] = static_cast<double>(std::min(first + j, r - 1));
      std::memcpy(index, wanted, sizeof(wanted));
      for (int step = 0; step < 54; ++step) {
        const P middle[2] = {0.5 * (low[0] + high[0]), 0.5 * (low[1] + high[1])};
        count(middle, found);
        for (int g = 0; g < 2; ++g) {
          low[g] = found[g] > index[g] ? middle[g] : low[g];
          high[g] = found[g] > index[g] ? high[g] : middle[g];
        }
      }
      for (int64_t j = first; j < std::min(r, first + 2 * L); ++j)
        values[j] = 0.5 * (low[(j - first) / L][j % L] + high[(j - first) / L][j % L]);
    }
  }

  // Gaussian elimination of T - x I with row interchanges; U has the diagonals a, b, c.
  void factorize(P x) {
    const P zero{}, tiny = zero + norm * std::numeric_limits<double>::epsilon();
    P ua = d[0] - x, ub = zero + (n > 1 ? e[0] : 0);
    for (int64_t i = 0; i + 1 < n; ++i) {
      const P below = zero + e[i], da = d[i + 1] - x, db = zero + (i + 2 < n ? e[i + 1] : 0);
      const auto swap = (below < zero ? -below : below) > (ua < zero ? -ua : ua);
      P pivot = swap ? below : ua;
      pivot = pivot == zero ? tiny : pivot;
      const P other = swap ? ua : below;
      swapped[i] = swap ? zero + 1 : zero;
      f[i] = other / pivot, a[i] = pivot, b[i] = swap ? da : ub, c[i] = swap ? db : zero;
      ua = (swap ? ub : da) - f[i] * b[i];
      ub = (swap ? zero : db) - f[i] * c[i];
    }
    a[n - 1] = (ua < tiny) & (ua > -tiny) ? tiny : ua;
  }

  void solve(bool forward) {
    const P zero{};
    for (int64_t i = 0; forward && i + 1 < n; ++i) {
      const auto swap = swapped[i] > zero;
      const P top = swap ? y[i + 1] : y[i], under = swap ? y[i] : y[i + 1];
      y[i] = top, y[i + 1] = under - f[i] * top;
    }
    for (int64_t i = n - 1; i >= 0; --i) {
      P x = y[i];
      if (i + 1 < n) x -= b[i] * y[i + 1];
      if (i + 2 < n) x -= c[i] * y[i + 2];
      y[i] = x / a[i];
    }
  }

  // Makes row j of Z a unit vector, if `apart` orthogonal to the earlier ones; a second pass if the first lost digits.
  void orthonormalize(int64_t j, bool apart) {
    double* z = row(Z, j);
    double largest = 0;
    for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::abs(z[i]));
    for (int64_t i = 0; i < n; ++i) z[i] /= largest;
    for (double before = inner(z, z), after = 0; apart; before = after) {
      for (int64_t i = 0; i < j; ++i) subtract(z, inner(row(Z, i), z), row(Z, i));
      after = inner(z, z);
      if (!(after < 0.5 * before)) break;
    }
    const double scale = 1 / std::sqrt(inner(z, z));
    for (int64_t i = 0; i < n; ++i) z[i] *= scale;
  }

  double residual(const double* z, double x) const {  // ||T z - x z||_2
    double total = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double r = (d[i] - x) * z[i] + (i ? e[i - 1] * z[i - 1] : 0) + (i + 1 < n ? e[i] * z[i + 1] : 0);
      total += r * r;
    }
    return std::sqrt(total);
  }

  // Rows of Z: the eigenvectors of T. Returns the Frobenius norm of the residual.
  double iterate(int64_t r, const double* values) {
    const auto lanes = reinterpret_cast<double*>(y);
    const double enough = 4 * std::sqrt(static_cast<double>(n)) * std::numeric_limits<double>::epsilon() * norm;
    double total = 0;
    for (int64_t first = 0; first < r; first += L) {
      const int64_t count = std::min<int64_t>(L, r - first);
      P x{};
      for (int lane = 0; lane < L; ++lane) x[lane] = values[std::min<int64_t>(first + lane, r - 1)];
      factorize(x);
      uint64_t state = 88172645463325252ull + first;
      for (int64_t i = 0; i < n * L; ++i) {  // xorshift: another start for every eigenvalue
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        lanes[i] = static_cast<double>(state >> 11) * 0x1p-53 - 0.5;
      }
      double worst = std::numeric_limits<double>::infinity(), squares = 0;
      for (int step = 0; step < kSolves && !(step > 1 && worst <= enough); ++step) {
        solve(step > 0);
        worst = squares = 0;
        for (int64_t j = 0; j < count; ++j) {
          double* z = row(Z, first + j);
          for (int64_t i = 0; i < n; ++i) z[i] = lanes[i * L + j];
          orthonormalize(first + j, step > 0);
          for (int64_t i = 0; i < n; ++i) lanes[i * L + j] = z[i];
          const double left = residual(z, values[first + j]);
          worst = std::max(worst, left), squares += left * left;
        }
      }
      total += squares;
    }
    return std::sqrt(total);
  }

 public:
  GramEigh(int64_t m, int64_t n)
      : m(m), n(n), width((n + 4 + L - 1) / L * L),
        memory(((2 * n + kRows + 6) * width + 6 * n * L) * sizeof(double) / sizeof(Line) + 1),
        G(reinterpret_cast<P*>(memory.data())), panel(G + n * (width / L)), v(panel + kRows * (width / L)),
        w(v + width / L), next(w + width / L), Z(next + width / L),
        a(Z + n * (width / L)), b(a + n), c(b + n), f(c + n), swapped(f + n), y(swapped + n),
        d(reinterpret_cast<double*>(y + n)), e(d + width), beta(e + width) {}

  // X [m, n] of any strides. The r eigenvalues above floor of X^T X, descending, then zeros, to values [n], the
  // eigenvectors to the first rows of vectors [n, n]. Returns the Frobenius norm of the residual.
  double run(const T* X, int64_t row_stride, int64_t column_stride, double floor, double* values, double* vectors) {
    multiply(X, row_stride, column_stride);
    tridiagonalize();
    const P start[2] = {P{} + floor, P{} + floor};
    P above[2];
    count(start, above);
    const auto r = static_cast<int64_t>(above[0][0]);
    bisect(floor, r, values);
    const double left = iterate(r, values);
    for (int64_t k = n - 2; k >= 0; --k)
      for (int64_t j = 0; beta[k] != 0 && j < r; ++j)
        subtract(row(Z, j), beta[k] * inner(row(G, k), row(Z, j)), row(G, k));
    for (int64_t j = 0; j < r; ++j) std::copy_n(row(Z, j), n, vectors + j * n);
    return left;
  }
};

template <class T>
double gram_eigh(const T* X, int64_t m, int64_t n, int64_t row_stride, int64_t column_stride, double floor,
                 double* values, double* vectors) {
  return GramEigh<T>(m, n).run(X, row_stride, column_stride, floor, values, vectors);
}

}  // namespace compaware::CK_ISA
