//! Accepting connections, and turning them away.

use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::time::Duration;

use kvxfer_core::{Error, ErrorKind, LinkId, Result, Time};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use super::folder::BACKLOG;
use super::link::Link;
use super::peer::Peer;
use super::{Address, Control, TCP, UNIX, failed};

/// Connections accepted before links get their turn.
const ACCEPT_TURN: usize = 64;
/// How long accepting rests when descriptors have run out.
const PAUSE: Duration = Duration::from_millis(100);

/// A listening TCP socket.
#[derive(Debug)]
pub(super) struct TcpListener {
    pub(super) socket: OwnedFd,
    /// The host as it was given, and the real port.
    pub(super) address: Address,
}

impl TcpListener {
    /// Listens on that address and no other. A name is resolved here; this may wait for the resolver.
    pub(super) fn bind(host: &str, port: u16) -> Result<Self> {
        let given = Address::tcp(host, port);
        let resolved = (host, port).to_socket_addrs().map(|mut found| found.next());
        let Ok(Some(address)) = resolved else {
            return Err(ErrorKind::Config
                .error(format!("cannot listen on {given}: the host is unknown"))
                .fix("give an address of this host, or 0.0.0.0 for all of them"));
        };
        let listen = || {
            let socket = socket_for(&address)?;
            sockopt::set_socket_reuseaddr(&socket, true)?;
            rustix::net::bind(&socket, &address)?;
            rustix::net::listen(&socket, BACKLOG)?;
            let bound = SocketAddr::try_from(rustix::net::getsockname(&socket)?)?;
            Ok((socket, bound.port()))
        };
        let (socket, port) = listen().map_err(|errno| match errno {
            Errno::ADDRINUSE => ErrorKind::Config
                .error(format!("port {port} is in use, so nothing can listen on {given}"))
                .fix("give each engine rank a port of its own, or stop what has this one"),
            Errno::ADDRNOTAVAIL => ErrorKind::Config
                .error(format!("cannot listen on {given}: this host has no such address"))
                .fix("give an address of this host, or 0.0.0.0 for all of them"),
            Errno::ACCESS => ErrorKind::Config
                .error(format!("port {port} is reserved for root"))
                .fix("use a port from 1024 on"),
            errno => failed(&format!("cannot listen on {given}"), errno),
        })?;
        Ok(Self { socket, address: Address::tcp(host, port) })
    }
}

/// A new non-blocking TCP socket of the address's family.
pub(super) fn socket_for(address: &SocketAddr) -> rustix::io::Result<OwnedFd> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(family, SocketType::STREAM, flags, None)
}

/// Whether connections are accepted.
#[derive(Debug)]
pub(super) enum Accepting {
    Open,
    /// Descriptors have run out. Who dials waits in the kernel's queue.
    Paused {
        /// Unknown until the time is next read.
        since: Option<Time>,
    },
}

impl Accepting {
    pub(super) fn due(&self) -> Option<Time> {
        match self {
            Self::Paused { since: Some(since) } => Some(*since + PAUSE),
            _ => None,
        }
    }

    pub(super) fn is_over(&self, now: Time) -> bool {
        self.due().is_some_and(|due| due <= now)
    }
}

impl Control {
    /// Accepts what waits at a listener, up to a turn's worth.
    pub(super) fn accept(&mut self, token: u64) {
        for _ in 0..ACCEPT_TURN {
            let listener = match token {
                TCP => self.tcp.as_ref().map(|listener| &listener.socket),
                _ => self.unix.as_ref().map(|listener| &listener.socket),
            };
            let (Some(listener), Accepting::Open) = (listener, &self.accepting) else { return };
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            match rustix::net::acceptfrom_with(listener, flags) {
                Ok((socket, from)) => {
                    let from = from.and_then(|from| SocketAddr::try_from(from).ok());
                    self.accepted(socket, from);
                }
                Err(Errno::AGAIN) => return,
                Err(errno @ (Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM)) => {
                    return self.pause_accepting(errno);
                }
                // That connection died in the queue.
                Err(_) => {}
            }
        }
    }

    /// `from` is there for TCP only.
    fn accepted(&mut self, socket: OwnedFd, from: Option<SocketAddr>) {
        let (unix, remote) = match from {
            Some(from) => {
                let _ = sockopt::set_tcp_nodelay(&socket, true);
                (None, from.to_string())
            }
            None => match Peer::of(&socket) {
                Ok(peer) => {
                    let pid = peer.pid.map_or("of another namespace".into(), |pid| pid.to_string());
                    (Some(peer), format!("process {pid}"))
                }
                Err(error) => {
                    self.counts.refused += 1;
                    self.say_bye(&socket, &error);
                    if let Some(muted) = self.strangers.pass(self.now) {
                        tracing::warn!(muted, "refused a connection: {error}");
                    }
                    return;
                }
            },
        };
        let limit = self.config.limits.max_links;
        if self.links.len() >= limit {
            self.counts.over_limit += 1;
            let why = format!("{limit} connections are open here, the limit");
            self.say_bye(&socket, &ErrorKind::Io.error(why).retry());
            if let Some(muted) = self.shortages.pass(self.now) {
                tracing::warn!(
                    muted,
                    limit,
                    "refused a connection from {remote}: the limit is reached"
                );
            }
            return;
        }
        let versions = self.config.hello.versions;
        if let Err(error) = self.add(|id| Link::new(id, socket, unix, remote, None, versions)) {
            tracing::warn!("dropped a connection: {error}");
        }
    }

    /// Tells a connection that is about to be closed why, if the socket takes it at once.
    fn say_bye(&self, socket: &OwnedFd, why: &Error) {
        let mut bytes = Vec::new();
        if self.encode_refusal(self.config.hello.versions.1, why, &mut bytes).is_ok() {
            let _ = crate::fds::send_with_fds(socket, &bytes, &[]);
        }
    }

    fn pause_accepting(&mut self, errno: Errno) {
        self.counts.accept_pauses += 1;
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        if let Some(muted) = self.shortages.pass(self.now) {
            let error = failed("connections wait, none can be accepted", errno);
            tracing::warn!(muted, ?limit, "{error}");
        }
        self.watch_listeners(false);
        self.accepting = Accepting::Paused { since: None };
        self.due_at(self.now + PAUSE);
    }

    pub(super) fn resume_accepting(&mut self) {
        self.accepting = Accepting::Open;
        self.watch_listeners(true);
    }

    fn watch_listeners(&self, watch: bool) {
        let tcp = self.tcp.as_ref().map(|listener| (&listener.socket, TCP));
        let unix = self.unix.as_ref().map(|listener| (&listener.socket, UNIX));
        for (socket, token) in tcp.into_iter().chain(unix) {
            match watch {
                true => {
                    if let Err(error) = self.poller.add(socket, token, false) {
                        tracing::error!("a listening socket is not watched any more: {error}");
                    }
                }
                false => self.poller.remove(socket),
            }
        }
    }

    /// An accepted connection ended before it was a link.
    pub(super) fn turned_away(&mut self, id: LinkId, error: &Error) {
        let Some(link) = self.forget_link(id) else { return };
        if !link.inbox.touched && error.kind() == ErrorKind::PeerLost {
            // A health check, or another agent that looks whether we live.
            tracing::debug!("{} connected and left", link.remote);
            return;
        }
        self.counts.refused += 1;
        if let Some(muted) = self.strangers.pass(self.now) {
            tracing::warn!(
                muted,
                "refused a connection to the control port (HTTP belongs to the engine's port): {error}"
            );
        }
    }
}
