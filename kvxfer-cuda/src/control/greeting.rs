//! The two hellos, the frames after them, and the last word.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use kvxfer_core::wire::{self, Frame, Hello, Message, Purpose};
use kvxfer_core::{Error, ErrorKind, LinkId, Result};

use super::link::Stage;
use super::{Control, Event, Redial};

impl Control {
    /// Takes one frame. An error ends the link; it names the peer.
    pub(super) fn take(&mut self, id: LinkId, frame: Frame, fds: Vec<OwnedFd>) -> Result<()> {
        let link = self.links.get_mut(&id).expect("the caller looked");
        let up = matches!(link.stage, Stage::Up { .. });
        let result = match (frame, link.dialled) {
            (Frame::Message(Message::Bye { reason, lasting }), _) => {
                link.refused = lasting;
                Err(match up && !lasting {
                    true => {
                        ErrorKind::PeerLost.error(format!("the peer closed the link: {reason}"))
                    }
                    false => {
                        ErrorKind::NoPath.error(format!("the peer refused the link: {reason}"))
                    }
                })
            }
            (Frame::Message(Message::Ping), _) if up => Ok(()),
            (Frame::Message(message), _) if up => {
                self.events.push(Event::Message { link: id, message, fds });
                Ok(())
            }
            (Frame::Message(_), _) => {
                Err(ErrorKind::Protocol.error("the peer refused the link, and went on to speak"))
            }
            (Frame::Hello(hello), Some(peer)) => self.answered(id, peer, hello),
            (Frame::Hello(hello), None) => self.greeted(id, hello),
        };
        result.map_err(|error| match self.links.get(&id) {
            Some(link) => link.named(&error),
            None => error,
        })
    }

    /// The dialler's hello has come: answer it, or say why not.
    fn greeted(&mut self, id: LinkId, theirs: Hello) -> Result<()> {
        let ours = Hello { purpose: theirs.purpose, ..self.config.hello.clone() };
        let link = self.links.get_mut(&id).expect("the caller looked");
        let version = match wire::negotiate(ours.versions, theirs.versions) {
            Ok(version) => version,
            Err(error) => {
                // The dialler sees by our hello what is wrong; the reason is for other releases.
                self.refuse(id, ours.versions.1, &error);
                return Err(error);
            }
        };
        if theirs.purpose != Purpose::Locate && link.unix.is_none() && !self.config.allow_insecure {
            let about = format!(
                "{} serves links over Unix sockets only: over TCP without a key nothing proves who \
                 the peer is",
                ours.name
            );
            let error = ErrorKind::NoPath.error(about).fix(
                "let both containers see one socket folder, or set allow_insecure on both sides",
            );
            self.refuse(id, version, &error);
            return Err(error);
        }
        link.outbox.push(&[], |bytes| wire::encode_hello(&ours, bytes))?;
        if theirs.purpose == Purpose::Locate {
            let _ = link.flush();
            self.forget_link(id);
            return Ok(());
        }
        let why_not_unix = match &link.unix {
            Some(_) => None,
            None if theirs.boot_id != ours.boot_id => Some("it is on another host".to_owned()),
            None => Some(
                "it is on this host and came over TCP: the two see no socket folder in common"
                    .to_owned(),
            ),
        };
        self.dirty.push(id);
        self.up(id, version, theirs, why_not_unix);
        Ok(())
    }

    /// Closes a link, with a word to the peer if it can be had at once. No [`Event::Down`] follows. Whoever dialled
    /// waits long before it does again if the reason is a [lasting](Error::lasting) one; says when that is us.
    pub fn close(&mut self, link: LinkId, why: &Error) -> Option<Redial> {
        let us = self.config.hello.incarnation;
        let open = self.links.get_mut(&link)?;
        let Stage::Up { version, .. } = open.stage else { return None };
        let bye = bye(why);
        let _ = open.outbox.push(&[], |bytes| wire::encode(&bye, us, version, bytes));
        let _ = open.flush();
        open.refused = why.lasting();
        let dialled = open.dialled;
        self.forget_link(link);
        self.redial(dialled?)
    }

    /// Tells the dialler why there will be no link, if the socket takes it at once.
    fn refuse(&self, id: LinkId, version: u16, error: &Error) {
        let mut bytes = Vec::new();
        if let Some(link) = self.links.get(&id)
            && self.encode_refusal(version, error, &mut bytes).is_ok()
        {
            let _ = crate::fds::send_with_fds(&link.socket, &bytes, &[]);
        }
    }

    /// A refusal is a hello that grants nothing but [`Purpose::Locate`], and then the reason.
    pub(super) fn encode_refusal(
        &self,
        version: u16,
        why: &Error,
        bytes: &mut Vec<u8>,
    ) -> Result<()> {
        let ours = Hello { purpose: Purpose::Locate, ..self.config.hello.clone() };
        let bye = bye(why);
        wire::encode_hello(&ours, bytes)?;
        wire::encode(&bye, ours.incarnation, version, bytes)
    }

    /// The listener's hello has come: go where it points, or the link is up.
    fn answered(&mut self, id: LinkId, peer: usize, theirs: Hello) -> Result<()> {
        let negotiated = wire::negotiate(self.config.hello.versions, theirs.versions);
        if let (Err(_), Some(link)) = (&negotiated, self.links.get_mut(&id)) {
            link.refused = true;
        }
        let version = negotiated?;
        let Some((purpose, expect, why_not_unix)) = self.joining(peer) else {
            self.located(peer, id, theirs);
            return Ok(());
        };
        if theirs.purpose == Purpose::Locate {
            // The reason follows.
            return Ok(());
        }
        if theirs.purpose != purpose {
            let what = format!("the answer is for {:?}, {purpose:?} was asked", theirs.purpose);
            return Err(ErrorKind::Protocol.error(what));
        }
        if let Some(expect) = expect.filter(|expect| *expect != theirs.incarnation) {
            return Err(Error::new(
                ErrorKind::PeerLost,
                format!("{expect} was located there, and {} answers", theirs.incarnation),
            )
            .fix("if it was not restarted: give each agent an address of its own, not one that is balanced")
            .retry());
        }
        self.linked(peer, id);
        self.up(id, version, theirs, why_not_unix);
        Ok(())
    }

    fn up(&mut self, id: LinkId, version: u16, peer: Hello, why_not_unix: Option<String>) {
        let link = self.links.get_mut(&id).expect("the caller looked");
        let leased = peer.purpose != Purpose::Observe || link.unix.is_none();
        link.stage = Stage::Up { version, peer: peer.incarnation, leased };
        link.said = self.now;
        let local = match link.unix {
            Some(_) => None,
            None => rustix::net::getsockname(&link.socket)
                .ok()
                .and_then(|address| SocketAddr::try_from(address).ok())
                // An IPv4 connection to a socket of both kinds.
                .map(|address| address.ip().to_canonical()),
        };
        let pid = link.unix.as_ref().and_then(|unix| unix.pid);
        let pidfd = link.unix.as_mut().and_then(|unix| unix.pidfd.take());
        self.events.push(Event::Up {
            link: id,
            dialled: link.dialled,
            purpose: peer.purpose,
            version,
            pid,
            pidfd,
            can_pass_fds: link.unix.is_some(),
            why_not_unix,
            local,
            peer,
        });
        self.due_at(self.now + self.config.limits.silence / 3);
    }
}

/// The last word on a link.
fn bye(why: &Error) -> Message {
    Message::Bye { reason: wire::bounds::reason(why.to_string()), lasting: why.lasting() }
}
