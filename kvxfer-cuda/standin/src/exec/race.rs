//! Two pieces of work touched the same bytes, one of them wrote, and nothing put them in order.
//!
//! The order in which work happens to run can hide a missing event; this can't be hidden. Every item
//! has a [`Clock`] of what is known to be done before it: what is ahead in its stream, what it waits
//! for, what the host had observed when it submitted it. Each access is kept until all work still to
//! come knows of it. Seen are streams of one process and accesses by the same address; not the host's
//! own reads and writes, nor other processes'.

use std::collections::BTreeMap;
use std::ops::Range;

use super::clock::{Clock, StreamId};

/// Bytes that an item read or wrote.
#[derive(Clone, Debug, Default)]
pub(super) struct Touched {
    pub(super) reads: Vec<Range<u64>>,
    pub(super) writes: Vec<Range<u64>>,
}

/// Who touched a range last.
#[derive(Clone, Debug, Default)]
struct Last {
    end: u64,
    write: Option<(StreamId, u64)>,
    /// Since that write; at most one of a stream.
    reads: Vec<(StreamId, u64)>,
}

/// An access that nothing puts in order with the one that is being noted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Conflict {
    pub(super) address: u64,
    pub(super) other: StreamId,
    pub(super) other_wrote: bool,
    pub(super) wrote: bool,
}

/// Ranges above which what everybody knows is thrown out.
const CROWD: usize = 4096;

#[derive(Debug)]
pub(super) struct Accesses {
    /// By first address; ranges don't overlap.
    ranges: BTreeMap<u64, Last>,
    crowd: usize,
}

impl Accesses {
    pub(super) fn new() -> Self {
        Self { ranges: BTreeMap::new(), crowd: CROWD }
    }

    /// Notes what an item touched; `clock` is what it knew. The first conflict is returned.
    pub(super) fn note(
        &mut self,
        touched: &Touched,
        stream: StreamId,
        seq: u64,
        clock: &Clock,
    ) -> Option<Conflict> {
        let unknown = |(other, at): (StreamId, u64)| other != stream && !clock.knows(other, at);
        let mut conflict = None;
        for range in &touched.reads {
            self.split(range);
            for (address, last) in self.ranges.range_mut(range.clone()) {
                if let Some((other, _)) = last.write.filter(|write| unknown(*write)) {
                    conflict.get_or_insert(Conflict {
                        address: *address,
                        other,
                        other_wrote: true,
                        wrote: false,
                    });
                }
                last.reads.retain(|read| unknown(*read));
                last.reads.push((stream, seq));
            }
        }
        for range in &touched.writes {
            self.split(range);
            for (address, last) in self.ranges.range_mut(range.clone()) {
                let write =
                    last.write.filter(|write| unknown(*write)).map(|(other, _)| (other, true));
                let read = last
                    .reads
                    .iter()
                    .find(|read| unknown(**read))
                    .map(|(other, _)| (*other, false));
                if let Some((other, other_wrote)) = write.or(read) {
                    conflict.get_or_insert(Conflict {
                        address: *address,
                        other,
                        other_wrote,
                        wrote: true,
                    });
                }
                last.write = Some((stream, seq));
                last.reads.clear();
            }
        }
        conflict
    }

    /// Makes the range consist of whole entries, without gaps.
    fn split(&mut self, range: &Range<u64>) {
        for at in [range.start, range.end] {
            if let Some((_, last)) = self.ranges.range_mut(..at).next_back()
                && last.end > at
            {
                let rest = last.clone();
                last.end = at;
                self.ranges.insert(at, rest);
            }
        }
        let mut at = range.start;
        let mut gaps = Vec::new();
        for (start, last) in self.ranges.range(range.clone()) {
            if *start > at {
                gaps.push((at, *start));
            }
            at = last.end;
        }
        if at < range.end {
            gaps.push((at, range.end));
        }
        self.ranges
            .extend(gaps.into_iter().map(|(start, end)| (start, Last { end, ..Last::default() })));
    }

    /// Forgets accesses that all of these clocks know of, if there are many.
    pub(super) fn prune(&mut self, clocks: &[&Clock]) {
        if self.ranges.len() < self.crowd {
            return;
        }
        let known =
            |(stream, seq): (StreamId, u64)| clocks.iter().all(|clock| clock.knows(stream, seq));
        self.ranges.retain(|_, last| {
            last.reads.retain(|read| !known(*read));
            last.write = last.write.filter(|write| !known(*write));
            last.write.is_some() || !last.reads.is_empty()
        });
        self.crowd = (2 * self.ranges.len()).max(CROWD);
    }

    /// Forgets a stream that is gone.
    pub(super) fn forget(&mut self, stream: StreamId) {
        self.ranges.retain(|_, last| {
            last.reads.retain(|(other, _)| *other != stream);
            last.write = last.write.filter(|(other, _)| *other != stream);
            last.write.is_some() || !last.reads.is_empty()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(range: Range<u64>) -> Touched {
        Touched { reads: [range].into(), ..Touched::default() }
    }

    fn write(range: Range<u64>) -> Touched {
        Touched { writes: [range].into(), ..Touched::default() }
    }

    fn knows(stream: StreamId, seq: u64) -> Clock {
        let mut clock = Clock::new();
        clock.note(stream, seq);
        clock
    }

    #[test]
    fn ranges_conflict_where_they_overlap() {
        let nothing = Clock::new();
        let mut accesses = Accesses::new();
        assert!(accesses.note(&write(10..20), 1, 1, &nothing).is_none());
        assert!(accesses.note(&write(20..30), 2, 2, &nothing).is_none());
        assert!(accesses.note(&read(0..10), 3, 3, &nothing).is_none());
        let conflict = accesses.note(&read(15..25), 3, 4, &knows(1, 1)).unwrap();
        assert_eq!((conflict.address, conflict.other), (20, 2));
        // Readers don't mind each other; who writes minds them all.
        assert!(accesses.note(&read(0..10), 4, 5, &nothing).is_none());
        let conflict = accesses.note(&write(5..6), 4, 6, &nothing).unwrap();
        assert_eq!((conflict.other, conflict.other_wrote), (3, false));
        // A later access of the same stream is not known with an earlier one.
        assert!(accesses.note(&read(10..11), 1, 7, &nothing).is_none());
        assert!(accesses.note(&write(10..11), 5, 8, &knows(1, 1)).is_some());
        assert!(accesses.note(&write(11..12), 5, 9, &knows(1, 1)).is_none());
    }

    #[test]
    fn only_what_everybody_knows_is_forgotten() {
        let mut accesses = Accesses::new();
        for index in 0..CROWD as u64 {
            accesses.note(&write(10 * index..10 * index + 5), 1, index, &Clock::new());
        }
        let (half, all) = (knows(1, CROWD as u64 / 2), knows(1, CROWD as u64));
        accesses.prune(&[&all, &half]);
        assert!(accesses.note(&write(0..5), 2, 0, &Clock::new()).is_none());
        let last = 10 * (CROWD as u64 - 1);
        assert!(accesses.note(&write(last..last + 5), 2, 1, &half).is_some());
        accesses.forget(2);
        accesses.forget(1);
        assert!(accesses.ranges.is_empty());
    }
}
