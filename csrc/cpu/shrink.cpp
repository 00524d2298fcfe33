// soft_threshold, group_shrink, sparse_group_shrink, neuron_shrink_ and the in-place forms on the CPU.
#include "../core/shrink_ops.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

// Narrower than x86-64-v3 and v4, which would fuse more multiply-adds and change the last bit of some fp64 norms.
#define CK_AVX2 "avx2"
#define CK_AVX512 "avx512f"
#define CK_KERNEL "shrink_kernel.h"
#include "each_isa.h"
#include "isa.h"

namespace compaware {
namespace {

// One parallel region over the elements of the whole list: small layers share a thread, large ones are split. A thread
// takes the spans that start in its range, so a span is never split and results do not depend on the thread count.
void run(const std::vector<Shrink>& work, int32_t) {
  const auto kernel = CK_OF_ISA(shrink);
  std::vector<int64_t> first{0};
  for (const Shrink& w : work) first.push_back(first.back() + w.spans() * w.span);
  torch::stable::parallel_for(0, first.back(), 1 << 15, [&](int64_t begin, int64_t end) {
    for (size_t i = 0; i < work.size(); ++i) {
      const Shrink& w = work[i];
      const auto span_at = [&](int64_t e) {
        return (std::clamp(e, first[i], first[i + 1]) - first[i] + w.span - 1) / w.span;
      };
      kernel(w, span_at(begin), span_at(end));
    }
  });
}

}  // namespace
}  // namespace compaware

STABLE_TORCH_LIBRARY_IMPL(compaware, CPU, m) {
  compaware::register_shrink<torch::headeronly::DeviceType::CPU, compaware::run>(m);
}
