// The macros that the kernels share.
#pragma once

#define GMASK_JOIN_(a, b) a##b
#define GMASK_JOIN(a, b) GMASK_JOIN_(a, b)

#if defined(__clang__)
#define GMASK_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define GMASK_UNROLL _Pragma("GCC unroll 32")
#else
#define GMASK_UNROLL
#endif

#if defined(__GNUC__)
#define GMASK_INLINE static inline __attribute__((always_inline))
#define GMASK_PREFETCH(address) __builtin_prefetch(address)
// For what is read once: it does not push all else out of the caches.
#define GMASK_PREFETCH_ONCE(address) __builtin_prefetch(address, 0, 0)
#else
#define GMASK_INLINE static inline
#define GMASK_PREFETCH(address) (void)(address)
#define GMASK_PREFETCH_ONCE(address) (void)(address)
#endif

// Has compilers compute a vector here and keep it in a register. They would else load it again for each use, or keep
// all products of a loop, more than there are registers, since sums of integers may be taken in any order.
#if defined(__GNUC__) && defined(__x86_64__)
#define GMASK_KEEP(vector) __asm__("" : "+x"(vector))
#elif defined(__GNUC__) && defined(__aarch64__)
#define GMASK_KEEP(vector) __asm__("" : "+w"(vector))
#else
#define GMASK_KEEP(vector) (void)(vector)
#endif
