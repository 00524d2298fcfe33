// Launches ck_shrink: once per kShrinkJobs weights.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <vector>

#include "launch.h"
#include "shrink.h"

namespace compaware {

inline void launch_shrink(const std::vector<Shrink>& work, int32_t device, void* stream) {
  for (const Shrink& w : work)
    STD_TORCH_CHECK(ShrinkJob::blocks(w) <= INT32_MAX, "wanted a weight of at most 2^31 - 1 blocks; got ",
                    ShrinkJob::blocks(w));
  for (auto w = work.begin(); w != work.end();) {
    ShrinkJobs list{};
    int64_t grid = 0;
    for (; w != work.end() && list.count < kShrinkJobs && grid + ShrinkJob::blocks(*w) <= INT32_MAX; ++w) {
      list.jobs[list.count++] = {*w, grid};
      grid += ShrinkJob::blocks(*w);
    }
    void* args[] = {&list};
    const char* error = ck_launch("ck_shrink", grid, kThreads, 0, device, stream, args);
    STD_TORCH_CHECK(!error, "the shrink kernel was not launched: ", error);
  }
}

}  // namespace compaware
