//! From which length on the copy engines are faster than the kernel: measured once, at the start.
//!
//! Both ways copy the same memory to memory of the same GPU and sum it, with all that a launch costs the host:
//! what differs between them is the cost per piece, which a link does not change.

use std::fmt::Write;
use std::time::{Duration, Instant};

use kvxfer_core::{ErrorKind, Result};

use super::Span;
use crate::driver::{Device, DevicePtr};

/// What is copied each time, in bytes.
const BYTES: u64 = 4 << 20;
/// Lengths that are measured.
const LENGTHS: [u64; 5] = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20];
/// What longer pieces than those always take: the copy engines, which leave the multiprocessors alone.
const MOST: u64 = 4 << 20;
/// Where there is no memory to measure with.
const GUESS: u64 = 256 << 10;
/// What all that may take. A GPU that needs longer has other work, and measures that.
const BUDGET: Duration = Duration::from_secs(1);
/// The first warms up; the fastest of the others counts.
const ROUNDS: usize = 4;

/// The length. `run` copies spans, by the kernel if they are shorter than that many bytes, and waits.
///
/// # Errors
/// Those of `run`.
pub(super) fn kernel_below(
    device: &Device,
    run: impl FnMut(u64, &[Span]) -> Result<()>,
) -> Result<u64> {
    let memory = match device.buffer(2 * BYTES) {
        Ok(memory) => memory,
        Err(error) => {
            tracing::warn!(%error, kernel_below = GUESS, "no memory to measure copies with");
            return Ok(GUESS);
        }
    };
    let started = Instant::now();
    let measured = measure(memory.ptr(), || started.elapsed(), run);
    if measured.as_ref().is_err_and(|error| error.kind() == ErrorKind::Timeout) {
        // A copy may still come.
        std::mem::forget(memory);
    }
    let Some(times) = measured? else {
        tracing::warn!(
            kernel_below = GUESS,
            "the GPU is too busy to measure copies: {BUDGET:?} were over"
        );
        return Ok(GUESS);
    };
    let below = cut_over(times.map(|[kernel, batch]| batch <= kernel));
    let mut table = String::new();
    for (len, [kernel, batch]) in LENGTHS.iter().zip(times) {
        let _ = write!(table, " {} KiB {kernel:.0?}, {batch:.0?};", len >> 10);
    }
    tracing::info!(
        gpu = device.name(),
        kernel_below = below,
        "{} MiB in pieces, by the kernel and by the copy engines:{table}",
        BYTES >> 20
    );
    Ok(below)
}

/// For each of [`LENGTHS`]: the time that the kernel and that the copy engines take. None when the budget is spent.
fn measure(
    memory: DevicePtr,
    clock: impl Fn() -> Duration,
    mut run: impl FnMut(u64, &[Span]) -> Result<()>,
) -> Result<Option<[[Duration; 2]; LENGTHS.len()]>> {
    let mut times = [[Duration::MAX; 2]; LENGTHS.len()];
    for (times, len) in times.iter_mut().zip(LENGTHS) {
        let count = BYTES / len;
        // The even ones, then the odd ones: no two that are adjacent come in turn.
        let spans = (0..count).map(|i| (i * 2 + i * 2 / count) % count * len).map(|at| Span {
            src: memory.offset(at),
            dst: Some(memory.offset(BYTES + at)),
            len,
            key: 0,
        });
        let spans: Vec<_> = spans.collect();
        for (time, kernel_below) in times.iter_mut().zip([u64::MAX, 0]) {
            for round in 0..ROUNDS {
                let start = clock();
                if start >= BUDGET {
                    return Ok(None);
                }
                run(kernel_below, &spans)?;
                if round > 0 {
                    *time = (clock() - start).min(*time);
                }
            }
        }
    }
    Ok(Some(times))
}

/// The shortest of [`LENGTHS`] from which on the copy engines are faster for all.
fn cut_over(faster: [bool; LENGTHS.len()]) -> u64 {
    let slower = faster.iter().rposition(|faster| !faster);
    match slower {
        None => LENGTHS[0],
        Some(last) => LENGTHS.get(last + 1).copied().unwrap_or(MOST),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// How many copies are made if each takes that long, and whether that is enough to say something.
    fn measured(each: Duration) -> (usize, bool) {
        let (now, runs) = (Cell::new(Duration::ZERO), Cell::new(0));
        // SAFETY: nothing is copied from or to it.
        let memory = unsafe { DevicePtr::from_raw(1 << 20) };
        let times = measure(
            memory,
            || now.get(),
            |_, _| {
                now.set(now.get() + each);
                runs.set(runs.get() + 1);
                Ok(())
            },
        );
        (runs.get(), times.unwrap().is_some_and(|times| times.iter().flatten().all(|t| *t == each)))
    }

    #[test]
    fn a_slow_gpu_is_measured_for_the_budget_and_no_longer() {
        let all = LENGTHS.len() * 2 * ROUNDS;
        assert_eq!(measured(Duration::from_millis(1)), (all, true));
        assert_eq!(measured(BUDGET / all as u32), (all, true));
        assert_eq!(measured(BUDGET / 10), (10, false));
        assert_eq!(measured(10 * BUDGET), (1, false));
    }

    #[test]
    fn one_slow_length_moves_the_cut_over_past_it() {
        for (faster, below) in [
            ([true; 5], 4 << 10),
            ([false, true, true, true, true], 16 << 10),
            ([true, false, true, true, true], 64 << 10),
            ([true, true, true, true, false], MOST),
            ([false; 5], MOST),
        ] {
            assert_eq!(cut_over(faster), below);
        }
    }
}
