//! Data sockets: how they are made, and how they end.

use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::time::Duration;

use kvxfer_core::{ErrorKind, Result};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

/// How long sent bytes may stay without an answer of the other host, and a silent one without a sign of life.
const SILENCE: Duration = Duration::from_secs(10);
/// From then on an idle connection asks whether the other host is there.
const IDLE: Duration = Duration::from_secs(5);
const BACKLOG: i32 = 1024;

/// A new non-blocking socket for that address.
fn socket(address: &SocketAddr) -> rustix::io::Result<OwnedFd> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(family, SocketType::STREAM, flags, None)
}

/// Starts to connect; the socket is writable when that has ended, and then [`connected`] tells how.
pub(super) fn connect(address: &SocketAddr) -> rustix::io::Result<OwnedFd> {
    let socket = socket(address)?;
    configure(&socket)?;
    match rustix::net::connect(&socket, address) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(errno) => Err(errno),
    }
}

pub(super) fn connected(socket: &OwnedFd) -> rustix::io::Result<()> {
    sockopt::socket_error(socket).flatten()
}

/// Listens; also the address that was bound.
pub(super) fn listen(host: &str, port: u16) -> Result<(OwnedFd, SocketAddr)> {
    let resolved = (host, port).to_socket_addrs().map(|mut found| found.next());
    let Ok(Some(address)) = resolved else {
        return Err(ErrorKind::Config
            .error(format!("tcp cannot receive on {host}: the host is unknown"))
            .fix("give an address of this host, or 0.0.0.0 for all of them"));
    };
    let listen = || {
        let socket = socket(&address)?;
        sockopt::set_socket_reuseaddr(&socket, true)?;
        rustix::net::bind(&socket, &address)?;
        rustix::net::listen(&socket, BACKLOG)?;
        let bound = SocketAddr::try_from(rustix::net::getsockname(&socket)?)?;
        Ok((socket, bound))
    };
    listen().map_err(|errno: Errno| {
        let error =
            |why: &str| ErrorKind::Config.error(format!("tcp cannot receive on {address}: {why}"));
        match errno {
            Errno::ADDRINUSE => error("the port is in use")
                .fix("give each engine rank a port of its own, or 0 for any free one"),
            Errno::ADDRNOTAVAIL => error("this host has no such address")
                .fix("give an address of this host, or 0.0.0.0 for all of them"),
            Errno::ACCESS => error("the port is reserved for root").fix("use a port from 1024 on"),
            errno => ErrorKind::Io.error(format!("tcp cannot receive on {address}: {errno}")),
        }
    })
}

/// Accepts one connection.
pub(super) fn accept(listener: &OwnedFd) -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::accept_with(listener, flags)?;
    configure(&socket)?;
    Ok(socket)
}

/// A cable that was pulled ends the connection in bounded time, whether bytes are under way or not.
fn configure(socket: &OwnedFd) -> rustix::io::Result<()> {
    sockopt::set_tcp_nodelay(socket, true)?;
    sockopt::set_tcp_user_timeout(socket, SILENCE.as_millis() as u32)?;
    sockopt::set_tcp_keepidle(socket, IDLE)?;
    sockopt::set_tcp_keepintvl(socket, Duration::from_secs(1))?;
    sockopt::set_tcp_keepcnt(socket, (SILENCE - IDLE).as_secs() as u32)?;
    sockopt::set_socket_keepalive(socket, true)
}

/// Closes at once: what the other side has not been sent, it never is.
pub(super) fn abort(socket: OwnedFd) {
    let _ = sockopt::set_socket_linger(&socket, Some(Duration::ZERO));
}
