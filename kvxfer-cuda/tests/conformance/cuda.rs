//! GPU memory: a device pool for each consumer, on one GPU. Plain memory is not opened in the process that has
//! it, so there the consumers are another one.

use std::cell::RefCell;
use std::sync::Arc;

use kvxfer_core::transport::{RegionId, SegmentHandle, Transport};
use kvxfer_core::{Incarnation, SegmentId};
use kvxfer_cuda::device::{Copier, CopierConfig, DevicePool, DeviceRegions};
use kvxfer_cuda::driver::{Buffer, Device, Pinned, Priority, Sharing, Stream, cuda};
use kvxfer_cuda::transport::{CudaIpc, cuda_ipc as ipc};

use crate::bench::{BYTES, Bench, REGIONS, SEGMENTS, next_peer};
use crate::common::{Peer, parent, skip};

/// In this order: what copies is dropped before what it copies from and to.
pub struct CudaBench<P> {
    transport: CudaIpc,
    peers: [Incarnation; 2],
    pools: P,
    memory: Vec<Buffer>,
    stream: Stream,
    staging: Arc<Pinned>,
}

/// The consumers' memory.
trait Pools {
    fn export(&mut self, consumer: usize, segment: SegmentId) -> SegmentHandle;
    fn replace(&mut self, consumer: usize, segment: SegmentId);
    fn read(&self, consumer: usize, segment: SegmentId, offset: u64, len: u64) -> Vec<u8>;
}

/// `None` without a driver, unless the environment says that there has to be one.
fn device() -> Option<Device> {
    let driver = match cuda() {
        Ok(driver) => driver,
        Err(error) if std::env::var_os("KVXFER_REQUIRE_CUDA").is_some() => panic!("{error}"),
        Err(error) => {
            skip(&error.to_string());
            return None;
        }
    };
    Some(Device::open(driver, 0).unwrap())
}

pub fn posix_fd() -> Option<impl Bench> {
    let device = device()?;
    let pools = Here::new(&device, Sharing::PosixFd);
    Some(bench(&device, pools))
}

pub fn fabric() -> Option<impl Bench> {
    let device = device()?;
    // The device could, and its host may take part in none.
    if !device.supports_fabric() || device.allocate_as(Sharing::Fabric, 1).is_err() {
        skip("the device or its host has no fabric");
        return None;
    }
    let pools = Here::new(&device, Sharing::Fabric);
    Some(bench(&device, pools))
}

pub fn legacy() -> Option<impl Bench> {
    let device = device()?;
    if device.is_mig() || device.under_mps() {
        skip("no legacy IPC on MIG and under MPS");
        return None;
    }
    let peer = Peer::start("cuda::child", CHILD);
    Some(bench(&device, There(RefCell::new(peer))))
}

fn bench<P: Pools>(device: &Device, pools: P) -> CudaBench<P> {
    let stream = device.stream(Priority::Default).unwrap();
    let memory: Vec<_> = (0..REGIONS).map(|_| device.buffer(BYTES).unwrap()).collect();
    let mut regions = DeviceRegions::new();
    for buffer in &memory {
        // SAFETY: `memory` outlives the transport.
        unsafe { regions.register(buffer.ptr(), BYTES) }.unwrap();
    }
    // Some of the clauses' writes go this way, and some that.
    let config = CopierConfig { kernel_below: Some(16 << 10), ..CopierConfig::default() };
    let copier = Copier::new(device, config, || ()).unwrap();
    let transport = CudaIpc::new(device.clone(), Arc::new(regions), copier);
    let peers = [next_peer(), next_peer()];
    let staging = device.pinned(BYTES).unwrap();
    let mut bench = CudaBench { transport, peers, pools, memory, stream, staging };
    for consumer in 0..2 {
        for segment in 0..SEGMENTS {
            bench.attach(consumer, SegmentId(segment));
        }
    }
    bench
}

impl<P: Pools> Bench for CudaBench<P> {
    fn transport(&mut self) -> &mut dyn Transport {
        &mut self.transport
    }

    fn peer(&self, consumer: usize) -> Incarnation {
        self.peers[consumer]
    }

    fn handle(&mut self, consumer: usize, segment: SegmentId) -> SegmentHandle {
        self.pools.export(consumer, segment)
    }

    fn replace(&mut self, consumer: usize, segment: SegmentId) {
        self.pools.replace(consumer, segment);
    }

    fn read(&self, consumer: usize, segment: SegmentId, offset: u64, len: u64) -> Vec<u8> {
        self.pools.read(consumer, segment, offset, len)
    }

    fn fill(&mut self, region: RegionId, offset: u64, bytes: &[u8]) {
        self.staging.write(0, bytes).unwrap();
        let to = self.memory[region.0 as usize].ptr().offset(offset);
        self.stream.upload(to, &self.staging, 0, bytes.len() as u64).unwrap();
        self.stream.synchronize().unwrap();
    }

    fn by_itself(&self) -> bool {
        true
    }
}

/// In this process.
struct Here {
    pools: [DevicePool; 2],
    stream: Stream,
    staging: Arc<Pinned>,
}

impl Here {
    fn new(device: &Device, sharing: Sharing) -> Self {
        let pool = || DevicePool::new_as(device, sharing, SEGMENTS, BYTES).unwrap();
        let stream = device.stream(Priority::Default).unwrap();
        let here = Self { pools: [pool(), pool()], stream, staging: device.pinned(BYTES).unwrap() };
        for consumer in 0..2 {
            (0..SEGMENTS).for_each(|segment| here.clear(consumer, SegmentId(segment)));
        }
        here
    }

    fn clear(&self, consumer: usize, segment: SegmentId) {
        let start = self.pools[consumer].at(segment, 0, BYTES).unwrap();
        self.stream.fill(start, 0, BYTES).unwrap();
        self.stream.synchronize().unwrap();
    }
}

impl Pools for Here {
    fn export(&mut self, consumer: usize, segment: SegmentId) -> SegmentHandle {
        ipc::export(&mut self.pools[consumer], segment, Incarnation([9; 16])).unwrap()
    }

    fn replace(&mut self, consumer: usize, segment: SegmentId) {
        let pool = &mut self.pools[consumer];
        let fresh = pool.fresh(segment, &[]).unwrap();
        drop(pool.swap(fresh).unwrap());
        self.clear(consumer, segment);
    }

    fn read(&self, consumer: usize, segment: SegmentId, offset: u64, len: u64) -> Vec<u8> {
        let from = self.pools[consumer].at(segment, offset, len).unwrap();
        self.stream.download(&self.staging, 0, from, len).unwrap();
        self.stream.synchronize().unwrap();
        let mut bytes = vec![0; len as usize];
        self.staging.read(0, &mut bytes).unwrap();
        bytes
    }
}

/// In a process of their own.
struct There(RefCell<Peer>);

const CHILD: &str = "legacy";
/// Of a legacy handle.
const BLOB: usize = 114;

impl There {
    fn ask(&self, what: u8, consumer: usize, segment: SegmentId) {
        let order = [what, consumer as u8 * 2 + segment.0 as u8];
        self.0.borrow_mut().wire.send(&order);
    }
}

impl Pools for There {
    fn export(&mut self, consumer: usize, segment: SegmentId) -> SegmentHandle {
        self.ask(b'e', consumer, segment);
        let blob = self.0.get_mut().wire.receive::<BLOB>().to_vec();
        SegmentHandle { blob, bytes: BYTES, fds: vec![] }
    }

    fn replace(&mut self, consumer: usize, segment: SegmentId) {
        self.ask(b'r', consumer, segment);
        self.0.get_mut().wire.receive::<1>();
    }

    fn read(&self, consumer: usize, segment: SegmentId, offset: u64, len: u64) -> Vec<u8> {
        self.ask(b'g', consumer, segment);
        let mut bytes = vec![0; BYTES as usize];
        self.0.borrow_mut().wire.receive_into(&mut bytes);
        bytes[offset as usize..][..len as usize].to_vec()
    }
}

/// The consumers of [`There`]; an empty test otherwise.
#[test]
fn child() {
    let Some(mut wire) = parent(CHILD) else { return };
    let mut pools = Here::new(&device().unwrap(), Sharing::Legacy);
    while let Some([what, which]) = wire.order() {
        let (consumer, segment) = (usize::from(which / 2), SegmentId(u32::from(which % 2)));
        match what {
            b'e' => wire.send(&pools.export(consumer, segment).blob),
            b'r' => {
                pools.replace(consumer, segment);
                wire.send(&[0]);
            }
            _ => wire.send(&pools.read(consumer, segment, 0, BYTES)),
        }
    }
}
