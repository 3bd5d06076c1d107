//! The consumer's end.

use std::collections::HashMap;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use kvxfer_core::path::PathName;
use kvxfer_core::transport::SegmentHandle;
use kvxfer_core::{Error, ErrorKind, Incarnation, Result, SegmentId};

use super::handle::Handle;
use super::{NAME, STEPS, lanes, message, read_message};
use crate::memory::Mapping;
use crate::transport::target::{Leave, Target};
use crate::transport::watch::{Interest, Watch};
use crate::ucx::{
    Context, EndpointId, Event, Memory, Registration, RemoteAddress, Worker, compatible,
};

const READ: Interest = Interest { read: true, write: false };

/// Shows segments to [`Ucx`](super::Ucx)s, and answers them.
#[derive(Debug)]
pub struct UcxTarget {
    context: Arc<Context>,
    watch: Watch,
    writers: HashMap<Incarnation, Writer>,
    exports: HashMap<SegmentId, Export>,
    lost: Vec<(Incarnation, Error)>,
}

/// In this order: what arrives ends before the memory goes that it may name.
#[derive(Debug)]
struct Writer {
    worker: Worker,
    /// To the writer, for answers.
    end: EndpointId,
    /// What it has keys to, replaced memory included: it may not know yet.
    shown: Vec<Arc<Registration>>,
}

/// What is behind a segment now.
#[derive(Debug)]
struct Export {
    memory: Arc<Mapping>,
    registration: Arc<Registration>,
}

impl UcxTarget {
    /// No writers, and nothing is shown.
    ///
    /// # Errors
    /// `Io`: no descriptors are left.
    pub fn new(context: Arc<Context>) -> Result<Self> {
        let watch = Watch::new()?;
        let (writers, exports) = (HashMap::new(), HashMap::new());
        Ok(Self { context, watch, writers, exports, lost: Vec::new() })
    }

    /// The registration of a segment's memory: the one that there is, if it is still of that memory.
    fn registration(
        &mut self,
        segment: SegmentId,
        memory: &Arc<Mapping>,
    ) -> Result<Arc<Registration>> {
        if let Some(export) = self.exports.get(&segment)
            && Arc::ptr_eq(&export.memory, memory)
        {
            return Ok(Arc::clone(&export.registration));
        }
        let memory = Arc::clone(memory);
        let of = Memory::Segment(Arc::clone(&memory));
        let registration = Arc::new(Registration::target(&self.context, of)?);
        let export = Export { memory, registration: Arc::clone(&registration) };
        self.exports.insert(segment, export);
        Ok(registration)
    }

    /// Lets all workers work, and notes which writers are lost.
    fn work(&mut self) {
        for (&name, writer) in &mut self.writers {
            if let Err(error) = writer.work() {
                self.lost.push((name, error));
            }
        }
        for at in 0..self.lost.len() {
            self.forget(self.lost[at].0);
        }
    }

    fn forget(&mut self, writer: Incarnation) {
        if let Some(writer) = self.writers.remove(&writer) {
            self.watch.remove(&writer.worker);
        }
    }
}

impl Writer {
    /// Takes what came, and answers.
    fn work(&mut self) -> Result<()> {
        let mut steps = 0..STEPS;
        while self.worker.progress() && steps.next().is_some() {}
        while let Some(event) = self.worker.next_event() {
            match event {
                // Whatever else it is, the writer did not send it.
                Event::Message(ping) => {
                    if let Some((number, secret)) = read_message(&ping) {
                        self.worker.send(self.end, &message(number, &secret), number)?;
                    }
                }
                Event::Done { result, .. } => result?,
                Event::Lost(_, error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Target for UcxTarget {
    fn name(&self) -> PathName {
        NAME
    }

    fn accepts(&self, ability: &[u8]) -> Result<()> {
        let theirs = RemoteAddress::from_bytes(ability)?.version();
        compatible(self.context.library().version(), theirs)
    }

    fn welcome(&mut self, writer: Incarnation, ability: &[u8], _: Option<IpAddr>) -> Result<()> {
        self.cut_off(writer);
        let address = RemoteAddress::from_bytes(ability)?;
        let mut worker = Worker::new(&self.context)?;
        let end = worker.connect(&address)?;
        self.watch.add(&worker, 0, READ)?;
        self.writers.insert(writer, Writer { worker, end, shown: Vec::new() });
        Ok(())
    }

    fn export(
        &mut self,
        writer: Incarnation,
        segment: SegmentId,
        memory: &Arc<Mapping>,
    ) -> Result<SegmentHandle> {
        let registration = self.registration(segment, memory)?;
        let writer = self.writers.get_mut(&writer).ok_or_else(|| {
            ErrorKind::PeerLost.error(format!("writer {writer} is not connected by {NAME}"))
        })?;
        let first = writer.shown.is_empty();
        let address = first.then(|| writer.worker.address()).transpose()?;
        let handle = Handle { address, memory: registration.share()? }.encode();
        if !writer.shown.iter().any(|shown| Arc::ptr_eq(shown, &registration)) {
            writer.shown.push(registration);
        }
        Ok(handle)
    }

    fn cut_off(&mut self, writer: Incarnation) {
        self.forget(writer);
        self.lost.retain(|(lost, _)| *lost != writer);
    }

    fn poll(&mut self, _budget: u64, _leave: Leave<'_>, lost: &mut Vec<(Incarnation, Error)>) {
        self.work();
        lost.append(&mut self.lost);
    }

    fn rests(&mut self) -> bool {
        self.work();
        self.lost.is_empty()
            && self.writers.values_mut().all(|writer| writer.worker.arm() == Ok(true))
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.watch.fd()
    }

    fn lanes(&self, writer: Incarnation) -> Option<String> {
        let writer = self.writers.get(&writer)?;
        lanes(&writer.worker, writer.end)
    }
}
