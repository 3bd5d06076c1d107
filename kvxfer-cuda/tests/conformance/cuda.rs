//! GPU memory: a device pool for each consumer, on one GPU.

use std::sync::Arc;

use kvxfer_core::transport::{RegionId, SegmentHandle, Transport};
use kvxfer_core::{Incarnation, SegmentId};
use kvxfer_cuda::device::{Copier, CopierConfig, DevicePool, DeviceRegions};
use kvxfer_cuda::driver::{Buffer, Device, DevicePtr, Pinned, Priority, Stream, cuda};
use kvxfer_cuda::transport::{CudaIpc, cuda_ipc as ipc};

use crate::bench::{BYTES, Bench, REGIONS, SEGMENTS, next_peer};

/// In this order: what copies is dropped before what it copies from and to.
pub struct CudaBench {
    transport: CudaIpc,
    consumers: [(Incarnation, DevicePool); 2],
    memory: Vec<Buffer>,
    stream: Stream,
    staging: Arc<Pinned>,
}

/// `None` without a driver, unless the environment says that there has to be one.
pub fn cuda_ipc() -> Option<impl Bench> {
    let driver = match cuda() {
        Ok(driver) => driver,
        Err(error) if std::env::var_os("KVXFER_REQUIRE_CUDA").is_some() => panic!("{error}"),
        Err(error) => {
            println!("skipped: {error}");
            return None;
        }
    };
    let device = Device::open(driver, 0).unwrap();
    let stream = device.stream(Priority::Default).unwrap();
    let memory: Vec<_> = (0..REGIONS).map(|_| device.buffer(BYTES).unwrap()).collect();
    let mut regions = DeviceRegions::new();
    for buffer in &memory {
        // SAFETY: `memory` outlives the transport.
        unsafe { regions.register(buffer.ptr(), BYTES) }.unwrap();
    }
    // Some of the clauses' writes go this way, and some that.
    let config = CopierConfig { kernel_below: Some(16 << 10), ..CopierConfig::default() };
    let copier = Copier::new(&device, config, || ()).unwrap();
    let transport = CudaIpc::new(device.clone(), Arc::new(regions), copier);
    let pool = || {
        let pool = DevicePool::new(&device, SEGMENTS, BYTES).unwrap();
        for id in 0..SEGMENTS {
            stream.fill(pool.at(SegmentId(id), 0, BYTES).unwrap(), 0, BYTES).unwrap();
        }
        stream.synchronize().unwrap();
        pool
    };
    let consumers = [(); 2].map(|()| (next_peer(), pool()));
    let staging = device.pinned(BYTES).unwrap();
    let mut bench = CudaBench { transport, consumers, memory, stream, staging };
    for consumer in 0..2 {
        for segment in 0..SEGMENTS {
            bench.attach(consumer, SegmentId(segment));
        }
    }
    Some(bench)
}

impl CudaBench {
    fn download(&self, from: DevicePtr, len: u64) -> Vec<u8> {
        self.stream.download(&self.staging, 0, from, len).unwrap();
        self.stream.synchronize().unwrap();
        let mut bytes = vec![0; len as usize];
        self.staging.read(0, &mut bytes).unwrap();
        bytes
    }
}

impl Bench for CudaBench {
    fn transport(&mut self) -> &mut dyn Transport {
        &mut self.transport
    }

    fn peer(&self, consumer: usize) -> Incarnation {
        self.consumers[consumer].0
    }

    fn handle(&mut self, consumer: usize, segment: SegmentId) -> SegmentHandle {
        let (_, pool) = &mut self.consumers[consumer];
        ipc::export(pool, segment, Incarnation([9; 16])).unwrap()
    }

    fn replace(&mut self, consumer: usize, segment: SegmentId) {
        let (_, pool) = &mut self.consumers[consumer];
        let fresh = pool.fresh(segment, &[]).unwrap();
        drop(pool.swap(fresh).unwrap());
        let start = pool.at(segment, 0, BYTES).unwrap();
        self.stream.fill(start, 0, BYTES).unwrap();
        self.stream.synchronize().unwrap();
    }

    fn read(&self, consumer: usize, segment: SegmentId, offset: u64, len: u64) -> Vec<u8> {
        self.download(self.consumers[consumer].1.at(segment, offset, len).unwrap(), len)
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
