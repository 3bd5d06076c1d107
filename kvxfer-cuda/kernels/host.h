// What kv.cu needs to be C: thread indices, address translation, loads and stores that fault as a
// GPU's do. Included by kv.cu when the compiler is not CUDA's; host.c runs the result.
#ifndef KVX_HOST_H
#define KVX_HOST_H

#include <setjmp.h>
#include <stddef.h>

// The host address of `len` bytes at a device address, or NULL: no access. Asked for each time before
// the bytes are touched; `write` tells what for.
typedef void *kvx_translate(void *context, unsigned long long address, unsigned long long len, int write);

// What kvx_run answers: the driver's codes, and one of its own.
enum {
    KVX_OK = 0,
    KVX_BAD_ADDRESS = 700,
    KVX_MISALIGNED = 716,
    KVX_NO_KERNEL = -1,
};

// Runs a kernel of kv.cu over all threads of the grid, one after the other, on this thread. `args` are
// its parameters, `context` goes to `translate` as it is. Ends at the first access that is refused.
int kvx_run(const char *kernel, unsigned grid, unsigned block, const unsigned long long *args,
            kvx_translate *translate, void *context);

// The launch that runs on this thread.
struct kvx_host {
    unsigned thread, threads;
    kvx_translate *translate;
    void *context;
    jmp_buf fault;
};
extern __thread struct kvx_host *kvx_host;

#define KVX_KERNEL static void
#define KVX_INLINE static inline __attribute__((always_inline))
#define KVX_UNROLL
#define KVX_ROLLED
#define KVX_THREAD (kvx_host->thread)
#define KVX_THREADS (kvx_host->threads)

KVX_INLINE u64 kvx_at(u64 address, u64 len, int write)
{
    void *at = kvx_host->translate(kvx_host->context, address, len, write);
    if (at == NULL) {
        longjmp(kvx_host->fault, KVX_BAD_ADDRESS);
    }
    return (u64)at;
}

KVX_INLINE void *kvx_aligned(u64 at, u64 size)
{
    if (at % size != 0) {
        longjmp(kvx_host->fault, KVX_MISALIGNED);
    }
    return (void *)at;
}

// The barrier keeps the compiler from loading again what it has loaded.
KVX_INLINE void kvx_fetch(void *to, u64 at, u64 size)
{
    __builtin_memcpy(to, kvx_aligned(at, size), size);
    __asm__ volatile("" : : : "memory");
}

KVX_INLINE struct kvx_pair kvx_load16(u64 at)
{
    struct kvx_pair v;
    kvx_fetch(&v, at, 16);
    return v;
}

KVX_INLINE u64 kvx_load8(u64 at)
{
    u64 v;
    kvx_fetch(&v, at, 8);
    return v;
}

KVX_INLINE u32 kvx_load4(u64 at)
{
    u32 v;
    kvx_fetch(&v, at, 4);
    return v;
}

KVX_INLINE u32 kvx_load1(u64 at)
{
    unsigned char v;
    kvx_fetch(&v, at, 1);
    return v;
}

KVX_INLINE void kvx_store16(u64 at, struct kvx_pair v)
{
    __builtin_memcpy(kvx_aligned(at, 16), &v, 16);
}

KVX_INLINE void kvx_store8(u64 at, u64 v)
{
    __builtin_memcpy(kvx_aligned(at, 8), &v, 8);
}

KVX_INLINE void kvx_store1(u64 at, u32 v)
{
    *(unsigned char *)at = (unsigned char)v;
}

KVX_INLINE u64 kvx_mad(u32 a, u32 b, u64 c)
{
    return (u64)a * b + c;
}

KVX_INLINE void kvx_add(u64 at, u64 v)
{
    __atomic_fetch_add((u64 *)kvx_aligned(at, 8), v, __ATOMIC_RELAXED);
}

#endif
