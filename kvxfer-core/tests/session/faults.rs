//! Writers that are late, gone, dead or back.

use kvxfer_core::wire::Message;
use kvxfer_core::{GrantId, SegmentId};

use crate::rig::{A, B, Decode, ms};

#[test]
fn a_grant_that_ran_out_is_fenced_and_given_again() {
    let mut d = Decode::with(1, 4);
    d.offer(1, 7, "a");
    assert_eq!(d.wait(ms(100)), ["1> revoke g1"]);
    assert_eq!(d.pool().quarantined, 1);
    assert_eq!(d.fenced(1, 1), ["1> granted 7: 0=g2"]);
    assert_eq!((d.pool().quarantined, d.pool().granted), (0, 1));
}

#[test]
fn renewals_move_the_deadline_up_to_the_cap() {
    let mut d = Decode::with(1, 4);
    d.offer(1, 7, "a");
    for _ in 0..3 {
        assert_eq!(d.wait(ms(80)), [""; 0]);
        d.hear(1, Message::Renew { grants: vec![GrantId(1)] });
    }
    assert_eq!(d.wait(ms(10)), ["1> revoke g1"]);
}

#[test]
fn a_late_commit_fences_and_is_not_indexed() {
    let mut d = Decode::with(1, 4);
    d.offer(1, 7, "a");
    d.wait(ms(100));
    assert_eq!(d.commit(1, 1), ["1> expired g1"]);
    assert_eq!((d.pool().free, d.consumer.stats().late_commits), (4, 1));
    assert_eq!(d.claim(5, "a"), ["9> claimed 5: 0 of 0, Lost"]);
}

#[test]
fn a_revoked_writer_hears_of_anothers_copy_when_it_has_drained() {
    let mut d = Decode::with(2, 4);
    d.join(2, B);
    d.offer(1, 7, "a");
    d.offer(2, 8, "a");
    assert_eq!(d.wait(ms(100)), ["1> revoke g1", "2> segment s1.0", "2> granted 8: 0=g2"]);
    assert_eq!(d.commit(2, 2), ["2> indexed g2"]);
    assert_eq!(d.fenced(1, 1), ["1> have 7: 0"]);
}

#[test]
fn who_does_not_fence_in_time_is_cut_off_and_then_its_memory_is_replaced() {
    let mut d = Decode::with(1, 4);
    d.offer(1, 7, "ab");
    d.commit(1, 1);
    d.wait(ms(100));
    assert_eq!(d.wait(ms(500)), ["close 1"]);
    assert_eq!(d.down(1), [""; 0]);
    assert_eq!(d.pool().quarantined, 1, "the end of a link fences nothing");
    assert_eq!(d.wait(ms(500)), ["replace s0, 1 live"]);
    assert_eq!(d.pool().quarantined, 1);
    d.replaced(0);
    assert_eq!((d.pool().quarantined, d.pool().committed), (0, 1), "what was committed survives");
}

#[test]
fn the_death_of_the_process_fences_at_once() {
    let mut d = Decode::with(1, 4);
    d.offer(1, 7, "ab");
    d.commit(1, 1);
    d.down(1);
    assert_eq!(d.pool().quarantined, 1);
    d.dies(A);
    assert_eq!((d.pool().quarantined, d.pool().committed), (0, 1));
    // Its segment is free for others when its last chunk has gone.
    d.wait(ms(61_000));
    d.join(2, B);
    assert_eq!(d.offer(2, 8, "cdef")[0], "2> segment s0.0");
}

#[test]
fn a_death_that_is_seen_before_the_end_of_the_link() {
    let mut d = Decode::with(1, 4);
    d.offer(1, 7, "ab");
    d.claim(5, "a");
    assert_eq!(d.dies(A), ["close 1", "9> claimed 5: 0 of 0, Lost"]);
    assert_eq!(d.pool().free, 4);
    assert_eq!(d.down(1), [""; 0]);
}

#[test]
fn a_fence_of_one_peer_frees_no_other_peers_grant() {
    let mut d = Decode::with(2, 4);
    d.join(2, B);
    d.offer(1, 7, "a");
    d.offer(2, 8, "b");
    d.down(1);
    d.down(2);
    d.dies(A);
    assert_eq!(d.pool().quarantined, 1);
    assert_eq!(d.wait(ms(500)), ["replace s1, 0 live"]);
    d.replaced(1);
    assert_eq!(d.pool().free, 8);
}

#[test]
fn a_producer_that_is_back_is_asked_for_the_fences_it_owes() {
    let mut d = Decode::with(1, 4);
    d.offer(1, 7, "ab");
    d.down(1);
    assert_eq!(d.join(2, A), ["2> revoke g1", "2> revoke g2"]);
    d.fenced(2, 1);
    d.hear(2, Message::Abort { grant: GrantId(2) });
    assert_eq!(d.pool().free, 4);
    assert_eq!(d.wait(ms(5000)), [""; 0]);
}

#[test]
fn a_new_link_can_come_before_the_end_of_the_old_one() {
    let mut d = Decode::with(1, 4);
    d.offer(1, 7, "a");
    d.join(2, A);
    assert_eq!(d.down(1), ["2> revoke g1"]);
    d.fenced(2, 1);
    assert_eq!(d.pool().free, 4);
    // And what an old link still says is nobody's.
    assert_eq!(d.offer(1, 9, "b"), [""; 0]);
}

#[test]
fn who_comes_back_and_never_fences_does_not_hold_pages_for_ever() {
    let mut d = Decode::with(1, 4);
    d.offer(1, 7, "a");
    d.down(1);
    d.join(2, A);
    assert_eq!(d.wait(ms(500)), ["close 2"]);
    d.down(2);
    d.join(3, A);
    assert_eq!(d.wait(ms(500)), ["close 3", "replace s0, 0 live"]);
    // Until the memory is new, it is not let in.
    assert_eq!(d.join(4, A), ["close 4"]);
    d.replaced(0);
    assert_eq!(d.pool().free, 4);
    assert_eq!(d.join(5, A), [""; 0]);
    assert_eq!(d.offer(5, 8, "b"), ["5> segment s0.1", "5> granted 8: 0=g2"]);
}

#[test]
fn a_segment_whose_memory_is_being_replaced_goes_to_nobody() {
    let mut d = Decode::with(1, 4);
    d.offer(1, 7, "a");
    d.down(1);
    assert_eq!(d.wait(ms(500)), ["replace s0, 0 live"]);
    // Its death is seen meanwhile, and another writer waits.
    d.dies(A);
    d.join(2, B);
    assert_eq!(d.offer(2, 8, "b"), ["2> busy 8: 0 ahead"]);
    assert_eq!(d.replaced(0), ["2> segment s0.1", "2> granted 8: 0=g2"]);
    assert_eq!(d.commit(2, 2), ["2> indexed g2"]);
}

#[test]
fn the_wrong_peer_cannot_end_a_grant() {
    let mut d = Decode::with(2, 4);
    d.join(2, B);
    d.offer(1, 7, "a");
    let now = d.now;
    let foreign = Message::FenceAck { grant: GrantId(1) };
    assert!(d.consumer.received(now, kvxfer_core::LinkId(2), foreign).is_err());
    assert_eq!(d.pool().granted, 1);
    let retired = Message::Retired { segment: SegmentId(0), generation: 0 };
    assert_eq!(d.hear(2, retired), [""; 0]);
}
