// The shrinkage ops for the CPU, by ck_shrink: csrc/cuda/shrink_ops.cpp with another device.
#include "../../../csrc/core/shrink_ops.h"
#include "../../../csrc/cuda/shrink_launch.h"

namespace {

void run(const std::vector<compaware::Shrink>& work, int32_t) { compaware::launch_shrink(work, 0, nullptr); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(compaware, CPU, m) {
  compaware::register_shrink<torch::headeronly::DeviceType::CPU, run>(m);
}
