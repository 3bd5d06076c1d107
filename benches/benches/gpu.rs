//! Copies between two processes' GPU memory, by criterion: sizes of blocks, how many make a layer, how many layers.
//!
//! `make gpu-check` has the ratios to a plain copy in the same run, and looks at what arrived.

use std::process::ExitCode;
use std::time::Duration;

use criterion::{Criterion, Throughput};
use kvxfer_benches::gpu::rates::{Producer, WAYS};
use kvxfer_benches::gpu::work::{Job, Size};
use kvxfer_benches::gpu::{consumer, devices, on_standin};
use kvxfer_benches::{Result, child};
use kvxfer_cuda::driver::{Device, PeerLink};

/// Of a block, in bytes.
const BLOCKS: [u64; 4] = [4 << 10, 32 << 10, 256 << 10, 2 << 20];
/// Of a layer.
const COUNTS: [u64; 3] = [16, 128, 1024];
const LAYERS: [u64; 2] = [1, 32];
/// What is moved at most, in bytes.
const MOST: u64 = 1 << 30;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gpu benchmarks: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    match child::role()? {
        Some((role, socket)) if role == consumer::ROLE => return consumer::serve(socket),
        Some((role, _)) => return Err(format!("no child has the role {role:?}").into()),
        None => {}
    }
    let (_driver, all) = match devices() {
        Ok(found) => found,
        Err(error) => {
            println!("gpu benchmarks: skipped: {error}");
            return Ok(());
        }
    };
    if on_standin() {
        println!("gpu benchmarks: skipped: the stand-in for the driver has no speed");
        return Ok(());
    }
    let mut c = Criterion::default()
        .configure_from_args()
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1))
        .sample_size(20);
    let own = &all[0];
    pair(&mut c, own, own, "one GPU")?;
    for other in &all[1..] {
        let name = match own.link_to(other.uuid())? {
            PeerLink::NvLink => "NVLink",
            PeerLink::Pcie => "PCIe",
            PeerLink::Same | PeerLink::None { .. } => continue,
        };
        pair(&mut c, own, other, &format!("{name} to {}", other.ordinal()))?;
    }
    c.final_summary();
    Ok(())
}

fn pair(c: &mut Criterion, from: &Device, to: &Device, name: &str) -> Result<()> {
    for block in BLOCKS {
        for count in COUNTS {
            for layers in LAYERS {
                let size = Size { layer: block * count, layers, rounds: 0, blocks: &[] };
                if size.moved() <= MOST {
                    size_of(c, from, to, name, block, size)?;
                }
            }
        }
    }
    Ok(())
}

fn size_of(
    c: &mut Criterion,
    from: &Device,
    to: &Device,
    name: &str,
    block: u64,
    size: Size,
) -> Result<()> {
    let mut producer = Producer::start(from, to.ordinal(), size)?;
    let mut group = c.benchmark_group(name);
    group.throughput(Throughput::Bytes(size.moved()));
    for (scattered, place) in [(true, "scattered"), (false, "in a row")] {
        let layers = Job { block, scattered, seed: 1 }.layers(&size);
        // The kernel and the copy engine; which of them is chosen is `gpu-check`'s to tell.
        for (way, (kind, _)) in WAYS.iter().enumerate().take(2) {
            let count = size.layer / block;
            let id = format!("{kind}/{} KiB x {count} x {} {place}", block >> 10, size.layers);
            group.bench_function(id, |b| {
                b.iter(|| producer.copy(way, &layers).expect("it is copied"));
            });
        }
    }
    group.finish();
    Ok(())
}
