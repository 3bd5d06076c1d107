//! Scattered blocks to another process over sockets.
//!
//! The child owns the pool and a target, and sleeps when there is nothing to receive, as an agent does. In turn with the
//! transport, as many bytes go over one plain connection, from one piece of memory into one buffer that is used again
//! and again: what the loopback device can do without placing anything.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use kvxfer_core::Incarnation;
use kvxfer_core::transport::{SegmentHandle, Transport};
use kvxfer_cuda::memory::HostPool;
use kvxfer_cuda::transport::{Target, Tcp, TcpTarget};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::{ClockId, clock_gettime};

use crate::child::{Child, Words};
use crate::stats::{Ratio, median, speedup};
use crate::transfer::{
    BUDGET, FIELD, ID, MOVED, PEER, Pusher, Table, layout, obey, source, verify,
};
use crate::{Result, machine};

const WRITER: Incarnation = Incarnation([8; 16]);
/// Connections; one thread on each side serves them all.
const STREAMS: u32 = 2;
/// Bytes of a call on the plain connection.
const CALL: usize = 256 << 10;
/// A command that is answered by this process's CPU time, in microseconds.
const CPU: u64 = 3;

/// The child: the consumer's pool and target.
///
/// # Errors
/// No memory, or the parent is silent.
pub fn receiver(mut socket: Words) -> Result<()> {
    machine::pin(1);
    let pool = HostPool::new(1, FIELD)?;
    let memory = Arc::clone(pool.segment(ID)?);
    let mut target = TcpTarget::bind(PEER, "127.0.0.1", 0, STREAMS)?;
    let blob = target.export(WRITER, ID, &memory)?.blob;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    socket.send(&[u64::from(listener.local_addr()?.port()), blob.len() as u64])?;
    socket.0.write_all(&blob)?;
    let (mut plain, _) = listener.accept()?;
    plain.set_nonblocking(true)?;
    let (mut buffer, mut received) = (vec![0; CALL], 0);
    let mut lost = Vec::new();
    loop {
        if target.rests() {
            let ready = {
                let fds = [socket.0.as_fd(), target.event_fd(), plain.as_fd()];
                let mut fds = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
                poll(&mut fds, None)?;
                fds.map(|fd| !fd.revents().is_empty())
            };
            if ready[0] {
                let Some(command) = socket.command::<3>()? else { return Ok(()) };
                let answer = match command {
                    [CPU, ..] => (cpu_time() * 1e6) as u64,
                    command => obey(&memory, command)?,
                };
                socket.send(&[answer])?;
            }
            if ready[2] {
                received += drain(&mut plain, &mut buffer)?;
                if received == MOVED {
                    received = 0;
                    plain.write_all(&[1])?;
                }
            }
        }
        target.poll(BUDGET, &|_| Ok(()), &mut lost);
        if let Some((_, error)) = lost.pop() {
            return Err(error.into());
        }
    }
}

/// Reads what is there. How many bytes that was.
fn drain(plain: &mut TcpStream, buffer: &mut [u8]) -> Result<u64> {
    let mut received = 0;
    loop {
        match plain.read(buffer) {
            Ok(0) => return Err("the parent is gone".into()),
            Ok(bytes) => received += bytes as u64,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(received),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Figures for one size of blocks.
#[derive(Clone, Debug)]
pub struct Figures {
    /// Bytes of a block.
    pub block: u64,
    /// Timed rounds.
    pub rounds: usize,
    /// The path by which the bytes went.
    pub path: &'static str,
    /// GB/s of kvxfer, and of the plain connection.
    pub gbps: [f64; 2],
    /// Times as fast as the plain connection.
    pub socket: Ratio,
    /// CPU seconds a GB of kvxfer, of the sender and of the receiver.
    pub cpu_per_gb: [f64; 2],
}

/// The producer's side.
pub struct Sender {
    child: Child,
    transport: Tcp,
    plain: TcpStream,
    pusher: Pusher,
    /// Dropped after the transport, which reads it.
    _memory: HostPool,
}

impl Sender {
    /// Starts the child and connects to it.
    ///
    /// # Errors
    /// No memory, no process.
    pub fn start() -> Result<Self> {
        machine::pin(0);
        let mut child = Child::start("receiver", &[])?;
        let [port, len] = child.socket.receive()?;
        let mut blob = vec![0; len as usize];
        child.socket.0.read_exact(&mut blob)?;
        let plain = TcpStream::connect(("127.0.0.1", port as u16))?;
        plain.set_nodelay(true)?;
        let (memory, regions) = source()?;
        let mut transport = Tcp::new(WRITER, Arc::new(regions))?;
        transport.attach(PEER, ID, SegmentHandle { blob, bytes: FIELD, fds: Vec::new() })?;
        Ok(Self { child, transport, plain, pusher: Pusher::default(), _memory: memory })
    }

    /// Measures one size of blocks.
    ///
    /// # Errors
    /// The data is not what was sent; a post failed; the child is gone.
    pub fn measure(&mut self, block: u64, rounds: usize) -> Result<Figures> {
        let layout = layout(block);
        let Self { child, transport, plain, pusher, .. } = self;
        let mut check = |pusher: &mut Pusher, child: &mut Child, seed| {
            verify(&mut child.socket, seed, block, |table| pusher.push(transport, &layout, table))
        };
        check(pusher, child, 0)?;
        check(pusher, child, rounds as u64 + 1)?;
        let bytes = vec![7; CALL];
        let (mut times, mut cpu): ([Vec<f64>; 2], [Vec<f64>; 2]) = Default::default();
        for round in 1..=rounds {
            let table = Table::new(round as u64, block);
            for turn in 0..2 {
                let way = (round + turn) % 2;
                let [theirs] = child.socket.ask(&[CPU, 0, 0])?;
                let (wall, own) = (Instant::now(), cpu_time());
                if way == 0 {
                    pusher.push(transport, &layout, &table)?;
                } else {
                    for _ in 0..MOVED / CALL as u64 {
                        plain.write_all(&bytes)?;
                    }
                    plain.read_exact(&mut [0])?;
                }
                times[way].push(wall.elapsed().as_secs_f64());
                if way == 0 {
                    cpu[0].push(cpu_time() - own);
                    let [now] = child.socket.ask(&[CPU, 0, 0])?;
                    cpu[1].push((now - theirs) as f64 / 1e6);
                }
            }
        }
        let gb = MOVED as f64 / 1e9;
        Ok(Figures {
            block,
            rounds,
            path: transport.name().as_str(),
            gbps: [&times[0], &times[1]].map(|times| gb / median(times)),
            socket: speedup(&times[0], &times[1]),
            cpu_per_gb: cpu.map(|times| median(&times) / gb),
        })
    }
}

/// CPU seconds of this process.
fn cpu_time() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

impl std::fmt::Debug for Sender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sender").field("transport", &self.transport).finish_non_exhaustive()
    }
}
