//! Listening, dialling, hellos, and messages over TCP and Unix sockets.
//!
//! [`Control`] belongs to one thread, which calls [`Control::poll`] in a loop. Nothing here blocks but
//! that call, and nothing locks.
//!
//! * **Trust.** A Unix socket in a folder that only this user can enter, with a process of this user at
//!   the other end, is trusted: descriptors may cross. TCP proves nothing. Over it a listener tells where
//!   its Unix socket is ([`Locate`](wire::Purpose::Locate)) and no more, unless `allow_insecure` is set on both sides.
//! * **Time** is what the caller says it is. It is read once, when `poll` begins; what happens while
//!   `poll` waits is dated by the next call, so that a lease is never judged too short. Timers run only
//!   with a time that is fresh, and after what had come in was read.
//! * **Ends.** Each [`Event::Up`] is followed by exactly one [`Event::Down`] of that link, unless
//!   [`Control::close`] was called. A peer that is dialled is dialled again until [`Control::forget`].
//! * **Limits.** Frames, queues, links and the time for a hello are bounded. Bytes that are no hello, or a
//!   peer that does not read, end that one connection. When descriptors run out, accepting pauses and who
//!   dials waits in the kernel's queue; a spare descriptor would only let us turn them away.

mod address;
mod config;
mod dialer;
mod folder;
mod greeting;
mod link;
mod listener;
mod locate;
mod peer;
mod poller;
mod resolver;
mod timers;

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use kvxfer_core::wire::{self, Message};
use kvxfer_core::{Error, ErrorKind, LinkId, Result, Time};
use rustix::io::Errno;

use dialer::Dial;
use folder::UnixListener;
use link::{Arrival, Link, Read, Stage};
use listener::{Accepting, TcpListener};
use poller::{Poller, Ready};
use resolver::Resolutions;
pub(crate) use timers::Throttle;

pub use address::Address;
pub use config::{ControlConfig, Counts, Event, Limits, Redial};
pub use folder::check_socket_dir;
pub use locate::{Answer, Located, Question, examine, locate};
pub use poller::Waker;

/// Tokens of the listeners; links count from [`FIRST_LINK`].
const TCP: u64 = 0;
const UNIX: u64 = 1;
const FIRST_LINK: u64 = 2;
/// What is watched for others. No link's number.
const OTHERS: u64 = u64::MAX - 1;

/// Queued bytes that are written at once instead of by the next poll.
const WRITE_NOW: usize = 64 << 10;

/// The control sockets of one agent. See the [module](self).
#[derive(Debug)]
pub struct Control {
    config: ControlConfig,
    poller: Poller,
    tcp: Option<TcpListener>,
    unix: Option<UnixListener>,
    addresses: Vec<Address>,
    accepting: Accepting,
    links: BTreeMap<LinkId, Link>,
    last_link: u64,
    /// One per configured peer.
    dials: Vec<Option<Dial>>,
    resolved: Resolutions,
    /// Links whose bytes are to be written before the next wait.
    dirty: Vec<LinkId>,
    /// Links marked `fresh`.
    fresh: Vec<LinkId>,
    /// What the time was when `poll` last began.
    now: Time,
    /// No timer is due before this.
    next_due: Option<Time>,
    events: Vec<Event>,
    counts: Counts,
    strangers: Throttle,
    shortages: Throttle,
    scratch: Box<[u8]>,
    arrivals: Vec<Arrival>,
    ready: Vec<Ready>,
}

impl Control {
    /// Opens the listening sockets.
    ///
    /// # Errors
    /// An address is in use or not ours, or the socket folder is not ours alone; each names what to do.
    pub fn new(mut config: ControlConfig) -> Result<Self> {
        let poller = Poller::new()?;
        let (mut tcp, mut unix) = (None, None);
        match (&config.listen, &config.socket_dir) {
            (Some(Address::Unix(path)), _) => unix = Some(UnixListener::at(path)?),
            (_, Some(folder)) => unix = Some(UnixListener::in_folder(folder, &config.hello)?),
            _ => {}
        }
        if let Some(Address::Tcp { host, port }) = &config.listen {
            tcp = Some(TcpListener::bind(host, *port)?);
        }
        let mut addresses = Vec::new();
        if let Some(listener) = &tcp {
            poller.add(&listener.socket, TCP, false)?;
            addresses.push(listener.address.clone());
        }
        config.hello.unix_path = None;
        if let Some(listener) = &unix {
            poller.add(&listener.socket, UNIX, false)?;
            addresses.push(Address::Unix(listener.path.clone()));
            config.hello.unix_path = listener.path.to_str().map(str::to_owned);
        }
        wire::bounds::check_hello(&config.hello)
            .map_err(|error| ErrorKind::Config.error(format!("cannot introduce us: {error}")))?;
        Ok(Self {
            resolved: Resolutions::new(poller.waker()),
            poller,
            tcp,
            unix,
            addresses,
            accepting: Accepting::Open,
            links: BTreeMap::new(),
            last_link: FIRST_LINK,
            dials: config.peers.iter().map(|_| None).collect(),
            config,
            dirty: Vec::new(),
            fresh: Vec::new(),
            now: Time::ZERO,
            next_due: None,
            events: Vec::new(),
            counts: Counts::default(),
            strangers: Throttle::default(),
            shortages: Throttle::default(),
            scratch: vec![0; 64 << 10].into(),
            arrivals: Vec::new(),
            ready: Vec::new(),
        })
    }

    /// Where others can reach us: the TCP address with its real port, then the Unix socket.
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// Wakes [`Control::poll`] from other threads.
    pub fn waker(&self) -> Waker {
        self.poller.waker()
    }

    /// Ends a [`Control::poll`] also when that descriptor is readable, until it is not.
    ///
    /// # Errors
    /// The kernel can't watch it.
    pub fn watch(&mut self, fd: BorrowedFd<'_>) -> Result<()> {
        self.poller.add(fd, OTHERS, false)
    }

    /// What was turned away so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Queues a message. It goes out by the next poll at the latest.
    ///
    /// # Errors
    /// No such link ([`ErrorKind::NotFound`]); descriptors over TCP, or too many, or a message that
    /// cannot be encoded: nothing was queued. A peer that does not read so that the queue is full:
    /// the link is gone, and its [`Event::Down`] follows.
    pub fn send(&mut self, link: LinkId, message: &Message, fds: &[BorrowedFd<'_>]) -> Result<()> {
        let limit = self.config.limits.queue_bytes;
        let us = self.config.hello.incarnation;
        let found = self.links.get_mut(&link);
        let Some((open, version)) = found.and_then(|open| match open.stage {
            Stage::Up { version, .. } => Some((open, version)),
            _ => None,
        }) else {
            return Err(ErrorKind::NotFound.error(format!("there is no link {link}")));
        };
        if !fds.is_empty() && open.unix.is_none() {
            let about = format!("descriptors cannot be sent to {} over TCP", open.remote);
            return Err(ErrorKind::NoPath.error(about));
        }
        open.outbox.push(fds, |bytes| wire::encode(message, us, version, bytes))?;
        if open.outbox.len() > limit {
            // What the socket takes right now does not count.
            let result = open.flush().and_then(|_| match open.outbox.len() > limit {
                false => Ok(()),
                true => Err(ErrorKind::PeerLost
                    .error(format!("the peer does not read: more than {limit} bytes wait for it"))),
            });
            if let Err(error) = result {
                let error = open.named(&error);
                self.end(link, error.clone());
                return Err(error);
            }
        }
        if open.outbox.len() >= WRITE_NOW {
            self.flush(link);
        } else {
            self.dirty.push(link);
        }
        Ok(())
    }

    /// Waits for at most `timeout` (`None`: until something happens), reads and writes what the
    /// sockets hold and take, runs the timers that are due at `now`, and appends what came of it.
    ///
    /// # Errors
    /// The kernel refuses to wait. Nothing that a peer does is an error here.
    pub fn poll(
        &mut self,
        now: Time,
        timeout: Option<Duration>,
        out: &mut Vec<Event>,
    ) -> Result<()> {
        self.now = self.now.max(now);
        self.date();
        self.flush_dirty();
        let due = self.next_due.is_some_and(|due| due <= self.now);
        let until_due = self.next_due.map(|due| due.saturating_sub(self.now));
        let wait = match due || !self.events.is_empty() {
            true => Some(Duration::ZERO),
            false => [timeout, until_due].into_iter().flatten().min(),
        };
        let mut ready = std::mem::take(&mut self.ready);
        let waited = self.poller.wait(wait, &mut ready);
        for ready in &ready {
            self.serve(*ready);
        }
        self.ready = ready;
        self.take_resolutions();
        if due {
            self.run_timers();
        }
        self.flush_dirty();
        out.append(&mut self.events);
        waited
    }

    /// When [`Control::poll`] has something to do although nothing comes in. Never too late.
    pub fn next_timeout(&self) -> Option<Time> {
        match self.events.is_empty() && self.dirty.is_empty() {
            true => self.next_due,
            false => Some(self.now),
        }
    }

    fn serve(&mut self, ready: Ready) {
        match ready.token {
            TCP | UNIX => self.accept(ready.token),
            id => {
                let id = LinkId(id);
                if ready.write {
                    match self.links.get(&id).map(|link| &link.stage) {
                        Some(Stage::Connecting) => return self.connected(id),
                        Some(_) => self.flush(id),
                        None => return,
                    }
                }
                if ready.read {
                    self.read(id);
                }
            }
        }
    }

    /// Reads a link and acts on the frames.
    fn read(&mut self, id: LinkId) {
        let Some(link) = self.links.get_mut(&id) else { return };
        let mut arrivals = std::mem::take(&mut self.arrivals);
        let result = link.read(&mut self.scratch, &mut arrivals);
        if let Ok(Read::Open { heard: true }) = result {
            mark(&mut link.fresh, &mut self.fresh, id);
        }
        for (frame, fds) in arrivals.drain(..) {
            if self.links.contains_key(&id)
                && let Err(error) = self.take(id, frame, fds)
            {
                self.end(id, error);
            }
        }
        self.arrivals = arrivals;
        let Some(link) = self.links.get(&id) else { return };
        match result {
            Ok(Read::Open { .. }) => {}
            Ok(Read::End) => {
                let error = ErrorKind::PeerLost.error("the peer closed the connection");
                self.end(id, link.named(&error));
            }
            Err(error) => self.end(id, link.named(&error)),
        }
    }

    /// Writes what is queued, and watches for room if that is not all.
    fn flush(&mut self, id: LinkId) {
        let link = self.links.get_mut(&id);
        let Some(link) = link.filter(|link| !matches!(link.stage, Stage::Connecting)) else {
            return;
        };
        let before = link.outbox.len();
        match link.flush() {
            Ok(empty) => {
                if link.outbox.len() < before {
                    link.said = self.now;
                }
                if link.watches_write == empty {
                    link.watches_write = !empty;
                    if let Err(error) = self.poller.modify(&link.socket, id.0, !empty) {
                        self.end(id, error);
                    }
                }
            }
            // What the peer said before it closed is read first.
            Err(error) => {
                let error = link.named(&error);
                self.read(id);
                self.end(id, error);
            }
        }
    }

    fn flush_dirty(&mut self) {
        while let Some(id) = self.dirty.pop() {
            self.flush(id);
        }
    }

    /// Adds a connection and watches it. Its hello clock starts with the next poll.
    fn add(&mut self, make: impl FnOnce(LinkId) -> Link) -> Result<LinkId> {
        self.last_link += 1;
        let id = LinkId(self.last_link);
        let mut link = make(id);
        link.watches_write = matches!(link.stage, Stage::Connecting);
        self.poller.add(&link.socket, id.0, link.watches_write)?;
        mark(&mut link.fresh, &mut self.fresh, id);
        self.links.insert(id, link);
        self.due_at(self.now + self.config.limits.hello_timeout);
        Ok(id)
    }

    fn forget_link(&mut self, id: LinkId) -> Option<Link> {
        let link = self.links.remove(&id)?;
        self.poller.remove(&link.socket);
        if let Some(peer) = link.dialled {
            self.dial_ended(peer, &link);
        }
        Some(link)
    }

    /// Ends a connection that nobody asked to end, and tells who has to know.
    fn end(&mut self, id: LinkId, error: Error) {
        let Some(link) = self.links.get(&id) else { return };
        match (&link.stage, link.dialled) {
            (Stage::Up { .. }, _) => {
                let dialled = link.dialled;
                self.forget_link(id);
                let redial = dialled.and_then(|peer| self.redial(peer));
                self.events.push(Event::Down { link: id, error, redial });
            }
            (_, Some(peer)) => self.attempt_failed(peer, id, error),
            (_, None) => self.turned_away(id, &error),
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let closing = ErrorKind::Closed.error("the agent is closing");
        for link in self.links.keys().copied().collect::<Vec<_>>() {
            self.close(link, &closing);
        }
    }
}

/// Marks a link as fresh, once.
fn mark(flag: &mut bool, list: &mut Vec<LinkId>, id: LinkId) {
    if !*flag {
        *flag = true;
        list.push(id);
    }
}

/// An error of the operating system.
fn failed(what: &str, errno: Errno) -> Error {
    let error = ErrorKind::Io.error(format!("{what}: {}", std::io::Error::from(errno)));
    match errno {
        Errno::MFILE | Errno::NFILE => {
            error.fix("raise the limit on open files (ulimit -n)").retry()
        }
        _ => error,
    }
}
