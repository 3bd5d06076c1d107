//! The wire format: pinned bytes, round trips, and whatever a stranger may send.

mod arbitrary;
mod refusals;
mod samples;

use std::fmt::Write as _;

use kvxfer_core::wire::frame::MAGIC;
use kvxfer_core::wire::{Decoder, Frame, Message, encode, encode_hello};
use kvxfer_core::{Error, Incarnation};
use proptest::prelude::*;
use samples::US;

/// All frames of a stream that arrives in those pieces; each hello is accepted with version 1.
fn decode_pieces<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Result<Vec<Frame>, Error> {
    let mut decoder = Decoder::new();
    let mut frames = Vec::new();
    for mut piece in pieces {
        while !piece.is_empty() {
            let taken = decoder.push(piece);
            assert!(taken > 0);
            piece = &piece[taken..];
            while let Some(frame) = decoder.next()? {
                frames.push(frame);
                decoder.accept(1);
            }
        }
    }
    Ok(frames)
}

/// A hello of [`US`], then those messages.
fn stream(messages: &[Message]) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_hello(&samples::hello(), &mut bytes).unwrap();
    messages.iter().for_each(|message| encode(message, US, 1, &mut bytes).unwrap());
    bytes
}

/// Bytes of all messages as peers of version 1 know them. They change with a new version only: then
/// there is a new file, and this one stays. To write it: `KVXFER_GOLDEN=write cargo test -p
/// kvxfer-core --test wire golden`.
#[test]
fn golden_vectors() {
    let mut lines = String::from("# Frames of protocol version 1: name, then bytes in hex.\n");
    let mut line = |name: &str, bytes: &[u8]| {
        write!(lines, "{name} ").unwrap();
        bytes.iter().for_each(|byte| write!(lines, "{byte:02x}").unwrap());
        lines.push('\n');
    };
    line("Hello", &stream(&[]));
    for (i, message) in samples::messages().iter().enumerate() {
        let (place, name) = samples::name(message);
        assert_eq!(usize::from(place), i, "{name}");
        let mut bytes = Vec::new();
        encode(message, US, 1, &mut bytes).unwrap();
        assert_eq!(bytes[24], place, "{name}: variants keep their places");
        line(name, &bytes);
    }
    // One past the last is unknown, so no variant is without a sample.
    let mut bytes = stream(&[Message::Ping]);
    *bytes.last_mut().unwrap() = samples::messages().len() as u8;
    assert!(decode_pieces([&bytes[..]]).is_err());

    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/wire-1.txt");
    if std::env::var_os("KVXFER_GOLDEN").is_some_and(|value| value == "write") {
        std::fs::write(path, &lines).unwrap();
    }
    let pinned = std::fs::read_to_string(path).unwrap();
    for (pinned, line) in pinned.lines().zip(lines.lines()) {
        assert_eq!(pinned, line);
    }
    assert_eq!(pinned, lines);
}

#[test]
fn all_samples_round_trip() {
    let messages = samples::messages();
    let frames = decode_pieces([&stream(&messages)[..]]).unwrap();
    assert_eq!(frames[0], Frame::Hello(samples::hello()));
    let expected: Vec<_> = messages.into_iter().map(Frame::Message).collect();
    assert_eq!(frames[1..], expected);
}

#[test]
fn any_split_gives_the_same_frames() {
    let bytes = stream(&samples::messages());
    let whole = decode_pieces([&bytes[..]]).unwrap();
    for at in 0..bytes.len() {
        assert_eq!(decode_pieces([&bytes[..at], &bytes[at..]]).unwrap(), whole, "{at}");
    }
    assert_eq!(decode_pieces(bytes.chunks(1)).unwrap(), whole);
}

/// Nothing but the hello is read before it was accepted, however much arrives.
#[test]
fn little_is_buffered_before_the_hello_is_accepted() {
    let bytes = stream(&vec![Message::Ping; 1000]);
    let mut decoder = Decoder::new();
    let mut pushed = 0;
    let mut hellos = 0;
    for _ in 0..100 {
        pushed += decoder.push(&bytes[pushed..]);
        hellos += usize::from(decoder.next().unwrap().is_some());
    }
    assert_eq!((hellos, decoder.peer()), (1, Some(US)));
    assert!(pushed <= 2 * (8 + 24 + 1024), "{pushed}");
    decoder.accept(1);
    let mut pings = 0;
    while pushed < bytes.len() || decoder.buffered() > 0 {
        pushed += decoder.push(&bytes[pushed..]);
        while let Some(frame) = decoder.next().unwrap() {
            assert_eq!(frame, Frame::Message(Message::Ping));
            pings += 1;
        }
    }
    assert_eq!(pings, 1000);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn messages_round_trip(
        messages in prop::collection::vec(arbitrary::message(), 0..5),
        cuts in prop::collection::vec(1..200usize, 1..20),
    ) {
        let bytes = stream(&messages);
        let mut pieces = Vec::new();
        let mut rest = &bytes[..];
        for cut in cuts.iter().cycle() {
            let (piece, later) = rest.split_at((*cut).min(rest.len()));
            pieces.push(piece);
            rest = later;
            if rest.is_empty() { break }
        }
        let frames = decode_pieces(pieces).unwrap();
        prop_assert_eq!(&frames[1..], messages.into_iter().map(Frame::Message).collect::<Vec<_>>());
    }

    #[test]
    fn hellos_round_trip(hello in arbitrary::hello()) {
        let mut bytes = Vec::new();
        encode_hello(&hello, &mut bytes).unwrap();
        prop_assert_eq!(decode_pieces([&bytes[..]]).unwrap(), [Frame::Hello(hello)]);
    }

    #[test]
    fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..400), magic: bool) {
        let mut stream = if magic { MAGIC.to_vec() } else { Vec::new() };
        stream.extend(bytes);
        let _ = decode_pieces([&stream[..]]);
    }

    /// Bodies of the right kind and length, with anything in them: what decodes is encoded alike or
    /// refused for its bounds.
    #[test]
    fn bodies_of_garbage_never_panic(
        kind in 0..32u8,
        body in prop::collection::vec(prop_oneof![any::<u8>(), Just(0xFF), 0..4u8], 0..200),
    ) {
        let mut bytes = stream(&[]);
        bytes.extend((1 + body.len() as u32).to_le_bytes());
        bytes.extend([1, 0, 1, 0]);
        bytes.extend(US.0);
        bytes.push(kind);
        bytes.extend(body);
        if let Ok(frames) = decode_pieces([&bytes[..]]) {
            let Some(Frame::Message(message)) = frames.last() else { panic!("{frames:?}") };
            encode(message, US, 1, &mut Vec::new()).unwrap();
        }
    }

    /// A good stream with one byte changed ends in frames or an error.
    #[test]
    fn flipped_bytes_never_panic(message in arbitrary::message(), at: prop::sample::Index, flip in 1..=u8::MAX) {
        let mut bytes = stream(&[message]);
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        let _ = decode_pieces([&bytes[..]]);
    }

    #[test]
    fn frames_of_another_incarnation_are_refused(other: [u8; 16]) {
        prop_assume!(other != US.0);
        let mut bytes = stream(&[]);
        encode(&Message::Ping, Incarnation(other), 1, &mut bytes).unwrap();
        prop_assert!(decode_pieces([&bytes[..]]).is_err());
    }
}
