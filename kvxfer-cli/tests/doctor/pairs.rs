//! With a peer: a real agent, something else, or nobody.

use std::io::Write;
use std::net::TcpListener;
use std::path::Path;

use kvxfer_cli::doctor::{Area, Host, Report, State};
use kvxfer_core::layout::{Group, KvLayout};
use kvxfer_core::path::PathName;
use kvxfer_cuda::{Address, Agent, AgentConfig, Role};

use crate::fake::{Folder, args};

/// A decode engine's agent, and the folder of its socket.
fn agent() -> (Agent, Folder) {
    let (config, folder) = config();
    (Agent::start(config).unwrap(), folder)
}

fn config() -> (AgentConfig, Folder) {
    let folder = Folder::new();
    (config_in(&folder.0), folder)
}

pub(crate) fn config_in(folder: &Path) -> AgentConfig {
    let group = Group { block_tokens: 16, block_bytes: vec![64] };
    let layout = KvLayout::one_group("model of the tests", "bytes", 64, group);
    let mut config = AgentConfig::new(Role::Consumer, layout);
    config.name = "decode-0".into();
    config.listen = Some(Address::tcp("127.0.0.1", 0));
    config.socket_dir = folder.join("s");
    config.buffer_size = 1 << 20;
    config
}

fn examine(folder: &Folder, peer: &str, more: &[&str]) -> Report {
    let host = Host::here(folder.0.join("s"), 1 << 20);
    Report::of(&host, &args(&[&["--peer", peer], more].concat()))
}

fn state(report: &Report, name: &str) -> (State, String) {
    let of_peer =
        |finding: &&kvxfer_cli::doctor::Finding| finding.area == Area::Peer && finding.name == name;
    let finding = report.findings.iter().find(of_peer).unwrap();
    (finding.state, finding.detail.clone())
}

fn possible(report: &Report) -> Vec<PathName> {
    report.paths.iter().filter(|verdict| verdict.is_ok()).map(|verdict| verdict.path).collect()
}

#[test]
fn an_agent_of_this_host_is_found_by_either_address() {
    let (agent, folder) = agent();
    for address in agent.addresses() {
        let report = examine(&folder, &address.to_string(), &["--require", "shm"]);
        assert!(report.ok, "{report:#?}");
        let (answer, detail) = state(&report, "answer");
        assert!(answer == State::Ok && detail.contains("decode-0"), "{detail}");
        let (socket, detail) = state(&report, "socket");
        assert!(socket == State::Ok && detail.contains("process "), "{detail}");
        assert_eq!(possible(&report), [PathName::Shm]);
        let why = |path| {
            let mut verdicts = report.paths.iter();
            verdicts.find(|verdict| verdict.path == path).unwrap().detail.clone()
        };
        assert_eq!(why(PathName::CudaIpc), "the peer's pool is in host memory");
        assert_eq!(why(PathName::Local), "the peer is another process");
        assert_eq!(why(PathName::Tcp), "the consumer says: allow_insecure is not set");
        let (choice, detail) = state(&report, "choice");
        assert_eq!((choice, detail.as_str()), (State::Ok, "shm, for KV in host memory"));
        let peer = report.peer.unwrap();
        assert_eq!(peer.chooses.as_deref(), Some("shm"));
        assert!(peer.same_host && peer.name == "decode-0", "{peer:?}");
    }
}

#[test]
fn an_agent_whose_socket_is_out_of_sight_cannot_be_handed_memory() {
    let (agent, folder) = agent();
    let tcp = agent.addresses()[0].to_string();
    std::fs::rename(folder.0.join("s"), folder.0.join("elsewhere")).unwrap();
    let report = examine(&folder, &tcp, &[]);
    let (socket, detail) = state(&report, "socket");
    assert!(socket == State::Refused && detail.contains("No such file"), "{detail}");
    assert!(!report.ok && possible(&report).is_empty());
    assert!(report.refused[0].contains("mount the socket folder in both containers"), "{report:?}");
}

#[test]
fn another_host_is_told_by_its_boot() {
    let (agent, folder) = agent();
    let host = crate::fake::Fake::new();
    let tcp = agent.addresses()[0].to_string();
    let report = Report::of(&host.host, &args(&["--peer", &tcp, "--require", "shm,cuda_ipc"]));
    assert_eq!(state(&report, "host").0, State::Absent);
    assert!(!report.peer.unwrap().same_host);
    assert_eq!(report.refused.len(), 2, "{:?}", report.refused);
    assert!(report.refused[0].starts_with("cuda_ipc: the peer is on another host"));
    drop(folder);
}

#[test]
fn what_the_peer_requires_counts() {
    let (mut config, folder) = config();
    config.require_path = Some(PathName::Local);
    let agent = Agent::start(config).unwrap();
    let report = examine(&folder, &agent.addresses()[0].to_string(), &["--require", "shm"]);
    assert_eq!(report.refused, ["shm: local is required"]);
    assert_eq!(state(&report, "choice").0, State::Refused);
    assert!(possible(&report).is_empty());
}

#[test]
fn paths_over_a_network_are_judged_too() {
    let (mut config, folder) = config();
    config.allow_insecure = true;
    let agent = Agent::start(config).unwrap();
    let report = examine(&folder, &agent.addresses()[0].to_string(), &["--require", "tcp"]);
    assert!(report.ok, "{:?}", report.refused);
    assert_eq!(possible(&report), [PathName::Shm, PathName::Tcp]);
    assert_eq!(report.peer.unwrap().chooses.as_deref(), Some("shm"));
}

#[test]
fn a_prefill_engine_chooses_nothing() {
    let (decode, folder) = agent();
    let (mut config, own) = config();
    config.role = Role::Producer;
    config.peers = vec![decode.addresses()[0].clone()];
    let prefill = Agent::start(config).unwrap();
    let report = examine(&own, &prefill.addresses()[0].to_string(), &[]);
    let (choice, detail) = state(&report, "choice");
    assert_eq!(choice, State::Warn, "{detail}");
    assert!(report.ok, "{:?}", report.refused);
    drop(folder);
}

#[test]
fn a_closed_port_and_a_web_server_are_told_apart() {
    let folder = Folder::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
    });
    let report = examine(&folder, &address, &[]);
    server.join().unwrap();
    assert!(!report.ok && report.peer.is_none() && possible(&report).is_empty());
    assert!(report.refused[0].contains("look like HTTP"), "{:?}", report.refused);
    assert!(report.refused[0].contains("agent's own port"), "{:?}", report.refused);

    // Nobody listens there any more.
    let report = examine(&folder, &address, &["--require", "shm"]);
    assert!(report.refused[0].contains("Connection refused"), "{:?}", report.refused);
    assert_eq!(state(&report, "answer").0, State::Refused);
}

#[test]
fn who_says_nothing_is_not_waited_for() {
    let folder = Folder::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let report = examine(&folder, &address, &["--timeout", "0.05"]);
    assert!(report.refused[0].contains("says nothing"), "{:?}", report.refused);
}
