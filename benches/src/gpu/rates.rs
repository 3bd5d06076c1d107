//! Bytes from one process's GPU memory to another one's, beside a plain copy of as many in the same run.
//!
//! Ways to do the same take turns. What counts are medians, and medians of ratios of neighbours in time. Each word
//! is looked at in a first and in a last round, which are not timed, on poisoned memory; so is each checksum.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use kvxfer_core::PostId;
use kvxfer_core::transport::{Completion, Post, Transport, Write};
use kvxfer_cuda::device::{Copier, CopierConfig, DeviceRegions};
use kvxfer_cuda::driver::{Buffer, Device, Mapped, Priority, Stream};
use kvxfer_cuda::transport::CudaIpc;
use rustix::time::{ClockId, clock_gettime};

use super::consumer::{self, CLEAR, VERIFY, WRITER, ask_for_handle};
use super::work::{Job, SEED, SEGMENT, Size, content, sum};
use crate::Result;
use crate::child::Child;
use crate::stats::{Ratio, median, speedup};

/// A post that takes longer never ends.
const DEADLINE: Duration = Duration::from_secs(30);
const STAGING: u64 = 16 << 20;

/// The ways: a name, and below which length the kernel copies.
pub const WAYS: [(&str, Option<u64>); 3] =
    [("kernel", Some(u64::MAX)), ("copy engine", Some(0)), ("calibrated", None)];

/// One size of blocks: each array has an entry for each of [`WAYS`].
#[derive(Clone, Debug)]
pub struct Figures {
    /// What was moved.
    pub job: Job,
    /// Of a plain copy.
    pub plain_gbps: f64,
    /// Of each way.
    pub gbps: [f64; 3],
    /// How many times as fast as the plain copy.
    pub of_plain: [Ratio; 3],
    /// Of the submitting thread: CPU nanoseconds for each block.
    pub ns_per_block: [f64; 3],
    /// The same for each layer, in microseconds.
    pub us_per_layer: [f64; 3],
}

struct Way {
    transport: CudaIpc,
    wakes: Receiver<()>,
    posts: u64,
    ended: Vec<Completion>,
}

/// The writing side of a pair of processes.
pub struct Producer {
    size: Size,
    ways: Vec<Way>,
    stream: Stream,
    /// The segment once more, for the plain copy.
    segment: Mapped,
    child: Child,
    // The last to be dropped: the ways read it.
    source: Buffer,
}

impl Producer {
    /// On that device, with the other process on the device of that number.
    ///
    /// # Errors
    /// No memory, no second process, or the devices don't reach each other.
    pub fn start(device: &Device, peer: u32, size: Size) -> Result<Self> {
        let mut child = Child::start(consumer::ROLE, &[])?;
        child.socket.send(&[peer.into(), size.layer, size.layers])?;
        let source = device.buffer(size.pool())?;
        let stream = device.stream(Priority::Default)?;
        write(device, &stream, &source)?;
        let mut regions = DeviceRegions::new();
        // SAFETY: `source` is dropped after all ways.
        unsafe { regions.register(source.ptr(), source.bytes()) }?;
        let regions = Arc::new(regions);
        let mut ways = Vec::new();
        for (_, kernel_below) in WAYS {
            let (wake, wakes) = channel();
            let config = CopierConfig { kernel_below, ..CopierConfig::default() };
            let copier = Copier::new(device, config, move || {
                let _ = wake.send(());
            })?;
            let mut transport = CudaIpc::new(device.clone(), Arc::clone(&regions), copier);
            transport.attach(WRITER, SEGMENT, ask_for_handle(&mut child.socket, &size)?)?;
            ways.push(Way { transport, wakes, posts: 0, ended: Vec::new() });
        }
        let handle = ask_for_handle(&mut child.socket, &size)?;
        let fd = handle.fds.first().ok_or("a handle without a descriptor")?;
        let rounded = size.pool().next_multiple_of(device.granularity()?);
        let segment = device.map(Arc::new(device.import(fd.as_fd(), rounded)?))?;
        Ok(Self { size, ways, stream, segment, child, source })
    }

    /// How the devices are joined, as the transport says it.
    pub fn link(&self) -> String {
        let link = self.ways.first().and_then(|way| way.transport.lanes(WRITER));
        link.unwrap_or_else(|| "unknown".into())
    }

    /// Where the measured cut-over lies, in bytes.
    pub fn cut_over(&mut self) -> u64 {
        self.ways.last_mut().map_or(0, |way| way.transport.copier().kernel_below())
    }

    /// Measures one size of blocks.
    ///
    /// # Errors
    /// A copy fails, or what arrived is not what was sent.
    pub fn measure(&mut self, block: u64, scattered: bool) -> Result<Figures> {
        let job = |round: usize| Job { block, scattered, seed: round as u64 + 1 };
        let rounds = self.size.rounds;
        self.verify(&job(0))?;
        let mut plain = Vec::new();
        let (mut wall, mut cpu) = ([const { Vec::new() }; 3], [const { Vec::new() }; 3]);
        for round in 1..=rounds {
            let layers = job(round).layers(&self.size);
            plain.push(self.plain()?);
            for (way, (wall, cpu)) in self.ways.iter_mut().zip(wall.iter_mut().zip(&mut cpu)) {
                let (start, before) = (Instant::now(), cpu_time());
                way.run(&layers)?;
                cpu.push(cpu_time() - before);
                wall.push(start.elapsed().as_secs_f64());
            }
        }
        self.verify(&job(rounds + 1))?;
        let gbps = |times: &[f64]| self.size.moved() as f64 / median(times) / 1e9;
        let blocks = (self.size.moved() / block) as f64;
        Ok(Figures {
            job: job(0),
            plain_gbps: gbps(&plain),
            gbps: [0, 1, 2].map(|way| gbps(&wall[way])),
            of_plain: [0, 1, 2].map(|way| speedup(&wall[way], &plain)),
            ns_per_block: [0, 1, 2].map(|way| median(&cpu[way]) * 1e9 / blocks),
            us_per_layer: [0, 1, 2].map(|way| median(&cpu[way]) * 1e6 / self.size.layers as f64),
        })
    }

    /// Copies these layers in one of [`WAYS`], and waits for their end.
    ///
    /// # Errors
    /// A copy fails, or there is no such way.
    pub fn copy(&mut self, way: usize, layers: &[Vec<Write>]) -> Result<()> {
        self.ways.get_mut(way).ok_or("no such way")?.run(layers).map(drop)
    }

    /// One copy of all bytes, to where the blocks go too.
    fn plain(&self) -> Result<f64> {
        let start = Instant::now();
        self.stream.copy(self.segment.ptr(), self.source.ptr(), self.size.moved())?;
        self.stream.synchronize()?;
        Ok(start.elapsed().as_secs_f64())
    }

    fn verify(&mut self, job: &Job) -> Result<()> {
        let layers = job.layers(&self.size);
        let expected: Vec<u64> = layers.iter().map(|layer| sum(layer)).collect();
        let [block, scattered, seed] = job.words();
        for (way, (name, _)) in self.ways.iter_mut().zip(WAYS) {
            self.child.socket.ask::<1>(&[CLEAR, 0, 0, 0])?;
            if way.run(&layers)? != expected {
                return Err(format!("{name}: a checksum is not the host's: {job:?}").into());
            }
            let [wrong] = self.child.socket.ask(&[VERIFY, block, scattered, seed])?;
            if wrong > 0 {
                return Err(format!("{name}: {wrong} words are wrong: {job:?}").into());
            }
        }
        Ok(())
    }
}

impl Way {
    /// Posts all layers, and sleeps until they ended: their checksums.
    fn run(&mut self, layers: &[Vec<Write>]) -> Result<Vec<u64>> {
        let first = self.posts;
        let mut sums = vec![0; layers.len()];
        let (mut next, mut ended) = (0, 0);
        let end = Instant::now() + DEADLINE;
        while ended < layers.len() {
            while let Some(writes) = layers.get(next) {
                let id = PostId(first + next as u64);
                let post = Post { id, peer: WRITER, grant: None, seed: SEED, writes };
                match self.transport.post(post) {
                    Ok(()) => next += 1,
                    Err(error) if error.retryable() => break,
                    Err(error) => return Err(error.into()),
                }
                // Layer by layer: what is posted starts.
                self.transport.poll(u64::MAX, &mut self.ended);
            }
            self.transport.poll(u64::MAX, &mut self.ended);
            for Completion { id, result, .. } in self.ended.drain(..) {
                *sums.get_mut((id.0 - first) as usize).ok_or("an unknown post")? = result?;
                ended += 1;
            }
            if ended < layers.len() {
                let left = end.saturating_duration_since(Instant::now());
                self.wakes.recv_timeout(left).map_err(|_| "copies do not end")?;
            }
        }
        // What woke for posts that had been seen already.
        while self.wakes.try_recv().is_ok() {}
        self.posts += layers.len() as u64;
        Ok(sums)
    }
}

fn write(device: &Device, stream: &Stream, to: &Buffer) -> Result<()> {
    let staging = device.pinned(STAGING)?;
    let mut bytes = vec![0; STAGING as usize];
    for offset in (0..to.bytes()).step_by(STAGING as usize) {
        let len = STAGING.min(to.bytes() - offset);
        content(offset, &mut bytes[..len as usize]);
        staging.write(0, &bytes[..len as usize])?;
        stream.upload(to.ptr().offset(offset), &staging, 0, len)?;
        stream.synchronize()?;
    }
    Ok(())
}

/// CPU seconds of this thread.
fn cpu_time() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
