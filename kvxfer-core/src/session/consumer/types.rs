//! What goes into a consumer and comes out of it.

use std::sync::Arc;
use std::time::Duration;

use crate::gc::GcConfig;
use crate::layout::KvLayout;
use crate::pool::{Extent, Geometry};
use crate::wire::Message;
use crate::{ChunkKey, Error, GrantId, LinkId, LoadId, Result, SegmentId};

/// What a consumer is told about itself.
#[derive(Clone, Debug)]
pub struct ConsumerConfig {
    /// Geometry; a producer's must be compatible.
    pub layout: KvLayout,
    /// The pool.
    pub geometry: Geometry,
    /// The collector's policy.
    pub gc: GcConfig,
    /// How long a grant lasts unless renewed.
    pub grant_ttl: Duration,
    /// How long it can last with renewals.
    pub grant_cap: Duration,
    /// How long a writer may take to acknowledge a fence, or to let go of a segment, before its link is closed, and
    /// after that before the memory behind its segments is replaced.
    pub fence_timeout: Duration,
    /// How long producers have to answer an [`Message::Ask`].
    pub ask_timeout: Duration,
    /// Most pages granted to one link and not yet committed.
    pub window_pages: u32,
    /// How many offers may overtake a blocked one.
    pub overtakes: u32,
    /// How long it is remembered that a chunk was offered and lost.
    pub lost_ttl: Duration,
}

/// What a consumer wants done, in this order.
#[derive(Debug)]
pub enum ConsumerAction {
    /// Send a message.
    Send {
        /// On this link.
        link: LinkId,
        /// This.
        message: Message,
    },
    /// A producer's layout fits: send it [`Message::Attached`] with the path by which its bytes come, or close the link.
    Attach {
        /// The link.
        link: LinkId,
    },
    /// Send [`Message::Segment`] with what makes the segment reachable for this link's peer.
    Export {
        /// The link.
        link: LinkId,
        /// The segment.
        segment: SegmentId,
        /// Its generation.
        generation: u32,
        /// What the message names the probe of it.
        probe: u64,
    },
    /// A producer wrote to the end of a segment: compare what can be read there with the checksum of what it wrote.
    /// Answer with [`Consumer::verified`].
    Verify {
        /// The producer's link.
        link: LinkId,
        /// The segment.
        segment: SegmentId,
        /// The probe: the checksum's seed.
        probe: u64,
        /// The checksum of what was written.
        sum: u64,
    },
    /// Copy one chunk out of the pool into the engine's blocks, and verify the copy. Answer with
    /// [`Consumer::copied`].
    Copy {
        /// For this load.
        load: LoadId,
        /// Which chunk of the claim.
        chunk: u32,
        /// Its key (the checksum's seed).
        key: ChunkKey,
        /// Its grant (likewise).
        grant: GrantId,
        /// Tokens in it.
        tokens: u32,
        /// Where it lies.
        extents: Arc<[Extent]>,
        /// One checksum per layer.
        sums: Arc<[u64]>,
    },
    /// A load ended, once.
    Loaded {
        /// The load.
        load: LoadId,
        /// How.
        result: Result<()>,
    },
    /// Put fresh memory behind a segment, with these extents copied over. Answer with
    /// [`Consumer::replaced`].
    Replace {
        /// The segment.
        segment: SegmentId,
        /// What must survive.
        live: Vec<Extent>,
    },
    /// Close a link.
    Close {
        /// The link.
        link: LinkId,
        /// Why.
        error: Error,
    },
}

/// Counters, all since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConsumerStats {
    /// Chunks offered.
    pub offered: u64,
    /// Grants given.
    pub granted: u64,
    /// Chunks committed and indexed.
    pub committed: u64,
    /// Commits that came after their grant had ended.
    pub late_commits: u64,
    /// Chunks that were already here when offered.
    pub had: u64,
    /// Grants that ran out or lost their writer.
    pub revoked: u64,
    /// Offered chunks that cannot ever fit.
    pub refused: u64,
    /// Claims made.
    pub claims: u64,
    /// Loads that ended well.
    pub loads: u64,
    /// Loads that failed.
    pub failed_loads: u64,
    /// Chunks whose bytes were not those that were sent.
    pub corrupt: u64,
    /// Chunks given up for others' because the claims that were expected for them did not come in time.
    pub overdue: u64,
    /// Segments whose memory had to be replaced.
    pub replaced_segments: u64,
}
