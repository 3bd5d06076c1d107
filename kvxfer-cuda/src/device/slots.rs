//! The memory of one launch under way: tables that the kernel reads, and sums that it adds to.
//!
//! Table and zeroed sums go up in one piece. The sums come down next to it, so that nothing that the GPU
//! still reads is written.

use std::sync::Arc;

use super::kernels::{Item, Kernels, LANES};
use super::table::{ITEMS, Limits, SUMS, Table};
use crate::driver::{Buffer, CudaError, Device, Event, Pinned, Stream};

/// Of what one task's launch adds up to: a number for each lane of the kernel, to be added.
const SUM_BYTES: usize = LANES * 8;
const UP_BYTES: usize = ITEMS * Item::BYTES + SUMS * SUM_BYTES;
const DOWN_BYTES: usize = SUMS * SUM_BYTES;

#[derive(Debug)]
pub(super) struct Slot {
    pub(super) table: Table,
    /// Recorded behind the launch.
    pub(super) done: Arc<Event>,
    /// Why the launch is incomplete.
    pub(super) failed: Option<CudaError>,
    pinned: Arc<Pinned>,
    buffer: Buffer,
    /// What goes to, and comes from, pinned memory.
    bytes: Vec<u8>,
    sums: Vec<u64>,
}

impl Slot {
    pub(super) fn new(device: &Device, limits: Limits) -> Result<Self, CudaError> {
        Ok(Self {
            table: Table::new(limits),
            done: Arc::new(device.event()?),
            failed: None,
            pinned: device.pinned((UP_BYTES + DOWN_BYTES) as u64)?,
            buffer: device.buffer(UP_BYTES as u64)?,
            bytes: Vec::with_capacity(UP_BYTES),
            sums: Vec::with_capacity(SUMS),
        })
    }

    /// Puts all of the table on a stream. After an error a part of it may be there.
    pub(super) fn launch(
        &mut self,
        stream: &Stream,
        kernels: &Kernels,
        sms: u32,
    ) -> Result<(), CudaError> {
        let items = self.table.items();
        self.bytes.clear();
        self.bytes.extend(items.iter().flat_map(|item| item.to_bytes()));
        let (sums_at, sums_bytes) = (self.bytes.len(), self.sum_bytes());
        self.bytes.resize(sums_at + sums_bytes, 0);

        let sums = self.buffer.ptr().offset(sums_at as u64);
        self.pinned.write(0, &self.bytes)?;
        stream.upload(self.buffer.ptr(), &self.pinned, 0, self.bytes.len() as u64)?;
        if !self.table.copies().is_empty() {
            stream.copy_batch(self.table.copies())?;
        }
        kernels.copy_sum(stream, self.buffer.ptr(), items.len(), self.table.tiles(), sums, sms)?;
        stream.download(&self.pinned, UP_BYTES as u64, sums, sums_bytes as u64)
    }

    /// What the launch added to each of its tasks, when it is over.
    pub(super) fn read_sums(&mut self) -> Result<&[u64], CudaError> {
        self.bytes.clear();
        self.bytes.resize(self.sum_bytes(), 0);
        self.pinned.read(UP_BYTES as u64, &mut self.bytes)?;
        let (numbers, _) = self.bytes.as_chunks();
        let add = |lanes: &[[u8; 8]]| {
            lanes.iter().fold(0_u64, |sum, lane| sum.wrapping_add(u64::from_le_bytes(*lane)))
        };
        self.sums.clear();
        self.sums.extend(numbers.chunks_exact(LANES).map(add));
        Ok(&self.sums)
    }

    fn sum_bytes(&self) -> usize {
        let tasks = self.table.tasks();
        (tasks.end - tasks.start) as usize * SUM_BYTES
    }
}
