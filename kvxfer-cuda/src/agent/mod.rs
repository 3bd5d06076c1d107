//! One agent per engine rank.
//!
//! [`Agent`] is what the engine's worker half holds. Its methods validate and enqueue; one progress
//! thread ([`progress`]) owns the sockets, the pool, the transports and the state machines, by `&mut`.
//! Nothing here waits for a peer.
//!
//! Locks: one mutex around what the progress thread tells its callers, held for a push or a swap; no other is taken
//! under it.

mod actions;
mod consuming;
mod gpu;
mod links;
mod loads;
mod paths;
mod progress;
mod push;
mod register;
mod store;
mod ways;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, SendTimeoutError, Sender, bounded};
use kvxfer_core::pool::PoolStats;
use kvxfer_core::session::{ConsumerStats, LoadRequest, ProducerStats, PushRange};
use kvxfer_core::{BlockId, Error, ErrorKind, Incarnation, LoadId, Result};
use parking_lot::{Condvar, Mutex};

use crate::config::{AgentConfig, Memory};
use crate::control::{Address, Waker};
use crate::driver::{self, Device, EngineStream, Event};
use gpu::{Gpu, ReadGate};
pub use paths::Path;

/// Commands that wait for the progress thread, at most.
const COMMANDS: usize = 1 << 14;
/// How long a caller waits for the progress thread before it is called dead.
const STUCK: Duration = Duration::from_secs(10);

/// One layer of the engine's KV cache, as the engine laid it out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayer {
    /// Address of block 0.
    pub address: usize,
    /// How many blocks there are.
    pub blocks: u32,
    /// Bytes from one block to the next.
    pub stride: u64,
}

/// A load that ended.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The load.
    pub load: LoadId,
    /// Why it failed, if it did. Then the contents of its blocks are open.
    pub result: Result<()>,
    /// Bytes copied into the engine's blocks.
    pub bytes: u64,
    /// Tokens whose blocks were copied, in whole blocks' terms: of chunks that were loaded in part, that part.
    pub tokens: u64,
    /// From the request to the end.
    pub seconds: f64,
    /// The path by which the bytes came to the pool; several are joined by a comma.
    pub path: String,
}

/// What an agent says of itself.
#[derive(Clone, Debug, Default)]
pub struct AgentStats {
    /// The consumer's counters.
    pub consumer: ConsumerStats,
    /// The producer's counters.
    pub producer: ProducerStats,
    /// The pool, by page state.
    pub pool: PoolStats,
    /// Pages nobody accounts for: 0.
    pub pages_leaked: u32,
    /// Offers under way.
    pub open_offers: u64,
    /// Bytes written to consumers.
    pub pushed_bytes: u64,
    /// Writes posted: one a layer and chunk.
    pub posts: u64,
    /// Contiguous runs they consisted of.
    pub runs: u64,
    /// Bytes loaded into the engine.
    pub loaded_bytes: u64,
    /// Live links.
    pub links: u64,
    /// How bytes go between us and each peer.
    pub paths: Vec<Path>,
}

enum Command {
    Register(Vec<KvLayer>, Sender<Result<Option<ReadGate>>>),
    BeginStep(Vec<PushRange>),
    /// With the event of the engine's stream behind which that is so, for KV on a GPU.
    LayerReady(u32, Option<Arc<Event>>),
    EndStep(Option<Arc<Event>>),
    Load(LoadRequest, Vec<Vec<BlockId>>, Option<Arc<Event>>),
    /// Of [`crate::device::Gate::shut`].
    Void(u64),
    Stats(Sender<AgentStats>),
    Close,
}

/// What the progress thread shares with its callers.
#[derive(Debug, Default)]
struct Shared {
    news: Mutex<News>,
    /// Something was added to `news`, or the thread stopped.
    signal: Condvar,
    stopped: AtomicBool,
    /// Copies by a device may be under way, also when the thread has stopped.
    undrained: AtomicBool,
}

#[derive(Debug, Default)]
struct News {
    /// The loads that ended and were not told yet.
    loaded: Vec<Loaded>,
    /// How many of the configured peers are connected.
    peers: usize,
}

impl Shared {
    fn tell(&self, news: impl FnOnce(&mut News)) {
        news(&mut self.news.lock());
        self.signal.notify_all();
    }

    /// Waits until that holds; `false` when time was up, or the thread stopped before.
    fn wait(&self, patience: Duration, what: impl Fn(&News) -> bool) -> bool {
        let mut news = self.news.lock();
        let waiting = |news: &mut News| !what(news) && !self.stopped.load(Ordering::Acquire);
        self.signal.wait_while_for(&mut news, waiting, patience);
        what(&news)
    }
}

/// An engine rank's agent. See the [module](self).
#[derive(Debug)]
pub struct Agent {
    commands: Sender<Command>,
    waker: Waker,
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    ended: Receiver<()>,
    incarnation: Incarnation,
    addresses: Vec<Address>,
    layout: Arc<kvxfer_core::layout::KvLayout>,
    peers: usize,
    gpu: Option<Gpu>,
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Register(..) => "Register",
            Self::BeginStep(_) => "BeginStep",
            Self::LayerReady(..) => "LayerReady",
            Self::EndStep(_) => "EndStep",
            Self::Load(..) => "Load",
            Self::Void(_) => "Void",
            Self::Stats(_) => "Stats",
            Self::Close => "Close",
        })
    }
}

impl Agent {
    /// Allocates the pool, binds the sockets and starts the progress thread. Peers are dialled once the engine's
    /// memory is registered.
    ///
    /// # Errors
    /// `Config`: a field contradicts another. `Io`: no memory, no socket, no folder; the message names the fix.
    pub fn start(config: AgentConfig) -> Result<Self> {
        config.validate()?;
        let (commands, inbox) = bounded(COMMANDS);
        let (end, ended) = bounded::<()>(0);
        let shared = Arc::new(Shared::default());
        let layout = Arc::new(config.layout.clone());
        let peers = if config.role.produces() { config.peers.len() } else { 0 };
        let device = match config.memory {
            Memory::Host => None,
            Memory::Device(ordinal) => Some(Device::open(driver::cuda()?, ordinal)?),
        };
        let gpu = device.clone().map(Gpu::new).transpose()?;
        let progress = progress::Progress::new(config, Arc::clone(&shared), inbox, device)?;
        let (incarnation, waker) = (progress.incarnation(), progress.waker());
        let addresses = progress.addresses().to_vec();
        let stopped = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("kvxfer".into())
            .spawn(move || {
                // Dropped however this thread ends: callers learn of it.
                let _end = end;
                let _stopped = Stopped(stopped);
                progress.run();
            })
            .map_err(|error| ErrorKind::Io.error(format!("no thread for the agent: {error}")))?;
        let thread = Mutex::new(Some(thread));
        Ok(Self {
            commands,
            waker,
            shared,
            thread,
            ended,
            incarnation,
            addresses,
            layout,
            peers,
            gpu,
        })
    }

    /// This agent's life.
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// Where it listens, the Unix socket for observers included.
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// The Unix socket at which the engine's scheduler half connects.
    pub fn observer_address(&self) -> Option<&Address> {
        self.addresses.iter().find(|address| matches!(address, Address::Unix(_)))
    }

    fn command(&self, command: Command) -> Result<()> {
        let sent = self.commands.send_timeout(command, STUCK);
        self.waker.wake();
        sent.map_err(|error| match error {
            SendTimeoutError::Timeout(command) => ErrorKind::Timeout
                .error(format!("the progress thread took no {command:?} for {STUCK:?}")),
            SendTimeoutError::Disconnected(_) => closed(),
        })
    }

    fn ask<T>(&self, question: impl FnOnce(Sender<T>) -> Command) -> Result<T> {
        let (reply, answer) = bounded(1);
        self.command(question(reply))?;
        answer.recv_timeout(STUCK).map_err(|error| match error {
            RecvTimeoutError::Timeout => ErrorKind::Timeout
                .error(format!("the progress thread did not answer within {STUCK:?}")),
            RecvTimeoutError::Disconnected => closed(),
        })
    }

    /// Registers the engine's KV memory, one entry a layer, groups in order; once. Dials the peers.
    ///
    /// # Errors
    /// `Config`: the layers are not those of the layout, or memory was registered before. `Timeout`: that is not known.
    ///
    /// # Safety
    /// `blocks * stride` bytes from each address stay readable, and for a consumer writable, until
    /// [`Agent::close`] has returned. A consumer's loads write to blocks that nobody else uses meanwhile.
    pub unsafe fn register(&self, layers: Vec<KvLayer>) -> Result<()> {
        let gate = self.ask(|reply| Command::Register(layers, reply))??;
        if let Some(gpu) = &self.gpu {
            gpu.registered(gate);
        }
        Ok(())
    }

    /// A stream of the engine's, for the calls that take one: a `CUstream`, as torch's `cuda_stream` has it.
    ///
    /// # Errors
    /// `Config`: this agent's memory is the host's.
    ///
    /// # Safety
    /// It is a stream of this agent's GPU, of its primary context, and lives as long as what is returned is used.
    pub unsafe fn engine_stream(&self, handle: u64) -> Result<EngineStream> {
        // SAFETY: the caller's promise.
        self.gpu().map(|gpu| unsafe { EngineStream::from_raw(gpu.device(), handle) })
    }

    fn gpu(&self) -> Result<&Gpu> {
        self.gpu.as_ref().ok_or_else(|| {
            ErrorKind::Config
                .error("this agent's memory is the host's, which no stream writes to")
                .fix("start the agent with the GPU's memory, or call without a stream")
        })
    }

    fn on_host(&self) -> Result<()> {
        match self.gpu {
            None => Ok(()),
            Some(_) => Err(ErrorKind::Config
                .error("KV on a GPU is there when a stream has written it")
                .fix("pass the stream")),
        }
    }

    /// A step of the engine begins that completes these chunks. Reading them starts layer by layer.
    ///
    /// # Errors
    /// `Closed`, or `Timeout` when the progress thread is stuck.
    pub fn begin_step(&self, ranges: Vec<PushRange>) -> Result<()> {
        self.command(Command::BeginStep(ranges))
    }

    /// The step has written its KV of this layer (flat index), in host memory.
    ///
    /// # Errors
    /// As [`Agent::begin_step`]; `Config` when the KV is on a GPU.
    pub fn layer_ready(&self, layer: u32) -> Result<()> {
        self.on_host()?;
        self.command(Command::LayerReady(layer, None))
    }

    /// The step's KV of this layer (flat index) is written when all that is in `stream` now is done. Does not wait
    /// for that.
    ///
    /// # Errors
    /// As [`Agent::begin_step`]; `Device` while the stream is captured into a graph; `Config` when the KV is in host
    /// memory.
    pub fn layer_ready_on(&self, layer: u32, stream: &EngineStream) -> Result<()> {
        let event = self.gpu()?.record(stream)?;
        self.command(Command::LayerReady(layer, Some(event)))
    }

    /// The step has written all its KV, in host memory.
    ///
    /// # Errors
    /// As [`Agent::layer_ready`].
    pub fn end_step(&self) -> Result<()> {
        self.on_host()?;
        self.command(Command::EndStep(None))
    }

    /// The step's KV is written when all that is in `stream` now is done. Does not wait for that.
    ///
    /// # Errors
    /// As [`Agent::layer_ready_on`].
    pub fn end_step_on(&self, stream: &EngineStream) -> Result<()> {
        let event = self.gpu()?.record(stream)?;
        self.command(Command::EndStep(Some(event)))
    }

    /// The engine is about to write, in `stream`, to blocks that it named in steps by now, without having heard that
    /// they are not read any more: the stream waits for the reads that have begun, and no other begins. Chunks of
    /// which something had not begun are not committed. Waits for no copy.
    ///
    /// # Errors
    /// As [`Agent::layer_ready_on`]; then blocks may still be read.
    pub fn reads_done_on(&self, stream: &EngineStream) -> Result<()> {
        match self.gpu()?.reads_done(stream)? {
            Some(shut) => self.command(Command::Void(shut)),
            None => Ok(()),
        }
    }

    /// Loads chunks of a claim into the engine's blocks: for each group, the blocks of all those chunks,
    /// [`NO_BLOCK`](kvxfer_core::NO_BLOCK) for one that is not to be loaded. Ends in exactly one [`Loaded`].
    ///
    /// # Errors
    /// As [`Agent::layer_ready`]; then nothing will be reported.
    pub fn load(&self, request: LoadRequest, blocks: Vec<Vec<BlockId>>) -> Result<()> {
        self.on_host()?;
        self.command(Command::Load(request, blocks, None))
    }

    /// [`Agent::load`] into blocks on a GPU, which begins when all that is in `stream` now is done.
    ///
    /// # Errors
    /// As [`Agent::layer_ready_on`]; then nothing will be reported.
    pub fn load_on(
        &self,
        request: LoadRequest,
        blocks: Vec<Vec<BlockId>>,
        stream: &EngineStream,
    ) -> Result<()> {
        let event = self.gpu()?.record(stream)?;
        self.command(Command::Load(request, blocks, Some(event)))
    }

    /// Appends the loads that ended since the last call.
    pub fn poll(&self, out: &mut Vec<Loaded>) {
        out.append(&mut self.shared.news.lock().loaded);
    }

    /// Waits until [`Agent::poll`] has something to tell. `false` when time was up.
    pub fn wait(&self, patience: Duration) -> bool {
        self.shared.wait(patience, |news| !news.loaded.is_empty())
    }

    /// Waits until all configured peers are connected: what a producer offers before then goes to those that are.
    /// `false` when time was up. Of an agent without peers it is true at once.
    pub fn wait_connected(&self, patience: Duration) -> bool {
        self.shared.wait(patience, |news| news.peers >= self.peers)
    }

    /// Counters.
    ///
    /// # Errors
    /// As [`Agent::begin_step`].
    pub fn stats(&self) -> Result<AgentStats> {
        self.ask(Command::Stats)
    }

    /// Whether the progress thread ended.
    pub fn is_stopped(&self) -> bool {
        self.shared.stopped.load(Ordering::Acquire)
    }

    /// Geometry.
    pub fn layout(&self) -> &kvxfer_core::layout::KvLayout {
        &self.layout
    }

    /// Ends everything: loads under way fail, peers are told, memory is let go. When it has returned `Ok`, nothing
    /// of this agent touches the engine's memory. May be called again, which does not wait, and answers `Ok` only
    /// if that holds by then.
    ///
    /// # Errors
    /// `Timeout`: the progress thread did not end in time, or copies by a device did not: these may go on, and what
    /// they use of the agent's own is never freed.
    pub fn close(&self) -> Result<()> {
        // Only the first call waits.
        let thread = self.thread.lock().take();
        let deadline = Instant::now() + if thread.is_some() { STUCK } else { Duration::ZERO };
        let _ = self.commands.send_deadline(Command::Close, deadline);
        self.waker.wake();
        // Not `join`: that has no deadline.
        let ended = self.ended.recv_deadline(deadline);
        let error = if ended == Err(RecvTimeoutError::Timeout) {
            ErrorKind::Timeout.error(format!("the progress thread did not end within {STUCK:?}"))
        } else {
            let _ = thread.map(JoinHandle::join);
            if !self.shared.undrained.load(Ordering::Acquire) {
                return Ok(());
            }
            ErrorKind::Timeout.error("copies of the engine's memory did not end in time")
        };
        Err(error.fix("keep the engine's memory until the process ends"))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::error!(%error, "agent dropped");
        }
    }
}

struct Stopped(Arc<Shared>);

impl Drop for Stopped {
    fn drop(&mut self) {
        self.0.tell(|_| self.0.stopped.store(true, Ordering::Release));
    }
}

fn closed() -> Error {
    ErrorKind::Closed.error("the agent is closed")
}
