//! What one launch copies and sums: the kernel's items, and the batch of long copies.

use std::ops::Range;

use kvxfer_core::sum::{STEP, words};

use super::kernels::{Item, tiles};
use super::{Span, Summed};
use crate::driver::{Copy, DevicePtr};

/// The most items of one launch.
pub(super) const ITEMS: usize = 1 << 12;
/// The most tasks of one launch.
pub(super) const SUMS: usize = 1 << 9;
/// What a long span is cut by, in bytes: a multiple of the kernel's tile.
pub(super) const SLICE: u64 = 1 << 16;

/// Which way spans go.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Shorter ones are copied by the kernel, others by a batch.
    pub(super) kernel_below: u64,
    pub(super) summed: Summed,
    /// Of one launch; at least [`SLICE`].
    pub(super) bytes: u64,
}

#[derive(Debug)]
pub(super) struct Table {
    limits: Limits,
    /// As the kernel reads them.
    items: Vec<Item>,
    tiles: u32,
    copies: Vec<Copy>,
    bytes: u64,
    tasks: Range<u64>,
}

impl Table {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            items: Vec::with_capacity(ITEMS),
            tiles: 0,
            copies: Vec::with_capacity(ITEMS),
            bytes: 0,
            tasks: 0..0,
        }
    }

    pub(super) fn route(&mut self, kernel_below: u64) {
        self.limits.kernel_below = kernel_below;
    }

    pub(super) fn clear(&mut self) {
        self.items.clear();
        self.copies.clear();
        (self.tiles, self.bytes, self.tasks) = (0, 0, 0..0);
    }

    pub(super) fn items(&self) -> &[Item] {
        &self.items
    }

    pub(super) fn copies(&self) -> &[Copy] {
        &self.copies
    }

    pub(super) fn tiles(&self) -> u32 {
        self.tiles
    }

    /// Tasks of the items, which are numbered from the first one's on.
    pub(super) fn tasks(&self) -> Range<u64> {
        self.tasks.clone()
    }

    /// Takes as much as there is room for of a span, from its start. How many bytes.
    pub(super) fn take(&mut self, task: u64, span: &Span) -> u64 {
        let room = self.limits.bytes - self.bytes;
        let len = if span.len <= room { span.len } else { room / SLICE * SLICE };
        if len == 0 || self.items.len() == ITEMS {
            return 0;
        }
        if self.items.is_empty() {
            self.tasks.start = task;
        }
        if task - self.tasks.start >= SUMS as u64 {
            return 0;
        }
        self.tasks.end = task + 1;
        let by_batch = span.dst.filter(|_| len >= self.limits.kernel_below);
        if let Some(dst) = by_batch {
            self.copies.push(Copy { dst, src: span.src, len });
        }
        let (src, dst) = match (by_batch, self.limits.summed) {
            (None, _) => (span.src, span.dst),
            (Some(_), Summed::Source) => (span.src, None),
            (Some(dst), Summed::Destination) => (dst, None),
        };
        self.items.push(Item {
            src: src.addr(),
            dst: dst.map_or(0, DevicePtr::addr),
            len,
            key: span.key,
            slot: (task - self.tasks.start) as u32,
            first_tile: self.tiles,
        });
        self.tiles += tiles(len);
        self.bytes += len;
        len
    }
}

impl Span {
    /// Drops its first `len` bytes, a multiple of 8.
    pub(super) fn skip(&mut self, len: u64) {
        self.src = self.src.offset(len);
        self.dst = self.dst.map(|dst| dst.offset(len));
        self.len -= len;
        self.key = self.key.wrapping_add(STEP.wrapping_mul(words(len)));
    }
}
