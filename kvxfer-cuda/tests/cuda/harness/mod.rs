//! The device, other processes, and bytes on their way between host and device.
//!
//! Tests share the machine's devices, and one process its contexts. So each test holds a [`Lease`]: most
//! share it, those that count what is free have it for themselves. What breaks a context, or wants another stand-in,
//! happens in a child process: this binary, run again for one test.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use kvxfer_cuda::driver::{
    self, CudaError, Device, DevicePtr, Driver, Event, Pinned, Priority, Sharing, Stream,
};
use rustix::fs::{FlockOperation, flock};

pub use crate::common::{DEADLINE, Peer, Wire, parent, skip};

/// Leave to use the devices, until it is dropped.
pub struct Lease<T> {
    value: T,
    _lock: File,
    _watchdog: Sender<()>,
}

impl<T> Deref for Lease<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

/// The driver; none, when there is none and tests need not have one.
pub fn driver() -> Option<Arc<dyn Driver>> {
    match driver::cuda() {
        Ok(driver) => Some(driver),
        Err(error @ (CudaError::NoLibrary { .. } | CudaError::NoDevice)) => {
            let required =
                std::env::var_os("KVXFER_REQUIRE_CUDA").is_some_and(|value| value == "1");
            assert!(!required, "{error}, and KVXFER_REQUIRE_CUDA=1");
            skip("no CUDA driver");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// A folder for files: cargo's, or, where this binary was only copied to, the system's.
pub fn scratch() -> PathBuf {
    let cargos = Path::new(env!("CARGO_TARGET_TMPDIR"));
    if cargos.is_dir() { cargos.into() } else { std::env::temp_dir() }
}

fn lease<T>(exclusive: bool, value: impl FnOnce(Arc<dyn Driver>) -> Option<T>) -> Option<Lease<T>> {
    let driver = driver()?;
    let path = scratch().join("cuda.lock");
    let lock = OpenOptions::new().create(true).truncate(false).write(true).open(path).unwrap();
    let operation =
        if exclusive { FlockOperation::LockExclusive } else { FlockOperation::LockShared };
    flock(&lock, operation).unwrap();
    Some(Lease { value: value(driver)?, _lock: lock, _watchdog: watchdog() })
}

/// Ends this process unless what is returned is dropped in time: a driver's call that hangs can't be
/// ended otherwise.
fn watchdog() -> Sender<()> {
    let name = std::thread::current().name().unwrap_or_default().to_owned();
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        if receiver.recv_timeout(2 * DEADLINE) == Err(RecvTimeoutError::Timeout) {
            let _ = writeln!(io::stderr(), "{name} hangs");
            std::process::abort();
        }
    });
    sender
}

/// The first device, beside other tests.
pub fn one_device() -> Option<Lease<Device>> {
    lease(false, |driver| Some(Device::open(driver, 0).unwrap()))
}

/// The first device, while no other test uses any.
pub fn device_alone() -> Option<Lease<Device>> {
    lease(true, |driver| Some(Device::open(driver, 0).unwrap()))
}

/// The first two devices, beside other tests; skips when there is one only.
pub fn two_devices() -> Option<Lease<[Device; 2]>> {
    lease(false, |driver| {
        if Device::count(&driver).unwrap() < 2 {
            skip("one device only");
            return None;
        }
        Some([0, 1].map(|ordinal| Device::open(Arc::clone(&driver), ordinal).unwrap()))
    })
}

/// The first device, for a child: its parent holds the lease.
pub fn child_device() -> Device {
    Device::open(driver::cuda().unwrap(), 0).unwrap()
}

/// The device of a test, or the end of the test: beside others, `alone`, alone where memory is `counted` for all
/// processes, or `two`.
macro_rules! device {
    () => {
        match $crate::harness::one_device() {
            Some(device) => device,
            None => return,
        }
    };
    (alone) => {
        match $crate::harness::device_alone() {
            Some(device) => device,
            None => return,
        }
    };
    (counted) => {
        match $crate::harness::device_alone() {
            Some(_) if $crate::harness::no_ledger() => return,
            Some(device) => device,
            None => return,
        }
    };
    (two) => {
        match $crate::harness::two_devices() {
            Some(devices) => devices,
            None => return,
        }
    };
}
pub(crate) use device;

/// Whether the driver doesn't know what other processes use, which is said: a stand-in without a ledger.
pub fn no_ledger() -> bool {
    let configured = std::env::var("KVXFER_STANDIN").unwrap_or_default();
    let none = on_standin() && !configured.contains("ledger=");
    if none {
        skip("the stand-in has no ledger");
    }
    none
}

/// What the stand-in counts as alive in this process; none on a real driver.
pub fn live() -> Option<Vec<u64>> {
    type Report = unsafe extern "C" fn(*mut u64, usize) -> i32;
    driver::cuda().ok()?;
    let mut counts = vec![0; 64];
    // SAFETY: the library is there, and the stand-in declares the function so; it writes at most as many
    // as it is told.
    let kinds = unsafe {
        let report = cudarc::driver::sys::culib().get::<Report>(b"kvxfer_standin_report").ok()?;
        report(counts.as_mut_ptr(), counts.len())
    };
    counts.truncate(kinds as usize);
    Some(counts)
}

/// Whether the driver is the stand-in.
pub fn on_standin() -> bool {
    live().is_some()
}

/// Asserts that this process has given everything back. Real drivers don't tell.
#[track_caller]
pub fn assert_nothing_lives() {
    if let Some(counts) = live() {
        assert!(counts.iter().all(|&count| count == 0), "something is left: {counts:?}");
    }
}

/// How this device's memory can be shared; the other ways are said to be skipped.
pub fn shares(device: &Device) -> impl Iterator<Item = Sharing> {
    let can = |sharing| match sharing {
        Sharing::PosixFd => device.supports_posix_fd(),
        // The device could, and its host may take part in none.
        Sharing::Fabric => device.supports_fabric() && device.allocate_as(sharing, 1).is_ok(),
        Sharing::Legacy => !device.is_mig() && !device.under_mps(),
    };
    let (can, not): (Vec<_>, _) =
        [Sharing::PosixFd, Sharing::Fabric, Sharing::Legacy].into_iter().partition(|&way| can(way));
    let _: Vec<()> = not.iter().map(|way| skip(&format!("no memory is shared as {way}"))).collect();
    can.into_iter()
}

// Work and its end.

/// Waits for the event, by asking: a driver that hangs fails the test.
#[track_caller]
pub fn finish(event: &Event) {
    let start = Instant::now();
    while !event.is_done().unwrap() {
        assert!(start.elapsed() < DEADLINE, "the work does not end");
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// Waits for all work in the stream, as [`finish`] does.
#[track_caller]
pub fn drain(stream: &Stream) {
    let event = stream.device().event().unwrap();
    stream.record(&event).unwrap();
    finish(&event);
}

/// Holds streams back until it is opened, or dropped.
pub struct Gate(Arc<Pinned>);

impl Gate {
    pub fn new(device: &Device) -> Self {
        Self(device.pinned(4).unwrap())
    }

    /// A new gate that holds the stream.
    pub fn before(stream: &Stream) -> Self {
        let gate = Self::new(stream.device());
        gate.hold(stream);
        gate
    }

    pub fn hold(&self, stream: &Stream) {
        stream.hold(&self.0, 0, 1).unwrap();
    }

    pub fn open(&self) {
        self.0.write(0, &1_u32.to_ne_bytes()).unwrap();
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.open();
    }
}

/// Bytes of a device, by a stream of their own.
pub fn get(device: &Device, ptr: DevicePtr, len: usize) -> Vec<u8> {
    let (stream, pinned) =
        (device.stream(Priority::Default).unwrap(), device.pinned(len as u64).unwrap());
    stream.download(&pinned, 0, ptr, len as u64).unwrap();
    drain(&stream);
    let mut bytes = vec![0; len];
    pinned.read(0, &mut bytes).unwrap();
    bytes
}

/// Puts bytes on a device, by a stream of their own.
pub fn put(device: &Device, ptr: DevicePtr, bytes: &[u8]) {
    let len = bytes.len() as u64;
    let (stream, pinned) = (device.stream(Priority::Default).unwrap(), device.pinned(len).unwrap());
    pinned.write(0, bytes).unwrap();
    stream.upload(ptr, &pinned, 0, len).unwrap();
    drain(&stream);
}

/// Bytes that no shift of themselves equals.
pub fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .collect()
}
