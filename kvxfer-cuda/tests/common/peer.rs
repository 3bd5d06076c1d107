//! Other processes: this binary, run again for one test.

use std::io::{self, Read, Write as _};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, ExitStatus, Stdio};

use kvxfer_cuda::fds::{recv_with_fds, send_with_fds};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, kill_process, pidfd_open, waitpid};

use super::DEADLINE;

const ROLE: &str = "KVXFER_TEST_CHILD";

/// A socket to the process on the other side of a test.
pub struct Wire(UnixStream);

impl Wire {
    fn new(socket: UnixStream) -> Self {
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        socket.set_write_timeout(Some(DEADLINE)).unwrap();
        Self(socket)
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    pub fn say(&mut self, text: &str) {
        self.pass(text.as_bytes());
    }

    #[track_caller]
    pub fn hear(&mut self) -> String {
        String::from_utf8(self.take()).unwrap()
    }

    /// Bytes of any length, for [`Wire::take`].
    pub fn pass(&mut self, bytes: &[u8]) {
        self.send(&(bytes.len() as u32).to_le_bytes());
        self.send(bytes);
    }

    #[track_caller]
    pub fn take(&mut self) -> Vec<u8> {
        let mut bytes = vec![0; u32::from_le_bytes(self.receive()) as usize];
        self.0.read_exact(&mut bytes).expect("the other process goes on");
        bytes
    }

    /// At least one byte has to go along.
    pub fn send_fd(&mut self, bytes: &[u8], fd: BorrowedFd<'_>) {
        assert_eq!(send_with_fds(&self.0, bytes, &[fd]).unwrap(), bytes.len());
    }

    #[track_caller]
    pub fn receive<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.receive_into(&mut bytes);
        bytes
    }

    /// The same, into as many bytes as there are.
    #[track_caller]
    pub fn receive_fd_into(&mut self, bytes: &mut [u8]) -> OwnedFd {
        let mut fds = Vec::new();
        let len =
            recv_with_fds(&self.0, bytes, &mut fds).expect("the other process answers in time");
        assert_eq!((len, fds.len()), (bytes.len(), 1));
        fds.remove(0)
    }

    #[track_caller]
    pub fn receive_fd<const N: usize>(&mut self) -> ([u8; N], OwnedFd) {
        let mut bytes = [0; N];
        let fd = self.receive_fd_into(&mut bytes);
        (bytes, fd)
    }

    #[track_caller]
    pub fn receive_into(&mut self, bytes: &mut [u8]) {
        self.0.read_exact(bytes).expect("the other process answers in time");
    }

    /// The next order; none when the other side has gone.
    pub fn order(&mut self) -> Option<[u8; 2]> {
        let mut bytes = [0; 2];
        self.0.read_exact(&mut bytes).ok().map(|()| bytes)
    }

    /// From now on [`Wire::asked`] doesn't wait.
    pub fn nonblocking(&mut self) {
        self.0.set_nonblocking(true).unwrap();
    }

    /// Whether there is an order; none when the other side has gone.
    pub fn asked(&mut self) -> Option<bool> {
        match self.0.read(&mut [0; 2]) {
            Ok(0) => None,
            Ok(_) => Some(true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Some(false),
            Err(_) => None,
        }
    }
}

/// The parent, in the child of that role; none in any other process.
pub fn parent(role: &str) -> Option<Wire> {
    let own = std::env::var(ROLE).ok()?;
    (own == role)
        .then(|| Wire::new(UnixStream::from(io::stdin().as_fd().try_clone_to_owned().unwrap())))
}

/// A child process, killed and reaped at the latest when it is dropped.
pub struct Peer {
    process: Child,
    pub wire: Wire,
}

impl Peer {
    /// Runs that test of this binary in a process of its own, in which [`parent`] knows `role`.
    pub fn start(test: &str, role: &str) -> Self {
        Self::start_with(test, role, &[])
    }

    /// The same, with more in its environment.
    pub fn start_with(test: &str, role: &str, env: &[(&str, &str)]) -> Self {
        let (socket, theirs) = UnixStream::pair().unwrap();
        let process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture"])
            .env(ROLE, role)
            .envs(env.iter().copied())
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self { process, wire: Wire::new(socket) }
    }

    pub fn kill(&mut self) {
        self.process.kill().unwrap();
        self.reap();
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).unwrap();
    }

    /// Stops it: when this returns, it does nothing more.
    pub fn stop(&self) {
        self.signal(Signal::STOP);
        waitpid(Some(Pid::from_child(&self.process)), WaitOptions::UNTRACED).unwrap();
    }

    #[track_caller]
    pub fn assert_alive(&mut self) {
        assert!(self.process.try_wait().unwrap().is_none(), "the child has ended");
    }

    /// Waits for its end.
    pub fn reap(&mut self) -> ExitStatus {
        let pid = Pid::from_child(&self.process);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        let deadline = Timespec { tv_sec: DEADLINE.as_secs() as i64, tv_nsec: 0 };
        let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
        assert_eq!(poll(&mut fds, Some(&deadline)), Ok(1), "the child does not end");
        self.process.wait().unwrap()
    }

    /// Lets it end, by going away, and asserts that it ends well.
    #[track_caller]
    pub fn ends(self) {
        self.wire.0.shutdown(Shutdown::Both).unwrap();
        self.succeeds();
    }

    /// Waits for its end, which has to be a success: what it asserted held.
    #[track_caller]
    pub fn succeeds(mut self) {
        let status = self.reap();
        assert!(status.success(), "the child: {status}");
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Without effect on a child that was reaped.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
