#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "launch.h"
#include "shrink.cuh"

namespace compaware::cuda {
namespace {

template <class T, class C>
void launch(const Shrink& w, cudaStream_t stream) {
  const int threads = w.span >= 1024 ? 256 : w.span >= 128 ? 128 : kWarp;
  shrink_kernel<T, C><<<static_cast<unsigned>(w.spans()), threads, 0, stream>>>(w);
}

}  // namespace

const char* shrink(const Shrink& w, int device, void* stream) {
  // torch has set the device in its own copy of the CUDA runtime; this library carries another, linked statically.
  cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const auto s = static_cast<cudaStream_t>(stream);
  switch (w.dtype) {
    case DType::f64: launch<double, double>(w, s); break;
    case DType::f32: launch<float, float>(w, s); break;
    case DType::f16: launch<__half, float>(w, s); break;
    case DType::bf16: launch<__nv_bfloat16, float>(w, s); break;
  }
  error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace compaware::cuda
