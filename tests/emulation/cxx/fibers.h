// Switching between fibers. The sanitizers are told where they are linked in: this file is compiled without them.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) || defined(CK_EMU_UCONTEXT)
#define CK_UCONTEXT 1
#include <ucontext.h>
#else
extern "C" void ck_switch(void** from, void* to);
// What a call leaves alone is saved on the old stack and taken from the new one.
asm(R"(
.text
.globl ck_switch
.hidden ck_switch
.type ck_switch, @function
ck_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ck_switch, .-ck_switch
)");
#endif

extern "C" {
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_destroy_fiber(void* fiber);
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);
__attribute__((weak)) void __tsan_acquire(void* address);
__attribute__((weak)) void __tsan_release(void* address);
}

namespace cuda_on_cpu {

struct Context {
#ifdef CK_UCONTEXT
  ucontext_t saved;
#else
  void* stack;
#endif
  void* tsan;
};

constexpr size_t kStack = 256 * 1024, kGuard = 4096;
constexpr unsigned kNoOrder = 1;  // a switch is not a synchronization

inline void switch_to(Context& from, Context& to) {
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to.tsan, kNoOrder);
#ifdef CK_UCONTEXT
  swapcontext(&from.saved, &to.saved);
#else
  ck_switch(&from.stack, to.stack);
#endif
}

inline void here_as(Context& context) {
  if (__tsan_get_current_fiber) context.tsan = __tsan_get_current_fiber();
}

// At the first switch to it, `entry` starts, which never returns. `stack`: kStack bytes. The offset is one per lane:
// frames at the same place of every stack would fall into the same cache lines.
inline void prepare(Context& context, char* stack, void (*entry)(), size_t offset) {
  mprotect(stack, kGuard, PROT_NONE);
  char* top = stack + kStack - offset;
#ifdef CK_UCONTEXT
  getcontext(&context.saved);
  context.saved.uc_stack = {stack + kGuard, 0, static_cast<size_t>(top - stack) - kGuard};
  makecontext(&context.saved, entry, 0);
#else
  void** frame = reinterpret_cast<void**>(top) - 8;  // six registers, where to return to, and whom entry was called by
  for (int i = 0; i < 8; ++i) frame[i] = nullptr;
  frame[6] = reinterpret_cast<void*>(entry);
  context.stack = frame;
#endif
  if (__tsan_create_fiber) context.tsan = __tsan_create_fiber(0);
}

inline void forget(Context& context) {
  if (__tsan_destroy_fiber) __tsan_destroy_fiber(context.tsan);
}

inline void acquire(void* token) {
  if (__tsan_acquire) __tsan_acquire(token);
}
inline void release(void* token) {
  if (__tsan_release) __tsan_release(token);
}
// For a fiber that does not run, and never will: the one that runs must switch next.
inline void release_as(const Context& context, void* token) {
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(context.tsan, kNoOrder);
  release(token);
}

}  // namespace cuda_on_cpu
