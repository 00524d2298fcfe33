// What the CUDA kernels offer to the op files, without a CUDA header: each launcher returns null, or what went wrong.
#pragma once

#include "../core/shrink.h"

namespace compaware::cuda {

const char* shrink(const Shrink& w, int device, void* stream);

}  // namespace compaware::cuda
