//! One of each message, with values whose bytes are easy to find in a dump.

use kvxfer_core::layout::{Group, KvLayout};
use kvxfer_core::path::{Ability, PathName, Refusal};
use kvxfer_core::pool::Extent;
use kvxfer_core::wire::message::{Chunk, ClaimStatus, CommitOutcome, Granted, Memory, Next};
use kvxfer_core::wire::{Hello, Message, Purpose};
use kvxfer_core::{ChunkKey, ClaimId, GrantId, Incarnation, OfferId, SegmentId};

pub(crate) const US: Incarnation = Incarnation([0xA0; 16]);

pub(crate) fn hello() -> Hello {
    Hello {
        versions: (1, 2),
        key_versions: (1, 1),
        incarnation: US,
        purpose: Purpose::Push,
        boot_id: [0xB0; 16],
        unix_path: Some("/run/kvxfer/0".into()),
        name: "prefill-0 rank 1".into(),
    }
}

pub(crate) fn layout() -> KvLayout {
    KvLayout {
        model: "m@1".into(),
        dtype: "bfloat16".into(),
        chunk_tokens: 256,
        shard: (1, 2),
        groups: vec![Group { block_tokens: 16, block_bytes: vec![32768, 32768] }],
        tags: [("cache layout".into(), "NHD".into())].into(),
    }
}

/// All kinds, in the order of their declaration.
fn abilities() -> Vec<Ability> {
    vec![Ability::able(PathName::Tcp, vec![7]), Ability::unable(PathName::Ucx, "no libucp")]
}

fn refused() -> Vec<Refusal> {
    vec![Refusal { path: "ucx".into(), why: "no libucp".into() }]
}

pub(crate) fn messages() -> Vec<Message> {
    let (offer, grant, claim) = (OfferId(0x11), GrantId(0x1234), ClaimId(0x33));
    let (segment, generation) = (SegmentId(3), 2);
    let chunk = |byte, tokens| Chunk { key: ChunkKey([byte; 32]), tokens };
    let prompt = vec![chunk(0xC1, 256), chunk(0xC2, 7)];
    let extent = |page, pages, group| Extent { segment, page, pages, group };
    let extents = vec![extent(0, 12, 0), extent(200, 4, 1)];
    let status = ClaimStatus { ready: 1, coming: 2, next: Next::Writing };
    vec![
        Message::Ping,
        Message::Bye { reason: "closing".into(), lasting: true },
        Message::Attach {
            layout: layout(),
            memory: Memory::Cuda { gpu: [0xD0; 16] },
            paths: abilities(),
        },
        Message::Offer { offer, request: "req-1".into(), chunks: prompt.clone() },
        Message::Withdraw { offer, chunks: vec![0, 300] },
        Message::Commit { grant, sums: vec![1, u64::MAX] },
        Message::Abort { grant },
        Message::FenceAck { grant },
        Message::Renew { grants: vec![grant, GrantId(u64::MAX)] },
        Message::Told { ask: 9 },
        Message::Retired { segment, generation },
        Message::Probed { segment, probe: 6, sum: u64::MAX, nanos: 300 },
        Message::Attached { path: "tcp".into(), refused: refused() },
        Message::Segment {
            segment,
            generation,
            bytes: 1 << 30,
            probe: 6,
            transport: "shm".into(),
            blob: vec![1, 2, 255],
        },
        Message::Retire { segment, generation },
        Message::Granted {
            offer,
            deadline_ms: 30_000,
            grants: vec![Granted { chunk: 1, grant, extents }],
        },
        Message::Have { offer, chunks: vec![1] },
        Message::Pending { offer, chunks: vec![] },
        Message::Busy { offer, ahead: 4 },
        Message::Refused { offer, chunks: vec![2], reason: "larger than the pool".into() },
        Message::CommitAck { grant, outcome: CommitOutcome::Expired },
        Message::Revoke { grant },
        Message::Ask { ask: 9 },
        Message::Claim { claim, request: "req-1".into(), chunks: prompt, deadline_ms: 5000 },
        Message::Claimed { claim, status },
        Message::Release { claim, keep_from: 0, keep_to: 1 },
        Message::Pushed { offer, chunks: vec![0, 1] },
        Message::Ended { claim },
        Message::Examine { memory: Memory::Host, paths: abilities() },
        Message::Examined { path: None, refused: refused() },
    ]
}

/// A message's name and its place among the variants. A new variant does not compile until it has an
/// arm here, and is missed by the golden test until it has a sample.
pub(crate) fn name(message: &Message) -> (u8, &'static str) {
    macro_rules! names {
        ($($place:literal $name:ident)*) => {
            match message { $(Message::$name { .. } => ($place, stringify!($name)),)* }
        };
    }
    names! {
        0 Ping 1 Bye 2 Attach 3 Offer 4 Withdraw 5 Commit 6 Abort 7 FenceAck 8 Renew 9 Told 10 Retired
        11 Probed 12 Attached 13 Segment 14 Retire 15 Granted 16 Have 17 Pending 18 Busy 19 Refused
        20 CommitAck 21 Revoke 22 Ask 23 Claim 24 Claimed 25 Release 26 Pushed 27 Ended
        28 Examine 29 Examined
    }
}
