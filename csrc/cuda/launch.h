// Launches any CUDA kernel of the library by its name; needs no CUDA header.
#pragma once

#include <cstdint>

// args: pointers to the kernel's arguments. Returns null or an error message, valid until the thread's next launch.
extern "C" __attribute__((visibility("default"))) const char* ck_launch(
    const char* kernel, int64_t grid, int64_t block, int64_t shared_bytes, int64_t device, void* stream, void** args);
