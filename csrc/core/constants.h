// Constants and codes that C++ and Python share. Python reads this file (_utils/constants.py), so it keeps to plain
// forms: `constexpr type kName = literal;`, one per line, and enumerators without values.
#pragma once

#ifndef __CUDACC_RTC__  // NVRTC has no standard headers; csrc/cuda/portable.h declares the integers
#include <cstdint>
#endif

namespace compaware {

// dtype codes in device tables and kernel arguments.
enum class DType { f64, f32, f16, bf16 };

// --- packed low-rank factors (cpu/lowrank.cpp) ----------------------------------------------------------------------

constexpr int64_t kPackHeader = 16;   // floats before the packed factors
constexpr int64_t kPackColumns = 8;   // columns are padded to a multiple of this, whatever the instruction set

// --- singular value thresholding, on the CPU and on a GPU -----------------------------------------------------------

// Small matrices, by Jacobi rotations: the error of U f(s) V^T before the last product is at most kLoss units of
// roundoff times ||W||_F (measured: below 20). fp32 is chosen where kCoarse units meet the tolerance (20,000 cases: at
// most 0.61 of the tolerance was used).
constexpr double kLoss = 40;
constexpr double kCoarse = 10;

// Subspace iteration: the error bound covers singular triplets from kNear * tau on, but none below kResolved times the
// largest singular value. An estimated spectral norm is multiplied by kMargin (20,000 draws: still too small in 2 of
// 1,000 at rank 1, in none at higher ranks).
constexpr double kNear = 0.8;
constexpr double kResolved = 1e-6;
constexpr double kMargin = 1.25;

// --- the proximal step of a whole network on a GPU (cuda/step.h) ----------------------------------------------------

constexpr int kWarp = 32;               // threads per warp
constexpr int kThreads = 256;           // threads per block
constexpr int64_t kSmallBytes = 98304;  // of shared memory: a matrix is small if (m + n) n fp64 numbers fit
constexpr int kMaxColumns = 512;        // of a subspace basis
constexpr int kProbes = 32;             // Gaussian vectors per bound or estimate of a norm
constexpr double kFactor = 0.632036736;  // ||R||_F <= kFactor ||R Omega||_F, except with probability 5e-12
constexpr int kPowers = 9;              // R, R^T R, R R^T R, ...: powers of the residual that bound its spectral norm
constexpr int kPairs = 14;              // pairs of iterations for the matrix sign: each ends in the buffer it began in
constexpr int kRootPairs = 8;           // pairs of iterations for the inverse square root

// Gates: decisions made on the device. A product runs only if its gate is not 0. One more gate per pair of iterations
// follows these.
enum Gate { kClear, kTry, kApply, kDense, kRestart };

// (alpha, beta, gamma) of the products that depend on the matrix: alpha A B + beta D + gamma I.
enum Coefficient { kProject, kPower, kGram, kScaleSign, kScaleRoot, kCorrection, kRootCheck, kKeep };

// What is reported per matrix, in fp64.
enum Report { kNorm, kError, kRank, kMethod, kKnown, kRho };

// Values of kMethod. kUnsure: computed, but the tolerance was not shown to be met; kRefused: NaN or Inf, unchanged.
enum Method { kZero, kJacobi32, kJacobi64, kNothing, kSubspace, kFull, kUnsure, kRefused };

}  // namespace compaware
