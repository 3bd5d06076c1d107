//! Every message there is.
//!
//! Producer and consumer speak the first two groups; an observer (an engine's scheduler half)
//! speaks the third with the agents of its own engine. All are idempotent: a repeated or late one
//! changes nothing and is counted.

use serde::{Deserialize, Serialize};

use crate::layout::KvLayout;
use crate::path::{Ability, Refusal};
use crate::pool::Extent;
use crate::{ChunkKey, ClaimId, GrantId, Incarnation, OfferId, SegmentId};

/// The first message each way, dialler first. Nothing has an effect before both have passed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Protocol versions the sender speaks, inclusive. The highest common one is used.
    pub versions: (u16, u16),
    /// Chunk-key versions the sender can compute, inclusive.
    pub key_versions: (u16, u16),
    /// Who sends.
    pub incarnation: Incarnation,
    /// What the dialler wants of the link; the listener echoes it.
    pub purpose: Purpose,
    /// The kernel's boot id: equal ones mean one host (containers included).
    pub boot_id: [u8; 16],
    /// Where the sender's Unix socket is, when it has one. Whoever shares the folder can be handed
    /// memory.
    pub unix_path: Option<String>,
    /// For people: "decode-0 rank 1".
    pub name: String,
}

/// What a link is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Purpose {
    /// Learn the listener's [`Hello`], then close. The one purpose served over a connection that
    /// proves nothing about the peer.
    Locate,
    /// The dialler is a producer and wants to write.
    Push,
    /// The dialler is the scheduler half of the listener's own engine.
    Observe,
    /// The dialler wants to know which path it would get, and nothing else.
    Examine,
}

/// Where an engine keeps its KV.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Memory {
    /// In the host's memory.
    Host,
    /// In a GPU's.
    Cuda {
        /// The GPU's UUID.
        gpu: [u8; 16],
    },
}

/// A chunk of a prompt, as it is offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunk {
    /// Its content name. Chunks of an offer or claim come in prompt order; each key chains on the one before.
    pub key: ChunkKey,
    /// Tokens in it: `chunk_tokens` of the layout, fewer in a prompt's last chunk.
    pub tokens: u32,
}

/// Leave to write one chunk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Granted {
    /// Which chunk of the offer.
    pub chunk: u32,
    /// The leave's number.
    pub grant: GrantId,
    /// Where: for each group in turn, extents that together hold its blocks.
    pub extents: Vec<Extent>,
}

/// What became of a committed chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CommitOutcome {
    /// It can be claimed.
    Indexed,
    /// The grant had expired or been revoked; this copy is dropped.
    Expired,
}

/// How a claim stands. `ready` counts chunks from the claim's first on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClaimStatus {
    /// That many leading chunks are committed and pinned for this claim.
    pub ready: u32,
    /// That many leading chunks are pinned, being written, or waiting for room. At least `ready`.
    pub coming: u32,
    /// What holds up the chunk after the ready ones.
    pub next: Next,
}

/// Why a claim's first chunk that is not ready is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Next {
    /// Nothing: all of them are ready.
    Done,
    /// The producers are being asked whether they have it.
    Asking,
    /// A producer holds a grant for it and is writing, or is about to.
    Writing,
    /// A producer offered it and waits for room in the pool: loading what is ready makes room.
    Stalled,
    /// No connected producer has offered it.
    Missing,
    /// It was offered, and its producer went away or gave up.
    Lost,
    /// No producer is connected at all.
    NoProducer,
}

/// A message after the hellos.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    // ---- either way -------------------------------------------------------------------------
    /// I am alive.
    Ping,
    /// The link ends here, and why.
    Bye {
        /// One line, for people.
        reason: String,
        /// It would end again for the same reason until one side is configured anew: do not come back soon.
        lasting: bool,
    },

    // ---- producer to consumer ---------------------------------------------------------------
    /// Our geometry, and where our engine keeps its KV. First on a [`Purpose::Push`] link; answered by [`Message::Attached`], or by [`Message::Bye`] if
    /// the consumer's differs.
    Attach {
        /// The producer's layout.
        layout: KvLayout,
        /// What it is read from.
        memory: Memory,
        /// What this side is able to do of each path it knows.
        paths: Vec<Ability>,
    },
    /// These chunks of this request can be had. From an observer to its producer: offer them to all consumers.
    Offer {
        /// Names the offer on this link.
        offer: OfferId,
        /// The engine's request id, for logs.
        request: String,
        /// In prompt order.
        chunks: Vec<Chunk>,
    },
    /// Chunks of an offer that will not be pushed any more and are not granted. All of them when `chunks` is empty.
    Withdraw {
        /// The offer.
        offer: OfferId,
        /// Indices into it.
        chunks: Vec<u32>,
    },
    /// Every write of the grant is terminal and visible: index it.
    Commit {
        /// The grant.
        grant: GrantId,
        /// Checksums of the stored bytes, one per layer, groups in order.
        sums: Vec<u64>,
    },
    /// Every write of the grant is terminal and it will not be committed.
    Abort {
        /// The grant.
        grant: GrantId,
    },
    /// Answers [`Message::Revoke`]: every write of the grant is terminal, none will follow.
    FenceAck {
        /// The grant.
        grant: GrantId,
    },
    /// The writer is at it: move the deadlines of these grants, up to their cap.
    Renew {
        /// The grants.
        grants: Vec<GrantId>,
    },
    /// Answers [`Message::Ask`]: whatever this producer had to offer before, it has offered.
    Told {
        /// The question.
        ask: u64,
    },
    /// Answers [`Message::Retire`]: the segment is no longer mapped here.
    Retired {
        /// The segment.
        segment: SegmentId,
        /// The generation that was let go.
        generation: u32,
    },
    /// Bytes were written to the end of a segment: [`PROBE_BYTES`](crate::transport::PROBE_BYTES) of them. Nothing
    /// that is committed in the segment is believed before its owner has read the same there.
    Probed {
        /// The segment.
        segment: SegmentId,
        /// The probe, as [`Message::Segment`] named it.
        probe: u64,
        /// The checksum of the bytes, `probe` being the seed.
        sum: u64,
        /// How long they took, in nanoseconds; 0 if other bytes were on their way at the same time.
        nanos: u64,
    },

    // ---- consumer to producer ---------------------------------------------------------------
    /// Answers [`Message::Attach`]: the two geometries fit, and this is how the bytes go.
    Attached {
        /// The path.
        path: String,
        /// Each better one, and why it was not taken.
        refused: Vec<Refusal>,
    },
    /// A segment for this producer alone, before the first grant in it. Its descriptors travel beside the frame.
    Segment {
        /// Which.
        segment: SegmentId,
        /// Counts the times the segment's memory was replaced.
        generation: u32,
        /// Its size.
        bytes: u64,
        /// Names the probe that is to follow, and is its checksum's seed; never the same twice.
        probe: u64,
        /// Which transport the blob is for.
        transport: String,
        /// The transport's own description.
        blob: Vec<u8>,
    },
    /// Let go of a segment and say so.
    Retire {
        /// Which.
        segment: SegmentId,
        /// Which generation of it.
        generation: u32,
    },
    /// Leave to write these chunks of an offer.
    Granted {
        /// The offer.
        offer: OfferId,
        /// How long the leave lasts from its receipt, in milliseconds, unless renewed.
        deadline_ms: u32,
        /// The chunks.
        grants: Vec<Granted>,
    },
    /// These chunks are here already, and held for a claim for a while: nothing to do.
    Have {
        /// The offer.
        offer: OfferId,
        /// Indices into it.
        chunks: Vec<u32>,
    },
    /// Another producer is writing these chunks. The outcome follows.
    Pending {
        /// The offer.
        offer: OfferId,
        /// Indices into it.
        chunks: Vec<u32>,
    },
    /// No room now. The place in the queue is kept; grants follow without further asking.
    Busy {
        /// The offer.
        offer: OfferId,
        /// Offers ahead of this one.
        ahead: u32,
    },
    /// These chunks can never be taken.
    Refused {
        /// The offer.
        offer: OfferId,
        /// Indices into it.
        chunks: Vec<u32>,
        /// Why, and what would help.
        reason: String,
    },
    /// What became of a [`Message::Commit`].
    CommitAck {
        /// The grant.
        grant: GrantId,
        /// The outcome.
        outcome: CommitOutcome,
    },
    /// Stop writing, drain, answer with [`Message::FenceAck`].
    Revoke {
        /// The grant.
        grant: GrantId,
    },
    /// Have you offered all you have? A barrier of one round trip, for a claim that found nothing:
    /// a link keeps its order, so after the answer an absent offer does not exist.
    Ask {
        /// Names the question.
        ask: u64,
    },

    // ---- observer and the agents of its engine ----------------------------------------------
    /// Pin these chunks as they come, for one request.
    Claim {
        /// Names the claim on every rank.
        claim: ClaimId,
        /// The engine's request id, for logs.
        request: String,
        /// In prompt order.
        chunks: Vec<Chunk>,
        /// How long to wait for what is on its way, in milliseconds.
        deadline_ms: u32,
    },
    /// How a claim stands. Sent once after the claim and whenever it changes.
    Claimed {
        /// The claim.
        claim: ClaimId,
        /// The state.
        status: ClaimStatus,
    },
    /// Unpin. Chunks before `keep_from` and from `keep_to` on; everything when the two are equal.
    Release {
        /// The claim.
        claim: ClaimId,
        /// First chunk that stays claimed.
        keep_from: u32,
        /// First chunk after those.
        keep_to: u32,
    },
    /// These chunks of an offer are not read any more.
    Pushed {
        /// The observer's offer.
        offer: OfferId,
        /// Indices into it.
        chunks: Vec<u32>,
    },
    /// The load of a claim ended, and the claim with it: the agent has the outcome.
    Ended {
        /// The claim.
        claim: ClaimId,
    },

    // ---- who examines a consumer, and the consumer ------------------------------------------
    /// Which path would a producer get that keeps its KV there and is able to do this?
    Examine {
        /// Where.
        memory: Memory,
        /// This.
        paths: Vec<Ability>,
    },
    /// Answers [`Message::Examine`].
    Examined {
        /// The path; `None` if there is none.
        path: Option<String>,
        /// Each other one that would not be had either, better or not, and why. Where KV is in the wrong kind of memory,
        /// there is one reason for all, and no path.
        refused: Vec<Refusal>,
    },
}
