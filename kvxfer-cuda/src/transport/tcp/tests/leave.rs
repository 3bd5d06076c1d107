//! Nothing is stored without leave.

use std::io::Write as _;

use kvxfer_core::transport::Transport;
use kvxfer_core::{ErrorKind, Result, SegmentId};
use proptest::prelude::*;

use super::super::frame::{Ack, Span};
use super::bench::{
    BYTES, Bench, ONE, WRITER, ZERO, any as anywhere, content, frame, post, span, wait, write,
};
use crate::transport::Target;
use crate::transport::target::Incoming;

fn nowhere(_: &Incoming) -> Result<()> {
    Err(ErrorKind::Protocol.error("that grant is over"))
}

#[test]
fn a_write_without_leave_stores_nothing_and_ends_the_writer() {
    let mut bench = Bench::new(2);
    let mut sender = bench.sender();
    let asked = std::cell::RefCell::new(Vec::new());
    let upper = |incoming: &Incoming| {
        asked.borrow_mut().push(*incoming);
        if incoming.offset < BYTES / 2 { Ok(()) } else { nowhere(incoming) }
    };
    // With leave for the first half; in one call with the second, it is not stored either.
    post(&mut sender, 1, &[write(0, ZERO, 0, 100), write(0, ZERO, BYTES / 2, 100)]).unwrap();
    post(&mut sender, 2, &[write(0, ZERO, 200, 100)]).unwrap();
    let mut out = Vec::new();
    while sender.pending() > 0 {
        sender.poll(1 << 20, &mut out);
        bench.target.poll(1 << 20, &upper, &mut bench.lost);
        if sender.pending() > 0 && sender.rests() && bench.target.rests() {
            wait(&[sender.event_fd().unwrap(), bench.target.event_fd()]);
        }
    }
    assert_eq!(bench.lost.len(), 1);
    assert_eq!(
        (bench.lost[0].0, bench.lost[0].1.to_string()),
        (WRITER, "that grant is over".into())
    );
    assert!(bench.seen(ZERO)[BYTES as usize / 2..].iter().all(|&byte| byte == 0));
    assert!(asked.borrow().iter().all(|incoming| {
        (incoming.writer, incoming.grant) == (WRITER, Some(super::bench::GRANT))
    }));
    let errors: Vec<_> = out.iter().filter_map(|end| end.result.as_ref().err()).collect();
    assert!(errors.iter().all(|error| error.kind() == ErrorKind::PeerLost), "{errors:?}");
    assert!(out.iter().any(|end| end.id.0 == 1 && end.result.is_err()));
    let refused = post(&mut sender, 3, &[write(0, ZERO, 0, 1)]).unwrap_err();
    assert_eq!((refused.kind(), refused.retryable()), (ErrorKind::PeerLost, false));
}

#[test]
fn leave_that_is_withdrawn_in_the_middle_of_a_frame_stops_it_there() {
    let mut bench = Bench::new(1);
    let mut writer = bench.writer();
    let bytes = frame(1, &[span(0, 64 << 10), span(128 << 10, 64 << 10)]);
    writer.socket.set_nonblocking(false).unwrap();
    writer.say(&bytes[..100_000]);
    // Until a part of the first span is stored.
    while bench.byte(10_000) == 0 {
        bench.target.poll(20_000, &anywhere, &mut bench.lost);
    }
    let before = bench.seen(ZERO);
    assert!(bench.lost.is_empty() && before[(128 << 10) + 100] == 0, "all of it came");
    writer.say(&bytes[100_000..]);
    while bench.lost.is_empty() {
        bench.target.poll(1 << 20, &nowhere, &mut bench.lost);
    }
    for _ in 0..10 {
        bench.poll();
    }
    assert!(bench.seen(ZERO) == before, "it was stored after the leave had ended");
    assert_eq!(bench.lost.len(), 1);
}

#[test]
fn what_comes_after_a_writer_was_cut_off_is_not_stored() {
    let mut bench = Bench::new(2);
    let mut sender = bench.sender();
    // Both streams are open, and have had something to do.
    for id in 0..2 {
        post(&mut sender, id, &[write(0, ZERO, id * 64, 64)]).unwrap();
    }
    assert!(bench.settle(&mut sender).iter().all(|end| end.result.is_ok()));
    let before = bench.seen(ZERO);

    post(&mut sender, 3, &[write(0, ZERO, 4096, 40_000)]).unwrap();
    let mut out = Vec::new();
    sender.poll(1 << 20, &mut out);
    bench.target.cut_off(WRITER);
    out.extend(bench.settle(&mut sender));
    assert_eq!(out.len(), 1);
    assert_eq!(out[0].result.as_ref().unwrap_err().kind(), ErrorKind::PeerLost);
    for _ in 0..10 {
        bench.poll();
    }
    assert!(bench.seen(ZERO) == before);
    assert!(bench.lost.is_empty(), "who was cut off is not lost as well");
    // And it may come again, by a new handle only.
    let handle = bench.export(ZERO);
    let old = sender.attach(super::bench::OWNER, ONE, bench.export(ONE)).unwrap_err();
    assert_eq!(old.kind(), ErrorKind::PeerLost);
    sender.attach(super::bench::OWNER, ZERO, handle).unwrap();
    post(&mut sender, 4, &[write(0, ZERO, 4096, 40_000)]).unwrap();
    assert!(bench.settle(&mut sender)[0].result.is_ok());
    assert!(bench.seen(ZERO)[4096..44_096] == content()[..40_000]);
}

#[test]
fn frames_that_reach_beyond_what_was_exported_end_the_writer() {
    let far = |offset, len| Span { offset, len, ..span(0, 1) };
    let elsewhere = Span { segment: ONE, ..span(0, 100) };
    let unknown = Span { segment: SegmentId(9), ..span(0, 100) };
    let mut torn = frame(1, &[span(0, 8)]);
    torn[0] = 2;
    // In the middle of another post.
    let mut first = frame(1, &[span(0, 8)]);
    first[28] &= !1;
    let frames = [
        frame(1, &[far(BYTES - 10, 11)]),
        frame(1, &[far(BYTES, 1)]),
        frame(1, &[far(u64::MAX, 5)]),
        frame(1, &[elsewhere]),
        frame(1, &[unknown]),
        [first, torn].concat(),
    ];
    for (number, frame) in frames.into_iter().enumerate() {
        let mut bench = Bench::new(1);
        // The other segment is another writer's.
        let memory = bench.pool.segment(ONE).unwrap();
        bench.target.export(kvxfer_core::Incarnation([7; 16]), ONE, memory).unwrap();
        // So that the first is of generation 1 here as well.
        bench.target.generation = 0;
        let mut writer = bench.writer();
        writer.say(&frame);
        let why = bench.loses();
        assert!(
            matches!(why.kind(), ErrorKind::Protocol | ErrorKind::OutOfBounds),
            "{number}: {why}"
        );
        writer.is_closed(&mut bench);
        assert!(bench.seen(ONE).iter().all(|&byte| byte == 0), "{number}");
        assert!(bench.seen(ZERO)[8..].iter().all(|&byte| byte == 0), "{number}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Bytes behind a valid opening, random ones and frames with random changes.
    #[test]
    fn a_writer_that_sends_anything_at_all_stores_nothing_without_leave(
        noise in proptest::collection::vec(any::<u8>(), 0..300),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
    ) {
        let mut bench = Bench::new(1);
        let mut writer = bench.writer();
        let mut bytes = frame(1, &[span(5000, 300), span(7000, 10)]);
        let len = bytes.len();
        changes.iter().for_each(|(at, to)| bytes[at.index(len)] = *to);
        bytes.extend(noise);
        writer.say(&bytes);
        writer.socket.flush().unwrap();
        drop(writer);
        let below = |incoming: &Incoming| match incoming.offset + incoming.len <= 8192 {
            true => Ok(()),
            false => nowhere(incoming),
        };
        while bench.lost.is_empty() {
            wait(&[bench.target.event_fd()]);
            bench.target.poll(1 << 20, &below, &mut bench.lost);
        }
        prop_assert_eq!(bench.lost.len(), 1);
        prop_assert!(bench.seen(ZERO)[8192..].iter().all(|&byte| byte == 0));
        prop_assert!(bench.seen(ONE).iter().all(|&byte| byte == 0));
    }
}

#[test]
fn bytes_for_memory_that_was_replaced_are_dropped_and_the_post_ends_badly() {
    let mut bench = Bench::new(1);
    let mut writer = bench.writer();
    let bytes = frame(1, &[span(0, 40_000), span(50_000, 40_000)]);
    writer.socket.set_nonblocking(false).unwrap();
    writer.say(&bytes[..30_000]);
    while bench.byte(20_000) == 0 {
        bench.poll();
    }
    bench.pool.replace(ZERO, &[]).unwrap();
    bench.export(ZERO);
    writer.say(&bytes[30_000..]);
    // A post for the new memory comes on the same connection.
    writer.say(&frame(2, &[Span { generation: 2, ..span(10, 5) }]));
    writer.socket.set_nonblocking(true).unwrap();
    let acks: [u8; 32] = writer.hear(&mut bench).unwrap();
    let acks = acks.as_chunks().0.iter().map(|ack| Ack::decode(ack).unwrap().stored);
    assert_eq!(acks.collect::<Vec<_>>(), [false, true]);
    let seen = bench.seen(ZERO);
    assert_eq!(&seen[9..16], [0, 1, 2, 3, 4, 5, 0]);
    assert!(seen[16..].iter().all(|&byte| byte == 0));
}
