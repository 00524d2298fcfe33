// All kernels, as one translation unit: of nvcc (launch.cu), of NVRTC (compaware_kernels/ops/cuda_launcher.py) and of a C++
// compiler with CUDA on the CPU (tests/emulator).
#pragma once

#include "shrink.cuh"
#include "small.cuh"
#include "step.cuh"

#define CK_KERNELS(X) X(ck_shrink) X(ck_small) X(ck_begin) X(ck_orth) X(ck_ritz) X(ck_judge) X(ck_finish)
