//! The pool against a list of page states.

use proptest::prelude::*;

use super::tests::{pool, scan, sound};
use super::*;

#[derive(Clone, Debug)]
enum Step {
    Grant { writer: u8, pieces: Vec<(u16, u32)> },
    Turn { which: prop::sample::Index, verb: u8, tamper: u8 },
    Unassign(u32),
}

fn step() -> impl Strategy<Value = Step> {
    let pieces = prop::collection::vec((0u16..3, 0u32..14), 0..4);
    prop_oneof![
        3 => (1u8..4, pieces).prop_map(|(writer, pieces)| Step::Grant { writer, pieces }),
        6 => (any::<prop::sample::Index>(), 0u8..4, 0u8..10)
            .prop_map(|(which, verb, tamper)| Step::Turn { which, verb, tamper }),
        1 => (0u32..6).prop_map(Step::Unassign),
    ]
}

/// The pages as (state, grant), the writers of the segments, and every grant ever made.
#[derive(Default)]
struct Model {
    pages: Vec<Option<(PageState, GrantId)>>,
    writers: Vec<Option<Incarnation>>,
    grants: Vec<(GrantId, Vec<Extent>)>,
}

const SEGMENTS: u32 = 5;
const PAGES: u32 = 24;

fn indices(extents: &[Extent]) -> Vec<usize> {
    let first = |extent: &Extent| (extent.segment.0 * PAGES + extent.page) as usize;
    extents
        .iter()
        .flat_map(|extent| first(extent)..first(extent) + usize::from(extent.pages))
        .collect()
}

impl Model {
    fn grant(&mut self, pool: &mut Pool, writer: Incarnation, pieces: &[(u16, u32)]) {
        let number = GrantId(self.grants.len() as u64 + 1);
        let free_of = |owner| {
            let free = |page: &(usize, _)| self.writers[page.0 / PAGES as usize] == owner;
            self.pages.iter().enumerate().filter(|page| page.1.is_none() && free(page)).count()
        };
        let needed: u32 = pieces.iter().map(|piece| piece.1).sum();
        let fits = needed as usize <= free_of(Some(writer)) + free_of(None);
        let own: Vec<_> = scan(pool).into_iter().filter(|run| run.writer == Some(writer)).collect();
        let mut out = Vec::new();
        assert_eq!(pool.fits(writer, pieces), fits);
        assert_eq!(pool.grant(writer, number, pieces, &mut out).is_ok(), fits);
        if !fits {
            assert!(out.is_empty());
            return;
        }
        let mut rest = &out[..];
        for &(group, pages) in pieces {
            let mut left = pages;
            while left > 0 {
                assert_eq!(rest[0].group, group);
                left -= u32::from(rest[0].pages);
                rest = &rest[1..];
            }
        }
        assert!(rest.is_empty());
        let whole = pieces.iter().filter(|piece| piece.1 > 0).count();
        if own.iter().any(|run| run.pages >= needed) {
            assert_eq!(out.len(), whole);
            assert!(out.windows(2).all(|two| two[0].page + u32::from(two[0].pages) == two[1].page));
        }
        for extent in &out {
            let owner = &mut self.writers[extent.segment.0 as usize];
            assert!(owner.is_none_or(|owner| owner == writer));
            *owner = Some(writer);
        }
        for page in indices(&out) {
            assert_eq!(self.pages[page], None, "page {page} granted twice");
            self.pages[page] = Some((PageState::Granted, number));
        }
        self.grants.push((number, out));
    }

    fn turn(&mut self, pool: &mut Pool, which: prop::sample::Index, verb: u8, tamper: u8) {
        if self.grants.is_empty() {
            return;
        }
        let at = which.index(self.grants.len());
        let (mut number, mut extents) = self.grants[at].clone();
        match tamper {
            0 => number = GrantId(number.0 + 1),
            1 => extents.extend(extents.first().copied()),
            2 => extents.extend(self.grants[(at + 1) % self.grants.len()].1.clone()),
            3 => extents.iter_mut().take(1).for_each(|extent| extent.page += 1),
            4 => extents.truncate(1),
            _ => (),
        }
        use PageState::*;
        let (from, to): (&[PageState], _) = match verb {
            0 => (&[Granted], Committed),
            1 => (&[Committed], Condemned),
            2 => (&[Granted, Committed], Quarantined),
            _ => (&[Granted, Condemned, Quarantined], Free),
        };
        let pages = indices(&extents);
        let mut unique = pages.clone();
        unique.sort_unstable();
        unique.dedup();
        let inside = extents.iter().all(|e| e.page + u32::from(e.pages) <= PAGES);
        let holds = |states: &[PageState]| {
            inside
                && unique.len() == pages.len()
                && pages.iter().all(|&page| {
                    self.pages[page]
                        .is_some_and(|(state, stamp)| stamp == number && states.contains(&state))
                })
        };
        assert_eq!(pool.check(number, &extents).is_ok(), holds(&[Committed]));
        let allowed = holds(from);
        let verb = [Pool::commit, Pool::condemn, Pool::quarantine, Pool::free][usize::from(verb)];
        assert_eq!(verb(pool, number, &extents).is_ok(), allowed);
        if allowed {
            pages.iter().for_each(|&page| self.pages[page] = (to != Free).then_some((to, number)));
        }
    }

    fn unassign(&mut self, pool: &mut Pool, segment: u32) {
        let start = (segment * PAGES) as usize;
        let idle = segment < SEGMENTS
            && self.pages[start..start + PAGES as usize].iter().all(|page| page.is_none());
        assert_eq!(pool.unassign(SegmentId(segment)).is_ok(), idle);
        if idle {
            self.writers[segment as usize] = None;
        }
    }

    fn compare(&self, pool: &Pool) {
        for (page, model) in pool.pages.iter().zip(&self.pages) {
            let page = (page.state != PageState::Free).then_some((page.state, page.stamp));
            assert_eq!(page, *model);
        }
        for (segment, writer) in self.writers.iter().enumerate() {
            let id = SegmentId(segment as u32);
            assert_eq!(pool.writer(id), *writer);
            if let Some(writer) = pool.writer(id) {
                assert!(pool.segments_of(writer).any(|other| other == id));
            }
        }
        for writer in (1..4).map(|byte| Incarnation([byte; 16])) {
            let idle = |segment: &usize| {
                let start = segment * PAGES as usize;
                self.pages[start..start + PAGES as usize].iter().all(Option::is_none)
                    && self.writers[*segment].is_some_and(|owner| owner != writer)
            };
            let first = (0..self.writers.len()).find(idle).map(|segment| SegmentId(segment as u32));
            assert_eq!(pool.idle_segment(writer), first);
        }
        sound(pool);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn behaves_like_a_list_of_pages(steps in prop::collection::vec(step(), 1..120)) {
        let mut pool = pool(SEGMENTS, PAGES);
        let mut model = Model {
            pages: vec![None; (SEGMENTS * PAGES) as usize],
            writers: vec![None; SEGMENTS as usize],
            grants: Vec::new(),
        };
        for step in steps {
            match step {
                Step::Grant { writer, pieces } => model.grant(&mut pool, Incarnation([writer; 16]), &pieces),
                Step::Turn { which, verb, tamper } => model.turn(&mut pool, which, verb, tamper),
                Step::Unassign(segment) => model.unassign(&mut pool, segment),
            }
            model.compare(&pool);
        }
    }
}
