//! The streams' queues, and what somebody waits for.

use std::collections::{BTreeMap, VecDeque};
use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::adversary::Adversary;
use super::capture::{Captured, Captures};
use super::clock::{Clock, StreamId, Ticket};
use super::race::{Accesses, Conflict};
use super::work::Work;
use crate::memory::{self, Stamp};
use crate::report::{Counted, Live};
use crate::state::{self, Gpu};

/// Queued work that waits for its turn.
#[derive(Debug)]
pub(super) struct Item {
    pub(super) work: Work,
    /// What must be done first, besides what is ahead in the stream.
    pub(super) after: Vec<Ticket>,
    /// What the host knew to be done when it submitted this.
    pub(super) host: Arc<Clock>,
    /// The memory it means is what lay behind its addresses then.
    pub(super) since: Stamp,
    pub(super) ticket: Ticket,
}

#[derive(Debug)]
pub(super) struct Stream {
    pub(super) gpu: Gpu,
    /// Ordered with the device's NULL stream, both ways.
    pub(super) blocking: bool,
    pub(super) priority: i32,
    pub(super) queue: VecDeque<Item>,
    /// The last item submitted, done or not.
    pub(super) tail: Ticket,
    /// The last item done.
    pub(super) finished: u64,
    /// Somebody waits until the stream has run this far.
    pub(super) demanded: u64,
    /// How often somebody asked whether it is done and was told no.
    pub(super) asked: u32,
    /// To be forgotten when the queue is empty.
    pub(super) destroyed: bool,
    pub(super) capture: Option<u64>,
    pub(super) clock: Clock,
    /// Until it is destroyed. The NULL stream is not counted.
    counted: Option<Counted>,
}

impl Item {
    /// Adds what is known once the item may run.
    fn join(&self, clock: &mut Clock) {
        clock.join(&self.host);
        for ticket in &self.after {
            clock.join(&ticket.mark.lock());
        }
    }
}

/// An event: what it was last recorded behind.
#[derive(Debug)]
pub(super) struct Event {
    pub(super) gpu: Gpu,
    pub(super) timing: bool,
    pub(super) recorded: Option<Ticket>,
    /// Recorded in a capture, so not really.
    pub(super) captured: Option<Captured>,
    pub(super) _counted: Counted,
}

/// All streams and events of the process, under one lock. Nothing here ever waits.
#[derive(Debug)]
pub(super) struct Queues {
    pub(super) streams: BTreeMap<StreamId, Stream>,
    pub(super) events: BTreeMap<u64, Event>,
    pub(super) captures: Captures,
    pub(super) accesses: Accesses,
    pub(super) adversary: Adversary,
    /// NULL streams, made when first used.
    null: BTreeMap<Gpu, StreamId>,
    /// What the host was told to be done.
    host: Arc<Clock>,
    seq: u64,
    handles: u64,
    /// When the host last submitted something.
    submitted: Option<Instant>,
    /// Since when something is queued that nobody waits for.
    idle_since: Option<Instant>,
    /// Steps run, so that a waiter sees whether anything moves.
    pub(super) steps: u64,
    /// The stream whose first item is being run right now.
    pub(super) running: Option<StreamId>,
    /// The thread that runs work exists.
    pub(super) started: bool,
}

impl Queues {
    pub(super) fn new() -> Self {
        Self {
            streams: BTreeMap::new(),
            events: BTreeMap::new(),
            captures: Captures::new(),
            accesses: Accesses::new(),
            adversary: Adversary::new(state::config().map_or(0, |config| config.seed)),
            null: BTreeMap::new(),
            host: Arc::default(),
            seq: 0,
            handles: 0,
            submitted: None,
            idle_since: None,
            steps: 0,
            running: None,
            started: false,
        }
    }

    /// A handle that nobody can take for an address or a special stream.
    pub(super) fn handle(&mut self) -> u64 {
        self.handles += 1;
        0x5354_0000_0000 + (self.handles << 4)
    }

    pub(super) fn open(&mut self, gpu: Gpu, blocking: bool, priority: i32) -> StreamId {
        let id = self.handle();
        let tail = Ticket { stream: id, seq: 0, mark: Default::default() };
        let stream = Stream {
            gpu,
            blocking,
            priority,
            queue: VecDeque::new(),
            tail,
            finished: 0,
            demanded: 0,
            asked: 0,
            destroyed: false,
            capture: None,
            clock: Clock::new(),
            counted: Some(Counted::new(Live::Streams)),
        };
        self.streams.insert(id, stream);
        id
    }

    /// The device's NULL stream.
    pub(super) fn null(&mut self, gpu: Gpu) -> StreamId {
        if let Some(id) = self.null.get(&gpu) {
            return *id;
        }
        let id = self.open(gpu, true, 0);
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.counted = None;
        }
        self.null.insert(gpu, id);
        id
    }

    pub(super) fn is_null(&self, stream: StreamId) -> bool {
        self.null.values().any(|id| *id == stream)
    }

    /// Queues work. A stream that is gone takes none: the ticket is done at once.
    pub(super) fn submit(
        &mut self,
        stream: StreamId,
        work: Work,
        mut after: Vec<Ticket>,
    ) -> Ticket {
        self.seq += 1;
        let ticket = Ticket { stream, seq: self.seq, mark: Default::default() };
        after.extend(self.neighbours(stream));
        let host = Arc::clone(&self.host);
        let now = Instant::now();
        self.submitted = Some(now);
        self.idle_since.get_or_insert(now);
        if let Some(stream) = self.streams.get_mut(&stream) {
            stream.tail = ticket.clone();
            stream.queue.push_back(Item {
                work,
                after,
                host,
                since: memory::now(),
                ticket: ticket.clone(),
            });
        }
        ticket
    }

    /// What the NULL stream's rules put before an item of that stream.
    fn neighbours(&self, stream: StreamId) -> Vec<Ticket> {
        let Some(own) = self.streams.get(&stream) else { return Vec::new() };
        let null = self.null.get(&own.gpu).copied();
        let before = |id: StreamId, other: &Stream| {
            id != stream
                && other.gpu == own.gpu
                && own.blocking
                && other.blocking
                && (Some(stream) == null || Some(id) == null)
        };
        self.streams
            .iter()
            .filter(|(id, other)| before(**id, other))
            .map(|(_, other)| other.tail.clone())
            .collect()
    }

    pub(super) fn is_done(&self, ticket: &Ticket) -> bool {
        self.streams.get(&ticket.stream).is_none_or(|stream| stream.finished >= ticket.seq)
    }

    /// Somebody waits for the ticket, so for all that it waits for.
    pub(super) fn demand(&mut self, ticket: &Ticket) {
        let mut wanted = vec![(ticket.stream, ticket.seq)];
        while let Some((id, seq)) = wanted.pop() {
            let Some(stream) = self.streams.get_mut(&id) else { continue };
            let from = stream.demanded;
            if from >= seq || stream.finished >= seq {
                continue;
            }
            stream.demanded = seq;
            let more =
                stream.queue.iter().filter(|item| item.ticket.seq > from && item.ticket.seq <= seq);
            wanted.extend(
                more.flat_map(|item| &item.after).map(|ticket| (ticket.stream, ticket.seq)),
            );
        }
    }

    /// Somebody asked about the ticket and did not wait: the second time is as good as waiting.
    pub(super) fn ask(&mut self, ticket: &Ticket) -> bool {
        if self.is_done(ticket) {
            self.observe(ticket);
            return true;
        }
        if let Some(stream) = self.streams.get_mut(&ticket.stream) {
            stream.asked += 1;
            if stream.asked % 2 == 0 {
                self.demand(ticket);
            }
        }
        false
    }

    /// The host learns that the ticket is done.
    pub(super) fn observe(&mut self, ticket: &Ticket) {
        let mark = ticket.mark.lock().clone();
        self.host_learns(&mark);
    }

    pub(super) fn host_learns(&mut self, clock: &Clock) {
        Arc::make_mut(&mut self.host).join(clock);
    }

    /// When work that nobody waits for is run all the same; `None` when there is none.
    pub(super) fn due(&self, delay: Duration) -> Option<Instant> {
        let quiet = self.submitted? + delay;
        let at_last = self.idle_since? + 5 * delay;
        Some(quiet.min(at_last))
    }

    /// Demands everything: the delay is over.
    pub(super) fn demand_all(&mut self) {
        let tails: Vec<Ticket> = self.streams.values().map(|stream| stream.tail.clone()).collect();
        for tail in &tails {
            self.demand(tail);
        }
        self.idle_since = None;
    }

    /// Takes the work of the stream's first item, to run a step of it. The item stays in its place.
    pub(super) fn take(&mut self, id: StreamId) -> Option<(Gpu, u64, Stamp, Work)> {
        let stream = self.streams.get_mut(&id)?;
        let item = stream.queue.front_mut()?;
        let work = mem::replace(&mut item.work, Work::Nothing);
        let (gpu, seq, since) = (stream.gpu, item.ticket.seq, item.since);
        if matches!(work, Work::Host(_)) {
            // The function may tell the host whatever it likes.
            let mut clock = stream.clock.clone();
            item.join(&mut clock);
            self.host_learns(&clock);
        }
        Some((gpu, seq, since, work))
    }

    /// Puts the work back; if it is done, those who wait for it may go on. Nothing happens when the
    /// item was dropped meanwhile.
    pub(super) fn put_back(
        &mut self,
        id: StreamId,
        seq: u64,
        work: Work,
        done: bool,
    ) -> Option<Conflict> {
        let stream = self.streams.get_mut(&id)?;
        let item = stream.queue.front_mut().filter(|item| item.ticket.seq == seq)?;
        if !done {
            item.work = work;
            return None;
        }
        let item = stream.queue.pop_front()?;
        item.join(&mut stream.clock);
        match &work {
            // Whoever wrote the value knew what it meant.
            Work::Await(_) => stream.clock.join(&self.host),
            Work::Write(_) => Arc::make_mut(&mut self.host).join(&stream.clock),
            _ => {}
        }
        let conflict = self.accesses.note(&work.touched(), id, seq, &stream.clock);
        stream.clock.note(id, seq);
        stream.finished = seq;
        item.ticket.mark.lock().clone_from(&stream.clock);
        self.settle(id);
        self.prune();
        conflict
    }

    fn prune(&mut self) {
        let queued = self.streams.values().filter_map(|stream| stream.queue.front());
        let clocks: Vec<&Clock> = queued.map(|item| &*item.host).chain([&*self.host]).collect();
        self.accesses.prune(&clocks);
    }

    /// Forgets all queued work of a device, which failed. Whoever waits for it is told by the context.
    pub(super) fn drop_work(&mut self, gpu: Gpu) {
        let ids: Vec<StreamId> =
            self.streams.iter().filter(|(_, s)| s.gpu == gpu).map(|(id, _)| *id).collect();
        for id in ids {
            if let Some(stream) = self.streams.get_mut(&id) {
                stream.queue.clear();
                stream.finished = stream.tail.seq;
            }
            self.settle(id);
        }
    }

    /// Forgets streams and events of a device whose context is destroyed.
    pub(super) fn drop_device(&mut self, gpu: Gpu) {
        self.drop_work(gpu);
        self.null.remove(&gpu);
        for (id, stream) in self.streams.extract_if(.., |_, stream| stream.gpu == gpu) {
            if let Some(capture) = stream.capture {
                self.captures.leave(capture, id);
            }
        }
        self.events.retain(|_, event| event.gpu != gpu);
    }

    pub(super) fn unfinished(&self) -> bool {
        self.streams.values().any(|stream| !stream.queue.is_empty())
    }

    /// What is queued, for a person.
    pub(super) fn describe(&self) -> String {
        let queued = self.streams.iter().filter_map(|(id, stream)| {
            let item = stream.queue.front()?;
            Some(format!("stream {id:#x} has {} items, first {:?}", stream.queue.len(), item.work))
        });
        queued.collect::<Vec<_>>().join("; ")
    }

    fn settle(&mut self, id: StreamId) {
        if self.streams.get(&id).is_some_and(|stream| stream.destroyed && stream.queue.is_empty()) {
            self.streams.remove(&id);
            self.accesses.forget(id);
            Arc::make_mut(&mut self.host).forget(id);
        }
        if !self.unfinished() {
            self.idle_since = None;
        }
    }

    /// Destroys a stream: at once, or when what is queued is done.
    pub(super) fn close(&mut self, id: StreamId) {
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.destroyed = true;
            if let Some(capture) = stream.capture.take() {
                self.captures.leave(capture, id);
            }
            stream.counted = None;
        }
        self.settle(id);
    }
}
