// soft_threshold, group_shrink, sparse_group_shrink and their in-place forms on CUDA: shrink.cu, registered.
#include "../shrink_ops.h"
#include "launch.h"

#include <torch/csrc/stable/accelerator.h>

// Weak: null in a CPU-only torch, where this library must load too.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace compaware {
namespace {

// One launch per weight, on the current stream of its device.
void run(const std::vector<Shrink>& work, int32_t device) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream && aoti_torch_get_current_cuda_stream(device, &stream) == 0,
                  "wanted the current CUDA stream of device ", device, "; this torch has none");
  for (const Shrink& w : work)
    STD_TORCH_CHECK(w.spans() <= INT32_MAX, "wanted at most 2^31 - 1 rows in a weight; got ", w.spans());
  for (const Shrink& w : work) {
    const char* error = cuda::shrink(w, device, stream);
    STD_TORCH_CHECK(!error, "the shrink kernel was not launched: ", error);
  }
}

}  // namespace
}  // namespace compaware

STABLE_TORCH_LIBRARY_IMPL(compaware, CUDA, m) {
  compaware::register_shrink<torch::headeronly::DeviceType::CUDA, compaware::run>(m);
}
