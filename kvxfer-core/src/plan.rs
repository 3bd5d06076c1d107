//! Block ids to contiguous writes.
