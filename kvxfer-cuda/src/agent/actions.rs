//! What the state machines want done.

use std::os::fd::AsFd;

use kvxfer_core::pool::Extent;
use kvxfer_core::session::{ConsumerAction, Producer, ProducerAction};
use kvxfer_core::wire::Message;
use kvxfer_core::{LinkId, LoadId, Result, SegmentId, Time};

use super::Loaded;
use super::loads::Job;
use super::progress::Progress;
use super::push::{Layer, News};
use super::store::{Check, Ended};

impl Progress {
    pub(super) fn perform(&mut self, now: Time) {
        while let Some(action) = self.producer.as_mut().and_then(Producer::poll_action) {
            match action {
                ProducerAction::Send { link, message } => self.send(now, link, &message),
                ProducerAction::Post { post, peer, grant, key, layer, extents, blocks, .. } => {
                    if let Some(pushes) = &mut self.pushes {
                        pushes.enqueue(Layer { post, peer, grant, key, layer, extents, blocks });
                    }
                }
                ProducerAction::Detach { link, peer, segment, generation } => {
                    if let Some(pushes) = &mut self.pushes {
                        pushes.retire(link, peer, segment, generation);
                    }
                }
            }
        }
        while let Some(action) = self.consuming.as_mut().and_then(|c| c.session.poll_action()) {
            self.perform_consumer(now, action);
        }
    }

    pub(super) fn perform_consumer(&mut self, now: Time, action: ConsumerAction) {
        match action {
            ConsumerAction::Send { link, message } => self.send(now, link, &message),
            ConsumerAction::Attach { link } => {
                if let Err(error) = self.attach(now, link) {
                    self.close_link(now, link, &error);
                }
            }
            ConsumerAction::Export { link, segment, generation, probe } => {
                if let Err(error) = self.export(link, segment, generation, probe) {
                    self.close_link(now, link, &error);
                }
            }
            ConsumerAction::Verify { link, segment, probe, sum } => {
                self.verify(link, segment, probe, sum);
                self.end(now);
            }
            ConsumerAction::Copy { load, chunk, key, grant, tokens, extents, sums } => {
                #[cfg(feature = "faults")]
                self.flip(&extents);
                if let Some(loads) = &mut self.loads {
                    loads.enqueue(Job { load, chunk, key, grant, tokens, extents, sums });
                }
            }
            ConsumerAction::Loaded { load, result } => self.loaded(load, result),
            ConsumerAction::Replace { segment, live } => self.replace(now, segment, &live),
            ConsumerAction::Close { link, error } => self.close_link(now, link, &error),
        }
    }

    pub(super) fn send(&mut self, now: Time, link: LinkId, message: &Message) {
        #[cfg(feature = "faults")]
        if self.config.fault == Some(crate::config::Fault::HoldCommit)
            && matches!(message, Message::Commit { .. })
        {
            return;
        }
        if let Message::Refused { reason, .. } = message {
            self.say_too_large(now, link, reason);
        }
        if let Err(error) = self.control.send(link, message, &[]) {
            self.close_link(now, link, &error);
        }
    }

    /// Offers were refused for good, by us or by the peer. Every request would say so, so not every one does.
    pub(super) fn say_too_large(&mut self, now: Time, link: LinkId, reason: &str) {
        if let (Some(link), Some(muted)) = (self.links.get(&link), self.too_large.pass(now)) {
            tracing::warn!(
                peer = link.name,
                muted,
                "KV that the pool can never hold is computed twice: {reason}"
            );
        }
    }

    pub(super) fn export(
        &mut self,
        link: LinkId,
        segment: SegmentId,
        generation: u32,
        probe: u64,
    ) -> Result<()> {
        let Some(consuming) = &mut self.consuming else { return Ok(()) };
        let Some(to) = self.links.get(&link) else { return Ok(()) };
        let Some(path) = to.path.as_ref().map(|path| path.name) else { return Ok(()) };
        let handle = consuming.export(path, &self.local, segment, to.peer)?;
        let message = Message::Segment {
            segment,
            generation,
            bytes: handle.bytes,
            probe,
            transport: path.as_str().into(),
            blob: handle.blob,
        };
        let fds: Vec<_> = handle.fds.iter().map(AsFd::as_fd).collect();
        self.control.send(link, &message, &fds)
    }

    /// Whether a producer's probe lies where it says.
    fn verify(&mut self, link: LinkId, segment: SegmentId, probe: u64, sum: u64) {
        let path = self.links.get(&link).and_then(|link| link.path.as_ref());
        let Some(path) = path.map(|path| path.name) else { return };
        if let Some(consuming) = &mut self.consuming {
            let check = Check { link, segment, probe, sum, path };
            consuming.store.verify(check, &mut self.ended);
        }
    }

    /// What the pool's bytes have done.
    pub(super) fn end(&mut self, now: Time) {
        for ended in std::mem::take(&mut self.ended) {
            let result = match &ended {
                Ended::Verified { link, result: Err(error), .. } => {
                    Err(self.path_failed(now, *link, error.clone()))
                }
                _ => Ok(()),
            };
            let Some(consuming) = &mut self.consuming else { return };
            match ended {
                Ended::Copied(copied) => consuming.session.copied(now, copied),
                Ended::Verified { link, segment, probe, .. } => {
                    consuming.session.verified(now, link, segment, probe, result);
                }
                Ended::Replaced(segment) => consuming.session.replaced(now, segment),
            }
        }
    }

    /// What follows from the bytes that moved.
    pub(super) fn tell(&mut self, now: Time) {
        for news in std::mem::take(&mut self.news) {
            match news {
                News::Say(link, message) => self.send(now, link, &message),
                News::Probed(link, nanos) => self.probed(link, nanos),
                News::Unreachable(link, error) => {
                    let error = self.path_failed(now, link, error);
                    self.close_link(now, link, &error);
                }
            }
        }
    }

    pub(super) fn replace(&mut self, now: Time, segment: SegmentId, live: &[Extent]) {
        let Some(consuming) = &mut self.consuming else { return };
        let page = self.config.layout.page_bytes();
        let live: Vec<(u64, u64)> = live
            .iter()
            .map(|extent| (u64::from(extent.page) * page, u64::from(extent.pages) * page))
            .collect();
        match consuming.store.replace(segment, &live, &mut self.ended) {
            Ok(()) => self.end(now),
            // The pages stay quarantined: less room, nothing wrong.
            Err(error) => tracing::error!(%error, %segment, "cannot replace a segment's memory"),
        }
    }

    pub(super) fn loaded(&mut self, load: LoadId, result: Result<()>) {
        let mut paths: Vec<String> =
            self.links.values().filter_map(super::links::Link::comes_by).collect();
        paths.sort_unstable();
        paths.dedup();
        let path = paths.join(",");
        let loaded = match &mut self.loads {
            Some(loads) => loads.end(load, result, &path),
            None => Loaded { load, result, bytes: 0, tokens: 0, seconds: 0.0, path },
        };
        self.shared.tell(|news| news.loaded.push(loaded));
    }

    #[cfg(feature = "faults")]
    pub(super) fn flip(&mut self, extents: &[Extent]) {
        let Some(consuming) = &mut self.consuming else { return };
        if self.config.fault != Some(crate::config::Fault::FlipAfterCommit) {
            return;
        }
        if let Some(extent) = extents.first() {
            consuming.store.flip(extent, self.config.layout.page_bytes());
        }
    }
}
