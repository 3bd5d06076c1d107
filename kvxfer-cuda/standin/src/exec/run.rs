//! The thread that runs queued work, and waiting for it.
//!
//! One thread runs the work of all streams, step by step, in the order that the [`Adversary`] chooses.
//! It sleeps while nobody waits for anything, until work has lain about for the configured delay: a
//! GPU would have run it by then, and the host may wait in ways not seen here.
//!
//! [`Adversary`]: super::adversary::Adversary

use std::mem;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::adversary::{Adversary, Ready};
use super::clock::{StreamId, Ticket};
use super::queue::Queues;
use super::race::Conflict;
use super::work::Work;
use crate::abi::{Code, Result};
use crate::state::{self, Gpu};

pub(super) struct Exec {
    queues: Mutex<Queues>,
    /// There may be something to run.
    work: Condvar,
    /// Something has run.
    done: Condvar,
}

static EXEC: LazyLock<Exec> = LazyLock::new(|| Exec {
    queues: Mutex::new(Queues::new()),
    work: Condvar::new(),
    done: Condvar::new(),
});

/// How often a value is looked at that a stream waits for.
const GLANCE: Duration = Duration::from_micros(300);

/// Calls `change` with the queues, and has the thread look at them.
pub(super) fn with<T>(change: impl FnOnce(&mut Queues) -> T) -> T {
    let mut queues = EXEC.queues.lock();
    let result = change(&mut queues);
    if queues.unfinished() {
        if !mem::replace(&mut queues.started, true)
            && std::thread::Builder::new().name("standin".into()).spawn(run).is_err()
        {
            queues.started = false;
        }
        EXEC.work.notify_one();
    }
    result
}

/// Waits for a ticket; all that it needs is run.
///
/// # Errors
/// The device's own, if it is broken; `LAUNCH_TIMEOUT` when nothing has moved for the configured
/// time: a real driver would wait for ever.
pub(super) fn wait(ticket: &Ticket, gpu: Gpu) -> Result {
    with(|queues| queues.demand(ticket));
    let mut queues = EXEC.queues.lock();
    let patience = Duration::from_millis(state::config().map_or(0, |config| config.stuck));
    let mut moved = (queues.steps, Instant::now());
    while !queues.is_done(ticket) {
        EXEC.done.wait_until(&mut queues, moved.1 + patience);
        if queues.steps != moved.0 || queues.running.is_some() {
            moved = (queues.steps, Instant::now());
        } else if moved.1.elapsed() >= patience && !queues.is_done(ticket) {
            eprintln!("stand-in: nothing has moved for {patience:?}: {}", queues.describe());
            return Err(Code::LAUNCH_TIMEOUT);
        }
    }
    queues.observe(ticket);
    drop(queues);
    state::check(gpu)
}

/// Breaks a device: its work is dropped, and whoever waits for it is told.
pub(crate) fn fail(gpu: Gpu, code: Code) {
    state::break_device(gpu, code);
    with(|queues| queues.drop_work(gpu));
    EXEC.done.notify_all();
}

fn run() {
    let delay = Duration::from_millis(state::config().map_or(0, |config| config.delay));
    let mut queues = EXEC.queues.lock();
    loop {
        let due = queues.due(delay);
        if due.is_some_and(|due| due <= Instant::now()) {
            queues.demand_all();
        }
        let choice = choose(&mut queues);
        if let Some(stream) = choice.next {
            step(&mut queues, stream);
            EXEC.done.notify_all();
            continue;
        }
        let glance = choice.gated.then(|| Instant::now() + GLANCE);
        match [glance, queues.due(delay)].into_iter().flatten().min() {
            Some(until) => drop(EXEC.work.wait_until(&mut queues, until)),
            None => EXEC.work.wait(&mut queues),
        }
    }
}

struct Choice {
    next: Option<StreamId>,
    /// Something that somebody waits for waits for a value in memory.
    gated: bool,
}

fn choose(queues: &mut Queues) -> Choice {
    let mut ready = Vec::new();
    let (mut oldest, mut gated) = (None, false);
    for (id, stream) in &queues.streams {
        let Some(item) = stream.queue.front() else { continue };
        let first = item.ticket.seq;
        let demanded = first <= stream.demanded;
        if demanded {
            oldest = Some(oldest.map_or(first, |seq: u64| seq.min(first)));
        }
        if !item.after.iter().all(|ticket| queues.is_done(ticket)) {
            continue;
        }
        if let Work::Hangs = item.work {
            continue;
        }
        if let Work::Await(value) = &item.work
            && value.is_there(stream.gpu, item.since) == Ok(false)
        {
            gated |= demanded;
            continue;
        }
        ready.push(Ready { stream: *id, first, last: stream.tail.seq, demanded });
    }
    Choice { next: queues.adversary.choose(&ready, oldest), gated }
}

/// Runs a step of the stream's first item, without the lock.
fn step(queues: &mut parking_lot::MutexGuard<'_, Queues>, id: StreamId) {
    let lot = queues.adversary.below(u64::MAX);
    let seed = queues.adversary.seed();
    let Some((gpu, seq, since, mut work)) = queues.take(id) else { return };
    let mut lots = Adversary::with_state(seed, lot);
    queues.running = Some(id);
    let result = parking_lot::MutexGuard::unlocked(queues, || work.step(gpu, since, &mut lots));
    queues.running = None;
    queues.steps += 1;
    let outcome = result.and_then(|done| {
        queues
            .put_back(id, seq, work, done)
            .map_or(Ok(()), |conflict| report(queues, id, &conflict))
    });
    if let Err(code) = outcome {
        state::break_device(gpu, code);
        queues.drop_work(gpu);
    }
}

fn report(queues: &Queues, id: StreamId, conflict: &Conflict) -> Result {
    let verb = |wrote| if wrote { "wrote" } else { "read" };
    eprintln!(
        "stand-in: stream {id:#x} {} {:#x}, which stream {:#x} {}, and nothing puts the two in order: {}",
        verb(conflict.wrote),
        conflict.address,
        conflict.other,
        verb(conflict.other_wrote),
        queues.describe(),
    );
    match state::config() {
        Ok(config) if !config.races => Ok(()),
        _ => Err(Code::ILLEGAL_ADDRESS),
    }
}
