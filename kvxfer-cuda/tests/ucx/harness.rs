//! A producer and a consumer, each with a worker.

use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

pub(crate) use crate::common::{DEADLINE, Peer, Wire};
use kvxfer_core::SegmentId;
use kvxfer_core::transport::RegionId;
use kvxfer_cuda::copy::{Stores, copy_summed};
use kvxfer_cuda::memory::{HostPool, Regions};
use kvxfer_cuda::ucx::{
    Context, EndpointId, Event, KeyId, Library, Memory, Options, Registration, RemoteAddress,
    RemoteMemory, SourceId, Worker,
};
use rustix::event::{PollFd, PollFlags, poll};

pub(crate) const LIBRARY: &str = "KVXFER_TEST_UCX_LIBRARY";

/// The wheel's folder, or a word that there is none.
pub(crate) fn wheel() -> Option<PathBuf> {
    let wheel = std::env::var_os("KVXFER_TEST_UCX").map(PathBuf::from);
    if wheel.is_none() {
        eprintln!("skipped: KVXFER_TEST_UCX=$(env/ucx) is not set");
    }
    wheel
}

/// UCX with TCP on one device.
pub(crate) fn context() -> Option<Arc<Context>> {
    let named = std::env::var_os(LIBRARY).map(PathBuf::from);
    let path = named.or_else(|| Some(wheel()?.join("lib/libucp.so.0")))?;
    let library = Library::open(Some(&path), None).unwrap();
    let options = Options {
        transports: Some("tcp".into()),
        devices: Some(std::env::var("KVXFER_TEST_UCX_DEVICE").unwrap_or_else(|_| "lo".into())),
        ..Options::default()
    };
    Some(Context::new(library, &options).unwrap())
}

/// What the producer's memory holds.
pub(crate) fn content(bytes: u64) -> Vec<u8> {
    (0..bytes).map(|i| (i * i / 7 + i / 256 + 1) as u8).collect()
}

/// Lets a worker work until `done` gives something; sleeps in the kernel while there is nothing to do.
#[track_caller]
pub(crate) fn until<T>(worker: &mut Worker, mut done: impl FnMut(&mut Worker) -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        while worker.progress() {}
        if let Some(done) = done(worker) {
            return done;
        }
        assert!(start.elapsed() < DEADLINE, "it does not happen");
        if worker.arm().unwrap() {
            let fd = worker.as_fd();
            let _ =
                poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&DEADLINE.try_into().unwrap()));
        }
    }
}

/// The next event of a worker.
#[track_caller]
pub(crate) fn event(worker: &mut Worker) -> Event {
    until(worker, Worker::next_event)
}

/// All events up to the one that is asked for.
#[track_caller]
pub(crate) fn events(worker: &mut Worker, last: impl Fn(&Event) -> bool) -> Vec<Event> {
    let mut seen = Vec::new();
    until(worker, |worker| {
        seen.extend(std::iter::from_fn(|| worker.next_event()));
        seen.iter().any(&last).then_some(())
    });
    seen
}

pub(crate) struct Consumer {
    pub(crate) worker: Worker,
    pub(crate) segment: Registration,
    pub(crate) pool: HostPool,
}

impl Consumer {
    pub(crate) fn new(context: &Arc<Context>, bytes: u64) -> Self {
        let pool = HostPool::new(1, bytes).unwrap();
        let memory = Memory::Segment(Arc::clone(pool.segment(SegmentId(0)).unwrap()));
        let segment = Registration::target(context, memory).unwrap();
        Self { worker: Worker::new(context).unwrap(), segment, pool }
    }

    /// What a producer needs.
    pub(crate) fn blobs(&self) -> [Vec<u8>; 2] {
        [self.worker.address().unwrap().to_bytes(), self.segment.share().unwrap().to_bytes()]
    }

    /// Whether the first byte is there.
    pub(crate) fn started(&self) -> bool {
        let first = self.pool.segment(SegmentId(0)).unwrap().at(0, 1).unwrap();
        // SAFETY: a byte inside of the mapping.
        unsafe { first.read_volatile() == content(1)[0] }
    }

    pub(crate) fn seen(&self) -> Vec<u8> {
        seen(&self.pool)
    }
}

/// What is in a pool's one segment.
pub(crate) fn seen(pool: &HostPool) -> Vec<u8> {
    let mapping = pool.segment(SegmentId(0)).unwrap();
    let from = mapping.at(0, mapping.bytes()).unwrap();
    let mut bytes = vec![0; mapping.bytes() as usize];
    // SAFETY: `at` checked the range.
    unsafe { copy_summed(bytes.as_mut_ptr(), from, bytes.len(), 0, 0, Stores::Cached) };
    bytes
}

pub(crate) struct Producer {
    pub(crate) worker: Worker,
    pub(crate) end: EndpointId,
    pub(crate) key: KeyId,
    pub(crate) source: SourceId,
    pub(crate) bytes: u64,
}

impl Producer {
    pub(crate) fn new(context: &Arc<Context>, [address, memory]: &[Vec<u8>; 2]) -> Self {
        let mut worker = Worker::new(context).unwrap();
        let end = worker.connect(&RemoteAddress::from_bytes(address).unwrap()).unwrap();
        let memory = RemoteMemory::from_bytes(memory).unwrap();
        let key = worker.open_key(end, &memory).unwrap();
        let bytes = memory.bytes();
        let mut regions = Regions::new();
        regions.keep(content(bytes)).unwrap();
        let region = Memory::Region(Arc::new(regions), RegionId(0));
        let source =
            worker.source(Arc::new(Registration::source(context, region).unwrap())).unwrap();
        Self { worker, end, key, source, bytes }
    }

    /// All of it, in pieces, and a flush with that token.
    pub(crate) fn push(&mut self, piece: u64, token: u64) {
        for at in (0..self.bytes).step_by(piece as usize) {
            let len = piece.min(self.bytes - at);
            self.worker.put(self.key, at, self.source, at, len).unwrap();
        }
        self.worker.flush(self.end, token).unwrap();
    }
}
