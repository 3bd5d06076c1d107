//! What the engine has computed, and the writes that follow from it.
//!
//! A step of the engine names the chunks that it completes, blocks and all, those that a local prefix cache hit
//! included: their blocks may be written by another request of the very same step. So no chunk is read at a layer
//! before that layer of the step has run.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Offer, Producer, ProducerAction, Push, Timer};
use crate::layout::KvLayout;
use crate::{BlockId, ErrorKind, LinkId, OfferId, PostId, Result, Time};

/// Chunks that a step of the engine completes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PushRange {
    /// The offer they belong to.
    pub offer: OfferId,
    /// The first of them.
    pub first_chunk: u32,
    /// For each chunk: the engine's blocks by group, [`NO_BLOCK`](crate::NO_BLOCK) where it has none.
    pub blocks: Vec<Arc<[Vec<BlockId>]>>,
}

impl PushRange {
    /// The chunks from `first_chunk` on whose blocks are in `tables`: for each group, the blocks of all those
    /// chunks, as an engine keeps them. Only the last chunk may be short.
    ///
    /// # Errors
    /// [`ErrorKind::Config`]: not one table a group, or tables of different numbers of chunks.
    pub fn new<T: AsRef<[BlockId]>>(
        layout: &KvLayout,
        offer: OfferId,
        first_chunk: u32,
        tables: &[T],
    ) -> Result<Self> {
        let bad = |about: String| Err(ErrorKind::Config.error(about));
        if tables.len() != layout.groups.len() {
            return bad(format!("{} block tables, {} groups", tables.len(), layout.groups.len()));
        }
        let mut chunks: Vec<Vec<Vec<BlockId>>> = Vec::new();
        for (at, (table, group)) in tables.iter().zip(&layout.groups).enumerate() {
            let parts = table.as_ref().chunks((layout.chunk_tokens / group.block_tokens) as usize);
            if at == 0 {
                chunks.resize_with(parts.len(), || Vec::with_capacity(tables.len()));
            } else if parts.len() != chunks.len() {
                let (parts, first) = (parts.len(), chunks.len());
                return bad(format!(
                    "blocks of {parts} chunks in group {at}, of {first} in group 0"
                ));
            }
            chunks.iter_mut().zip(parts).for_each(|(chunk, part)| chunk.push(part.to_vec()));
        }
        Ok(Self { offer, first_chunk, blocks: chunks.into_iter().map(Into::into).collect() })
    }
}

/// Where a chunk can be read.
#[derive(Clone, Debug, Default)]
pub(super) struct Source {
    blocks: Option<Arc<[Vec<BlockId>]>>,
    since: Option<Time>,
    /// The step that computes it; `None` once that step has ended.
    step: Option<u64>,
    /// It was named, and written to again before it was read.
    void: bool,
}

impl Source {
    fn voided(&mut self) {
        if self.is_held() {
            *self = Self { void: true, ..Self::default() };
        }
    }

    pub(super) fn is_void(&self) -> bool {
        self.void
    }

    pub(super) fn is_held(&self) -> bool {
        self.blocks.is_some()
    }

    pub(super) fn held_since(&self) -> Option<Time> {
        self.since
    }
}

/// The step under way, if any.
#[derive(Debug)]
pub(super) struct Step {
    number: u64,
    open: bool,
    layers: Vec<bool>,
    chunks: Vec<(OfferId, u32)>,
    /// Chunks whose offer has not arrived yet: the engine's two halves speak on different channels.
    early: HashMap<OfferId, Vec<(u32, Source)>>,
    /// The newest offer made, and who made it. An older one that is not known is over, not early.
    newest: Option<(LinkId, OfferId)>,
}

/// Offers that a step named and the scheduler half has not made yet, at most.
const EARLY_MAX: usize = 4096;

impl Step {
    pub(super) fn new(layers: usize) -> Self {
        Self {
            number: 0,
            open: false,
            layers: vec![false; layers],
            chunks: Vec::new(),
            early: HashMap::new(),
            newest: None,
        }
    }

    /// Whether that observer made this offer before: its numbers grow.
    pub(super) fn is_repeated(&self, observer: LinkId, offer: OfferId) -> bool {
        self.newest.is_some_and(|(link, newest)| link == observer && offer <= newest)
    }

    pub(super) fn claim_early(
        &mut self,
        observer: LinkId,
        offer: OfferId,
        count: usize,
    ) -> Vec<Source> {
        self.newest = Some((observer, offer));
        let mut sources = vec![Source::default(); count];
        for (chunk, source) in self.early.remove(&offer).unwrap_or_default() {
            if let Some(place) = sources.get_mut(chunk as usize) {
                *place = source;
            }
        }
        sources
    }

    /// The observer is gone; another one counts from elsewhere, and may have begun to.
    pub(super) fn forget_observer(&mut self, observer: LinkId) {
        if self.newest.is_none_or(|(link, _)| link == observer) {
            self.early.clear();
            self.newest = None;
        }
    }

    fn is_early(&self, offer: OfferId) -> bool {
        self.newest.is_none_or(|(_, newest)| offer > newest) && self.early.len() < EARLY_MAX
    }

    fn readable(&self, source: &Source, layer: usize) -> bool {
        source.is_held() && (source.step != Some(self.number) || !self.open || self.layers[layer])
    }
}

impl Producer {
    /// A step of the engine begins; it completes these chunks. A step that is still open ends first.
    pub fn begin_step(&mut self, now: Time, ranges: Vec<PushRange>) {
        self.end_step();
        self.step.number += 1;
        self.step.open = true;
        self.step.layers.fill(false);
        for PushRange { offer: id, first_chunk, blocks } in ranges {
            for (chunk, blocks) in (first_chunk..).zip(blocks) {
                let step = Some(self.step.number);
                let (blocks, since) = (Some(blocks), Some(now));
                let source = Source { blocks, since, step, void: false };
                self.step.chunks.push((id, chunk));
                match self.offers.get_mut(&id) {
                    Some(offer) => {
                        if let Some(place) = offer.sources.get_mut(chunk as usize) {
                            *place = source;
                        }
                    }
                    None if self.step.is_early(id) => {
                        self.step.early.entry(id).or_default().push((chunk, source));
                    }
                    None => {}
                }
            }
            if self.offers.contains_key(&id) {
                self.timers.set(now + self.config.hold, Timer::Hold(id));
            }
        }
        self.settle();
    }

    /// The step's chunks can be read at this layer (flat index).
    pub fn layer_ready(&mut self, layer: u32) {
        let Some(ready) = self.step.layers.get_mut(layer as usize) else { return };
        if !self.step.open || std::mem::replace(ready, true) {
            return;
        }
        for at in 0..self.step.chunks.len() {
            let (offer, chunk) = self.step.chunks[at];
            for index in 0..self.consumers.len() {
                self.post_layer(index, offer, chunk, layer);
            }
        }
    }

    /// The step's chunks can be read at every layer.
    pub fn end_step(&mut self) {
        if !std::mem::take(&mut self.step.open) {
            return;
        }
        for (offer, chunk) in std::mem::take(&mut self.step.chunks) {
            for index in 0..self.consumers.len() {
                self.post_ready(index, offer, chunk);
            }
        }
        self.settle();
    }

    /// The engine writes again to the blocks that it named by now: nothing more is read of them. A chunk that is
    /// posted as a whole ends as its posts do; the others are given up.
    pub fn void(&mut self) {
        self.step.open = false;
        self.step.chunks.clear();
        // Their offers are on the way.
        self.step.early.values_mut().flatten().for_each(|(_, source)| source.voided());
        let offers: Vec<OfferId> = self.offers.keys().copied().collect();
        for id in offers {
            for index in 0..self.consumers.len() {
                let Some(offer) = self.offers.get(&id) else { continue };
                let gone: Vec<bool> = offer
                    .sources
                    .iter()
                    .zip(&offer.pushes[index])
                    .map(|(source, push)| {
                        let whole = matches!(push, Push::Granted(writing) if writing.left == 0);
                        source.is_held() && !whole
                    })
                    .collect();
                self.withdraw_chunks(index, id, |chunk| gone[chunk]);
            }
            if let Some(offer) = self.offers.get_mut(&id) {
                offer.sources.iter_mut().for_each(Source::voided);
            }
        }
        self.settle();
    }

    /// Posts every layer of a chunk that can be read and has not been posted.
    pub(super) fn post_ready(&mut self, index: usize, offer: OfferId, chunk: u32) {
        for layer in 0..self.step.layers.len() as u32 {
            self.post_layer(index, offer, chunk, layer);
        }
    }

    fn post_layer(&mut self, index: usize, id: OfferId, chunk: u32, layer: u32) {
        let Some((link, peer)) = self.consumers[index].link else { return };
        let Some(Offer { chunks, sources, pushes, .. }) = self.offers.get_mut(&id) else { return };
        let (Some(Push::Granted(writing)), Some(source)) =
            (pushes[index].get_mut(chunk as usize), sources.get(chunk as usize))
        else {
            return;
        };
        let Some(blocks) = &source.blocks else { return };
        if writing.ending.is_some()
            || writing.peer != peer
            || writing.posted[layer as usize]
            || !self.step.readable(source, layer as usize)
        {
            return;
        }
        writing.posted[layer as usize] = true;
        writing.left -= 1;
        writing.in_flight += 1;
        let post = PostId(self.next_post);
        self.next_post += 1;
        self.posts.insert(post, (writing.peer, writing.grant, layer));
        self.actions.push_back(ProducerAction::Post {
            post,
            peer,
            link,
            grant: writing.grant,
            key: chunks[chunk as usize].key,
            layer,
            extents: Arc::clone(&writing.extents),
            blocks: Arc::clone(blocks),
        });
    }
}
