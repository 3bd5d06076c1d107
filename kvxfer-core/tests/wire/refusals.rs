//! What is refused, and what the error says.

use kvxfer_core::layout::{Group, MAX_LAYERS};
use kvxfer_core::path::{Ability, PathName, Refusal};
use kvxfer_core::pool::Extent;
use kvxfer_core::wire::bounds::{self, MAX_CHUNKS, MAX_EXTENTS, MAX_FRAME, MAX_GRANTS, MAX_STRING};
use kvxfer_core::wire::message::{Chunk, ClaimStatus, Granted, Memory, Next};
use kvxfer_core::wire::{Decoder, Frame, Hello, Message, encode, encode_hello, negotiate};
use kvxfer_core::{ChunkKey, ClaimId, Error, ErrorKind, GrantId, OfferId, SegmentId};

use crate::samples::{self, US};
use crate::{decode_pieces, stream};

fn refusal(bytes: &[u8]) -> String {
    let error = decode_pieces([bytes]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Protocol);
    error.to_string()
}

/// A frame of version 1 with that body after a good hello.
fn with_body(body: &[u8]) -> Vec<u8> {
    let mut bytes = stream(&[]);
    bytes.extend((body.len() as u32).to_le_bytes());
    bytes.extend([1, 0, 1, 0]);
    bytes.extend(US.0);
    bytes.extend(body);
    bytes
}

#[test]
fn strangers_are_recognised_by_their_first_bytes() {
    let cases: [(&[u8], &str); 6] = [
        (b"GET / HT", "look like HTTP"),
        (b"HTTP/1.1", "look like HTTP"),
        (b"PRI * HT", "look like HTTP"),
        (b"OPTIONS ", "look like HTTP"),
        (b"\x16\x03\x01\x02\0\x01\0\x01", "look like TLS"),
        (b"KVXFER\n\n", r#"neither HTTP nor TLS: "KVXFER\n\n""#),
    ];
    for (bytes, says) in cases {
        let mut decoder = Decoder::new();
        assert_eq!(decoder.push(&bytes[..7]), 7);
        assert_eq!(decoder.next(), Ok(None));
        assert_eq!(decoder.push(&bytes[7..]), 1);
        let error = decoder.next().unwrap_err();
        assert!(error.to_string().contains(says), "{error} / {says}");
        // And so it stays.
        assert_eq!(decoder.push(&stream(&[])), stream(&[]).len());
        assert_eq!(decoder.next(), Err(error));
        assert_eq!(decoder.buffered(), 0);
    }
}

#[test]
fn frames_out_of_turn() {
    let hello = stream(&[]);
    let ping = stream(&[Message::Ping])[hello.len()..].to_vec();
    // A message first, a second hello, a version that was not negotiated.
    assert!(refusal(&[&hello[..8], &ping].concat()).contains("kind 1, expected 0"));
    assert!(refusal(&[&hello, &hello[8..]].concat()).contains("kind 0, expected 1"));
    let mut other = stream(&[]);
    encode(&Message::Ping, US, 2, &mut other).unwrap();
    assert!(refusal(&other).contains("version 2, expected 1"));
    // A hello of one incarnation in a frame of another.
    let mut forged = hello.clone();
    forged[16] ^= 1;
    assert!(refusal(&forged).contains("hello of a0a0a0a0"));
}

/// The length is judged before a byte of the body has come.
#[test]
fn lengths_are_limited() {
    let mut hello = stream(&[])[..32].to_vec();
    hello[8..12].copy_from_slice(&1025u32.to_le_bytes());
    assert!(refusal(&hello).contains("1025 bytes, at most 1024"));
    for len in [MAX_FRAME as u32 + 1, u32::MAX] {
        let mut bytes = with_body(&[])[..].to_vec();
        let at = bytes.len() - 24;
        bytes[at..at + 4].copy_from_slice(&len.to_le_bytes());
        assert!(refusal(&bytes).contains(&format!("{len} bytes, at most 1048576")));
    }
}

#[test]
fn bodies_are_consumed_to_the_last_byte() {
    assert_eq!(decode_pieces([&with_body(&[0])[..]]).unwrap()[1], Frame::Message(Message::Ping));
    assert!(refusal(&with_body(&[0, 0])).contains("1 bytes too many"));
    assert!(refusal(&with_body(&[])).contains("a body of 0 bytes"));
    // A string that is longer than the body, one that is not UTF-8, a list that claims 2^32-1 items.
    assert!(refusal(&with_body(&[1, 5, b'a'])).contains("a body of 3 bytes"));
    assert!(refusal(&with_body(&[1, 1, 0xFF])).contains("a body of 3 bytes"));
    assert!(
        refusal(&with_body(&[8, 0xFF, 0xFF, 0xFF, 0xFF, 0x0F, 1])).contains("a body of 7 bytes")
    );
}

#[test]
fn values_out_of_bounds_are_neither_sent_nor_taken() {
    let offer = OfferId(1);
    let long = || "x".repeat(MAX_STRING + 1);
    let chunk = |tokens| Chunk { key: ChunkKey([0; 32]), tokens };
    let extent = |page, pages| Extent { segment: SegmentId(0), page, pages, group: 0 };
    let granted = |extents| Granted { chunk: 0, grant: GrantId(0), extents };
    let give = |grants| Message::Granted { offer, deadline_ms: 0, grants };
    let mut layout = samples::layout();
    layout.groups = vec![Group { block_tokens: 16, block_bytes: vec![12] }];
    let host = |paths| Message::Examine { memory: Memory::Host, paths };
    let refused = |path, why| Message::Attached {
        path: "tcp".into(),
        refused: vec![Refusal { path, why }; 1],
    };
    let blob = vec![0; bounds::MAX_ABILITY + 1];
    let cases = [
        (host(vec![Ability::able(PathName::Tcp, vec![]); 17]), "paths of length 17"),
        (host(vec![Ability::able(PathName::Tcp, blob)]), "blob of length 4097"),
        (host(vec![Ability::unable(PathName::Tcp, long())]), "why of length 1025"),
        (refused("p".repeat(65), String::new()), "path of length 65"),
        (refused(String::new(), long()), "why of length 1025"),
        (Message::Examined { path: Some("p".repeat(65)), refused: vec![] }, "path of length 65"),
        (Message::Bye { reason: long(), lasting: false }, "reason of length 1025"),
        (Message::Offer { offer, request: long(), chunks: vec![] }, "request of length 1025"),
        (
            Message::Offer { offer, request: String::new(), chunks: vec![chunk(1), chunk(0)] },
            "chunk 1 of 0 tokens",
        ),
        (Message::Have { offer, chunks: vec![0; MAX_CHUNKS + 1] }, "chunks of length 16385"),
        (Message::Renew { grants: vec![GrantId(0); MAX_CHUNKS + 1] }, "grants of length 16385"),
        (
            Message::Commit { grant: GrantId(0), sums: vec![0; MAX_LAYERS + 1] },
            "sums of length 4097",
        ),
        (give(vec![granted(vec![]); MAX_GRANTS + 1]), "grants of length 4097"),
        (
            give(vec![granted(vec![extent(0, 1); MAX_EXTENTS / 2 + 1]); 2]),
            "extents of length 32770",
        ),
        (give(vec![granted(vec![extent(9, 0)])]), "extent of 0 pages from 9 on"),
        (give(vec![granted(vec![extent(u32::MAX, 1)])]), "extent of 1 pages from 4294967295 on"),
        (Message::Release { claim: ClaimId(0), keep_from: 2, keep_to: 1 }, "keeps chunks 2 to 1"),
        (
            Message::Claimed {
                claim: ClaimId(0),
                status: ClaimStatus { ready: 2, coming: 1, next: Next::Done },
            },
            "2 chunks ready of 1",
        ),
        (
            Message::Attach { layout, memory: Memory::Host, paths: Vec::new() },
            "not a multiple of 8",
        ),
    ];
    for (message, says) in cases {
        let mut out = vec![7];
        let error = encode(&message, US, 1, &mut out).unwrap_err();
        assert!(error.to_string().contains(says), "{error} / {says}");
        assert_eq!(out, [7]);
        // A peer that does not check.
        let error = refusal(&with_body(&postcard::to_allocvec(&message).unwrap()));
        assert!(error.contains(says), "{error} / {says}");
    }
    let hello = Hello { name: "n".repeat(257), ..samples::hello() };
    assert!(encode_hello(&hello, &mut Vec::new()).is_err());
}

/// The largest of each list fits into a frame, and the largest hello into its own.
#[test]
fn what_is_within_bounds_fits() {
    let offer = OfferId(u64::MAX);
    let chunk = Chunk { key: ChunkKey([0xFF; 32]), tokens: u32::MAX };
    let request = || "x".repeat(MAX_STRING);
    let chunks = || vec![u32::MAX; MAX_CHUNKS];
    let extent = Extent {
        segment: SegmentId(u32::MAX),
        page: u32::MAX - u32::from(u16::MAX),
        pages: u16::MAX,
        group: u16::MAX,
    };
    let each = MAX_EXTENTS / MAX_GRANTS;
    let granted =
        Granted { chunk: u32::MAX, grant: GrantId(u64::MAX), extents: vec![extent; each] };
    let mut layout = samples::layout();
    layout.groups = vec![Group { block_tokens: 1, block_bytes: vec![1 << 18; MAX_LAYERS] }];
    layout.tags = (0..64).map(|i| (format!("{i:01024}"), request())).collect();
    let path = || "t".repeat(bounds::MAX_TRANSPORT);
    let able = Ability { path: path(), able: Ok(vec![0xFF; bounds::MAX_ABILITY]) };
    let refused = vec![Refusal { path: path(), why: request() }; bounds::MAX_PATHS];
    let messages = [
        Message::Offer { offer, request: request(), chunks: vec![chunk; MAX_CHUNKS] },
        Message::Granted { offer, deadline_ms: u32::MAX, grants: vec![granted; MAX_GRANTS] },
        Message::Renew { grants: vec![GrantId(u64::MAX); MAX_CHUNKS] },
        Message::Refused { offer, chunks: chunks(), reason: request() },
        Message::Commit { grant: GrantId(u64::MAX), sums: vec![u64::MAX; MAX_LAYERS] },
        Message::Attach { layout, memory: Memory::Host, paths: vec![able; bounds::MAX_PATHS] },
        Message::Attached { path: "t".repeat(bounds::MAX_TRANSPORT), refused },
        Message::Segment {
            segment: SegmentId(0),
            generation: 0,
            bytes: 0,
            probe: u64::MAX,
            transport: "t".repeat(bounds::MAX_TRANSPORT),
            blob: vec![0xFF; bounds::MAX_BLOB],
        },
    ];
    let bytes = stream(&messages);
    assert_eq!(decode_pieces(bytes.chunks(64 << 10)).unwrap().len(), 1 + messages.len());
    let hello = Hello {
        versions: (u16::MAX, u16::MAX),
        key_versions: (u16::MAX, u16::MAX),
        unix_path: Some("p".repeat(bounds::MAX_PATH)),
        name: "n".repeat(bounds::MAX_NAME),
        ..samples::hello()
    };
    encode_hello(&hello, &mut Vec::new()).unwrap();
}

#[test]
fn reasons_are_cut_between_characters() {
    assert_eq!(bounds::reason("short"), "short");
    let cut = bounds::reason(format!("x{}", "é".repeat(MAX_STRING)));
    assert_eq!(cut.len(), MAX_STRING - 1);
    encode(&Message::Bye { reason: cut, lasting: false }, US, 1, &mut Vec::new()).unwrap();
}

#[test]
fn the_highest_common_version() {
    assert_eq!(negotiate((1, 3), (2, 9)), Ok(3));
    assert_eq!(negotiate((2, 9), (1, 3)), Ok(3));
    assert_eq!(negotiate((1, 1), (1, 1)), Ok(1));
    let says = |result: Result<u16, Error>| {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::VersionMismatch);
        error.to_string()
    };
    assert!(says(negotiate((1, 2), (3, 4))).contains("ours 1 to 2, theirs 3 to 4"));
    assert!(says(negotiate((5, 5), (3, 4))).contains("ours 5, theirs 3 to 4"));
    assert!(says(negotiate((1, 5), (4, 3))).contains("theirs 4 to 3"));
}
