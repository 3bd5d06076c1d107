//! Offers at the consumer: grants, windows, queues, segments.

use kvxfer_core::gc::{AfterRetrieve, GcConfig};
use kvxfer_core::session::ConsumerAction;
use kvxfer_core::wire::Message;
use kvxfer_core::{ErrorKind, LinkId, OfferId, SegmentId};

use crate::rig::{A, B, Decode, attach, chunks, config, layout, ms};

#[test]
fn a_prompt_from_offer_to_load() {
    let mut d = Decode::with(1, 4);
    assert_eq!(d.offer(1, 7, "ab"), ["1> segment s0.0", "1> granted 7: 0=g1 1=g2"]);
    assert_eq!(d.commit(1, 1), ["1> indexed g1"]);
    assert_eq!(d.claim(5, "ab"), ["9> claimed 5: 1 of 2, Writing"]);
    assert_eq!(d.commit(1, 2), ["1> indexed g2", "9> claimed 5: 2 of 2, Done"]);
    assert_eq!(d.load(1, 5, 2), ["copy l1: 0 of g1", "copy l1: 1 of g2"]);
    assert_eq!(d.copied(1, 0), [""; 0]);
    assert_eq!(d.copied(1, 1), ["loaded l1", "9> ended 5"]);
    assert_eq!(d.pool().free, 4);
    assert!(d.consumer.is_idle());
}

#[test]
fn a_producer_is_told_whether_the_layouts_fit() {
    let mut d = Decode::new(config(1, 4));
    d.consumer.producer_connected(d.now, LinkId(1), A);
    let other = attach(layout(1, 2));
    let error = d.consumer.received(d.now, LinkId(1), other).unwrap_err();
    assert!(error.kind() == ErrorKind::LayoutMismatch && error.lasting(), "{error}");
    assert_eq!(d.out(), [""; 0]);
    for _ in 0..2 {
        assert_eq!(d.hear(1, attach(layout(1, 1))), ["1> attached"]);
    }
}

#[test]
fn what_is_here_or_being_written_is_not_written_again() {
    let mut d = Decode::with(2, 4);
    d.join(2, B);
    d.offer(1, 7, "a");
    assert_eq!(d.offer(2, 8, "ab"), ["2> pending 8: 0", "2> segment s1.0", "2> granted 8: 1=g2"]);
    assert_eq!(d.commit(1, 1), ["2> have 8: 0", "1> indexed g1"]);
    assert_eq!(d.offer(1, 9, "a"), ["1> have 9: 0"]);
}

#[test]
fn the_writer_gives_up_and_who_waited_is_next() {
    let mut d = Decode::with(2, 4);
    d.join(2, B);
    d.offer(1, 7, "a");
    assert_eq!(d.offer(2, 8, "a"), ["2> pending 8: 0"]);
    let abort = Message::Abort { grant: kvxfer_core::GrantId(1) };
    assert_eq!(d.hear(1, abort), ["2> segment s1.0", "2> granted 8: 0=g2"]);
}

#[test]
fn a_full_pool_keeps_the_place_in_the_queue() {
    let mut d = Decode::with(1, 2);
    d.offer(1, 7, "ab");
    assert_eq!(d.offer(1, 8, "c"), ["1> busy 8: 0 ahead"]);
    assert_eq!(d.offer(1, 9, "d"), ["1> busy 9: 1 ahead"]);
    d.commit(1, 1);
    d.claim(5, "a");
    d.load(1, 5, 1);
    assert_eq!(d.copied(1, 0), ["loaded l1", "9> ended 5", "1> granted 8: 0=g3"]);
}

#[test]
fn what_can_never_fit_is_refused() {
    let mut config = config(1, 2);
    config.layout = layout(4, 1);
    let mut d = Decode::new(config);
    d.consumer.producer_connected(d.now, LinkId(1), A);
    d.hear(1, attach(layout(4, 1)));
    assert_eq!(d.offer(1, 7, "ab"), ["1> refused 7: 0 1"]);
    let lost = d.wait(ms(2000));
    assert!(lost.is_empty() && d.consumer.is_idle());
}

#[test]
fn what_can_never_fit_says_which_pool_would_do() {
    // Three segments of one page of 64 bytes, and a chunk of four: two pages a segment would do.
    let mut config = config(3, 1);
    config.layout = layout(4, 1);
    let mut d = Decode::new(config);
    d.consumer.producer_connected(d.now, LinkId(1), A);
    let attach = attach(layout(4, 1));
    let offer = Message::Offer { offer: OfferId(7), request: "r".into(), chunks: chunks("a") };
    for message in [attach, offer] {
        d.consumer.received(d.now, LinkId(1), message).unwrap();
    }
    let reason = std::iter::from_fn(|| d.consumer.poll_action()).find_map(|action| match action {
        ConsumerAction::Send { message: Message::Refused { reason, .. }, .. } => Some(reason),
        _ => None,
    });
    let reason = reason.unwrap();
    assert!(reason.contains("of 4 tokens takes 256 bytes, and the whole pool"), "{reason}");
    assert!(reason.contains("has 192 (set buffer_size to at least 384,"), "{reason}");
}

#[test]
fn grants_go_out_window_by_window() {
    let mut config = config(1, 8);
    config.window_pages = 2;
    let mut d = Decode::new(config);
    d.join(1, A);
    assert_eq!(d.offer(1, 7, "abcd"), ["1> segment s0.0", "1> granted 7: 0=g1 1=g2"]);
    assert_eq!(d.commit(1, 2), ["1> indexed g2", "1> granted 7: 2=g3"]);
    assert_eq!(d.commit(1, 1), ["1> indexed g1", "1> granted 7: 3=g4"]);
}

#[test]
fn overtaking_is_bounded() {
    let mut d = Decode::with(1, 3);
    d.offer(1, 1, "xy");
    // Two pages are wanted and one is free: it is granted, the other waits for room.
    assert_eq!(d.offer(1, 2, "abc"), ["1> granted 2: 0=g3", "1> busy 2: 0 ahead"]);
    let room = |d: &mut Decode, grant: u64| {
        d.hear(1, Message::Abort { grant: kvxfer_core::GrantId(grant) })
    };
    // The blocked one is first in line for whatever becomes free.
    assert_eq!(room(&mut d, 1), ["1> granted 2: 1=g4"]);
    assert_eq!(d.offer(1, 3, "d"), ["1> busy 3: 1 ahead"]);
    assert_eq!(room(&mut d, 2), ["1> granted 2: 2=g5"]);
    assert_eq!(room(&mut d, 5), ["1> granted 3: 0=g6"]);
}

#[test]
fn small_offers_overtake_one_that_cannot_be_served_so_often_and_no_more() {
    // Chunks of two pages, so that a page can be free and of no use to the first in line.
    let mut config = config(1, 3);
    config.layout = layout(2, 1);
    let mut d = Decode::new(config);
    d.consumer.producer_connected(d.now, LinkId(1), A);
    d.hear(1, attach(layout(2, 1)));
    d.offer(1, 1, "x");
    assert_eq!(d.offer(1, 2, "y"), ["1> busy 2: 0 ahead"]);
    let mut served = 0;
    for offer in 3..8 {
        let mut chunks = chunks("abcdefgh");
        let chunks = vec![kvxfer_core::wire::message::Chunk {
            tokens: 2,
            ..chunks.swap_remove(offer as usize - 3)
        }];
        let lines =
            d.hear(1, Message::Offer { offer: OfferId(offer), request: "r".into(), chunks });
        served += lines.iter().filter(|line| line.contains("granted")).count();
        if let Some(grant) = lines.iter().find_map(|line| line.split("=g").nth(1)) {
            let grant = kvxfer_core::GrantId(grant.parse().unwrap());
            d.hear(1, Message::Abort { grant });
        }
    }
    assert_eq!(served, 2);
}

#[test]
fn withdrawn_chunks_are_lost_to_those_who_wait() {
    let mut d = Decode::with(1, 1);
    d.offer(1, 7, "ab");
    d.claim(5, "ab");
    d.load(1, 5, 2);
    let withdraw = Message::Withdraw { offer: OfferId(7), chunks: vec![1] };
    assert_eq!(d.hear(1, withdraw), ["9> claimed 5: 0 of 1, Writing"]);
    assert_eq!(d.commit(1, 1), ["copy l1: 0 of g1", "1> indexed g1", "9> claimed 5: 1 of 1, Lost"]);
    assert_eq!(d.copied(1, 0), ["failed l1: PeerLost", "9> ended 5"]);
}

#[test]
fn a_segment_changes_hands_when_its_writer_let_go() {
    let mut d = Decode::with(1, 2);
    d.join(2, B);
    d.offer(1, 7, "a");
    d.commit(1, 1);
    assert_eq!(d.offer(2, 8, "b"), ["2> busy 8: 0 ahead"]);
    d.claim(5, "a");
    d.load(1, 5, 1);
    assert_eq!(d.copied(1, 0), ["loaded l1", "9> ended 5", "1> retire s0"]);
    let retired = Message::Retired { segment: SegmentId(0), generation: 0 };
    assert_eq!(d.hear(1, retired), ["2> segment s0.0", "2> granted 8: 0=g2"]);
    // The first one gets it back the same way, with a new export.
    assert_eq!(d.offer(1, 9, "c"), ["1> busy 9: 0 ahead"]);
    assert_eq!(d.hear(2, Message::Abort { grant: kvxfer_core::GrantId(2) }), ["2> retire s0"]);
    let retired = Message::Retired { segment: SegmentId(0), generation: 0 };
    assert_eq!(d.hear(2, retired), ["1> segment s0.0", "1> granted 9: 0=g3"]);
}

#[test]
fn a_writer_keeps_a_segment_that_it_was_granted_pages_in_again() {
    let mut d = Decode::with(1, 2);
    d.join(2, B);
    d.offer(1, 7, "a");
    d.hear(1, Message::Abort { grant: kvxfer_core::GrantId(1) });
    assert_eq!(d.offer(2, 8, "b"), ["1> retire s0", "2> busy 8: 0 ahead"]);
    // Small enough to overtake; the segment is exported anew, for the writer lets go of it meanwhile.
    assert_eq!(d.offer(1, 9, "c"), ["1> segment s0.0", "1> granted 9: 0=g2"]);
    let retired = Message::Retired { segment: SegmentId(0), generation: 0 };
    assert_eq!(d.hear(1, retired), [""; 0]);
    assert_eq!(d.commit(1, 2), ["1> indexed g2"]);
}

#[test]
fn chunks_that_are_only_kept_make_room_for_another_writer() {
    let mut config = config(1, 4);
    config.gc = GcConfig { after_retrieve: AfterRetrieve::Keep, ..config.gc };
    let mut d = Decode::new(config);
    d.join(1, A);
    d.join(2, B);
    d.consumer.observer_connected(d.now, LinkId(9), kvxfer_core::Incarnation([9; 16]));
    d.offer(1, 7, "a");
    d.commit(1, 1);
    d.claim(5, "a");
    d.load(1, 5, 1);
    d.copied(1, 0);
    assert_eq!(d.pool().committed, 1);
    assert_eq!(d.offer(2, 8, "b"), ["1> retire s0", "2> busy 8: 0 ahead"]);
    let retired = Message::Retired { segment: SegmentId(0), generation: 0 };
    assert_eq!(d.hear(1, retired), ["2> segment s0.0", "2> granted 8: 0=g2"]);
}

#[test]
fn repeated_messages_change_nothing() {
    let mut d = Decode::with(1, 4);
    d.offer(1, 7, "ab");
    assert_eq!(d.offer(1, 7, "ab"), [""; 0]);
    d.commit(1, 1);
    assert_eq!(d.commit(1, 1), ["1> indexed g1"]);
    assert_eq!(d.fenced(1, 1), [""; 0]);
    d.claim(5, "a");
    assert_eq!(d.claim(5, "a"), [""; 0]);
    d.release(5);
    assert_eq!(d.release(5), [""; 0]);
    assert_eq!(d.claim(5, "a"), [""; 0], "a claim that is over does not come back");
    d.hear(1, attach(layout(1, 1)));
    assert_eq!(d.pool().free, 3, "one chunk is still being written");
}
