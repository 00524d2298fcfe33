// ck_launch of the compiled library, which Python calls through ctypes, and C++ directly.
#include <cuda_runtime.h>

#include <cstring>
#include <string>

#include "kernels.cuh"
#include "launch.h"

namespace {

struct Entry {
  const char* name;
  const void* function;
};

#define CK_ENTRY(kernel) {#kernel, reinterpret_cast<const void*>(&kernel)},
const Entry kEntries[] = {CK_KERNELS(CK_ENTRY)};

const void* find(const char* kernel) {
  for (const Entry& entry : kEntries)
    if (!std::strcmp(entry.name, kernel)) return entry.function;
  return nullptr;
}

const char* keep(std::string message) {
  thread_local std::string kept;
  kept = std::move(message);
  return kept.c_str();
}

}  // namespace

const char* ck_launch(const char* kernel, int64_t grid, int64_t block, int64_t shared_bytes, int64_t device,
                      void* stream, void** args) {
  const void* function = find(kernel);
  if (!function) return keep(std::string("no kernel is called ") + kernel);
  // torch has set the device in its own copy of the CUDA runtime; this library has another one, linked statically.
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (!error) error = cudaSetDevice(static_cast<int>(device));
  if (!error && shared_bytes > 48 * 1024)  // more than a kernel may have by default
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (!error)
    error = cudaLaunchKernel(function, dim3(static_cast<unsigned>(grid)), dim3(static_cast<unsigned>(block)), args,
                             static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream));
  if (before != device) cudaSetDevice(before);
  return error ? keep(std::string(kernel) + ": " + cudaGetErrorString(error)) : nullptr;
}
