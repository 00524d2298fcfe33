// Numbers and codes on which C++ and Python must agree: written here and nowhere else. compaware_kernels/_utils/constants.py reads
// this file, so it keeps to plain forms: `constexpr type kName = literal;`, one a line, and enumerators without values.
#pragma once

#ifndef __CUDACC_RTC__  // NVRTC has no standard headers; csrc/cuda/portable.h declares the integers
#include <cstdint>
#endif

namespace compaware {

// Codes of dtypes in tables and kernel arguments.
enum class DType { f64, f32, f16, bf16 };

// --- packed low-rank factors (cpu/lowrank.cpp) ----------------------------------------------------------------------

constexpr int64_t kPackHeader = 16;   // floats before the packed factors
constexpr int64_t kPackColumns = 16;  // columns are padded to a multiple of this, whatever the instruction set

// --- singular value thresholding, on the CPU and on a GPU -----------------------------------------------------------

// Of small matrices, by Jacobi rotations. The error before the last product is at most kLoss roundings of ||W||_F
// (measured: below 20); fp32 is chosen where kCoarse roundings meet the tolerance (measured: at most 0.61 of it is used).
constexpr double kLoss = 40;
constexpr double kCoarse = 10;

// By subspace iteration. Triplets from kNear tau on are checked as if they were wanted, but none below kResolved of the
// largest singular value. Estimates of a spectral norm are raised by kMargin (20,000 draws: still too small in 2 of 1,000
// at rank 1, in none above).
constexpr double kNear = 0.8;
constexpr double kResolved = 1e-6;
constexpr double kMargin = 1.25;

// --- the proximal step of a whole network on a GPU (cuda/step.h) ----------------------------------------------------

constexpr int kThreads = 256;           // of every block
constexpr int64_t kSmallBytes = 98304;  // of shared memory: a matrix is small if (m + n) n fp64 numbers fit
constexpr int kMaxColumns = 512;        // of a basis
constexpr int kProbes = 32;             // Gaussian vectors behind each bound or estimate of a norm
constexpr double kFactor = 0.632036736;  // ||R||_F <= kFactor ||R Omega||_F, but for a probability of 5e-12
constexpr int kPowers = 9;              // R, R^T R, R R^T R, ...: powers of the residual that bound its spectral norm
constexpr int kPairs = 14;              // of iterations for the matrix sign; in pairs, so that each ends where it began
constexpr int kRootPairs = 8;           // of iterations for the inverse square root

// Decisions on the device: what a gate guards runs where it is not 0. Behind them, one gate per pair of iterations.
enum Gate { kClear, kTry, kApply, kDense, kRestart };

// (alpha, beta, gamma) of the products that depend on the matrix: alpha A B + beta D + gamma I.
enum Coefficient { kProject, kPower, kGram, kScaleSign, kScaleRoot, kCorrection, kRootCheck, kKeep };

// What the device reports of a matrix, in fp64.
enum Report { kNorm, kError, kRank, kMethod, kKnown, kRho };

// kMethod of a report. kUnsure: the tolerance was not shown to be met; kRefused: NaN or Inf, nothing was changed.
enum Method { kZero, kJacobi32, kJacobi64, kNothing, kSubspace, kFull, kUnsure, kRefused };

}  // namespace compaware
