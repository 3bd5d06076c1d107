//! The measurement behind the table in [`super`]:
//! `cargo test --release -p kvxfer-cuda --lib ratios -- --ignored --nocapture`

use std::time::Instant;

use super::*;
use crate::memory::HostPool;
use kvxfer_core::SegmentId;

const FIELD: usize = 256 << 20;
const ROUNDS: usize = 8;

/// Best times of some ways to do the same, measured in turns so that noise hits all alike.
fn best<const N: usize>(mut ways: [&mut dyn FnMut(); N]) -> [f64; N] {
    let mut best = [f64::MAX; N];
    for _ in 0..ROUNDS {
        for (way, best) in ways.iter_mut().zip(&mut best) {
            let start = Instant::now();
            way();
            *best = best.min(start.elapsed().as_secs_f64());
        }
    }
    best
}

#[test]
#[ignore = "a measurement"]
fn ratios() {
    let pool = HostPool::new(1, FIELD as u64).unwrap();
    let dst = pool.segment(SegmentId(0)).unwrap().as_mut_ptr();
    let source = vec![1_u8; FIELD];
    let src = source.as_ptr();
    // Every address below is inside these two.
    println!(
        "scattered pieces of 256 MiB, GB/s: memcpy, memcpy + sum, cached, streaming, streaming + drain each"
    );
    for piece in [256, 512, 1 << 10, 2 << 10, 4 << 10, 32 << 10, 256 << 10, 1 << 20] {
        let count = FIELD / piece;
        // An odd factor visits each piece once, in no order that a prefetcher knows.
        let offsets: Vec<usize> = (0..count).map(|i| i * 40_503 % count * piece).collect();
        let each = |copy: &dyn Fn(*mut u8, *const u8)| {
            for &at in &offsets {
                // SAFETY: a piece inside both fields.
                unsafe { copy(dst.add(FIELD - piece - at), src.add(at)) };
            }
        };
        let times = best([
            // SAFETY: a piece of both fields.
            &mut || each(&|to, from| unsafe { to.copy_from_nonoverlapping(from, piece) }),
            &mut || {
                // SAFETY: a piece of both fields.
                each(&|to, from| unsafe {
                    to.copy_from_nonoverlapping(from, piece);
                    std::hint::black_box(sum_of(to, piece, 1, 0));
                });
            },
            &mut || {
                // SAFETY: a piece of both fields.
                each(&|to, from| unsafe {
                    std::hint::black_box(copy_summed(to, from, piece, 1, 0, Stores::Cached));
                });
            },
            &mut || {
                let drain = Drain::new();
                let stores = Stores::Streaming(&drain);
                // SAFETY: a piece of both fields.
                each(&|to, from| unsafe {
                    std::hint::black_box(copy_summed(to, from, piece, 1, 0, stores));
                });
            },
            &mut || {
                // SAFETY: a piece of both fields.
                each(&|to, from| unsafe {
                    let drain = Drain::new();
                    let stores = Stores::Streaming(&drain);
                    std::hint::black_box(copy_summed(to, from, piece, 1, 0, stores));
                });
            },
        ]);
        let speeds = times.map(|time| format!("{:6.1}", FIELD as f64 / time / 1e9));
        println!(
            "{:8} {}  streaming/cached {:.2} streaming/(memcpy+sum) {:.2}",
            piece,
            speeds.join(" "),
            times[2] / times[3],
            times[1] / times[3]
        );
    }

    println!("copy a working set in pieces of 32 KiB, then read it, GB/s: cached, streaming");
    for total in [256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20, FIELD] {
        let piece = 32 << 10;
        let turns = FIELD / total;
        let load = |stores: Stores<'_>| {
            for turn in 0..turns {
                for at in (0..total).step_by(piece) {
                    // SAFETY: a piece inside both fields; the source is elsewhere each turn.
                    unsafe {
                        copy_summed(dst.add(at), src.add(turn * total + at), piece, 1, 0, stores);
                    }
                }
                drain();
                // SAFETY: inside the field.
                std::hint::black_box(unsafe { sum_of(dst, total, 1, 0) });
            }
        };
        let all = Drain::new();
        let times = best([&mut || load(Stores::Cached), &mut || load(Stores::Streaming(&all))]);
        let speeds = times.map(|time| format!("{:6.1}", FIELD as f64 / time / 1e9));
        println!("{:9} {}  streaming/cached {:.2}", total, speeds.join(" "), times[0] / times[1]);
    }
}
