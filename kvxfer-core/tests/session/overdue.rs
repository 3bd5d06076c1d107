//! Who is expected and does not come: what an offer that waits for room may take.

use kvxfer_core::GrantId;
use kvxfer_core::wire::Message;

use crate::rig::{Decode, ms};

/// A pool of two pages with "ab" in it, which nobody has claimed.
fn full() -> Decode {
    let mut d = Decode::with(1, 2);
    d.offer(1, 7, "ab");
    d.commit(1, 1);
    d.commit(1, 2);
    d
}

#[test]
fn what_nobody_came_for_makes_room_for_an_offer_that_waits_the_end_first() {
    let mut d = full();
    assert_eq!(d.offer(1, 8, "c"), ["1> busy 8: 0 ahead"]);
    d.wait(ms(1_000));
    assert_eq!(d.consumer.next_timeout().map(|at| at - d.now), Some(ms(9_000)), "it wakes up");
    assert_eq!(d.wait(ms(8_999)), [""; 0]);
    assert_eq!(d.wait(ms(1)), ["1> granted 8: 0=g3"]);
    assert_eq!((d.pool().committed, d.consumer.stats().overdue), (1, 1));
    // Whoever comes now finds the beginning.
    let lines = d.claim(5, "ab");
    assert_eq!(lines.last().unwrap(), "9> claimed 5: 1 of 1, Asking");
}

#[test]
fn what_nobody_came_for_stays_while_nobody_waits_for_room() {
    let mut d = full();
    d.wait(ms(59_000));
    assert_eq!(d.pool().committed, 2);
    assert_eq!(d.claim(5, "ab"), ["9> claimed 5: 2 of 2, Done"]);
    // Claimed it stays, whoever waits.
    d.offer(1, 8, "c");
    d.wait(ms(200_000));
    assert_eq!(d.pool().committed, 2);
}

#[test]
fn who_was_told_that_it_is_here_can_count_on_it_as_long_again() {
    let mut d = full();
    d.wait(ms(8_000));
    assert_eq!(d.offer(1, 8, "ab"), ["1> have 8: 0 1"]);
    assert_eq!(d.offer(1, 9, "c"), ["1> busy 9: 0 ahead"]);
    assert_eq!(d.wait(ms(9_999)), [""; 0]);
    assert_eq!(d.wait(ms(1)), ["1> granted 9: 0=g3"]);
}

#[test]
fn a_prompt_that_is_not_here_whole_is_not_cut_for_its_own_rest_nor_for_others() {
    let mut d = Decode::with(1, 2);
    d.offer(1, 7, "abc");
    d.commit(1, 1);
    d.commit(1, 2);
    assert_eq!(d.offer(1, 8, "d"), ["1> busy 8: 1 ahead"]);
    assert_eq!(d.wait(ms(50_000)), [""; 0]);
    // It streams as soon as somebody comes for it.
    assert_eq!(d.claim(5, "abc"), ["9> claimed 5: 2 of 3, Stalled"]);
    d.load(1, 5, 3);
    d.copied(1, 0);
    assert_eq!(d.copied(1, 1)[0], "1> granted 7: 2=g3");
    // Or it is cut when its producer gives up.
    let mut d = Decode::with(1, 2);
    d.offer(1, 7, "abc");
    d.commit(1, 1);
    d.commit(1, 2);
    d.offer(1, 8, "d");
    d.wait(ms(50_000));
    let withdraw = Message::Withdraw { offer: kvxfer_core::OfferId(7), chunks: vec![2] };
    assert_eq!(d.hear(1, withdraw), ["1> granted 8: 0=g3"]);
}

#[test]
fn a_request_that_is_aborted_is_expected_no_more() {
    let mut d = Decode::with(1, 1);
    d.offer(1, 7, "a");
    d.claim(5, "a");
    assert_eq!(d.release(5), [""; 0]);
    d.commit(1, 1);
    assert_eq!(d.offer(1, 8, "b"), ["1> granted 8: 0=g2"], "at once");
}

#[test]
fn of_two_that_are_expected_only_the_one_that_is_aborted_is_not() {
    let mut d = Decode::with(1, 1);
    d.offer(1, 7, "a");
    d.offer(1, 8, "a");
    d.claim(5, "a");
    d.release(5);
    d.commit(1, 1);
    assert_eq!(d.offer(1, 9, "b"), ["1> busy 9: 0 ahead"]);
    assert_eq!(d.claim(6, "a"), ["9> claimed 6: 1 of 1, Done"]);
    d.load(1, 6, 1);
    assert_eq!(d.copied(1, 0), ["loaded l1", "9> ended 6", "1> granted 9: 0=g2"]);
}

#[test]
fn one_claim_too_many_that_is_aborted_takes_nobodys_place() {
    let mut d = Decode::with(1, 1);
    d.offer(1, 7, "a");
    d.claim(5, "a");
    d.claim(6, "a");
    d.release(5);
    d.release(6);
    d.offer(1, 8, "a");
    d.commit(1, 1);
    assert_eq!(d.offer(1, 9, "b"), ["1> busy 9: 0 ahead"], "the request of offer 8 will come");
}

#[test]
fn a_request_that_is_tried_again_after_its_chunk_was_lost_is_expected() {
    let mut d = Decode::with(1, 1);
    d.offer(1, 7, "a");
    d.claim(5, "a");
    d.release(5);
    d.hear(1, Message::Abort { grant: GrantId(1) });
    d.offer(1, 8, "a");
    d.commit(1, 2);
    assert_eq!(d.offer(1, 9, "b"), ["1> busy 9: 0 ahead"]);
}
