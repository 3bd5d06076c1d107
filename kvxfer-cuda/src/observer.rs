//! An engine's scheduler half, connected to the agents of all its ranks.
//!
//! Callers and one thread share the state machine under a mutex, held for one call or one batch of messages;
//! no other lock is taken under it. The thread owns the sockets.

use std::collections::HashMap;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};
use kvxfer_core::session::{Observer, ObserverAction};
use kvxfer_core::wire::message::{Chunk, ClaimStatus, Next};
use kvxfer_core::wire::{self, Hello, Message, Purpose};
use kvxfer_core::{ClaimId, ErrorKind, LinkId, OfferId, Result, key};
use parking_lot::{Condvar, Mutex};

use crate::control::{Address, Control, ControlConfig, Event, Waker};
use crate::identity;

/// How long the agents of the own engine may take to answer at the start.
const CONNECT: Duration = Duration::from_secs(30);
/// How long the thread may take to end.
const STUCK: Duration = Duration::from_secs(10);

struct State {
    observer: Observer,
    /// Something that can be asked changed since the last [`ObserverHandle::wait`].
    changed: bool,
    closing: bool,
}

struct Shared {
    state: Mutex<State>,
    signal: Condvar,
}

/// What the scheduler half holds. See the [module](self).
pub struct ObserverHandle {
    shared: Arc<Shared>,
    waker: Waker,
    thread: Mutex<Option<JoinHandle<()>>>,
    ended: Receiver<()>,
}

impl std::fmt::Debug for ObserverHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ObserverHandle").finish_non_exhaustive()
    }
}

impl ObserverHandle {
    /// Connects to the agents, one address a rank in the order of ranks, and waits until all have answered.
    ///
    /// # Errors
    /// `Timeout`: one did not answer within 30 s; the message says which and why. `Io`: no socket, no thread.
    pub fn connect(addresses: Vec<Address>, name: &str) -> Result<Self> {
        let incarnation = identity::incarnation()?;
        let hello = Hello {
            versions: wire::VERSIONS,
            key_versions: (key::KEY_VERSION, key::KEY_VERSION),
            incarnation,
            purpose: Purpose::Observe,
            boot_id: identity::boot_id()?,
            unix_path: None,
            name: name.into(),
        };
        let mut config = ControlConfig::new(hello);
        config.peers.clone_from(&addresses);
        let mut control = Control::new(config)?;
        for rank in 0..addresses.len() {
            control.dial(rank, Purpose::Observe);
        }
        let state = State {
            observer: Observer::new(incarnation, addresses.len()),
            changed: false,
            closing: false,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), signal: Condvar::new() });
        let waker = control.waker();
        let (end, ended) = bounded::<()>(0);
        let mut thread = Thread {
            shared: Arc::clone(&shared),
            control,
            origin: Instant::now(),
            failures: HashMap::new(),
        };
        thread.connect(&addresses)?;
        let thread = std::thread::Builder::new()
            .name("kvxfer-observer".into())
            .spawn(move || {
                let _end = end;
                thread.run();
            })
            .map_err(|error| ErrorKind::Io.error(format!("no thread for the observer: {error}")))?;
        Ok(Self { shared, waker, thread: Mutex::new(Some(thread)), ended })
    }

    fn call<T>(&self, what: impl FnOnce(&mut Observer) -> T) -> T {
        let result = what(&mut self.shared.state.lock().observer);
        self.waker.wake();
        result
    }

    /// Offers a prompt's chunks to the consumers of all ranks.
    pub fn offer(&self, request: &str, chunks: &[Chunk]) -> OfferId {
        self.call(|observer| observer.offer(request, chunks))
    }

    /// Takes back what has not been handed over.
    pub fn withdraw(&self, offer: OfferId) {
        self.call(|observer| observer.withdraw(offer));
    }

    /// Claims a prompt's chunks on all ranks; what is on its way is waited for that long.
    pub fn claim(&self, request: &str, chunks: &[Chunk], patience: Duration) -> ClaimId {
        self.call(|observer| observer.claim(request, chunks, patience))
    }

    /// How a claim stands on all ranks together; `None` until all have answered.
    pub fn status(&self, claim: ClaimId) -> Option<ClaimStatus> {
        self.shared.state.lock().observer.status(claim)
    }

    /// Waits until all of a claim is ready, or stalled or lost, and returns how it stands then or when time is up; `None`
    /// if some rank has not answered even then. What nobody has offered yet is waited for as well.
    pub fn settled(&self, claim: ClaimId, patience: Duration) -> Option<ClaimStatus> {
        let open = |state: &mut State| {
            let next = state.observer.status(claim).map(|status| status.next);
            !matches!(next, Some(Next::Done | Next::Stalled | Next::Lost))
        };
        let mut state = self.shared.state.lock();
        self.shared.signal.wait_while_for(&mut state, open, patience);
        state.observer.status(claim)
    }

    /// Keeps only chunks `keep_from..keep_to` of a claim; with an empty range the claim ends.
    pub fn release(&self, claim: ClaimId, keep_from: u32, keep_to: u32) {
        self.call(|observer| observer.release(claim, keep_from, keep_to));
    }

    /// Chunks that no rank reads any more, each once.
    pub fn pushed(&self) -> Vec<(OfferId, Vec<u32>)> {
        self.shared.state.lock().observer.pushed()
    }

    /// Waits until a claim's status changed or a chunk was pushed since the last wait, at most that long.
    pub fn wait(&self, patience: Duration) -> bool {
        let mut state = self.shared.state.lock();
        if !state.changed {
            let changed = |state: &mut State| !state.changed;
            self.shared.signal.wait_while_for(&mut state, changed, patience);
        }
        std::mem::take(&mut state.changed)
    }

    /// Ends the links and the thread. Idempotent.
    ///
    /// # Errors
    /// `Timeout`: the thread did not end in time.
    pub fn close(&self) -> Result<()> {
        let Some(thread) = self.thread.lock().take() else { return Ok(()) };
        self.shared.state.lock().closing = true;
        self.waker.wake();
        match self.ended.recv_timeout(STUCK) {
            Err(crossbeam_channel::RecvTimeoutError::Timeout) => {
                Err(ErrorKind::Timeout.error("the observer's thread did not end"))
            }
            _ => {
                let _ = thread.join();
                Ok(())
            }
        }
    }
}

impl Drop for ObserverHandle {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::error!(%error, "observer dropped");
        }
    }
}

struct Thread {
    shared: Arc<Shared>,
    control: Control,
    origin: Instant,
    /// Why a rank was not reached, last.
    failures: HashMap<usize, String>,
}

impl Thread {
    /// Turns until all ranks are connected.
    fn connect(&mut self, addresses: &[Address]) -> Result<()> {
        let mut events = Vec::new();
        while !self.shared.state.lock().observer.is_connected() {
            let Some(left) = CONNECT.checked_sub(self.origin.elapsed()) else {
                let mut why: Vec<String> = self
                    .failures
                    .iter()
                    .map(|(&rank, error)| format!("rank {rank} at {}: {error}", addresses[rank]))
                    .collect();
                why.sort_unstable();
                return Err(ErrorKind::Timeout.error(format!(
                    "the agents of this engine did not answer within {CONNECT:?}: {}",
                    why.join("; ")
                )));
            };
            self.turn(Some(left), &mut events)?;
        }
        Ok(())
    }

    fn run(mut self) {
        let mut events = Vec::new();
        while !self.shared.state.lock().closing {
            if let Err(error) = self.turn(None, &mut events) {
                tracing::error!(%error, "the observer stops");
                return;
            }
        }
    }

    fn turn(&mut self, most: Option<Duration>, events: &mut Vec<Event>) -> Result<()> {
        let now = self.origin.elapsed();
        let due = self.control.next_timeout().map(|at| at.saturating_sub(now));
        let timeout = [most, due].into_iter().flatten().min();
        self.control.poll(now, timeout, events)?;
        let mut state = self.shared.state.lock();
        let mut changed = false;
        for event in events.drain(..) {
            match event {
                Event::Up { link, dialled: Some(rank), .. } => {
                    state.observer.connected(rank, link);
                    changed = true;
                }
                Event::Up { link, .. } => {
                    self.control.close(link, &ErrorKind::Protocol.error("not a listener"));
                }
                Event::Message { link, message, .. } => {
                    match state.observer.received(link, message) {
                        Ok(news) => changed |= news,
                        Err(error) => {
                            tracing::warn!(%error, "closing a link to an agent");
                            self.control.close(link, &error);
                            state.observer.disconnected(link);
                            changed = true;
                        }
                    }
                }
                Event::Down { link, error, .. } => {
                    tracing::warn!(%error, "lost the agent of a rank");
                    state.observer.disconnected(link);
                    changed = true;
                }
                Event::DialFailed { peer, error, .. } => {
                    self.failures.insert(peer, error.to_string());
                }
            }
        }
        if changed {
            state.changed = true;
            self.shared.signal.notify_all();
        }
        let mut sends: Vec<(LinkId, Message)> = Vec::new();
        while let Some(ObserverAction::Send { link, message }) = state.observer.poll_action() {
            sends.push((link, message));
        }
        drop(state);
        for (link, message) in sends {
            if let Err(error) = self.control.send(link, &message, &[]) {
                tracing::warn!(%error, "cannot tell an agent");
            }
        }
        Ok(())
    }
}
