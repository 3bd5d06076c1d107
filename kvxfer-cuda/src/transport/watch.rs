//! Which descriptors are ready, and an alarm, behind one descriptor.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use kvxfer_core::{ErrorKind, Result};
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};

/// The token of the alarm. Others are given by the caller.
pub(super) const ALARM: u64 = u64::MAX;

/// Readiness that one look can report; what is left comes out of the next.
const BATCH: usize = 256;

/// What is waited for at a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Interest {
    pub(super) read: bool,
    pub(super) write: bool,
}

/// A socket that can be read or written, or has failed (then all are set).
#[derive(Clone, Copy, Debug)]
pub(super) struct Ready {
    pub(super) token: u64,
    pub(super) write: bool,
    pub(super) broken: bool,
}

/// Level-triggered: what was not dealt with is told again.
#[derive(Debug)]
pub(super) struct Watch {
    epoll: OwnedFd,
    timer: OwnedFd,
    alarm: Option<Instant>,
}

impl Watch {
    pub(super) fn new() -> Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(failed)?;
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags).map_err(failed)?;
        let watch = Self { epoll, timer, alarm: None };
        watch.add(&watch.timer, ALARM, Interest { read: true, write: false })?;
        Ok(watch)
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Until the socket is closed.
    pub(super) fn add(&self, fd: impl AsFd, token: u64, interest: Interest) -> Result<()> {
        epoll::add(&self.epoll, fd, epoll::EventData::new_u64(token), flags(interest))
            .map_err(failed)
    }

    pub(super) fn modify(&self, fd: impl AsFd, token: u64, interest: Interest) -> Result<()> {
        epoll::modify(&self.epoll, fd, epoll::EventData::new_u64(token), flags(interest))
            .map_err(failed)
    }

    /// For what may stay open elsewhere when it is closed here: in a child process, say.
    pub(super) fn remove(&self, fd: impl AsFd) {
        // It fails where there is nothing to remove.
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// Replaces `ready` by what is ready now.
    pub(super) fn look(&self, ready: &mut Vec<Ready>) {
        ready.clear();
        let mut events = [const { MaybeUninit::uninit() }; BATCH];
        // It fails for no reason that the next look would not tell again.
        let Ok((events, _)) = epoll::wait(&self.epoll, &mut events[..], Some(&Timespec::default()))
        else {
            return;
        };
        ready.extend(events.iter().map(|event| {
            let flags = event.flags;
            let broken = flags.intersects(epoll::EventFlags::ERR | epoll::EventFlags::HUP);
            let write = broken || flags.contains(epoll::EventFlags::OUT);
            Ready { token: event.data.u64(), write, broken }
        }));
    }

    /// Has the descriptor readable from then on, until it is set anew.
    pub(super) fn alarm(&mut self, at: Option<Instant>) {
        if self.alarm == at {
            return;
        }
        let mut timer =
            Itimerspec { it_interval: Timespec::default(), it_value: Timespec::default() };
        if let Some(at) = at {
            let left = at.saturating_duration_since(Instant::now());
            // Zero would turn it off.
            timer.it_value = Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: i64::from(left.subsec_nanos()).max(1),
            };
        }
        if timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &timer).is_ok() {
            self.alarm = at;
        }
    }
}

fn flags(interest: Interest) -> epoll::EventFlags {
    let mut flags = epoll::EventFlags::empty();
    flags.set(epoll::EventFlags::IN, interest.read);
    flags.set(epoll::EventFlags::OUT, interest.write);
    flags
}

fn failed(errno: Errno) -> kvxfer_core::Error {
    ErrorKind::Io.error(format!("descriptors can't be watched: {errno}"))
}
