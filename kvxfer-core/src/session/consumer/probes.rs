//! Whether what a producer writes arrives: one probe for each segment that it is shown, read back here.
//!
//! Nothing that a producer commits is believed before the probes of all segments that hold it have passed.

use super::{Consumer, ConsumerAction, LinkKind};
use crate::{GrantId, LinkId, Result, SegmentId, Time};

/// How the probe of an exported segment stands, the least believed first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Probe {
    /// The writer has not written it yet.
    Awaited(u64),
    /// What it wrote is being compared.
    Verifying(u64),
    /// Its writes arrive.
    Passed,
}

/// A commit that came while a probe was verified.
#[derive(Debug)]
pub(super) struct Early {
    pub(super) link: LinkId,
    pub(super) grant: GrantId,
    pub(super) sums: Vec<u64>,
}

impl Consumer {
    fn probe(&mut self, link: LinkId, segment: SegmentId) -> Option<&mut Probe> {
        match &mut self.links.get_mut(&link)?.kind {
            LinkKind::Producer { exported, .. } => exported.get_mut(&segment),
            LinkKind::Observer { .. } => None,
        }
    }

    /// The producer says what it wrote. One that answers an earlier export is not heard.
    pub(super) fn probed(&mut self, link: LinkId, segment: SegmentId, probe: u64, sum: u64) {
        if let Some(state) = self.probe(link, segment)
            && *state == Probe::Awaited(probe)
        {
            *state = Probe::Verifying(probe);
            self.actions.push_back(ConsumerAction::Verify { link, segment, probe, sum });
        }
    }

    /// A [`ConsumerAction::Verify`] ended: the bytes are there, or why they are not.
    pub fn verified(
        &mut self,
        now: Time,
        link: LinkId,
        segment: SegmentId,
        probe: u64,
        result: Result<()>,
    ) {
        let Some(state) = self.probe(link, segment) else { return };
        if *state != Probe::Verifying(probe) {
            return;
        }
        let believed = match result {
            Ok(()) => {
                *state = Probe::Passed;
                self.believe_early(now, link)
            }
            Err(error) => Err(error),
        };
        if let Err(error) = believed {
            self.actions.push_back(ConsumerAction::Close { link, error });
            self.disconnected(now, link);
        }
        self.settle(now);
    }

    fn believe_early(&mut self, now: Time, link: LinkId) -> Result<()> {
        let Some(peer) = self.links.get(&link).map(|link| link.peer) else { return Ok(()) };
        let (of_link, others): (Vec<Early>, Vec<Early>) =
            std::mem::take(&mut self.early).into_iter().partition(|early| early.link == link);
        self.early = others;
        // Those that wait for another segment's probe come back in order.
        of_link
            .into_iter()
            .try_for_each(|early| self.committed(now, link, peer, early.grant, early.sums))
    }

    /// The least believed probe of the segments that a grant lies in.
    pub(super) fn least_probe(&self, link: LinkId, grant: GrantId) -> Probe {
        let exported = match self.links.get(&link).map(|link| &link.kind) {
            Some(LinkKind::Producer { exported, .. }) => exported,
            _ => return Probe::Awaited(0),
        };
        let extents = self.grants.get(&grant).map_or(&[][..], |grant| &grant.extents);
        extents
            .iter()
            .map(|extent| exported.get(&extent.segment).copied().unwrap_or(Probe::Awaited(0)))
            .min()
            .unwrap_or(Probe::Passed)
    }
}
