// The proximal step of a whole network: what the kernels of step.cuh know of each matrix. Every field has 8 bytes;
// compaware_kernels/proximal/cuda/plan.py fills the same table.
#pragma once

#include "../core/shrink.h"

namespace compaware {

constexpr int kProbes = 32;    // Gaussian vectors behind each statement about a norm
constexpr int kPowers = 9;     // (R^T R)^j R ... of the rest, for a bound of its norm
constexpr int kPairs = 14;     // of iterations for the sign function; two by two, so that each ends where it began
constexpr int kRootPairs = 8;  // and for the inverse root

constexpr int kMaxColumns = 512;

// Decisions: what follows is done where they are not 0.
enum Gate { kClear, kTry, kApply, kDense, kRestart, kSignPair, kRootPair = kSignPair + kPairs, kGates = kRootPair + kRootPairs };

// (alpha, beta, gamma) of the products that depend on the matrix: alpha A B + beta D + gamma I.
enum Coefficient { kProject, kPower, kGram, kScaleSign, kScaleRoot, kCorrection, kRootCheck, kKeep, kCoefficients };

// What comes out, in fp64.
enum Report { kNorm, kError, kRank, kMethod, kKnown, kRho, kReports };
enum Method { kZero, kNothing = 3, kSubspace, kFull, kUnsure, kRefused };  // beside SmallMethod; kUnsure: tol was not shown

struct Layer {
  const void* W;  // [m, n] without gaps, by rows or by columns, m >= n
  int64_t dtype, m, n, k, number;
  int64_t passes;  // of the products: 2 where slope may be more than 1
  const double *tau, *slope;
  const double* partial;  // [partials] sums of squares
  int64_t partials;
  double* report;        // [kReports]
  double* s;             // [n] singular values of the result
  int32_t* gates;        // [kGates], and kPairs + kRootPairs more for a second pass
  int32_t* awake;        // one of all layers: not 0 where kDense is open for any
  double* coefficients;  // [passes, kCoefficients, 3]
  double* omega;         // [n, kProbes] Gaussian
  // The subspace: left singular vectors U [m, k] = W V S, and Z = W^T U [n, k].
  float* V;             // [n, k] for the next call
  double* G;            // [k, k] (W V)^T W V, then its Cholesky factor
  double* scratch;      // [k, k]
  float* S;             // [k, k]
  const double* H;      // [k, k] Z^T Z
  double* L;            // [k, k]
  double* mu;           // [k] descending
  float *Qs, *Qv, *Qf;  // [k, k] the singular vectors are U Qs and Z Qv, and the result U Qs (Z Qf)^T
  double* inside;       // [k, kProbes] Gaussian, 0 beyond the triplets that are checked
  double* scaled;       // mu times these
  const double *F, *left, *skew_U, *skew_V;  // [m or k, kProbes] what the triplets lack
  const double* first;                       // [m, kProbes] the rest R times omega / tau,
  const float* powers;                       // then, one behind the other, the next powers: [n], [m], [n] ... x kProbes
  float* restart;                            // [n, k] a random basis
  // All of it: S = sign(X - I), Y = max(X, I)^(-1/2), X = W^T W / tau^2.
  const double* diagonal;                 // [n] of S, of the first pass
  const double *sign_check, *root_check;  // [passes, kProbes, n] what S and Y lack
};

}  // namespace compaware
