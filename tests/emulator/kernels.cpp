// ck_launch for the CPU: every kernel of the project, and those that only tests have.
#include <string>
#include <utility>

#if __has_include("../../csrc/cuda/small.cuh")
#include "../../csrc/cuda/kernels.cuh"
#else
#include "../../csrc/cuda/shrink.cuh"
#define CK_KERNELS(X) X(ck_shrink)
#endif

#if __has_include("block_cases.cuh")
#include "block_cases.cuh"
#else
#define CK_BLOCK_CASES(X)
#endif

#include "../../csrc/cuda/launch.h"
#include "planted.cuh"

namespace {

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
  kernel(*static_cast<A*>(args[I])...);
}

struct Entry {
  const char* name;
  void (*kernel)(void** args);
};

template <class... A>
void call(void (*kernel)(A...), void** args) {
  call(kernel, args, std::index_sequence_for<A...>());
}

#define CK_ENTRY(kernel) {#kernel, [](void** args) { call(kernel, args); }},
const Entry kEntries[] = {CK_KERNELS(CK_ENTRY) CK_BLOCK_CASES(CK_ENTRY) CK_PLANTED(CK_ENTRY)};

}  // namespace

const char* ck_launch(const char* kernel, int64_t grid, int64_t block, int64_t shared_bytes, int64_t, void*,
                      void** args) {
  static std::string error;
  const char* reason = "there is no such kernel";
  for (const Entry& entry : kEntries)
    if (!strcmp(entry.name, kernel)) reason = cuda_on_cpu::launch(entry.kernel, args, grid, block, shared_bytes);
  return reason ? (error = std::string(kernel) + ": " + reason).c_str() : nullptr;
}
