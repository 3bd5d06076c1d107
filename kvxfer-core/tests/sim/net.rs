//! Links: FIFO both ways, like sockets. They delay, break, fall silent, and are dialled anew.

use kvxfer_core::session::{Consumer, Observer, Producer};
use kvxfer_core::wire::Message;
use kvxfer_core::{Incarnation, LinkId, SegmentId};

use crate::plan::MS;
use crate::report::name;
use crate::world::{Event, Input, Kind, Role, World};

/// How long an end hears nothing before it gives the link up.
pub(crate) const SILENCE: u64 = 400 * MS;

#[derive(Debug)]
pub(crate) struct Link {
    /// Process and its life: the dialler, the listener.
    pub(crate) ends: [(usize, u32); 2],
    /// Their names, as the hellos said: a process that was restarted since has another.
    pub(crate) names: [Incarnation; 2],
    /// Which of the dialler's peers this is.
    pub(crate) index: usize,
    pub(crate) up: [bool; 2],
    /// Whether that end was ever connected.
    pub(crate) met: [bool; 2],
    /// Nothing reaches that end before (order), and after (the cut).
    pub(crate) floor: [u64; 2],
    pub(crate) cut: [u64; 2],
}

impl World {
    pub(crate) fn side(&self, link: usize, proc: usize) -> usize {
        usize::from(self.links[link].ends[0].0 != proc)
    }

    fn peer_of_dial(&self, proc: usize, index: usize) -> usize {
        let process = &self.procs[proc];
        match process.role {
            Role::Scheduler => self.agent(process.engine, index),
            Role::Agent(rank) => self.agent(self.plan.prefills + index, rank),
        }
    }

    pub(crate) fn dial_later(&mut self, proc: usize, index: usize, delay: u64) {
        let epoch = self.procs[proc].epoch;
        self.after(delay, Event::Dial(proc, epoch, index));
    }

    pub(crate) fn dial(&mut self, proc: usize, epoch: u32, index: usize) {
        let process = &self.procs[proc];
        if !process.alive || process.epoch != epoch || process.dialled[index].is_some() {
            return;
        }
        let to = self.peer_of_dial(proc, index);
        if process.stalled || !self.procs[to].alive {
            let delay = self.rng.range(20, 200) * MS;
            return self.dial_later(proc, index, delay);
        }
        let link = self.links.len();
        self.links.push(Link {
            ends: [(proc, epoch), (to, self.procs[to].epoch)],
            names: [proc, to].map(|proc| self.procs[proc].incarnation),
            index,
            up: [false; 2],
            met: [false; 2],
            floor: [self.now; 2],
            cut: [u64::MAX; 2],
        });
        self.procs[proc].dialled[index] = Some(link);
        let delay = self.delay();
        self.after(delay, Event::Accept(link));
        self.after(delay + SILENCE, Event::Giveup(link));
    }

    /// The listener's kernel has it; the listener itself when it runs.
    pub(crate) fn accept(&mut self, link: usize) {
        let (to, epoch) = self.links[link].ends[1];
        self.at(self.now, Event::Input(to, epoch, Input::Connected(link)));
    }

    pub(crate) fn give_up_dialling(&mut self, link: usize) {
        if !self.links[link].met[0] {
            self.break_link(link, self.now, self.now);
            let (proc, epoch) = self.links[link].ends[0];
            if self.procs[proc].alive && self.procs[proc].epoch == epoch {
                self.procs[proc].dialled[self.links[link].index] = None;
                self.dial_later(proc, self.links[link].index, 50 * MS);
            }
        }
    }

    /// An end learns that the link is up.
    pub(crate) fn connected(&mut self, proc: usize, link: usize) -> bool {
        let side = self.side(link, proc);
        let state = &mut self.links[link];
        if state.met[side] || state.cut[side] <= self.now {
            return false;
        }
        state.met[side] = true;
        state.up[side] = true;
        if side == 1 {
            let (dialler, epoch) = state.ends[0];
            let at = self.now + self.delay();
            self.links[link].floor[0] = at;
            self.at(at, Event::Input(dialler, epoch, Input::Connected(link)));
        }
        true
    }

    pub(crate) fn delay(&mut self) -> u64 {
        match self.rng.permille(50) {
            true => self.rng.range(0, 20 * MS),
            false => self.rng.range(50, MS),
        }
    }

    pub(crate) fn send(&mut self, proc: usize, id: LinkId, message: Message) {
        let link = id.0 as usize - 1;
        let side = self.side(link, proc);
        self.note(|| format!("{} link {link}: {message:?}", self.label(proc)));
        if !self.links[link].up[side] {
            return;
        }
        let delay = self.delay();
        let to = 1 - side;
        let at = self.links[link].floor[to].max(self.now + delay);
        self.links[link].floor[to] = at;
        if self.plan.duplicates > 0 && self.rng.permille(self.plan.duplicates) {
            // Behind later ones too, except where an old status would replace a newer one.
            let late = match message {
                Message::Claimed { .. } | Message::Segment { .. } | Message::Attach { .. } => 0,
                _ => self.rng.range(0, 5 * MS),
            };
            self.counts.fault("duplicate", self.now + 5 * MS);
            self.at(at, Event::Wire(link, to, message.clone()));
            self.at(at + late, Event::Wire(link, to, message));
        } else {
            self.at(at, Event::Wire(link, to, message));
        }
    }

    pub(crate) fn arrived(&mut self, link: usize, to: usize, message: Message) {
        // What was under way when the link was cut is lost; what an end hears of a link that it gave up
        // still reaches its machine, which has to know better.
        if self.links[link].cut[to] <= self.now {
            return;
        }
        self.counts.step(name(&message), self.now);
        let (proc, epoch) = self.links[link].ends[to];
        let input = Input::Message(link, message);
        self.input(proc, epoch, input);
    }

    /// An end gives the link up (or its machine had it closed). The other will hear of it.
    pub(crate) fn down(&mut self, proc: usize, link: usize) -> bool {
        let side = self.side(link, proc);
        if !std::mem::take(&mut self.links[link].up[side]) {
            return false;
        }
        self.note(|| format!("{} link {link} is down", self.label(proc)));
        if side == 0 {
            let index = self.links[link].index;
            if self.procs[proc].dialled[index] == Some(link) {
                self.procs[proc].dialled[index] = None;
            }
            let delay = self.rng.range(10, 200) * MS;
            self.dial_later(proc, index, delay);
        }
        let other = 1 - side;
        let delay = self.delay();
        let at = self.links[link].floor[other].max(self.now + delay);
        let (peer, epoch) = self.links[link].ends[other];
        self.at(at, Event::Input(peer, epoch, Input::Down(link)));
        true
    }

    /// Nothing passes any more, and each end notices at its own time.
    pub(crate) fn break_link(&mut self, link: usize, notice0: u64, notice1: u64) {
        for (side, notice) in [notice0, notice1].into_iter().enumerate() {
            let state = &mut self.links[link];
            state.cut[side] = state.cut[side].min(self.now);
            let (proc, epoch) = state.ends[side];
            self.at(notice, Event::Input(proc, epoch, Input::Down(link)));
        }
    }

    pub(crate) fn label(&self, proc: usize) -> String {
        let process = &self.procs[proc];
        let kind = if self.kind(process.engine) == Kind::Prefill { "P" } else { "D" };
        match process.role {
            Role::Scheduler => format!("{kind}{} scheduler", process.engine),
            Role::Agent(rank) => format!("{kind}{}.{rank}", process.engine),
        }
    }

    // ---- what reaches a machine -----------------------------------------------------------------

    pub(crate) fn reach_observer(&mut self, proc: usize, observer: &mut Observer, input: Input) {
        match input {
            Input::Connected(link) if self.connected(proc, link) => {
                observer.connected(self.links[link].index, Self::link_id(link));
                self.scheduler_connected(proc, observer);
            }
            Input::Down(link) if self.down(proc, link) => {
                observer.disconnected(Self::link_id(link));
            }
            Input::Message(link, message) => {
                if let Err(error) = observer.received(Self::link_id(link), message) {
                    self.fail(format!("protocol error at a scheduler: {error}"));
                }
            }
            input => self.scheduler_input(proc, observer, input),
        }
    }

    pub(crate) fn reach_producer(&mut self, proc: usize, producer: &mut Producer, input: Input) {
        let now = self.local(proc);
        match input {
            Input::Connected(link) => {
                let state = &self.links[link];
                let (index, peer) = (state.index, state.names[1]);
                if self.connected(proc, link) && self.side(link, proc) == 0 {
                    producer.consumer_connected(index, Self::link_id(link), peer, Vec::new());
                }
            }
            Input::Down(link) if self.down(proc, link) => {
                producer.disconnected(now, Self::link_id(link));
                self.link_gone(proc, link);
            }
            Input::Message(link, Message::Segment { segment, probe, blob, .. }) => {
                self.attach(proc, link, segment, &blob);
                let sum = 0;
                self.send(
                    proc,
                    Self::link_id(link),
                    Message::Probed { segment, probe, sum, nanos: 0 },
                );
            }
            Input::Message(link, message) => {
                let id = Self::link_id(link);
                let result = match self.side(link, proc) {
                    0 => producer.received_from_consumer(now, id, message),
                    _ if self.links[link].up[1] => {
                        producer.received_from_observer(now, id, message)
                    }
                    _ => Ok(()),
                };
                if let Err(error) = result {
                    self.fail(format!("protocol error at a producer: {error}"));
                }
            }
            Input::Posted(post, result) => producer.posted(post, result),
            Input::Tick => producer.tick(now),
            Input::Begin(ranges, compute) => {
                self.computing(proc, compute);
                producer.begin_step(now, ranges);
            }
            Input::Layer(layer) => {
                self.computed(proc, Some(layer));
                if self.plan.hooks {
                    producer.layer_ready(layer);
                }
            }
            Input::End => {
                self.computed(proc, None);
                producer.end_step();
                self.step_done(proc);
            }
            _ => {}
        }
    }

    pub(crate) fn reach_consumer(&mut self, proc: usize, consumer: &mut Consumer, input: Input) {
        let now = self.local(proc);
        match input {
            Input::Connected(link) if self.connected(proc, link) => {
                let (dialler, _) = self.links[link].ends[0];
                let peer = self.links[link].names[0];
                let id = Self::link_id(link);
                match self.procs[dialler].role {
                    Role::Scheduler => consumer.observer_connected(now, id, peer),
                    Role::Agent(_) => {
                        self.accepted.insert((proc, self.procs[proc].epoch, peer));
                        consumer.producer_connected(now, id, peer);
                    }
                }
            }
            Input::Down(link) if self.down(proc, link) => {
                self.consumer_down(now, proc, consumer, link)
            }
            Input::Message(link, message) => {
                self.oracle_heard(proc, link, &message);
                if let Err(error) = consumer.received(now, Self::link_id(link), message) {
                    self.fail(format!("protocol error at a consumer: {error}"));
                }
            }
            Input::Dead(peer) => {
                self.counts.step("death seen", self.now);
                self.oracle_dead(proc, peer);
                consumer.writer_dead(now, peer);
            }
            Input::Copied(copied) => {
                self.oracle_copied(proc, &copied);
                consumer.copied(now, copied);
            }
            Input::Replaced(segment) => {
                self.oracle_replaced(proc, segment);
                consumer.replaced(now, segment);
            }
            Input::Verified(link, segment, probe) => {
                consumer.verified(now, link, segment, probe, Ok(()));
            }
            Input::Load(request) => {
                self.load_started(proc, request);
                consumer.load(now, request);
            }
            Input::Tick => consumer.tick(now),
            _ => {}
        }
    }

    pub(crate) fn consumer_down(
        &mut self,
        now: kvxfer_core::Time,
        proc: usize,
        consumer: &mut Consumer,
        link: usize,
    ) {
        self.oracle_down(proc, link);
        consumer.disconnected(now, Self::link_id(link));
    }

    fn attach(&mut self, proc: usize, link: usize, segment: SegmentId, blob: &[u8]) {
        if !self.links[link].up[0] {
            return;
        }
        let memory = blob.iter().rev().fold(0, |value, &byte| value << 8 | usize::from(byte));
        let peer = self.links[link].names[1];
        self.procs[proc].attached.insert((peer, segment), memory);
    }

    /// A producer's agent forgets what the peer of a dead link had shown it.
    fn link_gone(&mut self, proc: usize, link: usize) {
        if self.side(link, proc) == 0 {
            let peer = self.links[link].names[1];
            self.procs[proc].attached.retain(|(other, _), _| *other != peer);
        }
    }
}
