//! Single parts, by criterion.

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kvxfer_benches::churn::{WRITER, churned, fresh};
use kvxfer_benches::machine::pin;
use kvxfer_benches::random::Random;
use kvxfer_core::key::Keyspace;
use kvxfer_core::layout::{Group, KvLayout};
use kvxfer_core::plan::{LayerMemory, layer_writes};
use kvxfer_core::pool::{Extent, Pool};
use kvxfer_core::sum::Sum;
use kvxfer_core::transport::RegionId;
use kvxfer_core::{GrantId, SegmentId};
use kvxfer_cuda::copy::sum_of;

fn settings() -> Criterion {
    pin(0);
    Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2))
        .sample_size(40)
}

/// Llama-3.1-8B, as vLLM keeps it: 32 layers, 16 tokens a block, 64 KiB of each.
fn layout() -> KvLayout {
    let group = Group { block_tokens: 16, block_bytes: vec![64 << 10; 32] };
    KvLayout::one_group("benchmark", "bfloat16", 256, group)
}

/// A grant of some pages, and their return.
fn grant_and_free(c: &mut Criterion, name: &str, mut pool: Pool, pages: u32) {
    // Numbers that the pool's own requests do not have.
    let (mut extents, mut grant) = (Vec::new(), 1_u64 << 40);
    let mut group = c.benchmark_group("pool");
    group.throughput(Throughput::Elements(pages.into()));
    group.bench_function(name, |b| {
        b.iter(|| {
            grant += 1;
            extents.clear();
            pool.grant(WRITER, GrantId(grant), &[(0, pages)], &mut extents).expect("there is room");
            pool.free(GrantId(grant), black_box(&extents)).expect("it was granted");
        });
    });
}

fn pool(c: &mut Criterion) {
    for pages in [1, 16, 512] {
        grant_and_free(c, &format!("grant and free {pages}"), fresh(), pages);
        grant_and_free(c, &format!("grant and free {pages} after churn"), churned().0, pages);
    }
}

fn keys(c: &mut Criterion) {
    let keys = Keyspace::new(b"", &layout());
    let tokens: Vec<u32> = (0..8192).collect();
    let mut group = c.benchmark_group("keys");
    group.throughput(Throughput::Elements(tokens.len() as u64));
    group
        .bench_function("names of 8192 tokens", |b| b.iter(|| keys.chain(black_box(&tokens), &[])));
}

/// One layer of 32 chunks, a call each, as an agent posts them: the ids of one prompt of 8,192 tokens.
fn plan(c: &mut Criterion) {
    let layout = layout();
    let memory = LayerMemory { region: RegionId(0), base: 0, stride: 64 << 10, blocks: 4096 };
    let extents: Vec<[Extent; 1]> = (0..32)
        .map(|chunk| [Extent { segment: SegmentId(0), page: chunk * 16, pages: 16, group: 0 }])
        .collect();
    let mut group = c.benchmark_group("plan");
    group.throughput(Throughput::Elements(512));
    let mut writes = Vec::new();
    for (name, ids) in [("contiguous", (0..512).collect()), ("random", Random(1).pick(512, 4096))] {
        group.bench_function(format!("512 {name} blocks"), |b| {
            b.iter(|| {
                writes.clear();
                for (ids, extents) in black_box(&ids).chunks(16).zip(&extents) {
                    layer_writes(&layout, 7, &memory, extents, ids, &mut writes)
                        .expect("in bounds");
                }
                writes.len()
            });
        });
    }
}

fn sum(c: &mut Criterion) {
    let bytes = vec![7_u8; 256 << 20];
    let mut group = c.benchmark_group("checksum");
    for (name, len) in [("32 KiB in cache", 32 << 10), ("256 MiB in memory", bytes.len())] {
        group.throughput(Throughput::Bytes(len as u64));
        if len > 1 << 20 {
            group.sample_size(10);
        }
        group.bench_function(format!("{name}, portable"), |b| {
            b.iter(|| {
                let mut sum = Sum::new(1);
                sum.update(black_box(&bytes[..len]));
                sum.finish()
            });
        });
        group.bench_function(format!("{name}, vectors"), |b| {
            // SAFETY: `len` bytes of a vector that nobody writes to.
            b.iter(|| unsafe { sum_of(black_box(bytes.as_ptr()), len, 1, 0) });
        });
    }
}

criterion_group!(name = parts; config = settings(); targets = pool, keys, plan, sum);
criterion_main!(parts);
