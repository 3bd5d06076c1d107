//! Entry points for streams.

use std::ffi::c_void;

use super::clock::{StreamId, Ticket};
use super::queue::Queues;
use super::run::{wait, with};
use super::work::{HostCall, Job, Work};
use crate::abi::{Code, Out, Result};
use crate::faults;
use crate::state::{self, Gpu};

/// Highest priority: the lowest number. 0 is the lowest one.
const GREATEST: i32 = -5;
/// `CU_STREAM_NON_BLOCKING`: not ordered with the NULL stream.
const NON_BLOCKING: u32 = 1;

/// The stream of a handle: 0 and 1 are the NULL stream of the current device.
///
/// # Errors
/// `NOT_SUPPORTED` for the NULL stream per thread, `INVALID_HANDLE` for what is no stream.
pub(super) fn stream_of(queues: &mut Queues, gpu: Gpu, handle: u64) -> Result<StreamId> {
    match handle {
        0 | 1 => Ok(queues.null(gpu)),
        2 => Err(Code::NOT_SUPPORTED),
        handle => match queues.streams.get(&handle) {
            Some(stream) if !stream.destroyed => Ok(handle),
            _ => Err(Code::INVALID_HANDLE),
        },
    }
}

/// The stream of a handle, which must be one of the current device: for work.
///
/// # Errors
/// Besides those of [`stream_of`], `INVALID_HANDLE` for a stream of another device.
pub(super) fn stream_for_work(queues: &mut Queues, gpu: Gpu, handle: u64) -> Result<StreamId> {
    let stream = stream_of(queues, gpu, handle)?;
    match queues.streams.get(&stream) {
        Some(own) if own.gpu == gpu => Ok(stream),
        _ => Err(Code::INVALID_HANDLE),
    }
}

/// Queues work on a stream of the current device; `None` when it was captured instead.
///
/// # Errors
/// As for [`stream_for_work`], and those of captures.
pub(super) fn enqueue(gpu: Gpu, handle: u64, work: Work) -> Result<Option<Ticket>> {
    let work = match faults::late() {
        None => work,
        Some(Code(0)) => Work::Hangs,
        Some(code) => Work::Fails(code),
    };
    with(|queues| {
        let stream = stream_for_work(queues, gpu, handle)?;
        if queues.captures(stream)? {
            return Ok(None);
        }
        Ok(Some(queues.submit(stream, work, Vec::new())))
    })
}

/// Queues work on the NULL stream and waits for it.
///
/// # Errors
/// As for [`enqueue`], and what comes of the work.
pub(super) fn run_now(gpu: Gpu, work: Work) -> Result {
    with(Queues::may_wait)?;
    match enqueue(gpu, 0, work)? {
        Some(ticket) => wait(&ticket, gpu),
        None => Ok(()),
    }
}

/// Queues something of our own.
///
/// # Errors
/// As for [`enqueue`].
pub(crate) fn enqueue_job(gpu: Gpu, handle: u64, job: Job) -> Result {
    enqueue(gpu, handle, Work::Job(job)).map(|_| ())
}

/// Waits for all work of a device.
///
/// # Errors
/// The device's own, if it is broken.
pub(crate) fn synchronize(gpu: Gpu) -> Result {
    let tails: Vec<Ticket> = with(|queues| {
        let own = queues.streams.values().filter(|stream| stream.gpu == gpu);
        own.map(|stream| stream.tail.clone()).collect()
    });
    tails.iter().try_for_each(|tail| wait(tail, gpu))?;
    state::check(gpu)
}

/// Forgets streams and events of a device whose context is gone, with their work.
pub(crate) fn forget_device(gpu: Gpu) {
    with(|queues| queues.drop_device(gpu));
    super::modules::forget(gpu);
}

fn create(out: &Out<u64>, flags: u32, priority: i32) -> Result {
    let gpu = state::current()?;
    if flags & !NON_BLOCKING != 0 || out.is_null() {
        return Err(Code::INVALID_VALUE);
    }
    let blocking = flags & NON_BLOCKING == 0;
    out.put(with(|queues| queues.open(gpu, blocking, priority.clamp(GREATEST, 0))))
}

/// The last item of a stream, for calls that look at its state.
fn tail(stream: u64) -> Result<(Gpu, Ticket)> {
    let gpu = state::current()?;
    with(|queues| {
        let stream = stream_of(queues, gpu, stream)?;
        queues.may_look_at(stream)?;
        let own = queues.streams.get(&stream).ok_or(Code::INVALID_HANDLE)?;
        Ok((own.gpu, own.tail.clone()))
    })
}

entries! {
    fn cuStreamCreate(out: Out<u64>, flags: u32) {
        create(&out, flags, 0)
    }

    fn cuStreamCreateWithPriority(out: Out<u64>, flags: u32, priority: i32) {
        create(&out, flags, priority)
    }

    fn cuStreamDestroy_v2(stream: u64) {
        let gpu = state::current()?;
        with(|queues| {
            let stream = stream_of(queues, gpu, stream)?;
            if queues.is_null(stream) {
                return Err(Code::INVALID_HANDLE);
            }
            queues.close(stream);
            Ok(())
        })
    }

    fn cuStreamSynchronize(stream: u64) {
        let (gpu, tail) = tail(stream)?;
        wait(&tail, gpu)
    }

    fn cuStreamQuery(stream: u64) {
        let (gpu, tail) = tail(stream)?;
        let done = with(|queues| queues.ask(&tail));
        state::check(gpu)?;
        if done { Ok(()) } else { Err(Code::NOT_READY) }
    }

    fn cuStreamGetPriority(stream: u64, out: Out<i32>) {
        let gpu = state::current()?;
        out.put(with(|queues| {
            let stream = stream_of(queues, gpu, stream)?;
            queues.streams.get(&stream).map(|own| own.priority).ok_or(Code::INVALID_HANDLE)
        })?)
    }

    fn cuStreamGetFlags(stream: u64, out: Out<u32>) {
        let gpu = state::current()?;
        out.put(with(|queues| {
            let stream = stream_of(queues, gpu, stream)?;
            let own = queues.streams.get(&stream).ok_or(Code::INVALID_HANDLE)?;
            Ok(if own.blocking { 0 } else { NON_BLOCKING })
        })?)
    }

    fn cuCtxGetStreamPriorityRange(least: Out<i32>, greatest: Out<i32>) {
        state::current()?;
        if !least.is_null() {
            least.put(0)?;
        }
        if greatest.is_null() { Ok(()) } else { greatest.put(GREATEST) }
    }

    fn cuCtxSynchronize() {
        let gpu = state::current()?;
        with(Queues::may_wait)?;
        synchronize(gpu)
    }

    /// The function runs on the thread that runs everything: while it blocks, no stream moves.
    fn cuLaunchHostFunc(stream: u64, function: Option<unsafe extern "C" fn(*mut c_void)>, data: usize) {
        let gpu = state::current()?;
        let function = function.ok_or(Code::INVALID_VALUE)?;
        enqueue(gpu, stream, Work::Host(HostCall { function, data })).map(|_| ())
    }
}
