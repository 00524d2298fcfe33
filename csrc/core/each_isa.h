// Includes CK_KERNEL, a header of csrc/core, once for every instruction set: in namespace baseline for what every machine
// has (vectors of 16 bytes), in avx2 (32) and avx512 (64) where the compiler can. The caller picks one at run time (cpu/isa.h),
// and not by target_clones: the number of lanes decides the layout.
#define CK_ISA baseline
#include CK_KERNEL
#undef CK_ISA
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define CK_X86_LEVELS
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define CK_ISA avx2
#include CK_KERNEL
#undef CK_ISA
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define CK_ISA avx512
#include CK_KERNEL
#undef CK_ISA
#pragma GCC pop_options
#endif
#undef CK_KERNEL
