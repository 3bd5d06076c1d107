//! The copier: what it copies and sums, what it refuses, and how it ends.

mod copies;
mod ends;
mod faults;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use kvxfer_core::Error;
use kvxfer_core::sum::{Sum, word_key};
use kvxfer_cuda::device::{Copier, CopierConfig, Done, Span, Summed};
use kvxfer_cuda::driver::{Device, DevicePtr, Event};

use crate::harness::DEADLINE;

/// A copier, and what it says.
pub struct Rig {
    pub copier: Copier,
    wakes: Receiver<()>,
    done: Vec<Done>,
}

impl Rig {
    pub fn new(device: &Device, config: CopierConfig) -> Self {
        Self::try_new(device, config).unwrap()
    }

    fn try_new(device: &Device, config: CopierConfig) -> Result<Self, Error> {
        let (wake, wakes) = channel();
        let copier = Copier::new(device, config, move || {
            let _ = wake.send(());
        })?;
        Ok(Self { copier, wakes, done: Vec::with_capacity(1 << 12) })
    }

    /// The ends of so many tasks, or of as many as there are in that time.
    pub fn collect_for(&mut self, tasks: usize, limit: Duration) -> Vec<Done> {
        let deadline = Instant::now() + limit;
        loop {
            self.copier.poll(&mut self.done);
            let left = deadline.saturating_duration_since(Instant::now());
            if self.done.len() >= tasks || self.wakes.recv_timeout(left).is_err() {
                return std::mem::take(&mut self.done);
            }
        }
    }

    /// The ends of so many tasks.
    #[track_caller]
    pub fn collect(&mut self, tasks: usize) -> Vec<Done> {
        let done = self.collect_for(tasks, DEADLINE);
        assert_eq!(done.len(), tasks, "tasks that ended");
        done
    }

    /// Copies, and waits for the sum.
    #[track_caller]
    pub fn run(&mut self, spans: &[Span]) -> Result<u64, Error> {
        self.copier.submit(0, spans).unwrap();
        self.collect(1).remove(0).result
    }
}

pub fn event(device: &Device) -> Arc<Event> {
    Arc::new(device.event().unwrap())
}

/// Copies by the kernel alone.
pub const KERNEL: CopierConfig = CopierConfig {
    kernel_below: Some(u64::MAX),
    sms: 4,
    outstanding: 64 << 20,
    summed: Summed::Source,
    patience: DEADLINE,
};
/// Copies by batches alone.
pub const BATCH: CopierConfig = CopierConfig { kernel_below: Some(0), ..KERNEL };

/// One copy, with the checksum of seed 0 from word 0 on.
pub fn span(src: DevicePtr, dst: DevicePtr, len: u64) -> Span {
    Span { src, dst: Some(dst), len, key: word_key(0, 0) }
}

/// The checksum of seed 0.
pub fn sum(bytes: &[u8]) -> u64 {
    let mut sum = Sum::new(0);
    sum.update(bytes);
    sum.finish()
}

/// What the stand-in of a child is told: this process's settings, and more.
fn standin(more: &str) -> String {
    let own = std::env::var("KVXFER_STANDIN").unwrap_or_default();
    format!("{own};{more}")
}
