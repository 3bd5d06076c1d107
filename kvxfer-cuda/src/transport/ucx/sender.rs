//! The producer's end.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::Arc;

use kvxfer_core::path::PathName;
use kvxfer_core::sum::words;
use kvxfer_core::transport::{Completion, Post, RegionId, SegmentHandle, Transport, Write};
use kvxfer_core::{Error, ErrorKind, Incarnation, PostId, Result, SegmentId};

use super::handle::Handle;
use super::{NAME, STEPS, Secret, lanes, message, read_message};
use crate::identity;
use crate::memory::{Regions, inside};
use crate::transport::mapped::{POSTS, WRITES, full};
use crate::transport::overlap::Overlap;
use crate::transport::tcp::sum;
use crate::ucx::{
    Context, EndpointId, Event, KeyId, Memory, Registration, RemoteAddress, SourceId, Worker,
};

/// What a put costs of the budget at least.
const PUT_COST: u64 = 1 << 10;

/// Puts into what [`UcxTarget`](super::UcxTarget)s show. A poll begins posts, whole ones; their bytes move by
/// themselves where there is RDMA, and in polls elsewhere.
pub struct Ucx {
    worker: Worker,
    address: RemoteAddress,
    regions: Arc<Regions>,
    /// By region.
    sources: Vec<SourceId>,
    peers: HashMap<Incarnation, Peer>,
    /// Accepted, and not begun.
    waiting: VecDeque<Queued>,
    /// Begun, by number.
    batches: HashMap<u64, Batch>,
    last_batch: u64,
    /// Connections that were closed, and why. Their batches end when nothing of them is under way.
    closing: Vec<(EndpointId, Error)>,
    /// Accepted and not ended; their writes.
    posts: usize,
    writes: usize,
    ended: Vec<Completion>,
    /// Peers that nobody let go of and that are lost.
    lost: Vec<(Incarnation, Error)>,
    overlap: Overlap,
}

struct Peer {
    end: EndpointId,
    /// What its answers show.
    secret: Secret,
    segments: HashMap<SegmentId, Segment>,
    /// Why the connection is no more.
    lost: Option<Error>,
}

#[derive(Clone, Copy)]
struct Segment {
    key: KeyId,
    bytes: u64,
}

struct Queued {
    id: PostId,
    peer: Incarnation,
    seed: u64,
    writes: Vec<Write>,
    /// Of its bytes, when they were put.
    sum: u64,
    /// A segment that it names was attached anew since.
    spoilt: bool,
}

/// Posts of one peer that end together.
struct Batch {
    peer: Incarnation,
    end: EndpointId,
    secret: Secret,
    posts: Vec<Queued>,
    /// The flush has ended: an answer is awaited.
    flushed: bool,
}

impl Queued {
    fn names(&self, peer: Incarnation, segment: Option<SegmentId>) -> bool {
        let named = |segment| self.writes.iter().any(|write| write.segment == segment);
        self.peer == peer && segment.is_none_or(named)
    }
}

impl Ucx {
    /// Writes from these regions.
    ///
    /// # Errors
    /// UCX's; the regions can't be registered, say.
    pub fn new(context: &Arc<Context>, regions: Arc<Regions>) -> Result<Self> {
        let mut worker = Worker::new(context)?;
        let source = |id| {
            let memory = Memory::Region(Arc::clone(&regions), RegionId(id));
            worker.source(Arc::new(Registration::source(context, memory)?))
        };
        let sources = (0..regions.len() as u32).map(source).collect::<Result<_>>()?;
        let address = worker.address()?;
        Ok(Self {
            worker,
            address,
            regions,
            sources,
            peers: HashMap::new(),
            waiting: VecDeque::new(),
            batches: HashMap::new(),
            last_batch: 0,
            closing: Vec::new(),
            posts: 0,
            writes: 0,
            ended: Vec::new(),
            lost: Vec::new(),
            overlap: Overlap::default(),
        })
    }

    /// Lets UCX work, and hears what happened.
    fn work(&mut self) {
        let mut steps = 0..STEPS;
        while self.worker.progress() && steps.next().is_some() {}
        while let Some(event) = self.worker.next_event() {
            match event {
                Event::Done { token, result } => self.moved(token, result),
                Event::Message(pong) => self.answered(&pong),
                Event::Lost(end, why) => self.broke(end, why),
            }
        }
        let worker = &self.worker;
        let closed: Vec<_> = self.closing.extract_if(.., |(end, _)| !worker.closes(*end)).collect();
        for (end, why) in closed {
            let batches: Vec<_> = self.batches.extract_if(|_, batch| batch.end == end).collect();
            for post in batches.into_iter().flat_map(|(_, batch)| batch.posts) {
                self.end(&post, Err(why.clone()));
            }
        }
    }

    /// A flush has ended, or a ping has left.
    fn moved(&mut self, number: u64, result: Result<()>) {
        let Some(batch) = self.batches.get_mut(&number) else { return };
        let end = batch.end;
        let result = match result {
            Ok(()) if !batch.flushed => {
                batch.flushed = true;
                self.worker.send(end, &message(number, &batch.secret), number)
            }
            result => result,
        };
        if let Err(why) = result {
            self.broke(end, why);
        }
    }

    /// A consumer sees all bytes of a batch.
    fn answered(&mut self, pong: &[u8]) {
        let Some((number, secret)) = read_message(pong) else { return };
        let fits = |batch: &Batch| batch.flushed && batch.secret == secret;
        if !self.batches.get(&number).is_some_and(fits) {
            return;
        }
        for post in self.batches.remove(&number).into_iter().flat_map(|batch| batch.posts) {
            let result = match post.spoilt {
                false => Ok(post.sum),
                true => Err(let_go(post.id, post.peer)),
            };
            self.end(&post, result);
        }
    }

    fn end(&mut self, post: &Queued, result: Result<u64>) {
        self.posts -= 1;
        self.writes -= post.writes.len();
        self.ended.push(Completion { id: post.id, peer: post.peer, result });
    }

    /// Ends the posts that were not begun and name a segment of a peer, or any.
    fn drop_waiting(
        &mut self,
        peer: Incarnation,
        segment: Option<SegmentId>,
        why: impl Fn(&Queued) -> Error,
    ) {
        let waiting = std::mem::take(&mut self.waiting);
        let (named, others) = waiting.into_iter().partition(|post| post.names(peer, segment));
        self.waiting = others;
        let named: VecDeque<Queued> = named;
        for post in named {
            let error = why(&post);
            self.end(&post, Err(error));
        }
    }

    /// A connection broke: its peer is lost, if it has no other.
    fn broke(&mut self, end: EndpointId, why: Error) {
        let of_it = |(_, peer): &(&Incarnation, &mut Peer)| peer.end == end && peer.lost.is_none();
        let Some((&name, peer)) = self.peers.iter_mut().find(of_it) else { return };
        peer.segments.clear();
        peer.lost = Some(why.clone());
        self.lost.push((name, why.clone()));
        self.close(name, end, why);
    }

    /// Forgets a peer; its posts end.
    fn forget(&mut self, name: Incarnation, why: &str) {
        self.lost.retain(|(peer, _)| *peer != name);
        if let Some(peer) = self.peers.remove(&name).filter(|peer| peer.lost.is_none()) {
            self.close(name, peer.end, ErrorKind::PeerLost.error(why));
        }
    }

    fn close(&mut self, name: Incarnation, end: EndpointId, why: Error) {
        self.drop_waiting(name, None, |_| why.clone());
        self.worker.close(end);
        self.closing.push((end, why));
    }

    /// Ends the posts that name a segment and were not begun; those that were are finished.
    fn let_go(&mut self, peer: Incarnation, segment: SegmentId) {
        let found = self.peers.get_mut(&peer).and_then(|peer| peer.segments.remove(&segment));
        if let Some(Segment { key, .. }) = found {
            self.worker.close_key(key);
        }
        self.drop_waiting(peer, Some(segment), |post| let_go(post.id, peer));
    }

    /// Checks each write of a post.
    fn check(&mut self, peer: &Incarnation, writes: &[Write]) -> Result<()> {
        let unknown = |what: String| ErrorKind::NotFound.error(format!("{what} is not attached"));
        let Some(found) = self.peers.get(peer) else {
            return Err(unknown(format!("peer {peer}")));
        };
        if let Some(why) = &found.lost {
            return Err(why.clone());
        }
        for &Write { region, src, segment, dst, len } in writes {
            let bytes = match found.segments.get(&segment) {
                Some(segment) => segment.bytes,
                None => return Err(unknown(format!("segment {segment} of peer {peer}"))),
            };
            self.regions.at(region, src, len)?;
            if !inside(bytes, dst, len) {
                return Err(ErrorKind::OutOfBounds
                    .error(format!("{len} bytes from {dst} leave a segment of {bytes} bytes")));
            }
        }
        self.overlap.refuse(writes)
    }

    /// Begins posts, and then has each peer's flushed.
    fn begin(&mut self, mut budget: u64) {
        let mut begun: HashMap<EndpointId, u64> = HashMap::new();
        while budget > 0
            && let Some(mut post) = self.waiting.pop_front()
        {
            // Posts of a peer that is gone don't wait.
            let Some(peer) = self.peers.get(&post.peer) else {
                self.end(&post, Err(let_go(post.id, post.peer)));
                continue;
            };
            let (end, secret) = (peer.end, peer.secret);
            let bytes: u64 = post.writes.iter().map(|write| write.len.max(PUT_COST)).sum();
            budget = budget.saturating_sub(bytes);
            let put = self.put(&mut post);
            let number = *begun.entry(end).or_insert_with(|| {
                self.last_batch += 1;
                self.last_batch
            });
            let batch = self.batches.entry(number).or_insert_with(|| Batch {
                peer: post.peer,
                end,
                secret,
                posts: Vec::new(),
                flushed: false,
            });
            batch.posts.push(post);
            if let Err(why) = put {
                self.broke(end, why);
            }
        }
        for (end, number) in begun {
            // One that broke has none any more.
            if let Err(why) = self.worker.flush(end, number) {
                self.broke(end, why);
            }
        }
    }

    /// Puts all of a post.
    fn put(&mut self, post: &mut Queued) -> Result<()> {
        let mut index = 0;
        for write in post.writes.iter().filter(|write| write.len > 0) {
            let &Write { region, src, segment, dst, len } = write;
            let found = self.peers.get(&post.peer).and_then(|peer| peer.segments.get(&segment));
            let key = found.ok_or_else(|| let_go(post.id, post.peer))?.key;
            let part = sum(&self.regions, region, src, len, post.seed, index)?;
            post.sum = post.sum.wrapping_add(part);
            index = index.wrapping_add(words(len));
            let source = self.sources.get(region.0 as usize).copied().ok_or_else(|| {
                ErrorKind::NotFound.error(format!("region {} is not registered", region.0))
            })?;
            self.worker.put(key, dst, source, src, len)?;
        }
        Ok(())
    }
}

impl Transport for Ucx {
    fn name(&self) -> PathName {
        NAME
    }

    /// The worker's address, and so the version of UCX.
    fn ability(&self) -> std::result::Result<Vec<u8>, String> {
        Ok(self.address.to_bytes())
    }

    fn attach(
        &mut self,
        peer: Incarnation,
        segment: SegmentId,
        handle: SegmentHandle,
    ) -> Result<()> {
        let Handle { address, memory } = Handle::decode(&handle)?;
        if let Some(address) = address {
            self.forget(peer, &format!("peer {peer} is to be connected to anew"));
            let secret = identity::token()?;
            let end = self.worker.connect(&address)?;
            let segments = HashMap::new();
            self.peers.insert(peer, Peer { end, secret, segments, lost: None });
        }
        self.let_go(peer, segment);
        let found = self.peers.get_mut(&peer).ok_or_else(|| {
            ErrorKind::PeerLost.error(format!(
                "segment {segment} of peer {peer} comes without a way to connect, and nothing is connected"
            ))
        })?;
        if let Some(why) = &found.lost {
            return Err(why.clone());
        }
        let key = self.worker.open_key(found.end, &memory)?;
        found.segments.insert(segment, Segment { key, bytes: memory.bytes() });
        let begun = self.batches.values_mut().flat_map(|batch| &mut batch.posts);
        begun.filter(|post| post.names(peer, Some(segment))).for_each(|post| post.spoilt = true);
        Ok(())
    }

    fn detach(&mut self, peer: Incarnation, segment: Option<SegmentId>) {
        match segment {
            Some(segment) => self.let_go(peer, segment),
            // It may be one that answers nothing any more, so it is not waited for.
            None => {
                let why = format!("{NAME} let go of peer {peer} with posts under way");
                self.forget(peer, &why);
            }
        }
    }

    fn holds(&self, peer: Incarnation, segment: Option<SegmentId>) -> bool {
        let attached = self.peers.get(&peer).is_some_and(|peer| match segment {
            Some(segment) => peer.segments.contains_key(&segment),
            None => !peer.segments.is_empty(),
        });
        let begun = self.batches.values().filter(|batch| batch.peer == peer);
        let mut posts = begun.flat_map(|batch| &batch.posts).chain(&self.waiting);
        attached || posts.any(|post| post.names(peer, segment))
    }

    fn post(&mut self, post: Post<'_>) -> Result<()> {
        let Post { id, peer, seed, writes, grant: _ } = post;
        let room = self.writes + writes.len() <= WRITES && self.posts < POSTS;
        if !room && self.posts > 0 {
            return Err(full(NAME, self.posts, self.writes));
        }
        self.check(&peer, writes)?;
        self.posts += 1;
        self.writes += writes.len();
        let queued = Queued { id, peer, seed, writes: writes.to_vec(), sum: 0, spoilt: false };
        if writes.iter().all(|write| write.len == 0) {
            self.end(&queued, Ok(0));
        } else {
            self.waiting.push_back(queued);
        }
        Ok(())
    }

    fn poll(&mut self, budget: u64, out: &mut Vec<Completion>) {
        self.work();
        self.begin(budget);
        out.append(&mut self.ended);
    }

    fn lost(&mut self) -> Option<(Incarnation, Error)> {
        self.lost.pop()
    }

    fn pending(&self) -> usize {
        self.posts + self.ended.len()
    }

    fn rests(&mut self) -> bool {
        self.work();
        self.waiting.is_empty()
            && self.ended.is_empty()
            && self.lost.is_empty()
            && self.worker.arm() == Ok(true)
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.worker.as_fd())
    }

    fn lanes(&self, peer: Incarnation) -> Option<String> {
        lanes(&self.worker, self.peers.get(&peer)?.end)
    }
}

fn let_go(post: PostId, peer: Incarnation) -> Error {
    ErrorKind::PeerLost
        .error(format!("{NAME} let go of a segment of peer {peer} with post {post} under way"))
}

impl std::fmt::Debug for Ucx {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ucx").field("peers", &self.peers.len()).field("posts", &self.posts).finish()
    }
}
