//! A decode engine: claims when a request arrives, waits a bounded time, loads, and compares what it got with what
//! it should be.

use std::collections::BTreeMap;

use kvxfer_core::pool::Extent;
use kvxfer_core::session::{LoadRequest, Observer};
use kvxfer_core::wire::message::{Chunk, Next};
use kvxfer_core::{ChunkKey, ClaimId, GrantId, LoadId, Result};

use crate::plan::{MS, Mode, content};
use crate::world::{Event, Input, Kind, Role, World};

#[derive(Debug)]
struct Request {
    chunks: Vec<Chunk>,
    claim: ClaimId,
    /// Waits for the whole prompt, whatever it is told.
    stubborn: bool,
    late: bool,
    load: Option<LoadId>,
    waits: Vec<bool>,
    ok: bool,
    released: bool,
    whole: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Decode {
    requests: BTreeMap<u64, Request>,
}

/// A load as the worker half knows it.
#[derive(Debug)]
pub(crate) struct Loading {
    keys: Vec<Chunk>,
    request: LoadRequest,
    verified: Vec<bool>,
}

impl Loading {
    pub(crate) fn claim(&self) -> ClaimId {
        self.request.claim
    }
}

impl Decode {
    pub(crate) fn is_idle(&self) -> bool {
        self.requests.is_empty()
    }
}

impl World {
    /// The requests of the run: each goes to a prefill engine, a decode engine, or both.
    pub(crate) fn schedule_requests(&mut self) {
        let rough = self.plan.mode == Mode::Rough;
        for id in 0..self.plan.requests {
            let chunks = self.plan.prompt(&mut self.rng);
            let at = self.rng.range(200 * MS, self.plan.trouble);
            let prefill = self.rng.below(self.plan.prefills);
            let twice = rough && self.rng.permille(200);
            if !(rough && self.rng.permille(100)) {
                self.arrive(prefill, at, id, &chunks);
            }
            if twice {
                let other = self.rng.below(self.plan.prefills);
                let at = at + self.rng.range(0, 50 * MS);
                self.arrive(other, at, id + 1000, &chunks);
            }
            for decode in 0..self.plan.decodes {
                // Without faults the prompt comes to be offered first, and nobody leaves it unclaimed.
                let spread = if rough { 300 * MS } else { 100 * MS };
                let wait = 50 * MS + self.rng.range(0, spread);
                let at = if rough { (at + wait).saturating_sub(100 * MS) } else { at + wait };
                if !rough || self.rng.permille(700) || (self.plan.mode == Mode::Tight) {
                    self.arrive(self.plan.prefills + decode, at, id, &chunks);
                }
                if rough && self.rng.permille(100) {
                    self.arrive(self.plan.prefills + decode, at + 40 * MS, id + 1000, &chunks);
                }
            }
        }
    }

    fn arrive(&mut self, engine: usize, at: u64, id: u64, chunks: &[Chunk]) {
        // To whichever life of the engine is up then.
        let scheduler = self.scheduler(engine);
        self.at(at, Event::Arrive(scheduler, id, chunks.to_vec()));
    }

    pub(crate) fn decode_input(&mut self, proc: usize, observer: &mut Observer, input: Input) {
        let engine = self.procs[proc].engine;
        let at = engine - self.plan.prefills;
        let rough = self.plan.mode == Mode::Rough;
        match input {
            Input::Arrive(id, chunks) => {
                let patience = std::time::Duration::from_micros(self.plan.patience);
                let claim = observer.claim("request", &chunks, patience);
                self.note(|| format!("D{engine} request {id}: claim {claim}"));
                self.counts.requests += 1;
                let request = Request {
                    chunks,
                    claim,
                    stubborn: !rough || self.rng.permille(300),
                    late: false,
                    load: None,
                    waits: Vec::new(),
                    ok: true,
                    released: false,
                    whole: false,
                };
                self.decodes[at].requests.insert(id, request);
                self.later(self.plan.patience + 20 * MS, proc, Input::Patience(id));
                if rough && self.rng.permille(80) {
                    let delay = self.rng.range(0, 300 * MS);
                    self.later(delay, proc, Input::Abort(id));
                }
            }
            Input::Patience(id) => {
                if let Some(request) = self.decodes[at].requests.get_mut(&id) {
                    request.late = true;
                }
            }
            Input::Abort(id) => {
                if let Some(request) = self.decodes[at].requests.get_mut(&id)
                    && !std::mem::replace(&mut request.released, true)
                {
                    self.counts.fault("decode aborted", self.now + 20 * MS);
                    observer.release(request.claim, 0, 0);
                    if request.load.is_none() {
                        self.decodes[at].requests.remove(&id);
                    }
                }
            }
            Input::Loaded(load, rank, ok) => {
                let found =
                    self.decodes[at].requests.iter_mut().find(|(_, r)| r.load == Some(load));
                let Some((&id, request)) = found else {
                    return self.fail(format!("load {load} ended, and is not under way"));
                };
                if !std::mem::replace(&mut request.waits[rank], false) {
                    return self.fail(format!("load {load} ended twice on rank {rank}"));
                }
                request.ok &= ok;
                if request.waits.iter().any(|&waits| waits) {
                    return;
                }
                let outcome = match (request.ok, request.whole) {
                    (true, true) => "request: loaded whole",
                    (true, false) => "request: loaded in part",
                    (false, _) => "request: load failed",
                };
                let bad = !rough && outcome != "request: loaded whole";
                observer.release(request.claim, 0, 0);
                self.decodes[at].requests.remove(&id);
                self.counts.step(outcome, self.now);
                if bad {
                    self.fail(format!("{outcome}, without any fault (request {id})"));
                }
            }
            _ => {}
        }
    }

    /// Something may have changed: decide for each request that waits.
    pub(crate) fn look_at_claims(&mut self, proc: usize, observer: &mut Observer) {
        let engine = self.procs[proc].engine;
        let at = engine - self.plan.prefills;
        let ids: Vec<u64> = self.decodes[at].requests.keys().copied().collect();
        let mut sent = false;
        for id in ids {
            let request = &self.decodes[at].requests[&id];
            if request.load.is_some() || request.released {
                continue;
            }
            let all = request.chunks.len() as u32;
            let status = observer.status(request.claim);
            let count = match status {
                Some(status) if status.ready == all => all,
                // Loading what is ready makes room for the rest.
                Some(status) if status.next == Next::Stalled && status.coming > 0 => status.coming,
                Some(status) if request.late => status.ready,
                None if request.late => 0,
                Some(status) if !request.stubborn => match status.next {
                    Next::Lost | Next::Missing | Next::NoProducer => status.ready,
                    _ => continue,
                },
                _ => continue,
            };
            self.note(|| format!("D{engine} request {id}: {status:?} -> load {count}"));
            let rough = self.plan.mode == Mode::Rough;
            // The first chunks may be in the engine's own prefix cache.
            let first = match rough && count > 1 && self.rng.permille(100) {
                true => self.rng.range(1, count.into()) as u32,
                false => 0,
            };
            let Some(request) = self.decodes[at].requests.get_mut(&id) else { continue };
            if count == 0 {
                observer.release(request.claim, 0, 0);
                self.decodes[at].requests.remove(&id);
                self.counts.step("request: recomputed", self.now);
                if !rough {
                    self.fail(format!("request {id} got nothing, without any fault: {status:?}"));
                }
                sent = true;
                continue;
            }
            let load = LoadId(self.next_load);
            self.next_load += 1;
            request.load = Some(load);
            request.waits = vec![true; self.plan.ranks];
            request.whole = count == all && first == 0;
            let claim = request.claim;
            if first > 0 {
                observer.release(claim, first, count);
                sent = true;
            }
            let chunks = count - first;
            let order = LoadRequest { load, claim, first_chunk: first, chunks };
            self.orders.insert(load, request.chunks[first as usize..count as usize].to_vec());
            for rank in 0..self.plan.ranks {
                let agent = self.agent(engine, rank);
                let delay = self.rng.range(50, 2 * MS);
                self.later(delay, agent, Input::Load(order));
            }
        }
        if sent {
            while let Some(kvxfer_core::session::ObserverAction::Send { link, message }) =
                observer.poll_action()
            {
                self.send(proc, link, message);
            }
        }
    }

    // ---- the worker half --------------------------------------------------------------------------

    pub(crate) fn load_started(&mut self, proc: usize, request: LoadRequest) {
        let Some(keys) = self.orders.get(&request.load).cloned() else { return };
        let verified = vec![false; keys.len()];
        let loading = Loading { keys, request, verified };
        if self.loadings.insert((proc, request.load), loading).is_some() {
            self.fail("the simulation started a load twice");
        }
    }

    pub(crate) fn copy_begins(
        &mut self,
        proc: usize,
        load: LoadId,
        chunk: u32,
        key: &ChunkKey,
        _grant: GrantId,
        words: usize,
    ) {
        let Some(loading) = self.loadings.get(&(proc, load)) else {
            return self.fail(format!("a copy for load {load}, which is not under way"));
        };
        let at = chunk.wrapping_sub(loading.request.first_chunk) as usize;
        let Some(wanted) = loading.keys.get(at) else {
            return self.fail(format!("a copy of chunk {chunk}, which load {load} does not want"));
        };
        if wanted.key != *key || words == 0 {
            self.fail(format!("load {load}: chunk {chunk} is copied from another key's pages"));
        }
    }

    /// A copy whose checksums hold: the content must be the key's, whatever the protocol believes.
    pub(crate) fn copy_verified(&mut self, index: usize) {
        let (key, load, chunk, proc, words) = self.copied_words(index);
        let Role::Agent(rank) = self.procs[proc].role else { return };
        let mut wrong = 0;
        let mut count = 0;
        for (layer, word, value) in words {
            count += 1;
            wrong += usize::from(value != content(&key, rank, layer, word.block, word.word));
        }
        if wrong > 0 || count == 0 {
            return self.fail(format!(
                "WRONG KV: load {load}, chunk {chunk}: {wrong} of {count} words of {key} are other content"
            ));
        }
        if let Some(loading) = self.loadings.get_mut(&(proc, load)) {
            let at = (chunk - loading.request.first_chunk) as usize;
            if std::mem::replace(&mut loading.verified[at], true) {
                self.fail(format!("load {load} copied chunk {chunk} twice"));
            }
        }
    }

    pub(crate) fn loaded(&mut self, proc: usize, load: LoadId, result: Result<()>) {
        let Some(loading) = self.loadings.remove(&(proc, load)) else {
            return self.fail(format!("load {load} ended, and is not under way"));
        };
        self.note(|| format!("{} load {load}: {result:?}", self.label(proc)));
        match &result {
            Ok(()) => {
                self.counts.step("load ok", self.now);
                if !loading.verified.iter().all(|&verified| verified) {
                    self.fail(format!("load {load} is ok, but not every chunk was copied"));
                }
            }
            Err(error) => self.counts.step(crate::report::failure(error.kind()), self.now),
        }
        self.oracle_load_over(proc, loading.request.claim);
        let engine = self.procs[proc].engine;
        let Role::Agent(rank) = self.procs[proc].role else { return };
        let delay = self.rng.range(10, MS);
        let scheduler = self.scheduler(engine);
        self.later(delay, scheduler, Input::Loaded(load, rank, result.is_ok()));
    }

    pub(crate) fn scheduler_input(&mut self, proc: usize, observer: &mut Observer, input: Input) {
        match self.kind(self.procs[proc].engine) {
            Kind::Prefill => self.prefill_input(proc, observer, input),
            Kind::Decode => self.decode_input(proc, observer, input),
        }
    }

    pub(crate) fn scheduler_connected(&mut self, _proc: usize, observer: &mut Observer) {
        if observer.is_connected() {
            self.counts.step("engine up", self.now);
        }
    }

    pub(crate) fn pages_of(extents: &[Extent]) -> impl Iterator<Item = (u32, u32)> {
        extents.iter().flat_map(|e| {
            (e.page..e.page + u32::from(e.pages)).map(move |page| (e.segment.0, page))
        })
    }
}
