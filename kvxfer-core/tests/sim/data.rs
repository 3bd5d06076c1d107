//! The data plane, word by word: each write lands when it lands.

use std::sync::Arc;

use kvxfer_core::pool::Extent;
use kvxfer_core::session::{Consumer, ConsumerAction, Copied, ProducerAction};
use kvxfer_core::wire::Message;
use kvxfer_core::{
    ChunkKey, ErrorKind, GrantId, Incarnation, LinkId, LoadId, PostId, SegmentId, Time,
};

use crate::plan::{MS, Mode};
use crate::rng::mix;
use crate::world::{Event, Input, World};

/// Words of one layer of a block.
pub(crate) const WORDS: usize = 2;
/// Words of a page: the group with most layers has two.
pub(crate) const SLOTS: usize = 2 * WORDS;

/// Memory behind a segment, for as long as someone maps it.
pub(crate) struct Memory {
    pub(crate) owner: (usize, u32),
    pub(crate) segment: SegmentId,
    pub(crate) words: Vec<u64>,
}

/// A word of a page and the word of an engine's block that belongs there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Word {
    pub(crate) segment: SegmentId,
    pub(crate) page: u32,
    pub(crate) slot: usize,
    group: usize,
    /// The block's place in the chunk, and the word's in the layer of the block.
    pub(crate) block: usize,
    pub(crate) word: usize,
}

pub(crate) struct Post {
    pub(crate) poster: (usize, u32),
    pub(crate) id: PostId,
    pub(crate) grant: GrantId,
    key: ChunkKey,
    layer: u32,
    blocks: Arc<[Vec<u32>]>,
    words: Vec<(Word, usize)>,
    pub(crate) peer: Incarnation,
    sum: u64,
    pub(crate) ended: bool,
}

pub(crate) struct Copy {
    reader: (usize, u32),
    pub(crate) load: LoadId,
    pub(crate) chunk: u32,
    key: ChunkKey,
    grant: GrantId,
    sums: Arc<[u64]>,
    seed: u64,
    words: Vec<(u32, Word)>,
    next: usize,
    got: Vec<u64>,
}

fn seed(key: &ChunkKey, grant: GrantId) -> u64 {
    mix(u64::from(key.0[0]) | u64::from(key.0[3]) << 8, grant.0)
}

fn term(seed: u64, word: &Word, value: u64) -> u64 {
    mix(seed ^ value, (word.block * WORDS + word.word) as u64)
}

/// A flat layer's group and its place in it: two layers in group 0, one in group 1.
fn group_of(layer: u32) -> (usize, usize) {
    if layer < 2 { (0, layer as usize) } else { (1, 0) }
}

/// Where the words of one layer of a chunk lie.
fn words(extents: &[Extent], layer: u32) -> Vec<Word> {
    let (group, inner) = group_of(layer);
    let extents = extents.iter().filter(|extent| usize::from(extent.group) == group);
    let pages = extents.flat_map(|e| (e.page..e.page + u32::from(e.pages)).map(|p| (e.segment, p)));
    let mut out = Vec::new();
    for (block, (segment, page)) in pages.enumerate() {
        for word in 0..WORDS {
            let slot = inner * WORDS + word;
            out.push(Word { segment, page, slot, group, block, word });
        }
    }
    out
}

impl World {
    pub(crate) fn producer_action(&mut self, proc: usize, action: ProducerAction) {
        match action {
            ProducerAction::Send { link, message } => {
                if self.side(link.0 as usize - 1, proc) == 0 {
                    self.check_terminal(proc, link.0 as usize - 1, &message);
                }
                self.send(proc, link, message);
            }
            ProducerAction::Post { post, peer, grant, key, layer, extents, blocks, .. } => {
                let mut list = Vec::new();
                for word in words(&extents, layer) {
                    match self.procs[proc].attached.get(&(peer, word.segment)) {
                        Some(&memory) => list.push((word, memory)),
                        None => {
                            // A transport refuses what is not attached.
                            self.counts.step("post refused", self.now);
                            if self.plan.mode != Mode::Rough {
                                self.fail("a post to a segment that is not attached");
                            }
                            let error = ErrorKind::NotFound.error("the segment is not attached");
                            return self.later(0, proc, Input::Posted(post, Err(error)));
                        }
                    }
                }
                for at in (1..list.len()).rev() {
                    let other = self.rng.below(at + 1);
                    list.swap(at, other);
                }
                self.counts.step("post", self.now);
                let poster = (proc, self.procs[proc].epoch);
                let sum = 0;
                let (id, words, ended) = (post, list, false);
                self.posts.push(Post {
                    poster,
                    id,
                    grant,
                    key,
                    layer,
                    blocks,
                    words,
                    peer,
                    sum,
                    ended,
                });
                *self.oracle.in_flight.entry((proc, peer, grant)).or_default() += 1;
                let delay = self.rng.range(1, self.procs[proc].pace * 2);
                self.after(delay, Event::Land(self.posts.len() - 1));
            }
            ProducerAction::Detach { link, peer, segment, generation } => {
                self.procs[proc].attached.remove(&(peer, segment));
                // What moves by itself goes on.
                let fails = self.rng.permille(500);
                for post in self.posts_in(proc, peer, segment).into_iter().filter(|_| fails) {
                    self.end_post(post);
                    let post = self.posts[post].id;
                    self.counts.step("post failed by detach", self.now);
                    let error = ErrorKind::NotFound.error("detached");
                    self.later(0, proc, Input::Posted(post, Err(error)));
                }
                let epoch = self.procs[proc].epoch;
                self.let_go((proc, epoch), link, (peer, segment), generation);
            }
        }
    }

    fn posts_in(&self, proc: usize, peer: Incarnation, segment: SegmentId) -> Vec<usize> {
        let poster = (proc, self.procs[proc].epoch);
        let there = |post: &Post| {
            let within = |&(_, memory): &(Word, usize)| self.memories[memory].segment == segment;
            !post.ended
                && post.poster == poster
                && post.peer == peer
                && post.words.iter().any(within)
        };
        (0..self.posts.len()).filter(|&at| there(&self.posts[at])).collect()
    }

    /// Says that a segment was let go, once that is so, unless it was shown again meanwhile.
    pub(crate) fn let_go(
        &mut self,
        (proc, epoch): (usize, u32),
        link: LinkId,
        place: (Incarnation, SegmentId),
        generation: u32,
    ) {
        let process = &self.procs[proc];
        if !process.alive || process.epoch != epoch || process.attached.contains_key(&place) {
            return;
        }
        let (peer, segment) = place;
        if self.plan.clings(proc, epoch) {
            return self.counts.fault("cling", self.now + 500 * MS);
        }
        if process.stalled || !self.posts_in(proc, peer, segment).is_empty() {
            self.counts.step("segment let go later", self.now);
            return self.after(MS, Event::LetGo((proc, epoch), link, place, generation));
        }
        self.send(proc, link, Message::Retired { segment, generation });
    }

    /// Some of a post's words land.
    pub(crate) fn land(&mut self, index: usize) {
        let (proc, epoch) = self.posts[index].poster;
        let process = &self.procs[proc];
        // A dead process writes nothing, and its engine's memory is gone.
        if self.posts[index].ended || !process.alive || process.epoch != epoch {
            return;
        }
        if process.stalled && !process.lands {
            return self.after(10 * MS, Event::Land(index));
        }
        if process.stalled {
            self.counts.step("write of a stopped process", self.now);
        }
        let pace = process.pace;
        let many = if self.rng.permille(500) { usize::MAX } else { 1 };
        for _ in 0..many.min(self.posts[index].words.len()) {
            self.land_word(index);
        }
        if self.plan.failing_posts > 0 && self.rng.permille(self.plan.failing_posts) {
            self.counts.fault("failing post", self.now + 50 * MS);
            self.end_post(index);
            let error = ErrorKind::Io.error("the simulated wire failed");
            let delay = self.rng.range(0, 2 * MS);
            let id = self.posts[index].id;
            return self.later(delay, proc, Input::Posted(id, Err(error)));
        }
        let delay = self.rng.range(1, pace * 2);
        if self.posts[index].words.is_empty() {
            self.end_post(index);
            let (id, sum) = (self.posts[index].id, self.posts[index].sum);
            self.later(delay, proc, Input::Posted(id, Ok(sum)));
        } else {
            self.after(delay, Event::Land(index));
        }
    }

    fn end_post(&mut self, index: usize) {
        let post = &mut self.posts[index];
        post.ended = true;
        let key = (post.poster.0, post.peer, post.grant);
        if let Some(left) = self.oracle.in_flight.get_mut(&key) {
            *left -= 1;
            if *left == 0 {
                self.oracle.in_flight.remove(&key);
            }
        }
    }

    fn land_word(&mut self, index: usize) {
        let post = &mut self.posts[index];
        let Some((word, memory)) = post.words.pop() else { return };
        let block = post.blocks[word.group][word.block];
        let (proc, _) = post.poster;
        let (key, layer, grant) = (post.key, post.layer, post.grant);
        let value = self.read_block(proc, word.group, block, word.slot, &key, layer, &word);
        let post = &mut self.posts[index];
        post.sum = post.sum.wrapping_add(term(seed(&key, grant), &word, value));
        self.check_write(memory, &word, grant, proc);
        let at = word.page as usize * SLOTS + word.slot;
        self.memories[memory].words[at] = value;
    }

    pub(crate) fn consumer_action(
        &mut self,
        now: Time,
        proc: usize,
        consumer: &mut Consumer,
        action: ConsumerAction,
    ) {
        match action {
            ConsumerAction::Send { link, message } => {
                self.oracle_said(proc, consumer, link, &message);
                self.send(proc, link, message);
            }
            ConsumerAction::Attach { link } => {
                let message = Message::Attached { path: "simulated".into(), refused: Vec::new() };
                self.send(proc, link, message);
            }
            ConsumerAction::Export { link, segment, generation, probe } => {
                self.counts.step("export", self.now);
                let memory = self.procs[proc].backing[segment.0 as usize];
                self.oracle_shown(memory, link, generation);
                let blob = (memory as u64).to_le_bytes().to_vec();
                let transport = "simulated".into();
                let bytes = 0;
                let message =
                    Message::Segment { segment, generation, bytes, probe, transport, blob };
                self.send(proc, link, message);
            }
            ConsumerAction::Verify { link, segment, probe, .. } => {
                self.counts.step("verify", self.now);
                let delay = if self.rng.permille(500) { 0 } else { self.rng.range(0, 5 * MS) };
                self.later(delay, proc, Input::Verified(link, segment, probe));
            }
            ConsumerAction::Copy { load, chunk, key, grant, extents, sums, .. } => {
                self.counts.step("copy", self.now);
                let layers = 0..3;
                let all: Vec<(u32, Word)> = layers
                    .flat_map(|l| words(&extents, l).into_iter().map(move |word| (l, word)))
                    .collect();
                self.copy_begins(proc, load, chunk, &key, grant, all.len());
                let reader = (proc, self.procs[proc].epoch);
                let seed = seed(&key, grant);
                let (words, next, got) = (all, 0, Vec::new());
                self.copies.push(Copy {
                    reader,
                    load,
                    chunk,
                    key,
                    grant,
                    sums,
                    seed,
                    words,
                    next,
                    got,
                });
                let delay = self.rng.range(10, self.procs[proc].pace * 2);
                self.after(delay, Event::CopyStep(self.copies.len() - 1));
            }
            ConsumerAction::Loaded { load, result } => self.loaded(proc, load, result),
            ConsumerAction::Replace { segment, live } => {
                self.counts.fault("replace", self.now + 100 * MS);
                self.counts.step("replace", self.now);
                let old = self.procs[proc].backing[segment.0 as usize];
                let mut words = vec![0xDEAD; self.memories[old].words.len()];
                for extent in live {
                    let from = extent.page as usize * SLOTS;
                    let to = from + usize::from(extent.pages) * SLOTS;
                    words[from..to].copy_from_slice(&self.memories[old].words[from..to]);
                }
                let owner = self.memories[old].owner;
                self.memories.push(Memory { owner, segment, words });
                self.procs[proc].backing[segment.0 as usize] = self.memories.len() - 1;
                let delay = if self.rng.permille(500) { 0 } else { self.rng.range(0, 60 * MS) };
                self.later(delay, proc, Input::Replaced(segment));
            }
            ConsumerAction::Close { link, error } => {
                let clung = error.to_string().contains("let go");
                let why = if clung { "close: segment not let go" } else { "close" };
                self.counts.step(why, self.now);
                self.note(|| format!("{} closes link {}: {error}", self.label(proc), link.0 - 1));
                let link = link.0 as usize - 1;
                if self.down(proc, link) {
                    self.consumer_down(now, proc, consumer, link);
                }
            }
        }
    }

    pub(crate) fn copy_step(&mut self, index: usize) {
        let (proc, epoch) = self.copies[index].reader;
        let process = &self.procs[proc];
        if !process.alive || process.epoch != epoch {
            return;
        }
        if process.stalled {
            return self.after(10 * MS, Event::CopyStep(index));
        }
        let pace = process.pace;
        let many = if self.rng.permille(500) { usize::MAX } else { 2 };
        let copy = &mut self.copies[index];
        for _ in 0..many.min(copy.words.len() - copy.next) {
            let (_, word) = copy.words[copy.next];
            let memory = process.backing[word.segment.0 as usize];
            copy.got.push(self.memories[memory].words[word.page as usize * SLOTS + word.slot]);
            copy.next += 1;
        }
        let delay = self.rng.range(1, pace * 2);
        if self.copies[index].next < self.copies[index].words.len() {
            return self.after(delay, Event::CopyStep(index));
        }
        let copy = &self.copies[index];
        let mut sums = vec![0_u64; copy.sums.len()];
        for ((layer, word), value) in copy.words.iter().zip(&copy.got) {
            let sum = &mut sums[*layer as usize];
            *sum = sum.wrapping_add(term(copy.seed, word, *value));
        }
        let result = match sums[..] == copy.sums[..] {
            true => Ok(()),
            false => Err(ErrorKind::Corrupt.error("other bytes than were sent")),
        };
        let (load, chunk, grant) = (copy.load, copy.chunk, copy.grant);
        if result.is_ok() {
            self.copy_verified(index);
        } else {
            self.counts.step("copy found corrupt", self.now);
            self.explain_corruption(proc, load, grant);
        }
        self.later(delay, proc, Input::Copied(Copied { load, chunk, result }));
    }

    /// What a copy read: its key, and for each word the layer, block and place in it.
    pub(crate) fn copied_words(
        &self,
        index: usize,
    ) -> (ChunkKey, LoadId, u32, usize, impl Iterator<Item = (u32, Word, u64)>) {
        let copy = &self.copies[index];
        let words = copy.words.iter().zip(&copy.got).map(|((l, w), v)| (*l, *w, *v));
        (copy.key, copy.load, copy.chunk, copy.reader.0, words)
    }
}
