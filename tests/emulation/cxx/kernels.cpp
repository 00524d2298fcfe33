// ck_launch for the CPU: every kernel of the project, and those that only tests have.
#include <string>
#include <utility>

#include "../../../csrc/cuda/kernels.cuh"
#include "../../../csrc/cuda/launch.h"
#include "block_cases.cuh"
#include "planted.cuh"

namespace {

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
  kernel(*static_cast<A*>(args[I])...);
}

// A letter for each parameter: pointer, int, double or struct.
template <class... A>
std::string letters(void (*)(A...)) {
  const auto letter = [](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (std::is_class<T>::value) return 's';
    static_assert(std::is_class<T>::value || sizeof(T) == 8, "an argument is 8 bytes wide");
    return std::is_pointer<T>::value ? 'p' : std::is_same<T, double>::value ? 'd' : 'i';
  };
  return {letter(static_cast<A*>(nullptr))...};
}

struct Entry {
  const char* name;
  void (*kernel)(void** args);
  std::string (*parameters)();
};

template <class... A>
void call(void (*kernel)(A...), void** args) {
  call(kernel, args, std::index_sequence_for<A...>());
}

#define CK_ENTRY(kernel) {#kernel, [](void** args) { call(kernel, args); }, [] { return letters(kernel); }},
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

// What the kernel takes, as letters; null: there is no such kernel.
extern "C" const char* ck_parameters(const char* kernel) {
  static std::string found;
  for (const Entry& entry : kEntries)
    if (!strcmp(entry.name, kernel)) return (found = entry.parameters()).c_str();
  return nullptr;
}
