//! The agent at the other end: whether it answers, understands us, and shares this host's means with us.

use std::path::Path;
use std::time::Duration;

use kvxfer_core::key::KEY_VERSION;
use kvxfer_core::wire::{self, Hello};
use kvxfer_cuda::control::{Address, locate};
use serde::Serialize;

use super::finding::{Area, Finding};
use super::host::Host;
use super::paths::{ALL, PathName};
use super::sockets::BY_DESCRIPTOR;

/// What asks.
const US: &str = "kvxfer doctor";

/// What works only within a host.
const ON_ONE_HOST: &[PathName] = &[PathName::Local, PathName::Shm, PathName::CudaIpc];

/// The agent that answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Peer {
    /// Where it was asked.
    pub address: String,
    /// What it is called.
    pub name: String,
    /// Which of its lives this is.
    pub incarnation: String,
    /// Versions of the protocol that it speaks, lowest and highest.
    pub protocol: (u16, u16),
    /// Versions of chunk keys that it computes.
    pub chunk_keys: (u16, u16),
    /// Whether it is on this host.
    pub same_host: bool,
    /// Where its Unix socket is, as it sees it.
    pub unix_path: Option<String>,
}

pub(super) fn check(
    host: &Host,
    address: &Address,
    patience: Duration,
) -> (Option<Peer>, Vec<Finding>) {
    let located = match locate(address, US, patience) {
        Ok(located) => located,
        Err(error) => {
            return (None, vec![Finding::failed(Area::Peer, "answer", &error).needed_by(ALL)]);
        }
    };
    let hello = located.hello;
    let micros = located.took.as_micros();
    let detail = format!(
        "{address} is {}, incarnation {}, in {}.{} ms",
        if hello.name.is_empty() { "an agent without a name" } else { &hello.name },
        hello.incarnation,
        micros / 1000,
        micros % 1000 / 100
    );
    let same_host = boot_id(host) == Some(hello.boot_id);
    let mut found =
        vec![Finding::ok(Area::Peer, "answer", detail), versions(&hello), place(same_host)];
    if same_host {
        found.push(socket(address, &hello, patience));
    }
    // Only agents of one process reach each other so, and this is none.
    found.push(
        Finding::absent(Area::Peer, "process", "the peer is another process")
            .needed_by(&[PathName::Local]),
    );
    let peer = Peer {
        address: address.to_string(),
        name: hello.name,
        incarnation: hello.incarnation.to_string(),
        protocol: hello.versions,
        chunk_keys: hello.key_versions,
        same_host,
        unix_path: hello.unix_path,
    };
    (Some(peer), found)
}

fn versions(hello: &Hello) -> Finding {
    let name = "versions";
    let negotiated = wire::negotiate(wire::VERSIONS, hello.versions).and_then(|protocol| {
        Ok((protocol, wire::negotiate((KEY_VERSION, KEY_VERSION), hello.key_versions)?))
    });
    match negotiated {
        Ok((protocol, keys)) => {
            Finding::ok(Area::Peer, name, format!("protocol {protocol}, chunk keys {keys}"))
        }
        Err(error) => Finding::failed(Area::Peer, name, &error).needed_by(ALL),
    }
}

fn place(same_host: bool) -> Finding {
    match same_host {
        true => Finding::ok(Area::Peer, "host", "this one"),
        false => Finding::absent(Area::Peer, "host", "the peer is on another host")
            .fix("place both engines on one host")
            .needed_by(ON_ONE_HOST),
    }
}

/// Whether its socket can be reached from here, by the very means that an agent would use.
fn socket(asked: &Address, hello: &Hello, patience: Duration) -> Finding {
    let name = "socket";
    let Some(path) = &hello.unix_path else {
        return Finding::refused(
            Area::Peer,
            name,
            "it has no Unix socket, so nothing can be handed over",
        )
        .fix("set socket_dir there")
        .needed_by(BY_DESCRIPTOR);
    };
    let address = Address::Unix(Path::new(path).into());
    match locate(&address, US, patience) {
        Ok(there) if there.hello.incarnation != hello.incarnation => {
            let detail =
                format!("{path} leads to {}, not to the agent at {asked}", there.hello.incarnation);
            Finding::refused(Area::Peer, name, detail)
                .fix("give each agent an address of its own, not one that is balanced")
                .needed_by(BY_DESCRIPTOR)
        }
        Ok(there) => {
            let process = match (there.pid, there.mortal) {
                (Some(pid), _) => format!("process {pid}"),
                (None, true) => {
                    "a process of another PID namespace, whose death is seen".to_owned()
                }
                (None, false) => {
                    "a process of another PID namespace, whose death is not seen".to_owned()
                }
            };
            Finding::ok(Area::Peer, name, format!("{path} is reached: {process}"))
        }
        Err(error) => Finding::failed(Area::Peer, name, &error).needed_by(BY_DESCRIPTOR),
    }
}

fn boot_id(host: &Host) -> Option<[u8; 16]> {
    let text = host.read("/proc/sys/kernel/random/boot_id")?.replace('-', "");
    let byte = |at: usize| u8::from_str_radix(text.get(2 * at..2 * at + 2)?, 16).ok();
    let bytes: Vec<u8> = (0..16).map_while(byte).collect();
    bytes.try_into().ok()
}
