// The copy kernel: any number of runs of bytes, and the checksum of what was stored.
//
// In the subset that C and CUDA share, without barriers, shared memory or warp operations, so that
// host.c runs the same lines one thread after the other: under ASAN and UBSAN (`make kernels`), and
// on the stand-in. Device code is kv.ptx, made from this file by build.py and committed.
//
// How the work is cut. An item is one run of bytes; KVX_TILE bytes of it are a tile; KVX_LANES
// threads take a tile. The tiles of all items are numbered in turn. A warp takes a contiguous range
// of them and in each step KVX_GROUPS adjacent ones, so that long runs are read 2 KiB at a time and
// four runs of 256 B keep all lanes busy. A thread keeps its part of the sum in a register until
// the slot changes, and its lane has a sum of its own in memory: KVX_LANES parts a slot, to be added
// by the host. So an atomic operation meets at most one other warp's at its address, not 31 of its own.
//
// What this assumes about GPUs, and no run has measured:
//  - HBM answers in about 0.8 us. With 64 bytes under way per thread and 512 threads a block, 16 blocks
//    have 512 KiB under way: 650 GB/s, more than NVLink 4 carries (NVLink 5 needs 32 blocks).
//  - Blocks spread over the multiprocessors, one each, before any gets a second.
//  - The sum costs eight integer instructions a word, about 40 bytes a clock on a multiprocessor: a little
//    less than what it loads, several times its share of a link; and stores don't wait for it.
//  - Eight threads store 128 adjacent bytes in one instruction, which NVLink carries as one packet.
//  - Items stay in L1 (40 bytes, read by eight threads at once), so finding the next one is cheap.
//  - The additions to memory, one per thread and slot it met (8192 in the least of 16 blocks), take L2 about a
//    microsecond at the end.

#define KVX_TILE 512u
#define KVX_LANES 8u
// Of a warp.
#define KVX_GROUPS (32u / KVX_LANES)
// Of 16 bytes, a thread's share of a tile.
#define KVX_VECTORS (KVX_TILE / KVX_LANES / 16)
// What grows the key from word to word; kvxfer_core::sum has the definition of the checksum.
#define KVX_STEP 0x9E3779B97F4A7C15ull

typedef unsigned int u32;
typedef unsigned long long u64;

// One run of bytes. kvxfer-cuda/src/device/kernels.rs has its twin.
struct kvx_item {
    u64 src;
    u64 dst;        // 0: only summed
    u64 len;        // at least 1
    u64 key;        // kvxfer_core::sum::word_key of the run's first word
    u32 slot;       // which sum
    u32 first_tile; // ceil(len / KVX_TILE) of all items before, added up
};

struct kvx_pair {
    u64 a, b;
};

#ifdef __CUDACC__

#define KVX_KERNEL extern "C" __global__ __launch_bounds__(512, 2) void
#define KVX_INLINE static __device__ __forceinline__
#define KVX_UNROLL _Pragma("unroll")
#define KVX_ROLLED _Pragma("unroll 1")
#define KVX_THREAD (blockIdx.x * blockDim.x + threadIdx.x)
#define KVX_THREADS (gridDim.x * blockDim.x)

// Every address passes here before bytes at it are touched.
KVX_INLINE u64 kvx_at(u64 address, u64 len, int write) { return address; }

// Written out, so that each load happens once (what is summed is what is stored), is as wide as it
// says, and what is read once is not kept in L1. Volatile orders them among themselves only: the
// loads of a tile all come before its first store.
KVX_INLINE struct kvx_pair kvx_load16(u64 at)
{
    struct kvx_pair v;
    asm volatile("ld.global.L1::no_allocate.v2.u64 {%0, %1}, [%2];" : "=l"(v.a), "=l"(v.b) : "l"(at));
    return v;
}

KVX_INLINE u64 kvx_load8(u64 at)
{
    u64 v;
    asm volatile("ld.global.u64 %0, [%1];" : "=l"(v) : "l"(at));
    return v;
}

KVX_INLINE u32 kvx_load4(u64 at)
{
    u32 v;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(at));
    return v;
}

KVX_INLINE u32 kvx_load1(u64 at)
{
    u32 v;
    asm volatile("ld.global.u8 %0, [%1];" : "=r"(v) : "l"(at));
    return v;
}

KVX_INLINE void kvx_store16(u64 at, struct kvx_pair v)
{
    asm volatile("st.global.v2.u64 [%0], {%1, %2};" : : "l"(at), "l"(v.a), "l"(v.b));
}

KVX_INLINE void kvx_store8(u64 at, u64 v)
{
    asm volatile("st.global.u64 [%0], %1;" : : "l"(at), "l"(v));
}

KVX_INLINE void kvx_store1(u64 at, u32 v)
{
    asm volatile("st.global.u8 [%0], %1;" : : "l"(at), "r"(v));
}

// a * b + c, of two halves and a whole.
KVX_INLINE u64 kvx_mad(u32 a, u32 b, u64 c)
{
    u64 v;
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(v) : "r"(a), "r"(b), "l"(c));
    return v;
}

KVX_INLINE void kvx_add(u64 at, u64 v)
{
    asm volatile("red.global.add.u64 [%0], %1;" : : "l"(at), "l"(v));
}

#else
#include "host.h"
#endif

// The sum with another word.
KVX_INLINE u64 kvx_sum(u64 sum, u64 word, u64 key)
{
    u64 x = word ^ key;
    return kvx_mad((u32)x, (u32)(x >> 32), sum + x);
}

KVX_INLINE u32 kvx_first_tile(u64 items, u32 index)
{
    // first_tile is the last field.
    return kvx_load4(kvx_at(items + index * (u64)sizeof(struct kvx_item) + 36, 4, 0));
}

// The item that has the tile. Items of one length, which is what blocks are, take two loads;
// otherwise it is a binary search.
KVX_INLINE u32 kvx_find(u64 items, u32 n_items, u32 n_tiles, u32 tile)
{
    u32 low = 0, high = n_items - 1;
    u32 guess = (u32)(((float)tile + 0.5f) * ((float)n_items / (float)n_tiles));
    if (guess > high) {
        guess = high;
    }
    if (kvx_first_tile(items, guess) > tile) {
        high = guess - 1; // not below 0: the first item's first tile is tile 0
    } else {
        low = guess;
        if (guess < high && kvx_first_tile(items, guess + 1) > tile) {
            high = guess;
        }
    }
    while (low < high) {
        u32 middle = low + (high - low + 1) / 2;
        if (kvx_first_tile(items, middle) > tile) {
            high = middle - 1;
        } else {
            low = middle;
        }
    }
    return low;
}

// The item that has a tile KVX_GROUPS after one of the item `index`: an item has at least one tile,
// so there are KVX_GROUPS candidates, all looked at together.
KVX_INLINE u32 kvx_next(u64 items, u32 n_items, u32 index, u32 tile)
{
    u32 steps = 0;
    KVX_UNROLL
    for (u32 k = 1; k <= KVX_GROUPS; k++) {
        if (index + k < n_items) {
            steps += kvx_first_tile(items, index + k) <= tile;
        }
    }
    return index + steps;
}

// A whole tile in vectors of 16 bytes: all loads, then all stores, then the sum.
KVX_INLINE u64 kvx_whole(u64 src, u64 dst, int copy, u32 lane, u64 key)
{
    struct kvx_pair v[KVX_VECTORS];
    u64 sum = 0;
    src += lane * 16;
    dst += lane * 16;
    key += lane * (2 * KVX_STEP);
    KVX_UNROLL
    for (u32 i = 0; i < KVX_VECTORS; i++) {
        v[i] = kvx_load16(src + i * KVX_LANES * 16);
    }
    if (copy) {
        KVX_UNROLL
        for (u32 i = 0; i < KVX_VECTORS; i++) {
            kvx_store16(dst + i * KVX_LANES * 16, v[i]);
        }
    }
    KVX_UNROLL
    for (u32 i = 0; i < KVX_VECTORS; i++) {
        sum = kvx_sum(sum, v[i].a, key + i * KVX_LANES * 2 * KVX_STEP);
        sum = kvx_sum(sum, v[i].b, key + (i * KVX_LANES * 2 + 1) * KVX_STEP);
    }
    return sum;
}

// The first `vectors` vectors of a tile.
KVX_INLINE u64 kvx_part(u64 src, u64 dst, int copy, u32 vectors, u32 lane, u64 key)
{
    struct kvx_pair v[KVX_VECTORS];
    u64 sum = 0;
    src += lane * 16;
    dst += lane * 16;
    key += lane * (2 * KVX_STEP);
    KVX_UNROLL
    for (u32 i = 0; i < KVX_VECTORS; i++) {
        v[i].a = v[i].b = 0;
        if (lane + i * KVX_LANES < vectors) {
            v[i] = kvx_load16(src + i * KVX_LANES * 16);
        }
    }
    KVX_UNROLL
    for (u32 i = 0; i < KVX_VECTORS; i++) {
        u64 with = kvx_sum(sum, v[i].a, key + i * KVX_LANES * 2 * KVX_STEP);
        with = kvx_sum(with, v[i].b, key + (i * KVX_LANES * 2 + 1) * KVX_STEP);
        if (lane + i * KVX_LANES < vectors) {
            if (copy) {
                kvx_store16(dst + i * KVX_LANES * 16, v[i]);
            }
            sum = with;
        }
    }
    return sum;
}

// The first `words` words of a tile, one at a time: four loads under way.
KVX_INLINE u64 kvx_words(u64 src, u64 dst, int copy, u32 words, u32 lane, u64 key)
{
    u64 v[4];
    u64 sum = 0;
    KVX_ROLLED
    for (u32 word = lane; word < words; word += 4 * KVX_LANES) {
        KVX_UNROLL
        for (u32 i = 0; i < 4; i++) {
            v[i] = 0;
            if (word + i * KVX_LANES < words) {
                v[i] = kvx_load8(src + word * 8 + i * KVX_LANES * 8);
            }
        }
        KVX_UNROLL
        for (u32 i = 0; i < 4; i++) {
            u64 with = kvx_sum(sum, v[i], key + (word + i * KVX_LANES) * KVX_STEP);
            if (word + i * KVX_LANES < words) {
                if (copy) {
                    kvx_store8(dst + word * 8 + i * KVX_LANES * 8, v[i]);
                }
                sum = with;
            }
        }
    }
    return sum;
}

// The words of `len` bytes from word `first` on, byte by byte; the last one may be cut off.
KVX_INLINE u64 kvx_bytes(u64 src, u64 dst, int copy, u32 len, u32 first, u32 lane, u64 key)
{
    u64 sum = 0;
    KVX_ROLLED
    for (u32 at = (first + lane) * 8; at < len; at += KVX_LANES * 8) {
        u64 word = 0;
        KVX_UNROLL
        for (u32 i = 0; i < 8; i++) {
            if (at + i < len) {
                word |= (u64)kvx_load1(src + at + i) << (8 * i);
            }
        }
        if (copy) {
            KVX_UNROLL
            for (u32 i = 0; i < 8; i++) {
                if (at + i < len) {
                    kvx_store1(dst + at + i, (u32)(word >> (8 * i)));
                }
            }
        }
        sum = kvx_sum(sum, word, key + at / 8 * KVX_STEP);
    }
    return sum;
}

// What this lane adds for a tile, or for what there is of one.
KVX_INLINE u64 kvx_tile(u64 src, u64 dst, int copy, u64 left, u32 lane, u64 key)
{
    u32 len = left < KVX_TILE ? (u32)left : KVX_TILE;
    u32 odd = (u32)(copy ? src | dst : src);
    u32 done = 0;
    u64 sum = 0;
    src = kvx_at(src, len, 0);
    if (copy) {
        dst = kvx_at(dst, len, 1);
    }
    if (odd % 16 == 0) {
        if (len == KVX_TILE) {
            return kvx_whole(src, dst, copy, lane, key);
        }
        done = len / 16 * 2;
        sum = kvx_part(src, dst, copy, len / 16, lane, key);
    } else if (odd % 8 == 0) {
        done = len / 8;
        sum = kvx_words(src, dst, copy, done, lane, key);
    }
    if (done * 8 < len) {
        sum += kvx_bytes(src, dst, copy, len, done, lane, key);
    }
    return sum;
}

KVX_INLINE void kvx_flush(u64 sums, u32 slot, u32 lane, u64 sum)
{
    kvx_add(kvx_at(sums + (slot * (u64)KVX_LANES + lane) * 8, 8, 1), sum);
}

// Copies and sums. `items` and `sums` are addresses on the device: `n_items` (at least 1) of kvx_item,
// and KVX_LANES sums per slot, which are added to. `n_tiles` is below 2^31. Runs may not overlap, as
// their order is nobody's. A block is a multiple of 32 threads, at most 512.
KVX_KERNEL kvx_copy_sum(u64 items, u64 n_items, u64 n_tiles, u64 sums)
{
    u32 lane = KVX_THREAD % KVX_LANES;
    u32 warp = KVX_THREAD / 32, warps = KVX_THREADS / 32;
    u32 steps = ((u32)n_tiles + KVX_GROUPS - 1) / KVX_GROUPS;
    u32 span = (steps + warps - 1) / warps * KVX_GROUPS;
    u32 end = warp * span + span < (u32)n_tiles ? warp * span + span : (u32)n_tiles;
    u32 tile = warp * span + KVX_THREAD / KVX_LANES % KVX_GROUPS;
    if (tile >= end) {
        return;
    }
    u32 index = kvx_find(items, (u32)n_items, (u32)n_tiles, tile);
    u32 slot = kvx_load4(kvx_at(items + index * (u64)sizeof(struct kvx_item) + 32, 4, 0));
    u64 sum = 0;
    for (;;) {
        u64 at = kvx_at(items + index * (u64)sizeof(struct kvx_item), sizeof(struct kvx_item), 0);
        u64 offset = (u64)(tile - kvx_load4(at + 36)) * KVX_TILE;
        u64 src = kvx_load8(at) + offset;
        u64 dst = kvx_load8(at + 8);
        u64 left = kvx_load8(at + 16) - offset;
        u64 key = kvx_load8(at + 24) + offset / 8 * KVX_STEP;
        u32 here = kvx_load4(at + 32);
        int copy = dst != 0;
        dst += offset;
        if (here != slot) {
            kvx_flush(sums, slot, lane, sum);
            slot = here;
            sum = 0;
        }
        for (;;) {
            sum += kvx_tile(src, dst, copy, left, lane, key);
            tile += KVX_GROUPS;
            if (left <= KVX_GROUPS * KVX_TILE || tile >= end) {
                break;
            }
            src += KVX_GROUPS * KVX_TILE;
            dst += KVX_GROUPS * KVX_TILE;
            left -= KVX_GROUPS * KVX_TILE;
            key += KVX_GROUPS * KVX_TILE / 8 * KVX_STEP;
        }
        if (tile >= end) {
            break;
        }
        index = kvx_next(items, (u32)n_items, index, tile);
    }
    kvx_flush(sums, slot, lane, sum);
}
