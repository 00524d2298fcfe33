// All kernels as one translation unit, compiled by nvcc (launch.cu), by NVRTC at run time, and for the tests by a C++
// compiler with an emulator of CUDA.
#pragma once

#include "shrink.cuh"
#include "small.cuh"
#include "step.cuh"

#define CK_KERNELS(X) X(ck_shrink) X(ck_small) X(ck_begin) X(ck_orth) X(ck_ritz) X(ck_judge) X(ck_finish)
