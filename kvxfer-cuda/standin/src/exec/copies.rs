//! Copies and fills, in pieces and in an order that nobody may rely on.

use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;

use super::adversary::Adversary;
use super::race::Touched;
use crate::abi::Result;
use crate::memory::{self, Stamp};
use crate::state::Gpu;

/// One end of a copy.
#[derive(Clone, Debug)]
pub(super) enum End {
    /// Device memory or pinned host memory, as that device may touch it.
    At(u64, Gpu),
    /// Bytes between the host's pageable memory and the device.
    Staged(Arc<Mutex<Vec<u8>>>),
}

impl End {
    pub(super) fn staged(bytes: Vec<u8>) -> Self {
        Self::Staged(Arc::new(Mutex::new(bytes)))
    }

    fn range(&self, len: u64) -> Option<Range<u64>> {
        match self {
            Self::At(address, _) => Some(*address..address.saturating_add(len)),
            Self::Staged(_) => None,
        }
    }

    /// Calls `run` with a pointer to `len` bytes from `offset` on.
    fn with(
        &self,
        offset: u64,
        len: u64,
        write: bool,
        since: Stamp,
        run: impl FnOnce(*mut u8) -> Result,
    ) -> Result {
        match self {
            Self::At(address, gpu) => {
                let at = || memory::resolve(address.wrapping_add(offset), len, write, *gpu, since);
                run(at()?)?;
                // Still the same memory, or what was done does not count.
                at().map(|_| ())
            }
            Self::Staged(bytes) => {
                let mut bytes = bytes.lock();
                let part = bytes.get_mut(offset as usize..(offset + len) as usize);
                part.map_or(Ok(()), |part| run(part.as_mut_ptr()))
            }
        }
    }
}

/// One run of bytes.
#[derive(Clone, Debug)]
pub(super) struct Span {
    pub(super) dst: End,
    pub(super) src: End,
    pub(super) len: u64,
}

/// Copies that are in no order among themselves.
#[derive(Debug)]
pub(super) struct Copies {
    spans: Vec<Span>,
    /// Still to do: span, offset, length. `None` before the first step.
    pieces: Option<Vec<(usize, u64, u64)>>,
}

/// Bytes of one step, about.
const STEP: u64 = 256 << 10;
/// What bytes are that two spans of one batch both touched.
const POISON: u8 = 0xDB;

impl Copies {
    pub(super) fn new(spans: Vec<Span>) -> Self {
        Self { spans, pieces: None }
    }

    pub(super) fn touched(&self) -> Touched {
        Touched {
            reads: self.spans.iter().filter_map(|span| span.src.range(span.len)).collect(),
            writes: self.spans.iter().filter_map(|span| span.dst.range(span.len)).collect(),
        }
    }

    /// Copies some pieces. True: that was the last one.
    pub(super) fn step(&mut self, since: Stamp, lots: &mut Adversary) -> Result<bool> {
        let pieces = self.pieces.get_or_insert_with(|| cut(&self.spans, lots));
        let mut bytes = 0;
        while let Some((index, offset, len)) = pieces.pop() {
            if let Some(span) = self.spans.get(index) {
                copy(span, offset, len, since)?;
            }
            bytes += len;
            if bytes >= STEP && !pieces.is_empty() {
                return Ok(false);
            }
        }
        self.poison(since)?;
        Ok(true)
    }

    /// Spoils the bytes that one span wrote and another one touched: nobody may rely on them.
    fn poison(&self, since: Stamp) -> Result {
        for (range, gpu) in self.overlaps() {
            let len = range.end - range.start;
            End::At(range.start, gpu).with(0, len, true, since, |at| {
                // SAFETY: `memory::resolve` answers pointers that are good for `len` bytes for ever.
                unsafe { at.write_bytes(POISON, len as usize) };
                Ok(())
            })?;
        }
        Ok(())
    }

    fn overlaps(&self) -> Vec<(Range<u64>, Gpu)> {
        let mut ranges = Vec::new();
        for span in &self.spans {
            ranges.extend(span.src.range(span.len).map(|range| (range.start, range.end, None)));
            if let End::At(start, gpu) = span.dst {
                ranges.push((start, start.saturating_add(span.len), Some(gpu)));
            }
        }
        ranges.sort_unstable();
        // The written and the read range that reach furthest so far.
        let (mut written, mut read): (Option<(u64, Gpu)>, u64) = (None, 0);
        let mut found = Vec::new();
        for (start, end, writer) in ranges {
            if let Some((to, gpu)) = written
                && to > start
            {
                found.push((start..to.min(end), gpu));
            }
            match writer {
                Some(gpu) => {
                    if read > start {
                        found.push((start..read.min(end), gpu));
                    }
                    written = written.filter(|(to, _)| *to > end).or(Some((end, gpu)));
                }
                None => read = read.max(end),
            }
        }
        found
    }
}

/// All spans in pieces, in some order.
fn cut(spans: &[Span], lots: &mut Adversary) -> Vec<(usize, u64, u64)> {
    let mut pieces = Vec::new();
    for (index, span) in spans.iter().enumerate() {
        let piece = (span.len / 8).clamp(4 << 10, STEP);
        let mut offset = 0;
        while offset < span.len {
            let len = piece.min(span.len - offset);
            pieces.push((index, offset, len));
            offset += len;
        }
    }
    // Taken from the end.
    pieces.reverse();
    lots.shuffle(&mut pieces);
    pieces
}

fn copy(span: &Span, offset: u64, len: u64, since: Stamp) -> Result {
    span.src.with(offset, len, false, since, |src| {
        span.dst.with(offset, len, true, since, |dst| {
            // SAFETY: both are good for `len` bytes: device memory by `memory::resolve`, staged bytes
            // under their lock. Overlap is allowed.
            unsafe { std::ptr::copy(src, dst, len as usize) };
            Ok(())
        })
    })
}

/// A value of 1, 2 or 4 bytes, repeated.
#[derive(Debug)]
pub(super) struct Fill {
    pub(super) dst: u64,
    pub(super) gpu: Gpu,
    pub(super) value: u32,
    /// Bytes of the value.
    pub(super) width: u64,
    /// Bytes, a multiple of the width.
    pub(super) len: u64,
    pub(super) done: u64,
}

impl Fill {
    pub(super) fn touched(&self) -> Touched {
        let writes = std::iter::once(self.dst..self.dst.saturating_add(self.len)).collect();
        Touched { writes, ..Touched::default() }
    }

    /// Fills some of it. True: that was the last of it.
    pub(super) fn step(&mut self, since: Stamp) -> Result<bool> {
        let len = STEP.min(self.len - self.done);
        let value = self.value.to_le_bytes();
        let (width, first) = (self.width as usize, value[0]);
        if len > 0 {
            End::At(self.dst, self.gpu).with(self.done, len, true, since, |at| {
                for index in 0..len as usize {
                    let byte = if width == 1 { first } else { value[index % width] };
                    // SAFETY: `memory::resolve` answers pointers that are good for `len` bytes for ever.
                    unsafe { at.add(index).write(byte) };
                }
                Ok(())
            })?;
        }
        self.done += len;
        Ok(self.done == self.len)
    }
}
