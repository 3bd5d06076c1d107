//! The agent at the other end: whether it answers, understands us, and shares this host's means with us.

use std::path::Path;
use std::time::Duration;

use kvxfer_core::ErrorKind;
use kvxfer_core::key::KEY_VERSION;
use kvxfer_core::path::{Ability, PathName, candidates};
use kvxfer_core::wire::message::Memory;
use kvxfer_core::wire::{self, Hello};
use kvxfer_cuda::control::{Address, Answer, Question, examine, locate};
use serde::Serialize;

use super::Args;
use super::finding::{Area, Finding};
use super::host::Host;
use super::sockets::BY_DESCRIPTOR;

/// What asks.
const US: &str = "kvxfer doctor";

/// What works only within a host.
const ON_ONE_HOST: &[PathName] = &[PathName::Local, PathName::Shm, PathName::CudaIpc];

const ALL: &[PathName] = &PathName::ALL;

/// All about the pair.
pub(super) struct Pair {
    /// The agent, if it answered.
    pub(super) peer: Option<Peer>,
    pub(super) findings: Vec<Finding>,
    /// What it says of the paths, if it says that.
    pub(super) judged: Option<Judged>,
}

/// What the peer says of the paths from our memory to its pool.
pub(super) struct Judged {
    on_gpu: bool,
    chosen: Option<String>,
    /// By path.
    refused: Vec<(String, String)>,
}

impl Judged {
    /// Why it does not take that path.
    pub(super) fn why_not(&self, path: PathName) -> Option<String> {
        if !candidates(self.on_gpu).contains(&path) {
            return Some(format!("the peer's pool is in {} memory", kind(self.on_gpu)));
        }
        let refused = self.refused.iter().find(|(refused, _)| refused == path.as_str());
        refused.map(|(_, why)| why.clone())
    }
}

fn kind(on_gpu: bool) -> &'static str {
    if on_gpu { "GPU" } else { "host" }
}

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
    /// The path that it would choose, if it says so and there is one.
    pub chooses: Option<String>,
}

pub(super) fn check(host: &Host, address: &Address, args: &Args, ours: &[Finding]) -> Pair {
    let located = match locate(address, US, args.timeout) {
        Ok(located) => located,
        Err(error) => {
            let findings = vec![Finding::failed(Area::Peer, "answer", &error).needed_by(ALL)];
            return Pair { peer: None, findings, judged: None };
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
    let answered = Finding::ok(Area::Peer, "answer", detail);
    let mut findings = vec![answered, versions(&hello), place(same_host)];
    if same_host {
        findings.push(socket(address, &hello, args.timeout));
    }
    // Only agents of one process reach each other so, and this is none.
    findings.push(
        Finding::absent(Area::Peer, "process", "the peer is another process")
            .needed_by(&[PathName::Local]),
    );
    let (judged, choice) = choice(host, address, args, ours);
    findings.push(choice);
    let peer = Peer {
        address: address.to_string(),
        name: hello.name,
        incarnation: hello.incarnation.to_string(),
        protocol: hello.versions,
        chunk_keys: hello.key_versions,
        same_host,
        unix_path: hello.unix_path,
        chooses: judged.as_ref().and_then(|judged| judged.chosen.clone()),
    };
    Pair { peer: Some(peer), findings, judged }
}

/// What the peer, which chooses the path, would choose for an engine on this machine.
fn choice(
    host: &Host,
    address: &Address,
    args: &Args,
    ours: &[Finding],
) -> (Option<Judged>, Finding) {
    let name = "choice";
    let able = |&path: &PathName| match ours.iter().find(|finding| finding.blocks(path)) {
        None => Ability::able(path, Vec::new()),
        Some(finding) => Ability::unable(path, wire::bounds::reason(&finding.detail)),
    };
    let question = |memory: Memory| -> Question {
        (memory, candidates(memory != Memory::Host).iter().map(able).collect())
    };
    let survey = host.gpus.as_ref().and_then(|gpus| gpus.as_ref().ok());
    let gpu = survey.and_then(|survey| survey.gpus.iter().find(|gpu| gpu.shares()));
    let memories = [Memory::Host].into_iter().chain(gpu.map(|gpu| Memory::Cuda { gpu: gpu.id }));
    let questions: Vec<Question> = memories.map(question).collect();
    let answers = match examine(address, US, args.allow_insecure, &questions, args.timeout) {
        Ok(answers) => answers,
        // No link, so no path whatever.
        Err(error) if error.kind() == ErrorKind::NoPath => {
            return (None, Finding::failed(Area::Peer, name, &error).needed_by(ALL));
        }
        Err(error) => {
            let finding = Finding::warn(Area::Peer, name, error.to_string()).fix(
                "if this is the prefill engine's agent, ask for the decode engine's: it chooses",
            );
            return (None, finding);
        }
    };
    // One of the kinds of memory is the pool's; the other has no candidates.
    let fits = |(_, (_, refused)): &&(bool, Answer)| refused.iter().all(|of| of.path != "any");
    let asked = questions.iter().map(|(memory, _)| *memory != Memory::Host);
    let answers: Vec<(bool, Answer)> = asked.zip(answers).collect();
    let Some((on_gpu, (chosen, refused))) = answers.iter().find(fits).cloned() else {
        let whys = answers.iter().flat_map(|(_, (_, refused))| refused);
        let why = whys.map(|refusal| refusal.why.clone()).next().unwrap_or_default();
        return (None, Finding::refused(Area::Peer, name, why).needed_by(ALL));
    };
    let judged = Judged {
        on_gpu,
        chosen,
        refused: refused.into_iter().map(|refusal| (refusal.path, refusal.why)).collect(),
    };
    let finding = match &judged.chosen {
        Some(path) => {
            Finding::ok(Area::Peer, name, format!("{path}, for KV in {} memory", kind(on_gpu)))
        }
        None => Finding::refused(Area::Peer, name, "none of the paths"),
    };
    (Some(judged), finding)
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
