//! Copies between device addresses, with their checksums, on a stream of lowest priority.
//!
//! # A launch
//!
//! Spans wait in a queue; up to [`SLOTS`] launches of them are on the stream, so that the GPU has the next
//! one when it ends one, and no more, so that what comes behind an engine's next event is not stuck behind
//! ours. A launch puts on the stream, in this order: the kernel's table and zeroed sums up; a batch of the
//! long copies; the kernel, which copies the short spans and sums all; the sums down; two events.
//!
//! # What is summed
//!
//! The kernel loads each word of a short span once, stores it and adds it: the sum is of the stored bytes.
//! A long span is copied by the copy engines and read once more by the kernel, after the copy:
//! at its source or at its destination, as [`Summed`] says.
//!
//! # Completion
//!
//! A task is done when a thread saw the launch's event, never because device memory holds some value. That
//! thread sleeps in the driver; the owner is woken and collects by [`Copier::poll`], which never blocks.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvxfer_core::{Error, ErrorKind, Result};
use parking_lot::Mutex;

use super::calibrate;
use super::kernels::Kernels;
use super::queue::Queue;
use super::slots::Slot;
use super::table::{Limits, SLICE};
use super::waiter::{Observed, Waiter};
use crate::driver::{CudaError, Device, DevicePtr, EngineStream, Event, Priority, Stream};
use crate::planted::{Bug, planted};

/// Launches under way at most.
const SLOTS: usize = 4;
/// The most bytes of one launch: the kernel counts its tiles in 32 bits.
const LAUNCH_BYTES: u64 = 1 << 30;
/// How long an engine's thread waits for a launch to be made.
const LAUNCH: Duration = Duration::from_secs(10);

/// One contiguous copy on the GPU, or one sum.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// Where the bytes are.
    pub src: DevicePtr,
    /// Where they go to, not overlapping any source or destination under way. `None`: they are summed only.
    pub dst: Option<DevicePtr>,
    /// Bytes.
    pub len: u64,
    /// [`kvxfer_core::sum::word_key`] of the first word.
    pub key: u64,
}

/// The end of a task.
#[derive(Debug)]
pub struct Done {
    /// The number it was submitted with.
    pub task: u64,
    /// The sums of its spans, added; or why they are not all copied. Either way nothing of it is under way
    /// any more, unless the device [is broken](Copier::is_broken).
    pub result: Result<u64>,
}

/// Where a span that the kernel does not copy is summed, after its copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Summed {
    /// At its source: for memory of a peer, which is slow to read. If the source changed in between, the sum
    /// does not fit what was stored, which whoever reads that finds out.
    Source,
    /// At its destination: for memory that only this process writes to. So the sum is of what will be used,
    /// whatever is written to the source meanwhile.
    Destination,
}

/// What a copier is to keep to.
#[derive(Clone, Copy, Debug)]
pub struct CopierConfig {
    /// Shorter spans, in bytes, are copied by the kernel, others by the copy engines. `None`: measured at
    /// the start.
    pub kernel_below: Option<u64>,
    /// Multiprocessors that the kernel may take.
    pub sms: u32,
    /// Bytes on the stream at most; 256 KiB at least.
    pub outstanding: u64,
    /// What is summed.
    pub summed: Summed,
    /// How long a start waits for a copy that it measures, and a drop for what is under way.
    pub patience: Duration,
}

impl Default for CopierConfig {
    fn default() -> Self {
        Self {
            kernel_below: None,
            sms: 16,
            outstanding: 64 << 20,
            summed: Summed::Source,
            patience: Duration::from_secs(10),
        }
    }
}

/// Where an engine's thread, which is about to write to memory that copies read, meets the copier's owner:
/// between the two a copy is either started, and waited for by the engine's stream, or not, and then never.
#[derive(Debug, Default)]
pub struct Gate {
    /// How often it was shut. Held while copies are started.
    shut: Mutex<u64>,
}

impl Gate {
    /// Makes a stream wait for all that `launched` lies behind, and lets nothing start that is submitted
    /// until now; [`Copier::void`] is to be called with the number that is returned. Waits for no copy.
    ///
    /// # Errors
    /// `Device`: the stream is captured, or the driver refuses. `Timeout`: the owner hangs in the driver. Nothing is
    /// shut then.
    pub fn shut(&self, stream: &EngineStream, launched: &Event) -> Result<u64> {
        // Held over calls of the driver, which have no deadline.
        let mut shut = self.shut.try_lock_for(LAUNCH).ok_or_else(|| {
            ErrorKind::Timeout.error(format!("copies are being started for {LAUNCH:?}"))
        })?;
        stream.wait(launched)?;
        *shut += 1;
        Ok(*shut)
    }
}

/// Copies on one GPU, asynchronous and summed. Owned by one thread, which no call but
/// [`Copier::drain`] and the drop blocks. That thread [binds](Device::bind) itself to the device, or a graph
/// that the engine captures meanwhile is spoilt.
///
/// Spans are copied in no order among themselves; tasks end in the order in which they were submitted.
///
/// # Drop
/// Waits for what is under way, and gives up what is not: for its [patience](CopierConfig::patience), or not at all
/// after a [`Copier::drain`] that took too long. What does not end in time keeps all that it may still use of the copier's own: that is
/// never freed. Whoever owns the memory that is copied drains first, and keeps it as well.
#[derive(Debug)]
pub struct Copier {
    stream: Arc<Stream>,
    kernels: Arc<Kernels>,
    slots: Vec<Slot>,
    /// The slot of the oldest launch under way, and how many there are: they end in order.
    oldest: usize,
    under_way: usize,
    launched: Arc<Event>,
    queue: Queue<Event>,
    waiter: Waiter,
    sms: u32,
    kernel_below: u64,
    broken: Option<CudaError>,
    gate: Arc<Gate>,
    /// How often the gate was shut as far as we know.
    shut: u64,
    /// None is left once what is under way was waited for in vain.
    patience: Duration,
    /// The end of a launch could not be observed.
    untracked: bool,
}

impl Copier {
    /// Prepares all that copies need. Blocks for the time of the calibration, if it is to be done: some
    /// tens of milliseconds, a second at most, and for the patience more where a copy does not end.
    ///
    /// `wake` is called by a thread of the copier when [`Copier::poll`] has something to do. It must not
    /// wait for the owner.
    ///
    /// # Errors
    /// `Device`: memory or a stream can't be had, or the kernel does not load. `Io`: no thread. `Timeout`: the GPU
    /// does not end a copy; what that may use is never freed.
    pub fn new(
        device: &Device,
        config: CopierConfig,
        wake: impl Fn() + Send + 'static,
    ) -> Result<Self> {
        let stream = Arc::new(device.stream(Priority::Lowest)?);
        let bytes = (config.outstanding / SLOTS as u64).clamp(SLICE, LAUNCH_BYTES);
        let kernel_below = config.kernel_below.unwrap_or(0);
        let limits = Limits { kernel_below, summed: config.summed, bytes };
        let slots = (0..SLOTS).map(|_| Ok(Slot::new(device, limits)?));
        let mut copier = Self {
            slots: slots.collect::<Result<_>>()?,
            oldest: 0,
            under_way: 0,
            launched: Arc::new(device.event()?),
            queue: Queue::new(),
            kernels: Arc::new(Kernels::load(device)?),
            waiter: Waiter::start(Arc::clone(&stream), SLOTS, wake)?,
            sms: config.sms,
            kernel_below,
            broken: None,
            gate: Arc::default(),
            shut: 0,
            patience: config.patience,
            untracked: false,
            stream,
        };
        if config.kernel_below.is_none() {
            let below = calibrate::kernel_below(device, |below, spans| copier.run(below, spans))?;
            copier.route(below);
        }
        Ok(copier)
    }

    /// What is submitted from now on is copied after this event, as it was recorded last. It is not to be
    /// recorded again for something else before the next submission has ended.
    ///
    /// # Errors
    /// The device is broken.
    pub fn wait_for(&mut self, event: &Arc<Event>) -> Result<()> {
        self.check()?;
        if !planted(Bug::EngineEventIgnored) {
            self.queue.wait_for(event);
        }
        Ok(())
    }

    /// Takes a task, which ends in exactly one [`Done`]. [`Copier::poll`] starts it.
    ///
    /// # Errors
    /// `PoolFull`, retryable: too much is queued. `Device`: the device is broken. Nothing of the task was
    /// taken then.
    pub fn submit(&mut self, task: u64, spans: &[Span]) -> Result<()> {
        self.check()?;
        self.queue.push(task, spans)
    }

    /// Starts what can be started, and appends what ended to `out`.
    pub fn poll(&mut self, out: &mut Vec<Done>) {
        while self.under_way > 0
            && let Some(observed) = self.waiter.next()
        {
            self.settle(observed);
        }
        while self.under_way < SLOTS && self.launch() {}
        if let Some(error) = &self.broken {
            self.queue.give_up(&error.clone().into());
        }
        self.queue.end(out);
    }

    /// Tasks submitted and not yet ended.
    pub fn pending(&self) -> usize {
        self.queue.len()
    }

    /// An event behind all that was started by now. A stream that waits for it before it writes to
    /// memory does not disturb the copies that read that memory, as far as they were started: those that
    /// were only submitted have to end first.
    pub fn launched(&self) -> &Arc<Event> {
        &self.launched
    }

    /// The gate of this copier, for the engine's threads.
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// What was submitted and not started is given up: its memory is to be written to again. `shut` is the
    /// number that [`Gate::shut`] returned; nothing is started from then on until this is called.
    pub fn void(&mut self, shut: u64) {
        self.shut = shut;
        self.give_up(&ErrorKind::Closed.error("the engine uses the memory for something else"));
    }

    /// What was submitted and not started ends with that error.
    pub fn give_up(&mut self, error: &Error) {
        self.queue.give_up(error);
    }

    /// Spans of so many bytes and more go to the copy engines.
    pub fn kernel_below(&self) -> u64 {
        self.kernel_below
    }

    /// Why nothing can be copied any more: the driver reported that the device failed, or the copier lost
    /// track of it. What is pending ends with this error.
    ///
    /// If the error is the device's own, the driver stopped all that ran there. Other processes should all
    /// the same take this process's death, not its word, as a fence.
    pub fn is_broken(&self) -> Option<Error> {
        self.broken.clone().map(Error::from)
    }

    /// How long a drop waits: whoever owns this one and drops it first drains it for as long.
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// Gives up what was not started, and waits for what was. The next [`Copier::poll`] tells how each task
    /// ended.
    ///
    /// # Errors
    /// `Timeout`, or `Device` when the driver could not tell how copies ended: they may still run. What they
    /// read and write must stay allocated, for good. That a device failed is no error here: nothing runs there.
    pub fn drain(&mut self, limit: Duration) -> Result<()> {
        self.queue.give_up(&ErrorKind::Closed.error("the copies were given up"));
        let deadline = Instant::now() + limit;
        while self.under_way > 0 {
            self.settle_next(deadline)?;
        }
        if self.untracked { self.check() } else { Ok(()) }
    }

    fn check(&self) -> Result<()> {
        self.is_broken().map_or(Ok(()), Err)
    }

    fn route(&mut self, kernel_below: u64) {
        self.kernel_below = kernel_below;
        self.slots.iter_mut().for_each(|slot| slot.table.route(kernel_below));
    }

    /// Copies and waits for the end, while nothing else is under way.
    fn run(&mut self, kernel_below: u64, spans: &[Span]) -> Result<()> {
        self.route(kernel_below);
        self.submit(0, spans)?;
        let deadline = Instant::now() + self.patience;
        let mut done = Vec::new();
        loop {
            self.poll(&mut done);
            if let Some(done) = done.pop() {
                return done.result.map(drop);
            }
            self.settle_next(deadline)?;
        }
    }

    /// Puts the next spans on the stream. Whether there were any.
    fn launch(&mut self) -> bool {
        let gate = Arc::clone(&self.gate);
        let shut = gate.shut.lock();
        if self.broken.is_some() || *shut != self.shut {
            return false;
        }
        while let Some(event) = self.queue.wait() {
            if let Err(error) = self.stream.wait(&event) {
                // What comes now must not run without it.
                self.fail(error);
                return false;
            }
        }
        let at = (self.oldest + self.under_way) % SLOTS;
        let Some(slot) = self.slots.get_mut(at) else { return false };
        slot.table.clear();
        if !self.queue.take(&mut slot.table) {
            return false;
        }
        slot.failed = slot.launch(&self.stream, &self.kernels, self.sms).err();
        if !planted(Bug::ReadEventMissing)
            && let Err(error) = self.stream.record(&self.launched)
        {
            // Without it the engine may overwrite what is read: nobody is to rely on these copies.
            slot.failed = Some(error);
        }
        let recorded = self.stream.record(&slot.done).is_ok();
        self.waiter.watch(recorded.then(|| Arc::clone(&slot.done)));
        self.under_way += 1;
        if let Some(error) = slot.failed.clone().filter(CudaError::is_sticky) {
            self.fail(error);
        }
        true
    }

    fn settle_next(&mut self, deadline: Instant) -> Result<()> {
        let Some(observed) = self.waiter.next_until(deadline) else {
            self.patience = Duration::ZERO;
            return Err(ErrorKind::Timeout
                .error(format!("{} launches of copies do not end", self.under_way)));
        };
        self.settle(observed);
        Ok(())
    }

    /// The oldest launch is over.
    fn settle(&mut self, observed: Observed) {
        let Some(slot) = self.slots.get_mut(self.oldest) else { return };
        let tasks = slot.table.tasks();
        let result = match (slot.failed.take(), &observed) {
            (None, Ok(())) => slot.read_sums(),
            (Some(error), _) => Err(error),
            (None, Err(error)) => Err(error.clone()),
        };
        match result {
            Ok(sums) => self.queue.settle(tasks, Ok(sums)),
            Err(error) => self.queue.settle(tasks, Err(error.into())),
        }
        self.oldest = (self.oldest + 1) % SLOTS;
        self.under_way -= 1;
        if let Err(error) = observed {
            // A lost device runs nothing.
            self.untracked |= !error.is_sticky();
            self.fail(error);
        }
    }

    fn fail(&mut self, error: CudaError) {
        if self.broken.is_none() {
            tracing::error!(%error, "the GPU's copies failed for good");
            self.broken = Some(error);
        }
    }
}

impl Drop for Copier {
    fn drop(&mut self) {
        let drained = self.drain(self.patience);
        if self.under_way == 0 {
            self.waiter.stop();
        }
        let Err(error) = drained else { return };
        tracing::error!(%error, "the copies' own memory is never freed: the GPU may use it");
        std::mem::forget((Arc::clone(&self.stream), Arc::clone(&self.kernels)));
        std::mem::forget((Arc::clone(&self.launched), std::mem::take(&mut self.slots)));
    }
}
