//! What the clauses need of a transport: two consumers, memory to write from, a look at the result.

use std::cell::RefCell;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvxfer_core::transport::{Completion, Post, RegionId, SegmentHandle, Transport, Write};
use kvxfer_core::{GrantId, Incarnation, PostId, Result, SegmentId};
use kvxfer_cuda::copy;
use kvxfer_cuda::memory::{HostPool, Regions};
use kvxfer_cuda::transport::fault::{Fault, Faults};
use kvxfer_cuda::transport::local::LocalExports;
use kvxfer_cuda::transport::ucx::Settings;
use kvxfer_cuda::transport::{Local, Shm, Target, Tcp, TcpTarget, Ucx, UcxTarget, shm};

use crate::common::skip;

use crate::common::network::{A, B, Inside, Network};

pub const REGIONS: u32 = 2;
pub const SEGMENTS: u32 = 2;
/// The leave by which all is written.
pub const GRANT: Option<GrantId> = Some(GrantId(1));
/// Bytes of each region and each segment: no multiple of a page.
pub const BYTES: u64 = (3 << 20) + 40;
/// How long anything may take.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// A transport with two consumers, 0 and 1, whose segments it has attached.
pub trait Bench {
    fn transport(&mut self) -> &mut dyn Transport;

    /// A consumer's incarnation.
    fn peer(&self, consumer: usize) -> Incarnation;

    /// A new handle of a consumer's segment.
    fn handle(&mut self, consumer: usize, segment: SegmentId) -> SegmentHandle;

    /// Puts fresh, zeroed memory behind a consumer's segment.
    fn replace(&mut self, consumer: usize, segment: SegmentId);

    /// What the consumer sees.
    fn read(&self, consumer: usize, segment: SegmentId, offset: u64, len: u64) -> Vec<u8>;

    /// Puts bytes into the engine's memory.
    fn fill(&mut self, region: RegionId, offset: u64, bytes: &[u8]);

    /// Whether bytes move without polls: their budget means nothing then, and posts that overlap have no order.
    fn by_itself(&self) -> bool {
        false
    }

    /// Consumers take what has come, where somebody has to.
    fn receive(&mut self) {}

    /// Sees that nothing more is stored of what was sent to a consumer, where the end of a post does not say so.
    fn fence(&mut self, consumer: usize) {
        let _ = consumer;
    }

    fn attach(&mut self, consumer: usize, segment: SegmentId) {
        let (peer, handle) = (self.peer(consumer), self.handle(consumer, segment));
        self.transport().attach(peer, segment, handle).unwrap();
    }

    fn post(&mut self, consumer: usize, id: u64, seed: u64, writes: &[Write]) -> Result<()> {
        let peer = self.peer(consumer);
        self.transport().post(Post { id: PostId(id), peer, grant: GRANT, seed, writes })
    }

    /// Polls until nothing is pending.
    fn settle(&mut self) -> Vec<Completion> {
        let (mut out, start) = (Vec::new(), Instant::now());
        while self.transport().pending() > 0 {
            assert!(start.elapsed() < DEADLINE, "posts never end: {out:?}");
            self.transport().poll(1 << 20, &mut out);
            self.receive();
            if self.by_itself() {
                std::thread::yield_now();
            }
        }
        // And nothing after that.
        self.transport().poll(u64::MAX, &mut out);
        out
    }
}

/// An incarnation that nobody had.
pub fn next_peer() -> Incarnation {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let mut name = [0; 16];
    name[..8].copy_from_slice(&NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes());
    Incarnation(name)
}

/// A consumer's end of a path into a host pool.
trait End {
    /// See [`Bench::by_itself`].
    const BY_ITSELF: bool = false;

    fn export(&self, pool: &HostPool, segment: SegmentId) -> Result<SegmentHandle>;

    fn receive(&self) {}

    fn fence(&self) {}
}

impl End for LocalExports {
    fn export(&self, pool: &HostPool, segment: SegmentId) -> Result<SegmentHandle> {
        self.export(pool, segment)
    }
}

/// Descriptors are all that it takes.
struct Descriptors;

impl End for Descriptors {
    fn export(&self, pool: &HostPool, segment: SegmentId) -> Result<SegmentHandle> {
        shm::export(pool, segment)
    }
}

/// The one who writes to targets.
const WRITER: Incarnation = Incarnation([0xAB; 16]);

impl<T: Target> End for RefCell<T> {
    const BY_ITSELF: bool = true;

    fn export(&self, pool: &HostPool, segment: SegmentId) -> Result<SegmentHandle> {
        self.borrow_mut().export(WRITER, segment, pool.segment(segment)?)
    }

    fn receive(&self) {
        self.borrow_mut().poll(1 << 20, &|_| Ok(()), &mut Vec::new());
    }

    fn fence(&self) {
        self.borrow_mut().cut_off(WRITER);
    }
}

struct Consumer<E> {
    peer: Incarnation,
    pool: HostPool,
    end: E,
}

/// A bench for transports into host pools.
pub struct HostBench<T, E> {
    transport: T,
    consumers: [Consumer<E>; 2],
    /// Reached through pointers only: the transport reads it.
    regions: Arc<Regions>,
    _memory: Vec<HostPool>,
    /// Where the transport is, if that is another host.
    _away: Option<(Inside, Network)>,
}

fn host<T: Transport, E: End>(
    transport: impl FnOnce(Arc<Regions>) -> T,
    end: impl Fn(&T, Incarnation) -> E,
) -> HostBench<T, E> {
    let memory = HostPool::new(REGIONS, BYTES).unwrap();
    let mut regions = Regions::new();
    for id in 0..REGIONS {
        let mapping = memory.segment(SegmentId(id)).unwrap();
        // SAFETY: `memory` is kept beside the transport, and nobody refers to it.
        unsafe { regions.register(mapping.as_mut_ptr(), BYTES) }.unwrap();
    }
    let regions = Arc::new(regions);
    let transport = transport(Arc::clone(&regions));
    let consumers = [(); 2].map(|()| {
        let peer = next_peer();
        let end = end(&transport, peer);
        Consumer { peer, pool: HostPool::new(SEGMENTS, BYTES).unwrap(), end }
    });
    let mut bench = HostBench { transport, consumers, regions, _memory: vec![memory], _away: None };
    for consumer in 0..2 {
        for segment in 0..SEGMENTS {
            bench.attach(consumer, SegmentId(segment));
        }
    }
    bench
}

pub fn tcp() -> Option<impl Bench> {
    Some(host(
        |regions| Tcp::new(WRITER, regions).unwrap(),
        |_, peer| RefCell::new(TcpTarget::bind(peer, "127.0.0.1", 0, 3).unwrap()),
    ))
}

/// Over TCP on the device `lo`, where the wheel is.
pub fn ucx() -> Option<impl Bench> {
    let Some(wheel) = std::env::var_os("KVXFER_TEST_UCX") else {
        skip("KVXFER_TEST_UCX=$(env/ucx) is not set");
        return None;
    };
    let library = PathBuf::from(wheel).join("lib");
    let settings = Settings {
        library: Some(&library),
        devices: Some("lo"),
        trust: true,
        ..Settings::default()
    };
    let context = settings.start().unwrap();
    Some(host(
        |regions| Ucx::new(&context, regions).unwrap(),
        |ucx, _| {
            let mut target = UcxTarget::new(Arc::clone(&context)).unwrap();
            target.welcome(WRITER, &ucx.ability().unwrap(), None).unwrap();
            RefCell::new(target)
        },
    ))
}

/// The producer on another host than the consumers.
pub fn tcp_between_hosts() -> Option<impl Bench> {
    let network = Network::new()?;
    let away = network.enter(B);
    let mut bench = host(
        |regions| Tcp::new(WRITER, regions).unwrap(),
        |_, peer| {
            let bind = || TcpTarget::bind(peer, Network::HOSTS[A], 0, 3).unwrap();
            RefCell::new(network.inside(A, bind))
        },
    );
    bench._away = Some((away, network));
    Some(bench)
}

pub fn local() -> Option<impl Bench> {
    Some(host(Local::new, |_, peer| LocalExports::new(peer)))
}

pub fn shm() -> Option<impl Bench> {
    Some(host(Shm::new, |_, _| Descriptors))
}

pub fn faultless() -> Option<impl Bench> {
    Some(faulty(Faults::new()))
}

pub fn faulty(faults: Faults) -> impl Bench {
    host(|regions| Fault::new(Shm::new(regions), faults), |_, _| Descriptors)
}

impl<T: Transport, E: End> Bench for HostBench<T, E> {
    fn transport(&mut self) -> &mut dyn Transport {
        &mut self.transport
    }

    fn peer(&self, consumer: usize) -> Incarnation {
        self.consumers[consumer].peer
    }

    fn handle(&mut self, consumer: usize, segment: SegmentId) -> SegmentHandle {
        let consumer = &self.consumers[consumer];
        consumer.end.export(&consumer.pool, segment).unwrap()
    }

    fn replace(&mut self, consumer: usize, segment: SegmentId) {
        self.consumers[consumer].pool.replace(segment, &[]).unwrap();
    }

    fn read(&self, consumer: usize, segment: SegmentId, offset: u64, len: u64) -> Vec<u8> {
        let from = self.consumers[consumer].pool.segment(segment).unwrap().at(offset, len).unwrap();
        let mut bytes = vec![0; len as usize];
        // SAFETY: `at` checked the range.
        unsafe {
            copy::copy_summed(bytes.as_mut_ptr(), from, bytes.len(), 0, 0, copy::Stores::Cached)
        };
        bytes
    }

    fn fill(&mut self, region: RegionId, offset: u64, bytes: &[u8]) {
        let to = self.regions.at(region, offset, bytes.len() as u64).unwrap();
        // SAFETY: `at` checked the range.
        unsafe { to.copy_from(bytes.as_ptr(), bytes.len()) };
    }

    fn by_itself(&self) -> bool {
        E::BY_ITSELF
    }

    fn receive(&mut self) {
        self.consumers.iter().for_each(|consumer| consumer.end.receive());
    }

    fn fence(&mut self, consumer: usize) {
        self.consumers[consumer].end.fence();
    }
}
