//! Messages within the bounds, and some a little outside.

use kvxfer_core::layout::{Group, KvLayout};
use kvxfer_core::path::{Ability, PathName, Refusal};
use kvxfer_core::pool::Extent;
use kvxfer_core::wire::message::{Chunk, ClaimStatus, CommitOutcome, Granted, Memory, Next};
use kvxfer_core::wire::{Hello, Message, Purpose};
use kvxfer_core::{ChunkKey, ClaimId, GrantId, Incarnation, OfferId, SegmentId};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

fn text() -> impl Strategy<Value = String> {
    vec(any::<char>(), 0..12).prop_map(String::from_iter)
}

fn prompt() -> impl Strategy<Value = Vec<Chunk>> {
    let chunk = (any::<[u8; 32]>(), 1..=u32::MAX);
    vec(chunk.prop_map(|(key, tokens)| Chunk { key: ChunkKey(key), tokens }), 0..6)
}

fn layout() -> impl Strategy<Value = KvLayout> {
    let group = (1..5u32, vec(1..1000u32, 1..5)).prop_map(|(tokens, sizes)| Group {
        block_tokens: tokens,
        block_bytes: sizes.into_iter().map(|size| size * 8).collect(),
    });
    (text(), text(), 1..9u32, vec(group, 1..4), btree_map(text(), text(), 0..3), 0..4u32).prop_map(
        |(model, dtype, times, groups, tags, rank)| KvLayout {
            model,
            dtype,
            chunk_tokens: 12 * times,
            shard: (rank, 4),
            groups,
            tags,
        },
    )
}

fn grants() -> impl Strategy<Value = Vec<Granted>> {
    let extent = (any::<u32>(), 0..u32::MAX - 70_000, 1..=u16::MAX, any::<u16>());
    let extent = extent.prop_map(|(segment, page, pages, group)| Extent {
        segment: SegmentId(segment),
        page,
        pages,
        group,
    });
    let granted = (any::<u32>(), any::<u64>(), vec(extent, 0..4));
    vec(
        granted.prop_map(|(chunk, grant, extents)| Granted {
            chunk,
            grant: GrantId(grant),
            extents,
        }),
        0..4,
    )
}

pub(crate) fn hello() -> impl Strategy<Value = Hello> {
    let purpose = prop_oneof![
        Just(Purpose::Locate),
        Just(Purpose::Push),
        Just(Purpose::Observe),
        Just(Purpose::Examine)
    ];
    let path = prop::option::of(text());
    (any::<((u16, u16), (u16, u16), [u8; 16], [u8; 16])>(), purpose, path, text()).prop_map(
        |((versions, key_versions, incarnation, boot_id), purpose, unix_path, name)| Hello {
            versions,
            key_versions,
            incarnation: Incarnation(incarnation),
            purpose,
            boot_id,
            unix_path,
            name,
        },
    )
}

pub(crate) fn message() -> impl Strategy<Value = Message> {
    let next = prop_oneof![
        Just(Next::Done),
        Just(Next::Asking),
        Just(Next::Writing),
        Just(Next::Stalled),
        Just(Next::Missing),
        Just(Next::Lost),
        Just(Next::NoProducer),
    ];
    let numbers = any::<(u64, u32, u32, bool)>();
    (
        0..30u8,
        numbers,
        text(),
        vec(any::<u32>(), 0..6),
        vec(any::<u64>(), 0..6),
        prompt(),
        layout(),
        grants(),
        next,
    )
        .prop_map(
            |(kind, (id, a, b, flag), text, indices, longs, chunks, layout, grants, next)| {
                let (offer, grant, claim) = (OfferId(id), GrantId(id), ClaimId(id));
                let (low, high) = (a.min(b), a.max(b));
                let (segment, generation) = (SegmentId(a), b);
                match kind {
                    0 => Message::Ping,
                    1 => Message::Bye { reason: text, lasting: flag },
                    2 => Message::Attach {
                        layout,
                        memory: if flag {
                            Memory::Host
                        } else {
                            Memory::Cuda { gpu: [a as u8; 16] }
                        },
                        paths: abilities(&text, flag),
                    },
                    3 => Message::Offer { offer, request: text, chunks },
                    4 => Message::Withdraw { offer, chunks: indices },
                    5 => Message::Commit { grant, sums: longs },
                    6 => Message::Abort { grant },
                    7 => Message::FenceAck { grant },
                    8 => Message::Renew { grants: longs.into_iter().map(GrantId).collect() },
                    9 => Message::Told { ask: id },
                    10 => Message::Retired { segment, generation },
                    11 => Message::Probed { segment, probe: id, sum: u64::from(b) << 7, nanos: id },
                    12 => Message::Attached { path: path(&text), refused: refusals(&text) },
                    13 => Message::Segment {
                        segment,
                        generation,
                        bytes: id,
                        probe: id,
                        transport: text,
                        blob: longs.iter().flat_map(|long| long.to_le_bytes()).collect(),
                    },
                    14 => Message::Retire { segment, generation },
                    15 => Message::Granted { offer, deadline_ms: a, grants },
                    16 => Message::Have { offer, chunks: indices },
                    17 => Message::Pending { offer, chunks: indices },
                    18 => Message::Busy { offer, ahead: a },
                    19 => Message::Refused { offer, chunks: indices, reason: text },
                    20 => Message::CommitAck {
                        grant,
                        outcome: if flag { CommitOutcome::Indexed } else { CommitOutcome::Expired },
                    },
                    21 => Message::Revoke { grant },
                    22 => Message::Ask { ask: id },
                    23 => Message::Claim { claim, request: text, chunks, deadline_ms: a },
                    24 => Message::Claimed {
                        claim,
                        status: ClaimStatus { ready: low, coming: high, next },
                    },
                    25 => Message::Release { claim, keep_from: low, keep_to: high },
                    26 => Message::Pushed { offer, chunks: indices },
                    27 => Message::Ended { claim },
                    28 => Message::Examine { memory: Memory::Host, paths: abilities(&text, flag) },
                    _ => Message::Examined {
                        path: flag.then(|| path(&text)),
                        refused: refusals(&text),
                    },
                }
            },
        )
}

fn path(text: &str) -> String {
    text.chars().take(16).collect()
}

fn abilities(text: &str, able: bool) -> Vec<Ability> {
    vec![match able {
        true => Ability::able(PathName::Ucx, text.as_bytes().to_vec()),
        false => Ability::unable(PathName::Tcp, text),
    }]
}

fn refusals(text: &str) -> Vec<Refusal> {
    vec![Refusal { path: path(text), why: text.into() }]
}
