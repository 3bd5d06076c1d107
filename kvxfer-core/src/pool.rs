//! The consumer's memory: segments, pages, extents, stamps.

use serde::{Deserialize, Serialize};

use crate::SegmentId;

/// A run of consecutive pages in one segment, holding consecutive blocks of one group of one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Extent {
    /// The segment.
    pub segment: SegmentId,
    /// Its first page.
    pub page: u32,
    /// How many pages, at least one.
    pub pages: u16,
    /// The KV-cache group whose blocks lie here.
    pub group: u16,
}
