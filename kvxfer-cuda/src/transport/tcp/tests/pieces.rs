//! Bytes that come and go in pieces.

use std::io::Write as _;

use kvxfer_core::PostId;
use kvxfer_core::sum::Sum;
use kvxfer_core::transport::{Transport, Write};
use proptest::prelude::*;
use rustix::net::sockopt;

use super::super::frame::Ack;
use super::super::receive::UNREAD;
use super::bench::{
    BYTES, Bench, Stranger, ZERO, any as anywhere, content, frame, post, span, wait, write,
};
use crate::transport::Target;

/// Says something, and has the target take all of it.
fn say(bench: &mut Bench, writer: &mut Stranger, bytes: &[u8]) {
    writer.say(bytes);
    if !bytes.is_empty() {
        wait(&[bench.target.event_fd()]);
    }
    bench.poll();
}

#[test]
fn frames_may_be_cut_anywhere() {
    let spans = [span(0, 3), span(10, 1), span(20, 30)];
    let bytes = [frame(1, &spans), frame(2, &spans[..1])].concat();
    let mut bench = Bench::new(1);
    let mut writer = bench.writer();
    let clear = |bench: &Bench| {
        let start = bench.pool.segment(ZERO).unwrap().as_mut_ptr();
        // SAFETY: inside the mapping; nobody else is there.
        unsafe { start.write_bytes(0, 64) };
    };
    let check = |bench: &mut Bench, writer: &mut Stranger| {
        let acks: [u8; 32] = writer.hear(bench).unwrap();
        let acks = acks.as_chunks().0.iter().map(|ack| Ack::decode(ack).unwrap());
        let stored = |post| Ack { post: PostId(post), stored: true };
        assert!(acks.eq([stored(1), stored(2)]));
        let seen = bench.seen(ZERO);
        let (mut expected, told): (_, Vec<u8>) = ([0; 64], (1..=34).collect());
        expected[..3].copy_from_slice(&told[..3]);
        expected[10] = 4;
        expected[20..50].copy_from_slice(&told[4..]);
        assert_eq!(seen[..64], expected);
        clear(bench);
    };
    for cut in 0..bytes.len() {
        say(&mut bench, &mut writer, &bytes[..cut]);
        say(&mut bench, &mut writer, &bytes[cut..]);
        check(&mut bench, &mut writer);
    }
    // Byte by byte, and with budgets that end anywhere.
    bytes.iter().for_each(|&byte| say(&mut bench, &mut writer, &[byte]));
    check(&mut bench, &mut writer);
    for budget in 1..40 {
        writer.say(&bytes);
        while bench.byte(49) == 0 {
            bench.target.poll(budget, &anywhere, &mut bench.lost);
        }
        check(&mut bench, &mut writer);
    }
    assert!(bench.lost.is_empty());
}

/// Scattered writes that do not overlap.
fn posts() -> impl Strategy<Value = Vec<Vec<Write>>> {
    let piece = (0..BYTES / 4, 0..40_u64, prop_oneof![0..80_u64, 1..30_000_u64]);
    let writes = proptest::collection::vec(piece, 0..12).prop_map(|pieces| {
        let mut end = 0;
        let place = |(src, gap, len): (u64, u64, u64)| {
            let dst = end + gap;
            end = dst + len;
            write(src, ZERO, dst, len)
        };
        pieces.into_iter().map(place).collect::<Vec<_>>()
    });
    proptest::collection::vec(writes.prop_shuffle(), 1..8)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Buffers so small that hardly a call takes all it is given.
    #[test]
    fn small_sockets_and_small_budgets_lose_nothing(
        posts in posts(), sends in 1..60_000_u64, receives in 1..60_000_u64,
    ) {
        let mut bench = Bench::new(2);
        sockopt::set_socket_recv_buffer_size(bench.target.listener(), 1).unwrap();
        let mut sender = bench.sender();
        for stream in sender.streams() {
            sockopt::set_socket_send_buffer_size(stream.socket(), 1).unwrap();
        }
        let content = content();
        for (id, writes) in (0..).zip(&posts) {
            post(&mut sender, id, writes).unwrap();
            // One after the other: they overlap.
            let mut out = Vec::new();
            while sender.pending() > 0 {
                sender.poll(sends, &mut out);
                bench.target.poll(receives, &anywhere, &mut bench.lost);
                if sender.pending() > 0 && sender.rests() && bench.target.rests() {
                    wait(&[sender.event_fd().unwrap(), bench.target.event_fd()]);
                }
            }
            let (mut sum, seen) = (Sum::new(5), bench.seen(ZERO));
            for write in writes {
                let bytes = &content[write.src as usize..][..write.len as usize];
                sum.update(bytes);
                prop_assert!(&seen[write.dst as usize..][..write.len as usize] == bytes);
            }
            prop_assert_eq!(out.len(), 1);
            prop_assert_eq!(out[0].result.clone().unwrap(), sum.finish());
        }
        prop_assert!(bench.lost.is_empty());
    }
}

#[test]
fn a_post_of_many_frames_is_acknowledged_once() {
    let mut bench = Bench::new(2);
    let mut sender = bench.sender();
    // No two are neighbours: each is a span of its own.
    let scattered: Vec<_> = (0..5000).map(|at| write(at * 16, ZERO, at * 32, 16)).collect();
    post(&mut sender, 1, &scattered).unwrap();
    post(&mut sender, 2, &[write(0, ZERO, BYTES - 8, 8)]).unwrap();
    let ends = bench.settle(&mut sender);
    assert!(ends.len() == 2 && ends.iter().all(|end| end.result.is_ok()), "{ends:?}");
    let (seen, content) = (bench.seen(ZERO), content());
    for write in scattered {
        assert!(seen[write.dst as usize..][..16] == content[write.src as usize..][..16]);
        assert!(seen[write.dst as usize + 16..][..16].iter().all(|&byte| byte == 0));
    }
}

#[test]
fn who_reads_no_acknowledgements_is_read_no_further_until_it_does() {
    let mut bench = Bench::new(1);
    // Not so small that the kernel waits for each piece.
    sockopt::set_socket_send_buffer_size(bench.target.listener(), 64 << 10).unwrap();
    let mut writer = bench.writer();
    let bytes = frame(1, &[span(0, 1)]).repeat(256);
    let (mut posts, mut rest) = (0, &[][..]);
    // As many as are taken, the last ones perhaps in part.
    while !bench.target.rests() || bench.target.unread() < UNREAD {
        if rest.is_empty() {
            (posts, rest) = (posts + 256, &bytes[..]);
        }
        rest = &rest[writer.socket.write(rest).unwrap_or(0)..];
        bench.poll();
    }
    assert!(bench.target.unread() < UNREAD + Ack::BYTES);
    // It goes on as soon as they are read.
    let mut acks = Vec::new();
    while acks.len() < posts * Ack::BYTES {
        rest = &rest[writer.socket.write(rest).unwrap_or(0)..];
        acks.extend(writer.hear::<{ Ack::BYTES }>(&mut bench).unwrap());
    }
    let stored = Ack { post: PostId(1), stored: true }.encode();
    assert!(acks.as_chunks().0.iter().all(|ack| *ack == stored));
    assert!(rest.is_empty() && bench.lost.is_empty());
}

#[test]
fn neighbours_are_one_span() {
    let mut bench = Bench::new(1);
    let mut sender = bench.sender();
    let asked = std::cell::RefCell::new(Vec::new());
    let writes = [write(500, ZERO, 0, 100), write(0, ZERO, 100, 50), write(0, ZERO, 200, 50)];
    post(&mut sender, 1, &writes).unwrap();
    let mut out = Vec::new();
    while sender.pending() > 0 {
        sender.poll(1 << 20, &mut out);
        let leave = |incoming: &crate::transport::target::Incoming| {
            asked.borrow_mut().push((incoming.offset, incoming.len));
            Ok(())
        };
        bench.target.poll(1 << 20, &leave, &mut bench.lost);
    }
    let mut asked = asked.into_inner();
    asked.dedup();
    assert_eq!(asked, [(0, 150), (200, 50)]);
}
