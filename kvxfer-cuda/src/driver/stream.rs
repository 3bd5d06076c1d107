//! Streams of our own.

use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;

use super::error::{CudaError, Result};
use super::handles::{Copy, DevicePtr, RawStream};
use super::{Device, Event, Function, Pinned};

/// Whose work goes first when both can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priority {
    /// What every stream has that nobody gave another one.
    Default,
    /// The lowest that the device has: an engine's work goes first.
    Lowest,
}

/// A queue of work. Its own work runs in order; nothing else is ordered with it, not even the default stream,
/// except by events.
///
/// Whoever queues work waits for its end before dropping **device memory** that the work uses. Pinned memory
/// and kernels are kept by the stream until it is dropped. Dropped with work in it, the stream waits for nothing: the
/// driver ends the work, and the host memory that it uses is leaked.
pub struct Stream {
    device: Device,
    raw: RawStream,
    used: Mutex<Used>,
}

#[derive(Default)]
struct Used {
    /// What queued work may use, each once.
    kept: Vec<Kept>,
    // A batch as the driver wants it; kept so that nothing is allocated each time.
    dsts: Vec<DevicePtr>,
    srcs: Vec<DevicePtr>,
    sizes: Vec<usize>,
}

/// Something that work may use after its owner has dropped it.
type Kept = Arc<dyn fmt::Debug + Send + Sync>;

impl Used {
    fn keep<T: fmt::Debug + Send + Sync + 'static>(&mut self, thing: &Arc<T>) {
        if !self.kept.iter().any(|kept| std::ptr::addr_eq(Arc::as_ptr(kept), Arc::as_ptr(thing))) {
            self.kept.push(Arc::clone(thing) as Kept);
        }
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stream({:?}, {:?})", self.raw.0, self.device)
    }
}

impl Stream {
    pub(super) fn new(device: &Device, priority: Priority) -> Result<Self> {
        let _bound = device.bound()?;
        let driver = device.driver();
        // SAFETY: the context is current.
        let raw = unsafe {
            let priority = match priority {
                Priority::Default => 0,
                Priority::Lowest => driver.lowest_priority()?,
            };
            driver.stream_create(priority)?
        };
        Ok(Self { device: device.clone(), raw, used: Mutex::default() })
    }

    /// The `CUstream`. Others may use it as long as this lives.
    pub fn handle(&self) -> u64 {
        self.raw.0.expose_provenance() as u64
    }

    /// The device whose stream it is.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Moves `event` behind all work that is in the stream now.
    ///
    /// # Errors
    /// The driver's.
    pub fn record(&self, event: &Event) -> Result<()> {
        let _bound = self.device.bound()?;
        // SAFETY: both are alive.
        unsafe { self.device.driver().event_record(event.raw(), self.raw) }
    }

    /// All work that comes into the stream from now on starts after `event`, as it is recorded now.
    ///
    /// # Errors
    /// The driver's.
    pub fn wait(&self, event: &Event) -> Result<()> {
        let _bound = self.device.bound()?;
        // SAFETY: both are alive.
        unsafe { self.device.driver().stream_wait(self.raw, event.raw()) }
    }

    /// Whether all its work is done.
    ///
    /// # Errors
    /// The driver's, also for work that failed.
    pub fn is_idle(&self) -> Result<bool> {
        let _bound = self.device.bound()?;
        // SAFETY: the stream is alive.
        unsafe { self.device.driver().stream_is_idle(self.raw) }
    }

    /// Waits until all its work is done, perhaps spinning: for start, end and tests. [`Event::wait`] sleeps.
    ///
    /// # Errors
    /// The driver's, also for work that failed.
    pub fn synchronize(&self) -> Result<()> {
        let _bound = self.device.bound()?;
        // SAFETY: the stream is alive.
        unsafe { self.device.driver().stream_synchronize(self.raw) }
    }

    /// Copies within the device's addresses.
    ///
    /// # Errors
    /// The driver's.
    pub fn copy(&self, dst: DevicePtr, src: DevicePtr, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let _bound = self.device.bound()?;
        // SAFETY: the ranges are good, as whoever made the addresses promised.
        unsafe { self.device.driver().copy(Copy { dst, src, len }, self.raw) }
    }

    /// Copies many ranges, in any order among themselves, each reading its source when the stream gets there.
    ///
    /// # Errors
    /// The driver's. Some of the copies may be queued then.
    pub fn copy_batch(&self, copies: &[Copy]) -> Result<()> {
        let mut used = self.used.lock();
        let Used { dsts, srcs, sizes, .. } = &mut *used;
        for list in [&mut *dsts, &mut *srcs] {
            list.clear();
        }
        sizes.clear();
        for copy in copies.iter().filter(|copy| copy.len > 0) {
            dsts.push(copy.dst);
            srcs.push(copy.src);
            sizes.push(copy.len as usize);
        }
        if sizes.is_empty() {
            return Ok(());
        }
        let _bound = self.device.bound()?;
        // SAFETY: the ranges are good, as whoever made the addresses promised; the stream is not the default one.
        unsafe { self.device.driver().copy_batch(dsts, srcs, sizes, self.raw) }
    }

    /// Sets bytes.
    ///
    /// # Errors
    /// The driver's.
    pub fn fill(&self, ptr: DevicePtr, byte: u8, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let _bound = self.device.bound()?;
        // SAFETY: the range is good, as whoever made the address promised.
        unsafe { self.device.driver().fill(ptr, byte, len as usize, self.raw) }
    }

    /// Copies from pinned memory, as it is when the stream gets there.
    ///
    /// # Errors
    /// `OutOfBounds` for the pinned range; else the driver's.
    pub fn upload(&self, dst: DevicePtr, from: &Arc<Pinned>, offset: u64, len: u64) -> Result<()> {
        let src = from.at(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        self.used.lock().keep(from);
        let _bound = self.device.bound()?;
        // SAFETY: `at` checked the one range, which is kept; whoever made the address promised the other.
        unsafe { self.device.driver().upload(dst, src, len as usize, self.raw) }
    }

    /// Copies to pinned memory.
    ///
    /// # Errors
    /// As [`Stream::upload`].
    pub fn download(&self, to: &Arc<Pinned>, offset: u64, src: DevicePtr, len: u64) -> Result<()> {
        let dst = to.at(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        self.used.lock().keep(to);
        let _bound = self.device.bound()?;
        // SAFETY: as for `upload`.
        unsafe { self.device.driver().download(dst, src, len as usize, self.raw) }
    }

    /// Launches a kernel of `grid` times `block` threads. Addresses among `args` are used without any check, as
    /// those of copies are.
    ///
    /// # Errors
    /// `Unsupported` for more than [`Function::MOST_PARAMETERS`]; else the driver's.
    pub fn launch(
        &self,
        function: &Function,
        grid: u32,
        block: u32,
        args: &mut [u64],
    ) -> Result<()> {
        // The driver reads as many as the kernel has, however many are given: so there are always enough.
        let mut nothing = 0;
        let mut params = [&raw mut nothing; Function::MOST_PARAMETERS];
        if args.len() > params.len() {
            return Err(CudaError::Unsupported { what: "a kernel of that many parameters" });
        }
        for (param, arg) in params.iter_mut().zip(args) {
            *param = arg;
        }
        self.used.lock().keep(&function.module);
        let _bound = self.device.bound()?;
        // SAFETY: the kernel is kept; its parameters are 8 bytes, as whoever asked for it promised.
        unsafe { self.device.driver().launch(function.raw, grid, block, self.raw, &mut params) }
    }

    /// Holds all later work back until the 32-bit word at `offset` is at least `value`. A word that never
    /// becomes it holds the stream for ever: for tests.
    ///
    /// # Errors
    /// `MissingSymbol` on drivers that can't; `OutOfBounds`, also for an `offset` that is no multiple of 4; else
    /// the driver's.
    pub fn hold(&self, word: &Arc<Pinned>, offset: u64, value: u32) -> Result<()> {
        let at = word.at(offset, 4)?;
        if !offset.is_multiple_of(4) {
            return Err(CudaError::OutOfBounds { offset, len: 4, bytes: word.bytes() });
        }
        self.used.lock().keep(word);
        let _bound = self.device.bound()?;
        // SAFETY: pinned memory has the same address on the device as on the host, and is kept.
        unsafe {
            let ptr = DevicePtr::from_raw(at.expose_provenance() as u64);
            self.device.driver().stream_hold(self.raw, ptr, value)
        }
    }

    /// Captures what `work` queues here into a graph, which is thrown away: for tests.
    ///
    /// # Errors
    /// The driver's, when the capture was invalidated meanwhile.
    pub fn capture(&self, work: impl FnOnce()) -> Result<()> {
        let _bound = self.device.bound()?;
        // SAFETY: the stream is alive; a capture is ended where it began.
        unsafe { self.device.driver().capture_begin(self.raw) }?;
        work();
        // SAFETY: as above.
        unsafe { self.device.driver().capture_end(self.raw) }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let idle = self.is_idle();
        // SAFETY: destroyed once; the driver ends its work first, and does not wait for it here.
        let _ = self
            .device
            .bound()
            .and_then(|_bound| unsafe { self.device.driver().stream_destroy(self.raw) });
        let done = match idle {
            Ok(idle) => idle,
            // Nothing runs any more.
            Err(error) => error.is_sticky(),
        };
        if !done {
            let kept = std::mem::take(&mut self.used.get_mut().kept);
            if !kept.is_empty() {
                tracing::error!(
                    leaked = kept.len(),
                    "a stream with work in it was dropped; what the work uses stays"
                );
                std::mem::forget(kept);
            }
        }
    }
}
