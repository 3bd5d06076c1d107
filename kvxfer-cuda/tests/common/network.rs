//! Two hosts on one: network namespaces with a cable between them.
//!
//! The namespaces have no name. They and what is in them are gone with the last descriptor and the last process in
//! them, also when a test is killed. A thread is moved into one, and what it starts there, threads and processes,
//! stays there; sockets are of the namespace in which they were made.

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::AsRawFd;
use std::process::Command;

use super::noise::{Noise, tun};

/// An index of [`Network::HOSTS`].
pub type Host = usize;

pub const A: Host = 0;
pub const B: Host = 1;
/// The interface of each.
const DEVICE: &str = "kvx0";

pub struct Network {
    hosts: [File; 2],
    pub noise: Option<Noise>,
}

impl Network {
    /// The hosts' addresses.
    pub const HOSTS: [&'static str; 2] = ["10.77.0.1", "10.77.0.2"];

    /// Two hosts with a veth pair between them; none, and a line that says so, where that is not permitted.
    pub fn new() -> Option<Self> {
        told(Self::hosts().and_then(|network| {
            let there = format!("/proc/{}/fd/{}", std::process::id(), network.hosts[B].as_raw_fd());
            network
                .ip(A, &format!("link add {DEVICE} type veth peer name {DEVICE} netns {there}"))?;
            network.addressed()
        }))
    }

    /// The same with a line between them that loses, delays and reorders packets, alike each time for the same
    /// packets. Kernels without netem have it too.
    pub fn noisy() -> Option<Self> {
        told(Self::hosts().and_then(|network| {
            let ends = [A, B].map(|host| network.inside(host, || tun(DEVICE)));
            let [a, b] = ends;
            let ends = a.and_then(|a| Ok([a, b?]));
            let ends = ends.map_err(|error| format!("no TUN device can be made: {error}"))?;
            let network = network.addressed()?;
            Ok(Self { noise: Some(Noise::between(ends)), ..network })
        }))
    }

    fn hosts() -> Result<Self, String> {
        let host = || {
            let before = File::open("/proc/thread-self/ns/net")?;
            // SAFETY: it takes no pointer.
            succeeds(unsafe { libc::unshare(libc::CLONE_NEWNET) })?;
            // Not every user who may leave may come back.
            try_switch(&before)?;
            // SAFETY: likewise.
            succeeds(unsafe { libc::unshare(libc::CLONE_NEWNET) })?;
            File::open("/proc/thread-self/ns/net")
        };
        // Threads of their own, so that nobody is left in a namespace that is not its own.
        let [a, b] = [(); 2].map(|()| std::thread::spawn(host).join().unwrap());
        let hosts = a.and_then(|a| Ok([a, b?])).map_err(|error| {
            format!(
                "no network namespace can be made: {error}; as root it can, or under unshare -Urn"
            )
        })?;
        Ok(Self { hosts, noise: None })
    }

    fn addressed(self) -> Result<Self, String> {
        for host in [A, B] {
            let (ours, theirs) = (Self::HOSTS[host], Self::HOSTS[1 - host]);
            self.ip(host, "link set lo up")?;
            self.ip(host, &format!("address add {ours} peer {theirs} dev {DEVICE}"))?;
            self.ip(host, &format!("link set {DEVICE} up"))?;
        }
        Ok(self)
    }

    /// Runs iproute2's `ip` on a host.
    fn ip(&self, host: Host, words: &str) -> Result<(), String> {
        let ip = || Command::new("ip").args(words.split(' ')).output();
        match self.inside(host, ip) {
            Ok(output) if output.status.success() => Ok(()),
            Ok(output) => {
                let why = String::from_utf8_lossy(&output.stderr);
                Err(format!("ip {words}: {}", why.trim().replace('\n', "; ")))
            }
            Err(error) => Err(format!("no ip of iproute2: {error}")),
        }
    }

    /// This thread is on that host while the guard lives.
    pub fn enter(&self, host: Host) -> Inside {
        let before = File::open("/proc/thread-self/ns/net").unwrap();
        switch(&self.hosts[host]);
        Inside { before, _of_this_thread: PhantomData }
    }

    pub fn inside<T>(&self, host: Host, what: impl FnOnce() -> T) -> T {
        let _inside = self.enter(host);
        what()
    }

    /// Pulls the cable: both ends are down, and what was under way is lost.
    pub fn pull(&self) {
        self.ip(A, &format!("link set {DEVICE} down")).unwrap();
    }

    pub fn plug(&self) {
        self.ip(A, &format!("link set {DEVICE} up")).unwrap();
    }

    /// Whatever a host would answer from that port is dropped without a word, as by a firewall.
    pub fn swallow(&self, host: Host, port: u16) {
        self.ip(host, &format!("rule add pref 100 ipproto tcp sport {port} blackhole")).unwrap();
    }
}

/// A thread on another host, until this is dropped.
pub struct Inside {
    before: File,
    _of_this_thread: PhantomData<*const ()>,
}

impl Drop for Inside {
    fn drop(&mut self) {
        switch(&self.before);
    }
}

fn switch(to: &File) {
    try_switch(to).unwrap();
}

fn try_switch(to: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open.
    succeeds(unsafe { libc::setns(to.as_raw_fd(), libc::CLONE_NEWNET) })
}

pub(super) fn succeeds(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn told(network: Result<Network, String>) -> Option<Network> {
    network.inspect_err(|why| super::skip(why)).ok()
}
