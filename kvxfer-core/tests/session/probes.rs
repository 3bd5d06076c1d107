//! Nothing that is committed is believed before the writer's probe has been read back.

use kvxfer_core::wire::Message;
use kvxfer_core::{ErrorKind, GrantId, LinkId, SegmentId};

use crate::rig::{A, B, Decode};

#[test]
fn a_commit_before_the_probe_is_against_the_protocol() {
    let mut d = Decode::with(1, 4);
    d.offer(1, 7, "a");
    let commit = Message::Commit { grant: GrantId(1), sums: vec![7] };
    let error = d.consumer.received(d.now, LinkId(1), commit).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Protocol);
    assert!(error.to_string().contains("before its segments were probed"), "{error}");
}

#[test]
fn a_commit_waits_until_the_probe_has_passed() {
    let mut d = Decode::with(1, 4);
    d.offer(1, 7, "ab");
    d.claim(5, "ab");
    assert_eq!(d.probed(1, 0, 1), ["verify s0"]);
    assert_eq!(d.commit_now(1, 1), [""; 0]);
    assert_eq!(d.commit_now(1, 2), [""; 0]);
    assert_eq!(
        d.verified(1, 0, 1, Ok(())),
        ["1> indexed g1", "1> indexed g2", "9> claimed 5: 2 of 2, Done"]
    );
    assert_eq!(
        d.verified(1, 0, 1, Err(ErrorKind::NoPath)),
        [""; 0],
        "only the first answer counts"
    );
}

#[test]
fn writes_that_do_not_arrive_end_the_link_and_free_nothing() {
    let mut d = Decode::with(1, 4);
    d.offer(1, 7, "a");
    d.probed(1, 0, 1);
    d.commit_now(1, 1);
    assert_eq!(d.verified(1, 0, 1, Err(ErrorKind::NoPath)), ["close 1"]);
    assert_eq!((d.pool().quarantined, d.pool().committed), (1, 0));
}

#[test]
fn a_commit_that_waited_for_the_probe_may_come_too_late() {
    let mut d = Decode::with(1, 4);
    d.offer(1, 7, "a");
    d.probed(1, 0, 1);
    d.commit_now(1, 1);
    assert_eq!(d.wait(std::time::Duration::from_millis(150)), ["1> revoke g1"]);
    assert_eq!(d.verified(1, 0, 1, Ok(()))[0], "1> expired g1");
    assert_eq!(d.pool().committed, 0);
}

#[test]
fn each_export_is_probed_anew() {
    let mut d = Decode::with(1, 4);
    d.offer(1, 7, "a");
    assert_eq!(d.commit(1, 1), ["1> indexed g1"]);
    d.down(1);
    d.join(2, A);
    assert_eq!(d.offer(2, 8, "b"), ["2> segment s0.0", "2> granted 8: 0=g2"]);
    assert_eq!(d.probed(2, 0, 1), [""; 0], "the probe of an earlier export says nothing");
    assert_eq!(d.probed(2, 0, 2), ["verify s0"]);
    assert_eq!(d.probed(2, 0, 2), [""; 0]);
    // What another peer says of it is not heard.
    d.join(3, B);
    assert_eq!(d.probed(3, 0, 2), [""; 0]);
    d.consumer.verified(d.now, LinkId(3), SegmentId(0), 2, Ok(()));
    assert_eq!(d.commit_now(2, 2), [""; 0]);
}
