//! What a pool can refuse.

use std::fmt;

use super::PageState;
use crate::{GrantId, SegmentId};

/// There is no room for a grant now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no room for {pages} pages{}", if *never_fits { ", nor would there be in an empty pool" } else { "" })]
pub struct Full {
    /// How many pages were asked for.
    pub pages: u64,
    /// Whether it would not even fit if every page were free.
    pub never_fits: bool,
}

/// A grant does not hold a page that was named, or not in a state that allows what was asked. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("page {page} of segment {segment} is not grant {grant}'s for this: {}", Found(*found))]
pub struct StampMismatch {
    /// The grant that was to hold it.
    pub grant: GrantId,
    /// The segment.
    pub segment: SegmentId,
    /// The page.
    pub page: u32,
    /// What the page is instead, and whose it is or, if free, was last. `None` if the pool has no such page, or it
    /// was named twice.
    pub found: Option<(PageState, GrantId)>,
}

struct Found(Option<(PageState, GrantId)>);

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some((state, grant)) => write!(f, "it is {state:?}, stamped {grant}"),
            None => f.write_str("it is outside the pool or named twice"),
        }
    }
}

/// A segment cannot be taken away: some of its pages are in use, or there is no such segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("segment {0} is not idle")]
pub struct NotIdle(pub SegmentId);
