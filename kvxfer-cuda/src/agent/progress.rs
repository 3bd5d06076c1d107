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
use kvxfer_core::transport::{PROBE_BYTES, Transport};
use kvxfer_core::wire::message::Memory;
use kvxfer_core::wire::{self, Hello, Purpose};
use kvxfer_core::{BlockId, ErrorKind, Incarnation, LinkId, Result, Time, key};

use super::links::{Link, wrong_role};
use super::loads::Loads;
use super::push::{News, Pushes};
use super::register::{Registered, register};
use super::{AgentStats, Command, KvLayer, Shared, closed};
use crate::config::{AgentConfig, Role};
use crate::control::{Address, Control, ControlConfig, Event, Limits, Throttle, Waker};
use crate::identity;
use crate::memory::HostPool;
use crate::transport::local::LocalExports;
#[cfg(feature = "faults")]
use crate::transport::{
    Fault,
    fault::{Act, Faults},
};
use crate::transport::{Local, Shm};

/// Bytes moved between two looks at the sockets: about a millisecond's.
const BUDGET: u64 = 4 << 20;
/// How often the death of a process that we lost the link to is looked for.
const ORPHAN_POLL: Duration = Duration::from_millis(10);
/// How long a closed agent waits for copies that can't be called back, and how often it looks.
const DRAIN: Duration = Duration::from_secs(5);
const DRAIN_POLL: Duration = Duration::from_millis(1);

/// What a consumer has beside its state machine.
pub(super) struct Consuming {
    pub(super) session: Consumer,
    pub(super) pool: HostPool,
}

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
    /// Told by the next [`Progress::tell`].
    pub(super) news: Vec<News>,
    pub(super) closing: bool,
    /// Of the log line that says what the pool can never hold.
    pub(super) too_large: Throttle,
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
                memory: Memory::Host,
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
        control.limits = Limits {
            silence: config.silence,
            refused_backoff: config.refused_backoff,
            ..Limits::default()
        };
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
            news: Vec::new(),
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
        let deadline = self.now() + DRAIN;
        let mut events = Vec::new();
        while !self.is_drained() {
            let now = self.now();
            if now > deadline {
                tracing::error!(name = self.config.name, "copies are under way after {DRAIN:?}");
                self.shared.undrained.store(true, Ordering::Release);
                return;
            }
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
    }

    fn is_drained(&self) -> bool {
        self.pushes.as_ref().is_none_or(Pushes::is_idle)
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
        let registered = register(&self.config.layout, &layers, self.incarnation)?;
        let layout = &self.config.layout;
        let transports = self.transports(&registered);
        self.loads = Some(Loads::new(layout.clone(), registered.clone()));
        self.pushes = Some(Pushes::new(layout.clone(), registered, transports));
        if self.config.role.produces() {
            for peer in 0..self.config.peers.len() {
                self.control.dial(peer, Purpose::Push);
            }
        }
        Ok(())
    }

    fn transports(&self, registered: &Registered) -> Vec<Box<dyn Transport>> {
        let local = Local::new(Arc::clone(&registered.regions));
        let shm = Shm::new(Arc::clone(&registered.regions));
        #[cfg(feature = "faults")]
        if self.config.fault == Some(crate::config::Fault::DropWrites) {
            let faults = Faults::each(Act::Drop);
            return vec![
                Box::new(Fault::new(local, faults.clone())),
                Box::new(Fault::new(shm, faults)),
            ];
        }
        vec![Box::new(local), Box::new(shm)]
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

    fn move_bytes(&mut self) {
        if let (Some(pushes), Some(producer)) = (&mut self.pushes, &mut self.producer) {
            pushes.progress(BUDGET, producer, &mut self.news);
        }
        if let (Some(loads), Some(consuming)) = (&mut self.loads, &mut self.consuming)
            && let Some(copied) = loads.progress(&consuming.pool)
        {
            consuming.session.copied(self.origin.elapsed(), copied);
        }
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

fn consuming(config: &AgentConfig) -> Result<Consuming> {
    let pages_per_segment = config.segment_pages();
    let page = config.layout.page_bytes();
    let bytes = u64::from(pages_per_segment) * page + PROBE_BYTES;
    let pool = HostPool::new(config.segments, bytes)?;
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
