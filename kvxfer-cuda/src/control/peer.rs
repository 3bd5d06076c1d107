//! Who is at the other end of a Unix socket.
//!
//! Both socket options are asked for here rather than through rustix: it has no `SO_PEERPIDFD`, and
//! its `SO_PEERCRED` types the process number as non-zero, while the kernel says 0 for a process in a
//! PID namespace that we cannot see, the usual case for two containers.

use std::ffi::{c_int, c_void};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use kvxfer_core::{ErrorKind, Result};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags};

use super::failed;

/// The process that connected, or that listens.
#[derive(Debug)]
pub(super) struct Peer {
    /// Its number as this process sees it; none if it lives in a PID namespace that we do not see.
    pub(super) pid: Option<u32>,
    /// Becomes readable when that process dies.
    pub(super) pidfd: Option<OwnedFd>,
}

impl Peer {
    /// Asks the kernel, and refuses a process of another user.
    pub(super) fn of(socket: impl AsFd) -> Result<Self> {
        let socket = socket.as_fd();
        let [pid, uid, _gid] = peer_cred(socket).map_err(|errno| {
            failed("cannot ask who is at the other end of a Unix socket", errno)
        })?;
        check_uid(uid, rustix::process::geteuid().as_raw())?;
        let pidfd = peer_pidfd(socket).or_else(|errno| match Pid::from_raw(pid.cast_signed()) {
            // Linux before 6.5. The number is the peer's as long as its end is open; if it was closed
            // in between, the link is about to end anyway.
            Some(pid) if errno == Errno::NOPROTOOPT => {
                rustix::process::pidfd_open(pid, PidfdFlags::empty())
            }
            _ => Err(errno),
        });
        Ok(Self { pid: (pid != 0).then_some(pid), pidfd: pidfd.ok() })
    }
}

/// Only a process of our own user may hand us memory, or get ours.
fn check_uid(theirs: u32, ours: u32) -> Result<()> {
    match theirs == ours {
        true => Ok(()),
        false => Err(ErrorKind::NoPath
            .error(format!(
                "the process at the other end of the Unix socket runs as uid {theirs}, we as uid {ours}"
            ))
            .fix("run both engines as the same user")),
    }
}

unsafe extern "C" {
    /// getsockopt(2), from the C library that the standard library links.
    fn getsockopt(
        fd: c_int,
        level: c_int,
        name: c_int,
        value: *mut c_void,
        length: *mut u32,
    ) -> c_int;
}

/// Reads a socket option of `N` numbers; every bit pattern is a value of the result.
fn option<const N: usize>(socket: BorrowedFd<'_>, name: c_int) -> rustix::io::Result<[u32; N]> {
    const SOL_SOCKET: c_int = 1;
    let mut value = [0u32; N];
    let mut length = size_of_val(&value) as u32;
    // SAFETY: `value` is `length` writable bytes and both live across the call, which is all that
    // getsockopt(2) asks for.
    let status = unsafe {
        getsockopt(
            socket.as_raw_fd(),
            SOL_SOCKET,
            name,
            value.as_mut_ptr().cast::<c_void>(),
            &raw mut length,
        )
    };
    match status {
        0 => Ok(value),
        _ => Err(std::io::Error::last_os_error()
            .raw_os_error()
            .map_or(Errno::INVAL, Errno::from_raw_os_error)),
    }
}

/// `SO_PEERCRED`: process, user, group.
fn peer_cred(socket: BorrowedFd<'_>) -> rustix::io::Result<[u32; 3]> {
    const SO_PEERCRED: c_int = 17;
    option(socket, SO_PEERCRED)
}

/// `SO_PEERPIDFD` (Linux 6.5): unlike `pidfd_open` free of races, and works across PID namespaces.
fn peer_pidfd(socket: BorrowedFd<'_>) -> rustix::io::Result<OwnedFd> {
    const SO_PEERPIDFD: c_int = 77;
    let [fd] = option::<1>(socket, SO_PEERPIDFD)?;
    // SAFETY: the kernel has just installed this descriptor (close-on-exec) for us, and nobody else
    // knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd.cast_signed()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_of_another_user_is_refused() {
        assert!(check_uid(7, 7).is_ok());
        let error = check_uid(1000, 7).unwrap_err();
        assert!(error.to_string().contains("uid 1000"), "{error}");
    }

    #[test]
    fn a_socket_pair_knows_this_process() {
        let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let peer = Peer::of(&one).unwrap();
        assert_eq!(peer.pid, Some(std::process::id()));
        let flags = rustix::io::fcntl_getfd(peer.pidfd.unwrap()).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }
}
