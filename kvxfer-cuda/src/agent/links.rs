//! Links coming, speaking and going.

use std::os::fd::OwnedFd;

use kvxfer_core::transport::SegmentHandle;
use kvxfer_core::wire::message::Memory;
use kvxfer_core::wire::{Hello, Message, Purpose};
use kvxfer_core::{Error, ErrorKind, Incarnation, LinkId, Result, Time};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::closed;
use super::progress::Progress;
use super::push::Shown;
use crate::control::{Event, Redial};
use crate::driver::{PeerLink, Uuid};
use crate::transport::cuda_ipc;
use crate::transport::local::Local;

/// Whether the death of a process ends what its copies write to GPU memory of ours. The driver is said to stop them
/// when it tears the context down, but that it has done so when the process is gone was not shown on hardware; and
/// with MPS it is not even that process's context. So a dead writer's memory is replaced.
const GPU_DEATH_FENCES: bool = false;

/// Who is at the other end of a link.
pub(super) struct Link {
    pub(super) peer: Incarnation,
    pub(super) name: String,
    pub(super) kind: Kind,
    /// Whether both sides want it: a consumer has seen the producer's layout and said so. Before, nobody is told
    /// of it.
    joined: bool,
    /// Which way the path takes, where there are several.
    lanes: Option<String>,
    pidfd: Option<OwnedFd>,
}

pub(super) enum Kind {
    /// We push to it.
    Consumer,
    /// It pushes to us, on this path.
    Producer(&'static str),
    /// Our engine's scheduler half.
    Observer,
}

pub(super) struct Up {
    link: LinkId,
    dialled: Option<usize>,
    purpose: Purpose,
    peer: Hello,
    pidfd: Option<OwnedFd>,
    can_pass_fds: bool,
    why_not_unix: Option<String>,
}

impl Progress {
    pub(super) fn event(&mut self, now: Time, event: Event) {
        match event {
            Event::Up {
                link, dialled, purpose, peer, pidfd, can_pass_fds, why_not_unix, ..
            } => {
                let up = Up { link, dialled, purpose, peer, pidfd, can_pass_fds, why_not_unix };
                let name = up.peer.name.clone();
                if let Err(error) = self.up(now, up) {
                    tracing::error!(name, %error, "refused a link");
                    self.control.close(link, &error);
                }
            }
            Event::Message { link, message, fds } => {
                if let Err(error) = self.message(now, link, message, fds) {
                    self.close_link(now, link, &error);
                }
            }
            Event::Down { link, error, redial } => self.down(now, link, &error, redial),
            Event::DialFailed { peer, error, redial } => {
                say_unreachable(&self.config.peers[peer].to_string(), &error, redial);
            }
        }
    }

    pub(super) fn up(&mut self, now: Time, up: Up) -> Result<()> {
        let Up { link, dialled, purpose, peer, pidfd, can_pass_fds, why_not_unix } = up;
        let Hello { incarnation, name, .. } = peer;
        let kind = match (purpose, dialled) {
            (Purpose::Push, Some(index)) => {
                let producer = self.producer.as_mut().ok_or_else(|| wrong_role("push"))?;
                producer.consumer_connected(index, link, incarnation);
                Kind::Consumer
            }
            (Purpose::Push, None) => {
                let consuming = self.consuming.as_mut().ok_or_else(|| wrong_role("take a push"))?;
                let path = choose_path(
                    self.device.is_some(),
                    self.config.require_path.as_deref(),
                    incarnation,
                    can_pass_fds,
                    why_not_unix,
                )?;
                consuming.session.producer_connected(now, link, incarnation);
                Kind::Producer(path)
            }
            (Purpose::Observe, None) => {
                if let Some(consuming) = &mut self.consuming {
                    consuming.session.observer_connected(now, link, incarnation);
                }
                Kind::Observer
            }
            (Purpose::Observe, Some(_)) | (Purpose::Locate, _) => {
                return Err(ErrorKind::Protocol.error("a link of that purpose is not for an agent"));
            }
        };
        let joined = matches!(kind, Kind::Observer);
        self.links.insert(link, Link { peer: incarnation, name, kind, joined, lanes: None, pidfd });
        Ok(())
    }

    /// The layouts fit.
    fn joined(&mut self, id: LinkId) {
        let Some(link) = self.links.get_mut(&id).filter(|link| !link.joined) else { return };
        link.joined = true;
        let (peer, name) = (link.peer, &link.name);
        match link.kind {
            Kind::Consumer => tracing::info!(%peer, name, "connected to a consumer"),
            Kind::Producer(_) => {
                let path = link.path().unwrap_or_default();
                tracing::info!(%peer, name, path, "a producer connected");
            }
            Kind::Observer => {}
        }
        self.tell_peers();
    }

    pub(super) fn message(
        &mut self,
        now: Time,
        id: LinkId,
        message: Message,
        fds: Vec<OwnedFd>,
    ) -> Result<()> {
        let Some(link) = self.links.get(&id) else { return Ok(()) };
        match (&link.kind, message) {
            (
                Kind::Consumer,
                Message::Segment { segment, bytes, probe, transport, blob, generation: _ },
            ) => {
                if let Some(path) = &self.config.require_path
                    && *path != transport
                {
                    return Err(ErrorKind::NoPath.error(format!(
                        "{} offers path {transport}, {path} is required",
                        link.name
                    )));
                }
                let peer = link.peer;
                let pushes = self.pushes.as_mut().ok_or_else(closed)?;
                let handle = SegmentHandle { blob, bytes, fds };
                let path = transport;
                pushes.attach(Shown { link: id, peer, segment, probe, path, handle })
            }
            (Kind::Consumer, Message::Attached) => {
                self.joined(id);
                Ok(())
            }
            (Kind::Consumer, message) => {
                if let Message::Refused { reason, .. } = &message {
                    self.say_too_large(now, id, reason);
                }
                match &mut self.producer {
                    Some(producer) => producer.received_from_consumer(now, id, message),
                    None => Ok(()),
                }
            }
            (Kind::Producer(_), message) => {
                let memory = match message {
                    Message::Attach { memory, .. } => Some(memory),
                    _ => None,
                };
                let lanes = memory.map(|memory| self.lanes(memory)).transpose()?;
                let Some(consuming) = &mut self.consuming else { return Ok(()) };
                consuming.session.received(now, id, message)?;
                if let (Some(lanes), Some(link)) = (lanes, self.links.get_mut(&id)) {
                    link.lanes = lanes;
                    self.joined(id);
                }
                Ok(())
            }
            (Kind::Observer, message) => self.received_from_observer(now, id, message),
        }
    }

    /// Which way KV comes from a producer's memory; `None` where there is one only.
    ///
    /// # Errors
    /// `NoPath`: it doesn't.
    fn lanes(&self, theirs: Memory) -> Result<Option<String>> {
        let (here, there) = match (&self.device, theirs) {
            (None, Memory::Host) => return Ok(None),
            (Some(device), Memory::Cuda { gpu }) => {
                // It is the producer that has to reach us, and it says so when it can't.
                let link = device.link_to(Uuid(gpu))?;
                return Ok((!matches!(link, PeerLink::None { .. })).then(|| link.to_string()));
            }
            (None, Memory::Cuda { .. }) => ("host", "GPU"),
            (Some(_), Memory::Host) => ("GPU", "host"),
        };
        Err(ErrorKind::NoPath
            .error(format!("the pool is in {here} memory, and the producer's KV in {there} memory"))
            .fix("set kv_buffer_device to the same on both sides"))
    }

    pub(super) fn received_from_observer(
        &mut self,
        now: Time,
        link: LinkId,
        message: Message,
    ) -> Result<()> {
        let offers = matches!(message, Message::Offer { .. } | Message::Withdraw { .. });
        match (&mut self.producer, &mut self.consuming) {
            (Some(producer), _) if offers => producer.received_from_observer(now, link, message),
            (_, Some(consuming)) if !offers => consuming.session.received(now, link, message),
            _ => Err(wrong_role(if offers { "offer" } else { "be claimed from" })),
        }
    }

    fn down(&mut self, now: Time, id: LinkId, error: &Error, redial: Option<Redial>) {
        let Some(link) = self.links.remove(&id) else { return };
        self.tell_peers();
        link.say_ended(error, redial);
        if let Some(producer) = &mut self.producer {
            producer.disconnected(now, id);
        }
        if let Some(consuming) = &mut self.consuming {
            consuming.session.disconnected(now, id);
        }
        match link.kind {
            Kind::Consumer => {
                if let Some(pushes) = &mut self.pushes {
                    pushes.let_go(link.peer);
                }
            }
            Kind::Producer(_) => self.orphans.extend(link.pidfd.map(|fd| (link.peer, fd))),
            Kind::Observer => {}
        }
    }

    fn tell_peers(&self) {
        let ours = |link: &&Link| link.joined && matches!(link.kind, Kind::Consumer);
        let peers = self.links.values().filter(ours).count();
        self.shared.tell(|news| news.peers = peers);
    }

    pub(super) fn close_link(&mut self, now: Time, link: LinkId, error: &Error) {
        let redial = self.control.close(link, error);
        self.down(now, link, error, redial);
    }

    /// A process that ended writes no more.
    pub(super) fn find_dead(&mut self, now: Time) {
        let Some(consuming) = &mut self.consuming else { return };
        let connected = |peer: Incarnation| self.links.values().any(|link| link.peer == peer);
        let fences = consuming.store.moves_now() || GPU_DEATH_FENCES;
        self.orphans.retain(|(peer, pidfd)| {
            if connected(*peer) || !consuming.session.is_writer(*peer) {
                return false;
            }
            let dead = has_ended(pidfd);
            if dead {
                consuming.store.dead(*peer);
            }
            if dead && fences {
                consuming.session.writer_dead(now, *peer);
            }
            !dead
        });
    }
}

impl Link {
    /// The path by which a producer's bytes come, for people.
    pub(super) fn path(&self) -> Option<String> {
        let Kind::Producer(path) = self.kind else { return None };
        Some(match &self.lanes {
            None => path.into(),
            Some(lanes) => format!("{path} ({lanes})"),
        })
    }

    /// One line a link that ended, and of those that both sides wanted one more when they began: a peer that is
    /// refused each time it comes is no more than one line each time.
    fn say_ended(&self, error: &Error, redial: Option<Redial>) {
        let (peer, name) = (self.peer, &self.name);
        match (&self.kind, redial) {
            (Kind::Consumer, Some(redial)) if redial.refused || !self.joined => {
                say_unreachable(name, error, redial);
            }
            (Kind::Producer(_), _) if error.lasting() => {
                tracing::error!(%peer, name, %error, "refused a producer: none of its KV is taken");
            }
            _ if error.kind() == ErrorKind::PeerLost => {
                tracing::info!(%peer, name, %error, "a link ended");
            }
            _ => tracing::warn!(%peer, name, %error, "closed a link"),
        }
    }
}

fn say_unreachable(consumer: &str, error: &Error, redial: Redial) {
    let next = format!("next attempt in {:.1} s", redial.after.as_secs_f64());
    match redial.refused {
        true => tracing::error!(consumer, %error, "no KV goes to a consumer; {next}"),
        false => tracing::warn!(consumer, %error, "cannot reach a consumer; {next}"),
    }
}

/// The path on which a producer's bytes come: `cuda_ipc` into GPU memory; into host memory `local` beats `shm`.
pub(super) fn choose_path(
    gpu: bool,
    required: Option<&str>,
    peer: Incarnation,
    can_pass_fds: bool,
    why_not_unix: Option<String>,
) -> Result<&'static str> {
    let path = match (gpu, Local::reaches(peer), can_pass_fds) {
        (true, _, true) => cuda_ipc::NAME,
        (false, true, _) => "local",
        (false, false, true) => "shm",
        (_, _, false) => {
            let why = why_not_unix.unwrap_or_else(|| "the link is not a Unix socket".into());
            return Err(ErrorKind::NoPath.error(format!("no path to this producer: {why}")));
        }
    };
    match required {
        Some(required) if required != path => Err(ErrorKind::NoPath
            .error(format!("the best path is {path}, and {required} is required"))
            .fix("unset require_path, or start the two where that path exists")),
        _ => Ok(path),
    }
}

pub(super) fn has_ended(pidfd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

pub(super) fn wrong_role(what: &str) -> Error {
    ErrorKind::Config.error(format!("this agent's role does not let it {what}"))
}
