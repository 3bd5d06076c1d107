//! The producer's end.

use std::collections::{HashMap, VecDeque};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvxfer_core::path::PathName;
use kvxfer_core::transport::{Completion, Post, SegmentHandle, Transport};
use kvxfer_core::{Error, ErrorKind, Incarnation, PostId, Result, SegmentId};

use super::blob::Blob;
use super::peer::{Peer, Segment, peer_and_stream, token};
use super::queue::{Queue, Queued};
use super::stream::{Phase, Stream, Turn, unreachable};
use super::{NAME, OPEN};
use crate::memory::Regions;
use crate::transport::mapped::{POSTS, WRITES, full};
use crate::transport::overlap::Overlap;
use crate::transport::watch::{ALARM, Ready, Watch};

/// Sends to [`TcpTarget`](super::TcpTarget)s. The caller's thread does all of it, in [`Transport::poll`].
pub struct Tcp {
    own: Incarnation,
    regions: Arc<Regions>,
    watch: Watch,
    events: Vec<Ready>,
    numbers: HashMap<Incarnation, u64>,
    peers: HashMap<u64, Peer>,
    last_number: u64,
    /// Streams that have something to send, and room for it as far as is known.
    ready: VecDeque<u64>,
    /// Accepted and not ended; their writes.
    posts: usize,
    writes: usize,
    ended: Vec<Completion>,
    /// Peers that nobody let go of and that are lost.
    lost: Vec<(Incarnation, Error)>,
    overlap: Overlap,
    /// How long a connection may take.
    pub(super) open: Duration,
}

impl Tcp {
    /// Writes from these regions, as this incarnation.
    ///
    /// # Errors
    /// `Io`: no descriptors are left.
    pub fn new(own: Incarnation, regions: Arc<Regions>) -> Result<Self> {
        Ok(Self {
            own,
            regions,
            watch: Watch::new()?,
            events: Vec::new(),
            numbers: HashMap::new(),
            peers: HashMap::new(),
            last_number: 0,
            ready: VecDeque::new(),
            posts: 0,
            writes: 0,
            ended: Vec::new(),
            lost: Vec::new(),
            overlap: Overlap::default(),
            open: OPEN,
        })
    }

    #[cfg(test)]
    pub(super) fn streams(&self) -> impl Iterator<Item = &Stream> {
        self.peers.values().flat_map(|peer| &peer.streams)
    }

    fn peer(&self, name: Incarnation) -> Option<&Peer> {
        self.peers.get(self.numbers.get(&name)?)
    }

    /// Forgets a peer and all its connections; its posts end.
    fn forget(&mut self, name: Incarnation, why: &Error) {
        let Some(number) = self.numbers.remove(&name) else { return };
        self.lost.retain(|(peer, _)| *peer != name);
        self.lose(number, why.clone());
        self.peers.remove(&number);
    }

    /// Ends a peer's connections and posts.
    fn lose(&mut self, number: u64, why: Error) {
        let Some(peer) = self.peers.get_mut(&number) else { return };
        for post in peer.lose(&why) {
            self.posts -= 1;
            self.writes -= post.writes;
            self.ended.push(Completion { id: post.id, peer: peer.name, result: Err(why.clone()) });
        }
    }

    /// Starts connections to a peer that was not known.
    fn connect(&mut self, name: Incarnation, blob: &Blob) {
        self.last_number += 1;
        let number = self.last_number;
        self.numbers.insert(name, number);
        self.peers.insert(number, Peer::new(name, number, blob));
        for stream in 0..blob.tokens.len() {
            if let Err(error) = self.dial(number, stream, 0) {
                return self.broke(number, error);
            }
        }
    }

    fn dial(&mut self, number: u64, stream: usize, nth: usize) -> Result<()> {
        let Some(peer) = self.peers.get_mut(&number) else { return Ok(()) };
        peer.dial(&self.watch, self.own, stream, nth, Instant::now() + self.open)
    }

    /// A stream is over: another address is left to be tried, or the peer is lost.
    fn failed(&mut self, token: u64, error: Error) {
        let (number, stream) = peer_and_stream(token);
        let Some(peer) = self.peers.get(&number) else { return };
        let next = peer.next_address(stream);
        let error = match next {
            Some(next) => match self.dial(number, stream, next) {
                Ok(()) => return,
                Err(error) => error,
            },
            None => error,
        };
        self.broke(number, error);
    }

    /// A peer's connections broke.
    fn broke(&mut self, number: u64, why: Error) {
        if let Some(peer) = self.peers.get(&number).filter(|peer| peer.lost.is_none()) {
            self.lost.push((peer.name, why.clone()));
            self.lose(number, why);
        }
    }

    fn stream(&mut self, token: u64) -> Option<(&mut Stream, &mut Queue, Incarnation)> {
        let (number, stream) = peer_and_stream(token);
        let peer = self.peers.get_mut(&number)?;
        Some((peer.streams.get_mut(stream)?, &mut peer.waiting, peer.name))
    }

    /// Something happened at a socket.
    fn happened(&mut self, event: Ready) -> Result<()> {
        let mut over = Vec::new();
        let Some((stream, waiting, owner)) = self.stream(event.token) else { return Ok(()) };
        let was = stream.state;
        if event.write && was == Turn::Full {
            stream.writable()?;
        }
        let read = match stream.phase {
            Phase::Opening { connected: false, .. } => Ok(()),
            _ => stream.read(owner, |post, stored| over.push((post, stored))),
        };
        // It may have come up with posts waiting for it.
        if stream.is_idle() && !waiting.posts.is_empty() {
            stream.state = Turn::More;
        }
        if stream.state == Turn::More && was != Turn::More {
            self.ready.push_back(event.token);
        }
        for (post, stored) in over {
            self.end(owner, &post, stored);
        }
        read
    }

    /// A post was acknowledged.
    fn end(&mut self, peer: Incarnation, post: &Queued, stored: bool) {
        let result = match stored && !post.spoilt {
            true => Ok(post.sum),
            false => Err(let_go(post.id, peer)),
        };
        self.posts -= 1;
        self.writes -= post.writes;
        self.ended.push(Completion { id: post.id, peer, result });
    }

    /// Ends the posts that name a segment and were not begun; those that were are finished.
    fn let_go(&mut self, peer: Incarnation, segment: SegmentId) {
        let Some(found) = self.numbers.get(&peer).and_then(|number| self.peers.get_mut(number))
        else {
            return;
        };
        found.segments.remove(&segment);
        found.waiting.remove(segment, |post| {
            self.posts -= 1;
            self.writes -= post.writes;
            let result = Err(let_go(post.id, peer));
            self.ended.push(Completion { id: post.id, peer, result });
        });
    }

    /// Sends, each stream in turn.
    fn send(&mut self, mut budget: u64) {
        while budget > 0
            && let Some(token) = self.ready.pop_front()
        {
            let regions = Arc::clone(&self.regions);
            let Some((stream, waiting, _)) = self.stream(token) else { continue };
            match stream.send(&regions, waiting, &mut budget) {
                Ok(turn) => {
                    stream.state = turn;
                    if turn == Turn::More {
                        self.ready.push_back(token);
                    } else if let Err(error) = self.rewatch(token) {
                        self.failed(token, error);
                    }
                }
                Err(error) => self.failed(token, error),
            }
        }
    }

    /// Has the socket watched for what its stream wants.
    fn rewatch(&mut self, token: u64) -> Result<()> {
        let (number, stream) = peer_and_stream(token);
        let stream = self.peers.get_mut(&number).and_then(|peer| peer.streams.get_mut(stream));
        let Some(stream) = stream else { return Ok(()) };
        let wants = stream.wants();
        if wants != stream.interest {
            self.watch.modify(stream.socket(), token, wants)?;
            stream.interest = wants;
        }
        Ok(())
    }

    /// Ends what takes too long to open, and sets the alarm for the rest.
    fn expire(&mut self) {
        let mut late = Vec::new();
        let mut next: Option<Instant> = None;
        let now = Instant::now();
        for (number, peer) in &self.peers {
            for (at, stream) in (0..).zip(&peer.streams) {
                match stream.phase {
                    Phase::Opening { until, .. } if until <= now => {
                        late.push((token(*number, at), stream.address));
                    }
                    Phase::Opening { until, .. } => {
                        next = Some(next.map_or(until, |next| next.min(until)));
                    }
                    Phase::Up => {}
                }
            }
        }
        let again = !late.is_empty();
        for (token, address) in late {
            let why = format!("nothing answered within {:?}", self.open);
            self.failed(token, unreachable(&address, why));
        }
        match again {
            // What was dialled instead has its deadline too.
            true => self.expire(),
            false => self.watch.alarm(next),
        }
    }
}

impl Transport for Tcp {
    fn name(&self) -> PathName {
        NAME
    }

    /// The versions of the data connections that are spoken.
    fn ability(&self) -> std::result::Result<Vec<u8>, String> {
        Ok(vec![super::frame::VERSION])
    }

    fn attach(
        &mut self,
        peer: Incarnation,
        segment: SegmentId,
        handle: SegmentHandle,
    ) -> Result<()> {
        let blob = Blob::decode(&handle)?;
        if blob.tokens.is_empty() {
            match self.peer(peer).map(|peer| &peer.lost) {
                Some(None) => {}
                Some(Some(why)) => return Err(why.clone()),
                None => {
                    return Err(ErrorKind::PeerLost.error(format!(
                        "segment {segment} of peer {peer} comes without a way to connect, and nothing is connected"
                    )));
                }
            }
            self.let_go(peer, segment);
        } else {
            let why = format!("peer {peer} is to be connected to anew");
            self.forget(peer, &ErrorKind::PeerLost.error(why));
            self.connect(peer, &blob);
            self.expire();
        }
        let number = self.numbers.get(&peer);
        let found = number.and_then(|number| self.peers.get_mut(number));
        if let Some(peer) = found.filter(|peer| peer.lost.is_none()) {
            peer.streams.iter_mut().for_each(|stream| stream.queue.spoil(segment));
            let Blob { generation, bytes, .. } = blob;
            peer.segments.insert(segment, Segment { generation, bytes });
        }
        Ok(())
    }

    fn detach(&mut self, peer: Incarnation, segment: Option<SegmentId>) {
        match segment {
            Some(segment) => self.let_go(peer, segment),
            None => {
                let why = format!("{NAME} let go of peer {peer} with posts under way");
                self.forget(peer, &ErrorKind::PeerLost.error(why));
            }
        }
    }

    fn holds(&self, peer: Incarnation, segment: Option<SegmentId>) -> bool {
        self.peer(peer).is_some_and(|peer| peer.holds(segment))
    }

    fn post(&mut self, post: Post<'_>) -> Result<()> {
        let Post { id, peer: name, grant, seed, writes } = post;
        let room = self.writes + writes.len() <= WRITES && self.posts < POSTS;
        if !room && self.posts > 0 {
            return Err(full(NAME, self.posts, self.writes));
        }
        let unknown = || ErrorKind::NotFound.error(format!("peer {name} is not attached"));
        let number = *self.numbers.get(&name).ok_or_else(unknown)?;
        let peer = self.peers.get_mut(&number).ok_or_else(unknown)?;
        if let Some(why) = &peer.lost {
            return Err(why.clone());
        }
        let before = peer.waiting.writes.len();
        let checked = peer
            .queue(&self.regions, writes)
            .and_then(|bytes| self.overlap.refuse(writes).map(|()| bytes));
        let bytes = match checked {
            Ok(bytes) => bytes,
            Err(error) => {
                peer.waiting.writes.truncate(before);
                return Err(error);
            }
        };
        self.posts += 1;
        let writes = peer.waiting.writes.len() - before;
        self.writes += writes;
        let queued = Queued { id, grant, seed, writes, bytes, sum: 0, spoilt: false };
        if bytes == 0 {
            self.end(name, &queued, true);
            return Ok(());
        }
        peer.waiting.posts.push_back(queued);
        let idle = (0..).zip(&mut peer.streams).filter(|(_, stream)| stream.is_idle());
        if let Some((at, stream)) = idle.min_by_key(|(_, stream)| stream.load) {
            stream.state = Turn::More;
            self.ready.push_back(token(number, at));
        }
        Ok(())
    }

    fn poll(&mut self, budget: u64, out: &mut Vec<Completion>) {
        let mut events = std::mem::take(&mut self.events);
        self.watch.look(&mut events);
        for event in &events {
            if event.token == ALARM {
                self.expire();
            } else if let Err(error) = self.happened(*event) {
                self.failed(event.token, error);
            }
        }
        self.events = events;
        self.send(budget);
        out.append(&mut self.ended);
    }

    fn lost(&mut self) -> Option<(Incarnation, Error)> {
        self.lost.pop()
    }

    fn pending(&self) -> usize {
        self.posts + self.ended.len()
    }

    fn rests(&mut self) -> bool {
        self.ready.is_empty() && self.ended.is_empty() && self.lost.is_empty()
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.watch.fd())
    }
}

fn let_go(post: PostId, peer: Incarnation) -> Error {
    ErrorKind::PeerLost
        .error(format!("{NAME} let go of a segment of peer {peer} with post {post} under way"))
}

impl std::fmt::Debug for Tcp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tcp").field("peers", &self.peers.len()).field("posts", &self.posts).finish()
    }
}
