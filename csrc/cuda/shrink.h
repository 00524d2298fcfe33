// The list of weights that ck_shrink shrinks, as one kernel argument: nothing is copied to the device, nothing has to
// outlive the launch, and a CUDA graph keeps its own copy.
#pragma once

#include "../core/shrink.h"

namespace compaware {

constexpr int kWarps = kThreads / kWarp;  // per block
constexpr int64_t kNarrow = 1024;  // elements: a span up to this size is shrunk by a warp, a longer one by a block

struct ShrinkJob {
  Shrink weight;
  int64_t first;  // its first block in the grid

  CK_HOST_DEVICE static bool narrow(const Shrink& w) { return w.span <= kNarrow; }
  CK_HOST_DEVICE static int64_t blocks(const Shrink& w) {
    return narrow(w) ? (w.spans() + kWarps - 1) / kWarps : w.spans();
  }
};

constexpr int kShrinkJobs = (32764 - 8) / sizeof(ShrinkJob);  // 32764: bytes of arguments, since CUDA 12.1

struct ShrinkJobs {
  int64_t count;
  ShrinkJob jobs[kShrinkJobs];
};

}  // namespace compaware
