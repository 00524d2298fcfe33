// The proximal step of a whole network: what the kernels of step.cuh know of each matrix. Every field has 8 bytes;
// compaware_kernels/proximal/cuda/plan.py fills the same table.
#pragma once

#include "../core/constants.h"

namespace compaware {

constexpr int kSignPair = kRestart + 1, kRootPair = kSignPair + kPairs, kGates = kRootPair + kRootPairs;
constexpr int kCoefficients = kKeep + 1, kReports = kRho + 1;

// A run of elements of a matrix, of which one block sums the squares.
struct Chunk {
  const void* W;
  int64_t dtype, first, count;
};

// A matrix that one block shrinks whole.
struct Small {
  void* W;                        // [m, n], m >= n
  int64_t dtype, m, n, row, col;  // row, col: strides, in elements
  const double *tau, *slope;
  double* s;       // [n] singular values of the result, descending
  double* error;   // a bound of ||computed - exact||_F
  double* rank;    // of the result; -1 where nothing was done
  double* method;  // a Method
};

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
