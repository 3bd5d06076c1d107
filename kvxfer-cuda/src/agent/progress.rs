//! The progress thread: performs what the state machines decide.
//!
//! One turn: read what came, take what the engine asked, move some bytes, fire timers, perform actions. Input
//! comes before timers, so that a paused agent does not expire what was renewed in time. While bytes are to be
//! moved the thread does not sleep; it moves a bounded amount between two looks at the sockets. Otherwise it
//! parks until a message, a command or a deadline.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use kvxfer_core::layout::KvLayout;
use kvxfer_core::plan::LayerMemory;
use kvxfer_core::pool::Geometry;
use kvxfer_core::session::{
    Consumer, ConsumerAction, ConsumerConfig, LoadRequest, Producer, ProducerAction, ProducerConfig,
};
use kvxfer_core::wire::{self, Hello, Message, Purpose};
use kvxfer_core::{BlockId, Error, ErrorKind, Incarnation, LinkId, Result, SegmentId, Time, key};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::loads::{Job, Loads};
use super::push::{Pushes, Waiting};
use super::{AgentStats, Command, KvLayer, Shared, closed};
use crate::config::{AgentConfig, Role};
use crate::control::{Address, Control, ControlConfig, Event, Limits, Waker};
use crate::identity;
use crate::memory::{HostPool, Regions};
use crate::transport::local::{Local, LocalExports};
use crate::transport::shm;

/// Bytes moved between two looks at the sockets: about a millisecond's.
const BUDGET: u64 = 4 << 20;
/// How often the death of a process that we lost the link to is looked for.
const ORPHAN_POLL: Duration = Duration::from_millis(10);

/// Who is at the other end of a link.
struct Link {
    peer: Incarnation,
    name: String,
    kind: Kind,
    pidfd: Option<OwnedFd>,
}

enum Kind {
    /// We push to it.
    Consumer,
    /// It pushes to us, on this path.
    Producer(&'static str),
    /// Our engine's scheduler half.
    Observer,
}

/// What a consumer has beside its state machine.
struct Consuming {
    session: Consumer,
    pool: HostPool,
}

pub(super) struct Progress {
    config: AgentConfig,
    shared: Arc<Shared>,
    commands: Receiver<Command>,
    incarnation: Incarnation,
    origin: Instant,
    control: Control,
    /// Tells agents of this process that we are one of them.
    local: LocalExports,
    events: Vec<Event>,
    links: HashMap<LinkId, Link>,
    /// Writers whose link is gone and whose process may live.
    orphans: Vec<(Incarnation, OwnedFd)>,
    consuming: Option<Consuming>,
    producer: Option<Producer>,
    /// Both from [`Command::Register`] on.
    pushes: Option<Pushes>,
    loads: Option<Loads>,
    closing: bool,
}

impl Progress {
    pub(super) fn new(
        config: AgentConfig,
        shared: Arc<Shared>,
        commands: Receiver<Command>,
    ) -> Result<Self> {
        let incarnation = identity::incarnation()?;
        // The pool first: it is what most often cannot be had.
        let consuming = match config.role {
            Role::Producer => None,
            Role::Consumer | Role::Both => Some(consuming(&config)?),
        };
        let producer = config.role.produces().then(|| {
            Producer::new(ProducerConfig {
                layout: config.layout.clone(),
                consumers: config.peers.len(),
                hold: config.hold,
            })
        });
        let hello = Hello {
            versions: wire::VERSIONS,
            key_versions: (key::KEY_VERSION, key::KEY_VERSION),
            incarnation,
            purpose: Purpose::Push,
            boot_id: identity::boot_id()?,
            unix_path: None,
            name: config.name.clone(),
        };
        let mut control = ControlConfig::new(hello);
        control.listen = config.listen.clone().filter(|_| config.role.consumes());
        control.socket_dir = Some(config.socket_dir.clone());
        control.peers = config.peers.clone();
        control.allow_insecure = config.allow_insecure;
        control.limits = Limits { silence: config.silence, ..Limits::default() };
        Ok(Self {
            control: Control::new(control)?,
            local: LocalExports::new(incarnation),
            producer: producer.transpose()?,
            consuming,
            config,
            shared,
            commands,
            incarnation,
            origin: Instant::now(),
            events: Vec::new(),
            links: HashMap::new(),
            orphans: Vec::new(),
            pushes: None,
            loads: None,
            closing: false,
        })
    }

    pub(super) fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    pub(super) fn waker(&self) -> Waker {
        self.control.waker()
    }

    pub(super) fn addresses(&self) -> &[Address] {
        self.control.addresses()
    }

    fn now(&self) -> Time {
        self.origin.elapsed()
    }

    pub(super) fn run(mut self) {
        while !self.closing {
            if let Err(error) = self.turn() {
                tracing::error!(%error, name = self.config.name, "the agent stops");
                break;
            }
        }
        self.shut();
    }

    fn turn(&mut self) -> Result<()> {
        let timeout = self.timeout();
        let mut events = std::mem::take(&mut self.events);
        let now = self.now();
        self.control.poll(now, timeout, &mut events)?;
        let now = self.now();
        for event in events.drain(..) {
            self.event(now, event);
        }
        self.events = events;
        while let Ok(command) = self.commands.try_recv() {
            self.command(now, command);
        }
        self.find_dead(now);
        self.perform(now);
        self.move_bytes();
        let now = self.now();
        if let Some(producer) = &mut self.producer {
            producer.tick(now);
        }
        if let Some(consuming) = &mut self.consuming {
            consuming.session.tick(now);
        }
        self.perform(now);
        Ok(())
    }

    fn timeout(&self) -> Option<Duration> {
        let busy = self.pushes.as_ref().is_some_and(|pushes| !pushes.is_idle())
            || self.loads.as_ref().is_some_and(|loads| !loads.is_idle())
            || !self.commands.is_empty();
        if busy {
            return Some(Duration::ZERO);
        }
        let now = self.now();
        let session = self.consuming.as_ref().and_then(|c| c.session.next_timeout());
        let producer = self.producer.as_ref().and_then(Producer::next_timeout);
        let orphans = (!self.orphans.is_empty()).then(|| now + ORPHAN_POLL);
        [session, producer, orphans, self.control.next_timeout()]
            .into_iter()
            .flatten()
            .min()
            .map(|at| at.saturating_sub(now))
    }

    // ---- what came ------------------------------------------------------------------------------

    fn event(&mut self, now: Time, event: Event) {
        match event {
            Event::Up {
                link, dialled, purpose, peer, pidfd, can_pass_fds, why_not_unix, ..
            } => {
                let up = Up { link, dialled, purpose, peer, pidfd, can_pass_fds, why_not_unix };
                if let Err(error) = self.up(now, up) {
                    self.refuse(link, &error);
                }
            }
            Event::Message { link, message, fds } => {
                if let Err(error) = self.message(now, link, message, fds) {
                    self.close_link(now, link, &error);
                }
            }
            Event::Down { link, error } => self.down(now, link, &error),
            Event::DialFailed { peer, error, retry_in } => {
                let address = &self.config.peers[peer];
                tracing::warn!(%address, %error, ?retry_in, "cannot reach a consumer");
            }
        }
    }

    fn up(&mut self, now: Time, up: Up) -> Result<()> {
        let Up { link, dialled, purpose, peer, pidfd, can_pass_fds, why_not_unix } = up;
        let Hello { incarnation, name, .. } = peer;
        let kind = match (purpose, dialled) {
            (Purpose::Push, Some(index)) => {
                let producer = self.producer.as_mut().ok_or_else(|| wrong_role("push"))?;
                producer.consumer_connected(index, link, incarnation);
                tracing::info!(peer = %incarnation, name, "connected to a consumer");
                Kind::Consumer
            }
            (Purpose::Push, None) => {
                let consuming = self.consuming.as_mut().ok_or_else(|| wrong_role("take a push"))?;
                let path = choose_path(
                    self.config.require_path.as_deref(),
                    incarnation,
                    can_pass_fds,
                    why_not_unix,
                )?;
                consuming.session.producer_connected(now, link, incarnation);
                tracing::info!(peer = %incarnation, name, path, "a producer connected");
                Kind::Producer(path)
            }
            (Purpose::Observe, None) => {
                if let Some(consuming) = &mut self.consuming {
                    consuming.session.observer_connected(now, link, incarnation);
                }
                Kind::Observer
            }
            (Purpose::Observe, Some(_)) | (Purpose::Locate, _) => {
                return Err(ErrorKind::Protocol.error("a link of that purpose is not for an agent"));
            }
        };
        self.links.insert(link, Link { peer: incarnation, name, kind, pidfd });
        Ok(())
    }

    fn message(
        &mut self,
        now: Time,
        id: LinkId,
        message: Message,
        fds: Vec<OwnedFd>,
    ) -> Result<()> {
        let Some(link) = self.links.get(&id) else { return Ok(()) };
        match (&link.kind, message) {
            (
                Kind::Consumer,
                Message::Segment { segment, bytes, transport, blob, generation: _ },
            ) => {
                if let Some(path) = &self.config.require_path
                    && *path != transport
                {
                    return Err(ErrorKind::NoPath.error(format!(
                        "{} offers path {transport}, {path} is required",
                        link.name
                    )));
                }
                let peer = link.peer;
                let pushes = self.pushes.as_mut().ok_or_else(closed)?;
                pushes.attach(peer, segment, &transport, blob, bytes, fds)
            }
            (Kind::Consumer, message) => match &mut self.producer {
                Some(producer) => producer.received_from_consumer(now, id, message),
                None => Ok(()),
            },
            (Kind::Producer(_), message) => match &mut self.consuming {
                Some(consuming) => consuming.session.received(now, id, message),
                None => Ok(()),
            },
            (Kind::Observer, message) => self.received_from_observer(now, id, message),
        }
    }

    fn received_from_observer(&mut self, now: Time, link: LinkId, message: Message) -> Result<()> {
        let offers = matches!(message, Message::Offer { .. } | Message::Withdraw { .. });
        match (&mut self.producer, &mut self.consuming) {
            (Some(producer), _) if offers => producer.received_from_observer(now, link, message),
            (_, Some(consuming)) if !offers => consuming.session.received(now, link, message),
            _ => Err(wrong_role(if offers { "offer" } else { "be claimed from" })),
        }
    }

    fn down(&mut self, now: Time, id: LinkId, error: &Error) {
        let Some(link) = self.links.remove(&id) else { return };
        tracing::info!(peer = %link.peer, name = link.name, %error, "a link ended");
        if let Some(producer) = &mut self.producer {
            producer.disconnected(now, id);
        }
        if let Some(consuming) = &mut self.consuming {
            consuming.session.disconnected(now, id);
        }
        match link.kind {
            Kind::Consumer => {
                if let Some(pushes) = &mut self.pushes {
                    pushes.detach(link.peer, None);
                }
            }
            Kind::Producer(_) => self.orphans.extend(link.pidfd.map(|fd| (link.peer, fd))),
            Kind::Observer => {}
        }
    }

    /// Closes a link that never became one of ours.
    fn refuse(&mut self, link: LinkId, error: &Error) {
        tracing::warn!(%error, "a link was refused");
        self.control.close(link, &wire::bounds::reason(error.to_string()));
    }

    fn close_link(&mut self, now: Time, link: LinkId, error: &Error) {
        let name = self.links.get(&link).map_or("", |link| link.name.as_str());
        tracing::warn!(name, %error, "closing a link");
        self.control.close(link, &wire::bounds::reason(error.to_string()));
        self.down(now, link, error);
    }

    /// A process that ended writes no more.
    fn find_dead(&mut self, now: Time) {
        let Some(consuming) = &mut self.consuming else { return };
        let connected = |peer: Incarnation| self.links.values().any(|link| link.peer == peer);
        self.orphans.retain(|(peer, pidfd)| {
            if connected(*peer) || !consuming.session.is_writer(*peer) {
                return false;
            }
            let dead = has_ended(pidfd);
            if dead {
                consuming.session.writer_dead(now, *peer);
            }
            !dead
        });
    }

    // ---- what the engine asks -------------------------------------------------------------------

    fn command(&mut self, now: Time, command: Command) {
        match command {
            Command::Register(layers, reply) => {
                let _ = reply.send(self.register(layers));
            }
            Command::BeginStep(ranges) => {
                if let Some(producer) = &mut self.producer {
                    producer.begin_step(now, ranges);
                }
            }
            Command::LayerReady(layer) => {
                if let Some(producer) = &mut self.producer {
                    producer.layer_ready(layer);
                }
            }
            Command::EndStep => {
                if let Some(producer) = &mut self.producer {
                    producer.end_step();
                }
            }
            Command::Load(request, blocks) => self.load(now, request, blocks),
            Command::Stats(reply) => {
                let _ = reply.send(self.stats());
            }
            Command::Close => self.closing = true,
        }
    }

    fn register(&mut self, layers: Vec<KvLayer>) -> Result<()> {
        if self.loads.is_some() {
            return Err(ErrorKind::Config.error("the engine's memory was registered before"));
        }
        let (regions, memory) = regions(&self.config.layout, &layers)?;
        let regions = Arc::new(regions);
        let layout = &self.config.layout;
        self.loads = Some(Loads::new(layout.clone(), Arc::clone(&regions), memory.clone()));
        self.pushes = Some(Pushes::new(layout.clone(), regions, memory));
        if self.config.role.produces() {
            for peer in 0..self.config.peers.len() {
                self.control.dial(peer, Purpose::Push);
            }
        }
        Ok(())
    }

    fn load(&mut self, now: Time, request: LoadRequest, blocks: Vec<Vec<BlockId>>) {
        let begun = match (&mut self.loads, &self.consuming) {
            (Some(loads), Some(_)) => loads.begin(&request, blocks),
            (_, None) => Err(wrong_role("load")),
            (None, _) => Err(ErrorKind::Config.error("no memory was registered to load into")),
        };
        match (begun, &mut self.consuming) {
            (Ok(()), Some(consuming)) => consuming.session.load(now, request),
            (Err(error), _) => self.loaded(request.load, Err(error)),
            (Ok(()), None) => {}
        }
    }

    fn stats(&self) -> AgentStats {
        let mut stats = AgentStats { links: self.links.len() as u64, ..AgentStats::default() };
        if let Some(consuming) = &self.consuming {
            stats.consumer = consuming.session.stats();
            stats.pool = consuming.session.pool();
            stats.pages_leaked = consuming.session.pages_leaked();
        }
        if let Some(producer) = &self.producer {
            stats.producer = producer.stats();
            stats.open_offers = producer.open_offers() as u64;
        }
        if let Some(pushes) = &self.pushes {
            stats.pushed_bytes = pushes.bytes;
            stats.posts = pushes.posts;
            stats.runs = pushes.runs;
        }
        stats.loaded_bytes = self.loads.as_ref().map_or(0, |loads| loads.bytes);
        stats
    }

    // ---- bytes ----------------------------------------------------------------------------------

    fn move_bytes(&mut self) {
        if let (Some(pushes), Some(producer)) = (&mut self.pushes, &mut self.producer) {
            pushes.progress(BUDGET, producer);
        }
        if let (Some(loads), Some(consuming)) = (&mut self.loads, &mut self.consuming)
            && let Some(copied) = loads.progress(&consuming.pool)
        {
            consuming.session.copied(self.origin.elapsed(), copied);
        }
    }

    // ---- what the state machines want ------------------------------------------------------------

    fn perform(&mut self, now: Time) {
        while let Some(action) = self.producer.as_mut().and_then(Producer::poll_action) {
            match action {
                ProducerAction::Send { link, message } => self.send(now, link, &message),
                ProducerAction::Post { post, peer, grant, key, layer, extents, blocks, .. } => {
                    if let Some(pushes) = &mut self.pushes {
                        pushes.enqueue(Waiting { post, peer, grant, key, layer, extents, blocks });
                    }
                }
                ProducerAction::Detach { link, peer, segment, generation } => {
                    if let Some(pushes) = &mut self.pushes {
                        pushes.detach(peer, Some(segment));
                    }
                    self.send(now, link, &Message::Retired { segment, generation });
                }
            }
        }
        while let Some(action) = self.consuming.as_mut().and_then(|c| c.session.poll_action()) {
            self.perform_consumer(now, action);
        }
    }

    fn perform_consumer(&mut self, now: Time, action: ConsumerAction) {
        match action {
            ConsumerAction::Send { link, message } => self.send(now, link, &message),
            ConsumerAction::Export { link, segment, generation } => {
                if let Err(error) = self.export(link, segment, generation) {
                    self.close_link(now, link, &error);
                }
            }
            ConsumerAction::Copy { load, chunk, key, grant, tokens, extents, sums } => {
                #[cfg(feature = "faults")]
                self.flip(&extents);
                if let Some(loads) = &mut self.loads {
                    loads.enqueue(Job { load, chunk, key, grant, tokens, extents, sums });
                }
            }
            ConsumerAction::Loaded { load, result } => self.loaded(load, result),
            ConsumerAction::Replace { segment, live } => self.replace(now, segment, &live),
            ConsumerAction::Close { link, error } => self.close_link(now, link, &error),
        }
    }

    fn send(&mut self, now: Time, link: LinkId, message: &Message) {
        #[cfg(feature = "faults")]
        if self.config.fault == Some(crate::config::Fault::HoldCommit)
            && matches!(message, Message::Commit { .. })
        {
            return;
        }
        if let Err(error) = self.control.send(link, message, &[]) {
            self.close_link(now, link, &error);
        }
    }

    fn export(&mut self, link: LinkId, segment: SegmentId, generation: u32) -> Result<()> {
        let Some(consuming) = &self.consuming else { return Ok(()) };
        let Some(Kind::Producer(path)) = self.links.get(&link).map(|link| &link.kind) else {
            return Ok(());
        };
        let handle = match *path {
            "local" => self.local.export(&consuming.pool, segment)?,
            _ => shm::export(&consuming.pool, segment)?,
        };
        let message = Message::Segment {
            segment,
            generation,
            bytes: handle.bytes,
            transport: (*path).into(),
            blob: handle.blob,
        };
        let fds: Vec<_> = handle.fds.iter().map(AsFd::as_fd).collect();
        self.control.send(link, &message, &fds)
    }

    fn replace(&mut self, now: Time, segment: SegmentId, live: &[kvxfer_core::pool::Extent]) {
        let Some(consuming) = &mut self.consuming else { return };
        let page = self.config.layout.page_bytes();
        let live: Vec<(u64, u64)> = live
            .iter()
            .map(|extent| (u64::from(extent.page) * page, u64::from(extent.pages) * page))
            .collect();
        match consuming.pool.replace(segment, &live) {
            Ok(_) => consuming.session.replaced(now, segment),
            // The pages stay quarantined: less room, nothing wrong.
            Err(error) => tracing::error!(%error, %segment, "cannot replace a segment's memory"),
        }
    }

    fn loaded(&mut self, load: kvxfer_core::LoadId, result: Result<()>) {
        let mut paths: Vec<&str> = self
            .links
            .values()
            .filter_map(|link| match link.kind {
                Kind::Producer(path) => Some(path),
                _ => None,
            })
            .collect();
        paths.sort_unstable();
        paths.dedup();
        let path = paths.join(",");
        let loaded = match &mut self.loads {
            Some(loads) => loads.end(load, result, &path),
            None => super::Loaded { load, result, bytes: 0, tokens: 0, seconds: 0.0, path },
        };
        self.shared.loaded.lock().push(loaded);
    }

    /// Nothing is left that could touch memory or keep a caller waiting.
    fn shut(&mut self) {
        let links: Vec<LinkId> = self.links.keys().copied().collect();
        let now = self.now();
        for link in links {
            self.close_link(now, link, &ErrorKind::Closed.error("the agent was closed"));
        }
        self.pushes = None;
        if let Some(loads) = &mut self.loads {
            self.shared.loaded.lock().extend(loads.fail_all(&closed()));
        }
    }

    #[cfg(feature = "faults")]
    fn flip(&mut self, extents: &[kvxfer_core::pool::Extent]) {
        let Some(consuming) = &self.consuming else { return };
        if self.config.fault != Some(crate::config::Fault::FlipAfterCommit) {
            return;
        }
        let Some(extent) = extents.first() else { return };
        let offset = u64::from(extent.page) * self.config.layout.page_bytes();
        if let Ok(byte) = consuming.pool.segment(extent.segment).and_then(|map| map.at(offset, 1)) {
            // SAFETY: `at` checked the range. That the byte is another one then is the purpose.
            unsafe { *byte ^= 1 };
        }
    }
}

struct Up {
    link: LinkId,
    dialled: Option<usize>,
    purpose: Purpose,
    peer: Hello,
    pidfd: Option<OwnedFd>,
    can_pass_fds: bool,
    why_not_unix: Option<String>,
}

fn consuming(config: &AgentConfig) -> Result<Consuming> {
    let pages_per_segment = config.segment_pages();
    let page = config.layout.page_bytes();
    let pool = HostPool::new(config.segments, u64::from(pages_per_segment) * page)?;
    let session = Consumer::new(ConsumerConfig {
        layout: config.layout.clone(),
        geometry: Geometry { segments: config.segments, pages_per_segment },
        gc: config.gc,
        grant_ttl: config.grant_ttl,
        grant_cap: config.grant_cap,
        fence_timeout: config.fence_timeout,
        ask_timeout: config.ask_timeout,
        window_pages: u32::try_from(config.window / page).unwrap_or(u32::MAX).max(1),
        overtakes: 8,
        lost_ttl: config.gc.unclaimed_ttl,
    })?;
    Ok(Consuming { session, pool })
}

/// The path on which a producer's bytes come. `local` beats `shm`; there is no third yet.
fn choose_path(
    required: Option<&str>,
    peer: Incarnation,
    can_pass_fds: bool,
    why_not_unix: Option<String>,
) -> Result<&'static str> {
    let path = match (Local::reaches(peer), can_pass_fds) {
        (true, _) => "local",
        (false, true) => "shm",
        (false, false) => {
            let why = why_not_unix.unwrap_or_else(|| "the link is not a Unix socket".into());
            return Err(ErrorKind::NoPath.error(format!("no path to this producer: {why}")));
        }
    };
    match required {
        Some(required) if required != path => Err(ErrorKind::NoPath
            .error(format!("the best path is {path}, and {required} is required"))
            .fix("unset require_path, or start the two where that path exists")),
        _ => Ok(path),
    }
}

/// Registers each layer's memory as a region of its own.
fn regions(layout: &KvLayout, layers: &[KvLayer]) -> Result<(Regions, Vec<LayerMemory>)> {
    if layers.len() != layout.layers() as usize {
        return Err(ErrorKind::Config.error(format!(
            "{} layers were registered, the layout has {}",
            layers.len(),
            layout.layers()
        )));
    }
    let mut regions = Regions::new();
    let mut memory = Vec::with_capacity(layers.len());
    for (flat, layer) in (0..).zip(layers) {
        let bytes = layout.layer(flat).and_then(|(group, at)| layout.block_bytes(group, at));
        if layer.stride < u64::from(bytes.unwrap_or(u32::MAX)) {
            return Err(ErrorKind::Config.error(format!(
                "layer {flat}: {} bytes between blocks of {bytes:?} bytes",
                layer.stride
            )));
        }
        let size = layer.stride.checked_mul(layer.blocks.into()).ok_or_else(|| {
            ErrorKind::Config.error(format!("layer {flat}: more memory than there is"))
        })?;
        // SAFETY: the promise of whoever called `Agent::register`.
        let region = unsafe { regions.register(layer.address as *mut u8, size) }?;
        memory.push(LayerMemory { region, base: 0, stride: layer.stride, blocks: layer.blocks });
    }
    Ok((regions, memory))
}

fn has_ended(pidfd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

fn wrong_role(what: &str) -> Error {
    ErrorKind::Config.error(format!("this agent's role does not let it {what}"))
}
