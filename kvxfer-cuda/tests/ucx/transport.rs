//! The transport over workers: consumers that go away with posts under way.

use std::sync::Arc;
use std::time::Instant;

use kvxfer_core::transport::{Completion, Post, RegionId, Transport as _, Write};
use kvxfer_core::{ErrorKind, GrantId, Incarnation, PostId, SegmentId};
use kvxfer_cuda::memory::{HostPool, Regions};
use kvxfer_cuda::transport::{Target as _, Ucx, UcxTarget};

use crate::harness::*;

const BYTES: u64 = 32 << 20;
const PIECE: u64 = 4 << 20;
const WRITER: Incarnation = Incarnation([1; 16]);
const OWNER: Incarnation = Incarnation([2; 16]);
const SEGMENT: SegmentId = SegmentId(0);

struct Pair {
    ucx: Ucx,
    target: Option<UcxTarget>,
    pool: HostPool,
    out: Vec<Completion>,
}

impl Pair {
    fn new() -> Option<Self> {
        let context = context()?;
        let mut regions = Regions::new();
        regions.keep(content(BYTES)).unwrap();
        let ucx = Ucx::new(&context, Arc::new(regions)).unwrap();
        let target = Some(UcxTarget::new(context).unwrap());
        let pool = HostPool::new(1, BYTES).unwrap();
        let mut pair = Self { ucx, target, pool, out: Vec::new() };
        pair.connect();
        Some(pair)
    }

    fn connect(&mut self) {
        let target = self.target.as_mut().unwrap();
        target.welcome(WRITER, &self.ucx.ability().unwrap(), None).unwrap();
        let handle = target.export(WRITER, SEGMENT, self.pool.segment(SEGMENT).unwrap()).unwrap();
        self.ucx.attach(OWNER, SEGMENT, handle).unwrap();
    }

    fn post(&mut self, id: u64) -> kvxfer_core::Result<()> {
        let at = id * PIECE % BYTES;
        let writes =
            [Write { region: RegionId(0), src: at, segment: SEGMENT, dst: at, len: PIECE }];
        let grant = Some(GrantId(1));
        self.ucx.post(Post { id: PostId(id), peer: OWNER, grant, seed: 0, writes: &writes })
    }

    /// Both sides work until `done`.
    #[track_caller]
    fn until(&mut self, done: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !done(self) {
            assert!(start.elapsed() < DEADLINE, "it does not happen");
            self.ucx.poll(PIECE, &mut self.out);
            if let Some(target) = &mut self.target {
                target.poll(PIECE, &|_| Ok(()), &mut Vec::new());
            }
        }
    }

    fn started(&self) -> bool {
        seen(&self.pool)[..64] == content(64)
    }

    /// All posts have ended, each once; the last one badly.
    #[track_caller]
    fn all_ended(&mut self, posts: u64) {
        self.until(|pair| pair.ucx.pending() == 0);
        self.ucx.poll(u64::MAX, &mut self.out);
        let mut ids: Vec<_> = self.out.iter().map(|end| end.id.0).collect();
        ids.sort_unstable();
        assert_eq!(ids, (0..posts).collect::<Vec<_>>());
        for end in self.out.drain(..) {
            let kind = end.result.map_err(|error| error.kind());
            assert!(kind.is_ok() || kind == Err(ErrorKind::PeerLost), "{kind:?}");
            assert!(end.id.0 != posts - 1 || kind.is_err(), "all had arrived: nothing was tested");
        }
    }
}

#[test]
fn a_writer_that_is_cut_off_has_each_post_ended_once_and_can_be_welcomed_again() {
    let Some(mut pair) = Pair::new() else { return };
    (0..8).for_each(|id| pair.post(id).unwrap());
    pair.until(Pair::started);
    pair.target.as_mut().unwrap().cut_off(WRITER);
    let before = seen(&pair.pool);
    pair.all_ended(8);
    assert!(seen(&pair.pool) == before, "bytes arrived behind the fence");
    let (lost, why) = pair.ucx.lost().unwrap();
    assert_eq!((lost, why.kind()), (OWNER, ErrorKind::PeerLost), "{why}");
    assert!(pair.ucx.lost().is_none() && !pair.ucx.holds(OWNER, None));
    assert_eq!(pair.post(8).unwrap_err().kind(), ErrorKind::PeerLost);

    pair.connect();
    (0..8).for_each(|id| pair.post(id).unwrap());
    pair.until(|pair| pair.ucx.pending() == 0);
    assert!(pair.out.drain(..).all(|end| end.result.is_ok()));
    assert!(seen(&pair.pool) == content(BYTES));
    assert!(pair.ucx.lost().is_none());
}

#[test]
fn a_target_that_is_gone_ends_what_is_under_way_and_what_waits() {
    let Some(mut pair) = Pair::new() else { return };
    (0..16).for_each(|id| pair.post(id).unwrap());
    pair.until(Pair::started);
    pair.target = None;
    pair.all_ended(16);
    assert!(pair.ucx.lost().is_some() && pair.ucx.lost().is_none());
}

#[test]
fn letting_go_of_a_consumer_that_does_nothing_ends_its_posts() {
    let Some(mut pair) = Pair::new() else { return };
    (0..8).for_each(|id| pair.post(id).unwrap());
    pair.ucx.poll(BYTES, &mut pair.out);
    assert!(pair.ucx.holds(OWNER, Some(SEGMENT)));
    let idle = pair.target.take();
    pair.ucx.detach(OWNER, None);
    pair.all_ended(8);
    assert!(pair.ucx.lost().is_none() && !pair.ucx.holds(OWNER, None));
    drop(idle);
}
