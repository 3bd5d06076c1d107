//! A prefill engine: steps, layers, block tables. Blocks are pinned from the step that names them to the report
//! that nothing reads them; then the next request overwrites them.

use std::collections::{BTreeMap, VecDeque};

use kvxfer_core::session::{Observer, PushRange};
use kvxfer_core::wire::message::Chunk;
use kvxfer_core::{BlockId, ChunkKey, OfferId};

use crate::data::{SLOTS, WORDS, Word};
use crate::plan::{MS, Mode, Plan, content};
use crate::world::{Blocks, Input, Kind, World};

const POISON: u64 = 0xBAD;
const GROUPS: usize = 2;

#[derive(Debug)]
struct Request {
    chunks: Vec<Chunk>,
    offer: OfferId,
    /// Chunks computed.
    done: usize,
    held: Vec<Blocks>,
    aborted: bool,
}

/// A request's offer, as the block tables see it.
#[derive(Debug)]
struct Offered {
    pushed: Vec<bool>,
    /// Pinned since the step that named them.
    pins: Vec<Option<Blocks>>,
}

#[derive(Debug)]
pub(crate) struct Prefill {
    free: Vec<VecDeque<BlockId>>,
    refs: Vec<Vec<u32>>,
    /// What a block is of, while anyone holds it.
    cache: BTreeMap<ChunkKey, Blocks>,
    requests: BTreeMap<u64, Request>,
    offers: BTreeMap<OfferId, Offered>,
    /// Ranks at work on the step.
    stepping: u32,
    step: Vec<(u64, usize)>,
    asleep: bool,
    /// By rank and group, words of blocks.
    memory: Vec<Vec<Vec<u64>>>,
    /// By rank: what the step computes.
    computing: Vec<Vec<(Chunk, Blocks)>>,
}

impl Prefill {
    pub(crate) fn new(plan: &Plan) -> Self {
        let blocks = plan.blocks;
        Self {
            free: vec![(0..blocks).collect(); GROUPS],
            refs: vec![vec![0; blocks as usize]; GROUPS],
            cache: BTreeMap::new(),
            requests: BTreeMap::new(),
            offers: BTreeMap::new(),
            stepping: 0,
            step: Vec::new(),
            asleep: true,
            memory: vec![vec![vec![POISON; blocks as usize * SLOTS]; GROUPS]; plan.ranks],
            computing: vec![Vec::new(); plan.ranks],
        }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.requests.is_empty()
            && self.offers.is_empty()
            && self.cache.is_empty()
            && self.refs.iter().flatten().all(|&refs| refs == 0)
    }

    fn allocate(&mut self, plan: &Plan, tokens: u32) -> Option<Blocks> {
        let need: Vec<usize> =
            plan.layout(0).chunk_pieces(tokens).map(|(_, n)| n as usize).collect();
        if need.iter().zip(&self.free).any(|(&need, free)| free.len() < need) {
            return None;
        }
        let mut out = Vec::new();
        for (group, &need) in need.iter().enumerate() {
            out.push(self.free[group].drain(..need).collect());
        }
        Some(out.into())
    }

    fn hold(&mut self, blocks: &Blocks) {
        for (group, ids) in blocks.iter().enumerate() {
            for &id in ids {
                self.refs[group][id as usize] += 1;
            }
        }
    }

    /// Lets go of blocks. The last one out leaves them to be overwritten; `poison` does so at once.
    fn drop_blocks(&mut self, blocks: &Blocks, poison: bool) {
        for (group, ids) in blocks.iter().enumerate() {
            for &id in ids {
                let refs = &mut self.refs[group][id as usize];
                *refs -= 1;
                if *refs > 0 {
                    continue;
                }
                self.free[group].push_front(id);
                if poison {
                    for memory in &mut self.memory {
                        memory[group][id as usize * SLOTS..][..SLOTS].fill(POISON);
                    }
                }
                self.cache.retain(|_, cached| !cached[group].contains(&id));
            }
        }
    }
}

impl World {
    pub(crate) fn prefill_input(&mut self, proc: usize, observer: &mut Observer, input: Input) {
        let engine = self.procs[proc].engine;
        match input {
            Input::Arrive(id, chunks) => {
                if !observer.is_connected() && self.plan.mode == Mode::Rough {
                    return self.counts.step("request refused: engine not up", self.now);
                }
                let offer = observer.offer("request", &chunks);
                self.note(|| format!("P{engine} request {id}: offer {offer} {}", chunks.len()));
                let prefill = &mut self.prefills[engine];
                let count = chunks.len();
                let offered = Offered { pushed: vec![false; count], pins: vec![None; count] };
                prefill.offers.insert(offer, offered);
                let (done, held, aborted) = (0, Vec::new(), false);
                prefill.requests.insert(id, Request { chunks, offer, done, held, aborted });
                if self.plan.mode == Mode::Rough && self.rng.permille(80) {
                    let delay = self.rng.range(0, 200 * MS);
                    self.later(delay, proc, Input::Abort(id));
                }
                self.wake_engine(proc);
            }
            Input::Step => self.step(proc, observer),
            Input::StepDone => {
                let prefill = &mut self.prefills[engine];
                prefill.stepping -= 1;
                if prefill.stepping == 0 {
                    self.step_ended(proc, observer);
                }
            }
            Input::Abort(id) => {
                if let Some(request) = self.prefills[engine].requests.get_mut(&id) {
                    self.counts.fault("prefill aborted", self.now + 50 * MS);
                    request.aborted = true;
                    observer.withdraw(request.offer);
                    self.wake_engine(proc);
                }
            }
            _ => {}
        }
    }

    fn wake_engine(&mut self, proc: usize) {
        let engine = self.procs[proc].engine;
        if std::mem::take(&mut self.prefills[engine].asleep) {
            let delay = self.rng.range(0, 2 * MS);
            self.later(delay, proc, Input::Step);
        }
    }

    /// Begins a step: some chunks of some requests.
    fn step(&mut self, proc: usize, observer: &mut Observer) {
        let engine = self.procs[proc].engine;
        if self.prefills[engine].stepping > 0 {
            return;
        }
        let mut ranges = Vec::new();
        let mut compute = Vec::new();
        let mut step = Vec::new();
        let mut full = false;
        let ids: Vec<u64> = self.prefills[engine].requests.keys().copied().collect();
        for id in ids {
            let request = &self.prefills[engine].requests[&id];
            if request.aborted {
                self.end_request(proc, observer, id);
                continue;
            }
            if ranges.len() >= 3 || !self.rng.permille(800) {
                continue;
            }
            let (offer, done) = (request.offer, request.done);
            let many = self.rng.range(1, 4) as usize;
            let todo: Vec<Chunk> = request.chunks[done..].iter().take(many).copied().collect();
            let mut range = Vec::new();
            for chunk in todo {
                let prefill = &mut self.prefills[engine];
                let blocks = match prefill.cache.get(&chunk.key) {
                    Some(blocks) => {
                        self.counts.step("local prefix hit", self.now);
                        blocks.clone()
                    }
                    None => {
                        let Some(blocks) = prefill.allocate(&self.plan, chunk.tokens) else {
                            full = true;
                            break;
                        };
                        prefill.cache.insert(chunk.key, blocks.clone());
                        compute.push((chunk, blocks.clone()));
                        blocks
                    }
                };
                prefill.hold(&blocks);
                let at = done + range.len();
                if let Some(request) = prefill.requests.get_mut(&id) {
                    request.held.push(blocks.clone());
                }
                let announced = match prefill.offers.get_mut(&offer) {
                    Some(offered) if !offered.pushed[at] && offered.pins[at].is_none() => {
                        offered.pins[at] = Some(blocks.clone());
                        true
                    }
                    _ => false,
                };
                if announced {
                    prefill.hold(&blocks);
                }
                range.push(blocks);
            }
            if !range.is_empty() {
                step.push((id, range.len()));
                ranges.push(PushRange { offer, first_chunk: done as u32, blocks: range });
            }
        }
        if step.is_empty() {
            let prefill = &mut self.prefills[engine];
            // Out of blocks, or out of luck: try again, for as long as there is anything to do.
            prefill.asleep = prefill.requests.is_empty();
            let holds = |(id, r): (&u64, &Request)| (!r.held.is_empty()).then_some(*id);
            let youngest = prefill.requests.iter().rev().find_map(holds);
            if let Some(id) = youngest.filter(|_| full) {
                self.preempt(engine, id);
            }
            if !self.prefills[engine].asleep {
                let delay = self.rng.range(MS, 10 * MS);
                self.later(delay, proc, Input::Step);
            }
            return;
        }
        self.counts.step("step", self.now);
        self.prefills[engine].stepping = self.plan.ranks as u32;
        self.prefills[engine].step = step;
        for rank in 0..self.plan.ranks {
            let agent = self.agent(engine, rank);
            let mut delay = self.rng.range(10, 500);
            self.later(delay, agent, Input::Begin(ranges.clone(), compute.clone()));
            for layer in 0..3 {
                delay += self.rng.range(10, MS);
                self.later(delay, agent, Input::Layer(layer));
            }
            delay += self.rng.range(10, MS);
            self.later(delay, agent, Input::End);
        }
    }

    fn step_ended(&mut self, proc: usize, observer: &mut Observer) {
        let engine = self.procs[proc].engine;
        for (id, count) in std::mem::take(&mut self.prefills[engine].step) {
            let Some(request) = self.prefills[engine].requests.get_mut(&id) else { continue };
            request.done += count;
            if request.done == request.chunks.len() || request.aborted {
                self.end_request(proc, observer, id);
            } else if self.plan.mode == Mode::Rough && self.rng.permille(30) {
                self.preempt(engine, id);
            }
        }
        let delay = self.rng.range(0, 2 * MS);
        self.later(delay, proc, Input::Step);
    }

    /// The engine takes its own hold off a request's blocks; the pushes' pins stay.
    fn preempt(&mut self, engine: usize, id: u64) {
        self.counts.step("preemption", self.now);
        let poison = self.rng.permille(500);
        let prefill = &mut self.prefills[engine];
        let held = prefill.requests.get_mut(&id).map(|r| std::mem::take(&mut r.held));
        for blocks in held.unwrap_or_default() {
            prefill.drop_blocks(&blocks, poison);
        }
    }

    fn end_request(&mut self, proc: usize, observer: &mut Observer, id: u64) {
        let engine = self.procs[proc].engine;
        let poison = self.rng.permille(500);
        let withdraw = self.rng.permille(500);
        let prefill = &mut self.prefills[engine];
        let Some(request) = prefill.requests.remove(&id) else { return };
        for blocks in &request.held {
            prefill.drop_blocks(blocks, poison);
        }
        if request.aborted || withdraw {
            observer.withdraw(request.offer);
        }
    }

    /// What the scheduler half has learnt: unpin.
    pub(crate) fn after_observer(&mut self, proc: usize, observer: &mut Observer) {
        let engine = self.procs[proc].engine;
        if self.kind(engine) == Kind::Decode {
            return self.look_at_claims(proc, observer);
        }
        for (offer, chunks) in observer.pushed() {
            for chunk in chunks {
                self.counts.step("chunk unpinned", self.now);
                let poison = self.rng.permille(500);
                let prefill = &mut self.prefills[engine];
                let Some(offered) = prefill.offers.get_mut(&offer) else {
                    return self.fail(format!("pushed: offer {offer}, which is over or unknown"));
                };
                if std::mem::replace(&mut offered.pushed[chunk as usize], true) {
                    return self.fail(format!("chunk {chunk} of offer {offer} was pushed twice"));
                }
                if let Some(blocks) = offered.pins[chunk as usize].take() {
                    prefill.drop_blocks(&blocks, poison);
                }
                if prefill.offers[&offer].pushed.iter().all(|&pushed| pushed) {
                    prefill.offers.remove(&offer);
                }
            }
        }
    }

    // ---- the worker half --------------------------------------------------------------------------

    pub(crate) fn computing(&mut self, proc: usize, compute: Vec<(Chunk, Blocks)>) {
        let (engine, rank) = (self.procs[proc].engine, self.rank(proc));
        // Until its layer has run, a block holds something else.
        for (_, blocks) in &compute {
            for (group, ids) in blocks.iter().enumerate() {
                for &id in ids {
                    self.prefills[engine].memory[rank][group][id as usize * SLOTS..][..SLOTS]
                        .fill(POISON);
                }
            }
        }
        self.prefills[engine].computing[rank] = compute;
    }

    /// A layer of the step has run (or all of them).
    pub(crate) fn computed(&mut self, proc: usize, layer: Option<u32>) {
        let (engine, rank) = (self.procs[proc].engine, self.rank(proc));
        let prefill = &mut self.prefills[engine];
        let layers = layer.map_or(0..3, |layer| layer..layer + 1);
        for (chunk, blocks) in &prefill.computing[rank] {
            for layer in layers.clone() {
                let (group, inner) = if layer < 2 { (0, layer as usize) } else { (1, 0) };
                for (block, &id) in blocks[group].iter().enumerate() {
                    for word in 0..WORDS {
                        prefill.memory[rank][group][id as usize * SLOTS + inner * WORDS + word] =
                            content(&chunk.key, rank, layer, block, word);
                    }
                }
            }
        }
        if layer.is_none() {
            prefill.computing[rank].clear();
        }
    }

    pub(crate) fn step_done(&mut self, proc: usize) {
        let engine = self.procs[proc].engine;
        let delay = self.rng.range(10, 500);
        let scheduler = self.scheduler(engine);
        self.later(delay, scheduler, Input::StepDone);
    }

    /// A write reads a word of an engine's block; it must be the chunk's.
    #[expect(clippy::too_many_arguments, reason = "all of it names one word")]
    pub(crate) fn read_block(
        &mut self,
        proc: usize,
        group: usize,
        block: BlockId,
        slot: usize,
        key: &ChunkKey,
        layer: u32,
        word: &Word,
    ) -> u64 {
        let (engine, rank) = (self.procs[proc].engine, self.rank(proc));
        let value = self.prefills[engine].memory[rank][group][block as usize * SLOTS + slot];
        if value != content(key, rank, layer, word.block, word.word) {
            self.fail(format!(
                "P{engine}.{rank} read block {block} of group {group} at layer {layer}, which does not hold {key}"
            ));
        }
        value
    }
}
