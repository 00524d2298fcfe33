// CUDA on the CPU: what kernel code sees. Included before everything else (g++ -include); fibers.cpp does the work.
//
// Every CUDA thread of a block is a fiber, and one OS thread runs one block at a time: CK_EMU_THREADS of them (1), in
// an order shuffled by CK_EMU_SEED (0: as numbered). What is undefined in CUDA and can be noticed ends the launch with
// a message: barriers and warp operations that not all threads reach, wrong masks, lanes that were not asked. Shared
// memory is NaN, and a large int, until written. The sanitizers see CUDA threads as threads, and know only the order
// that __syncthreads, __syncwarp and __threadfence make: a shuffle orders nothing, as in CUDA.
//
// Not here: grids of more than one dimension, float atomics, __activemask, cooperative groups, asynchronous copies.
#pragma once

#include <math.h>  // of C++: sqrt(float) is a float in the global namespace too
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <type_traits>

#define CK_EMULATED

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static thread_local  // an OS thread has one block at a time, and fibers stay where they are
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define __align__(bytes) alignas(bytes)

#define threadIdx (cuda_on_cpu::here.thread)
#define blockIdx (cuda_on_cpu::here.block)
#define blockDim (cuda_on_cpu::here.threads)
#define gridDim (cuda_on_cpu::here.blocks)
constexpr int warpSize = 32;

namespace cuda_on_cpu {

struct Index {
  unsigned x, y, z;
};

struct Worker;

// Where the code that runs is: of the current fiber. Besides this, only __shared__ variables are thread-local.
struct Here {
  Index thread, block, threads, blocks;
  void* shared;
  Worker* worker;
};
extern __thread Here here;

enum class Op { barrier, barrier_or, barrier_and, barrier_count, syncwarp, shuffle, vote };

int sync_block(const char* site, Op op, int predicate);
// Each lane of the mask gets the value of its source lane; of syncwarp and vote: one bit per lane whose value is not 0.
uint64_t sync_warp(const char* site, Op op, unsigned mask, uint64_t value, int source);
void fence();
// Runs `kernel`, which unpacks its arguments itself, in every thread of every block. Null, or what was wrong.
const char* launch(void (*kernel)(void**), void** args, int64_t grid, int64_t block, int64_t shared);
void yield();  // with a seed, another thread may go on here

// The source lane of a shuffle. Beyond its own `width` lanes a lane reads itself.
inline int lane() { return static_cast<int>(threadIdx.x % 32); }
inline int first_lane(int width) { return lane() & ~(width - 1); }
inline int any_lane(int source, int width = 32) { return first_lane(width) + (source & (width - 1)); }
inline int lane_up(int delta, int width = 32) { return lane() - delta < first_lane(width) ? lane() : lane() - delta; }
inline int upwards(int source, int width) { return source < first_lane(width) + width ? source : lane(); }
inline int lane_down(int delta, int width = 32) { return upwards(lane() + delta, width); }
inline int lane_xor(int bits, int width = 32) { return upwards(lane() ^ bits, width); }

template <class T>
T shuffle(const char* site, unsigned mask, T value, int source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles 4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = sync_warp(site, Op::shuffle, mask, bits, source);
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline unsigned vote(const char* site, unsigned mask, bool predicate) {
  return static_cast<unsigned>(sync_warp(site, Op::vote, mask, predicate, 0));
}
inline void sync_lanes(const char* site, unsigned mask = ~0u) { sync_warp(site, Op::syncwarp, mask, 0, 0); }

template <class To, class From>
To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

inline float half_to_float(uint16_t bits) { return static_cast<float>(same_bits<_Float16>(bits)); }
inline uint16_t float_to_half(float x) { return same_bits<uint16_t>(static_cast<_Float16>(x)); }

// The old value; `change` gives the new one. Orders nothing, as in CUDA.
template <class T, class F>
T atomic(T* p, F change) {
  static_assert(std::is_integral<T>::value && sizeof(T) >= 4, "a sum of floats depends on the order");
  yield();
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(p, &old, static_cast<T>(change(old)), true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

template <class T>
struct Same {  // no deduction: the type of the memory decides
  using type = T;
};
template <class T>
using same = typename Same<T>::type;

}  // namespace cuda_on_cpu

#define CK_TEXT_(x) #x
#define CK_TEXT(x) CK_TEXT_(x)
#define CK_SITE __FILE__ ":" CK_TEXT(__LINE__) "#" CK_TEXT(__COUNTER__)

#define __syncthreads() ((void)cuda_on_cpu::sync_block(CK_SITE, cuda_on_cpu::Op::barrier, 0))
#define __syncthreads_or(p) cuda_on_cpu::sync_block(CK_SITE, cuda_on_cpu::Op::barrier_or, (p) != 0)
#define __syncthreads_and(p) cuda_on_cpu::sync_block(CK_SITE, cuda_on_cpu::Op::barrier_and, (p) != 0)
#define __syncthreads_count(p) cuda_on_cpu::sync_block(CK_SITE, cuda_on_cpu::Op::barrier_count, (p) != 0)
#define __syncwarp(...) cuda_on_cpu::sync_lanes(CK_SITE __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_sync(mask, v, ...) cuda_on_cpu::shuffle(CK_SITE, mask, v, cuda_on_cpu::any_lane(__VA_ARGS__))
#define __shfl_up_sync(mask, v, ...) cuda_on_cpu::shuffle(CK_SITE, mask, v, cuda_on_cpu::lane_up(__VA_ARGS__))
#define __shfl_down_sync(mask, v, ...) cuda_on_cpu::shuffle(CK_SITE, mask, v, cuda_on_cpu::lane_down(__VA_ARGS__))
#define __shfl_xor_sync(mask, v, ...) cuda_on_cpu::shuffle(CK_SITE, mask, v, cuda_on_cpu::lane_xor(__VA_ARGS__))
#define __ballot_sync(mask, p) cuda_on_cpu::vote(CK_SITE, mask, p)
#define __any_sync(mask, p) (cuda_on_cpu::vote(CK_SITE, mask, p) != 0)
#define __all_sync(mask, p) (cuda_on_cpu::vote(CK_SITE, mask, !(p)) == 0)

inline void __threadfence() { cuda_on_cpu::fence(); }
inline void __threadfence_block() { cuda_on_cpu::fence(); }
inline void __nanosleep(unsigned) { cuda_on_cpu::yield(); }

#define CK_ATOMIC(name, value)                                          \
  template <class T>                                                    \
  T name(T* p, cuda_on_cpu::same<T> v) {                                \
    return cuda_on_cpu::atomic(p, [=](T old) { return (void)old, value; }); \
  }
CK_ATOMIC(atomicAdd, old + v)
CK_ATOMIC(atomicSub, old - v)
CK_ATOMIC(atomicMax, old > v ? old : v)
CK_ATOMIC(atomicMin, old < v ? old : v)
CK_ATOMIC(atomicAnd, old& v)
CK_ATOMIC(atomicOr, old | v)
CK_ATOMIC(atomicXor, old ^ v)
CK_ATOMIC(atomicExch, v)
template <class T>
T atomicCAS(T* p, cuda_on_cpu::same<T> expected, cuda_on_cpu::same<T> v) {
  return cuda_on_cpu::atomic(p, [=](T old) { return old == expected ? v : old; });
}

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <class A, class B>
std::common_type_t<A, B> min(A a, B b) {
  if constexpr (std::is_integral<std::common_type_t<A, B>>::value) return b < a ? b : a;
  else return fmin(a, b);
}
template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
  if constexpr (std::is_integral<std::common_type_t<A, B>>::value) return a < b ? b : a;
  else return fmax(a, b);
}
template <class T>
T __ldg(const T* p) { return *p; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return static_cast<unsigned __int128>(a) * b >> 64; }

inline unsigned __float_as_uint(float x) { return cuda_on_cpu::same_bits<unsigned>(x); }
inline int __float_as_int(float x) { return cuda_on_cpu::same_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return cuda_on_cpu::same_bits<float>(x); }
inline float __int_as_float(int x) { return cuda_on_cpu::same_bits<float>(x); }
inline long long __double_as_longlong(double x) { return cuda_on_cpu::same_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return cuda_on_cpu::same_bits<double>(x); }

inline float rsqrtf(float x) { return 1 / sqrt(x); }
inline float rsqrt(float x) { return 1 / sqrt(x); }
inline double rsqrt(double x) { return 1 / sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float __fsqrt_rn(float x) { return sqrt(x); }
inline double __dsqrt_rn(double x) { return sqrt(x); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline double __drcp_rn(double x) { return 1 / x; }
inline float __double2float_rn(double x) { return static_cast<float>(x); }
inline double sinpi(double x) { return sin(M_PI * remainder(x, 2.0)); }
inline double cospi(double x) { return cos(M_PI * remainder(x, 2.0)); }
inline float sinpif(float x) { return static_cast<float>(sinpi(static_cast<double>(x))); }
inline float cospif(float x) { return static_cast<float>(cospi(static_cast<double>(x))); }
inline void sincospi(double x, double* s, double* c) { *s = sinpi(x), *c = cospi(x); }
inline void sincospif(float x, float* s, float* c) { *s = sinpif(x), *c = cospif(x); }
