// Compiles CK_KERNEL, a header of this folder, once per instruction set: in namespace baseline for any machine (vectors
// of 16 bytes), and with GCC on x86-64 in avx2 (32 bytes) and avx512 (64 bytes). isa.h picks one of them at run time.
// target_clones cannot do this: the vector width decides the layout of packed factors.
//
// CK_AVX2, CK_AVX512: compiler targets of the last two, by default x86-64-v3 and v4; isa.h requires these of a machine.
#define CK_ISA baseline
#define CK_VECTOR_BYTES 16
#include CK_KERNEL
#undef CK_ISA
#undef CK_VECTOR_BYTES
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define CK_X86_LEVELS
#ifndef CK_AVX2
#define CK_AVX2 "arch=x86-64-v3"
#define CK_AVX512 "arch=x86-64-v4"
#endif
#define CK_PRAGMA(text) _Pragma(#text)
#define CK_TARGET(name) CK_PRAGMA(GCC target(name))
#pragma GCC push_options
CK_TARGET(CK_AVX2)
#define CK_ISA avx2
#define CK_VECTOR_BYTES 32
#include CK_KERNEL
#undef CK_ISA
#undef CK_VECTOR_BYTES
#pragma GCC pop_options
#pragma GCC push_options
CK_TARGET(CK_AVX512)
#define CK_ISA avx512
#define CK_VECTOR_BYTES 64
#include CK_KERNEL
#undef CK_ISA
#undef CK_VECTOR_BYTES
#pragma GCC pop_options
#endif
#undef CK_KERNEL
