//! The progress thread: performs what the state machines decide.
//!
//! One turn: read what came, take what the engine asked, move some bytes, fire timers, perform actions. Input
//! comes before timers, so that a paused agent does not expire what was renewed in time. While bytes are to be
//! moved the thread does not sleep; it moves a bounded amount between two looks at the sockets. Otherwise it
//! parks until a message, a command or a deadline.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use kvxfer_core::pool::Geometry;
use kvxfer_core::session::{Consumer, ConsumerConfig, LoadRequest, Producer, ProducerConfig};
use kvxfer_core::transport::PROBE_BYTES;
use kvxfer_core::wire::message::Memory;
use kvxfer_core::wire::{self, Hello, Purpose};
use kvxfer_core::{BlockId, Error, ErrorKind, Incarnation, LinkId, Result, Time, key};

use super::consuming::Consuming;
use super::gpu::ReadGate;
use super::links::{Link, wrong_role};
use super::loads::Loads;
use super::paths::Failures;
use super::push::{News, Pushes};
use super::register::{pattern, register};
use super::store::{DeviceStore, Ended, HostStore, Store};
use super::ways::{targets, ucx};
use super::{AgentStats, Command, KvLayer, Shared, closed};
use crate::config::{AgentConfig, Role};
use crate::control::{Address, Control, ControlConfig, Event, Limits, Throttle, Waker};
use crate::device::{Copier, CopierConfig, DevicePool, Summed, upload};
use crate::driver::{Buffer, Device, Event as DeviceEvent};
use crate::identity;
use crate::memory::HostPool;
use crate::transport::local::LocalExports;
use crate::ucx::Context as UcxContext;

/// Bytes moved between two looks at the sockets: about a millisecond's.
const BUDGET: u64 = 4 << 20;
/// How often the death of a process that we lost the link to is looked for.
const ORPHAN_POLL: Duration = Duration::from_millis(10);
/// How long a closed agent waits for copies that can't be called back, and how often it looks.
const DRAIN: Duration = Duration::from_secs(5);
const DRAIN_POLL: Duration = Duration::from_millis(1);
/// How long a start waits for a GPU.
const START: Duration = Duration::from_secs(5);

pub(super) struct Progress {
    pub(super) config: AgentConfig,
    pub(super) shared: Arc<Shared>,
    pub(super) commands: Receiver<Command>,
    pub(super) incarnation: Incarnation,
    pub(super) origin: Instant,
    pub(super) control: Control,
    /// Tells agents of this process that we are one of them.
    pub(super) local: LocalExports,
    pub(super) events: Vec<Event>,
    pub(super) links: HashMap<LinkId, Link>,
    /// Writers whose link is gone and whose process may live.
    pub(super) orphans: Vec<(Incarnation, OwnedFd)>,
    pub(super) consuming: Option<Consuming>,
    pub(super) producer: Option<Producer>,
    /// Both from [`Command::Register`] on.
    pub(super) pushes: Option<Pushes>,
    pub(super) loads: Option<Loads>,
    /// Where the KV is, if not in host memory.
    pub(super) device: Option<Device>,
    /// Until [`Command::Register`]. What takes time on a GPU is done before this thread serves anybody.
    pub(super) copier: Option<Copier>,
    pattern: Option<Buffer>,
    /// UCX, or why it can't be had.
    pub(super) ucx: Result<Arc<UcxContext>>,
    /// Heard by the next [`Progress::end`].
    pub(super) ended: Vec<Ended>,
    /// Told by the next [`Progress::tell`].
    pub(super) news: Vec<News>,
    /// Writers whose connections broke: told by the next [`Progress::move_bytes`].
    pub(super) lost: Vec<(Incarnation, Error)>,
    /// Paths that did not work.
    pub(super) failures: Failures,
    pub(super) closing: bool,
    /// Of the log line that says what the pool can never hold.
    pub(super) too_large: Throttle,
}

impl Progress {
    pub(super) fn new(
        config: AgentConfig,
        shared: Arc<Shared>,
        commands: Receiver<Command>,
        device: Option<Device>,
    ) -> Result<Self> {
        let incarnation = identity::incarnation()?;
        // The pool first: it is what most often cannot be had.
        let pool = match config.role {
            Role::Producer => None,
            Role::Consumer | Role::Both => Some(Pool::new(&config, device.as_ref())?),
        };
        let memory = match &device {
            None => Memory::Host,
            Some(device) => Memory::Cuda { gpu: device.uuid().0 },
        };
        let producer = config.role.produces().then(|| {
            Producer::new(ProducerConfig {
                layout: config.layout.clone(),
                consumers: config.peers.len(),
                hold: config.hold,
                memory,
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
        #[cfg(feature = "faults")]
        let hello = Hello { boot_id: config.boot_id.unwrap_or(hello.boot_id), ..hello };
        let mut control = ControlConfig::new(hello);
        control.listen = config.listen.clone().filter(|_| config.role.consumes());
        control.socket_dir = Some(config.socket_dir.clone());
        control.peers = config.peers.clone();
        control.allow_insecure = config.allow_insecure;
        control.limits = Limits {
            silence: config.silence,
            refused_backoff: config.refused_backoff,
            ..Limits::default()
        };
        let mut control = Control::new(control)?;
        let ucx = ucx(&config)?;
        let waker = control.waker();
        let consuming = pool.map(|pool| consuming(incarnation, &config, pool, waker, &ucx));
        let consuming = consuming.transpose()?;
        for target in consuming.iter().flat_map(|consuming| &consuming.targets) {
            control.watch(target.event_fd())?;
        }
        let pushes = device.as_ref().filter(|_| config.role.produces());
        let copier = pushes.map(|gpu| copier(gpu, Summed::Source, control.waker())).transpose()?;
        let bytes = pattern(incarnation);
        let pattern = device.as_ref().map(|gpu| upload(gpu, &bytes, START)).transpose()?;
        Ok(Self {
            copier,
            pattern,
            ucx,
            control,
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
            device,
            ended: Vec::new(),
            news: Vec::new(),
            lost: Vec::new(),
            failures: Failures::default(),
            closing: false,
            too_large: Throttle::default(),
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
        // However this thread ends.
        self.shared.undrained.store(self.device.is_some(), Ordering::Release);
        if let Some(device) = &self.device
            && let Err(error) = device.bind()
        {
            // Each call then does so by itself.
            tracing::warn!(%error, "a GPU's context can't be kept on the agent's thread");
        }
        while !self.closing {
            if let Err(error) = self.turn() {
                tracing::error!(%error, name = self.config.name, "the agent stops");
                break;
            }
        }
        self.drain();
        self.shut();
    }

    /// Ends all that reads or writes memory. Links stay until then: who sees one end may reuse what was read.
    fn drain(&mut self) {
        if let Some(pushes) = &mut self.pushes {
            pushes.close();
        }
        if let Some(consuming) = &mut self.consuming {
            for link in self.links.values() {
                if let Some(path) = link.path.as_ref().filter(|path| !path.to_peer) {
                    consuming.cut_off(path.name, link.peer);
                }
            }
            if let Some(loads) = &mut self.loads {
                loads.close(&mut consuming.store, &mut self.ended);
            }
            consuming.store.give_up();
        }
        let deadline = self.now() + DRAIN;
        let mut events = Vec::new();
        while !self.is_drained() && self.now() < deadline {
            let now = self.now();
            // Peers need to hear that we are here, and nobody is listened to.
            let pause = self.timeout().map_or(DRAIN_POLL, |timeout| timeout.min(DRAIN_POLL));
            if self.control.poll(now, Some(pause), &mut events).is_err() {
                std::thread::sleep(pause);
            }
            events.clear();
            self.move_bytes();
            let now = self.now();
            self.tell(now);
            self.perform(now);
        }
        let pushed = self.pushes.as_mut().is_none_or(Pushes::has_ended);
        let loaded = self.consuming.as_mut().is_none_or(|consuming| consuming.store.has_ended());
        if !(pushed && loaded) {
            tracing::error!(name = self.config.name, "copies may be under way after {DRAIN:?}");
        }
        self.shared.undrained.store(!(pushed && loaded), Ordering::Release);
    }

    fn is_drained(&self) -> bool {
        self.pushes.as_ref().is_none_or(Pushes::is_idle)
            && self.consuming.as_ref().is_none_or(|consuming| consuming.store.is_idle())
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
        self.tell(now);
        if let Some(producer) = &mut self.producer {
            producer.tick(now);
        }
        if let Some(consuming) = &mut self.consuming {
            consuming.session.tick(now);
        }
        self.perform(now);
        Ok(())
    }

    fn timeout(&mut self) -> Option<Duration> {
        // A GPU says when it has done something.
        let moves = self
            .consuming
            .as_ref()
            .is_some_and(|consuming| consuming.store.moves_now() || consuming.store.is_idle());
        let busy = self.pushes.as_mut().is_some_and(Pushes::is_busy)
            || self.consuming.as_mut().is_some_and(|consuming| !consuming.rests())
            || (moves && self.loads.as_ref().is_some_and(|loads| !loads.is_idle()))
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
            Command::LayerReady(layer, event) => {
                self.read_after(event);
                if let Some(producer) = &mut self.producer {
                    producer.layer_ready(layer);
                }
            }
            Command::EndStep(event) => {
                self.read_after(event);
                if let Some(producer) = &mut self.producer {
                    producer.end_step();
                }
            }
            Command::Load(request, blocks, event) => self.load(now, request, blocks, event),
            Command::Void(shut) => {
                // What was decided before is among what is voided.
                self.perform(now);
                if let (Some(pushes), Some(producer)) = (&mut self.pushes, &mut self.producer) {
                    producer.void();
                    pushes.void(shut, producer);
                }
            }
            Command::Stats(reply) => {
                let _ = reply.send(self.stats());
            }
            Command::Close => self.closing = true,
        }
    }

    /// What is read from now on is written when that event has come.
    fn read_after(&mut self, event: Option<Arc<DeviceEvent>>) {
        if let (Some(pushes), Some(event)) = (&mut self.pushes, event) {
            pushes.wait_for(&event);
        }
    }

    fn register(&mut self, layers: Vec<KvLayer>) -> Result<Option<ReadGate>> {
        if self.loads.is_some() {
            return Err(ErrorKind::Config.error("the engine's memory was registered before"));
        }
        let (layout, pattern) = (&self.config.layout, &mut self.pattern);
        let registered = register(layout, &layers, self.incarnation, pattern)?;
        let (ways, unable) = self.ways(&registered)?;
        let layout = &self.config.layout;
        self.loads = Some(Loads::new(layout.clone(), registered.clone()));
        let pushes = self.pushes.insert(Pushes::new(layout.clone(), registered, ways, unable));
        for fd in pushes.event_fds() {
            self.control.watch(fd)?;
        }
        let gate = pushes.gate();
        if self.config.role.produces() {
            for peer in 0..self.config.peers.len() {
                self.control.dial(peer, Purpose::Push);
            }
        }
        Ok(gate)
    }

    fn load(
        &mut self,
        now: Time,
        request: LoadRequest,
        blocks: Vec<Vec<BlockId>>,
        event: Option<Arc<DeviceEvent>>,
    ) {
        let begun = match (&mut self.loads, &mut self.consuming) {
            (Some(loads), Some(consuming)) => event
                .map_or(Ok(()), |event| consuming.store.wait_for(&event))
                .and_then(|()| loads.begin(&request, blocks)),
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
        stats.paths = self.links.values().filter_map(|link| link.path.clone()).collect();
        stats.loaded_bytes = self.loads.as_ref().map_or(0, |loads| loads.bytes);
        stats
    }

    fn move_bytes(&mut self) {
        if let (Some(pushes), Some(producer)) = (&mut self.pushes, &mut self.producer) {
            pushes.progress(BUDGET, producer, &mut self.news);
        }
        if let Some(consuming) = &mut self.consuming {
            consuming.receive(BUDGET, &mut self.lost);
            if let Some(loads) = &mut self.loads {
                loads.progress(&mut consuming.store, &mut self.ended);
            }
            consuming.store.poll(&mut self.ended);
        }
        let now = self.now();
        for (peer, error) in std::mem::take(&mut self.lost) {
            self.writer_lost(now, peer, &error);
        }
        self.end(now);
    }

    /// Nothing is left that could touch memory or keep a caller waiting.
    fn shut(&mut self) {
        for &link in self.links.keys() {
            self.control.close(link, &closed());
        }
        if let Some(loads) = &mut self.loads {
            let failed = loads.fail_all(&closed());
            self.shared.tell(|news| news.loaded.extend(failed));
        }
    }
}

/// A consumer's memory, before there is anything to move its bytes.
enum Pool {
    Host(HostPool),
    Device(DevicePool),
}

impl Pool {
    fn new(config: &AgentConfig, device: Option<&Device>) -> Result<Self> {
        let pages = u64::from(config.segment_pages());
        let bytes = pages * config.layout.page_bytes() + PROBE_BYTES;
        match device {
            None => HostPool::new(config.segments, bytes).map(Self::Host),
            Some(device) => {
                DevicePool::new_as(device, config.sharing, config.segments, bytes).map(Self::Device)
            }
        }
    }
}

fn copier(device: &Device, summed: Summed, waker: Waker) -> Result<Copier> {
    let config = CopierConfig { summed, patience: START, ..CopierConfig::default() };
    Copier::new(device, config, move || waker.wake())
}

fn consuming(
    us: Incarnation,
    config: &AgentConfig,
    pool: Pool,
    waker: Waker,
    ucx: &Result<Arc<UcxContext>>,
) -> Result<Consuming> {
    let pages_per_segment = config.segment_pages();
    let page = config.layout.page_bytes();
    let store = match pool {
        Pool::Host(pool) => Store::Host(HostStore::new(pool)),
        Pool::Device(pool) => {
            // Nobody but us writes to the blocks that a load was given.
            let copier = copier(pool.device(), Summed::Destination, waker)?;
            Store::Device(Box::new(DeviceStore::new(pool, copier)))
        }
    };
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
    let (targets, unable) = targets(us, config, ucx)?;
    Ok(Consuming { session, store, targets, unable })
}
