//! What streams run.

use std::ffi::c_void;
use std::fmt;

use super::adversary::Adversary;
use super::copies::{Copies, Fill};
use super::launch::Launch;
use super::race::Touched;
use crate::abi::{Code, Result};
use crate::memory::{self, Stamp};
use crate::state::Gpu;

pub(super) enum Work {
    /// Events and waits: what they come behind is all there is to them.
    Nothing,
    Copies(Copies),
    Fill(Fill),
    Write(Value),
    /// Until memory has that value.
    Await(Value),
    Host(HostCall),
    /// Something of our own, in the stream's order.
    Job(Job),
    Launch(Launch),
    /// What a fault made of it.
    Fails(Code),
    /// It never ends.
    Hangs,
}

/// Work of our own.
pub(crate) type Job = Box<dyn FnOnce() -> Result + Send>;

impl fmt::Debug for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nothing => "a wait or an event",
            Self::Copies(_) => "a copy",
            Self::Fill(_) => "a fill",
            Self::Write(_) => "a write of a value",
            Self::Await(_) => "a wait for a value",
            Self::Host(_) => "a host function",
            Self::Job(_) => "a stream-ordered call",
            Self::Launch(_) => "a kernel",
            Self::Fails(_) => "a failure on order",
            Self::Hangs => "a copy that never ends, on order",
        })
    }
}

impl Work {
    /// Runs some of it. True: that was the last of it.
    pub(super) fn step(&mut self, gpu: Gpu, since: Stamp, lots: &mut Adversary) -> Result<bool> {
        match self {
            // What it waits for was there when it was chosen, or can't be looked at.
            Self::Nothing => {}
            Self::Await(value) => drop(value.is_there(gpu, since)?),
            Self::Copies(copies) => return copies.step(since, lots),
            Self::Fill(fill) => return fill.step(since),
            Self::Write(value) => value.write(gpu, since)?,
            Self::Host(call) => call.run(),
            Self::Job(_) => {
                if let Self::Job(job) = std::mem::replace(self, Self::Nothing) {
                    job()?;
                }
            }
            Self::Launch(launch) => launch.run(gpu, since)?,
            Self::Fails(code) => return Err(*code),
            Self::Hangs => return Ok(false),
        }
        Ok(true)
    }

    /// What it touched, now that it has run. Values are how streams synchronise: not counted.
    pub(super) fn touched(&self) -> Touched {
        match self {
            Self::Copies(copies) => copies.touched(),
            Self::Fill(fill) => fill.touched(),
            Self::Launch(launch) => launch.touched(),
            _ => Touched::default(),
        }
    }
}

/// When a wait for a value is over: low bits of the flags of `cuStreamWaitValue`.
#[derive(Clone, Copy, Debug)]
pub(super) enum Until {
    Reached,
    Equal,
    And,
    Nor,
}

/// A value of 4 or 8 bytes in memory, to be written or waited for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Value {
    pub(super) address: u64,
    pub(super) value: u64,
    pub(super) wide: bool,
    pub(super) until: Until,
}

impl Value {
    fn len(&self) -> u64 {
        if self.wide { 8 } else { 4 }
    }

    pub(super) fn write(&self, gpu: Gpu, since: Stamp) -> Result {
        let at = memory::resolve(self.address, self.len(), true, gpu, since)?;
        // SAFETY: good for that many bytes for ever (`resolve`), and aligned: checked at submission.
        unsafe {
            if self.wide {
                at.cast::<u64>().write_volatile(self.value);
            } else {
                at.cast::<u32>().write_volatile(self.value as u32);
            }
        }
        Ok(())
    }

    pub(super) fn is_there(&self, gpu: Gpu, since: Stamp) -> Result<bool> {
        let at = memory::resolve(self.address, self.len(), false, gpu, since)?;
        // SAFETY: as in `write`.
        let found = unsafe {
            if self.wide {
                at.cast::<u64>().read_volatile()
            } else {
                u64::from(at.cast::<u32>().read_volatile())
            }
        };
        Ok(match self.until {
            Until::Reached if self.wide => found.wrapping_sub(self.value).cast_signed() >= 0,
            Until::Reached => (found as u32).wrapping_sub(self.value as u32).cast_signed() >= 0,
            Until::Equal => found == self.value,
            Until::And => found & self.value != 0,
            Until::Nor if self.wide => !(found | self.value) != 0,
            Until::Nor => !((found | self.value) as u32) != 0,
        })
    }
}

/// A function of the program, to be called in the stream's order.
#[derive(Clone, Copy, Debug)]
pub(super) struct HostCall {
    pub(super) function: unsafe extern "C" fn(*mut c_void),
    pub(super) data: usize,
}

impl HostCall {
    fn run(&self) {
        IN_CALLBACK.set(true);
        // SAFETY: the caller of `cuLaunchHostFunc` promised that it may be called with this, from any thread.
        unsafe { (self.function)(self.data as *mut c_void) };
        IN_CALLBACK.set(false);
    }
}

thread_local! {
    static IN_CALLBACK: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// # Errors
/// `NOT_PERMITTED` inside a host function: those may not call the driver.
pub(crate) fn permitted() -> Result {
    if IN_CALLBACK.get() { Err(Code::NOT_PERMITTED) } else { Ok(()) }
}
