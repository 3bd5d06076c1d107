//! Scattered blocks into the memory of another process.
//!
//! The child owns the pool, as a consumer does, and hands its memfd over. This process is the producer: it plans block
//! ids, posts them to the real `shm` transport in chunks of 16 blocks and polls it, as its agent would. In turn with that,
//! the same blocks go to the same memory by the bare copies of [`crate::copies`]. [`crate::network`] does the same over sockets.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use kvxfer_core::layout::{Group, KvLayout};
use kvxfer_core::plan::{LayerMemory, layer_writes};
use kvxfer_core::pool::Extent;
use kvxfer_core::transport::{Completion, Post, RegionId, SegmentHandle, Transport, Write};
use kvxfer_core::{BlockId, Incarnation, PostId, SegmentId};
use kvxfer_cuda::copy::drain;
use kvxfer_cuda::fds::{recv_with_fds, send_with_fds};
use kvxfer_cuda::memory::{HostPool, Mapping, Regions};
use kvxfer_cuda::transport::{Shm, shm};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::{ClockId, clock_gettime};

use crate::child::{Child, Words};
use crate::random::{Random, mix};
use crate::stats::{Ratio, median, speedup};
use crate::{Result, copies, machine};

/// Memory on either side; more than the caches hold.
pub(crate) const FIELD: u64 = 512 << 20;
/// Bytes moved in a round.
pub const MOVED: u64 = 256 << 20;
const CHUNK: usize = 16;
pub(crate) const PEER: Incarnation = Incarnation([7; 16]);
pub(crate) const ID: SegmentId = SegmentId(0);
/// Between two looks of an agent at its sockets.
pub(crate) const BUDGET: u64 = 4 << 20;

const POISON: u64 = 1;
const CHECK: u64 = 2;

/// Which block of the producer goes to which place of the consumer.
pub(crate) struct Table {
    from: Vec<BlockId>,
    to: Vec<u32>,
    block: u64,
}

impl Table {
    pub(crate) fn new(seed: u64, block: u64) -> Self {
        let (count, of) = ((MOVED / block) as u32, (FIELD / block) as u32);
        let mut random = Random(seed ^ block << 32);
        Self { from: random.pick(count, of), to: random.pick(count, of), block }
    }

    /// Offsets (from, to).
    fn pairs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let offset = |id: &u32| u64::from(*id) * self.block;
        self.from.iter().map(offset).zip(self.to.iter().map(offset))
    }
}

/// The word of the producer's memory at that offset.
pub(crate) fn content(offset: u64) -> u64 {
    mix(offset + 1)
}

/// The child: the consumer's pool.
///
/// # Errors
/// No memory, or the parent is silent.
pub fn consumer(mut socket: Words) -> Result<()> {
    machine::pin(1);
    let pool = HostPool::new(1, FIELD)?;
    let handle = shm::export(&pool, ID)?;
    send_with_fds(&socket.0, &handle.blob, &[handle.fds[0].as_fd()])?;
    let memory = pool.segment(ID)?;
    while let Some(command) = socket.command()? {
        socket.send(&[obey(memory, command)?])?;
    }
    Ok(())
}

/// Poisons the consumer's memory, or counts its wrong words.
pub(crate) fn obey(memory: &Mapping, [what, seed, block]: [u64; 3]) -> Result<u64> {
    if what == POISON {
        // SAFETY: all of the mapping, and the parent waits.
        unsafe { memory.as_mut_ptr().write_bytes(0xEE, FIELD as usize) };
        return Ok(0);
    }
    let mut wrong = 0;
    for (from, to) in Table::new(seed, block).pairs() {
        let at = memory.at(to, block)?.cast::<u64>();
        for word in 0..block / 8 {
            // SAFETY: inside the block, which `at` checked.
            let found = unsafe { at.add(word as usize).read_volatile() };
            wrong += u64::from(found != content(from + word * 8));
        }
    }
    Ok(wrong)
}

/// The producer's memory, and its region.
///
/// # Errors
/// No memory.
pub(crate) fn source() -> Result<(HostPool, Regions)> {
    let memory = HostPool::new(1, FIELD)?;
    let start = memory.segment(ID)?.as_mut_ptr();
    for offset in (0..FIELD).step_by(8) {
        // SAFETY: inside the mapping, which nobody else knows yet.
        unsafe { start.add(offset as usize).cast::<u64>().write(content(offset)) };
    }
    let mut regions = Regions::new();
    // SAFETY: the caller drops `memory` after what reads it.
    unsafe { regions.register(start, FIELD) }?;
    Ok((memory, regions))
}

/// One pass over poisoned memory that the child looks at.
pub(crate) fn verify(
    socket: &mut Words,
    seed: u64,
    block: u64,
    push: impl FnOnce(&Table) -> Result<()>,
) -> Result<()> {
    let [_] = socket.ask(&[POISON, 0, 0])?;
    push(&Table::new(seed, block))?;
    match socket.ask(&[CHECK, seed, block])? {
        [0] => Ok(()),
        [wrong] => Err(format!("blocks of {block} bytes: {wrong} words are wrong").into()),
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
    /// GB/s of kvxfer, memcpy, and streaming stores without checksum.
    pub gbps: [f64; 3],
    /// Times as fast as memcpy.
    pub memcpy: Ratio,
    /// The same by CPU time, which a busy machine changes less.
    pub memcpy_cpu: Ratio,
    /// Times as fast as bare streaming stores.
    pub streaming: Option<Ratio>,
    /// CPU seconds a GB of kvxfer and memcpy, on the producer's side; the consumer's has none to do.
    pub cpu_per_gb: [f64; 2],
}

/// Plans, posts, polls.
#[derive(Default)]
pub(crate) struct Pusher {
    posts: u64,
    writes: Vec<Write>,
    completions: Vec<Completion>,
}

impl Pusher {
    pub(crate) fn push(
        &mut self,
        transport: &mut dyn Transport,
        layout: &KvLayout,
        table: &Table,
    ) -> Result<()> {
        let block = table.block;
        let blocks = (FIELD / block) as u32;
        let memory = LayerMemory { region: RegionId(0), base: 0, stride: block, blocks };
        let extent = |&page| Extent { segment: ID, page, pages: 1, group: 0 };
        for (from, to) in table.from.chunks(CHUNK).zip(table.to.chunks(CHUNK)) {
            let extents: Vec<Extent> = to.iter().map(extent).collect();
            self.writes.clear();
            layer_writes(layout, 0, &memory, &extents, from, &mut self.writes)?;
            self.posts += 1;
            let (id, seed) = (PostId(self.posts), self.posts);
            let post = Post { id, peer: PEER, grant: None, seed, writes: &self.writes };
            while let Err(error) = transport.post(post) {
                if !error.retryable() {
                    return Err(error.into());
                }
                step(transport, &mut self.completions)?;
            }
        }
        while transport.pending() > 0 {
            step(transport, &mut self.completions)?;
        }
        self.completions.drain(..).try_for_each(|end| end.result.map(|_| ()))?;
        Ok(())
    }
}

/// A poll; as an agent would, this sleeps when there is nothing to do.
fn step(transport: &mut dyn Transport, completions: &mut Vec<Completion>) -> Result<()> {
    transport.poll(BUDGET, completions);
    if transport.pending() > 0
        && transport.rests()
        && let Some(fd) = transport.event_fd()
    {
        poll(&mut [PollFd::new(&fd, PollFlags::IN)], None)?;
    }
    Ok(())
}

/// The producer's side.
pub struct Producer {
    child: Child,
    transport: Shm,
    /// The same memory again, for the bare copies.
    pool: Mapping,
    pusher: Pusher,
    /// Dropped after the transport, which reads it.
    memory: HostPool,
}

impl Producer {
    /// Starts the child and attaches its pool.
    ///
    /// # Errors
    /// No memory, no process.
    pub fn start() -> Result<Self> {
        machine::pin(0);
        let child = Child::start("consumer", &[])?;
        let (mut blob, mut fds) = ([0; 64], Vec::new());
        let len = recv_with_fds(&child.socket.0, &mut blob, &mut fds)?;
        let pool = Mapping::import(fds.first().ok_or("no memory came")?, FIELD)?;

        let (memory, regions) = source()?;
        let mut transport = Shm::new(Arc::new(regions));
        let handle = SegmentHandle { blob: blob[..len].to_vec(), bytes: FIELD, fds };
        transport.attach(PEER, ID, handle)?;
        Ok(Self { child, transport, pool, pusher: Pusher::default(), memory })
    }

    /// Measures one size of blocks.
    ///
    /// # Errors
    /// The data is not what was sent; a post failed; the child is gone.
    pub fn measure(&mut self, block: u64, rounds: usize) -> Result<Figures> {
        let layout = layout(block);
        self.verify(&layout, 0, block)?;
        let mut times: [Vec<(f64, f64)>; 3] = Default::default();
        for round in 1..=rounds {
            let table = Table::new(round as u64, block);
            for turn in 0..3 {
                let way = (round + turn) % 3;
                let (wall, cpu) = (Instant::now(), cpu_time());
                match (way, copies::streaming()) {
                    (0, _) => self.pusher.push(&mut self.transport, &layout, &table)?,
                    (1, _) => self.bare(&table, copies::memcpy)?,
                    (_, Some(copy)) => self.bare(&table, copy)?,
                    (_, None) => {}
                }
                times[way].push((wall.elapsed().as_secs_f64(), cpu_time() - cpu));
            }
        }
        self.verify(&layout, rounds as u64 + 1, block)?;
        let [ours, memcpy, bare] =
            times.map(|times| times.into_iter().unzip::<_, _, Vec<_>, Vec<_>>());
        let gb = MOVED as f64 / 1e9;
        Ok(Figures {
            block,
            rounds,
            path: self.transport.name().as_str(),
            gbps: [&ours, &memcpy, &bare].map(|(wall, _)| gb / median(wall)),
            memcpy: speedup(&ours.0, &memcpy.0),
            memcpy_cpu: speedup(&ours.1, &memcpy.1),
            streaming: copies::streaming().map(|_| speedup(&ours.0, &bare.0)),
            cpu_per_gb: [&ours, &memcpy].map(|(_, cpu)| median(cpu) / gb),
        })
    }

    fn verify(&mut self, layout: &KvLayout, seed: u64, block: u64) -> Result<()> {
        let Self { child, transport, pusher, .. } = self;
        verify(&mut child.socket, seed, block, |table| pusher.push(transport, layout, table))
    }

    /// By a bare copy.
    fn bare(&self, table: &Table, copy: unsafe fn(*mut u8, *const u8, usize)) -> Result<()> {
        let source = self.memory.segment(ID)?;
        for (from, to) in table.pairs() {
            let (to, from) = (self.pool.at(to, table.block)?, source.at(from, table.block)?);
            // SAFETY: `at` checked both; blocks are multiples of 4 KiB, and so aligned.
            unsafe { copy(to, from, table.block as usize) };
        }
        drain();
        Ok(())
    }
}

/// One layer, one block a token.
pub(crate) fn layout(block: u64) -> KvLayout {
    let group = Group { block_tokens: 1, block_bytes: vec![block as u32] };
    KvLayout::one_group("benchmark", "bytes", CHUNK as u32, group)
}

/// CPU seconds of this thread.
fn cpu_time() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

impl std::fmt::Debug for Producer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Producer").field("posts", &self.pusher.posts).finish_non_exhaustive()
    }
}
