//! Each situation of two agents, and which path they get.

use kvxfer_core::ErrorKind;
use kvxfer_core::path::{Ability, Pair, PathName, Refusal, choose, judge};

/// Two processes of a host, nothing missing, KV in host memory.
fn pair() -> Pair {
    Pair { one_process: false, hands_memory: Ok(()), gpus: None, kv_on_gpu: false }
}

fn on_gpus(reach: Result<(), &str>) -> Pair {
    Pair { gpus: Some(reach.map_err(str::to_owned)), kv_on_gpu: true, ..pair() }
}

fn all() -> Vec<Ability> {
    PathName::ALL.map(|path| Ability::able(path, vec![])).to_vec()
}

fn without(path: PathName, why: &str) -> Vec<Ability> {
    let mut abilities = all();
    abilities.retain(|ability| ability.path != path.as_str());
    abilities.push(Ability::unable(path, why));
    abilities
}

fn told(
    pair: &Pair,
    consumer: &[Ability],
    producer: &[Ability],
    required: Option<PathName>,
) -> String {
    match choose(pair, consumer, producer, required) {
        Ok(choice) => {
            let whys: Vec<String> = choice.refused.iter().map(Refusal::to_string).collect();
            format!("{} ({})", choice.path, whys.join("; "))
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::NoPath);
            format!("none: {error}")
        }
    }
}

#[test]
fn the_best_path_that_the_pair_allows_and_both_are_able_to() {
    let elsewhere = || Pair { hands_memory: Err("it is on another host".into()), ..pair() };
    let no_ucx = without(PathName::Ucx, "no libucp");
    for (pair, consumer, producer, wanted) in [
        (Pair { one_process: true, ..pair() }, all(), all(), "local ()"),
        (pair(), all(), all(), "shm (local: the two are different processes)"),
        (
            elsewhere(),
            all(),
            all(),
            "ucx (local: the two are different processes; shm: it is on another host)",
        ),
        (
            elsewhere(),
            all(),
            no_ucx.clone(),
            "tcp (local: the two are different processes; shm: it is on another host; \
             ucx: the producer says: no libucp)",
        ),
        (
            elsewhere(),
            no_ucx.clone(),
            vec![Ability::able(PathName::Ucx, vec![])],
            "none: no path to this producer: local: the two are different processes; shm: it is on another host; \
             ucx: the consumer says: no libucp; tcp: the producer does not know it",
        ),
        (on_gpus(Ok(())), all(), all(), "cuda_ipc ()"),
        (on_gpus(Err("MIG")), all(), all(), "ucx (cuda_ipc: MIG)"),
        (
            Pair { kv_on_gpu: true, ..pair() },
            all(),
            all(),
            "none: the pool is in host memory, and the producer's KV in GPU memory \
             (set kv_buffer_device to the same on both sides)",
        ),
        (
            Pair { kv_on_gpu: false, ..on_gpus(Ok(())) },
            all(),
            all(),
            "none: the pool is in GPU memory, and the producer's KV in host memory \
             (set kv_buffer_device to the same on both sides)",
        ),
    ] {
        assert_eq!(told(&pair, &consumer, &producer, None), wanted);
    }
}

#[test]
fn a_required_path_is_taken_or_nothing_is() {
    let (tcp, ucx) = (Some(PathName::Tcp), Some(PathName::Ucx));
    for (pair, consumer, required, wanted) in [
        (
            pair(),
            all(),
            tcp,
            "tcp (local: tcp is required; shm: tcp is required; ucx: tcp is required)",
        ),
        (
            pair(),
            without(PathName::Ucx, "no libucp"),
            ucx,
            "none: the required path cannot be had: ucx: the consumer says: no libucp \
             (set up what is missing, or unset require_path)",
        ),
        (
            pair(),
            all(),
            Some(PathName::Local),
            "none: the required path cannot be had: local: the two are different processes \
             (set up what is missing, or unset require_path)",
        ),
        (
            pair(),
            all(),
            Some(PathName::CudaIpc),
            "none: cuda_ipc is required, which does not lead to memory of this kind",
        ),
    ] {
        assert_eq!(told(&pair, &consumer, &all(), required), wanted);
    }
}

#[test]
fn names_are_read_as_they_are_written() {
    for path in PathName::ALL {
        assert_eq!(path.to_string().parse::<PathName>().unwrap(), path);
    }
    let error = "nvlink".parse::<PathName>().unwrap_err();
    assert_eq!(
        error.to_string(),
        "\"nvlink\" is no path (take one of cuda_ipc, local, shm, ucx, tcp)"
    );
}

#[test]
fn who_examines_is_told_of_all_that_lead_there() {
    let no_ucx = without(PathName::Ucx, "no libucp");
    let judged = judge(&pair(), &no_ucx, &all(), None).unwrap();
    let whys =
        |path: PathName| judged.iter().find(|(judged, _)| *judged == path).unwrap().1.clone();
    assert_eq!(
        judged.iter().map(|(path, _)| path.as_str()).collect::<Vec<_>>(),
        ["local", "shm", "ucx", "tcp"]
    );
    assert_eq!((whys(PathName::Shm), whys(PathName::Tcp)), (None, None));
    assert_eq!(whys(PathName::Ucx).unwrap(), "the consumer says: no libucp");
    let mixed = Pair { kv_on_gpu: true, ..pair() };
    assert_eq!(judge(&mixed, &all(), &all(), None).unwrap_err().kind(), ErrorKind::NoPath);
}
