//! A consumer's half of an agent: its state machine, its memory, and what receives bytes into it.

use std::net::IpAddr;

use kvxfer_core::path::{Ability, PathName};
use kvxfer_core::session::Consumer;
use kvxfer_core::transport::SegmentHandle;
use kvxfer_core::{Error, ErrorKind, Incarnation, Result, SegmentId};

use super::store::Store;
use crate::transport::Target;
use crate::transport::local::LocalExports;
use crate::transport::target::Incoming;

pub(super) struct Consuming {
    pub(super) session: Consumer,
    pub(super) store: Store,
    /// Of the paths whose bytes we take ourselves.
    pub(super) targets: Vec<Box<dyn Target>>,
    /// Paths that we can't have, and why.
    pub(super) unable: Vec<Ability>,
}

impl Consuming {
    /// What we are able to do with a producer that says this of itself.
    pub(super) fn abilities(&self, theirs: &[Ability]) -> Vec<Ability> {
        let mapped: &[PathName] = match self.store {
            Store::Host(_) => &[PathName::Local, PathName::Shm],
            Store::Device(_) => &[PathName::CudaIpc],
        };
        let mapped = mapped.iter().map(|&path| Ability::able(path, Vec::new()));
        let received = self.targets.iter().map(|target| {
            let their = theirs.iter().find(|ability| ability.path == target.name().as_str());
            match their
                .and_then(|ability| ability.able.as_deref().ok())
                .map(|of| target.accepts(of))
            {
                Some(Err(error)) => Ability::unable(target.name(), error.to_string()),
                _ => Ability::able(target.name(), Vec::new()),
            }
        });
        mapped.chain(received).chain(self.unable.iter().cloned()).collect()
    }

    /// Which of its ways the path from a producer takes; see [`Target::lanes`].
    pub(super) fn lanes(&self, path: PathName, producer: Incarnation) -> Option<String> {
        self.targets.iter().find(|target| target.name() == path)?.lanes(producer)
    }

    fn target(&mut self, path: PathName) -> Option<&mut (dyn Target + 'static)> {
        self.targets.iter_mut().find(|target| target.name() == path).map(|target| &mut **target)
    }

    /// A producer is to write by that path. `theirs` is what it says of itself, `local` the address of ours that it
    /// dialled.
    pub(super) fn welcome(
        &mut self,
        path: PathName,
        producer: Incarnation,
        local: Option<IpAddr>,
        theirs: &[Ability],
    ) -> Result<()> {
        let Some(target) = self.target(path) else { return Ok(()) };
        let ability = theirs.iter().find(|ability| ability.path == path.as_str());
        let blob = ability.and_then(|ability| ability.able.as_deref().ok()).unwrap_or_default();
        target.welcome(producer, blob, local)
    }

    /// What a segment's one writer needs to reach it by that path.
    pub(super) fn export(
        &mut self,
        path: PathName,
        exports: &LocalExports,
        segment: SegmentId,
        writer: Incarnation,
    ) -> Result<SegmentHandle> {
        let Self { store, targets, .. } = self;
        match (targets.iter_mut().find(|target| target.name() == path), &*store) {
            (Some(target), Store::Host(host)) => {
                target.export(writer, segment, host.segment(segment)?)
            }
            (Some(_), Store::Device(_)) => Err(ErrorKind::NoPath
                .error(format!("{path} does not reach the pool, which is on a GPU"))),
            (None, _) => store.export(path, exports, segment, writer),
        }
    }

    /// Ends what a producer sends. Whether nothing of it can arrive after that: a fence.
    pub(super) fn cut_off(&mut self, path: PathName, producer: Incarnation) -> bool {
        let target = self.target(path);
        let fenced = target.is_some();
        if let Some(target) = target {
            target.cut_off(producer);
        }
        fenced
    }

    /// Takes about `budget` bytes of what has come. Producers that were cut off are appended to `lost`.
    pub(super) fn receive(&mut self, budget: u64, lost: &mut Vec<(Incarnation, Error)>) {
        let session = &self.session;
        let leave = |incoming: &Incoming| {
            let Incoming { writer, grant, segment, offset, len } = *incoming;
            session.may_write(writer, grant, segment, offset, len)
        };
        for target in &mut self.targets {
            target.poll(budget, &leave, lost);
        }
    }

    /// Whether the caller may sleep until something comes.
    pub(super) fn rests(&mut self) -> bool {
        self.targets.iter_mut().all(|target| target.rests())
    }
}
