//! Host names to addresses.

use std::collections::VecDeque;
use std::net::{SocketAddr, ToSocketAddrs};

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::Waker;

/// Names are resolved on threads of their own, one per peer at a time, because the resolver blocks.
#[derive(Debug)]
pub(super) struct Resolutions {
    sender: Sender<Resolution>,
    receiver: Receiver<Resolution>,
    waker: Waker,
}

/// Whose name, and what it stands for.
pub(super) type Resolution = (usize, std::result::Result<VecDeque<SocketAddr>, String>);

impl Resolutions {
    pub(super) fn new(waker: Waker) -> Self {
        let (sender, receiver) = unbounded();
        Self { sender, receiver, waker }
    }

    pub(super) fn start(&self, peer: usize, host: String, port: u16) -> std::io::Result<()> {
        let (sender, waker) = (self.sender.clone(), self.waker.clone());
        let resolve = move || {
            let found = (host.as_str(), port).to_socket_addrs();
            let found = found.map(Iterator::collect).map_err(|error| error.to_string());
            if sender.send((peer, found)).is_ok() {
                waker.wake();
            }
        };
        std::thread::Builder::new().name("kvxfer-resolve".into()).spawn(resolve).map(drop)
    }

    /// What has been found since.
    pub(super) fn next(&self) -> Option<Resolution> {
        self.receiver.try_recv().ok()
    }
}
