//! Waiting for sockets, and being woken.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use kvxfer_core::Result;
use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use rustix::io::Errno;

use super::failed;

/// The progress thread is busy and will look at its queues before it parks.
const RUNNING: u8 = 0;
/// It sleeps in the kernel, or is about to.
const PARKED: u8 = 1;
/// Somebody has woken it since it last looked.
const NOTIFIED: u8 = 2;

/// The token of the eventfd. Others are given by the caller.
const WAKE: u64 = u64::MAX;

/// Readiness that one wait can report; what is left comes out of the next.
const BATCH: usize = 256;

#[derive(Debug)]
struct Shared {
    state: AtomicU8,
    eventfd: OwnedFd,
}

/// Wakes a thread parked in [`Control::poll`](super::Control::poll). A system call only if it is parked.
///
/// What was enqueued before [`Waker::wake`] is visible to that thread once `poll` has returned.
#[derive(Clone, Debug)]
pub struct Waker(Arc<Shared>);

impl Waker {
    /// Wakes the thread, now or when it next tries to park.
    pub fn wake(&self) {
        if self.0.state.swap(NOTIFIED, Ordering::AcqRel) == PARKED {
            // The counter cannot overflow: one write per park, and each wake-up reads it.
            let _ = rustix::io::write(&self.0.eventfd, &1u64.to_ne_bytes());
        }
    }
}

/// An epoll instance whose tokens are numbers. Level-triggered: what was not drained is told again.
#[derive(Debug)]
pub(super) struct Poller {
    epoll: OwnedFd,
    shared: Arc<Shared>,
}

/// A socket that can be read or written, or has failed (then both are set).
#[derive(Clone, Copy, Debug)]
pub(super) struct Ready {
    pub(super) token: u64,
    pub(super) read: bool,
    pub(super) write: bool,
}

impl Poller {
    pub(super) fn new() -> Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)
            .map_err(|errno| failed("cannot create an epoll instance", errno))?;
        let eventfd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| failed("cannot create an eventfd", errno))?;
        let poller =
            Self { epoll, shared: Arc::new(Shared { state: AtomicU8::new(RUNNING), eventfd }) };
        poller.add(&poller.shared.eventfd, WAKE, false)?;
        Ok(poller)
    }

    pub(super) fn waker(&self) -> Waker {
        Waker(Arc::clone(&self.shared))
    }

    pub(super) fn add(&self, fd: impl AsFd, token: u64, write: bool) -> Result<()> {
        epoll::add(&self.epoll, fd, epoll::EventData::new_u64(token), interest(write))
            .map_err(|errno| failed("cannot watch a socket", errno))
    }

    pub(super) fn modify(&self, fd: impl AsFd, token: u64, write: bool) -> Result<()> {
        epoll::modify(&self.epoll, fd, epoll::EventData::new_u64(token), interest(write))
            .map_err(|errno| failed("cannot watch a socket", errno))
    }

    pub(super) fn remove(&self, fd: impl AsFd) {
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// Waits for at most `timeout` (for ever if there is none) and replaces `ready`. A wake-up that
    /// came since the last wait, or comes during this one, ends it at once.
    pub(super) fn wait(&self, timeout: Option<Duration>, ready: &mut Vec<Ready>) -> Result<()> {
        ready.clear();
        let state = &self.shared.state;
        let park = timeout != Some(Duration::ZERO)
            && state.compare_exchange(RUNNING, PARKED, Ordering::AcqRel, Ordering::Acquire).is_ok();
        let timeout = match (park, timeout) {
            (false, _) => Some(Timespec::default()),
            (true, None) => None,
            // A month is as good as for ever, and fits the kernel's milliseconds.
            (true, Some(timeout)) => {
                Timespec::try_from(timeout.min(Duration::from_secs(20 * 86400))).ok()
            }
        };
        let mut events = [const { MaybeUninit::uninit() }; BATCH];
        let result = epoll::wait(&self.epoll, &mut events[..], timeout.as_ref());
        state.swap(RUNNING, Ordering::AcqRel);
        let events = match result {
            Ok((events, _)) => events,
            Err(Errno::INTR) => return Ok(()),
            Err(errno) => return Err(failed("cannot wait for sockets", errno)),
        };
        for event in events {
            let (token, flags) = (event.data.u64(), event.flags);
            if token == WAKE {
                let _ = rustix::io::read(&self.shared.eventfd, &mut [0; 8]);
                continue;
            }
            let broken = flags.intersects(epoll::EventFlags::ERR | epoll::EventFlags::HUP);
            ready.push(Ready {
                token,
                read: broken || flags.contains(epoll::EventFlags::IN),
                write: broken || flags.contains(epoll::EventFlags::OUT),
            });
        }
        Ok(())
    }
}

fn interest(write: bool) -> epoll::EventFlags {
    match write {
        true => epoll::EventFlags::IN | epoll::EventFlags::OUT,
        false => epoll::EventFlags::IN,
    }
}
