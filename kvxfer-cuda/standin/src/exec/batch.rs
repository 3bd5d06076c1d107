//! Entry points for batched copies.

use super::copies::{Copies, Span};
use super::streams::enqueue;
use super::transfers::{Place, read_now};
use super::work::Work;
use crate::abi::{Code, In, Out, Result};
use crate::state::{self, Gpu};

/// `CUmemcpyAttributes` of CUDA 12.8.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Attributes {
    order: u32,
    _src_hint: [i32; 2],
    _dst_hint: [i32; 2],
    flags: u32,
}

/// `CU_MEMCPY_SRC_ACCESS_ORDER_STREAM`: sources are read in stream order.
const STREAM: u32 = 1;
/// `..._DURING_API_CALL` and `..._ANY`: they may be read before the call returns, so they are.
const NOW: std::ops::RangeInclusive<u32> = 2..=3;
/// `CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE`.
const PREFER_OVERLAP: u32 = 1;

/// The caller's lists.
struct Batch {
    dsts: In<u64>,
    srcs: In<u64>,
    sizes: In<usize>,
    count: usize,
    attributes: In<Attributes>,
    /// From which copy on each of the attributes counts.
    from: In<usize>,
    kinds: usize,
}

/// Which copy is at fault, if one is, and the code.
type Fault = (Option<usize>, Code);

impl Batch {
    /// The source order of each copy.
    fn orders(&self) -> Result<Vec<u32>> {
        if self.count == 0 || self.kinds == 0 || self.kinds > self.count {
            return Err(Code::INVALID_VALUE);
        }
        let kinds = self.attributes.list(self.kinds)?;
        let from = self.from.list(self.kinds)?;
        let ascending = from.is_sorted_by(|one, next| one < next);
        if from.first() != Some(&0)
            || !ascending
            || from.last().is_some_and(|last| *last >= self.count)
        {
            return Err(Code::INVALID_VALUE);
        }
        let known = |kind: &Attributes| kind.order == STREAM || NOW.contains(&kind.order);
        if !kinds.iter().all(|kind| known(kind) && kind.flags & !PREFER_OVERLAP == 0) {
            return Err(Code::INVALID_VALUE);
        }
        let kind_of = |copy: usize| from.partition_point(|first| *first <= copy).saturating_sub(1);
        Ok((0..self.count)
            .filter_map(|copy| kinds.get(kind_of(copy)).map(|kind| kind.order))
            .collect())
    }

    fn span(&self, index: usize, order: u32, gpu: Gpu) -> Result<Span> {
        let len = self.sizes.get_at(index)? as u64;
        let dst = Place { address: self.dsts.get_at(index)?, gpu };
        let src = Place { address: self.srcs.get_at(index)?, gpu };
        if len == 0 {
            return Err(Code::INVALID_VALUE);
        }
        // Pageable memory is refused: no end.
        let in_order = src.end(len, false)?;
        let src = match order {
            STREAM => in_order,
            // SAFETY: not pageable, or it would have been refused.
            _ => unsafe { read_now(src, len) }?,
        };
        Ok(Span { dst: dst.end(len, true)?, src, len })
    }

    fn submit(&self, stream: u64) -> std::result::Result<(), Fault> {
        let whole = |code| (None, code);
        let gpu = state::current().map_err(whole)?;
        if stream <= 2 {
            // The NULL stream takes no batches.
            return Err(whole(Code::INVALID_VALUE));
        }
        let orders = self.orders().map_err(whole)?;
        let spans = orders.iter().enumerate().map(|(index, order)| {
            self.span(index, *order, gpu).map_err(|code| (Some(index), code))
        });
        let spans = spans.collect::<std::result::Result<Vec<_>, Fault>>()?;
        enqueue(gpu, stream, Work::Copies(Copies::new(spans))).map(|_| ()).map_err(whole)
    }
}

entries! {
    /// As CUDA 12.8 and 12.9 have it: tells which copy is at fault, or `SIZE_MAX`.
    fn cuMemcpyBatchAsync(
        dsts: In<u64>, srcs: In<u64>, sizes: In<usize>, count: usize,
        attributes: In<Attributes>, from: In<usize>, kinds: usize, failed: Out<usize>, stream: u64,
    ) {
        let batch = Batch { dsts, srcs, sizes, count, attributes, from, kinds };
        batch.submit(stream).or_else(|(index, code)| {
            if !failed.is_null() {
                failed.put(index.unwrap_or(usize::MAX))?;
            }
            Err(code)
        })
    }

    /// As CUDA 13 has it.
    fn cuMemcpyBatchAsync_v2(
        dsts: In<u64>, srcs: In<u64>, sizes: In<usize>, count: usize,
        attributes: In<Attributes>, from: In<usize>, kinds: usize, stream: u64,
    ) {
        let batch = Batch { dsts, srcs, sizes, count, attributes, from, kinds };
        batch.submit(stream).map_err(|(_, code)| code)
    }
}
