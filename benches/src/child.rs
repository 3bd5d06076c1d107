//! A second process: this program again, with a Unix socket as its standard input.
//!
//! Each read has a deadline on both sides, the child ends with its parent, and it is reaped at the latest when its
//! [`Child`] is dropped.

use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use rustix::process::{Signal, set_parent_process_death_signal};

use crate::Result;

const ROLE: &str = "KVXFER_BENCH_CHILD";
const DEADLINE: Duration = Duration::from_secs(60);

/// A child process.
#[derive(Debug)]
pub struct Child {
    process: std::process::Child,
    /// To it.
    pub socket: Words,
}

impl Child {
    /// Starts this program again in that role, with some environment variables.
    ///
    /// # Errors
    /// No process, no socket.
    pub fn start(role: &str, variables: &[(&str, &OsStr)]) -> Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let process = Command::new(std::env::current_exe()?)
            .env(ROLE, role)
            .envs(variables.iter().copied())
            .stdin(OwnedFd::from(theirs))
            .spawn()?;
        Ok(Self { process, socket: Words::over(ours)? })
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The role of this process, if it is a child, and its socket.
///
/// # Errors
/// Standard input is no socket.
pub fn role() -> Result<Option<(String, Words)>> {
    let Ok(role) = std::env::var(ROLE) else { return Ok(None) };
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    Ok(Some((role, Words::over(socket)?)))
}

/// Numbers over a socket.
#[derive(Debug)]
pub struct Words(pub UnixStream);

impl Words {
    fn over(socket: UnixStream) -> io::Result<Self> {
        socket.set_read_timeout(Some(DEADLINE))?;
        socket.set_write_timeout(Some(DEADLINE))?;
        Ok(Self(socket))
    }

    /// Sends some.
    ///
    /// # Errors
    /// The other side is gone.
    pub fn send(&mut self, words: &[u64]) -> io::Result<()> {
        self.0.write_all(&words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>())
    }

    /// Receives that many.
    ///
    /// # Errors
    /// The other side is gone, or silent for a minute.
    pub fn receive<const N: usize>(&mut self) -> io::Result<[u64; N]> {
        let mut words = [0; N];
        for word in &mut words {
            let mut bytes = [0; 8];
            self.0.read_exact(&mut bytes)?;
            *word = u64::from_le_bytes(bytes);
        }
        Ok(words)
    }

    /// The same in a child: `None` when the parent wants no more.
    ///
    /// # Errors
    /// As [`Words::receive`].
    pub fn command<const N: usize>(&mut self) -> io::Result<Option<[u64; N]>> {
        match self.receive() {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            words => words.map(Some),
        }
    }

    /// Sends a command and receives the answer.
    ///
    /// # Errors
    /// As [`Words::receive`].
    pub fn ask<const N: usize>(&mut self, words: &[u64]) -> io::Result<[u64; N]> {
        self.send(words)?;
        self.receive()
    }
}
