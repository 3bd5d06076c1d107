//! Virtual time, processes, and the loop. A process is a machine with its own clock and an inbox that fills while
//! the process is stopped.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::sync::Arc;

use kvxfer_core::session::{
    Consumer, ConsumerAction, Copied, LoadRequest, Observer, ObserverAction, Producer,
    ProducerAction, PushRange,
};
use kvxfer_core::wire::Message;
use kvxfer_core::wire::message::Chunk;
use kvxfer_core::{
    BlockId, ChunkKey, Error, Incarnation, LinkId, LoadId, OfferId, PostId, SegmentId, Time,
};

use crate::clock::Clock;
use crate::data::{Copy, Memory, Post};
use crate::decode::{Decode, Loading};
use crate::net::Link;
use crate::oracle::Oracle;
use crate::plan::{MS, Mode, Plan, SECOND};
use crate::prefill::Prefill;
use crate::report::Counts;
use crate::rng::Rng;

pub(crate) type Blocks = Arc<[Vec<BlockId>]>;

/// Something that reaches a process.
#[derive(Clone, Debug)]
pub(crate) enum Input {
    Connected(usize),
    Message(usize, Message),
    Down(usize),
    Dead(Incarnation),
    Posted(PostId, Result<u64, Error>),
    Copied(Copied),
    Replaced(SegmentId),
    Verified(LinkId, SegmentId, u64),
    Tick,
    // ---- inside an engine --------------------------------------------------------------------
    Begin(Vec<PushRange>, Vec<(Chunk, Blocks)>),
    Layer(u32),
    End,
    Load(LoadRequest),
    Step,
    StepDone,
    Arrive(u64, Vec<Chunk>),
    Abort(u64),
    Patience(u64),
    Loaded(LoadId, usize, bool),
}

#[derive(Debug)]
pub(crate) enum Event {
    Input(usize, u32, Input),
    Wire(usize, usize, Message),
    Dial(usize, u32, usize),
    Accept(usize),
    Giveup(usize),
    Land(usize),
    CopyStep(usize),
    Fault,
    Kill(usize, u32),
    Restart(usize),
    Resume(usize, u32),
    LetGo((usize, u32), LinkId, (Incarnation, SegmentId), u32),
    Thaw(usize, u32),
    Arrive(usize, u64, Vec<Chunk>),
}

pub(crate) enum Machine {
    None,
    Observer(Observer),
    Producer(Box<Producer>),
    Consumer(Box<Consumer>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Scheduler,
    Agent(usize),
}

pub(crate) struct Proc {
    pub(crate) engine: usize,
    pub(crate) role: Role,
    pub(crate) epoch: u32,
    pub(crate) alive: bool,
    pub(crate) stalled: bool,
    /// While stalled, whether its writes still land.
    pub(crate) lands: bool,
    pub(crate) inbox: VecDeque<Input>,
    pub(crate) incarnation: Incarnation,
    pub(crate) clock: Clock,
    pub(crate) wake: Option<u64>,
    pub(crate) machine: Machine,
    /// Links by configured peer (agents of a prefill engine) or rank (schedulers), dialled or up.
    pub(crate) dialled: Vec<Option<usize>>,
    /// A consumer's memory behind each segment.
    pub(crate) backing: Vec<usize>,
    /// What a producer has mapped: (peer, segment) to memory.
    pub(crate) attached: BTreeMap<(Incarnation, SegmentId), usize>,
    /// Time between two words of a write.
    pub(crate) pace: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Prefill,
    Decode,
}

pub(crate) struct World {
    pub(crate) plan: Plan,
    pub(crate) rng: Rng,
    pub(crate) now: u64,
    heap: BinaryHeap<Reverse<(u64, u64, usize)>>,
    events: Vec<Option<Event>>,
    pub(crate) procs: Vec<Proc>,
    pub(crate) links: Vec<Link>,
    pub(crate) prefills: Vec<Prefill>,
    pub(crate) decodes: Vec<Decode>,
    pub(crate) memories: Vec<Memory>,
    pub(crate) posts: Vec<Post>,
    pub(crate) copies: Vec<Copy>,
    pub(crate) accepted: BTreeSet<(usize, u32, Incarnation)>,
    pub(crate) oracle: Oracle,
    pub(crate) counts: Counts,
    pub(crate) violation: Option<String>,
    pub(crate) trace: bool,
    idle_ticks: u32,
    seq: u64,
    pub(crate) dying: Vec<bool>,
    pub(crate) next_load: u64,
    /// What the scheduler halves ordered, and what the worker halves are at.
    pub(crate) orders: BTreeMap<LoadId, Vec<Chunk>>,
    pub(crate) loadings: BTreeMap<(usize, LoadId), Loading>,
    /// Keys of the offers on each link.
    pub(crate) offered: BTreeMap<(usize, OfferId), Vec<ChunkKey>>,
}

impl World {
    pub(crate) fn new(seed: u64, trace: bool) -> Self {
        let mut rng = Rng::new(seed);
        let plan = Plan::new(seed, &mut rng);
        let mut world = Self {
            now: 0,
            heap: BinaryHeap::new(),
            events: Vec::new(),
            procs: Vec::new(),
            links: Vec::new(),
            prefills: Vec::new(),
            decodes: Vec::new(),
            memories: Vec::new(),
            posts: Vec::new(),
            copies: Vec::new(),
            accepted: BTreeSet::new(),
            oracle: Oracle::default(),
            counts: Counts::default(),
            violation: None,
            trace,
            idle_ticks: 0,
            seq: 0,
            dying: vec![false; plan.prefills + plan.decodes],
            next_load: 1,
            orders: BTreeMap::new(),
            loadings: BTreeMap::new(),
            offered: BTreeMap::new(),
            plan,
            rng,
        };
        for engine in 0..world.plan.prefills + world.plan.decodes {
            world.add_engine(engine);
        }
        world.counts.mode = Some(world.plan.mode);
        world
    }

    fn add_engine(&mut self, engine: usize) {
        match self.kind(engine) {
            Kind::Prefill => self.prefills.push(Prefill::new(&self.plan)),
            Kind::Decode => self.decodes.push(Decode::default()),
        }
        for at in 0..=self.plan.ranks {
            let role = if at == 0 { Role::Scheduler } else { Role::Agent(at - 1) };
            self.procs.push(Proc {
                engine,
                role,
                epoch: 0,
                alive: false,
                stalled: false,
                lands: true,
                inbox: VecDeque::new(),
                incarnation: Incarnation([0; 16]),
                clock: Clock { local: 0, global: 0, pace: 1000, frozen: false },
                wake: None,
                machine: Machine::None,
                dialled: Vec::new(),
                backing: Vec::new(),
                attached: BTreeMap::new(),
                pace: 0,
            });
        }
    }

    pub(crate) fn kind(&self, engine: usize) -> Kind {
        if engine < self.plan.prefills { Kind::Prefill } else { Kind::Decode }
    }

    pub(crate) fn scheduler(&self, engine: usize) -> usize {
        engine * (self.plan.ranks + 1)
    }

    pub(crate) fn agent(&self, engine: usize, rank: usize) -> usize {
        self.scheduler(engine) + 1 + rank
    }

    pub(crate) fn rank(&self, proc: usize) -> usize {
        match self.procs[proc].role {
            Role::Agent(rank) => rank,
            Role::Scheduler => 0,
        }
    }

    pub(crate) fn fail(&mut self, what: impl Into<String>) {
        if self.violation.is_none() {
            let what = what.into();
            self.note(|| format!("VIOLATION {what}"));
            self.violation = Some(what);
        }
    }

    pub(crate) fn note(&self, what: impl FnOnce() -> String) {
        if self.trace {
            eprintln!("{:>10.3} ms  {}", self.now as f64 / 1000.0, what());
        }
    }

    pub(crate) fn after(&mut self, delay: u64, event: Event) {
        self.at(self.now + delay, event);
    }

    pub(crate) fn at(&mut self, at: u64, event: Event) {
        self.events.push(Some(event));
        self.heap.push(Reverse((at.max(self.now), self.seq, self.events.len() - 1)));
        self.seq += 1;
    }

    /// Something will reach this life of the process.
    pub(crate) fn later(&mut self, delay: u64, proc: usize, input: Input) {
        let epoch = self.procs[proc].epoch;
        self.after(delay, Event::Input(proc, epoch, input));
    }

    pub(crate) fn local(&self, proc: usize) -> Time {
        Time::from_micros(self.procs[proc].clock.at(self.now))
    }

    /// Runs to the end; the error is the first violation.
    pub(crate) fn run(&mut self) -> Result<(), String> {
        for engine in 0..self.plan.prefills + self.plan.decodes {
            let delay = self.rng.range(0, 20 * MS);
            self.after(delay, Event::Restart(engine));
        }
        self.schedule_requests();
        if self.plan.mode == Mode::Rough {
            self.after(100 * MS, Event::Fault);
        }
        let end = self.plan.trouble + 600 * SECOND;
        while let Some(Reverse((at, _, index))) = self.heap.pop() {
            let Some(event) = self.events[index].take() else { continue };
            if at > end {
                self.fail(format!("still busy at the end: {event:?}"));
            }
            self.now = at;
            self.dispatch(event);
            self.counts.operations += 1;
            if let Some(what) = self.violation.take() {
                return Err(format!("{what} (at {:.3} ms)", self.now as f64 / 1000.0));
            }
        }
        self.check_end();
        self.violation.take().map_or(Ok(()), Err)
    }

    fn dispatch(&mut self, event: Event) {
        match event {
            Event::Input(proc, epoch, input) => self.input(proc, epoch, input),
            Event::Wire(link, to, message) => self.arrived(link, to, message),
            Event::Dial(proc, epoch, index) => self.dial(proc, epoch, index),
            Event::Accept(link) => self.accept(link),
            Event::Giveup(link) => self.give_up_dialling(link),
            Event::Land(post) => self.land(post),
            Event::CopyStep(copy) => self.copy_step(copy),
            Event::Fault => self.fault(),
            Event::Kill(proc, epoch) => self.kill(proc, epoch),
            Event::Restart(engine) => self.restart(engine),
            Event::Resume(proc, epoch) => self.resume(proc, epoch),
            Event::LetGo(proc, link, place, generation) => {
                self.let_go(proc, link, place, generation);
            }
            Event::Thaw(proc, epoch) => self.thaw(proc, epoch),
            Event::Arrive(proc, id, chunks) => {
                let epoch = self.procs[proc].epoch;
                self.input(proc, epoch, Input::Arrive(id, chunks));
            }
        }
    }

    pub(crate) fn input(&mut self, proc: usize, epoch: u32, input: Input) {
        let process = &mut self.procs[proc];
        if !process.alive || process.epoch != epoch {
            return;
        }
        if process.stalled {
            process.inbox.push_back(input);
            return;
        }
        if let Input::Tick = input {
            self.idle_ticks += 1;
            if self.idle_ticks > 20_000 {
                self.fail(format!("process {proc} ticks without end"));
            }
        } else {
            self.idle_ticks = 0;
        }
        let mut machine = std::mem::replace(&mut self.procs[proc].machine, Machine::None);
        match &mut machine {
            Machine::None => {}
            Machine::Observer(observer) => self.reach_observer(proc, observer, input),
            Machine::Producer(producer) => self.reach_producer(proc, producer, input),
            Machine::Consumer(consumer) => self.reach_consumer(proc, consumer, input),
        }
        self.procs[proc].machine = machine;
        self.perform(proc);
        self.set_wake(proc);
        self.check(proc);
    }

    /// Performs what the machine wants, until it wants nothing more.
    fn perform(&mut self, proc: usize) {
        loop {
            let mut machine = std::mem::replace(&mut self.procs[proc].machine, Machine::None);
            let mut acted = false;
            match &mut machine {
                Machine::None => {}
                Machine::Observer(observer) => {
                    while let Some(ObserverAction::Send { link, message }) = observer.poll_action()
                    {
                        self.send(proc, link, message);
                    }
                    self.after_observer(proc, observer);
                }
                Machine::Producer(producer) => {
                    let actions: Vec<ProducerAction> =
                        std::iter::from_fn(|| producer.poll_action()).collect();
                    acted = !actions.is_empty();
                    for action in actions {
                        self.producer_action(proc, action);
                    }
                }
                Machine::Consumer(consumer) => {
                    let actions: Vec<ConsumerAction> =
                        std::iter::from_fn(|| consumer.poll_action()).collect();
                    acted = !actions.is_empty();
                    let now = self.local(proc);
                    for action in actions {
                        self.consumer_action(now, proc, consumer, action);
                    }
                }
            }
            self.procs[proc].machine = machine;
            if !acted {
                return;
            }
        }
    }

    pub(crate) fn set_wake(&mut self, proc: usize) {
        let next = match &self.procs[proc].machine {
            Machine::Producer(producer) => producer.next_timeout(),
            Machine::Consumer(consumer) => consumer.next_timeout(),
            _ => None,
        };
        let clock = &self.procs[proc].clock;
        let Some(next) = next.filter(|_| !clock.frozen) else { return };
        let left = (next.as_micros() as u64).saturating_sub(clock.local);
        let at = (clock.global + (left * 1000).div_ceil(clock.pace)).max(self.now);
        if self.procs[proc].wake.is_some_and(|wake| wake <= at && wake > self.now) {
            return;
        }
        self.procs[proc].wake = Some(at);
        let epoch = self.procs[proc].epoch;
        self.at(at, Event::Input(proc, epoch, Input::Tick));
    }

    /// The link as this process knows it.
    pub(crate) fn link_id(link: usize) -> LinkId {
        LinkId(link as u64 + 1)
    }
}
