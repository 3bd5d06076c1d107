//! The observer: one engine's scheduler half over all its ranks.

use std::time::Duration;

use kvxfer_core::session::Observer;
use kvxfer_core::wire::Message;
use kvxfer_core::wire::message::{ClaimStatus, Next};
use kvxfer_core::{ClaimId, Incarnation, LinkId, OfferId};

use crate::rig::{chunks, tell};

fn two_ranks() -> Observer {
    let mut observer = Observer::new(Incarnation([3; 16]), 2);
    observer.connected(0, LinkId(1));
    observer.connected(1, LinkId(2));
    observer
}

fn out(observer: &mut Observer) -> Vec<String> {
    let mut lines = Vec::new();
    while let Some(kvxfer_core::session::ObserverAction::Send { link, message }) =
        observer.poll_action()
    {
        lines.push(tell(link, &message));
    }
    lines
}

fn claimed(claim: ClaimId, ready: u32, coming: u32, next: Next) -> Message {
    Message::Claimed { claim, status: ClaimStatus { ready, coming, next } }
}

fn pushed(offer: OfferId, chunks: &[u32]) -> Message {
    Message::Pushed { offer, chunks: chunks.to_vec() }
}

#[test]
fn a_match_is_what_all_ranks_hold() {
    let mut o = two_ranks();
    let claim = o.claim("r", &chunks("abc"), Duration::from_secs(1));
    assert_eq!(out(&mut o), ["1> claim of 3", "2> claim of 3"]);
    assert!(o.received(LinkId(1), claimed(claim, 3, 3, Next::Done)).unwrap());
    assert_eq!(o.status(claim), None, "the other rank has not answered");
    o.received(LinkId(2), claimed(claim, 1, 2, Next::Writing)).unwrap();
    let status = ClaimStatus { ready: 1, coming: 2, next: Next::Writing };
    assert_eq!(o.status(claim), Some(status));
    o.disconnected(LinkId(2));
    assert_eq!(o.status(claim).map(|s| (s.ready, s.next)), Some((0, Next::Lost)));
    o.release(claim, 0, 0);
    assert_eq!(out(&mut o), ["1> release, keep 0..0"]);
    assert!(o.is_idle());
}

#[test]
fn a_chunk_is_pushed_when_no_rank_reads_it_and_told_once() {
    let mut o = two_ranks();
    let offer = o.offer("r", &chunks("ab"));
    assert!(!o.received(LinkId(1), pushed(offer, &[0, 1])).unwrap());
    assert!(
        !o.received(LinkId(1), pushed(offer, &[0, 1])).unwrap(),
        "repeated, not another rank's"
    );
    assert!(o.pushed().is_empty());
    assert!(o.received(LinkId(2), pushed(offer, &[1])).unwrap());
    assert_eq!(o.pushed(), [(offer, vec![1])]);
    assert!(o.received(LinkId(2), pushed(offer, &[0])).unwrap());
    assert!(!o.received(LinkId(2), pushed(offer, &[0])).unwrap());
    assert_eq!(o.pushed(), [(offer, vec![0])]);
    assert!(o.is_idle());
}

#[test]
fn a_rank_that_is_gone_reads_nothing() {
    let mut o = two_ranks();
    let offer = o.offer("r", &chunks("ab"));
    o.received(LinkId(1), pushed(offer, &[0])).unwrap();
    o.disconnected(LinkId(2));
    assert_eq!(o.pushed(), [(offer, vec![0])]);
    o.received(LinkId(1), pushed(offer, &[1])).unwrap();
    assert_eq!(o.pushed(), [(offer, vec![1])]);
}

#[test]
fn without_ranks_nothing_is_read() {
    let mut o = Observer::new(Incarnation([3; 16]), 1);
    let offer = o.offer("r", &chunks("ab"));
    assert_eq!(o.pushed(), [(offer, vec![0, 1])]);
    o.offer("r", &[]);
    assert!(o.is_idle() && o.pushed().is_empty());
}

#[test]
fn a_chunk_that_was_not_offered_is_a_protocol_error() {
    let mut o = two_ranks();
    let offer = o.offer("r", &chunks("ab"));
    assert!(o.received(LinkId(1), pushed(offer, &[2])).is_err());
}
