//! Which path two agents get, that bytes go that way, and what happens when it breaks.

use kvxfer_core::path::PathName;
use kvxfer_core::wire::message::Next;
use kvxfer_cuda::{AgentConfig, Path};

use crate::engine::Engine;
use crate::logs::{self, lines};
use crate::{blocks, pair, prompt};

/// The path to the one peer.
fn path(engine: &Engine) -> Path {
    engine.until(|engine| engine.agent.stats().unwrap().paths.pop())
}

fn over_tcp(config: &mut AgentConfig) {
    config.require_path = Some(PathName::Tcp);
    config.allow_insecure = true;
}

/// A prompt gets across, by that path.
fn serves(prefill: &mut Engine, decode: &mut Engine, seed: u32, by: &str) {
    let prompt = prompt(seed, 1000);
    let (from, to) = (blocks(&prompt, 7), blocks(&prompt, 11));
    decode.poison();
    let offer = prefill.prefill(&prompt, &from);
    let claim = decode.claim(&prompt);
    decode.until_claimed(claim, Next::Done);
    let loaded = decode.load(claim, &prompt, &to);
    assert_eq!((loaded.result, &*loaded.path), (Ok(()), by));
    assert!(decode.holds(&prompt, &to));
    prefill.until_pushed(offer, 16);
    assert_eq!(decode.agent.stats().unwrap().pages_leaked, 0);
}

#[test]
fn both_sides_know_the_path_and_why_not_a_better_one_and_how_fast_its_first_bytes_were() {
    logs::listen();
    let mut pair = pair(|config| {
        over_tcp(config);
        config.name = format!("{:?} by tcp", config.role);
    });
    serves(&mut pair.prefill, &mut pair.decode, 1, "tcp");
    let [there, here] = [&pair.prefill, &pair.decode].map(path);
    assert_eq!((there.name, here.name), (PathName::Tcp, PathName::Tcp));
    assert_eq!((there.to_peer, here.to_peer), (true, false));
    assert_eq!((&*there.peer_name, &*here.peer_name), ("Consumer by tcp", "Producer by tcp"));
    assert_eq!(there.why(), "local: tcp is required; shm: tcp is required; ucx: tcp is required");
    assert_eq!(there.refused, here.refused);
    assert!(there.gbps.is_some_and(|gbps| gbps > 0.0), "{there:?}");
    assert!(here.gbps.is_some_and(|gbps| gbps > 0.0), "{here:?}");
    for (line, name) in [
        ("connected to a consumer", "Consumer by tcp"),
        ("a producer connected", "Producer by tcp"),
    ] {
        let said = lines(&["INFO", line, name, "path=\"tcp\"", "shm: tcp is required"]);
        assert_eq!(said.len(), 1, "{said:?}");
    }
}

/// Where agents say that they are elsewhere, or writes are dropped.
#[cfg(feature = "faults")]
mod faults {
    use std::time::{Duration, Instant};

    use std::path::PathBuf;

    use kvxfer_core::ErrorKind;
    use kvxfer_core::path::PathName;
    use kvxfer_cuda::{Agent, AgentConfig, Role};

    use super::{path, serves};
    use crate::common::{libucp, skip};
    use crate::engine::{Engine, PATIENCE, config};
    use crate::logs::{self, lines};
    use crate::{blocks, prompt, tempdir};

    /// Without a socket folder in common, or from another host.
    #[test]
    fn from_another_host_bytes_come_over_tcp() {
        let (here, there) = (tempdir::TempDir::new(), tempdir::TempDir::new());
        let mut consumer = config(Role::Consumer, here.path());
        consumer.allow_insecure = true;
        consumer.boot_id = Some([7; 16]);
        let mut decode = Engine::start(consumer);
        let mut producer = config(Role::Producer, there.path());
        producer.allow_insecure = true;
        producer.peers = vec![decode.tcp()];
        let mut prefill = Engine::start(producer);
        serves(&mut prefill, &mut decode, 1, "tcp");
        let why = path(&decode).why();
        assert!(why.contains("shm: it is on another host"), "{why}");
    }

    /// A path that fails twice gives way to the next best, if that is allowed, and the log says so.
    #[test]
    fn a_path_that_fails_twice_gives_way_to_the_next_where_that_is_allowed() {
        logs::listen();
        let dir = tempdir::TempDir::new();
        let mut consumer = config(Role::Consumer, dir.path());
        consumer.name = "decode falls over".into();
        consumer.allow_insecure = true;
        consumer.failover = true;
        let mut decode = Engine::start(consumer);
        let mut producer = config(Role::Producer, dir.path());
        producer.name = "prefill falls over".into();
        producer.allow_insecure = true;
        producer.peers = vec![decode.tcp()];
        // On local and shm.
        producer.fault = Some(kvxfer_cuda::Fault::DropWrites);
        let mut prefill = Engine::start(producer);

        // Whatever is offered has its segment probed.
        let begun = Instant::now();
        for seed in 10.. {
            let text = prompt(seed, 100);
            prefill.prefill(&text, &blocks(&text, 7));
            let claim = decode.claim(&text);
            decode.observer.settled(claim, Duration::from_millis(200));
            decode.observer.release(claim, 0, 0);
            let found = decode.agent.stats().unwrap().paths.pop();
            if found.is_some_and(|path| path.name == PathName::Tcp) {
                break;
            }
            assert!(begun.elapsed() < PATIENCE, "it never falls over");
        }
        let why = path(&decode).why();
        assert!(
            why.contains("local: the consumer says: it failed: what the producer writes"),
            "{why}"
        );
        assert!(why.contains("shm: the consumer says: it failed"), "{why}");
        for path in ["local", "shm"] {
            // Once might be chance.
            let failed = lines(&["prefill falls over", &format!("{path} failed: ")]);
            assert!(failed.len() >= 2, "{failed:?}");
            let said = lines(&[
                "WARN",
                &format!("{path} failed twice: the next attempt takes the next best"),
            ]);
            assert!(!said.is_empty(), "{path}");
        }
        serves(&mut prefill, &mut decode, 1, "tcp");
    }

    /// A pair that sees no better path than ucx, and takes it from that library.
    fn far(library: PathBuf, more: impl Fn(&mut AgentConfig)) -> [Engine; 2] {
        let dir = tempdir::TempDir::new();
        let make = |role| {
            let mut config = config(role, dir.path());
            config.allow_insecure = true;
            config.ucx_library = Some(library.clone());
            config.ucx_devices = Some("lo".into());
            config.trust_ucx_peers = true;
            more(&mut config);
            config
        };
        let mut consumer = make(Role::Consumer);
        consumer.boot_id = Some([7; 16]);
        let decode = Engine::start(consumer);
        let mut producer = make(Role::Producer);
        producer.peers = vec![decode.tcp()];
        [Engine::start(producer), decode]
    }

    /// In one test, for a process has one UCX.
    #[test]
    fn ucx_is_taken_where_it_can_be_had_and_missing_it_is_no_failure_unless_it_is_required() {
        let old = libucp::of_version("agent-old", 10);
        for (library, why) in
            [("/nowhere.so", "can't be loaded"), (&*old, "is UCX 1.10.2, older than 1.14.0")]
        {
            let [mut prefill, mut decode] = far(library.into(), |_| ());
            serves(&mut prefill, &mut decode, 1, "tcp");
            let refused = path(&decode).why();
            let told = refused.contains("ucx: the consumer says: ") && refused.contains(why);
            assert!(told && refused.contains(library), "{refused}");

            for role in [Role::Consumer, Role::Producer] {
                let dir = tempdir::TempDir::new();
                let mut config = config(role, dir.path());
                config.peers = vec![decode.tcp()];
                config.ucx_library = Some(library.into());
                config.require_path = Some(PathName::Ucx);
                let error = Agent::start(config).map(|_| ()).unwrap_err();
                let text = error.to_string();
                assert!(text.contains("ucx is required and can't be had"), "{text}");
                assert!(text.contains(why) && error.kind() != ErrorKind::Io, "{text}");
            }
        }

        let Some(wheel) = std::env::var_os("KVXFER_TEST_UCX") else {
            return skip("KVXFER_TEST_UCX=$(env/ucx) is not set");
        };
        let library = PathBuf::from(wheel).join("lib");
        for required in [None, Some(PathName::Ucx)] {
            let [mut prefill, mut decode] =
                far(library.clone(), |config| config.require_path = required);
            serves(&mut prefill, &mut decode, 1, "ucx (tcp/lo)");
            for side in [&prefill, &decode] {
                assert_eq!(path(side).label(), "ucx (tcp/lo)");
            }
        }
        // Where there is RDMA, it is taken.
        if !std::fs::exists("/sys/class/infiniband").unwrap() {
            let [mut prefill, mut decode] = far(library, |config| config.trust_ucx_peers = false);
            serves(&mut prefill, &mut decode, 1, "tcp");
            let why = path(&decode).why();
            let reason = "has no RDMA here; tcp is as good without (trust_ucx_peers lets it use what it has)";
            assert!(
                why.contains("ucx: the consumer says: UCX 1.") && why.contains(reason),
                "{why}"
            );
        }
    }
}
