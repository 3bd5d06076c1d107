// Runs the kernel on the host against a naive copy and sum: `check [seed [launches]]`. Built with ASAN and UBSAN
// by build.py, which also builds it from kernels with a planted bug, each of which has to fail here.
#include "host.c"

#include <stdio.h>
#include <stdlib.h>

// Not host addresses, so that one that was not translated faults.
#define SHIFT (1ull << 60)
#define PAD 64u
#define POISON 0xA5
#define MAX_ITEMS 300u

struct run {
    const unsigned char *start;
    u64 len;
    int write;
};

// What the kernel may touch in this case: its tables, and of each item exactly its bytes.
struct access {
    struct run runs[2 * MAX_ITEMS + 2];
    u32 n;
};

static u64 state;

static u32 below(u32 n)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (u32)((state >> 16) % n);
}

static void *translate(void *context, unsigned long long address, unsigned long long len, int write)
{
    const struct access *access = context;
    for (u32 i = 0; i < access->n; i++) {
        const struct run *run = &access->runs[i];
        u64 offset = address - ((u64)run->start + SHIFT);
        if (run->write == write && offset < run->len && len <= run->len - offset) {
            return (void *)(address - SHIFT);
        }
    }
    return NULL;
}

static u64 allow(struct access *access, const void *start, u64 len, int write)
{
    access->runs[access->n++] = (struct run){start, len, write};
    return (u64)start + SHIFT;
}

// By the definition in kvxfer-core/src/sum.rs, word by word.
static u64 naive_sum(const unsigned char *bytes, u64 len, u64 seed, u64 index)
{
    u64 sum = 0;
    for (u64 at = 0; at < len; at += 8, index++) {
        u64 word = 0;
        for (u64 i = 0; i < 8 && at + i < len; i++) {
            word += (u64)bytes[at + i] << (8 * i);
        }
        u64 x = word ^ (seed + (index + 1) * 0x9E3779B97F4A7C15ull);
        u64 low = x & 0xFFFFFFFFu, high = x >> 32;
        sum += x + low * high;
    }
    return sum;
}

static u32 some_len(u32 kind)
{
    static const u32 usual[] = {256, 512, 656, 1024, 2048, 2112, 4096, 10496, 18432, 32768, 70000};
    switch (kind) {
    case 0: return 1 + below(40);
    case 1: return 1 + below(600);
    case 2: return 16 * (1 + below(200));
    case 3: return 8 * (1 + below(300));
    case 4: return usual[below(sizeof usual / sizeof *usual)];
    default: return 1 + below(9000);
    }
}

static u32 some_shift(u32 kind)
{
    switch (kind) {
    case 0: return 0;
    case 1: return 8 * below(2);
    default: return below(16);
    }
}

static int fail(const char *what, u32 n_items, u32 index, const struct kvx_item *item)
{
    printf("%s: item %u of %u: src %% 16 = %u, dst %% 16 = %u, len %llu\n", what, index, n_items, (u32)(item->src % 16),
           (u32)(item->dst % 16), item->len);
    return 1;
}

// One launch. Returns whether something is wrong.
static int launch(u64 *bytes_done)
{
    u32 n_items = below(4) == 0 ? 1 + below(MAX_ITEMS) : 1 + below(24);
    u32 lens = below(7), shifts = below(4), uniform = below(3) == 0 ? some_len(lens) : 0;
    u32 n_slots = 1 + below(5);
    u64 seed = state * 0x2545F4914F6CDD1Dull;
    struct access access = {.n = 0};
    // Of exactly their sizes, so that ASAN sees what runs over.
    struct kvx_item *items = malloc(n_items * sizeof *items);
    unsigned char *src[MAX_ITEMS], *dst[MAX_ITEMS];
    u64 *sums = malloc(n_slots * KVX_LANES * sizeof *sums);
    u64 expected[5] = {0}, before[5] = {0};
    u64 n_tiles = 0;
    int bad = 0;
    for (u32 i = 0; i < n_slots * KVX_LANES; i++) {
        sums[i] = below(3) == 0 ? ~0ull - below(9) : 0;
        before[i / KVX_LANES] += sums[i];
    }
    for (u32 i = 0; i < n_items; i++) {
        u64 len = uniform != 0 ? uniform : some_len(lens), word = below(1000);
        u32 src_shift = some_shift(shifts), dst_shift = shifts == 3 ? some_shift(3) : src_shift;
        struct kvx_item *item = &items[i];
        src[i] = malloc(src_shift + len);
        dst[i] = malloc(PAD + dst_shift + len + PAD);
        for (u64 b = 0; b < src_shift + len; b++) {
            src[i][b] = (unsigned char)(below(5) == 0 ? 0 : below(256));
        }
        memset(dst[i], POISON, PAD + dst_shift + len + PAD);
        item->src = allow(&access, src[i] + src_shift, len, 0);
        item->dst = below(6) == 0 ? 0 : allow(&access, dst[i] + PAD + dst_shift, len, 1);
        item->len = len;
        item->key = seed + (word + 1) * KVX_STEP;
        item->slot = below(3) == 0 ? below(n_slots) : i * n_slots / n_items;
        item->first_tile = (u32)n_tiles;
        n_tiles += (len + KVX_TILE - 1) / KVX_TILE;
        expected[item->slot] += naive_sum(src[i] + src_shift, len, seed, word);
        *bytes_done += len;
    }
    u64 args[] = {allow(&access, items, n_items * sizeof *items, 0), n_items, n_tiles,
                  allow(&access, sums, n_slots * KVX_LANES * sizeof *sums, 1)};
    int code = kvx_run("kvx_copy_sum", 1 + below(3), 32 * (1 + below(below(8) == 0 ? 16 : 3)), args, translate, &access);
    if (code != KVX_OK) {
        printf("the kernel ended with %d\n", code);
        bad = 1;
    }
    for (u32 i = 0; i < n_items; i++) {
        const struct kvx_item *item = &items[i];
        u32 dst_shift = item->dst == 0 ? 0 : (u32)(item->dst - SHIFT - (u64)dst[i] - PAD);
        const unsigned char *from = (const unsigned char *)(item->src - SHIFT);
        for (u64 b = 0; b < PAD + dst_shift + item->len + PAD; b++) {
            u64 at = b - PAD - dst_shift;
            unsigned char want = item->dst != 0 && at < item->len ? from[at] : POISON;
            if (dst[i][b] != want && !bad) {
                bad = fail(at < item->len ? "wrong byte" : "byte beside the run", n_items, i, item);
            }
        }
        free(src[i]);
        free(dst[i]);
    }
    for (u32 slot = 0; slot < n_slots && !bad; slot++) {
        u64 sum = 0;
        for (u32 lane = 0; lane < KVX_LANES; lane++) {
            sum += sums[slot * KVX_LANES + lane];
        }
        if (sum - before[slot] != expected[slot]) {
            printf("slot %u of %u: sum %016llx, expected %016llx\n", slot, n_slots, sum - before[slot], expected[slot]);
            bad = 1;
        }
    }
    free(items);
    free(sums);
    return bad;
}

// What a GPU refuses, kvx_run has to refuse, else the launches above prove little.
static int refusals(void)
{
    static _Alignas(16) unsigned char bytes[64];
    static _Alignas(16) u64 sums[KVX_LANES + 1];
    struct access access = {.n = 0};
    struct kvx_item item = {.src = allow(&access, bytes, 32, 0), .dst = allow(&access, bytes + 32, 32, 1), .len = 32};
    u64 items = allow(&access, &item, sizeof item, 0);
    u64 args[] = {items, 1, 1, allow(&access, sums, sizeof sums, 1)};
    int good = kvx_run("kvx_copy_sum", 1, 32, args, translate, &access);
    item.len = 33;
    int over = kvx_run("kvx_copy_sum", 1, 32, args, translate, &access);
    item.len = 32;
    args[3] += 4;
    int odd = kvx_run("kvx_copy_sum", 1, 32, args, translate, &access);
    int none = kvx_run("kvx_other", 1, 32, args, translate, &access);
    if (good != KVX_OK || over != KVX_BAD_ADDRESS || odd != KVX_MISALIGNED || none != KVX_NO_KERNEL) {
        printf("refusals: %d %d %d %d\n", good, over, odd, none);
        return 1;
    }
    return 0;
}

int main(int argc, char **argv)
{
    u64 bytes = 0;
    u64 seed = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;
    u32 launches = argc > 2 ? (u32)strtoul(argv[2], NULL, 0) : 400;
    if (refusals()) {
        return 1;
    }
    for (u32 i = 0; i < launches; i++) {
        state = (seed * launches + i + 1) * 0x9E3779B97F4A7C15ull | 1;
        if (launch(&bytes)) {
            printf("seed %llu, launch %u\n", seed, i);
            return 1;
        }
    }
    printf("%u launches, %llu bytes\n", launches, bytes);
    return 0;
}
