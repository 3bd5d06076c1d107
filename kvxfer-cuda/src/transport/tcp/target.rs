//! The consumer's end.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvxfer_core::path::PathName;
use kvxfer_core::transport::SegmentHandle;
use kvxfer_core::{Error, ErrorKind, Incarnation, Result, SegmentId};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use super::blob::{Blob, STREAMS};
use super::frame::{Answer, MAGIC, Opening, Token};
use super::receive::{Export, Exports, Receive, Turn};
use super::{NAME, OPEN, frame, socket};
use crate::identity;
use crate::memory::Mapping;
use crate::transport::target::{Leave, Target};
use crate::transport::watch::{ALARM, Interest, Ready, Watch};

/// The token of the listening socket.
const LISTENER: u64 = ALARM - 1;
/// The most connections that have not shown a token. One more closes the one that has been at it for longest: who means
/// it is through at once.
pub(super) const STRANGERS: usize = 256;
/// Connections accepted in one poll.
const ACCEPTS: usize = 64;
/// How long accepting rests when descriptors have run out.
const PAUSE: Duration = Duration::from_millis(100);
const READ: Interest = Interest { read: true, write: false };
const NOTHING: Interest = Interest { read: false, write: false };

/// Receives what [`Tcp`](super::Tcp)s send. The caller's thread does all of it, in [`Target::poll`].
pub struct TcpTarget {
    own: Incarnation,
    listener: OwnedFd,
    bound: SocketAddr,
    /// Connections of each writer.
    streams: u32,
    watch: Watch,
    events: Vec<Ready>,
    /// By which address of ours each writer reaches us.
    addresses: HashMap<Incarnation, IpAddr>,
    writers: HashMap<Incarnation, Writer>,
    exports: Exports,
    pub(super) generation: u32,
    /// Connections by token: those that have not shown a secret, in the order in which they came, and the others.
    pub(super) strangers: BTreeMap<u64, Stranger>,
    connections: HashMap<u64, Receive>,
    last_token: u64,
    /// Connections that have something to read, as far as is known.
    ready: VecDeque<u64>,
    /// Accepting rests until then.
    paused: Option<Instant>,
    refused: u64,
    /// How long a stranger may take.
    pub(super) open: Duration,
}

struct Writer {
    /// Each is taken by the connection that shows it.
    secrets: Vec<Option<Token>>,
    connections: Vec<u64>,
}

pub(super) struct Stranger {
    socket: OwnedFd,
    said: [u8; Opening::BYTES],
    filled: usize,
    until: Instant,
}

impl TcpTarget {
    /// Listens at that address, as this incarnation. Each writer is to make that many connections; port 0 is any
    /// free one. A name is resolved here; this may wait for the resolver.
    ///
    /// # Errors
    /// `Config`: it is no address of this host, or taken, or there are no connections or too many. `Io`: no
    /// descriptors are left.
    pub fn bind(own: Incarnation, host: &str, port: u16, streams: u32) -> Result<Self> {
        if streams == 0 || streams as usize > STREAMS {
            return Err(ErrorKind::Config
                .error(format!("tcp cannot have {streams} connections a peer"))
                .fix(format!("set from 1 to {STREAMS}")));
        }
        let (listener, bound) = socket::listen(host, port)?;
        let watch = Watch::new()?;
        watch.add(&listener, LISTENER, READ)?;
        Ok(Self {
            own,
            listener,
            bound,
            streams,
            watch,
            events: Vec::new(),
            addresses: HashMap::new(),
            writers: HashMap::new(),
            exports: Exports::default(),
            generation: 0,
            strangers: BTreeMap::new(),
            connections: HashMap::new(),
            last_token: 0,
            ready: VecDeque::new(),
            paused: None,
            refused: 0,
            open: OPEN,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.bound
    }

    /// Connections that were closed because they had no business here.
    pub fn refused(&self) -> u64 {
        self.refused
    }

    #[cfg(test)]
    pub(super) fn listener(&self) -> &OwnedFd {
        &self.listener
    }

    /// Bytes of acknowledgements that writers have not read.
    #[cfg(test)]
    pub(super) fn unread(&self) -> usize {
        self.connections.values().map(Receive::unread).sum()
    }

    fn reached_at(&self, writer: Incarnation) -> Result<SocketAddr> {
        if !self.bound.ip().is_unspecified() {
            return Ok(self.bound);
        }
        match self.addresses.get(&writer) {
            Some(&ip) => Ok(SocketAddr::new(ip, self.bound.port())),
            None => Err(ErrorKind::Config
                .error(format!(
                    "by which address writer {writer} reaches {} is unknown",
                    self.bound
                ))
                .fix("have tcp listen on one address that the peers can reach")),
        }
    }

    /// Forgets a writer: its connections, its secrets and its segments.
    fn forget(&mut self, writer: Incarnation) {
        let connections = self.writers.remove(&writer).map(|writer| writer.connections);
        for token in connections.into_iter().flatten() {
            if let Some(connection) = self.connections.remove(&token) {
                connection.abort();
            }
        }
        self.exports.0.retain(|_, export| export.writer != writer);
    }

    fn lose(&mut self, token: u64, why: Error, lost: &mut Vec<(Incarnation, Error)>) {
        let Some(connection) = self.connections.get(&token) else { return };
        let writer = connection.writer;
        self.forget(writer);
        lost.push((writer, why));
    }

    fn accept(&mut self) {
        for _ in 0..ACCEPTS {
            let socket = match socket::accept(&self.listener) {
                Ok(socket) => socket,
                Err(Errno::AGAIN) => return,
                Err(errno @ (Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM)) => {
                    tracing::warn!("tcp: data connections wait, none can be accepted: {errno}");
                    let _ = self.watch.modify(&self.listener, LISTENER, NOTHING);
                    self.paused = Some(Instant::now() + PAUSE);
                    return;
                }
                // That connection died in the queue.
                Err(_) => continue,
            };
            if self.strangers.len() == STRANGERS && self.strangers.pop_first().is_some() {
                self.turned_away("too many others have come since");
            }
            self.last_token += 1;
            if self.watch.add(&socket, self.last_token, READ).is_ok() {
                let until = Instant::now() + self.open;
                let stranger = Stranger { socket, said: [0; Opening::BYTES], filled: 0, until };
                self.strangers.insert(self.last_token, stranger);
            }
        }
    }

    fn turned_away(&mut self, why: &str) {
        self.refused += 1;
        tracing::debug!("tcp: closed a connection to the data port: {why}");
    }

    /// Reads more of an opening, and nothing behind it.
    fn hear(&mut self, token: u64) {
        let Some(stranger) = self.strangers.get_mut(&token) else { return };
        let room = &mut stranger.said[stranger.filled..];
        match rustix::net::recv(&stranger.socket, room, RecvFlags::empty()) {
            Ok((bytes, _)) if bytes > 0 => stranger.filled += bytes,
            Err(Errno::AGAIN | Errno::INTR) => return,
            _ => {
                self.strangers.remove(&token);
                return self.turned_away("it left without a word");
            }
        }
        let said = stranger.filled.min(MAGIC.len());
        let kvxfer = stranger.said[..said] == MAGIC[..said];
        if kvxfer && stranger.filled < Opening::BYTES {
            return;
        }
        let Some(stranger) = self.strangers.remove(&token) else { return };
        if let Err(error) = self.admit(token, stranger) {
            self.turned_away(&error.to_string());
        }
    }

    /// Makes a writer's connection of a stranger that shows its secret.
    fn admit(&mut self, token: u64, stranger: Stranger) -> Result<()> {
        let opening = Opening::decode(&stranger.said)?;
        let refused = || ErrorKind::Protocol.error("its token opens nothing (any more)");
        let writer = self.writers.get_mut(&opening.writer).ok_or_else(refused)?;
        let secret = writer.secrets.get_mut(opening.stream as usize).ok_or_else(refused)?;
        if !secret.is_some_and(|secret| frame::same(&secret, &opening.token)) {
            return Err(refused());
        }
        *secret = None;
        let answer = Answer { stream: opening.stream, owner: self.own }.encode();
        let sent = rustix::net::send(&stranger.socket, &answer, SendFlags::NOSIGNAL);
        if sent != Ok(answer.len()) {
            return Err(ErrorKind::PeerLost.error(format!("it does not take an answer: {sent:?}")));
        }
        writer.connections.push(token);
        self.connections.insert(token, Receive::new(stranger.socket, opening.writer, READ));
        Ok(())
    }

    /// Closes who takes too long, and goes on accepting; sets the alarm for the rest.
    fn expire(&mut self) {
        if self.strangers.is_empty() && self.paused.is_none() {
            return self.watch.alarm(None);
        }
        let now = Instant::now();
        while let Some(first) = self.strangers.first_entry()
            && first.get().until <= now
        {
            first.remove();
            self.turned_away("it said too little for too long");
        }
        if self.paused.is_some_and(|until| until <= now) {
            self.paused = None;
            let _ = self.watch.modify(&self.listener, LISTENER, READ);
        }
        let strangers = self.strangers.first_key_value().map(|(_, first)| first.until);
        self.watch.alarm(strangers.into_iter().chain(self.paused).min());
    }

    /// Gives each connection that has something a turn, until the budget is used up.
    fn receive(&mut self, mut budget: u64, leave: Leave<'_>, lost: &mut Vec<(Incarnation, Error)>) {
        while budget > 0
            && let Some(token) = self.ready.pop_front()
        {
            // It may have been cut off.
            let Some(connection) = self.connections.get_mut(&token) else { continue };
            let mut result = connection.turn(&self.exports, leave, &mut budget);
            connection.queued = result == Ok(Turn::More);
            let wants = connection.wants();
            if wants != connection.interest && result.is_ok() {
                connection.interest = wants;
                let watched = self.watch.modify(connection.socket(), token, wants);
                result = watched.and(result);
            }
            match result {
                Ok(Turn::More) => self.ready.push_back(token),
                Ok(Turn::Idle) => {}
                Err(why) => self.lose(token, why, lost),
            }
        }
    }
}

impl Target for TcpTarget {
    fn name(&self) -> PathName {
        NAME
    }

    fn welcome(
        &mut self,
        writer: Incarnation,
        ability: &[u8],
        local: Option<IpAddr>,
    ) -> Result<()> {
        if !ability.contains(&frame::VERSION) {
            return Err(ErrorKind::VersionMismatch
                .error(format!(
                    "writer {writer} speaks versions {ability:?} of {NAME}, {} is spoken here",
                    frame::VERSION
                ))
                .fix("run the same version of kvxfer on both sides"));
        }
        // Who came by a Unix socket is on this host.
        let loopback: IpAddr = match self.bound {
            SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        };
        self.addresses.insert(writer, local.map_or(loopback, |ip| ip.to_canonical()));
        Ok(())
    }

    fn export(
        &mut self,
        writer: Incarnation,
        segment: SegmentId,
        memory: &Arc<Mapping>,
    ) -> Result<SegmentHandle> {
        let (mut addresses, mut tokens) = (Vec::new(), Vec::new());
        if !self.writers.contains_key(&writer) {
            addresses.push(self.reached_at(writer)?);
            for _ in 0..self.streams {
                tokens.push(identity::token()?);
            }
            let secrets = tokens.iter().copied().map(Some).collect();
            self.writers.insert(writer, Writer { secrets, connections: Vec::new() });
        }
        let known = self.exports.0.get(&segment);
        let generation = match known {
            Some(known) if known.writer == writer && Arc::ptr_eq(&known.memory, memory) => {
                known.generation
            }
            _ => {
                self.generation = self.generation.wrapping_add(1);
                self.generation
            }
        };
        let memory = Arc::clone(memory);
        let bytes = memory.bytes();
        self.exports.0.insert(segment, Export { writer, generation, memory });
        let blob = Blob { generation, addresses, tokens, bytes }.encode();
        Ok(SegmentHandle { blob, bytes, fds: Vec::new() })
    }

    fn cut_off(&mut self, writer: Incarnation) {
        self.forget(writer);
        self.addresses.remove(&writer);
    }

    fn poll(&mut self, budget: u64, leave: Leave<'_>, lost: &mut Vec<(Incarnation, Error)>) {
        let mut events = std::mem::take(&mut self.events);
        self.watch.look(&mut events);
        for event in &events {
            match event.token {
                LISTENER => self.accept(),
                ALARM => {}
                token => match self.connections.get_mut(&token) {
                    // What stands still for acknowledgements that are not read is not asked by `turn`.
                    Some(connection) if event.broken && !connection.wants().read => {
                        let why = ErrorKind::PeerLost.error("a data connection broke");
                        self.lose(token, why, lost);
                    }
                    Some(connection) if !connection.queued => {
                        connection.queued = true;
                        self.ready.push_back(token);
                    }
                    Some(_) => {}
                    None => self.hear(token),
                },
            }
        }
        if !events.is_empty() {
            self.expire();
        }
        self.events = events;
        self.receive(budget, leave, lost);
    }

    fn rests(&mut self) -> bool {
        self.ready.is_empty()
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.watch.fd()
    }
}

impl std::fmt::Debug for TcpTarget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TcpTarget")
            .field("bound", &self.bound)
            .field("writers", &self.writers.len())
            .field("connections", &self.connections.len())
            .field("refused", &self.refused)
            .finish_non_exhaustive()
    }
}
