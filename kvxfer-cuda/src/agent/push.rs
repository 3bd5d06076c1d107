//! The producer's bytes: which transport reaches a peer, and posts in order.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvxfer_core::layout::KvLayout;
use kvxfer_core::plan::{LayerMemory, layer_writes};
use kvxfer_core::pool::Extent;
use kvxfer_core::session::Producer;
use kvxfer_core::transport::{Completion, Post, SegmentHandle, Transport, Write};
use kvxfer_core::{
    BlockId, ChunkKey, Error, ErrorKind, GrantId, Incarnation, PostId, Result, SegmentId, sum,
};

use crate::memory::Regions;
use crate::transport::{Local, Shm};

/// A post that the transport has not accepted yet.
pub(super) struct Waiting {
    pub(super) post: PostId,
    pub(super) peer: Incarnation,
    pub(super) grant: GrantId,
    pub(super) key: ChunkKey,
    pub(super) layer: u32,
    pub(super) extents: Arc<[Extent]>,
    pub(super) blocks: Arc<[Vec<BlockId>]>,
}

/// All transports of an agent, and what waits for them.
pub(super) struct Pushes {
    layout: KvLayout,
    memory: Vec<LayerMemory>,
    transports: Vec<Box<dyn Transport>>,
    /// Which transport reaches a peer, as its first segment said.
    paths: HashMap<Incarnation, usize>,
    waiting: VecDeque<Waiting>,
    writes: Vec<Write>,
    completions: Vec<Completion>,
    pub(super) bytes: u64,
    pub(super) posts: u64,
    pub(super) runs: u64,
}

impl Pushes {
    pub(super) fn new(layout: KvLayout, regions: Arc<Regions>, memory: Vec<LayerMemory>) -> Self {
        Self {
            layout,
            memory,
            transports: vec![
                Box::new(Local::new(Arc::clone(&regions))),
                Box::new(Shm::new(regions)),
            ],
            paths: HashMap::new(),
            waiting: VecDeque::new(),
            writes: Vec::new(),
            completions: Vec::new(),
            bytes: 0,
            posts: 0,
            runs: 0,
        }
    }

    /// A peer opens one of its segments to us.
    pub(super) fn attach(
        &mut self,
        peer: Incarnation,
        segment: SegmentId,
        name: &str,
        blob: Vec<u8>,
        bytes: u64,
        fds: Vec<OwnedFd>,
    ) -> Result<()> {
        let found = self.transports.iter().position(|transport| transport.name() == name);
        let index = found.ok_or_else(|| {
            ErrorKind::NoPath.error(format!("peer {peer} offers path {name:?}, unknown here"))
        })?;
        self.paths.insert(peer, index);
        self.transports[index].attach(peer, segment, SegmentHandle { blob, bytes, fds })
    }

    pub(super) fn detach(&mut self, peer: Incarnation, segment: Option<SegmentId>) {
        if let Some(&index) = self.paths.get(&peer) {
            self.transports[index].detach(peer, segment);
        }
        if segment.is_none() {
            self.paths.remove(&peer);
        }
    }

    pub(super) fn enqueue(&mut self, post: Waiting) {
        self.waiting.push_back(post);
    }

    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.transports.iter().all(|transport| transport.pending() == 0)
    }

    /// Hands over what waits, moves about `budget` bytes, and tells the producer what ended.
    pub(super) fn progress(&mut self, budget: u64, producer: &mut Producer) {
        while let Some(next) = self.waiting.front() {
            let id = next.post;
            match self.submit() {
                Ok(()) => {}
                Err(error) if error.retryable() => break,
                Err(error) => {
                    tracing::warn!(%error, "a write was refused");
                    producer.posted(id, Err(error));
                }
            }
            self.waiting.pop_front();
        }
        for transport in &mut self.transports {
            if transport.pending() > 0 {
                transport.poll(budget, &mut self.completions);
            }
        }
        for Completion { id, result, .. } in self.completions.drain(..) {
            producer.posted(id, result);
        }
    }

    /// Offers the first waiting post to its transport.
    fn submit(&mut self) -> Result<()> {
        let Some(next) = self.waiting.front() else { return Ok(()) };
        let transport = self.paths.get(&next.peer).map(|&index| &mut self.transports[index]);
        let transport = transport.ok_or_else(|| gone(next.peer))?;
        let (group, layer) = self.layout.layer(next.layer).ok_or_else(|| no_layer(next.layer))?;
        let blocks = next.blocks.get(usize::from(group)).ok_or_else(|| no_layer(next.layer))?;
        self.writes.clear();
        let memory = &self.memory[next.layer as usize];
        layer_writes(&self.layout, next.layer, memory, &next.extents, blocks, &mut self.writes)?;
        let bytes: u64 = self.writes.iter().map(|write| write.len).sum();
        let seed = sum::seed(&next.key, layer, group, next.grant, bytes);
        let post = Post { id: next.post, peer: next.peer, seed, writes: &self.writes };
        transport.post(post)?;
        self.bytes += bytes;
        self.posts += 1;
        self.runs += self.writes.len() as u64;
        Ok(())
    }
}

fn gone(peer: Incarnation) -> Error {
    ErrorKind::PeerLost.error(format!("peer {peer} is gone"))
}

fn no_layer(layer: u32) -> Error {
    ErrorKind::OutOfBounds.error(format!("there is no layer {layer}"))
}
