//! Stream capture: enough of it for a program to see that it must keep out.
//!
//! What is submitted to a capturing stream is not run, ever: there are no graphs here.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::thread::ThreadId;

use super::clock::StreamId;
use super::queue::Queues;
use super::run::with;
use super::streams::stream_of;
use crate::abi::{Code, InOut, Out, Result};
use crate::state;

/// How far a capture forbids what might wait for the captured stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// In all threads.
    Global = 0,
    /// In the thread that began it.
    Thread = 1,
    Relaxed = 2,
}

impl Mode {
    fn of(number: i32) -> Result<Self> {
        match number {
            0 => Ok(Self::Global),
            1 => Ok(Self::Thread),
            2 => Ok(Self::Relaxed),
            _ => Err(Code::INVALID_VALUE),
        }
    }
}

thread_local! {
    /// What this thread lets itself be forbidden.
    static MODE: Cell<Mode> = const { Cell::new(Mode::Global) };
}

#[derive(Debug)]
struct Capture {
    origin: StreamId,
    mode: Mode,
    thread: ThreadId,
    invalid: bool,
    /// Streams that were drawn in, and how much they captured since somebody waited for them.
    drawn_in: BTreeMap<StreamId, u64>,
}

/// An event that was recorded in a capture: where.
#[derive(Clone, Copy, Debug)]
pub(super) struct Captured {
    capture: u64,
    stream: StreamId,
}

#[derive(Debug)]
pub(super) struct Captures {
    active: BTreeMap<u64, Capture>,
    last: u64,
}

impl Captures {
    pub(super) const fn new() -> Self {
        Self { active: BTreeMap::new(), last: 0 }
    }

    /// A stream is destroyed while it captures: the capture is broken, or over if it began there.
    pub(super) fn leave(&mut self, id: u64, stream: StreamId) {
        self.invalidate(id);
        self.active.retain(|_, capture| capture.origin != stream);
    }

    fn invalidate(&mut self, id: u64) {
        if let Some(capture) = self.active.get_mut(&id) {
            capture.invalid = true;
        }
    }
}

impl Queues {
    fn capture_of(&self, stream: StreamId) -> Option<u64> {
        self.streams.get(&stream)?.capture
    }

    /// Whether work for this stream is to be captured instead of run.
    ///
    /// # Errors
    /// `STREAM_CAPTURE_INVALIDATED` in a broken capture; `STREAM_CAPTURE_IMPLICIT` for the NULL stream
    /// while a stream that it waits for is capturing.
    pub(super) fn captures(&mut self, stream: StreamId) -> Result<bool> {
        if self.is_null(stream) {
            return self.null_may_run(stream).map(|()| false);
        }
        let Some(id) = self.capture_of(stream) else { return Ok(false) };
        let Some(capture) = self.captures.active.get_mut(&id) else { return Ok(false) };
        if capture.invalid {
            return Err(Code::STREAM_CAPTURE_INVALIDATED);
        }
        if let Some(unseen) = capture.drawn_in.get_mut(&stream) {
            *unseen += 1;
        }
        Ok(true)
    }

    fn null_may_run(&mut self, null: StreamId) -> Result {
        let gpu = self.streams.get(&null).map(|stream| stream.gpu);
        let waits_for =
            self.streams.values().find(|s| Some(s.gpu) == gpu && s.blocking && s.capture.is_some());
        let Some(capture) = waits_for.and_then(|stream| stream.capture) else { return Ok(()) };
        self.captures.invalidate(capture);
        Err(Code::STREAM_CAPTURE_IMPLICIT)
    }

    /// Asked by calls that look at a stream's state or wait for it.
    ///
    /// # Errors
    /// `STREAM_CAPTURE_UNSUPPORTED` while it is capturing; the capture is broken.
    pub(super) fn may_look_at(&mut self, stream: StreamId) -> Result {
        if self.captures(stream)? {
            if let Some(capture) = self.capture_of(stream) {
                self.captures.invalidate(capture);
            }
            return Err(Code::STREAM_CAPTURE_UNSUPPORTED);
        }
        Ok(())
    }

    /// Asked by calls that may wait for everything, as far as their caller knows.
    ///
    /// # Errors
    /// `STREAM_CAPTURE_UNSUPPORTED` while a capture forbids it, which is broken by that.
    pub(super) fn may_wait(&mut self) -> Result {
        let own = std::thread::current().id();
        let forbids = |capture: &&mut Capture| match (MODE.get(), capture.mode) {
            (Mode::Relaxed, _) | (_, Mode::Relaxed) => false,
            (Mode::Global, Mode::Global) => true,
            _ => capture.thread == own,
        };
        let mut refused = Ok(());
        for capture in self.captures.active.values_mut().filter(forbids) {
            capture.invalid = true;
            refused = Err(Code::STREAM_CAPTURE_UNSUPPORTED);
        }
        refused
    }

    /// An event recorded in a capturing stream.
    pub(super) fn captured(&self, stream: StreamId) -> Option<Captured> {
        self.capture_of(stream).map(|capture| Captured { capture, stream })
    }

    /// `stream` waits for an event that was recorded in a capture, and so takes part in it.
    ///
    /// # Errors
    /// `STREAM_CAPTURE_MERGE` when it takes part in another one, `STREAM_CAPTURE_IMPLICIT` for the NULL
    /// stream, `INVALID_VALUE` when the capture is over.
    pub(super) fn draw_in(&mut self, stream: StreamId, event: Captured) -> Result {
        if self.is_null(stream) {
            self.captures.invalidate(event.capture);
            return Err(Code::STREAM_CAPTURE_IMPLICIT);
        }
        let capture = self.captures.active.get_mut(&event.capture).ok_or(Code::INVALID_VALUE)?;
        let own = self.streams.get_mut(&stream).ok_or(Code::INVALID_HANDLE)?;
        if own.capture.is_some_and(|other| other != event.capture) {
            capture.invalid = true;
            return Err(Code::STREAM_CAPTURE_MERGE);
        }
        if capture.invalid {
            return Err(Code::STREAM_CAPTURE_INVALIDATED);
        }
        own.capture = Some(event.capture);
        if let Some(unseen) = capture.drawn_in.get_mut(&event.stream) {
            *unseen = 0;
        }
        if stream != capture.origin {
            // Joined only when somebody waits for it again.
            *capture.drawn_in.entry(stream).or_default() += 1;
        }
        Ok(())
    }

    fn begin_capture(&mut self, stream: StreamId, mode: Mode) -> Result {
        if self.is_null(stream) {
            return Err(Code::STREAM_CAPTURE_UNSUPPORTED);
        }
        let own = self.streams.get_mut(&stream).ok_or(Code::INVALID_HANDLE)?;
        if own.capture.is_some() {
            return Err(Code::ILLEGAL_STATE);
        }
        self.captures.last += 1;
        own.capture = Some(self.captures.last);
        let thread = std::thread::current().id();
        let capture =
            Capture { origin: stream, mode, thread, invalid: false, drawn_in: BTreeMap::new() };
        self.captures.active.insert(self.captures.last, capture);
        Ok(())
    }

    fn end_capture(&mut self, stream: StreamId) -> Result {
        let id = self.capture_of(stream).ok_or(Code::ILLEGAL_STATE)?;
        let capture = self.captures.active.get(&id).ok_or(Code::ILLEGAL_STATE)?;
        if capture.origin != stream {
            return Err(Code::STREAM_CAPTURE_UNMATCHED);
        }
        if capture.mode != Mode::Relaxed && capture.thread != std::thread::current().id() {
            return Err(Code::STREAM_CAPTURE_WRONG_THREAD);
        }
        let result = if capture.invalid {
            Err(Code::STREAM_CAPTURE_INVALIDATED)
        } else if capture.drawn_in.values().any(|unseen| *unseen > 0) {
            Err(Code::STREAM_CAPTURE_UNJOINED)
        } else {
            Ok(())
        };
        self.captures.active.remove(&id);
        for stream in self.streams.values_mut().filter(|stream| stream.capture == Some(id)) {
            stream.capture = None;
        }
        result
    }

    /// 0: not capturing, 1: capturing, 2: in a broken capture.
    fn capture_status(&mut self, stream: StreamId) -> Result<i32> {
        if self.is_null(stream) {
            return self.null_may_run(stream).map(|()| 0);
        }
        let capture = self.capture_of(stream).and_then(|id| self.captures.active.get(&id));
        Ok(capture.map_or(0, |capture| if capture.invalid { 2 } else { 1 }))
    }
}

/// For calls elsewhere that may wait for everything, like those that allocate.
///
/// # Errors
/// As [`Queues::may_wait`].
pub(crate) fn may_wait() -> Result {
    with(Queues::may_wait)
}

entries! {
    fn cuStreamBeginCapture_v2(stream: u64, mode: i32) {
        let (gpu, mode) = (state::current()?, Mode::of(mode)?);
        with(|queues| {
            let stream = stream_of(queues, gpu, stream)?;
            queues.begin_capture(stream, mode)
        })
    }

    /// The graph that it answers is a number.
    fn cuStreamEndCapture(stream: u64, graph: Out<u64>) {
        let gpu = state::current()?;
        let id = with(|queues| {
            let stream = stream_of(queues, gpu, stream)?;
            queues.end_capture(stream).map(|()| queues.handle())
        });
        graph.put(*id.as_ref().unwrap_or(&0))?;
        id.map(|_| ())
    }

    fn cuGraphDestroy(graph: u64) {
        if graph == 0 { Err(Code::INVALID_VALUE) } else { Ok(()) }
    }

    fn cuStreamIsCapturing(stream: u64, status: Out<i32>) {
        let gpu = state::current()?;
        status.put(with(|queues| {
            let stream = stream_of(queues, gpu, stream)?;
            queues.capture_status(stream)
        })?)
    }

    fn cuThreadExchangeStreamCaptureMode(mode: InOut<i32>) {
        let new = Mode::of(mode.get()?)?;
        mode.put(MODE.replace(new) as i32)
    }
}
