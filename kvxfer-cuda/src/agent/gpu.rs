//! What an engine's thread does with its own streams: records events there, and makes them wait. It waits for
//! nothing itself but, for the time of a launch, a mutex.

use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};

use kvxfer_core::{ErrorKind, Result};
use parking_lot::Mutex;

use crate::device::Gate;
use crate::driver::{Device, EngineStream, Event};

/// Events that are ready for use from the start, and how many there can be.
const EVENTS: usize = 64;
const EVENTS_MAX: usize = 1 << 12;

/// Between an engine that is about to write to its blocks, and copies that read them.
#[derive(Debug)]
pub(super) struct ReadGate {
    pub(super) gate: Arc<Gate>,
    /// Behind all reads that have begun.
    pub(super) launched: Arc<Event>,
}

/// The GPU of an agent whose KV is there, as the engine's threads see it.
#[derive(Debug)]
pub(super) struct Gpu {
    device: Device,
    /// The longest unused first. Ours alone are those that nobody waits for any more.
    events: Mutex<VecDeque<Arc<Event>>>,
    /// Once memory is registered, if it is read.
    gate: OnceLock<ReadGate>,
}

impl Gpu {
    pub(super) fn new(device: Device) -> Result<Self> {
        let events = (0..EVENTS).map(|_| Ok(Arc::new(device.event()?))).collect::<Result<_>>()?;
        Ok(Self { device, events: Mutex::new(events), gate: OnceLock::new() })
    }

    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    pub(super) fn registered(&self, gate: Option<ReadGate>) {
        if let Some(gate) = gate {
            // Memory is registered once.
            let _ = self.gate.set(gate);
        }
    }

    /// An event behind all that is in the stream now.
    ///
    /// # Errors
    /// `Device`: the stream is being captured, or the driver refuses. `PoolFull`: thousands are waited for.
    pub(super) fn record(&self, stream: &EngineStream) -> Result<Arc<Event>> {
        let event = self.take()?;
        stream.record(&event)?;
        Ok(event)
    }

    fn take(&self) -> Result<Arc<Event>> {
        let mut events = self.events.lock();
        let count = events.len();
        // Whoever waits for them ends in the order in which they were taken, nearly.
        if let Some(mut event) = events.pop_front() {
            let free = Arc::get_mut(&mut event).is_some();
            events.push_back(Arc::clone(&event));
            if free {
                return Ok(event);
            }
        }
        if count >= EVENTS_MAX {
            return Err(ErrorKind::PoolFull
                .error(format!("{count} events of the engine's streams are still to come"))
                .retry());
        }
        let event = Arc::new(self.device.event()?);
        events.push_back(Arc::clone(&event));
        Ok(event)
    }

    /// The stream waits for all reads that have begun; none that has not will. The number is to be passed on.
    pub(super) fn reads_done(&self, stream: &EngineStream) -> Result<Option<u64>> {
        let Some(ReadGate { gate, launched }) = self.gate.get() else { return Ok(None) };
        gate.shut(stream, launched).map(Some)
    }
}
