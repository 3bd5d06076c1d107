//! Dialling the configured peers, again and again.
//!
//! A TCP address is located first: the agent there says which host it is on and where its Unix socket is.
//! If that is this host and the socket can be reached, the link runs there. Otherwise it runs over TCP, if
//! `allow_insecure` is set; if not, the dial fails and says what was in the way.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use kvxfer_core::wire::{self, Hello, Purpose};
use kvxfer_core::{Error, ErrorKind, Incarnation, LinkId, Result, Time};
use rustix::io::Errno;
use rustix::net::sockopt;

use super::link::{Link, Stage};
use super::listener::socket_for;
use super::peer::Peer;
use super::{Address, Control, Event, Redial, failed, folder};

/// What is being done about one configured peer.
#[derive(Debug)]
pub(super) struct Dial {
    purpose: Purpose,
    step: Step,
    /// Dials since the last link that lasted.
    failures: u32,
}

#[derive(Debug)]
enum Step {
    Waiting {
        delay: Duration,
        /// The peer refused us, or we it, for a reason that lasts.
        refused: bool,
        /// Unknown until the time is next read.
        since: Option<Time>,
    },
    Resolving,
    Trying(Attempt),
    Linked(LinkId),
}

/// One connection on the way to a link.
#[derive(Debug)]
struct Attempt {
    link: LinkId,
    act: Act,
    /// Where it goes, over TCP.
    at: Option<SocketAddr>,
    /// The name's other addresses.
    more: VecDeque<SocketAddr>,
}

#[derive(Clone, Debug)]
enum Act {
    /// Ask who is there.
    Locate,
    /// Ask for the link.
    Join { expect: Option<Incarnation>, why_not_unix: Option<String> },
}

impl Control {
    /// Dials a configured peer, and again after each failure or end of the link, at growing distances.
    /// Does nothing if that is under way.
    ///
    /// # Panics
    /// There is no such peer in the configuration.
    pub fn dial(&mut self, peer: usize, purpose: Purpose) {
        debug_assert!(purpose != Purpose::Locate, "locating is a part of dialling");
        if self.dials[peer].is_none() {
            let step = Step::Waiting { delay: Duration::ZERO, refused: false, since: None };
            self.dials[peer] = Some(Dial { purpose, step, failures: 0 });
            self.due_at(self.now);
        }
    }

    /// Dials that peer no more. An attempt under way is given up; a link that is up stays.
    pub fn forget(&mut self, peer: usize) {
        let dial = self.dials.get_mut(peer).and_then(Option::take);
        if let Some(Dial { step: Step::Trying(attempt), .. }) = dial {
            self.forget_link(attempt.link);
        }
    }

    pub(super) fn date_dials(&mut self) {
        for dial in self.dials.iter_mut().flatten() {
            if let Step::Waiting { since, .. } = &mut dial.step {
                since.get_or_insert(self.now);
            }
        }
    }

    pub(super) fn dial_timers(&self) -> impl Iterator<Item = Time> {
        self.dials.iter().flatten().filter_map(|dial| match dial.step {
            Step::Waiting { delay, since, .. } => Some(since.unwrap_or(self.now) + delay),
            _ => None,
        })
    }

    pub(super) fn run_dials(&mut self) {
        for peer in 0..self.dials.len() {
            let Some(dial) = &self.dials[peer] else { continue };
            if let Step::Waiting { delay, since: Some(since), .. } = dial.step
                && since + delay <= self.now
                && let Err(error) = self.start(peer)
            {
                self.fail(peer, error, false);
            }
        }
    }

    fn start(&mut self, peer: usize) -> Result<()> {
        match self.config.peers[peer].clone() {
            Address::Unix(path) => {
                let act = Act::Join { expect: None, why_not_unix: None };
                self.try_unix(peer, &path, act)?.map_err(|why| ErrorKind::NoPath.error(why))
            }
            Address::Tcp { host, port } => match host.parse::<IpAddr>() {
                Ok(ip) => self.try_tcp(peer, [SocketAddr::new(ip, port)].into(), Act::Locate),
                Err(_) => {
                    self.resolved.start(peer, host, port).map_err(|error| {
                        ErrorKind::Io.error(format!("cannot start a thread: {error}")).retry()
                    })?;
                    self.set_step(peer, Step::Resolving);
                    Ok(())
                }
            },
        }
    }

    pub(super) fn take_resolutions(&mut self) {
        while let Some((peer, found)) = self.resolved.next() {
            let waiting = self.dials[peer].as_ref().map(|dial| &dial.step);
            if !matches!(waiting, Some(Step::Resolving)) {
                continue;
            }
            let result = match found {
                Ok(found) => self.try_tcp(peer, found, Act::Locate),
                Err(error) => Err(ErrorKind::PeerLost
                    .error(format!(
                        "the name of {} cannot be resolved: {error}",
                        self.config.peers[peer]
                    ))
                    .retry()),
            };
            if let Err(error) = result {
                self.fail(peer, error, false);
            }
        }
    }

    /// Connects to the first address that can be tried at all.
    fn try_tcp(&mut self, peer: usize, mut found: VecDeque<SocketAddr>, act: Act) -> Result<()> {
        self.check_room()?;
        let versions = self.config.hello.versions;
        let name = self.config.peers[peer].to_string();
        let mut last = ErrorKind::PeerLost.error(format!("{name} has no address"));
        while let Some(at) = found.pop_front() {
            let connect = || {
                let socket = socket_for(&at)?;
                sockopt::set_tcp_nodelay(&socket, true)?;
                match rustix::net::connect(&socket, &at) {
                    Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
                    Err(errno) => Err(errno),
                }
            };
            match connect() {
                Ok(socket) => {
                    let link = self.add(|id| {
                        let mut link = Link::new(id, socket, None, name, Some(peer), versions);
                        link.stage = Stage::Connecting;
                        link
                    })?;
                    let attempt = Attempt { link, act, at: Some(at), more: found };
                    self.set_step(peer, Step::Trying(attempt));
                    return Ok(());
                }
                Err(errno) => last = failed(&format!("cannot connect to {name}"), errno).retry(),
            }
        }
        Err(last)
    }

    /// Connects to a Unix socket. `Ok(Err)` is why it cannot be reached from here, and will not be soon.
    fn try_unix(
        &mut self,
        peer: usize,
        path: &Path,
        act: Act,
    ) -> Result<std::result::Result<(), String>> {
        self.check_room()?;
        let versions = self.config.hello.versions;
        let shown = path.display();
        let socket = match folder::connect(path) {
            Ok(Ok(socket)) => socket,
            // The agent has just gone, or has a full backlog, or we have no descriptor: not a reason
            // for a slower path.
            Ok(Err(errno @ (Errno::CONNREFUSED | Errno::AGAIN | Errno::MFILE | Errno::NFILE))) => {
                return Err(failed(&format!("cannot connect to unix:{shown}"), errno).retry());
            }
            Ok(Err(errno)) => {
                let error = std::io::Error::from(errno);
                return Ok(Err(format!("its socket {shown} cannot be reached from here: {error}")));
            }
            Err(error) => return Ok(Err(error.to_string())),
        };
        let process = match Peer::of(&socket) {
            Ok(process) => process,
            Err(error) => return Ok(Err(error.to_string())),
        };
        let remote = format!("unix:{shown}");
        let link =
            self.add(|id| Link::new(id, socket, Some(process), remote, Some(peer), versions))?;
        let attempt = Attempt { link, act, at: None, more: VecDeque::new() };
        self.set_step(peer, Step::Trying(attempt));
        self.greet(peer, link)?;
        Ok(Ok(()))
    }

    fn check_room(&self) -> Result<()> {
        let limit = self.config.limits.max_links;
        match self.links.len() < limit {
            true => Ok(()),
            false => {
                Err(ErrorKind::Io.error(format!("{limit} connections are open, the limit")).retry())
            }
        }
    }

    /// A TCP connection was made, or was not.
    pub(super) fn connected(&mut self, id: LinkId) {
        let Some(link) = self.links.get_mut(&id) else { return };
        let Some(peer) = link.dialled else { return };
        let result = match sockopt::socket_error(&link.socket) {
            Ok(Ok(())) => {
                link.stage = Stage::Greeting;
                self.greet(peer, id)
            }
            Ok(Err(errno)) | Err(errno) => {
                Err(failed(&format!("cannot connect to {}", link.remote), errno).retry())
            }
        };
        if let Err(error) = result {
            self.end(id, error);
        }
    }

    /// Says hello.
    fn greet(&mut self, peer: usize, id: LinkId) -> Result<()> {
        let mut hello = self.config.hello.clone();
        match self.joining(peer) {
            Some((purpose, ..)) => hello.purpose = purpose,
            // Nobody there has proved anything yet.
            None => (hello.purpose, hello.unix_path) = (Purpose::Locate, None),
        }
        let link = self.links.get_mut(&id).expect("the caller looked");
        self.dirty.push(id);
        link.outbox.push(&[], |bytes| wire::encode_hello(&hello, bytes))
    }

    /// What the attempt under way asks for; `None` if it only locates.
    pub(super) fn joining(
        &self,
        peer: usize,
    ) -> Option<(Purpose, Option<Incarnation>, Option<String>)> {
        match self.dials[peer].as_ref()? {
            Dial { purpose, step: Step::Trying(Attempt { act, .. }), .. } => match act {
                Act::Join { expect, why_not_unix } => {
                    Some((*purpose, *expect, why_not_unix.clone()))
                }
                Act::Locate => None,
            },
            _ => None,
        }
    }

    /// The agent at a TCP address has said where it is.
    pub(super) fn located(&mut self, peer: usize, link: LinkId, theirs: Hello) {
        let Some(Dial { step: Step::Trying(attempt), .. }) = &self.dials[peer] else { return };
        let at = attempt.at;
        self.forget_link(link);
        if let Err(error) = self.join(peer, at, theirs) {
            self.fail(peer, error, false);
        }
    }

    fn join(&mut self, peer: usize, at: Option<SocketAddr>, theirs: Hello) -> Result<()> {
        let expect = Some(theirs.incarnation);
        let here = theirs.boot_id == self.config.hello.boot_id;
        let why = match theirs.unix_path {
            _ if !here => "it is on another host".to_owned(),
            None => "it has no Unix socket".to_owned(),
            Some(path) => {
                let act = Act::Join { expect, why_not_unix: None };
                match self.try_unix(peer, Path::new(&path), act)? {
                    Ok(()) => return Ok(()),
                    Err(why) => why,
                }
            }
        };
        if !self.config.allow_insecure {
            let address = &self.config.peers[peer];
            let fix = match here {
                true => {
                    "mount its socket folder in both containers at the same path, or set socket_dir; \
                     or set allow_insecure on both sides"
                }
                false => "set allow_insecure on both sides if you trust the network",
            };
            return Err(ErrorKind::NoPath
                .error(format!(
                    "{} at {address} cannot be joined over a Unix socket: {why}; and TCP without a \
                     key needs allow_insecure",
                    theirs.name
                ))
                .fix(fix));
        }
        let at = at.into_iter().collect();
        self.try_tcp(peer, at, Act::Join { expect, why_not_unix: Some(why) })
    }

    /// The link is up.
    pub(super) fn linked(&mut self, peer: usize, link: LinkId) {
        self.set_step(peer, Step::Linked(link));
    }

    /// An attempt's connection ended.
    pub(super) fn attempt_failed(&mut self, peer: usize, id: LinkId, error: Error) {
        let Some(link) = self.forget_link(id) else { return };
        let Some(Dial { step: Step::Trying(attempt), .. }) = &mut self.dials[peer] else { return };
        if attempt.link != id {
            return;
        }
        let (more, act) = (std::mem::take(&mut attempt.more), attempt.act.clone());
        let next = match (&link.stage, more.is_empty()) {
            // One of the name's other addresses may do.
            (Stage::Connecting, false) => self.try_tcp(peer, more, act),
            _ => Err(error),
        };
        if let Err(error) = next {
            self.fail(peer, error, link.refused);
        }
    }

    /// A dialled link is gone: dial again, at once only if it had lasted.
    pub(super) fn dial_ended(&mut self, peer: usize, link: &Link) {
        let Some(dial) = &mut self.dials[peer] else { return };
        if matches!(dial.step, Step::Linked(id) if id == link.id) {
            let lasted = link.born.map_or(Duration::ZERO, |born| self.now.saturating_sub(born));
            if lasted >= self.config.limits.backoff_max {
                dial.failures = 0;
            }
            self.back_off(peer, link.refused);
        }
    }

    /// When a peer is dialled next, if that is waited for.
    pub(super) fn redial(&self, peer: usize) -> Option<Redial> {
        match self.dials[peer].as_ref()?.step {
            Step::Waiting { delay, refused, .. } => Some(Redial { after: delay, refused }),
            _ => None,
        }
    }

    fn fail(&mut self, peer: usize, error: Error, refused: bool) {
        self.back_off(peer, refused);
        if let Some(redial) = self.redial(peer) {
            self.events.push(Event::DialFailed { peer, error, redial });
        }
    }

    fn back_off(&mut self, peer: usize, refused: bool) {
        let Some(dial) = &mut self.dials[peer] else { return };
        let limits = &self.config.limits;
        let doubled = limits.backoff.saturating_mul(1 << dial.failures.min(16));
        let doubled = doubled.min(limits.backoff_max);
        let longest = if refused { limits.refused_backoff } else { doubled };
        // After a refusal it counts anew: a peer that is gone then is perhaps being restarted.
        dial.failures = if refused { 0 } else { dial.failures.saturating_add(1) };
        // Between half and all of it: agents that lost one peer together do not come back together.
        self.config.seed = self.config.seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut bits = self.config.seed;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        let part = 0.5 + (bits >> 33) as f64 / (1u64 << 32) as f64;
        let delay = longest.mul_f64(part.min(1.0));
        dial.step = Step::Waiting { delay, refused, since: None };
        self.due_at(self.now + delay);
    }

    fn set_step(&mut self, peer: usize, step: Step) {
        if let Some(dial) = &mut self.dials[peer] {
            dial.step = step;
        }
    }
}
