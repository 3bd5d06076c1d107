//! The producer's bytes: which transport reaches a peer, and posts in order.

use std::collections::{HashMap, VecDeque};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvxfer_core::layout::KvLayout;
use kvxfer_core::path::{Ability, PathName};
use kvxfer_core::plan::layer_writes;
use kvxfer_core::pool::Extent;
use kvxfer_core::session::Producer;
use kvxfer_core::transport::{Completion, PROBE_BYTES, Post, SegmentHandle, Transport, Write};
use kvxfer_core::wire::Message;
use kvxfer_core::{
    BlockId, ChunkKey, Error, ErrorKind, GrantId, Incarnation, LinkId, PostId, Result, SegmentId,
    sum,
};

use super::gpu::ReadGate;
use super::register::{PATTERN_BYTES, Registered};
use crate::driver::Event;
use crate::transport::CudaIpc;

/// Numbers of posts from here on are ours, not the state machine's.
const PROBES: u64 = 1 << 63;

/// A layer of a chunk whose post the transport has not accepted yet.
pub(super) struct Layer {
    pub(super) post: PostId,
    pub(super) peer: Incarnation,
    pub(super) grant: GrantId,
    pub(super) key: ChunkKey,
    pub(super) layer: u32,
    pub(super) extents: Arc<[Extent]>,
    pub(super) blocks: Arc<[Vec<BlockId>]>,
}

/// A segment that a peer shows us.
pub(super) struct Shown {
    pub(super) link: LinkId,
    pub(super) peer: Incarnation,
    pub(super) segment: SegmentId,
    pub(super) probe: u64,
    pub(super) path: PathName,
    pub(super) handle: SegmentHandle,
}

/// Bytes of ours at the end of a segment that we were shown.
struct Probe {
    link: LinkId,
    peer: Incarnation,
    segment: SegmentId,
    number: u64,
    write: Write,
    /// When it was posted, if nothing else was on its way.
    posted: Option<Instant>,
}

/// A segment that is let go: its owner is told when nothing of it is held.
struct Retiring {
    link: LinkId,
    peer: Incarnation,
    segment: SegmentId,
    generation: u32,
}

/// What follows from the bytes that moved, beside what the state machine makes of them.
pub(super) enum News {
    /// To be sent, before whatever the state machine sends next.
    Say(LinkId, Message),
    /// The bytes of a probe took so long; 0 if others were on their way.
    Probed(LinkId, u64),
    /// Nothing can be written to that link's peer.
    Unreachable(LinkId, Error),
}

/// A transport.
pub(super) enum Way {
    /// It reads host memory, which has been written to when the engine says so.
    Host(Box<dyn Transport>),
    /// They move by themselves, after events of the engine's streams, and wake this thread.
    Gpu(Box<CudaIpc>),
}

impl Way {
    fn get(&self) -> &dyn Transport {
        match self {
            Self::Host(transport) => &**transport,
            Self::Gpu(transport) => &**transport,
        }
    }

    fn get_mut(&mut self) -> &mut dyn Transport {
        match self {
            Self::Host(transport) => &mut **transport,
            Self::Gpu(transport) => &mut **transport,
        }
    }
}

enum Waiting {
    Layer(Layer),
    Probe(PostId),
}

/// All transports of an agent, and what waits for them.
pub(super) struct Pushes {
    layout: KvLayout,
    registered: Registered,
    ways: Vec<Way>,
    /// Paths that we can't have, and why.
    unable: Vec<Ability>,
    /// Which transport reaches a peer, as its first segment said, and the link that it was shown on.
    paths: HashMap<Incarnation, (usize, LinkId)>,
    waiting: VecDeque<Waiting>,
    /// Probes that have not ended and are still of use.
    probes: HashMap<PostId, Probe>,
    next_probe: u64,
    retiring: Vec<Retiring>,
    writes: Vec<Write>,
    /// Layers that were written before the probes of their peer had ended.
    completions: Vec<Completion>,
    pub(super) bytes: u64,
    pub(super) posts: u64,
    pub(super) runs: u64,
}

impl Pushes {
    pub(super) fn new(
        layout: KvLayout,
        registered: Registered,
        ways: Vec<Way>,
        unable: Vec<Ability>,
    ) -> Self {
        Self {
            layout,
            registered,
            ways,
            unable,
            paths: HashMap::new(),
            waiting: VecDeque::new(),
            probes: HashMap::new(),
            next_probe: 0,
            retiring: Vec::new(),
            writes: Vec::new(),
            completions: Vec::new(),
            bytes: 0,
            posts: 0,
            runs: 0,
        }
    }

    /// A peer opens one of its segments to us: the first thing that is written there is a probe.
    pub(super) fn attach(&mut self, shown: Shown) -> Result<()> {
        let Shown { link, peer, segment, probe: number, path, handle } = shown;
        let found = self.ways.iter().position(|way| way.get().name() == path);
        let index = found.ok_or_else(|| {
            ErrorKind::NoPath
                .error(format!("peer {peer} offers path {path}, unknown where our KV lies"))
                .fix("set kv_buffer_device to the same on both sides")
        })?;
        let dst = handle.bytes.checked_sub(PROBE_BYTES).ok_or_else(|| {
            ErrorKind::Protocol.error(format!("a segment of {} bytes is too short", handle.bytes))
        })?;
        self.forget(peer, Some(segment));
        let first = self.paths.insert(peer, (index, link)).is_none();
        let transport = self.ways[index].get_mut();
        transport.attach(peer, segment, handle)?;
        if first && let Some(lanes) = transport.lanes(peer) {
            tracing::info!(%peer, %path, "KV goes to a consumer over {lanes}");
        }

        let post = PostId(PROBES | self.next_probe);
        // The bytes differ from those of the last probes, which may still lie there.
        let src = self.next_probe * 8 % (PATTERN_BYTES - PROBE_BYTES);
        self.next_probe += 1;
        let write = Write { region: self.registered.pattern, src, segment, dst, len: PROBE_BYTES };
        self.probes.insert(post, Probe { link, peer, segment, number, write, posted: None });
        self.waiting.push_back(Waiting::Probe(post));
        Ok(())
    }

    /// Lets go of a segment, and says so when that is done, unless it is shown again before.
    pub(super) fn retire(
        &mut self,
        link: LinkId,
        peer: Incarnation,
        segment: SegmentId,
        generation: u32,
    ) {
        self.detach(peer, Some(segment));
        self.retiring.push(Retiring { link, peer, segment, generation });
    }

    /// The peer is gone, or not to be written to any more.
    pub(super) fn let_go(&mut self, peer: Incarnation) {
        self.detach(peer, None);
        self.paths.remove(&peer);
    }

    fn detach(&mut self, peer: Incarnation, segment: Option<SegmentId>) {
        self.forget(peer, segment);
        if let Some(&(index, _)) = self.paths.get(&peer) {
            self.ways[index].get_mut().detach(peer, segment);
        }
    }

    /// Nobody asks any more for an answer about that segment, or about any of that peer.
    fn forget(&mut self, peer: Incarnation, segment: Option<SegmentId>) {
        let other = |owner: Incarnation, id: SegmentId| {
            owner != peer || segment.is_some_and(|segment| segment != id)
        };
        self.probes.retain(|_, probe| other(probe.peer, probe.segment));
        self.retiring.retain(|retiring| other(retiring.peer, retiring.segment));
    }

    /// Lets go of everything: what has not begun will not.
    pub(super) fn close(&mut self) {
        let peers: Vec<Incarnation> = self.paths.keys().copied().collect();
        peers.into_iter().for_each(|peer| self.let_go(peer));
        if let Some(gpu) = self.gpu() {
            gpu.copier().give_up(&super::closed());
        }
    }

    /// Whether it is known that nothing is under way; if not, nothing waits for it any more, and the memory is kept.
    pub(super) fn has_ended(&mut self) -> bool {
        let ended = |way: &mut Way| match way {
            Way::Host(transport) => transport.pending() == 0,
            Way::Gpu(gpu) => gpu.copier().drain(Duration::ZERO).is_ok(),
        };
        self.ways.iter_mut().all(ended)
    }

    fn gpu(&mut self) -> Option<&mut CudaIpc> {
        self.ways.iter_mut().find_map(|way| match way {
            Way::Gpu(gpu) => Some(&mut **gpu),
            Way::Host(_) => None,
        })
    }

    /// What an engine's thread needs to keep us from reading what it is about to write to.
    pub(super) fn gate(&mut self) -> Option<ReadGate> {
        let copier = self.gpu()?.copier();
        Some(ReadGate { gate: Arc::clone(copier.gate()), launched: Arc::clone(copier.launched()) })
    }

    /// What is posted from now on is read after that event. A device that fails says so for each post.
    pub(super) fn wait_for(&mut self, event: &Arc<Event>) {
        if let Some(gpu) = self.gpu() {
            let _ = gpu.copier().wait_for(event);
        }
    }

    /// What has not begun will not: its blocks are written to again.
    pub(super) fn void(&mut self, shut: u64, producer: &mut Producer) {
        let error = ErrorKind::Closed.error("the engine uses the blocks for something else");
        self.waiting.retain(|waiting| match waiting {
            Waiting::Probe(_) => true,
            Waiting::Layer(layer) => {
                producer.posted(layer.post, Err(error.clone()));
                false
            }
        });
        if let Some(gpu) = self.gpu() {
            gpu.copier().void(shut);
        }
    }

    pub(super) fn enqueue(&mut self, layer: Layer) {
        self.waiting.push_back(Waiting::Layer(layer));
    }

    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty()
            && self.retiring.is_empty()
            && self.completions.is_empty()
            && self.ways.iter().all(|way| way.get().pending() == 0)
    }

    /// Whether there is something to do before anything else happens. What a GPU does ends with a wake-up.
    pub(super) fn is_busy(&mut self) -> bool {
        let pending = |way: &Way| way.get().pending() > 0;
        let waits = !self.waiting.is_empty() || !self.retiring.is_empty();
        (waits && !self.ways.iter().any(pending))
            || self.completions.iter().any(|layer| !self.is_early(layer))
            || self.ways.iter_mut().any(|way| !way.get_mut().rests())
    }

    /// What each of the transports says of itself.
    pub(super) fn abilities(&self) -> Vec<Ability> {
        let ways = self.ways.iter().map(Way::get);
        ways.map(|way| Ability { path: way.name().as_str().into(), able: way.ability() })
            .chain(self.unable.iter().cloned())
            .collect()
    }

    /// Which of its ways the path to a peer takes; see [`Transport::lanes`].
    pub(super) fn lanes(&self, peer: Incarnation) -> Option<String> {
        let &(index, _) = self.paths.get(&peer)?;
        self.ways[index].get().lanes(peer)
    }

    /// What the thread has to wait for beside its own sockets.
    pub(super) fn event_fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.ways.iter().filter_map(|way| way.get().event_fd())
    }

    /// Hands over what waits, moves about `budget` bytes, and tells the producer what ended.
    pub(super) fn progress(&mut self, budget: u64, producer: &mut Producer, news: &mut Vec<News>) {
        while let Some(next) = self.waiting.front() {
            let id = match next {
                Waiting::Layer(layer) => layer.post,
                Waiting::Probe(post) => *post,
            };
            match self.submit() {
                Ok(()) => {}
                Err(error) if error.retryable() => break,
                Err(error) => {
                    tracing::warn!(%error, "a write was refused");
                    self.ended(id, Err(error), producer, news);
                }
            }
            self.waiting.pop_front();
        }
        let mut completions = std::mem::take(&mut self.completions);
        for way in &mut self.ways {
            if way.get().pending() > 0 || way.get().event_fd().is_some() {
                way.get_mut().poll(budget, &mut completions);
            }
            while let Some((peer, error)) = way.get_mut().lost() {
                if let Some(&(_, link)) = self.paths.get(&peer) {
                    news.push(News::Unreachable(link, error));
                }
            }
        }
        for Completion { id, result, .. } in completions.extract_if(.., |end| is_probe(end.id)) {
            self.ended(id, result, producer, news);
        }
        for Completion { id, result, .. } in completions.extract_if(.., |end| !self.is_early(end)) {
            producer.posted(id, result);
        }
        self.completions = completions;
        let (ways, paths) = (&self.ways, &self.paths);
        self.retiring.retain(|&Retiring { link, peer, segment, generation }| {
            let held =
                paths.get(&peer).is_some_and(|&(at, _)| ways[at].get().holds(peer, Some(segment)));
            if !held {
                news.push(News::Say(link, Message::Retired { segment, generation }));
            }
            held
        });
    }

    /// Nothing is committed before the consumer was told of its probes, which may take another connection, and longer.
    fn is_early(&self, layer: &Completion) -> bool {
        layer.result.is_ok() && self.probes.values().any(|probe| probe.peer == layer.peer)
    }

    fn ended(
        &mut self,
        id: PostId,
        result: Result<u64>,
        producer: &mut Producer,
        news: &mut Vec<News>,
    ) {
        if !is_probe(id) {
            return producer.posted(id, result);
        }
        let Some(&Probe { link, segment, number: probe, posted, .. }) = self.probes.get(&id) else {
            return;
        };
        match result {
            Ok(sum) => {
                let nanos = posted.map_or(0, |posted| posted.elapsed().as_nanos());
                let nanos = u64::try_from(nanos).unwrap_or(0);
                news.push(News::Probed(link, nanos));
                news.push(News::Say(link, Message::Probed { segment, probe, sum, nanos }));
            }
            // It reads nothing of the engine's, and only went with the rest.
            Err(error) if error.kind() == ErrorKind::Closed => {
                return self.waiting.push_back(Waiting::Probe(id));
            }
            Err(error) => news.push(News::Unreachable(link, error)),
        }
        self.probes.remove(&id);
    }

    /// Offers the first waiting post to its transport.
    fn submit(&mut self) -> Result<()> {
        self.writes.clear();
        let (id, peer, grant, seed) = match self.waiting.front() {
            None => return Ok(()),
            Some(Waiting::Probe(post)) => {
                let Some(probe) = self.probes.get(post) else { return Ok(()) };
                self.writes.push(probe.write);
                (*post, probe.peer, None, probe.number)
            }
            Some(Waiting::Layer(next)) => {
                let none = || no_layer(next.layer);
                let (group, layer) = self.layout.layer(next.layer).ok_or_else(none)?;
                let blocks = next.blocks.get(usize::from(group)).ok_or_else(none)?;
                let memory = &self.registered.layers[next.layer as usize];
                let (extents, writes) = (&next.extents, &mut self.writes);
                layer_writes(&self.layout, next.layer, memory, extents, blocks, writes)?;
                let bytes: u64 = self.writes.iter().map(|write| write.len).sum();
                let seed = sum::seed(&next.key, layer, group, next.grant, bytes);
                (next.post, next.peer, Some(next.grant), seed)
            }
        };
        let transport = self.paths.get(&peer).map(|&(at, _)| self.ways[at].get_mut());
        let transport = transport.ok_or_else(|| gone(peer))?;
        let alone = transport.pending() == 0;
        transport.post(Post { id, peer, grant, seed, writes: &self.writes })?;
        if alone && let Some(probe) = self.probes.get_mut(&id) {
            probe.posted = Some(Instant::now());
        }
        if !is_probe(id) {
            self.bytes += self.writes.iter().map(|write| write.len).sum::<u64>();
            self.posts += 1;
            self.runs += self.writes.len() as u64;
        }
        Ok(())
    }
}

fn is_probe(id: PostId) -> bool {
    id.0 & PROBES != 0
}

fn gone(peer: Incarnation) -> Error {
    ErrorKind::PeerLost.error(format!("peer {peer} is gone"))
}

fn no_layer(layer: u32) -> Error {
    ErrorKind::OutOfBounds.error(format!("there is no layer {layer}"))
}
