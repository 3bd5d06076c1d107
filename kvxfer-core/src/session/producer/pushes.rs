//! From a grant to its end: posts, and what is said when the last of them is terminal; deadlines.

use super::{Ending, Offer, Producer, Push, Timer, Writing, offer_is_over};
use crate::session::planted::{Bug, planted};
use crate::session::protocol;
use crate::wire::Message;
use crate::wire::message::Granted;
use crate::{Error, GrantId, Incarnation, LinkId, OfferId, PostId, Result, Time};

impl Producer {
    /// Ends the pushes of the chunks that `which` names and tells the consumer.
    pub(super) fn withdraw_chunks(
        &mut self,
        index: usize,
        id: OfferId,
        which: impl Fn(usize) -> bool,
    ) {
        let Some(offer) = self.offers.get(&id) else { return };
        let waiting: Vec<u32> = offer.pushes[index]
            .iter()
            .enumerate()
            .filter(|(at, push)| matches!(push, Push::Waiting) && which(*at))
            .map(|(at, _)| at as u32)
            .collect();
        if let Some((link, _)) = self.consumers[index].link
            && offer.told[index]
            && !waiting.is_empty()
        {
            self.send(link, Message::Withdraw { offer: id, chunks: waiting });
        }
        self.end_pushes(index, id, Ending::Abort, which);
    }

    /// Ends pushes: at once where nothing is written, else when the posts are terminal.
    pub(super) fn end_pushes(
        &mut self,
        index: usize,
        id: OfferId,
        ending: Ending,
        which: impl Fn(usize) -> bool,
    ) {
        let Some(offer) = self.offers.get_mut(&id) else { return };
        let mut ended = Vec::new();
        let mut drained = Vec::new();
        for (at, push) in offer.pushes[index].iter_mut().enumerate().filter(|(at, _)| which(*at)) {
            match push {
                Push::Done => {}
                Push::Waiting => ended.push(at as u32),
                Push::Granted(writing) => {
                    writing.ending = Some(ending);
                    if writing.in_flight == 0 {
                        drained.push((writing.peer, writing.grant));
                    }
                }
            }
        }
        for chunk in ended {
            self.stats.skipped += 1;
            self.finish(index, id, chunk);
        }
        for (peer, grant) in drained {
            self.drained(peer, grant);
        }
    }

    pub(super) fn is_waiting(&self, index: usize, offer: OfferId, chunk: u32) -> bool {
        let push =
            |offer: &Offer| matches!(offer.pushes[index].get(chunk as usize), Some(Push::Waiting));
        self.offers.get(&offer).is_some_and(push)
    }

    pub(super) fn granted(
        &mut self,
        index: usize,
        link: LinkId,
        peer: Incarnation,
        id: OfferId,
        granted: Granted,
    ) -> Result<()> {
        let Granted { chunk, grant, extents } = granted;
        let newest = &mut self.consumers[index].newest;
        if newest.is_some_and(|newest| grant <= newest) {
            return Ok(());
        }
        *newest = Some(grant);
        if !self.is_waiting(index, id, chunk) {
            // Withdrawn, or done by other means, while the grant was under way. Nothing was written.
            self.send(link, Message::Abort { grant });
            return Ok(());
        }
        let Some(offer) = self.offers.get_mut(&id) else { return Ok(()) };
        let tokens = offer.chunks[chunk as usize].tokens;
        for (group, pages) in self.config.layout.chunk_pieces(tokens) {
            let got: u32 = extents
                .iter()
                .filter(|extent| extent.group == group)
                .map(|extent| u32::from(extent.pages))
                .sum();
            if got != pages {
                return Err(protocol(format!(
                    "grant {grant} has {got} pages of group {group}, {pages} are needed"
                )));
            }
        }
        let layers = self.config.layout.layers() as usize;
        offer.pushes[index][chunk as usize] = Push::Granted(Box::new(Writing {
            peer,
            grant,
            extents: extents.into(),
            posted: vec![false; layers],
            left: layers as u32,
            in_flight: 0,
            sums: vec![0; layers],
            ending: None,
        }));
        self.grants.insert((peer, grant), (index, id, chunk));
        self.post_ready(index, id, chunk);
        Ok(())
    }

    pub(super) fn revoked(&mut self, link: LinkId, peer: Incarnation, grant: GrantId) {
        self.stats.revoked += 1;
        let Some(writing) = self.writing(peer, grant) else {
            // Committed, aborted or never seen: whatever was written has drained.
            return self.send(link, Message::FenceAck { grant });
        };
        writing.ending = match writing.ending {
            None => Some(Ending::Fence),
            // Of an earlier link's, and the same consumer waits for the fence on this one.
            Some(Ending::Silence) => Some(Ending::Abort),
            ending => ending,
        };
        if writing.in_flight == 0 || planted(Bug::FenceAckEarly) {
            self.drained(peer, grant);
        }
    }

    pub(super) fn writing(&mut self, peer: Incarnation, grant: GrantId) -> Option<&mut Writing> {
        let &(index, offer, chunk) = self.grants.get(&(peer, grant))?;
        match self.offers.get_mut(&offer)?.pushes[index].get_mut(chunk as usize)? {
            Push::Granted(writing) => Some(writing),
            _ => None,
        }
    }

    /// A post ended; the result is the checksum of what was stored.
    pub fn posted(&mut self, post: PostId, result: std::result::Result<u64, Error>) {
        let Some((peer, grant, layer)) = self.posts.remove(&post) else { return };
        let failed = result.is_err();
        self.stats.failed_posts += u64::from(failed);
        let Some(writing) = self.writing(peer, grant) else { return };
        writing.in_flight -= 1;
        match result {
            Ok(sum) => writing.sums[layer as usize] = sum,
            Err(_) => {
                writing.ending.get_or_insert(Ending::Abort);
            }
        }
        if writing.in_flight == 0 && (writing.left == 0 || writing.ending.is_some()) {
            self.drained(peer, grant);
        }
        self.settle();
    }

    /// Every post of a grant is terminal, and no more will follow: say how it ends.
    pub(super) fn drained(&mut self, peer: Incarnation, grant: GrantId) {
        let Some((index, id, chunk)) = self.grants.remove(&(peer, grant)) else { return };
        let Some(offer) = self.offers.get_mut(&id) else { return };
        let push = &mut offer.pushes[index][chunk as usize];
        let Push::Granted(writing) = std::mem::replace(push, Push::Waiting) else { return };
        let ending = writing.ending;
        let message = match ending {
            None => Message::Commit { grant, sums: writing.sums },
            Some(Ending::Fence) => Message::FenceAck { grant },
            Some(Ending::Abort | Ending::Silence) => Message::Abort { grant },
        };
        if let Some((link, there)) = self.consumers[index].link
            && there == peer
            && ending != Some(Ending::Silence)
        {
            self.send(link, message);
        }
        match ending {
            Some(Ending::Fence) if !offer_is_over(self.offers.get(&id), chunk) => return,
            None => self.stats.committed += 1,
            Some(_) => self.stats.skipped += 1,
        }
        self.finish(index, id, chunk);
    }

    /// This consumer needs nothing of the chunk any more. For the last one that means that it is read no more.
    pub(super) fn finish(&mut self, index: usize, id: OfferId, chunk: u32) {
        let Some(offer) = self.offers.get_mut(&id) else { return };
        let push = &mut offer.pushes[index][chunk as usize];
        if matches!(push, Push::Done) {
            return;
        }
        *push = Push::Done;
        let open = &mut offer.open[chunk as usize];
        *open -= 1;
        if *open == 0 {
            self.done.entry(id).or_default().push(chunk);
        }
    }

    /// Nobody pins engine blocks for a consumer that has no room past the hold deadline.
    pub(super) fn hold_due(&mut self, now: Time, id: OfferId) {
        let Some(offer) = self.offers.get(&id) else { return };
        let hold = self.config.hold;
        let late: Vec<bool> = offer
            .sources
            .iter()
            .map(|source| source.held_since().is_some_and(|since| since + hold <= now))
            .collect();
        // What is being written may yet be revoked, and then waits past its time: look again.
        let written = offer.pushes.iter().flatten().any(|push| matches!(push, Push::Granted(_)));
        let next = offer
            .sources
            .iter()
            .filter_map(|source| source.held_since())
            .map(|since| since + hold)
            .filter(|&at| at > now)
            .chain(written.then(|| now + hold))
            .min();
        if let Some(next) = next {
            self.timers.set(next, Timer::Hold(id));
        }
        for index in 0..self.consumers.len() {
            let waiting = |offer: &Offer, at: usize| {
                matches!(offer.pushes[index].get(at), Some(Push::Waiting))
            };
            let gone: Vec<bool> = match self.offers.get(&id) {
                Some(offer) => (0..late.len()).map(|at| late[at] && waiting(offer, at)).collect(),
                None => return,
            };
            self.withdraw_chunks(index, id, |at| gone[at]);
        }
    }

    /// What that consumer granted and is being written.
    pub(super) fn granted_by(&self, peer: Incarnation) -> impl Iterator<Item = GrantId> {
        self.grants
            .range((peer, GrantId(0))..=(peer, GrantId(u64::MAX)))
            .map(|(&(_, grant), _)| grant)
    }

    pub(super) fn renew(&mut self, index: usize) {
        let Some((link, peer)) = self.consumers[index].link else { return };
        let grants: Vec<GrantId> = self.granted_by(peer).collect();
        if !grants.is_empty() {
            self.send(link, Message::Renew { grants });
        }
    }

    pub(super) fn keep_renewing(&mut self, now: Time, index: usize) {
        let consumer = &self.consumers[index];
        if let (Some(every), Some((_, peer)), false) =
            (consumer.renew_every, consumer.link, consumer.renewing)
            && self.granted_by(peer).next().is_some()
        {
            self.consumers[index].renewing = true;
            self.timers.set(now + every, Timer::Renew(index));
        }
    }
}
