// Device tables of the proximal step of a whole network, one struct per matrix. Every member has 8 bytes: Python reads
// these structs (_utils/constants.py) and fills tables of int64.
#pragma once

#include "../core/constants.h"

namespace compaware {

constexpr int kSignPair = kRestart + 1, kRootPair = kSignPair + kPairs, kGates = kRootPair + kRootPairs;
constexpr int kCoefficients = kKeep + 1, kReports = kRho + 1;

// Consecutive elements of a matrix, whose squares one block sums.
struct Chunk {
  const void* W;
  int64_t dtype, first, count;
};

// A small matrix, shrunk by one block.
struct Small {
  void* W;                        // [m, n], m >= n
  int64_t dtype, m, n, row, col;  // row, col: strides, in elements
  const double *tau, *slope;
  double* s;       // [n] singular values of the result, descending
  double* error;   // bound of ||computed - exact||_F
  double* rank;    // of the result; -1 if nothing was done
  double* method;  // a Method
};

// Any larger matrix.
struct Layer {
  const void* W;  // [m, n] dense in row- or column-major order, m >= n
  int64_t dtype, m, n, k, number;
  int64_t passes;  // of the products: 2 where slope may be more than 1
  const double *tau, *slope;
  const double* partial;  // [partials] sums of squares
  int64_t partials;
  double* report;        // [kReports]
  double* s;             // [n] singular values of the result
  int32_t* gates;        // [kGates]
  int32_t* awake;        // shared by all layers: not 0 if kDense is open for any of them
  double* coefficients;  // [kCoefficients, 3]
  double* omega;         // [n, kProbes] Gaussian
  // Subspace route: orthonormal U [m, k] = W V S, and Z = W^T U [n, k].
  float* V;             // [n, k] right singular vectors, the basis of the next call
  double* G;            // [k, k] (W V)^T W V, then its Cholesky factor
  double* scratch;      // [k, k]
  float* S;             // [k, k]
  const double* H;      // [k, k] Z^T Z
  double* L;            // [k, k]
  double* mu;           // [k] descending
  float *Qs, *Qv, *Qf;  // [k, k] singular vectors are U Qs and Z Qv, the result is U Qs (Z Qf)^T
  double* inside;       // [k, kProbes] Gaussian, 0 in the rows of triplets that the bound does not cover
  double* scaled;       // mu times `inside`
  const double *F, *left, *skew_U, *skew_V;  // [m or k, kProbes] residuals of the triplets, times Gaussian vectors
  const double* first;                       // [m, kProbes] the residual R = W - U Z^T times omega / tau
  const float* powers;                       // R^T R omega, R R^T R omega, ...: [n], [m], [n], ... x kProbes
  float* restart;                            // [n, k] a random basis
  // Dense route: S = sign(X - I), Y = max(X, I)^(-1/2), X = W^T W / tau^2.
  const double* diagonal;                  // [n] of S
  const double *sign_check, *root_check;  // [kProbes, n] residuals of S and Y, times Gaussian vectors
};

}  // namespace compaware
