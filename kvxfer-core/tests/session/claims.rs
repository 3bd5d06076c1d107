//! Claims and loads at the consumer.

use kvxfer_core::{Incarnation, LinkId};

use crate::rig::{A, B, Decode, config, ms};

#[test]
fn a_claim_that_finds_nothing_asks_once_and_waits_for_what_comes() {
    let mut d = Decode::with(1, 4);
    assert_eq!(d.claim(5, "a"), ["1> ask", "9> claimed 5: 0 of 0, Asking"]);
    assert_eq!(d.told(1), ["9> claimed 5: 0 of 0, Missing"]);
    assert_eq!(
        d.offer(1, 7, "a"),
        ["1> segment s0.0", "1> granted 7: 0=g2", "9> claimed 5: 0 of 1, Writing"]
    );
    assert_eq!(d.commit(1, 2), ["1> indexed g2", "9> claimed 5: 1 of 1, Done"]);
}

#[test]
fn silence_answers_a_question_after_a_while_and_a_lost_link_at_once() {
    let mut d = Decode::with(1, 4);
    d.join(2, B);
    assert_eq!(d.claim(5, "a"), ["1> ask", "2> ask", "9> claimed 5: 0 of 0, Asking"]);
    assert_eq!(d.told(1), [""; 0]);
    assert_eq!(d.down(2), ["9> claimed 5: 0 of 0, Missing"]);
    d.claim(6, "b");
    assert_eq!(d.wait(ms(50)), ["9> claimed 6: 0 of 0, Missing"]);
}

#[test]
fn a_producer_that_attaches_later_is_asked_too() {
    let mut d = Decode::new(config(1, 4));
    d.consumer.observer_connected(d.now, LinkId(9), Incarnation([9; 16]));
    assert_eq!(d.claim(5, "a"), ["9> claimed 5: 0 of 0, NoProducer"]);
    assert_eq!(d.join(1, A), ["1> ask", "9> claimed 5: 0 of 0, Asking"]);
    // Another joins while the question is open: it belongs to those who are asked.
    assert_eq!(d.join(2, B), ["2> ask"]);
    assert_eq!(d.told(1), [""; 0]);
    assert_eq!(d.told(2), ["9> claimed 5: 0 of 0, Missing"]);
}

#[test]
fn a_prompt_larger_than_the_pool_flows_through_it() {
    let mut d = Decode::with(1, 2);
    d.offer(1, 7, "abcd");
    d.claim(5, "abcd");
    assert_eq!(d.load(1, 5, 4), [""; 0]);
    assert_eq!(d.commit(1, 1)[0], "copy l1: 0 of g1");
    assert_eq!(d.commit(1, 2)[0], "copy l1: 1 of g2");
    // Chunk 0 has a child here, chunk 1 has none: it goes first.
    assert_eq!(d.copied(1, 0), [""; 0]);
    let lines = d.copied(1, 1);
    assert_eq!(lines[0], "1> granted 7: 2=g3 3=g4");
    d.commit(1, 3);
    d.commit(1, 4);
    d.copied(1, 2);
    assert_eq!(d.copied(1, 3), ["loaded l1", "9> ended 5"]);
    assert_eq!(d.pool().free, 2);
}

#[test]
fn a_chunk_promised_twice_outlives_its_first_load() {
    let mut d = Decode::with(1, 4);
    d.offer(1, 7, "a");
    d.commit(1, 1);
    assert_eq!(d.offer(1, 8, "a"), ["1> have 8: 0"]);
    for (load, claim) in [(1, 5), (2, 6)] {
        assert_eq!(d.claim(claim, "a"), [format!("9> claimed {claim}: 1 of 1, Done")]);
        d.load(load, claim, 1);
        assert_eq!(d.copied(load, 0)[0], format!("loaded l{load}"));
    }
    assert_eq!(d.pool().free, 4);
}

#[test]
fn what_nobody_claims_goes_after_a_while() {
    let mut d = Decode::with(1, 4);
    d.offer(1, 7, "ab");
    d.commit(1, 1);
    d.commit(1, 2);
    d.wait(ms(59_000));
    assert_eq!(d.pool().committed, 2);
    d.wait(ms(2_000));
    assert_eq!(d.pool().free, 4);
}

#[test]
fn a_corrupt_copy_fails_the_load_and_is_matched_no_more() {
    let mut d = Decode::with(1, 4);
    d.offer(1, 7, "a");
    d.commit(1, 1);
    d.claim(5, "a");
    d.load(1, 5, 1);
    assert_eq!(d.corrupt(1, 0), ["failed l1: Corrupt", "9> ended 5"]);
    assert_eq!(d.pool().free, 4);
    assert_eq!(d.claim(6, "a"), ["1> ask", "9> claimed 6: 0 of 0, Asking"]);
    assert_eq!(d.consumer.stats().corrupt, 1);
}

#[test]
fn a_claim_can_be_released_in_every_state() {
    // Nothing is here.
    let mut d = Decode::with(1, 4);
    d.claim(5, "ab");
    assert_eq!(d.release(5), [""; 0]);
    // Pinned.
    d.offer(1, 7, "ab");
    d.commit(1, 2);
    assert_eq!(d.claim(6, "ab"), ["9> claimed 6: 1 of 2, Writing"]);
    d.release(6);
    // A load that waits for its second chunk.
    assert_eq!(d.offer(1, 8, "cd"), ["1> granted 8: 0=g4 1=g5"]);
    d.claim(7, "cd");
    d.load(1, 7, 2);
    assert_eq!(d.release(7), ["failed l1: Closed", "9> ended 7"]);
    // A copy under way: the load ends when it does, and the page stays until then.
    d.commit(1, 4);
    d.claim(8, "c");
    assert_eq!(d.load(2, 8, 1), ["copy l2: 0 of g4"]);
    let before = d.pool().committed;
    assert_eq!(d.release(8), [""; 0]);
    assert_eq!(d.pool().committed, before);
    assert_eq!(d.copied(2, 0), ["failed l2: Closed", "9> ended 8"]);
}

#[test]
fn an_observer_that_is_gone_holds_nothing() {
    let mut d = Decode::with(1, 4);
    d.offer(1, 7, "ab");
    d.commit(1, 1);
    d.claim(5, "ab");
    assert_eq!(d.load(1, 5, 2), ["copy l1: 0 of g1"]);
    assert_eq!(d.down(9), [""; 0], "the copy is still at it");
    assert_eq!(d.copied(1, 0), ["failed l1: Closed"]);
    d.commit(1, 2);
    d.wait(ms(61_000));
    assert_eq!(d.pool().free, 4);
}

#[test]
fn a_load_waits_no_longer_than_its_claim_said() {
    let mut d = Decode::with(1, 4);
    d.claim(5, "a");
    d.told(1);
    d.offer(1, 7, "a");
    d.load(1, 5, 1);
    for _ in 0..4 {
        d.wait(ms(2400));
    }
    assert_eq!(d.consumer.stats().failed_loads, 0);
    assert!(d.wait(ms(400)).contains(&"failed l1: Timeout".into()));
}

#[test]
fn what_was_let_go_cannot_be_loaded() {
    let mut d = Decode::with(1, 4);
    d.offer(1, 7, "ab");
    d.commit(1, 1);
    d.commit(1, 2);
    d.claim(5, "ab");
    let claim = kvxfer_core::ClaimId(5);
    d.hear(9, kvxfer_core::wire::Message::Release { claim, keep_from: 1, keep_to: 2 });
    assert_eq!(d.load(1, 5, 2), ["failed l1: NotFound"]);
    assert_eq!(d.load(2, 99, 1), ["failed l2: NotFound"]);
}
