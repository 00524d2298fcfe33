// What lets nvcc, NVRTC (which has no standard headers) and a C++ compiler with the tests' emulator of CUDA
// (cuda_on_cpu.h, which defines CK_EMULATED) compile the same kernels.
#pragma once

#ifdef __CUDACC_RTC__
using int32_t = int;
using uint16_t = unsigned short;
using uint32_t = unsigned;
using int64_t = long long;
using uint64_t = unsigned long long;
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)
#endif
#else
#include <cstdint>
#endif

#include "../core/shrink.h"

#define CK_DEVICE __device__ inline
#define CK_KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)

// Declares T* name, the block's dynamic shared memory.
#ifdef CK_EMULATED
#define CK_SHARED(T, name) T* name = static_cast<T*>(cuda_on_cpu::here.shared)
#else
#define CK_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char ck_shared[]; \
  T* name = reinterpret_cast<T*>(ck_shared)
#endif

namespace compaware {

CK_DEVICE bool is_finite(double x) { return x - x == 0; }

// fp16 and bf16 as bits: NVRTC would need the paths of cuda_fp16.h and cuda_bf16.h.
CK_DEVICE float half_to_float(uint16_t bits) {
#ifdef CK_EMULATED
  return cuda_on_cpu::half_to_float(bits);
#else
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
#endif
}

CK_DEVICE uint16_t float_to_half(float x) {
#ifdef CK_EMULATED
  return cuda_on_cpu::float_to_half(x);
#else
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#endif
}

CK_DEVICE float bfloat_to_float(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

CK_DEVICE uint16_t float_to_bfloat(float x) {
  const uint32_t bits = __float_as_uint(x);
  return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

// Round to odd: an inexact result takes the neighbor with an odd last bit. Rounded again, to 16 bits, it becomes what x
// rounded once would be.
CK_DEVICE float round_to_odd(double x) {
  const float near = static_cast<float>(x);
  if (near == x || x != x) return near;
  return __uint_as_float((__float_as_uint(near) - (fabs(static_cast<double>(near)) > fabs(x))) | 1);
}

// Element i of a tensor, in fp32.
CK_DEVICE float load(const void* data, DType type, int64_t i) {
  switch (type) {
    case DType::f64: return static_cast<float>(static_cast<const double*>(data)[i]);
    case DType::f32: return static_cast<const float*>(data)[i];
    case DType::f16: return half_to_float(static_cast<const uint16_t*>(data)[i]);
    default: return bfloat_to_float(static_cast<const uint16_t*>(data)[i]);
  }
}

CK_DEVICE void store(void* data, DType type, int64_t i, float x) {
  switch (type) {
    case DType::f64: static_cast<double*>(data)[i] = x; break;
    case DType::f32: static_cast<float*>(data)[i] = x; break;
    case DType::f16: static_cast<uint16_t*>(data)[i] = float_to_half(x); break;
    default: static_cast<uint16_t*>(data)[i] = float_to_bfloat(x);
  }
}

// The same in fp64; stored values are rounded once.
CK_DEVICE double load_wide(const void* data, DType type, int64_t i) {
  return type == DType::f64 ? static_cast<const double*>(data)[i] : load(data, type, i);
}

CK_DEVICE void store_wide(void* data, DType type, int64_t i, double x) {
  switch (type) {
    case DType::f64: static_cast<double*>(data)[i] = x; break;
    case DType::f32: static_cast<float*>(data)[i] = static_cast<float>(x); break;
    default: store(data, type, i, round_to_odd(x));
  }
}

// The same in C: fp32 or fp64.
template <class C>
CK_DEVICE C load_as(const void* data, DType type, int64_t i) {
  if constexpr (sizeof(C) == 8) return load_wide(data, type, i);
  else return load(data, type, i);
}
CK_DEVICE void store_as(void* data, DType type, int64_t i, float x) { store(data, type, i, x); }
CK_DEVICE void store_as(void* data, DType type, int64_t i, double x) { store_wide(data, type, i, x); }

// With the dtype as a number, as device tables have it.
CK_DEVICE float load(const void* data, int64_t type, int64_t i) { return load(data, static_cast<DType>(type), i); }
CK_DEVICE void store(void* data, int64_t type, int64_t i, float x) { store(data, static_cast<DType>(type), i, x); }
CK_DEVICE double load_wide(const void* data, int64_t type, int64_t i) {
  return load_wide(data, static_cast<DType>(type), i);
}
CK_DEVICE void store_wide(void* data, int64_t type, int64_t i, double x) {
  store_wide(data, static_cast<DType>(type), i, x);
}

}  // namespace compaware
