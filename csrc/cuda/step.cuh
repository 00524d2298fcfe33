// The proximal step of a whole network, singular value thresholding of every matrix: all but the matrix products. One
// block per matrix.
//
// The singular triplets above tau come from a subspace (orth, ritz). Its result is written only if its error bound
// meets the tolerance (judge); else W - prox(W) is computed by matrix products (dense route). Decisions stay on the
// device, as gates that later launches read: there is no device-to-host synchronization.
#pragma once

#include "block.cuh"
#include "jacobi.cuh"
#include "portable.h"
#include "ramp.cuh"
#include "step.h"
#include "storage.cuh"

namespace compaware {

constexpr double kUnit32 = 5.9604644775390625e-8, kUnit64 = 1.1102230246251565e-16;
constexpr int kSweeps = 5;            // of Jacobi rotations: angles end near 1e-9, which the error bound covers
constexpr double kLost = 1e-7;        // of the largest singular value: smaller ones are roundoff
constexpr double kDependent = 1e-12;  // of a squared norm: a column with a smaller pivot depends on those before it

CK_DEVICE Ramp ramp(const Layer& layer) { return {*layer.tau, *layer.slope}; }

// The sum of squares of `size` contiguous numbers.
template <class T>
CK_DEVICE double sum_squares(const T* x, int64_t size) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x) sum += double(x[i]) * x[i];
  return block_sum(sum);
}

// --- begin ----------------------------------------------------------------------------------------------------------

CK_DEVICE void add_up(const Chunk& chunk, double* partial, int32_t* refused) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < chunk.count; i += blockDim.x) {
    const double w = load_wide(chunk.W, chunk.dtype, chunk.first + i);
    sum += w * w;
  }
  sum = block_sum(sum);
  if (threadIdx.x) return;
  *partial = sum;
  if (!(sum <= 1.7e308)) atomicOr(refused, 1);
}

template <class T>
CK_DEVICE void fill_normal(T* out, int64_t size, const double* call, int64_t stream) {
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x)
    out[i] = T(normal(int64_t(call[0]), int64_t(call[1]), stream, i));
}

}  // namespace compaware

// Blocks: one per chunk, one per layer, one to reset the counters. `call`: seed and number of this call.
CK_KERNEL(compaware::kThreads)
ck_begin(const compaware::Layer* layers, int64_t count, const compaware::Chunk* chunks, int64_t pieces,
         double* partials, const double* call, int32_t* refused, int32_t* counters, int64_t all) {
  using namespace compaware;
  const int64_t block = blockIdx.x;
  if (block < pieces) return add_up(chunks[block], partials + block, refused);
  if (block < pieces + count) {
    const Layer& layer = layers[block - pieces];
    if (threadIdx.x == 0) layer.gates[kTry] = layer.k && layer.report[kKnown] > 0;
    return fill_normal(layer.omega, layer.n * kProbes, call, 2 * layer.number);
  }
  for (int64_t i = threadIdx.x; i < all; i += blockDim.x) counters[i] = 0;
}

namespace compaware {

// --- orth -----------------------------------------------------------------------------------------------------------

// Number of leading iterations that can be skipped, as all numbers are at least `low`; even. lows: lower ends of the
// iterations' intervals.
CK_DEVICE int first_needed(const double* lows, int64_t steps, double low) {
  int first = 0;
  for (int t = 0; t < steps; t += 2)
    if (lows[t] <= low) first = t;
  return first;
}

// What the products take away from W is the sum, over the passes, of weight (W - SVT(W)), with the threshold tau: slope
// times that of the layer's tau, less slope - 1 times that of gamma tau, gamma = slope / (slope - 1). Of slope 1 the
// second has no weight, and an infinite threshold.
struct Pass {
  double tau, weight;
};

CK_DEVICE Pass pass_of(const Layer& layer, int64_t pass) {
  const Ramp f = ramp(layer);
  return pass ? Pass{f.tau * f.slope / (f.slope - 1), f.slope - 1} : Pass{f.tau, f.slope};
}

CK_DEVICE int32_t* pairs_of(const Layer& layer, int64_t pass) {
  return layer.gates + kSignPair + pass * (kPairs + kRootPairs);
}

// The numbers that the products need, from the thresholds and the norm.
CK_DEVICE void set_coefficients(const Layer& layer, double norm) {
  for (int64_t pass = 0; pass < layer.passes; ++pass) {
    const auto [tau, weight] = pass_of(layer, pass);
    const double beta = norm * norm / (tau * tau) + 1, root = beta + 1;  // >= the norms of X - I and of max(X, I)
    const double kept = weight / sqrt(root);
    const double rows[kCoefficients][3] = {{-1 / tau, 1 / tau, 0}, {1 / tau, 0, 0},  {1 / (tau * tau), 0, -1},
                                           {0, 1 / beta, 0},       {0, 1 / root, 0}, {-1 / sqrt(root), 1, 0},
                                           {-1 / root, 1, 0},      {pass ? -kept : 0, pass ? 1 : kept, 0}};
    double* const out = layer.coefficients + 3 * kCoefficients * pass;
    for (int i = 0; i < kCoefficients; ++i)
      for (int j = 0; j < 3; ++j) out[3 * i + j] = rows[i][j];
  }
}

CK_DEVICE void open_full(const Layer& layer, double norm, const double* lows, double tol) {
  atomicOr(layer.awake, 1);
  for (int64_t pass = 0; pass < layer.passes; ++pass) {
    const double tau = pass_of(layer, pass).tau, beta = norm * norm / (tau * tau) + 1;
    const int sign = first_needed(lows, 2 * kPairs, tol / (2 * beta)), skipped = 2 * (kPairs - kRootPairs);
    const int root = first_needed(lows + skipped, 2 * kRootPairs, 0.9 / sqrt(beta + 1));
    int32_t* const pairs = pairs_of(layer, pass);
    for (int i = 0; i < kPairs; ++i) pairs[i] = 2 * i >= sign;
    for (int i = 0; i < kRootPairs; ++i) pairs[kPairs + i] = 2 * i >= root;
  }
}

// Chooses the route of a layer. Thread 0, before anything of it is computed. tol: of W, as below.
CK_DEVICE void decide(const Layer& layer, bool refused, double tol, double norm) {
  const double tau = *layer.tau;
  const bool zero = norm <= tau, nothing = tau == 0 || refused;
  const bool fits = 2 * kUnit32 * norm <= tol * tau && norm > 1e-12 && norm < 1e12 && tau > 1e-12;
  const bool known = layer.k && layer.report[kKnown] > 0, attempt = !zero && !nothing && fits && known;
  layer.gates[kClear] = zero && !nothing;
  layer.gates[kTry] = attempt;
  layer.gates[kApply] = 0;
  layer.gates[kDense] = !zero && !nothing && !attempt;
  layer.gates[kRestart] = layer.gates[kDense] && layer.k && fits;
  layer.report[kNorm] = norm;
  layer.report[kError] = layer.report[kRho] = 0;
  layer.report[kRank] = nothing ? -1 : 0;
  layer.report[kMethod] = refused ? kRefused : nothing ? kNothing : zero ? kZero : attempt ? kSubspace : kFull;
  for (int i = 0; i < layer.passes * (kPairs + kRootPairs); ++i) layer.gates[kSignPair + i] = 0;
  if (!nothing && !zero) set_coefficients(layer, norm);
}

// Draws a random basis for the next call.
CK_DEVICE void restart(const Layer& layer, const double* call) {
  fill_normal(layer.restart, layer.n * layer.k, call, 2 * layer.number + 1);
  if (threadIdx.x == 0) layer.report[kKnown] = 1;
}

CK_DEVICE void orthonormalize(const Layer& layer) {
  cholesky(layer.G, int(layer.k), kDependent);
  inverse_transposed(layer.G, int(layer.k), layer.scratch);
  for (int64_t i = threadIdx.x; i < layer.k * layer.k; i += blockDim.x) layer.S[i] = float(layer.scratch[i]);
}

}  // namespace compaware

// S, which makes the columns of (W V) S orthonormal; if `first`, also the route of every layer.
CK_KERNEL(compaware::kThreads)
ck_orth(const compaware::Layer* layers, const int32_t* refused, const double* call, const double* lows, double tol,
        int64_t first) {
  using namespace compaware;
  const Layer& layer = layers[blockIdx.x];
  if (first) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < layer.partials; i += blockDim.x) sum += layer.partial[i];
    const double norm = 1.000001 * sqrt(block_sum(sum));
    if (threadIdx.x == 0) {
      tol /= *layer.slope;
      decide(layer, *refused, tol, norm);
      if (layer.gates[kDense]) open_full(layer, norm, lows, tol);
    }
    for (int64_t i = threadIdx.x; i < layer.n && !*refused; i += blockDim.x) layer.s[i] = 0;
    __syncthreads();
    if (layer.gates[kRestart]) restart(layer, call);
  }
  if (layer.gates[kTry]) orthonormalize(layer);
}

namespace compaware {

// --- ritz -----------------------------------------------------------------------------------------------------------

// mu and Q of H = Q mu^2 Q^T: rotated until they are orthogonal, the columns of H's Cholesky factor are Q mu.
CK_DEVICE void eigen(const Layer& layer, double* rows, double* norms, int* place) {
  const int k = int(layer.k);
  for (int64_t i = threadIdx.x; i < int64_t(k) * k; i += blockDim.x) layer.L[i] = layer.H[i];
  __syncthreads();
  cholesky(layer.L, k, 1e-24);
  for (int64_t i = threadIdx.x; i < int64_t(k) * k; i += blockDim.x) rows[i] = layer.L[i % k * k + i / k];
  __syncthreads();
  jacobi<double>(rows, k, k, k, nullptr, 0, 0, kSweeps);
  for (int j = threadIdx.x; j < k; j += blockDim.x) {
    double sum = 0;
    for (int i = 0; i < k; ++i) sum += rows[j * k + i] * rows[j * k + i];
    norms[j] = sqrt(sum);
  }
  __syncthreads();
  order(norms, k, place);
  __syncthreads();
}

// Qs, Qv, Qf [k, k] and mu [k] from rows [k, k] and norms [k] of eigen.
CK_DEVICE void write_triplets(const Layer& layer, const double* rows, const double* norms, const int* place) {
  const int k = int(layer.k);
  const Ramp f = ramp(layer);
  double largest = 0;
  for (int j = 0; j < k; ++j) largest = norms[j] > largest ? norms[j] : largest;
  for (int64_t e = threadIdx.x; e < int64_t(k) * k; e += blockDim.x) {
    const int i = int(e / k), j = int(e % k), to = i * k + place[j];
    const double mu = norms[j], q = mu > kLost * largest ? rows[j * k + i] / mu : 0;
    layer.Qs[to] = float(q);
    layer.Qv[to] = float(mu > kLost * largest ? q / mu : 0);
    layer.Qf[to] = float(mu > f.tau ? q * f.gain(mu) : 0);
  }
  for (int j = threadIdx.x; j < k; j += blockDim.x) layer.mu[place[j]] = norms[j];
}

CK_DEVICE int count_above(const double* mu, int k, double bound) {
  int count = 0;
  while (count < k && mu[count] > bound) ++count;
  return count;
}

// Number of triplets that the error bound covers.
CK_DEVICE int checked(const Layer& layer) {
  const double low = kNear * *layer.tau, coarse = kResolved * layer.mu[0];
  return count_above(layer.mu, int(layer.k), low > coarse ? low : coarse);
}

}  // namespace compaware

// Singular triplets within the subspace (Rayleigh-Ritz). Up to `shared_columns` columns are rotated in shared memory.
CK_KERNEL(compaware::kThreads)
ck_ritz(const compaware::Layer* layers, const double* call, int64_t shared_columns) {
  using namespace compaware;
  const Layer& layer = layers[blockIdx.x];
  if (!layer.gates[kTry]) return;
  const int k = int(layer.k);
  CK_SHARED(double, shared);
  __shared__ double norms[kMaxColumns];
  __shared__ int place[kMaxColumns];
  double* rows = k <= shared_columns ? shared : layer.scratch;
  eigen(layer, rows, norms, place);
  write_triplets(layer, rows, norms, place);
  __syncthreads();
  const int c = checked(layer);
  for (int i = threadIdx.x; i < k * kProbes; i += blockDim.x) {
    const double x = i < c * kProbes ? normal(int64_t(call[0]), int64_t(call[1]), ~layer.number, i) : 0;
    layer.inside[i] = x;
    layer.scaled[i] = x * layer.mu[i / kProbes];
  }
}

namespace compaware {

// --- judge ----------------------------------------------------------------------------------------------------------

struct Size {
  double bound, spectral;  // bound of the Frobenius norm; estimate of the spectral norm, rather too large
};

// Norms of a matrix from its products R [rows, kProbes] with Gaussian vectors, as the CPU's error bounds have them.
CK_DEVICE Size size_of(const double* R, int64_t rows) {
  double trace = 0, pairs = 0;
  for (int e = threadIdx.x; e < kProbes * kProbes; e += blockDim.x) {
    const int i = e / kProbes, j = e % kProbes;
    double dot = 0;
    for (int64_t r = 0; r < rows; ++r) dot += R[r * kProbes + i] * R[r * kProbes + j];
    if (i == j) trace += dot;
    else pairs += dot * dot;
  }
  trace = block_sum(trace);
  pairs = block_sum(pairs);
  if (!(trace > 0)) return {trace == 0 ? 0 : INFINITY, trace == 0 ? 0 : INFINITY};
  const double fourth = pairs / (trace * trace * kProbes * (kProbes - 1)), p = kProbes;
  const double spread = fourth * p * p < 1 ? fourth * p * p : 1;
  return {kFactor * sqrt(trace), sqrt(trace) * sqrt(sqrt(fourth)) * (1 + spread)};
}

// Bound of ||R|| / tau for the residual R of the subspace, from its powers.
CK_DEVICE double rest(const Layer& layer) {
  double best = kFactor * sqrt(sum_squares(layer.first, layer.m * kProbes));
  const float* power = layer.powers;
  for (int j = 2; j <= kPowers; ++j) {
    const int64_t size = (j % 2 ? layer.m : layer.n) * kProbes;
    const double norm = kFactor * sqrt(sum_squares(power, size)), root = pow(norm, 1.0 / j);
    if (norm > 1e-20 && root < best) best = root;  // smaller ones have partly underflowed in fp32
    power += size;
  }
  return best;
}

// Bound of the Frobenius norm of what the uncovered singular values may exceed tau by.
CK_DEVICE double tail(const Layer& layer, int c, double rho, double slack) {
  const double tau = *layer.tau;
  if (!(rho <= tau)) return INFINITY;
  double sum = 0;
  for (int j = c; j < layer.k; ++j) {
    const double above = sqrt(layer.mu[j] * layer.mu[j] + rho * rho) + slack - tau;
    if (above > 0) sum += above * above;
  }
  return sqrt(sum);
}

// Accepts the subspace's result or opens the dense route. Thread 0. tol and estimate: of W; its function moves by up to
// slope times as much.
CK_DEVICE void conclude(const Layer& layer, double tol, double error, double estimate, double rho) {
  const double tau = *layer.tau;
  const bool met = estimate <= tol * tau;
  layer.report[kRho] = rho;
  layer.report[kError] = error;
  layer.report[kRank] = count_above(layer.mu, int(layer.k), tau);
  layer.report[kMethod] = met ? kSubspace : kFull;
  layer.gates[kApply] = met;
  layer.gates[kDense] = !met;
}

}  // namespace compaware

// Error bound of the subspace's result.
CK_KERNEL(compaware::kThreads)
ck_judge(const compaware::Layer* layers, const double* lows, double tol) {
  using namespace compaware;
  const Layer& layer = layers[blockIdx.x];
  if (!layer.gates[kTry]) return;
  const Ramp f = ramp(layer);
  const double tau = f.tau, norm = layer.report[kNorm], slack = 4 * kUnit32 * norm;
  const int c = checked(layer);
  const Size F = size_of(layer.F, layer.m), E = size_of(layer.left, layer.k);
  const Size U = size_of(layer.skew_U, layer.k), V = size_of(layer.skew_V, layer.k);
  const double rho = tau * rest(layer) + slack;
  const double bound = sqrt(F.bound * F.bound + E.bound * E.bound) + U.bound + V.bound;
  const double excess = tail(layer, c, rho, slack + bound);
  double kept = 0, stored = 0;
  for (int j = 0; j < c; ++j) {
    const double mu = layer.mu[j], s = mu > tau ? f.value(mu) : 0;
    kept += mu * mu;
    stored += s * s;
    if (threadIdx.x == 0) layer.s[j] = s;
  }
  const Storage storage = storage_of(layer.dtype);
  const double rounding = 2 * (c + 1) * kUnit32 * sqrt(kept) + storage.relative * sqrt(stored);
  const double spectral = sqrt(F.spectral * F.spectral + E.spectral * E.spectral) + U.spectral + V.spectral;
  if (threadIdx.x) return;
  const double error = storage.bound(f.slope * (bound + excess) + rounding, norm, layer.m * layer.n);
  conclude(layer, tol / f.slope, error, kMargin * spectral + excess, rho);
  if (!layer.gates[kDense]) return;
  open_full(layer, norm, lows, tol / f.slope);
  for (int64_t j = 0; j < layer.n; ++j) layer.s[j] = 0;
}

namespace compaware {

// --- finish ---------------------------------------------------------------------------------------------------------

// Error bound of the dense route, W - W M^(-1/2) with M = max(X, I): the result is off by at most tau times the norms
// of the residuals (X - I)(1 - S^2) / 4 of the sign S, and I - Y M Y of the inverse root Y.
// weight times tau is the same in both passes.
CK_DEVICE void account(const Layer& layer, double tol) {
  const int64_t n = layer.n;
  const double tau = *layer.tau, norm = layer.report[kNorm];
  double trace = 0, lack = 0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) trace += layer.diagonal[i];
  trace = block_sum(trace);
  for (int64_t part = 0; part < 2 * layer.passes; ++part) {  // of each pass the sign, then the root
    const double* check = part % 2 ? layer.root_check : layer.sign_check;
    lack += sqrt(sum_squares(check + part / 2 * n * kProbes, n * kProbes));
  }
  if (threadIdx.x) return;
  const double slope = *layer.slope, weights = slope * slope + (slope - 1) * (slope - 1);  // weight / tau, summed
  const double found = kFactor * slope * tau * lack + (layer.m + 100) * kUnit64 * norm * norm * weights / (slope * tau);
  layer.report[kRank] = rint((double(n) + trace) / 2);
  layer.report[kMethod] = found <= tol * tau * sqrt(double(n)) ? kFull : kUnsure;
  const Storage storage = storage_of(layer.dtype);
  const double rounding = storage.relative * norm + 2 * kUnit32 * tau * sqrt(double(n));
  layer.report[kError] = storage.bound(found + rounding, norm, layer.m * n);
  for (int64_t j = 0; j < n; ++j) layer.s[j] = NAN;
}

// Replaces basis vectors along which W is zero now but may not stay so by random ones, the same ones at every call.
CK_DEVICE void refill(const Layer& layer, const double* call) {
  constexpr uint64_t every_call = ~uint64_t(0);
  for (int64_t j = 0; j < layer.k; ++j) {
    if (layer.mu[j] > kLost * layer.mu[0]) continue;
    for (int64_t i = threadIdx.x; i < layer.n; i += blockDim.x)
      layer.V[i * layer.k + j] = float(normal(int64_t(call[0]), every_call, ~(layer.number + (j << 20)), i));
  }
}

}  // namespace compaware

// One block per layer, and one that ends the call.
CK_KERNEL(compaware::kThreads)
ck_finish(const compaware::Layer* layers, int64_t count, int32_t* refused, double* call, double tol) {
  using namespace compaware;
  if (blockIdx.x < count) {
    const Layer& layer = layers[blockIdx.x];
    if (layer.gates[kTry]) refill(layer, call);
    if (layer.gates[kDense]) account(layer, tol);
  } else if (threadIdx.x == 0) {
    *refused = 0;
    call[1] += 1;
  }
}
