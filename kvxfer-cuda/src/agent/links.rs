//! Links coming, speaking and going.

use std::os::fd::OwnedFd;

use kvxfer_core::transport::SegmentHandle;
use kvxfer_core::wire::{Hello, Message, Purpose};
use kvxfer_core::{Error, ErrorKind, Incarnation, LinkId, Result, Time};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::closed;
use super::paths::{Path, Reach};
use super::progress::Progress;
use super::push::Shown;
use crate::control::{Event, Redial};

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
    /// How bytes go on it, once that is chosen.
    pub(super) path: Option<Path>,
    pidfd: Option<OwnedFd>,
}

pub(super) enum Kind {
    /// We push to it.
    Consumer,
    /// It pushes to us.
    Producer(Reach),
    /// Our engine's scheduler half.
    Observer,
    /// Somebody who asks which path it would get.
    Examiner(Reach),
}

pub(super) struct Up {
    link: LinkId,
    dialled: Option<usize>,
    purpose: Purpose,
    peer: Hello,
    pidfd: Option<OwnedFd>,
    reach: Reach,
}

impl Progress {
    pub(super) fn event(&mut self, now: Time, event: Event) {
        match event {
            Event::Up {
                link,
                dialled,
                purpose,
                peer,
                pidfd,
                can_pass_fds,
                why_not_unix,
                local,
                ..
            } => {
                let reach = Reach { can_pass_fds, why_not_unix, local, said: None };
                let up = Up { link, dialled, purpose, peer, pidfd, reach };
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
        let Up { link, dialled, purpose, peer, pidfd, reach } = up;
        let Hello { incarnation, name, .. } = peer;
        let kind = match (purpose, dialled) {
            (Purpose::Push, Some(index)) => {
                let paths = self.abilities_to(now, incarnation);
                let producer = self.producer.as_mut().ok_or_else(|| wrong_role("push"))?;
                producer.consumer_connected(index, link, incarnation, paths);
                Kind::Consumer
            }
            (Purpose::Push, None) => {
                let consuming = self.consuming.as_mut().ok_or_else(|| wrong_role("take a push"))?;
                consuming.session.producer_connected(now, link, incarnation);
                Kind::Producer(reach)
            }
            (Purpose::Observe, None) => {
                if let Some(consuming) = &mut self.consuming {
                    consuming.session.observer_connected(now, link, incarnation);
                }
                Kind::Observer
            }
            (Purpose::Examine, None) if self.consuming.is_some() => Kind::Examiner(reach),
            (Purpose::Observe | Purpose::Examine, _) | (Purpose::Locate, _) => {
                return Err(ErrorKind::Protocol.error("a link of that purpose is not for an agent"));
            }
        };
        let joined = matches!(kind, Kind::Observer | Kind::Examiner(_));
        self.links.insert(link, Link { peer: incarnation, name, kind, joined, path: None, pidfd });
        Ok(())
    }

    /// The layouts fit.
    pub(super) fn joined(&mut self, id: LinkId) {
        let Some(link) = self.links.get_mut(&id).filter(|link| !link.joined) else { return };
        link.joined = true;
        let (peer, name) = (link.peer, &link.name);
        let said = |path: &Path| (path.label(), path.why());
        let (path, not) = link.path.as_ref().map(said).unwrap_or_default();
        match link.kind {
            Kind::Consumer => tracing::info!(%peer, name, path, not, "connected to a consumer"),
            Kind::Producer(_) => tracing::info!(%peer, name, path, not, "a producer connected"),
            Kind::Observer | Kind::Examiner(_) => {}
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
        let Some(link) = self.links.get_mut(&id) else { return Ok(()) };
        match (&mut link.kind, message) {
            (
                Kind::Consumer,
                Message::Segment { segment, bytes, probe, transport, blob, generation: _ },
            ) => {
                let peer = link.peer;
                let path = link.path.as_ref().map(|path| path.name);
                let Some(path) = path.filter(|path| path.as_str() == transport) else {
                    return Err(ErrorKind::Protocol.error(format!(
                        "{} shows a segment for path {transport:?}, {path:?} was agreed",
                        link.name
                    )));
                };
                let pushes = self.pushes.as_mut().ok_or_else(closed)?;
                let handle = SegmentHandle { blob, bytes, fds };
                let shown = Shown { link: id, peer, segment, probe, path, handle };
                pushes.attach(shown).map_err(|error| self.path_failed(now, id, error))
            }
            (Kind::Consumer, Message::Attached { path, refused }) => {
                self.attached(id, &path, refused)
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
            (Kind::Producer(reach), message) => {
                match &message {
                    Message::Attach { memory, paths, .. } => {
                        reach.said = Some((*memory, paths.clone()));
                    }
                    Message::Probed { nanos, .. } => self.probed(id, *nanos),
                    _ => {}
                }
                match &mut self.consuming {
                    Some(consuming) => consuming.session.received(now, id, message),
                    None => Ok(()),
                }
            }
            (Kind::Examiner(_), Message::Examine { memory, paths }) => {
                self.examine(now, id, memory, &paths)
            }
            (Kind::Examiner(_), message) => {
                Err(ErrorKind::Protocol.error(format!("who only examines sent {message:?}")))
            }
            (Kind::Observer, message) => self.received_from_observer(now, id, message),
        }
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
            if let (Kind::Producer(_), Some(path)) = (&link.kind, &link.path)
                && consuming.cut_off(path.name, link.peer)
            {
                consuming.session.writer_dead(now, link.peer);
            }
        }
        match link.kind {
            Kind::Consumer => {
                if let Some(pushes) = &mut self.pushes {
                    pushes.let_go(link.peer);
                }
            }
            Kind::Producer(_) => self.orphans.extend(link.pidfd.map(|fd| (link.peer, fd))),
            Kind::Observer | Kind::Examiner(_) => {}
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

    /// A writer's connections broke, and were cut off.
    pub(super) fn writer_lost(&mut self, now: Time, peer: Incarnation, error: &Error) {
        let pushes = |link: &Link| link.peer == peer && matches!(link.kind, Kind::Producer(_));
        let ids: Vec<LinkId> =
            self.links.iter().filter(|(_, link)| pushes(link)).map(|(&id, _)| id).collect();
        for id in ids {
            let error = self.path_failed(now, id, error.clone());
            self.close_link(now, id, &error);
        }
    }

    /// A process that ended writes no more.
    pub(super) fn find_dead(&mut self, now: Time) {
        let Some(consuming) = &mut self.consuming else { return };
        let connected = |peer: Incarnation| self.links.values().any(|link| link.peer == peer);
        let fences = consuming.store.moves_now() || GPU_DEATH_FENCES;
        self.orphans.retain(|(peer, pidfd)| {
            let asked = consuming.session.is_writer(*peer) || consuming.store.waits_for(*peer);
            if connected(*peer) || !asked {
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
    pub(super) fn comes_by(&self) -> Option<String> {
        self.path.as_ref().filter(|path| !path.to_peer).map(Path::label)
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
            // A probe may come every few seconds, and goes as soon as it has its answer.
            (Kind::Examiner(_), _) if error.kind() == ErrorKind::PeerLost => {
                tracing::debug!(%peer, name, %error, "who examined is gone");
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

pub(super) fn has_ended(pidfd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

pub(super) fn wrong_role(what: &str) -> Error {
    ErrorKind::Config.error(format!("this agent's role does not let it {what}"))
}
