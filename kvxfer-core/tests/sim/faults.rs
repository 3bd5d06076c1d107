//! What goes wrong, and when.

use kvxfer_core::pool::PageState;
use kvxfer_core::session::{Consumer, Observer, Producer};
use kvxfer_core::{Incarnation, SegmentId};

use crate::clock::Clock;
use crate::data::{Memory, SLOTS};
use crate::net::SILENCE;
use crate::plan::MS;
use crate::prefill::Prefill;
use crate::world::{Event, Input, Kind, Machine, Role, World};

impl World {
    /// Links that may break: not those between a prefill engine's halves, which live and die together.
    fn breakable(&self) -> Vec<usize> {
        let up = |link: &usize| {
            let state = &self.links[*link];
            let (dialler, _) = state.ends[0];
            let inner = self.procs[dialler].role == Role::Scheduler
                && self.kind(self.procs[dialler].engine) == Kind::Prefill;
            state.up == [true, true] && !inner
        };
        (0..self.links.len()).filter(up).collect()
    }

    pub(crate) fn fault(&mut self) {
        if self.now > self.plan.trouble {
            return;
        }
        let delay = self.rng.range(0, self.plan.fault_every * 2);
        self.after(delay, Event::Fault);
        let links = self.breakable();
        let link = (!links.is_empty()).then(|| links[self.rng.below(links.len())]);
        let proc = self.rng.below(self.procs.len());
        match self.rng.range(0, 100) {
            0..20 => {
                let Some(link) = link else { return };
                self.begin("cut", 300);
                let notice = [self.notice(), self.notice()];
                self.break_link(link, notice[0], notice[1]);
            }
            20..28 => {
                let Some(link) = link else { return };
                self.begin("one-way cut", 500);
                let deaf = self.rng.below(2);
                let (proc, epoch) = self.links[link].ends[deaf];
                self.links[link].cut[deaf] = self.now;
                let jitter = self.rng.range(0, 50 * MS);
                self.after(SILENCE + jitter, Event::Input(proc, epoch, Input::Down(link)));
            }
            28..34 => {
                self.begin("partition", 500);
                let engine = self.procs[proc].engine;
                for link in links {
                    let inside = |end: (usize, u32)| self.procs[end.0].engine == engine;
                    if inside(self.links[link].ends[0]) != inside(self.links[link].ends[1]) {
                        let notice = [self.notice(), self.notice()];
                        self.break_link(link, notice[0], notice[1]);
                    }
                }
            }
            34..46 => {
                let Some(link) = link else { return };
                self.begin("delay", 200);
                let until = self.now + self.rng.range(5 * MS, 300 * MS);
                let side = self.rng.below(2);
                self.links[link].floor[side] = self.links[link].floor[side].max(until);
            }
            46..58 => self.kill_engine(proc),
            58..78 => self.stall(proc),
            78..86 => {
                self.begin("slow peer", 500);
                self.procs[proc].pace = self.rng.range(100, 30 * MS);
            }
            86..92 => {
                if self.procs[proc].alive && !self.procs[proc].clock.frozen {
                    self.begin("clock pause", 300);
                    let clock = &mut self.procs[proc].clock;
                    clock.local = clock.at(self.now);
                    clock.frozen = true;
                    let epoch = self.procs[proc].epoch;
                    let delay = self.rng.range(10 * MS, 600 * MS);
                    self.after(delay, Event::Thaw(proc, epoch));
                }
            }
            _ => self.tamper(proc),
        }
    }

    fn begin(&mut self, fault: &'static str, ms: u64) {
        self.note(|| format!("FAULT {fault}"));
        self.counts.fault(fault, self.now + ms * MS);
    }

    fn notice(&mut self) -> u64 {
        let most = if self.rng.permille(500) { 20 * MS } else { SILENCE };
        self.now + self.rng.range(0, most)
    }

    pub(crate) fn thaw(&mut self, proc: usize, epoch: u32) {
        let process = &mut self.procs[proc];
        if process.epoch == epoch && process.clock.frozen {
            process.clock.frozen = false;
            process.clock.global = self.now;
            process.wake = None;
            self.set_wake(proc);
        }
    }

    /// A word of a committed page changes by itself.
    fn tamper(&mut self, proc: usize) {
        let Machine::Consumer(consumer) = &self.procs[proc].machine else { return };
        let geometry = self.plan.geometry();
        let segment = SegmentId(self.rng.below(geometry.segments as usize) as u32);
        let page = self.rng.below(geometry.pages_per_segment as usize) as u32;
        let (PageState::Committed, grant) = consumer.page(segment, page) else { return };
        self.begin("bit flip", 300);
        self.oracle.tampered.insert((proc, grant));
        let memory = self.procs[proc].backing[segment.0 as usize];
        let word = page as usize * SLOTS + self.rng.below(2);
        self.memories[memory].words[word] ^= 1 << self.rng.below(64);
    }

    fn stall(&mut self, proc: usize) {
        // As likely as not one that is writing.
        let writing = self.posts.iter().find(|post| !post.ended).map(|post| post.poster.0);
        let proc = writing.filter(|_| self.rng.permille(500)).unwrap_or(proc);
        if !self.procs[proc].alive || self.procs[proc].stalled {
            return;
        }
        self.begin("stall", 600);
        let long = self.rng.permille(400);
        let time =
            if long { self.rng.range(SILENCE, 4 * SILENCE) } else { self.rng.range(MS, SILENCE) };
        self.procs[proc].stalled = true;
        self.procs[proc].lands = self.rng.permille(500);
        let epoch = self.procs[proc].epoch;
        self.after(time, Event::Resume(proc, epoch));
        if time <= SILENCE {
            return;
        }
        for link in self.breakable() {
            for side in 0..2 {
                if self.links[link].ends[side] == (proc, epoch) {
                    let (other, epoch) = self.links[link].ends[1 - side];
                    let jitter = self.rng.range(0, 20 * MS);
                    self.after(SILENCE + jitter, Event::Input(other, epoch, Input::Down(link)));
                }
            }
        }
    }

    pub(crate) fn resume(&mut self, proc: usize, epoch: u32) {
        if self.procs[proc].epoch != epoch || !self.procs[proc].alive {
            return;
        }
        self.procs[proc].stalled = false;
        // What has arrived comes before what is due.
        while let Some(input) = self.procs[proc].inbox.pop_front() {
            if !matches!(input, Input::Tick) {
                self.input(proc, epoch, input);
            }
        }
        self.input(proc, epoch, Input::Tick);
    }

    /// An engine's processes end one after the other, and it is started again.
    fn kill_engine(&mut self, proc: usize) {
        let engine = self.procs[proc].engine;
        if std::mem::replace(&mut self.dying[engine], true) {
            return;
        }
        let all: Vec<usize> =
            (0..self.procs.len()).filter(|&other| self.procs[other].engine == engine).collect();
        if all.iter().any(|&proc| !self.procs[proc].alive) {
            self.dying[engine] = false;
            return;
        }
        self.begin("kill", 500);
        let spread = if self.rng.permille(500) { 1 } else { 60 * MS };
        for proc in all {
            let delay = self.rng.range(0, spread);
            let epoch = self.procs[proc].epoch;
            self.after(delay, Event::Kill(proc, epoch));
        }
        let delay = spread + self.rng.range(0, 800 * MS);
        self.after(delay, Event::Restart(engine));
    }

    pub(crate) fn kill(&mut self, proc: usize, epoch: u32) {
        if self.procs[proc].epoch != epoch {
            return;
        }
        self.note(|| format!("{} dies", self.label(proc)));
        let process = &mut self.procs[proc];
        process.alive = false;
        process.stalled = false;
        process.machine = Machine::None;
        process.inbox.clear();
        let dead = process.incarnation;
        self.oracle.forget(proc);
        self.loadings.retain(|(at, _), _| *at != proc);
        for link in 0..self.links.len() {
            for side in 0..2 {
                if self.links[link].ends[side] != (proc, epoch) {
                    continue;
                }
                // What it had sent still arrives, then the end; or the host is gone, and only silence says so.
                let silent = self.rng.permille(100);
                let wait = if silent { SILENCE } else { self.rng.range(0, 30 * MS) };
                let (other, epoch) = self.links[link].ends[1 - side];
                let at = self.links[link].floor[1 - side].max(self.now + wait);
                self.at(at, Event::Input(other, epoch, Input::Down(link)));
            }
        }
        let watchers: Vec<(usize, u32)> = self
            .accepted
            .iter()
            .filter(|(.., peer)| *peer == dead)
            .map(|&(consumer, epoch, _)| (consumer, epoch))
            .collect();
        for (consumer, epoch) in watchers {
            if self.rng.permille(600) {
                let delay = self.rng.range(0, 800 * MS);
                self.after(delay, Event::Input(consumer, epoch, Input::Dead(dead)));
            }
        }
    }

    pub(crate) fn restart(&mut self, engine: usize) {
        self.dying[engine] = false;
        let kind = self.kind(engine);
        match kind {
            Kind::Prefill => self.prefills[engine] = Prefill::new(&self.plan),
            Kind::Decode => self.decodes[engine - self.plan.prefills] = Default::default(),
        }
        let procs: Vec<usize> =
            (0..self.procs.len()).filter(|&proc| self.procs[proc].engine == engine).collect();
        for proc in procs {
            let mut name = [0; 16];
            name[..8].copy_from_slice(&self.rng.next().to_le_bytes());
            name[8..].copy_from_slice(&self.rng.next().to_le_bytes());
            let incarnation = Incarnation(name);
            let skewed = self.plan.mode == crate::plan::Mode::Rough;
            let clock = Clock {
                local: self.rng.range(0, 1 << 40),
                global: self.now,
                pace: if skewed { self.rng.range(900, 1100) } else { 1000 },
                frozen: false,
            };
            let (machine, dials) = self.new_machine(proc, incarnation);
            let pace = self.rng.range(10, 2 * MS);
            let process = &mut self.procs[proc];
            process.epoch += 1;
            process.alive = true;
            process.incarnation = incarnation;
            process.clock = clock;
            process.wake = None;
            process.machine = machine;
            process.dialled = vec![None; dials];
            process.attached.clear();
            process.pace = pace;
            self.note(|| format!("{} starts as {incarnation}", self.label(proc)));
            for index in 0..dials {
                let delay = self.rng.range(0, 20 * MS);
                self.dial_later(proc, index, delay);
            }
        }
    }

    fn new_machine(&mut self, proc: usize, incarnation: Incarnation) -> (Machine, usize) {
        let (role, engine) = (self.procs[proc].role, self.procs[proc].engine);
        let valid = "the simulation's configuration is valid";
        match (role, self.kind(engine)) {
            (Role::Scheduler, _) => {
                let ranks = self.plan.ranks;
                (Machine::Observer(Observer::new(incarnation, ranks)), ranks)
            }
            (Role::Agent(rank), Kind::Prefill) => {
                let producer = Producer::new(self.plan.producer(rank)).expect(valid);
                (Machine::Producer(Box::new(producer)), self.plan.decodes)
            }
            (Role::Agent(rank), Kind::Decode) => {
                let consumer = Consumer::new(self.plan.consumer(rank)).expect(valid);
                let geometry = self.plan.geometry();
                let first = self.memories.len();
                for segment in 0..geometry.segments {
                    self.memories.push(Memory {
                        owner: (proc, self.procs[proc].epoch + 1),
                        segment: SegmentId(segment),
                        words: vec![0xDEAD; geometry.pages_per_segment as usize * SLOTS],
                    });
                }
                self.procs[proc].backing = (first..self.memories.len()).collect();
                (Machine::Consumer(Box::new(consumer)), 0)
            }
        }
    }
}
