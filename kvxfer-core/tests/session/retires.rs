//! Writers that are asked to let go of a segment, and do not, or late.

use kvxfer_core::wire::Message;
use kvxfer_core::{GrantId, SegmentId};

use crate::rig::{A, B, Decode, ms};

fn retired(generation: u32) -> Message {
    Message::Retired { segment: SegmentId(0), generation }
}

/// One segment, which A has and does not need, and B waits for.
fn asked() -> Decode {
    let mut d = Decode::with(1, 2);
    d.join(2, B);
    d.offer(1, 7, "a");
    d.hear(1, Message::Abort { grant: GrantId(1) });
    assert_eq!(d.offer(2, 8, "b"), ["1> retire s0", "2> busy 8: 0 ahead"]);
    d
}

#[test]
fn who_does_not_let_go_in_time_is_cut_off_and_the_next_writer_waits_for_fresh_memory() {
    let mut d = asked();
    assert_eq!(d.wait(ms(499)), [""; 0]);
    assert_eq!(d.wait(ms(1)), ["close 1"]);
    assert_eq!(d.down(1), [""; 0]);
    assert_eq!(d.wait(ms(499)), [""; 0], "the end of a link fences nothing");
    assert_eq!(d.wait(ms(1)), ["replace s0, 0 live"]);
    assert_eq!(d.replaced(0), ["2> segment s0.1", "2> granted 8: 0=g2"]);
    // What the first one says at last is of memory that is nobody's.
    d.join(3, A);
    assert_eq!(d.hear(3, retired(0)), [""; 0]);
    assert_eq!(d.commit(2, 2), ["2> indexed g2"]);
}

#[test]
fn who_was_cut_off_for_it_and_dies_leaves_the_segment_at_once() {
    let mut d = asked();
    d.wait(ms(500));
    d.down(1);
    assert_eq!(d.dies(A), ["2> segment s0.0", "2> granted 8: 0=g2"]);
    assert_eq!(d.wait(ms(90)), [""; 0]);
}

#[test]
fn who_lets_go_in_time_stays() {
    let mut d = asked();
    d.wait(ms(499));
    assert_eq!(d.hear(1, retired(0)), ["2> segment s0.0", "2> granted 8: 0=g2"]);
    assert_eq!(d.commit(2, 2), ["2> indexed g2"]);
    assert_eq!(d.wait(ms(5000)), [""; 0]);
}

#[test]
fn who_was_granted_pages_there_meanwhile_owes_nothing_any_more() {
    let mut d = asked();
    assert_eq!(d.offer(1, 9, "c"), ["1> segment s0.0", "1> granted 9: 0=g2"]);
    assert_eq!(d.commit(1, 2), ["1> indexed g2"]);
    assert_eq!(d.wait(ms(5000)), [""; 0]);
}

#[test]
fn the_time_counts_from_the_last_question() {
    let mut d = asked();
    d.wait(ms(400));
    d.hear(1, retired(0));
    // Back and forth: each is asked for itself.
    assert_eq!(d.offer(1, 9, "c"), ["1> busy 9: 0 ahead"]);
    assert_eq!(d.hear(2, Message::Abort { grant: GrantId(2) }), ["2> retire s0"]);
    assert_eq!(d.wait(ms(499)), [""; 0]);
    assert_eq!(d.wait(ms(1)), ["close 2"]);
}

#[test]
fn the_end_of_the_link_ends_the_question_and_a_new_link_has_its_own_time() {
    let mut d = asked();
    d.wait(ms(300));
    d.down(1);
    assert_eq!(d.join(3, A), ["3> retire s0"]);
    assert_eq!(d.wait(ms(499)), [""; 0]);
    assert_eq!(d.hear(3, retired(0)), ["2> segment s0.0", "2> granted 8: 0=g2"]);
}

#[test]
fn an_answer_about_older_memory_is_none() {
    let mut d = asked();
    d.down(1);
    d.wait(ms(500));
    d.replaced(0);
    // The second one, in the fresh memory, is asked in turn.
    d.join(3, A);
    d.offer(3, 9, "c");
    assert_eq!(d.hear(2, Message::Abort { grant: GrantId(2) }), ["2> retire s0"]);
    assert_eq!(d.hear(2, retired(0)), [""; 0]);
    assert_eq!(d.wait(ms(500)), ["close 2"]);
}

#[test]
fn who_comes_back_and_still_clings_to_it_does_not_do_so_for_ever() {
    let mut d = asked();
    d.wait(ms(500));
    d.down(1);
    assert_eq!(d.join(3, A), ["3> retire s0"]);
    assert_eq!(d.wait(ms(500))[..2], ["close 3", "replace s0, 0 live"]);
    assert_eq!(d.replaced(0), ["2> segment s0.1", "2> granted 8: 0=g2"]);
}
