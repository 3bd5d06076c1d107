//! Entry points for events.

use super::clock::Ticket;
use super::queue::{Event, Queues};
use super::run::{wait, with};
use super::streams::{stream_for_work, stream_of};
use super::work::Work;
use crate::abi::{Code, Out, Result};
use crate::report::{Counted, Live};
use crate::state::{self, Gpu};

/// `CU_EVENT_DISABLE_TIMING`. Bit 0 is `CU_EVENT_BLOCKING_SYNC`: all waiting here blocks.
const NO_TIMING: u32 = 2;
const FLAGS: u32 = 3;

fn event_of(queues: &Queues, event: u64) -> Result<&Event> {
    queues.events.get(&event).ok_or(Code::INVALID_HANDLE)
}

/// What the event was last recorded behind, for calls that ask whether it is done.
fn recorded(event: u64) -> Result<(Gpu, Option<Ticket>)> {
    state::current()?;
    with(|queues| {
        let own = event_of(queues, event)?;
        if own.captured.is_some() {
            return Err(Code::CAPTURED_EVENT);
        }
        let found = (own.gpu, own.recorded.clone());
        queues.may_wait()?;
        Ok(found)
    })
}

fn record(event: u64, stream: u64) -> Result {
    let gpu = state::current()?;
    with(|queues| {
        let stream = stream_for_work(queues, gpu, stream)?;
        if event_of(queues, event)?.gpu != gpu {
            return Err(Code::INVALID_HANDLE);
        }
        let captured = if queues.captures(stream)? { queues.captured(stream) } else { None };
        let recorded = match captured {
            Some(_) => None,
            None => Some(queues.submit(stream, Work::Nothing, Vec::new())),
        };
        if let Some(own) = queues.events.get_mut(&event) {
            own.captured = captured;
            own.recorded = recorded;
        }
        Ok(())
    })
}

entries! {
    fn cuEventCreate(out: Out<u64>, flags: u32) {
        let gpu = state::current()?;
        if flags & !FLAGS != 0 || out.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        let timing = flags & NO_TIMING == 0;
        let event = Event { gpu, timing, recorded: None, captured: None, _counted: Counted::new(Live::Events) };
        out.put(with(|queues| {
            let handle = queues.handle();
            queues.events.insert(handle, event);
            handle
        }))
    }

    fn cuEventDestroy_v2(event: u64) {
        state::current()?;
        with(|queues| queues.events.remove(&event)).map(|_| ()).ok_or(Code::INVALID_HANDLE)
    }

    fn cuEventRecord(event: u64, stream: u64) {
        record(event, stream)
    }

    fn cuEventRecordWithFlags(event: u64, stream: u64, flags: u32) {
        if flags == 0 { record(event, stream) } else { Err(Code::NOT_SUPPORTED) }
    }

    /// An event that was never recorded is done.
    fn cuEventQuery(event: u64) {
        let (gpu, recorded) = recorded(event)?;
        let done = recorded.is_none_or(|ticket| with(|queues| queues.ask(&ticket)));
        state::check(gpu)?;
        if done { Ok(()) } else { Err(Code::NOT_READY) }
    }

    fn cuEventSynchronize(event: u64) {
        match recorded(event)? {
            (gpu, Some(ticket)) => wait(&ticket, gpu),
            (gpu, None) => state::check(gpu),
        }
    }

    /// The stand-in knows no times: it is always 0.
    fn cuEventElapsedTime(milliseconds: Out<f32>, start: u64, end: u64) {
        for event in [start, end] {
            let (_, recorded) = recorded(event)?;
            with(|queues| {
                let ticket = recorded.filter(|_| event_of(queues, event).is_ok_and(|own| own.timing));
                let ticket = ticket.ok_or(Code::INVALID_HANDLE)?;
                if queues.is_done(&ticket) { Ok(()) } else { Err(Code::NOT_READY) }
            })?;
        }
        milliseconds.put(0.0)
    }

    /// Waits for what the event was last recorded behind by now; for nothing if it never was.
    fn cuStreamWaitEvent(stream: u64, event: u64, flags: u32) {
        let gpu = state::current()?;
        if flags != 0 {
            return Err(Code::INVALID_VALUE);
        }
        with(|queues| {
            let stream = stream_of(queues, gpu, stream)?;
            let (captured, recorded) = {
                let own = event_of(queues, event)?;
                (own.captured, own.recorded.clone())
            };
            if let Some(captured) = captured {
                return queues.draw_in(stream, captured);
            }
            if queues.captures(stream)? {
                // Work outside the capture can't be waited for in a graph.
                return if recorded.is_some() { Err(Code::STREAM_CAPTURE_ISOLATION) } else { Ok(()) };
            }
            if let Some(ticket) = recorded {
                queues.submit(stream, Work::Nothing, vec![ticket]);
            }
            Ok(())
        })
    }
}
