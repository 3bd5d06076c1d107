//! Asking who is at an address, once, and waiting for the answer: for tools, which have no loop to run.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use kvxfer_core::key::KEY_VERSION;
use kvxfer_core::path::{Ability, Refusal};
use kvxfer_core::wire::message::Memory;
use kvxfer_core::wire::{self, Decoder, Frame, Hello, Message, Purpose};
use kvxfer_core::{Error, ErrorKind, Result};

use super::peer::Peer;
use super::{Address, Control, ControlConfig, Event, folder};
use crate::identity;

/// An agent that answered.
#[derive(Debug)]
pub struct Located {
    /// What it says of itself.
    pub hello: Hello,
    /// From the first packet to the whole answer; a name's resolution is not in it.
    pub took: Duration,
    /// Its process, if it was asked over a Unix socket and lives in a PID namespace that we see.
    pub pid: Option<u32>,
    /// Whether its death can be waited for: over a Unix socket, unless the kernel is too old.
    pub mortal: bool,
}

/// Asks the agent at that address who it is, and leaves. Nothing has an effect there.
///
/// # Errors
/// Nobody answers within `patience` (`Timeout`), nobody listens (`PeerLost`), or somebody else does (`Protocol`);
/// over a Unix socket also a process of another user (`NoPath`).
pub fn locate(address: &Address, name: &str, patience: Duration) -> Result<Located> {
    let start = Instant::now();
    let (deadline, mut started) = (start + patience, start);
    let hello = hello(name)?;
    let (hello, peer) = match address {
        Address::Unix(path) => {
            let socket = folder::connect(path)?
                .map_err(|errno| unreachable(address, &std::io::Error::from(errno)))?;
            let peer = Peer::of(&socket)?;
            let socket = UnixStream::from(socket);
            socket.set_nonblocking(false).map_err(|error| unreachable(address, &error))?;
            let wait = |socket: &UnixStream, left| socket.set_read_timeout(Some(left));
            (ask(address, socket, &hello, deadline, wait)?, Some(peer))
        }
        Address::Tcp { host, port } => {
            let found = resolve(host, *port, deadline)?;
            started = Instant::now();
            let socket = connect(address, &found, deadline)?;
            let wait = |socket: &TcpStream, left| socket.set_read_timeout(Some(left));
            (ask(address, socket, &hello, deadline, wait)?, None)
        }
    };
    let pid = peer.as_ref().and_then(|peer| peer.pid);
    let mortal = peer.is_some_and(|peer| peer.pidfd.is_some());
    Ok(Located { hello, took: started.elapsed(), pid, mortal })
}

/// A producer to be: where it keeps its KV, and what it is able to do.
pub type Question = (Memory, Vec<Ability>);

/// The path that such a producer would get, and each other one that it wouldn't, with the reason.
pub type Answer = (Option<String>, Vec<Refusal>);

/// Asks the agent at that address which path each of these producers would get, over a link like theirs.
///
/// # Errors
/// `NoPath`: there would be no link. `Timeout`: no answer within `patience`. Others: the agent takes no pushes, or
/// there is none.
pub fn examine(
    address: &Address,
    name: &str,
    allow_insecure: bool,
    questions: &[Question],
    patience: Duration,
) -> Result<Vec<Answer>> {
    let peers = vec![address.clone()];
    let config = ControlConfig { peers, allow_insecure, ..ControlConfig::new(hello(name)?) };
    let mut control = Control::new(config)?;
    control.dial(0, Purpose::Examine);
    let (start, mut events, mut answers) = (Instant::now(), Vec::new(), Vec::new());
    while answers.len() < questions.len() {
        let now = start.elapsed();
        let left = patience.checked_sub(now).filter(|left| !left.is_zero()).ok_or_else(|| {
            ErrorKind::Timeout.error(format!("{address} does not say which path it would choose"))
        })?;
        control.poll(now, Some(left), &mut events)?;
        for event in events.drain(..) {
            match event {
                Event::Up { link, .. } => {
                    for (memory, paths) in questions {
                        let (memory, paths) = (*memory, paths.clone());
                        control.send(link, &Message::Examine { memory, paths }, &[])?;
                    }
                }
                Event::Message { message: Message::Examined { path, refused }, .. } => {
                    answers.push((path, refused));
                }
                Event::Message { .. } => {}
                Event::DialFailed { error, .. } | Event::Down { error, .. } => return Err(error),
            }
        }
    }
    Ok(answers)
}

/// Says who a tool is.
fn hello(name: &str) -> Result<Hello> {
    Ok(Hello {
        versions: wire::VERSIONS,
        key_versions: (KEY_VERSION, KEY_VERSION),
        incarnation: identity::incarnation()?,
        purpose: Purpose::Locate,
        boot_id: identity::boot_id()?,
        unix_path: None,
        name: name.to_owned(),
    })
}

/// What a name stands for. On a thread of its own: the resolver knows no deadline.
fn resolve(host: &str, port: u16, deadline: Instant) -> Result<Vec<SocketAddr>> {
    let (sender, receiver) = mpsc::channel();
    let target = (host.to_owned(), port);
    std::thread::Builder::new()
        .spawn(move || sender.send(target.to_socket_addrs().map(Iterator::collect::<Vec<_>>)))
        .map_err(|error| ErrorKind::Io.error(format!("cannot start a thread: {error}")))?;
    let fix = "check the name, and the name servers of this container";
    match receiver.recv_timeout(left(deadline)) {
        Ok(Ok(found)) if !found.is_empty() => Ok(found),
        Ok(Ok(_)) => Err(ErrorKind::PeerLost.error(format!("{host} has no address")).fix(fix)),
        Ok(Err(error)) => Err(ErrorKind::PeerLost
            .error(format!("the name {host} cannot be resolved: {error}"))
            .fix(fix)),
        Err(_) => Err(ErrorKind::Timeout
            .error(format!("the name {host} was not resolved in time"))
            .fix(fix)),
    }
}

/// Connects to the first of a name's addresses that answers; each has its share of the time.
fn connect(address: &Address, found: &[SocketAddr], deadline: Instant) -> Result<TcpStream> {
    let mut last = ErrorKind::PeerLost.error(format!("{address} has no address"));
    for (tried, at) in found.iter().enumerate() {
        let share = left(deadline) / (found.len() - tried) as u32;
        match TcpStream::connect_timeout(at, share.max(Duration::from_millis(1))) {
            Ok(socket) => return Ok(socket),
            Err(error) => last = unreachable(address, &error),
        }
    }
    Err(last)
}

fn ask<S: Read + Write>(
    address: &Address,
    mut socket: S,
    ours: &Hello,
    deadline: Instant,
    wait: impl Fn(&S, Duration) -> std::io::Result<()>,
) -> Result<Hello> {
    let mut bytes = Vec::new();
    wire::encode_hello(ours, &mut bytes)?;
    // Somebody else may have closed already; what was said before tells who it is.
    let _ = socket.write_all(&bytes);
    let mut decoder = Decoder::new();
    let mut buffer = [0; 2048];
    let silent = || {
        ErrorKind::Timeout
            .error(format!("{address} accepts connections, and says nothing"))
            .fix("check the port: it is the agent's own port; if it is, the agent is stuck")
    };
    loop {
        wait(&socket, left(deadline)).map_err(|error| unreachable(address, &error))?;
        let taken = match socket.read(&mut buffer) {
            // Whoever sends byte by byte has no more time than others.
            _ if Instant::now() >= deadline => return Err(silent()),
            Ok(0) => {
                return Err(ErrorKind::Protocol
                    .error(format!("{address} closed the connection without a word"))
                    .fix("check the port: it is the agent's own port, not the server's"));
            }
            Ok(taken) => taken,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) if is_timeout(&error) => return Err(silent()),
            Err(error) => return Err(unreachable(address, &error)),
        };
        // A hello fits, and nothing after it matters.
        let _ = decoder.push(&buffer[..taken]);
        if let Some(Frame::Hello(hello)) = decoder.next().map_err(|error| named(address, &error))? {
            return Ok(hello);
        }
    }
}

fn named(address: &Address, error: &Error) -> Error {
    let named = error.kind().error(format!("{address}: {}", error.about()));
    match error.remedy() {
        Some(fix) => named.fix(fix),
        None => named,
    }
}

fn unreachable(address: &Address, error: &std::io::Error) -> Error {
    let (kind, fix) = match error.kind() {
        _ if is_timeout(error) => (
            ErrorKind::Timeout,
            "check the address, routes, firewalls and network policies between the two",
        ),
        std::io::ErrorKind::ConnectionRefused => (
            ErrorKind::PeerLost,
            "start the decode engine, and have it listen at that address and port",
        ),
        std::io::ErrorKind::NotFound => (
            ErrorKind::NoPath,
            "mount the socket folder in both containers at the same path, or set socket_dir",
        ),
        _ => (ErrorKind::PeerLost, "check the address, and the network between the two"),
    };
    let why = match is_timeout(error) {
        true => "no answer in time".to_owned(),
        false => error.to_string(),
    };
    kind.error(format!("cannot connect to {address}: {why}")).fix(fix).retry()
}

fn is_timeout(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::TimedOut | std::io::ErrorKind::WouldBlock)
}

/// Never zero: a socket takes that for no limit.
fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
}
