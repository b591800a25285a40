/* What all kernels share: the width of a vector register, and loops that are unrolled. */

#ifndef KERNELS_H
#define KERNELS_H

#include <stdint.h>

#if defined __AVX512F__
enum { BYTES = 64 }; /* of a vector register */
#elif defined __AVX__
enum { BYTES = 32 };
#else
enum { BYTES = 16 };
#endif

#define INLINE static inline __attribute__((always_inline))
#define EACH(i, start, end) _Pragma("GCC unroll 8") for (int i = start; i < (end); i++)

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

#endif
