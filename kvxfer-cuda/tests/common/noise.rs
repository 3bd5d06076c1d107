//! A line between two TUN devices that treats packets badly.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::network::succeeds;

/// One of so many is lost.
const LOSS: u64 = 50;
/// Each takes so long.
const DELAY: Duration = Duration::from_millis(1);
/// One of so many takes three times as long, and so comes after others that left later.
const LATE: u64 = 10;

/// A new TUN device on this thread's host: who writes to it is its cable.
pub(super) fn tun(name: &str) -> io::Result<File> {
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: zeros are a request.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = byte as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as i16;
    // SAFETY: the request is one, and the name ends with a zero.
    succeeds(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &request) })?;
    Ok(file)
}

#[derive(Debug, Default)]
struct Counters {
    over: AtomicBool,
    lost: AtomicU64,
    reordered: AtomicU64,
}

/// The line; it is cut when this is dropped.
pub struct Noise {
    counters: Arc<Counters>,
    thread: Option<JoinHandle<()>>,
}

impl Noise {
    pub(super) fn between(ends: [File; 2]) -> Self {
        let counters = Arc::new(Counters::default());
        let theirs = Arc::clone(&counters);
        let thread = Some(std::thread::spawn(move || carry(ends, &theirs)));
        Self { counters, thread }
    }

    /// How many packets were lost, and how many came after one that had left later.
    pub fn counts(&self) -> (u64, u64) {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (read(&self.counters.lost), read(&self.counters.reordered))
    }
}

impl Drop for Noise {
    fn drop(&mut self) {
        self.counters.over.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn carry(mut ends: [File; 2], counters: &Counters) {
    let mut random = 1_u64;
    let mut line = BinaryHeap::new();
    let (mut left, mut came) = (0_u64, [0; 2]);
    let mut packet = vec![0; 1 << 16];
    while !counters.over.load(Ordering::Relaxed) {
        let ready = {
            let mut fds = [0, 1].map(|end| PollFd::new(&ends[end], PollFlags::IN));
            let wait = Timespec { tv_sec: 0, tv_nsec: 500_000 };
            poll(&mut fds, Some(&wait)).unwrap();
            fds.map(|fd| fd.revents().contains(PollFlags::IN))
        };
        for from in [0, 1].into_iter().filter(|&from| ready[from]) {
            // A device that is not up yet or no more has nothing.
            let Ok(len) = ends[from].read(&mut packet) else { continue };
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let dice = random >> 33;
            if dice.is_multiple_of(LOSS) {
                counters.lost.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            left += 1;
            let delay = if (dice / LOSS).is_multiple_of(LATE) { DELAY * 3 } else { DELAY };
            let due = Instant::now() + delay;
            line.push(Reverse((due, left, 1 - from, packet[..len].to_vec())));
        }
        while line.peek().is_some_and(|Reverse((due, ..))| *due <= Instant::now()) {
            let Some(Reverse((_, number, to, packet))) = line.pop() else { break };
            counters.reordered.fetch_add(u64::from(number < came[to]), Ordering::Relaxed);
            came[to] = number.max(came[to]);
            let _ = ends[to].write(&packet);
        }
    }
}
