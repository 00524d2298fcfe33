// soft_threshold, group_shrink, sparse_group_shrink, neuron_shrink_ and the in-place forms on CUDA.
#include "../core/shrink_ops.h"
#include "shrink_launch.h"

#include <torch/csrc/stable/accelerator.h>

// Weak: null in a CPU-only torch, in which this library must load as well.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace compaware {
namespace {

// On the current stream of the weights' device.
void run(const std::vector<Shrink>& work, int32_t device) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream && aoti_torch_get_current_cuda_stream(device, &stream) == 0,
                  "wanted the current CUDA stream of device ", device, "; this torch has none");
  launch_shrink(work, device, stream);
}

}  // namespace
}  // namespace compaware

STABLE_TORCH_LIBRARY_IMPL(compaware, CUDA, m) {
  compaware::register_shrink<torch::headeronly::DeviceType::CUDA, compaware::run>(m);
}
