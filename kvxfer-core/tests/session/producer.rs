//! The producer: steps, posts, endings.

use kvxfer_core::wire::Message;
use kvxfer_core::{OfferId, SegmentId};

use crate::rig::{A, B, Prefill, ms};

#[test]
fn layer_by_layer_then_commit() {
    let mut p = Prefill::new(1, 2);
    assert_eq!(p.offer(7, "a"), ["1> offer 7 of 1"]);
    p.granted(1, 7, 0, 1);
    assert_eq!(p.begin(7, 0, 1), [""; 0], "no layer has run");
    assert_eq!(p.layer(0), ["post 0 on 1: g1 layer 0"]);
    assert_eq!(p.posted(0), [""; 0]);
    assert_eq!(p.end(), ["post 1 on 1: g1 layer 1"]);
    assert_eq!(p.posted(1), ["1> commit g1", "0> pushed 7: 0"]);
    assert!(p.producer.is_idle());
}

#[test]
fn a_grant_after_the_step_and_a_step_before_the_offer() {
    let mut p = Prefill::new(1, 1);
    p.begin(7, 0, 1);
    p.end();
    p.offer(7, "a");
    assert_eq!(p.granted(1, 7, 0, 1), ["post 0 on 1: g1 layer 0"]);
    assert_eq!(p.posted(0), ["1> commit g1", "0> pushed 7: 0"]);
}

#[test]
fn a_revoked_chunk_drains_before_it_is_fenced_and_is_written_again() {
    let mut p = Prefill::new(1, 2);
    p.offer(7, "a");
    p.begin(7, 0, 1);
    p.end();
    assert_eq!(p.granted(1, 7, 0, 1).len(), 2);
    assert_eq!(p.revoke(1, 1), [""; 0]);
    assert_eq!(p.posted(0), [""; 0]);
    assert_eq!(p.posted(1), ["1> fenced g1"]);
    assert_eq!(p.granted(1, 7, 0, 2), ["post 2 on 1: g2 layer 0", "post 3 on 1: g2 layer 1"]);
    p.posted(2);
    assert_eq!(p.posted(3), ["1> commit g2", "0> pushed 7: 0"]);
}

#[test]
fn a_failed_post_aborts_when_the_others_have_ended() {
    let mut p = Prefill::new(1, 2);
    p.offer(7, "a");
    p.begin(7, 0, 1);
    p.end();
    p.granted(1, 7, 0, 1);
    assert_eq!(p.failed(0), [""; 0]);
    assert_eq!(p.posted(1), ["1> abort g1", "0> pushed 7: 0"]);
}

#[test]
fn abort_in_each_state() {
    let mut p = Prefill::new(1, 1);
    p.offer(7, "abcd");
    p.granted(1, 7, 1, 1);
    p.begin(7, 2, 1);
    p.end();
    // Waiting; granted and not computed; computed and not granted; computed and being written.
    p.begin(7, 3, 1);
    p.end();
    assert_eq!(p.granted(1, 7, 3, 2), ["post 0 on 1: g2 layer 0"]);
    assert_eq!(
        p.withdraw(7),
        ["1> withdraw 7: 0", "1> abort g1", "0> pushed 7: 0 1"],
        "what was computed is still handed over"
    );
    assert_eq!(p.posted(0), ["1> commit g2", "0> pushed 7: 3"]);
    assert_eq!(p.wait(ms(1000)), ["1> withdraw 7: 2", "0> pushed 7: 2"]);
    assert!(p.producer.is_idle());
}

#[test]
fn blocks_are_held_for_a_consumer_without_room_for_so_long() {
    let mut p = Prefill::new(1, 1);
    p.offer(7, "a");
    p.begin(7, 0, 1);
    p.end();
    assert_eq!(p.wait(ms(999)), [""; 0]);
    assert_eq!(p.wait(ms(1)), ["1> withdraw 7: 0", "0> pushed 7: 0"]);
    // A grant that was under way meanwhile.
    assert_eq!(p.granted(1, 7, 0, 1), ["1> abort g1"]);
}

#[test]
fn a_chunk_revoked_after_its_time_is_not_held_for_ever() {
    let mut p = Prefill::new(1, 1);
    p.offer(7, "a");
    p.begin(7, 0, 1);
    p.end();
    p.granted(1, 7, 0, 1);
    p.wait(ms(1500));
    p.revoke(1, 1);
    assert_eq!(p.posted(0), ["1> fenced g1"]);
    assert_eq!(p.wait(ms(1000)), ["1> withdraw 7: 0", "0> pushed 7: 0"]);
}

#[test]
fn a_lost_consumer_is_told_nothing_and_its_posts_drain() {
    let mut p = Prefill::new(1, 1);
    p.offer(7, "ab");
    p.begin(7, 0, 1);
    p.end();
    p.granted(1, 7, 0, 1);
    assert_eq!(p.down(1), ["0> pushed 7: 1"]);
    // Another life of it counts its grants from 1 again, and the old one's post is still at it.
    p.join(0, 2, B);
    p.offer(8, "a");
    p.begin(8, 0, 1);
    p.end();
    assert_eq!(p.granted(2, 8, 0, 1), ["post 1 on 2: g1 layer 0"]);
    assert_eq!(p.posted(0), ["0> pushed 7: 0"]);
    assert_eq!(p.posted(1), ["2> commit g1", "0> pushed 8: 0"]);
}

#[test]
fn a_consumer_that_is_back_is_told_when_the_old_posts_are_terminal() {
    let mut p = Prefill::new(1, 1);
    p.offer(7, "a");
    p.begin(7, 0, 1);
    p.end();
    p.granted(1, 7, 0, 1);
    p.down(1);
    p.join(0, 2, A);
    assert_eq!(p.revoke(2, 1), [""; 0]);
    assert_eq!(p.revoke(2, 99), ["2> fenced g99"], "one that never arrived");
    assert_eq!(p.posted(0), ["2> abort g1", "0> pushed 7: 0"]);
}

#[test]
fn repeated_messages_change_nothing() {
    let mut p = Prefill::new(1, 1);
    p.offer(7, "a");
    assert_eq!(p.offer(7, "a"), [""; 0]);
    p.begin(7, 0, 1);
    p.end();
    assert_eq!(p.granted(1, 7, 0, 1).len(), 1);
    assert_eq!(p.granted(1, 7, 0, 1), [""; 0]);
    p.revoke(1, 1);
    assert_eq!(p.posted(0), ["1> fenced g1"]);
    assert_eq!(p.granted(1, 7, 0, 1), [""; 0], "the leave that was given back is not taken again");
    assert_eq!(p.revoke(1, 1), ["1> fenced g1"]);
    let have = || Message::Have { offer: OfferId(7), chunks: vec![0] };
    assert_eq!(p.hear(1, have()), ["0> pushed 7: 0"]);
    assert_eq!(p.hear(1, have()), [""; 0]);
    assert_eq!(p.offer(7, "a"), [""; 0], "an offer that is over does not come back");
    assert!(p.producer.is_idle());
}

#[test]
fn blocks_are_read_until_the_last_consumer_is_done() {
    let mut p = Prefill::new(2, 1);
    p.join(1, 2, B);
    assert_eq!(p.offer(7, "a"), ["1> offer 7 of 1", "2> offer 7 of 1"]);
    p.begin(7, 0, 1);
    p.end();
    let refused = Message::Refused { offer: OfferId(7), chunks: vec![0], reason: "too big".into() };
    assert_eq!(p.hear(1, refused), [""; 0]);
    p.granted(2, 7, 0, 1);
    assert_eq!(p.posted(0), ["2> commit g1", "0> pushed 7: 0"]);
}

#[test]
fn a_finished_request_is_still_offered_to_a_consumer_that_comes_late() {
    let mut p = Prefill::new(2, 1);
    p.offer(7, "ab");
    p.begin(7, 0, 1);
    p.end();
    assert_eq!(p.withdraw(7), ["1> withdraw 7: 1", "0> pushed 7: 1"]);
    assert_eq!(p.join(1, 2, B), ["2> attach", "2> offer 7 of 2", "2> withdraw 7: 1"]);
}

#[test]
fn without_consumers_nothing_is_held() {
    let config = kvxfer_core::session::ProducerConfig {
        layout: crate::rig::layout(1, 1),
        consumers: 0,
        hold: ms(1000),
        memory: kvxfer_core::wire::message::Memory::Host,
    };
    let producer = kvxfer_core::session::Producer::new(config).unwrap();
    let mut p = Prefill { producer, now: ms(0) };
    assert_eq!(p.offer(7, "ab"), ["0> pushed 7: 0 1"]);
    assert!(p.producer.is_idle());
}

#[test]
fn grants_are_renewed_while_they_are_held() {
    let mut p = Prefill::new(1, 1);
    p.offer(7, "ab");
    p.granted(1, 7, 0, 1);
    p.granted(1, 7, 1, 2);
    assert_eq!(p.wait(ms(100)), ["1> renew g1 g2"]);
    p.withdraw(7);
    assert_eq!(p.wait(ms(100)), [""; 0]);
}

#[test]
fn questions_and_segments_are_answered() {
    let mut p = Prefill::new(1, 1);
    assert_eq!(p.hear(1, Message::Ask { ask: 3 }), ["1> told"]);
    let retire = Message::Retire { segment: SegmentId(2), generation: 0 };
    assert_eq!(p.hear(1, retire), ["detach s2"]);
}

#[test]
fn the_scheduler_half_is_gone_and_what_was_not_computed_is_taken_back() {
    let mut p = Prefill::new(1, 1);
    p.offer(7, "ab");
    p.begin(7, 0, 1);
    p.end();
    assert_eq!(p.down(0), ["1> withdraw 7: 1", "0> pushed 7: 1"]);
    assert_eq!(p.granted(1, 7, 0, 1), ["post 0 on 1: g1 layer 0"]);
}

#[test]
fn blocks_that_are_written_to_again_are_read_no_more() {
    let mut p = Prefill::new(1, 2);
    p.offer(7, "abcd");
    p.granted(1, 7, 0, 1);
    p.granted(1, 7, 1, 2);
    p.begin(7, 0, 3);
    assert_eq!(p.layer(0), ["post 0 on 1: g1 layer 0", "post 1 on 1: g2 layer 0"]);
    p.end();
    p.posted(0);
    p.posted(1);
    // Of chunk 0 both layers are posted, of chunk 1 too; one post of the latter was not begun.
    p.producer.void();
    assert_eq!(p.out(), ["1> withdraw 7: 2", "0> pushed 7: 2"]);
    assert_eq!(p.posted(2), ["1> commit g1", "0> pushed 7: 0"]);
    assert_eq!(p.failed(3), ["1> abort g2", "0> pushed 7: 1"]);
    // What comes later is not concerned.
    p.begin(7, 3, 1);
    p.end();
    assert_eq!(p.granted(1, 7, 3, 4), ["post 4 on 1: g4 layer 0", "post 5 on 1: g4 layer 1"]);
}

#[test]
fn a_chunk_of_which_a_layer_is_missing_is_given_up_with_its_blocks() {
    let mut p = Prefill::new(1, 2);
    p.offer(7, "a");
    p.granted(1, 7, 0, 1);
    p.begin(7, 0, 1);
    p.layer(0);
    p.producer.void();
    assert_eq!(p.out(), [""; 0], "a write is under way");
    assert_eq!(p.end(), [""; 0]);
    assert_eq!(p.posted(0), ["1> abort g1", "0> pushed 7: 0"]);
    // Named before it was offered: just as well.
    p.begin(9, 0, 1);
    p.producer.void();
    p.end();
    assert_eq!(p.offer(9, "b"), ["1> offer 9 of 1", "1> withdraw 9: 0", "0> pushed 9: 0"]);
}
