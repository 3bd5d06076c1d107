//! Events, and other people's streams.

use super::Device;
use super::error::{CudaError, Result};
use super::handles::{RawEvent, RawStream};

/// A point in a stream. Until it is recorded it counts as done. Recording again moves it; who waits already,
/// on the host or in a stream, waits for where it was.
#[derive(Debug)]
pub struct Event {
    device: Device,
    raw: RawEvent,
}

impl Event {
    pub(super) fn new(device: &Device) -> Result<Self> {
        let _bound = device.bound()?;
        // SAFETY: the context is current.
        let raw = unsafe { device.driver().event_create() }?;
        Ok(Self { device: device.clone(), raw })
    }

    pub(super) fn raw(&self) -> RawEvent {
        self.raw
    }

    /// Whether all work before it is done.
    ///
    /// # Errors
    /// The driver's, also for work that failed.
    pub fn is_done(&self) -> Result<bool> {
        let _bound = self.device.bound()?;
        // SAFETY: the event is alive.
        unsafe { self.device.driver().event_is_done(self.raw) }
    }

    /// Sleeps until all work before it is done. Never on an engine's thread.
    ///
    /// # Errors
    /// The driver's, also for work that failed.
    pub fn wait(&self) -> Result<()> {
        let _bound = self.device.bound()?;
        // SAFETY: the event is alive.
        unsafe { self.device.driver().event_synchronize(self.raw) }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: destroyed once. The driver keeps it for streams that wait for it.
        let _ = self
            .device
            .bound()
            .and_then(|_bound| unsafe { self.device.driver().event_destroy(self.raw) });
    }
}

/// A stream that is somebody else's: the engine's. It is only ordered with ours, and never waited for.
#[derive(Clone, Debug)]
pub struct EngineStream {
    device: Device,
    raw: RawStream,
}

impl EngineStream {
    /// A `CUstream`, as torch's `cuda_stream` has it; 0 is the legacy default stream.
    ///
    /// # Safety
    /// It is a stream of that device's primary context, and stays alive as long as this and its clones are used.
    pub unsafe fn from_raw(device: &Device, handle: u64) -> Self {
        let handle = std::ptr::with_exposed_provenance_mut(handle as usize);
        Self { device: device.clone(), raw: RawStream(handle) }
    }

    /// Moves `event` behind all work that is in the stream now.
    ///
    /// # Errors
    /// `Capturing` while the stream is captured into a graph, which stays valid; else the driver's.
    pub fn record(&self, event: &Event) -> Result<()> {
        let _bound = self.device.bound()?;
        self.refuse_capture()?;
        // SAFETY: both are alive, and of one context.
        unsafe { self.device.driver().event_record(event.raw, self.raw) }
    }

    /// All work that comes into the stream from now on starts after `event`, as it is recorded now.
    ///
    /// # Errors
    /// As [`EngineStream::record`].
    pub fn wait(&self, event: &Event) -> Result<()> {
        let _bound = self.device.bound()?;
        self.refuse_capture()?;
        // SAFETY: both are alive.
        unsafe { self.device.driver().stream_wait(self.raw, event.raw) }
    }

    fn refuse_capture(&self) -> Result<()> {
        // SAFETY: the stream is alive; to ask disturbs no capture.
        match unsafe { self.device.driver().stream_is_capturing(self.raw) }? {
            true => Err(CudaError::Capturing),
            false => Ok(()),
        }
    }
}
