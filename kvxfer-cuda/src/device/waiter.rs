//! The thread that waits for a GPU, so that no other has to.
//!
//! It sleeps in the driver: no spinning on queries, and no host callback, in which nothing of CUDA may be
//! called. One launch after the other, in the order in which they were made.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use kvxfer_core::{ErrorKind, Result};

use crate::driver::{Buffer, CudaError, Device, Event, Priority, Stream};
use crate::planted::{Bug, planted};

#[derive(Debug)]
pub(super) struct Waiter {
    /// Taken to stop the thread.
    jobs: Option<Sender<Job>>,
    results: Receiver<Observed>,
    thread: Option<JoinHandle<()>>,
}

/// What became of a launch: an error leaves open whether it ended.
pub(super) type Observed = std::result::Result<(), CudaError>;

/// A launch to wait for, by the event recorded behind it; without one by all that was put on the stream.
#[derive(Debug)]
struct Job(Option<Arc<Event>>);

impl Waiter {
    /// `launches`: how many are under way at most. `wake` is called after each.
    pub(super) fn start(
        stream: Arc<Stream>,
        launches: usize,
        wake: impl Fn() + Send + 'static,
    ) -> Result<Self> {
        let (jobs, todo) = bounded::<Job>(launches);
        let (done, results) = bounded(launches);
        let thread = thread::Builder::new().name("kvxfer-copies".into()).spawn(move || {
            // What fails here fails in each wait as well.
            let _ = stream.device().bind();
            for Job(event) in todo {
                let observed = wait(&stream, event.as_deref());
                drop(event);
                if done.send(observed).is_err() {
                    return;
                }
                // The thread is needed, whatever becomes of its owner.
                if catch_unwind(AssertUnwindSafe(&wake)).is_err() {
                    tracing::error!("the wake-up of who collects copies panicked");
                }
            }
        });
        let thread = thread.map_err(|error| {
            ErrorKind::Io.error(format!("no thread to wait for the GPU: {error}"))
        })?;
        Ok(Self { jobs: Some(jobs), results, thread: Some(thread) })
    }

    /// Waits for one more launch. Never blocks as long as no more are under way than was said.
    pub(super) fn watch(&self, event: Option<Arc<Event>>) {
        if let Some(jobs) = &self.jobs {
            // The thread ends only when this end of the channel does.
            let _ = jobs.send(Job(event));
        }
    }

    /// The next launch that is over.
    pub(super) fn next(&self) -> Option<Observed> {
        self.results.try_recv().ok()
    }

    /// The same, or nothing when the time is up or the thread is gone.
    pub(super) fn next_until(&self, deadline: Instant) -> Option<Observed> {
        self.results.recv_deadline(deadline).ok()
    }

    /// Ends the thread, which has nothing left to wait for.
    pub(super) fn stop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that waits for the GPU panicked");
        }
    }
}

/// Waits until all work in a stream has ended: for what is done once.
///
/// # Errors
/// `Timeout`; `Device`: the driver's, also for work that failed. What the work uses is to stay, for good.
pub(crate) fn finish(stream: Stream, patience: Duration) -> Result<()> {
    let stream = Arc::new(stream);
    let end = Arc::new(stream.device().event()?);
    stream.record(&end)?;
    let mut waiter = Waiter::start(stream, 1, || ())?;
    waiter.watch(Some(end));
    let ended = waiter.next_until(Instant::now() + patience).ok_or_else(|| {
        ErrorKind::Timeout
            .error(format!("a GPU did not end its work within {patience:?}"))
            .fix("look for what occupies it (nvidia-smi), and for errors of the driver (dmesg)")
    })?;
    waiter.stop();
    Ok(ended?)
}

/// Those bytes in memory of a GPU.
///
/// # Errors
/// `Timeout`, or `Device`; memory to which a copy may still come is never freed.
pub fn upload(device: &Device, bytes: &[u8], patience: Duration) -> Result<Buffer> {
    let len = bytes.len() as u64;
    let (buffer, pinned) = (device.buffer(len)?, device.pinned(len)?);
    pinned.write(0, bytes)?;
    let stream = device.stream(Priority::Default)?;
    stream.upload(buffer.ptr(), &pinned, 0, len)?;
    match finish(stream, patience) {
        Ok(()) => Ok(buffer),
        Err(error) => {
            std::mem::forget(buffer);
            Err(error)
        }
    }
}

fn wait(stream: &Stream, event: Option<&Event>) -> Observed {
    if planted(Bug::DoneBeforeCompletion) {
        return Ok(());
    }
    match event.map(Event::wait) {
        Some(Ok(())) => Ok(()),
        // Longer, but as good: an error of the event alone says nothing about the stream.
        Some(Err(_)) | None => stream.synchronize(),
    }
}
