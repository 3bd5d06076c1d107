//! The collector against a list that is scanned for the next chunk to give up.

use proptest::prelude::*;

use super::tests::{at, config};
use super::*;

#[derive(Clone, Debug)]
enum Step {
    Insert {
        parent: u64,
        pages: u32,
    },
    Pin(u64),
    Unpin {
        grant: u64,
        retrieved: bool,
    },
    Expect(u64),
    Retire(u64),
    Forget(u64),
    /// Of the grants, one goes on.
    Tick {
        seconds: u64,
        used: u32,
        wanted: u32,
        goes_on: Option<u64>,
    },
}

/// Grants count backwards from the newest, so that most steps meet one that is there.
fn step() -> impl Strategy<Value = Step> {
    let back = || 0u64..5;
    prop_oneof![
        4 => (0u64..4, 1u32..9).prop_map(|(parent, pages)| Step::Insert { parent, pages }),
        3 => back().prop_map(Step::Pin),
        4 => (back(), any::<bool>()).prop_map(|(grant, retrieved)| Step::Unpin { grant, retrieved }),
        2 => back().prop_map(Step::Expect),
        1 => back().prop_map(Step::Retire),
        1 => back().prop_map(Step::Forget),
        4 => (0u64..4, 0u32..=100, prop_oneof![1 => Just(0), 1 => 0u32..110], prop::option::of(back()))
            .prop_map(|(seconds, used, wanted, goes_on)| Step::Tick { seconds, used, wanted, goes_on }),
    ]
}

struct Item {
    grant: GrantId,
    parent: GrantId,
    pages: u32,
    pins: u32,
    /// Since when.
    expected: Vec<Time>,
    /// The newest there ever was.
    newest: Time,
    retrieved: bool,
    retired: bool,
    used: Time,
}

struct Model {
    config: GcConfig,
    items: Vec<Item>,
    draining: bool,
}

impl Model {
    fn item(&mut self, grant: GrantId) -> Option<&mut Item> {
        self.items.iter_mut().find(|item| item.grant == grant)
    }

    fn why(&self, now: Time, item: &Item) -> Option<Reason> {
        let followed = self.items.iter().any(|other| other.parent == item.grant);
        let expected = item.expected.iter().any(|since| *since + self.config.unclaimed_ttl > now);
        if item.pins > 0 {
            return None;
        }
        if item.retired {
            return Some(Reason::Explicit);
        }
        if !self.config.enabled || followed {
            return None;
        }
        if expected {
            return (item.newest + self.config.overdue_after <= now).then_some(Reason::Overdue);
        }
        Some(match item.retrieved {
            true if self.config.after_retrieve == AfterRetrieve::Drop => Reason::Retrieved,
            false if item.used + self.config.unclaimed_ttl <= now => Reason::Unclaimed,
            _ => Reason::Pressure,
        })
    }

    fn tick(
        &mut self,
        now: Time,
        used: u32,
        wanted: u32,
        goes_on: Option<GrantId>,
    ) -> Vec<GrantId> {
        let ttl = self.config.unclaimed_ttl;
        self.items.iter_mut().for_each(|item| item.expected.retain(|since| *since + ttl > now));
        self.draining |= used > 80;
        let mut used = i64::from(used);
        let mut out = Vec::new();
        while out.len() < self.config.batch {
            self.draining &= used > 60;
            let short = wanted <= 100 && used + i64::from(wanted) > 100;
            let holds = |why: Reason, grant| match why {
                Reason::Pressure => self.draining || short,
                Reason::Overdue => short && goes_on != Some(grant),
                _ => true,
            };
            let all = self
                .items
                .iter()
                .filter_map(|item| Some((self.why(now, item)?, item.used, item.grant)));
            let Some((_, _, grant)) = all.filter(|(why, _, grant)| holds(*why, *grant)).min()
            else {
                break;
            };
            let index = self.items.iter().position(|item| item.grant == grant).unwrap();
            used = (used - i64::from(self.items.remove(index).pages)).max(0);
            out.push(grant);
        }
        self.draining &= used > 60;
        out
    }
}

/// Checks what the module's documentation states about the indices.
fn sound(gc: &Collector) {
    let mut candidates = BTreeSet::new();
    let mut timers = BTreeSet::new();
    for (&grant, chunk) in &gc.chunks {
        candidates.extend(chunk.reason(&gc.config).map(|reason| (reason, chunk.used, grant)));
        timers.extend(chunk.due().filter(|_| gc.config.enabled).map(|due| (due, grant)));
        let children = gc.chunks.values().filter(|other| other.parent == Some(grant)).count();
        assert_eq!(chunk.children as usize, children);
    }
    assert_eq!(gc.candidates, candidates);
    assert_eq!(gc.timers, timers);
}

fn run(config: GcConfig, steps: Vec<Step>) {
    let mut gc = Collector::new(config).unwrap();
    let mut model = Model { config, items: Vec::new(), draining: false };
    let (mut now, mut newest) = (Time::ZERO, 0u64);
    for step in steps {
        let grant = |back: u64| GrantId(newest.saturating_sub(back));
        match step {
            Step::Insert { parent, pages } => {
                let parent = grant(parent);
                newest += 1;
                gc.insert(now, GrantId(newest), Some(parent), pages);
                model.items.push(Item {
                    grant: GrantId(newest),
                    parent,
                    pages,
                    pins: 0,
                    expected: Vec::new(),
                    newest: Time::ZERO,
                    retrieved: false,
                    retired: false,
                    used: now,
                });
            }
            Step::Pin(back) => {
                let item = model.item(grant(back));
                assert_eq!(gc.pin(grant(back)), item.is_some());
                if let Some(item) = item {
                    item.pins += 1;
                    item.expected.sort_unstable();
                    item.expected.drain(..item.expected.len().min(1));
                }
            }
            Step::Unpin { grant: back, retrieved } => {
                if let Some(item) = model.item(grant(back)).filter(|item| item.pins > 0) {
                    gc.unpin(now, grant(back), retrieved);
                    item.pins -= 1;
                    item.used = now;
                    item.retrieved |= retrieved;
                }
            }
            Step::Expect(back) => {
                gc.expect(now, grant(back));
                if let Some(item) = model.item(grant(back)) {
                    item.expected.push(now);
                    item.newest = now;
                }
            }
            Step::Retire(back) => {
                gc.retire(grant(back));
                model.item(grant(back)).into_iter().for_each(|item| item.retired = true);
            }
            Step::Forget(back) => {
                gc.forget(grant(back));
                model.items.retain(|item| item.grant != grant(back));
            }
            Step::Tick { seconds, used, wanted, goes_on } => {
                now += at(seconds);
                let mut out = Vec::new();
                let goes_on = goes_on.map(grant);
                gc.tick(now, used, 100, wanted, |grant| goes_on == Some(grant), &mut out);
                assert_eq!(out, model.tick(now, used, wanted, goes_on));
            }
        }
        sound(&gc);
        assert_eq!(gc.len(), model.items.len());
        model.items.iter().for_each(|item| assert_eq!(gc.is_pinned(item.grant), item.pins > 0));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn behaves_like_a_list(
        enabled in prop::bool::weighted(0.9),
        keep in any::<bool>(),
        batch in 1usize..6,
        steps in prop::collection::vec(step(), 1..150),
    ) {
        let after_retrieve = if keep { AfterRetrieve::Keep } else { AfterRetrieve::Drop };
        run(GcConfig { enabled, batch, ..config(after_retrieve) }, steps);
    }
}
