//! What goes into a [`Control`](super::Control) and what comes out of it.

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use kvxfer_core::wire::{Hello, Message, Purpose};
use kvxfer_core::{Error, LinkId};

use super::Address;

/// What a [`Control`](super::Control) is made from.
#[derive(Clone, Debug)]
pub struct ControlConfig {
    /// Where to listen: a TCP address, beside the socket in `socket_dir`; or the very path of a Unix
    /// socket, in place of it.
    pub listen: Option<Address>,
    /// The folder for this agent's Unix socket, and for it alone: created with mode 0700, or verified.
    /// `None`: no Unix socket, for who only dials.
    pub socket_dir: Option<PathBuf>,
    /// Who can be dialled; [`dial`](super::Control::dial) counts them from 0.
    pub peers: Vec<Address>,
    /// Also run links over TCP, where nothing proves who the peer is.
    pub allow_insecure: bool,
    /// What to say of ourselves. `purpose` and `unix_path` are filled in.
    pub hello: Hello,
    /// The bounds.
    pub limits: Limits,
    /// Seed of the jitter between dials.
    pub seed: u64,
}

impl ControlConfig {
    /// Listens nowhere, dials nobody, trusts Unix sockets only.
    pub fn new(hello: Hello) -> Self {
        Self {
            listen: None,
            socket_dir: None,
            peers: Vec::new(),
            allow_insecure: false,
            seed: u64::from_le_bytes(hello.incarnation.0[..8].try_into().expect("eight bytes")),
            hello,
            limits: Limits::default(),
        }
    }
}

/// The bounds of a [`Control`](super::Control). `silence` must be the same on all agents.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at one time, those without a hello included.
    pub max_links: usize,
    /// From the beginning of a connection until the other side's hello.
    pub hello_timeout: Duration,
    /// The first pause between two dials; it doubles, and is jittered down to a half.
    pub backoff: Duration,
    /// The longest pause between two dials.
    pub backoff_max: Duration,
    /// The pause, likewise jittered, after a link that ended for a reason which dialling again does not cure. Not
    /// for ever, for the peer may be restarted with what was wrong put right.
    pub refused_backoff: Duration,
    /// A link on which nothing came for that long is down. Each side says something three times as often.
    pub silence: Duration,
    /// Bytes that wait for a peer to read them. Room for a few of the largest frames.
    pub queue_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_links: 1024,
            hello_timeout: Duration::from_secs(2),
            backoff: Duration::from_millis(50),
            backoff_max: Duration::from_secs(5),
            refused_backoff: Duration::from_secs(60),
            silence: Duration::from_secs(10),
            queue_bytes: 8 << 20,
        }
    }
}

/// What [`poll`](super::Control::poll) tells.
#[derive(Debug)]
pub enum Event {
    /// Both hellos have passed.
    Up {
        /// The link.
        link: LinkId,
        /// Which configured peer was dialled; `None` if the peer dialled us.
        dialled: Option<usize>,
        /// What the dialler wants.
        purpose: Purpose,
        /// What the peer says of itself.
        peer: Hello,
        /// The protocol version of this link.
        version: u16,
        /// The peer's process, if it is on this host and in a PID namespace that we see.
        pid: Option<u32>,
        /// Readable once that process is dead. On every Unix link, unless the kernel is older than 6.5
        /// and the namespaces differ.
        pidfd: Option<OwnedFd>,
        /// Whether this is a Unix socket, so that descriptors can be sent.
        can_pass_fds: bool,
        /// Why it is not a Unix socket, if it is not.
        why_not_unix: Option<String>,
        /// The address of ours that a TCP connection goes to.
        local: Option<IpAddr>,
    },
    /// The peer says something. [`Message::Ping`] and [`Message::Bye`] are dealt with here.
    Message {
        /// The link.
        link: LinkId,
        /// What.
        message: Message,
        /// What came beside it.
        fds: Vec<OwnedFd>,
    },
    /// The link is gone.
    Down {
        /// The link.
        link: LinkId,
        /// Why.
        error: Error,
        /// If we had dialled, when that follows by itself.
        redial: Option<Redial>,
    },
    /// A dial did not become a link. The next one follows by itself.
    DialFailed {
        /// Which configured peer.
        peer: usize,
        /// Why.
        error: Error,
        /// When.
        redial: Redial,
    },
}

/// The next dial of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Redial {
    /// After about that long.
    pub after: Duration,
    /// Whether it fails again unless someone configures one of the sides anew: then it is long.
    pub refused: bool,
}

/// What was turned away, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Accepted connections that ended without a link, other than [`Purpose::Locate`].
    pub refused: u64,
    /// Connections closed at once because there were [`Limits::max_links`].
    pub over_limit: u64,
    /// Times that accepting paused for want of descriptors or memory.
    pub accept_pauses: u64,
}
