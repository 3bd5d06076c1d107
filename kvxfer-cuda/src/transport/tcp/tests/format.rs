//! Encoding, and what is no encoding.

use std::net::SocketAddr;

use kvxfer_core::transport::SegmentHandle;
use kvxfer_core::{ErrorKind, GrantId, Incarnation, PostId, SegmentId};
use proptest::prelude::*;

use super::super::blob::Blob;
use super::super::frame::{Ack, Answer, Head, Opening, SPANS, Span};

fn spans() -> impl Strategy<Value = Vec<Span>> {
    let span = (any::<u32>(), any::<u32>(), any::<u64>(), 1..=u64::MAX >> 10);
    let span = span.prop_map(|(segment, generation, offset, len)| Span {
        segment: SegmentId(segment),
        generation,
        offset,
        len,
    });
    proptest::collection::vec(span, 1..=SPANS)
}

fn blobs() -> impl Strategy<Value = Blob> {
    let ways = (0..=8_usize, 1..=64_usize).prop_flat_map(|(addresses, tokens)| {
        let tokens = if addresses == 0 { 0 } else { tokens };
        let address = (any::<std::net::IpAddr>(), any::<u16>());
        let address = address.prop_map(|(ip, port)| SocketAddr::new(ip, port));
        (
            proptest::collection::vec(address, addresses),
            proptest::collection::vec(any::<[u8; 16]>(), tokens),
        )
    });
    (any::<u32>(), ways, any::<u64>()).prop_map(|(generation, (addresses, tokens), bytes)| Blob {
        generation,
        addresses,
        tokens,
        bytes,
    })
}

fn handle(blob: Vec<u8>, bytes: u64) -> SegmentHandle {
    SegmentHandle { blob, bytes, fds: Vec::new() }
}

proptest! {
    #[test]
    fn what_is_encoded_decodes(
        stream: u32, token: [u8; 16], name: [u8; 16], post: u64, grant: Option<u64>, last: bool, stored: bool,
        spans in spans(),
    ) {
        let opening = Opening { stream, token, writer: Incarnation(name) };
        prop_assert_eq!(Opening::decode(&opening.encode()).unwrap(), opening);
        let answer = Answer { stream, owner: Incarnation(name) };
        prop_assert_eq!(Answer::decode(&answer.encode()).unwrap(), answer);
        let ack = Ack { post: PostId(post), stored };
        prop_assert_eq!(Ack::decode(&ack.encode()).unwrap(), ack);
        let bytes = spans.iter().map(|span| span.len).sum();
        let (post, grant) = (PostId(post), grant.map(GrantId));
        let head = Head { post, grant, bytes, spans: spans.len() as u32, last };
        prop_assert_eq!(Head::decode(&head.encode()).unwrap(), head);
        let raw: Vec<u8> = spans.iter().flat_map(Span::encode).collect();
        let mut decoded = Vec::new();
        Span::decode_all(&head, &raw, &mut decoded).unwrap();
        prop_assert_eq!(decoded, spans);
    }

    #[test]
    fn any_bytes_decode_to_what_encodes_to_them_or_are_refused(
        bytes in proptest::collection::vec(any::<u8>(), 48),
        // So that more than the first check is reached.
        flags in 0..5_u32, spans in 0..4_u32, many in proptest::collection::vec(any::<u8>(), 0..120),
    ) {
        let bytes: &[u8; 48] = bytes.as_chunks().0.first().unwrap();
        let (head, _) = bytes.split_first_chunk::<32>().unwrap();
        let mut head = *head;
        prop_assert!(Opening::decode(bytes).is_err() && Answer::decode(&head).is_err());
        head[24..28].copy_from_slice(&spans.to_le_bytes());
        head[28..].copy_from_slice(&flags.to_le_bytes());
        match Head::decode(&head) {
            Ok(decoded) => {
                prop_assert_eq!(decoded.encode(), head);
                let result = Span::decode_all(&decoded, &many, &mut Vec::new());
                prop_assert_eq!(result.map_err(|error| error.kind()), Err(ErrorKind::Protocol));
            }
            Err(error) => prop_assert_eq!(error.kind(), ErrorKind::Protocol),
        }
        let (ack, _) = bytes.split_first_chunk::<16>().unwrap();
        match Ack::decode(ack) {
            Ok(decoded) => prop_assert_eq!(&decoded.encode(), ack),
            Err(error) => prop_assert_eq!(error.kind(), ErrorKind::Protocol),
        }
    }

    #[test]
    fn blobs_decode(blob in blobs()) {
        let bytes = blob.encode();
        prop_assert_eq!(Blob::decode(&handle(bytes.clone(), blob.bytes)).unwrap(), blob.clone());
        for len in 0..bytes.len() {
            let short = Blob::decode(&handle(bytes[..len].to_vec(), blob.bytes));
            prop_assert_eq!(short.map_err(|error| error.kind()), Err(ErrorKind::Protocol));
        }
    }

    #[test]
    fn any_blob_decodes_to_what_encodes_to_it_or_is_refused(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..200),
        blob in blobs(), at: prop::sample::Index, to: u8,
    ) {
        let mut spoilt = blob.encode();
        let at = at.index(spoilt.len());
        spoilt[at] = to;
        bytes.iter_mut().take(1).for_each(|version| *version = 1);
        for bytes in [bytes, spoilt] {
            match Blob::decode(&handle(bytes.clone(), blob.bytes)) {
                Ok(decoded) => prop_assert_eq!(decoded.encode(), bytes),
                Err(error) => prop_assert_eq!(error.kind(), ErrorKind::Protocol),
            }
        }
    }
}

#[test]
fn each_contradiction_in_a_frame_is_refused() {
    let good = Head { post: PostId(1), grant: None, bytes: 8, spans: 1, last: true };
    for spans in [0, SPANS as u32 + 1, u32::MAX] {
        Head::decode(&Head { spans, ..good }.encode()).unwrap_err();
    }
    let mut head = good.encode();
    head[8] = 1;
    assert!(Head::decode(&head).unwrap_err().to_string().contains("probe"));
    let mut head = good.encode();
    head[28] |= 4;
    assert!(Head::decode(&head).unwrap_err().to_string().contains("flags"));

    let span = |len| Span { segment: SegmentId(0), generation: 0, offset: 0, len };
    let two = Head { spans: 2, ..good };
    for (head, lens) in [
        (good, &[7][..]),
        (good, &[9]),
        (good, &[0]),
        (two, &[8]),
        (two, &[8, 0]),
        (two, &[9, u64::MAX]),
    ] {
        let raw: Vec<u8> = lens.iter().flat_map(|&len| span(len).encode()).collect();
        let error = Span::decode_all(&head, &raw, &mut Vec::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Protocol, "{lens:?}");
    }
}

#[test]
fn another_version_is_named() {
    let mut opening = Opening { stream: 0, token: [3; 16], writer: Incarnation([4; 16]) }.encode();
    opening[8] = 9;
    let error = Opening::decode(&opening).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::VersionMismatch);
    assert!(error.to_string().contains("version 9"));
}
