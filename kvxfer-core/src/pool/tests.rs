//! Each rule of the pool, and the quality of its runs under churn.

use super::*;

const A: Incarnation = Incarnation([1; 16]);
const B: Incarnation = Incarnation([2; 16]);

pub(super) fn pool(segments: u32, pages_per_segment: u32) -> Pool {
    Pool::new(Geometry { segments, pages_per_segment })
}

/// Grants what must fit.
fn grant(pool: &mut Pool, writer: Incarnation, number: u64, pieces: &[(u16, u32)]) -> Vec<Extent> {
    let mut out = Vec::new();
    pool.grant(writer, GrantId(number), pieces, &mut out).unwrap();
    sound(pool);
    out
}

fn extent(segment: u32, page: u32, pages: u16, group: u16) -> Extent {
    Extent { segment: SegmentId(segment), page, pages, group }
}

/// The runs of free pages as a scan finds them.
pub(super) fn scan(pool: &Pool) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (index, _) in
        pool.pages.iter().enumerate().filter(|(_, page)| page.state == PageState::Free)
    {
        let index = index as u32;
        let writer = pool.segments[(index / pool.per_segment) as usize].writer;
        match runs.last_mut() {
            Some(run)
                if run.first + run.pages == index && !index.is_multiple_of(pool.per_segment) =>
            {
                run.pages += 1
            }
            _ => runs.push(Run { writer, pages: 1, first: index }),
        }
    }
    runs.sort_unstable();
    runs
}

/// Checks what the module's documentation states, by looking at every page.
pub(super) fn sound(pool: &Pool) {
    let runs = scan(pool);
    assert_eq!(pool.runs.iter().collect::<Vec<_>>(), runs);
    for run in &runs {
        assert_eq!(pool.runs.tags()[run.first as usize], run.pages);
        assert_eq!(pool.runs.tags()[(run.first + run.pages - 1) as usize], run.pages);
    }
    let mut counts = [0; 5];
    for (index, page) in pool.pages.iter().enumerate() {
        counts[page.state as usize] += 1;
        if page.state != PageState::Free {
            assert_eq!(pool.runs.tags()[index], 0, "page {index} is in use");
            assert!(pool.segments[index / pool.per_segment as usize].writer.is_some());
        }
    }
    assert_eq!(pool.counts, counts);
    for (segment, pages) in pool.segments.iter().zip(pool.pages.chunks(pool.per_segment as usize)) {
        assert_eq!(
            segment.free as usize,
            pages.iter().filter(|page| page.state == PageState::Free).count()
        );
    }
    assert_eq!(pool.stats().largest_free_run, runs.iter().map(|run| run.pages).max().unwrap_or(0));
}

#[test]
fn pieces_of_a_grant_lie_side_by_side() {
    let mut pool = pool(2, 64);
    let out = grant(&mut pool, A, 1, &[(0, 16), (3, 0), (1, 4)]);
    assert_eq!(out, [extent(0, 0, 16, 0), extent(0, 16, 4, 1)]);
    let stats = pool.stats();
    assert_eq!((stats.pieces_granted, stats.extents_granted, stats.segments_assigned), (2, 2, 1));
}

#[test]
fn the_best_run_is_taken_and_a_fresh_segment_only_when_no_run_holds_the_piece() {
    let mut pool = pool(2, 32);
    let a = grant(&mut pool, A, 1, &[(0, 8)]);
    grant(&mut pool, A, 2, &[(0, 2)]);
    let c = grant(&mut pool, A, 3, &[(0, 6)]);
    grant(&mut pool, A, 4, &[(0, 2)]);
    pool.free(GrantId(1), &a).unwrap();
    pool.free(GrantId(3), &c).unwrap();
    // Holes of 8 at 0, of 6 at 10, of 14 at 18.
    assert_eq!(grant(&mut pool, A, 5, &[(0, 6)]), [extent(0, 10, 6, 0)]);
    assert_eq!(grant(&mut pool, A, 6, &[(0, 8)]), [extent(0, 0, 8, 0)]);
    assert_eq!(grant(&mut pool, A, 7, &[(0, 15)]), [extent(1, 0, 15, 0)]);
}

#[test]
fn a_piece_is_split_only_when_there_is_no_other_way_and_over_the_longest_runs() {
    let mut pool = pool(1, 16);
    let ids: Vec<_> = [3, 1, 5, 1, 2, 1, 3].into_iter().zip(1..).collect();
    let all: Vec<_> =
        ids.iter().map(|&(pages, id)| grant(&mut pool, A, id, &[(0, pages)])).collect();
    for id in [0, 2, 4] {
        pool.free(GrantId(id as u64 + 1), &all[id]).unwrap();
    }
    // Holes of 3 at 0, of 5 at 4, of 2 at 10.
    assert_eq!(grant(&mut pool, A, 9, &[(7, 8)]), [extent(0, 4, 5, 7), extent(0, 0, 3, 7)]);
    assert_eq!(pool.stats().extents_granted, 9);
}

#[test]
fn extents_do_not_cross_segments_and_count_in_16_bits() {
    let mut small = pool(3, 4);
    assert_eq!(
        grant(&mut small, A, 1, &[(0, 10)]),
        [extent(0, 0, 4, 0), extent(1, 0, 4, 0), extent(2, 0, 2, 0)]
    );
    let mut large = pool(1, 70_000);
    let out = grant(&mut large, A, 1, &[(0, 70_000)]);
    assert_eq!(out, [extent(0, 0, u16::MAX, 0), extent(0, 65_535, 4_465, 0)]);
    large.free(GrantId(1), &out).unwrap();
    sound(&large);
}

#[test]
fn a_full_pool_changes_nothing_and_says_whether_waiting_helps() {
    let mut pool = pool(2, 8);
    let kept = grant(&mut pool, A, 1, &[(0, 4)]);
    grant(&mut pool, B, 2, &[(0, 1)]);
    let mut out = kept.clone();
    let full = |pages, never_fits| Err(Full { pages, never_fits });
    assert!(!pool.fits(A, &[(0, 3), (1, 2)]));
    assert_eq!(pool.grant(A, GrantId(3), &[(0, 3), (1, 2)], &mut out), full(5, false));
    assert_eq!(pool.grant(A, GrantId(3), &[(0, 16), (1, 1)], &mut out), full(17, true));
    let huge = 2 * u64::from(u32::MAX);
    assert_eq!(
        pool.grant(A, GrantId(3), &[(0, u32::MAX), (1, u32::MAX)], &mut out),
        full(huge, true)
    );
    assert_eq!(out, kept);
    assert_eq!(pool.count(PageState::Granted), 5);
    assert_eq!(pool.grant(A, GrantId(3), &[], &mut out), Ok(()));
    sound(&pool);
}

#[test]
fn each_transition_has_its_states() {
    type Verb = fn(&mut Pool, GrantId, &[Extent]) -> Result<(), StampMismatch>;
    use PageState::*;
    let verbs: [(Verb, &[PageState], PageState); 4] = [
        (Pool::commit, &[Granted], Committed),
        (Pool::condemn, &[Committed], Condemned),
        (Pool::quarantine, &[Granted, Committed], Quarantined),
        (Pool::free, &[Granted, Condemned, Quarantined], Free),
    ];
    let ways: [&[Verb]; 5] =
        [&[], &[Pool::commit], &[Pool::commit, Pool::condemn], &[Pool::quarantine], &[Pool::free]];
    for way in ways {
        for (verb, from, to) in verbs {
            let mut pool = pool(1, 8);
            let out = grant(&mut pool, A, 1, &[(0, 5)]);
            way.iter().for_each(|step| step(&mut pool, GrantId(1), &out).unwrap());
            let state = pool.pages[0].state;
            assert_eq!(pool.check(GrantId(1), &out).is_ok(), state == Committed);
            let result = verb(&mut pool, GrantId(1), &out);
            assert_eq!(result.is_ok(), from.contains(&state), "{state:?} to {to:?}");
            assert_eq!(pool.pages[0].state, if result.is_ok() { to } else { state });
            sound(&pool);
        }
    }
}

#[test]
fn one_wrong_page_refuses_all() {
    let mut pool = pool(2, 8);
    let mine = grant(&mut pool, A, 1, &[(0, 3), (1, 2)]);
    let other = grant(&mut pool, A, 2, &[(0, 2)]);
    let wrong = |extra: &[Extent]| [&mine[..], extra].concat();
    for bad in [
        wrong(&other),                       // another grant's
        wrong(&[extent(0, 7, 1, 0)]),        // free
        wrong(&[extent(0, 7, 2, 0)]),        // over the edge of its segment
        wrong(&[extent(2, 0, 1, 0)]),        // no such segment
        wrong(&[extent(0, u32::MAX, 9, 0)]), // wraps around
        wrong(&[extent(u32::MAX, 0, 1, 0)]), // wraps around too
        wrong(&mine[1..]),                   // named twice
        wrong(&[extent(0, 2, 2, 0)]),        // partly named twice
    ] {
        for verb in [Pool::commit, Pool::quarantine, Pool::free] {
            assert!(verb(&mut pool, GrantId(1), &bad).is_err(), "{bad:?}");
        }
        sound(&pool);
        assert_eq!(pool.count(PageState::Granted), 7);
    }
    let error = pool.commit(GrantId(1), &other).unwrap_err();
    assert_eq!(
        error.to_string(),
        "page 5 of segment 0 is not grant 1's for this: it is Granted, stamped 2"
    );
    assert!(pool.check(GrantId(0), &[extent(1, 0, 1, 0)]).is_err(), "a free page is nobody's");
}

#[test]
fn a_segment_changes_hands_only_when_idle() {
    let mut pool = pool(2, 8);
    let a = grant(&mut pool, A, 1, &[(0, 8)]);
    let b = grant(&mut pool, B, 2, &[(0, 1)]);
    assert_eq!(pool.writer(SegmentId(0)), Some(A));
    assert_eq!(pool.segments_of(B).collect::<Vec<_>>(), [SegmentId(1)]);
    assert_eq!(pool.idle_segment(B), None);
    assert_eq!(pool.unassign(SegmentId(0)), Err(NotIdle(SegmentId(0))));
    assert_eq!(pool.unassign(SegmentId(2)), Err(NotIdle(SegmentId(2))));
    pool.free(GrantId(1), &a).unwrap();
    assert_eq!(pool.idle_segment(B), Some(SegmentId(0)));
    assert_eq!(pool.idle_segment(A), None);
    assert!(!pool.fits(B, &[(0, 8)]), "idle, but still A's");
    pool.unassign(SegmentId(0)).unwrap();
    pool.unassign(SegmentId(0)).unwrap();
    sound(&pool);
    assert_eq!(pool.idle_segment(B), None);
    assert_eq!(grant(&mut pool, B, 3, &[(0, 8)]), [extent(0, 0, 8, 0)]);
    pool.free(GrantId(2), &b).unwrap();
    assert_eq!(pool.idle_segment(A), Some(SegmentId(1)));
}

/// xorshift: the same churn on every run.
fn random(state: &mut u64) -> u32 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    (*state >> 32) as u32
}

/// Pieces of up to 16 pages come and go at random around that fill for long; answers with extents per piece.
fn churn(fill: u32) -> f64 {
    let mut pool = pool(4, 2048);
    let (mut live, mut seed, mut number) = (Vec::new(), 0x9e37_79b9_7f4a_7c15, 0);
    let mut before = PoolStats::default();
    for round in 0..100_000 {
        while pool.count(PageState::Granted) < pool.pages() * fill / 100 {
            number += 1;
            let mut out = Vec::new();
            pool.grant(A, GrantId(number), &[(0, random(&mut seed) % 16 + 1)], &mut out).unwrap();
            live.push((GrantId(number), out));
        }
        let (grant, extents) = live.swap_remove(random(&mut seed) as usize % live.len());
        pool.free(grant, &extents).unwrap();
        if round == 20_000 {
            before = pool.stats();
        }
    }
    sound(&pool);
    let after = pool.stats();
    let extents = after.extents_granted - before.extents_granted;
    extents as f64 / (after.pieces_granted - before.pieces_granted) as f64
}

#[test]
fn runs_stay_long_under_churn() {
    let measured = [80, 90, 95].map(churn);
    println!("extents per piece at 80, 90, 95% full: {measured:?}");
    assert!(measured[0] < 1.001 && measured[1] < 1.01 && measured[2] < 1.1, "{measured:?}");
}
