//! `docs/paths.md`: pairs of agents in each situation that we can bring about here, and what they say.

use std::fmt::Write;
use std::path::Path as File;

use kvxfer_core::path::PathName;
use kvxfer_cuda::{Address, AgentConfig, Role};

use crate::engine::{Engine, config};
use crate::logs::{self, lines};
use crate::tempdir::TempDir;

/// Of two hosts, in the eyes of the agents.
const ELSEWHERE: [u8; 16] = [7; 16];

struct Situation {
    name: &'static str,
    consumer: fn(&mut AgentConfig),
    producer: fn(&mut AgentConfig),
    /// What is done to the consumer's socket folder before the producer starts.
    folder: fn(&File),
}

/// The two are processes of one host. As agents of this process they would be nearer.
fn one_host(config: &mut AgentConfig) {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let digits: Vec<u32> = text.chars().filter_map(|digit| digit.to_digit(16)).collect();
    let bytes: Vec<u8> = digits.chunks_exact(2).map(|two| (two[0] << 4 | two[1]) as u8).collect();
    config.boot_id = Some(bytes.try_into().unwrap());
}

fn two_hosts(config: &mut AgentConfig) {
    config.boot_id = Some(ELSEWHERE);
    config.allow_insecure = true;
}

fn insecure(config: &mut AgentConfig) {
    config.allow_insecure = true;
}

fn nothing(_: &mut AgentConfig) {}

fn keep(_: &File) {}

/// The folder is of a container whose files the other one does not see.
fn hide(folder: &File) {
    std::fs::rename(folder, folder.with_extension("hidden")).unwrap();
}

const SITUATIONS: &[Situation] = &[
    Situation { name: "agents of one process", consumer: nothing, producer: nothing, folder: keep },
    Situation {
        name: "processes of one host",
        consumer: one_host,
        producer: nothing,
        folder: keep,
    },
    Situation {
        name: "one host, but no socket folder in common",
        consumer: |config| {
            one_host(config);
            insecure(config);
        },
        producer: insecure,
        folder: hide,
    },
    Situation {
        name: "the same, and `allow_insecure` is not set",
        consumer: one_host,
        producer: nothing,
        folder: hide,
    },
    Situation { name: "two hosts", consumer: two_hosts, producer: insecure, folder: keep },
    Situation {
        name: "two hosts, `require_path` = shm at the consumer",
        consumer: |config| {
            two_hosts(config);
            config.require_path = Some(PathName::Shm);
        },
        producer: insecure,
        folder: keep,
    },
    Situation {
        name: "two hosts, `require_path` = shm at the producer",
        consumer: two_hosts,
        producer: |config| {
            insecure(config);
            config.require_path = Some(PathName::Shm);
        },
        folder: keep,
    },
    Situation {
        name: "one host, `require_path` = tcp",
        consumer: |config| {
            one_host(config);
            config.require_path = Some(PathName::Tcp);
        },
        producer: nothing,
        folder: keep,
    },
];

/// The path and the reasons, or the error that the producer's operator reads.
fn outcome(at: usize, situation: &Situation) -> (String, String) {
    let dir = TempDir::new();
    // Each side knows the other by its name in the log.
    let mut consumer = config(Role::Consumer, dir.path());
    consumer.name = format!("decode of situation {at}.");
    // Not whichever this machine has.
    let no_ucx = Some("/nowhere/libucp.so.0".into());
    consumer.ucx_library.clone_from(&no_ucx);
    (situation.consumer)(&mut consumer);
    let decode = Engine::start(consumer);
    (situation.folder)(dir.path());
    let elsewhere = TempDir::new();
    let mut producer = config(Role::Producer, elsewhere.path());
    producer.name = format!("prefill of situation {at}.");
    producer.peers = vec![decode.tcp()];
    producer.ucx_library = no_ucx;
    (situation.producer)(&mut producer);
    let prefill = Engine::start(producer);

    let address = match decode.tcp() {
        Address::Tcp { host, port } => format!("{host}:{port}"),
        Address::Unix(_) => unreachable!("it is asked for its TCP address"),
    };
    let (us, them) = (format!("prefill of situation {at}."), format!("decode of situation {at}."));
    let found = prefill.until(|prefill| {
        let path = prefill.agent.stats().unwrap().paths.pop();
        let error = || lines(&["a consumer; next attempt", &address]).pop();
        let refused = || lines(&["a consumer; next attempt", &them]).pop();
        match path {
            Some(path) => Some(Ok(path)),
            None => error().or_else(refused).map(Err),
        }
    });
    drop((prefill, decode));
    let _ = std::fs::remove_dir_all(dir.path().with_extension("hidden"));
    match found {
        Ok(path) => {
            let whys: Vec<String> = path.refused.iter().map(ToString::to_string).collect();
            (path.label(), whys.join("<br>"))
        }
        Err(line) => {
            let why = line.split("error=").nth(1).unwrap_or(&line);
            let hidden = [(&*address, "HOST:PORT"), (&*us, "prefill"), (&*them, "decode")];
            let why = hidden.iter().fold(why.to_owned(), |why, (from, to)| why.replace(from, to));
            ("none".into(), without_names(&why))
        }
    }
}

/// Incarnations and socket paths are others each time.
fn without_names(text: &str) -> String {
    let words = text.split(' ').map(|word| {
        let plain = word.trim_end_matches([':', ',', ';', ')']);
        let hex = plain.len() == 8 && plain.chars().all(|c| c.is_ascii_hexdigit());
        match hex || plain.ends_with(".sock") {
            true => word.replace(plain, "…"),
            false => word.to_owned(),
        }
    });
    words.collect::<Vec<_>>().join(" ")
}

#[test]
fn the_table_is_as_committed() {
    logs::listen();
    let mut text = String::from(HEAD);
    for (at, situation) in SITUATIONS.iter().enumerate() {
        let (path, why) = outcome(at, situation);
        writeln!(text, "| {} | {path} | {why} |", situation.name).unwrap();
    }
    let file = File::new(env!("CARGO_MANIFEST_DIR")).join("../docs/paths.md");
    if std::env::var_os("KVXFER_WRITE").is_some_and(|value| value == "1") {
        std::fs::write(&file, &text).unwrap();
    }
    let committed = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(
        text == committed,
        "docs/paths.md is out of date: run this with KVXFER_WRITE=1\n{text}"
    );
}

const HEAD: &str = "\
# Which path, and why not a better one

Each side says what it is able to do, the consumer takes the best path that both can have, proves it with bytes that it
reads back, and both log one line: `path=\"tcp\" not=\"local: …; shm: …\"`. `Agent.paths()` has the same, and the GB/s of the first
bytes. The order is local, shm, ucx, tcp for KV in host memory, and cuda_ipc, ucx for KV on a GPU. `kvxfer doctor --peer` says
what a pair would get.

A path that breaks is proved again with the next connection. If it fails a second time within a minute, and `failover` is
set, the next best one is taken, with a line at level WARN; without `failover` the two stay apart and say so.

Made by the test `table::the_table_is_as_committed`, from pairs of agents that were in that situation or (hosts, processes)
took themselves to be; `KVXFER_WRITE=1` has it written. Neither side has UCX there. Where `require_path` = ucx and UCX can't be
had, an agent does not start, and says why.

| situation | path | why nothing better, or nothing at all |
|---|---|---|
";
