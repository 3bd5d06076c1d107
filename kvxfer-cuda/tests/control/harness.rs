use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvxfer_core::wire::{Hello, Message, Purpose, VERSIONS};
use kvxfer_core::{Error, GrantId, Incarnation, LinkId, Time};
use kvxfer_cuda::control::{Address, Control, ControlConfig, Event};

/// Longer than anything here takes on the slowest machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A folder of the test's own.
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name =
            format!("kvxfer-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn sockets(&self) -> PathBuf {
        self.0.join("s")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Says it is agent `number`, on the host that all tests share.
pub(crate) fn hello(number: u8) -> Hello {
    Hello {
        versions: VERSIONS,
        key_versions: (1, 1),
        incarnation: Incarnation([number; 16]),
        purpose: Purpose::Locate,
        boot_id: [7; 16],
        unix_path: None,
        name: format!("agent {number}"),
    }
}

pub(crate) fn config(number: u8, sockets: &Path) -> ControlConfig {
    ControlConfig { socket_dir: Some(sockets.to_owned()), ..ControlConfig::new(hello(number)) }
}

/// One that also listens on a free TCP port.
pub(crate) fn listening(number: u8, sockets: &Path) -> ControlConfig {
    ControlConfig { listen: Some(Address::tcp("127.0.0.1", 0)), ..config(number, sockets) }
}

pub(crate) fn dialling(number: u8, sockets: &Path, peer: &Address) -> ControlConfig {
    ControlConfig { peers: vec![peer.clone()], ..config(number, sockets) }
}

/// A message that says nothing but its number.
pub(crate) fn note(number: u64) -> Message {
    Message::Revoke { grant: GrantId(number) }
}

/// A control and what it told so far.
pub(crate) struct Node {
    pub(crate) control: Control,
    pub(crate) events: Vec<Event>,
}

impl Node {
    pub(crate) fn new(config: ControlConfig) -> Self {
        Self { control: Control::new(config).unwrap(), events: Vec::new() }
    }

    pub(crate) fn poll(&mut self, now: Time) {
        self.control.poll(now, Some(Duration::from_millis(1)), &mut self.events).unwrap();
    }

    fn take<T>(&mut self, matches: impl Fn(&Event) -> Option<T>) -> Option<T> {
        let (index, found) =
            self.events.iter().enumerate().find_map(|(index, e)| Some((index, matches(e)?)))?;
        self.events.remove(index);
        Some(found)
    }

    pub(crate) fn up(&mut self) -> Option<LinkId> {
        self.take(|event| match event {
            Event::Up { link, .. } => Some(*link),
            _ => None,
        })
    }

    pub(crate) fn down(&mut self) -> Option<Error> {
        self.take(|event| match event {
            Event::Down { error, .. } => Some(error.clone()),
            _ => None,
        })
    }

    pub(crate) fn dial_failed(&mut self) -> Option<Error> {
        self.take(|event| match event {
            Event::DialFailed { error, .. } => Some(error.clone()),
            _ => None,
        })
    }

    pub(crate) fn message(&mut self) -> Option<Message> {
        self.take(|event| match event {
            Event::Message { message, .. } => Some(message.clone()),
            _ => None,
        })
    }
}

/// Polls all of them at `now` until there is something.
pub(crate) fn until<T>(
    nodes: &mut [&mut Node],
    now: Time,
    mut found: impl FnMut(&mut [&mut Node]) -> Option<T>,
) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = found(nodes) {
            return found;
        }
        let events: Vec<_> = nodes.iter().map(|node| &node.events).collect();
        assert!(begun.elapsed() < PATIENCE, "it did not happen; events: {events:?}");
        for node in nodes.iter_mut() {
            node.poll(now);
        }
    }
}

/// Both ends of one link. `a` has dialled.
pub(crate) fn linked(a: &mut Node, b: &mut Node, now: Time) -> (LinkId, LinkId) {
    linked_for(Purpose::Push, a, b, now)
}

pub(crate) fn linked_for(
    purpose: Purpose,
    a: &mut Node,
    b: &mut Node,
    now: Time,
) -> (LinkId, LinkId) {
    a.control.dial(0, purpose);
    let at_a = until(&mut [a, b], now, |nodes| nodes[0].up());
    let at_b = until(&mut [a, b], now, |nodes| nodes[1].up());
    (at_a, at_b)
}
