//! Each rule of the collector.

use super::*;

pub(super) fn at(seconds: u64) -> Time {
    Duration::from_secs(seconds)
}

/// Ten seconds of TTL, four until a claim is overdue, the watermarks at 80 and 60 of 100 pages.
pub(super) fn config(after_retrieve: AfterRetrieve) -> GcConfig {
    GcConfig {
        after_retrieve,
        high_watermark: 0.8,
        low_watermark: 0.6,
        unclaimed_ttl: at(10),
        overdue_after: at(4),
        batch: 100,
        ..GcConfig::default()
    }
}

fn collector(after_retrieve: AfterRetrieve) -> Collector {
    Collector::new(config(after_retrieve)).unwrap()
}

/// A tick in a pool of 100 pages, of which as many are in use.
fn tick(collector: &mut Collector, now: u64, used: u32, wanted: u32) -> Vec<u64> {
    let mut out = Vec::new();
    collector.tick(at(now), used, 100, wanted, |_| false, &mut out);
    out.into_iter().map(|grant| grant.0).collect()
}

/// Chunks 1 to n of one prompt, of 10 pages each, committed one second after the other from 1 on.
fn prompt(collector: &mut Collector, chunks: u64) {
    for chunk in 1..=chunks {
        let parent = (chunk > 1).then(|| GrantId(chunk - 1));
        collector.insert(at(chunk), GrantId(chunk), parent, 10);
    }
}

fn retrieve(collector: &mut Collector, now: u64, grants: impl Iterator<Item = u64>) {
    for grant in grants.map(GrantId) {
        assert!(collector.pin(grant));
        collector.unpin(at(now), grant, true);
    }
}

const NONE: [u64; 0] = [];

#[test]
fn senseless_configurations_are_refused() {
    let good = GcConfig::default();
    assert!(Collector::new(good).is_ok());
    for bad in [
        GcConfig { low_watermark: 0.95, ..good },
        GcConfig { low_watermark: 0.0, ..good },
        GcConfig { high_watermark: 1.1, ..good },
        GcConfig { high_watermark: f32::NAN, ..good },
        GcConfig { low_watermark: f32::NAN, ..good },
        GcConfig { batch: 0, ..good },
        GcConfig { unclaimed_ttl: Duration::ZERO, ..good },
    ] {
        assert_eq!(Collector::new(bad).unwrap_err().kind(), ErrorKind::Config, "{bad:?}");
    }
}

#[test]
fn retrieved_chunks_are_dropped_from_the_end() {
    let mut gc = collector(AfterRetrieve::Drop);
    prompt(&mut gc, 3);
    retrieve(&mut gc, 5, 1..=3);
    assert_eq!(gc.next_deadline(), Some(Time::ZERO));
    assert_eq!(tick(&mut gc, 5, 30, 0), [3, 2, 1]);
    assert_eq!((gc.is_empty(), gc.stats().retrieved, gc.next_deadline()), (true, 3, None));
}

#[test]
fn a_retrieved_chunk_waits_for_the_one_after_it() {
    let mut gc = collector(AfterRetrieve::Drop);
    prompt(&mut gc, 3);
    retrieve(&mut gc, 5, 1..=2);
    assert_eq!(tick(&mut gc, 5, 30, 0), NONE);
    assert_eq!(gc.next_deadline(), Some(at(13)));
    assert_eq!(tick(&mut gc, 13, 30, 0), [3, 2, 1]);
    assert_eq!((gc.stats().unclaimed, gc.stats().retrieved), (1, 2));
}

#[test]
fn pins_count_and_protect() {
    let mut gc = collector(AfterRetrieve::Drop);
    prompt(&mut gc, 1);
    assert!(gc.pin(GrantId(1)) && gc.pin(GrantId(1)) && !gc.pin(GrantId(2)));
    assert_eq!(gc.next_deadline(), None, "time changes nothing for a pinned chunk");
    gc.unpin(at(2), GrantId(1), true);
    assert!(gc.is_pinned(GrantId(1)));
    assert_eq!(tick(&mut gc, 99, 100, 100), NONE);
    gc.unpin(at(99), GrantId(1), false);
    assert!(!gc.is_pinned(GrantId(1)));
    assert_eq!(tick(&mut gc, 99, 10, 0), [1]);
}

#[test]
fn unclaimed_chunks_run_out_and_a_claim_let_go_starts_anew() {
    let mut gc = collector(AfterRetrieve::Drop);
    gc.insert(at(0), GrantId(1), None, 10);
    gc.insert(at(0), GrantId(2), None, 10);
    gc.pin(GrantId(2));
    assert_eq!(gc.next_deadline(), Some(at(10)));
    assert_eq!(tick(&mut gc, 9, 20, 0), NONE);
    assert_eq!(tick(&mut gc, 10, 20, 0), [1]);
    assert_eq!(gc.next_deadline(), None);
    gc.unpin(at(15), GrantId(2), false);
    assert_eq!(tick(&mut gc, 24, 10, 0), NONE);
    assert_eq!(tick(&mut gc, 25, 10, 0), [2]);
    assert_eq!(gc.stats().unclaimed, 2);
}

#[test]
fn an_expected_claim_keeps_a_chunk_until_it_comes_or_runs_out() {
    let mut gc = collector(AfterRetrieve::Drop);
    gc.insert(at(0), GrantId(1), None, 10);
    gc.expect(at(20), GrantId(1));
    gc.expect(at(10), GrantId(1));
    assert_eq!(tick(&mut gc, 10, 100, 0), NONE);
    assert_eq!(gc.next_deadline(), Some(at(20)));
    retrieve(&mut gc, 11, 1..=1);
    // The pin took the one until 20; the other is still expected, and from 24 on overdue.
    assert_eq!(gc.next_deadline(), Some(at(24)));
    assert_eq!(tick(&mut gc, 29, 100, 0), NONE);
    assert_eq!(gc.next_deadline(), Some(at(30)));
    assert_eq!(tick(&mut gc, 30, 10, 0), [1]);
    assert_eq!(gc.stats().retrieved, 1);
}

#[test]
fn an_overdue_claim_gives_way_to_a_grant_without_room_oldest_first_and_to_nothing_else() {
    let mut gc = collector(AfterRetrieve::Drop);
    for grant in 1..=3 {
        gc.insert(at(grant), GrantId(grant), None, 10);
        gc.expect(at(grant), GrantId(grant));
    }
    gc.insert(at(4), GrantId(4), None, 10);
    assert_eq!(gc.next_deadline(), Some(at(5)), "the first one is overdue then");
    assert_eq!(tick(&mut gc, 4, 100, 40), [4], "nobody expects it");
    assert_eq!(tick(&mut gc, 4, 90, 100), NONE);
    // Expected once more: it is overdue later.
    gc.expect(at(4), GrantId(1));
    // Above the watermark, and somebody wants room, but there is some.
    assert_eq!(tick(&mut gc, 7, 90, 10), NONE);
    assert_eq!(gc.next_deadline(), Some(at(8)), "not at once, though it is above the watermark");
    assert_eq!(tick(&mut gc, 7, 90, 20), [2]);
    assert_eq!(tick(&mut gc, 7, 80, 100), [3]);
    assert_eq!(tick(&mut gc, 8, 70, 100), [1]);
    assert_eq!((gc.stats().overdue, gc.stats().pressure), (3, 1));
}

#[test]
fn what_goes_on_is_not_overdue() {
    let mut gc = collector(AfterRetrieve::Drop);
    for grant in 1..=3 {
        gc.insert(at(0), GrantId(grant), (grant == 2).then_some(GrantId(1)), 10);
        gc.expect(at(0), GrantId(grant));
    }
    let mut out = Vec::new();
    gc.tick(at(9), 100, 100, 100, |grant| grant == GrantId(2), &mut out);
    assert_eq!(out, [GrantId(3)], "nor is what it follows");
    assert_eq!(tick(&mut gc, 9, 90, 100), [2, 1]);
}

#[test]
fn kept_chunks_have_no_ttl_and_go_under_pressure_least_recently_used_first() {
    let mut gc = collector(AfterRetrieve::Keep);
    for grant in 1..=9 {
        gc.insert(at(0), GrantId(grant), None, 10);
    }
    retrieve(&mut gc, 4, (1..=9).rev());
    retrieve(&mut gc, 5, 1..=2);
    assert_eq!(gc.next_deadline(), None);
    assert_eq!(tick(&mut gc, 1000, 80, 0), NONE);
    // Above 80, so down to 60.
    assert_eq!(tick(&mut gc, 1000, 81, 0), [3, 4, 5]);
    assert_eq!(tick(&mut gc, 1000, 60, 50), [6]);
    assert_eq!(tick(&mut gc, 1000, 50, 101), NONE);
    assert_eq!(tick(&mut gc, 1000, 50, 100), [7, 8, 9, 1, 2]);
    assert_eq!(gc.stats().pressure, 9);
}

#[test]
fn pressure_takes_leaves_and_leaves_what_is_pinned() {
    let mut gc = collector(AfterRetrieve::Keep);
    prompt(&mut gc, 4);
    gc.insert(at(9), GrantId(5), Some(GrantId(2)), 10);
    gc.pin(GrantId(5));
    assert_eq!(tick(&mut gc, 9, 100, 0), [4, 3]);
    assert_eq!(tick(&mut gc, 9, 80, 0), NONE);
    gc.unpin(at(10), GrantId(5), true);
    // Still on the way from above 80 to 60.
    assert_eq!(gc.next_deadline(), Some(Time::ZERO));
    assert_eq!(tick(&mut gc, 10, 80, 0), [5, 2]);
    assert_eq!(tick(&mut gc, 10, 60, 0), NONE);
}

#[test]
fn a_batch_bounds_a_tick_and_the_rest_is_due_at_once() {
    let config = GcConfig { batch: 2, ..config(AfterRetrieve::Keep) };
    let mut gc = Collector::new(config).unwrap();
    prompt(&mut gc, 5);
    retrieve(&mut gc, 5, 1..=5);
    assert_eq!(tick(&mut gc, 5, 90, 0), [5, 4]);
    assert_eq!(gc.next_deadline(), Some(Time::ZERO));
    assert_eq!(tick(&mut gc, 5, 70, 0), [3]);
    assert_eq!(gc.next_deadline(), None);
    assert_eq!(tick(&mut gc, 5, 70, 0), NONE);
}

#[test]
fn a_retired_chunk_goes_once_unpinned_whoever_follows_or_expects_it() {
    let mut gc = collector(AfterRetrieve::Keep);
    prompt(&mut gc, 2);
    gc.pin(GrantId(1));
    gc.expect(at(89), GrantId(1));
    gc.retire(GrantId(1));
    assert_eq!(tick(&mut gc, 3, 20, 0), NONE);
    gc.unpin(at(3), GrantId(1), false);
    assert_eq!(tick(&mut gc, 3, 20, 0), [1]);
    assert_eq!(gc.stats().explicit, 1);
    // Its child is a root now.
    assert_eq!(tick(&mut gc, 12, 10, 0), [2]);
}

#[test]
fn when_disabled_only_retiring_gives_up() {
    let config = GcConfig { enabled: false, ..config(AfterRetrieve::Drop) };
    let mut gc = Collector::new(config).unwrap();
    prompt(&mut gc, 3);
    retrieve(&mut gc, 3, 1..=1);
    gc.expect(at(1), GrantId(2));
    assert_eq!(gc.next_deadline(), None);
    assert_eq!(tick(&mut gc, 1000, 100, 100), NONE);
    gc.retire(GrantId(2));
    assert_eq!(tick(&mut gc, 1000, 100, 100), [2]);
    assert_eq!(gc.len(), 2);
}

#[test]
fn what_someone_else_removed_is_forgotten() {
    let mut gc = collector(AfterRetrieve::Drop);
    prompt(&mut gc, 2);
    retrieve(&mut gc, 2, 1..=1);
    gc.forget(GrantId(2));
    gc.forget(GrantId(2));
    assert_eq!(tick(&mut gc, 2, 10, 0), [1]);
    gc.unpin(at(2), GrantId(1), true);
    gc.expect(at(9), GrantId(1));
    gc.retire(GrantId(1));
    assert_eq!((gc.len(), gc.next_deadline()), (0, None));
}
