//! A fleet in virtual time: prefill and decode engines, their agents, the network between them, and all that goes
//! wrong with them, from a seed. See `oracle.rs` for what must hold.

mod clock;
mod data;
mod decode;
mod faults;
mod net;
mod oracle;
mod plan;
mod prefill;
mod report;
mod rng;
mod world;

use std::time::{Duration, Instant};

use report::Counts;
use world::World;

/// Seeds that once failed.
const SAVED: &str = include_str!("seeds.txt");

fn replay_command(seed: u64) -> String {
    format!("KVXFER_SIM_SEED={seed} cargo test -p kvxfer-core --test sim replay -- --nocapture")
}

/// Says how to see it again, even if the machines panic.
struct Telltale(u64);

impl Drop for Telltale {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("seed {} panicked; replay: {}", self.0, replay_command(self.0));
        }
    }
}

fn run(seed: u64, trace: bool) -> (Counts, Result<(), String>) {
    let telltale = Telltale(seed);
    let mut world = World::new(seed, trace);
    let result = world.run();
    std::mem::forget(telltale);
    (world.counts, result)
}

fn run_all(seeds: impl Iterator<Item = u64>) -> (u64, Counts, Vec<(u64, String)>) {
    let mut counts = Counts::default();
    let mut failed = Vec::new();
    let mut ran = 0;
    for seed in seeds {
        let (more, result) = run(seed, false);
        counts.add(more);
        ran += 1;
        if let Err(what) = result {
            eprintln!("seed {seed}: {what}\n  replay: {}", replay_command(seed));
            failed.push((seed, what));
        }
    }
    (ran, counts, failed)
}

/// 0 violations are worth nothing if nothing happened.
fn check_coverage(counts: &Counts) {
    let must = [
        "Granted",
        "Have",
        "Pending",
        "Busy",
        "Refused",
        "Revoke",
        "FenceAck",
        "Abort",
        "Withdraw",
        "CommitAck indexed",
        "CommitAck expired",
        "Retire",
        "Retired",
        "Ask",
        "Told",
        "close: segment not let go",
        "replace",
        "death seen",
        "write to a quarantined page",
        "write swallowed by old memory",
        "write of a stopped process",
        "load ok",
        "load failed: corrupt",
        "load failed: timeout",
        "load failed: peer lost",
        "local prefix hit",
        "given up: overdue",
        "copy found corrupt",
    ];
    let missing: Vec<_> = must.iter().filter(|step| counts.total(step) == 0).collect();
    assert!(missing.is_empty(), "never happened: {missing:?}");
}

#[test]
fn seeds_hold() {
    let first = 1;
    let (ran, counts, failed) = run_all(first..first + 400);
    counts.print();
    println!("{ran} seeds, {} operations", counts.operations);
    assert!(failed.is_empty(), "{} of {ran} seeds failed", failed.len());
    check_coverage(&counts);
}

#[test]
fn saved_seeds_hold() {
    let seeds = SAVED.lines().filter_map(|line| line.split('#').next()?.trim().parse().ok());
    let (ran, _, failed) = run_all(seeds);
    assert!(failed.is_empty(), "{} of {ran} saved seeds failed", failed.len());
}

#[test]
fn a_seed_gives_the_same_run_twice() {
    for seed in 0..24 {
        let ((first, a), (second, b)) = (run(seed, false), run(seed, false));
        assert_eq!(first.operations, second.operations, "seed {seed}");
        assert_eq!(first.json(), second.json(), "seed {seed}");
        assert_eq!(a, b, "seed {seed}");
    }
}

#[test]
fn replay() {
    let Ok(seed) = std::env::var("KVXFER_SIM_SEED") else { return };
    let seed = seed.parse().expect("KVXFER_SIM_SEED is a number");
    let (_, result) = run(seed, std::env::var_os("KVXFER_SIM_QUIET").is_none());
    result.expect("the seed holds");
}

/// Each bug is found, and soon. For `make sim`, which builds with the bugs in.
#[cfg(kvxfer_planted)]
#[test]
fn planted() {
    use kvxfer_core::session::planted::{Bug, plant};
    let bugs = [
        Bug::DeadlineFrees,
        Bug::EofFences,
        Bug::LateCommitIndexed,
        Bug::MatchWithoutPin,
        Bug::DropIgnoresExpected,
        Bug::ExpectedYield,
        Bug::FenceAckEarly,
        Bug::ReplaceFreesOthers,
        Bug::RetireFrees,
    ];
    let mut lines = Vec::new();
    for bug in bugs {
        plant(Some(bug));
        let found = (1..=SEEDS_TO_FIND).find_map(|seed| Some((seed, run(seed, false).1.err()?)));
        plant(None);
        let (seeds, what) =
            found.unwrap_or_else(|| panic!("{bug:?}: not in {SEEDS_TO_FIND} seeds"));
        println!("{bug:?}: found with seed {seeds}: {what}");
        lines.push(format!("\"{bug:?}\": {seeds}"));
    }
    if let Ok(path) = std::env::var("KVXFER_SIM_PLANTED") {
        std::fs::write(path, format!("{{{}}}", lines.join(", "))).expect("the report is written");
    }
}

/// A planted bug that so many seeds do not show is not found.
#[cfg(kvxfer_planted)]
const SEEDS_TO_FIND: u64 = 1000;

/// For `make sim`: new seeds for so long.
#[test]
#[ignore = "runs for as long as KVXFER_SIM_SECONDS says"]
fn timed() {
    let seconds = std::env::var("KVXFER_SIM_SECONDS").ok().and_then(|s| s.parse().ok());
    let limit = Duration::from_secs(seconds.unwrap_or(60));
    let first: u64 =
        std::env::var("KVXFER_SIM_FIRST").ok().and_then(|s| s.parse().ok()).unwrap_or(1 << 32);
    let began = Instant::now();
    let (ran, counts, failed) = run_all((first..).take_while(|_| began.elapsed() < limit));
    let took = began.elapsed().as_secs_f64();
    counts.print();
    let rate = counts.operations as f64 / took;
    println!("{ran} seeds in {took:.1} s: {} operations, {rate:.0} a second", counts.operations);
    println!("violations: {}", failed.len());
    let seeds: Vec<String> = failed.iter().map(|(seed, _)| seed.to_string()).collect();
    // By bug, the seeds it took.
    let planted = std::env::var("KVXFER_SIM_PLANTED").ok();
    let planted = planted.and_then(|path| std::fs::read_to_string(path).ok());
    let planted = planted.unwrap_or_else(|| "{}".into());
    let report = format!(
        "{{\n  \"operations\": {},\n  \"violations\": {},\n  \"seeds\": {ran},\n  \"ops_per_second\": {rate:.0},\n  \"requests\": {},\n  \"failed_seeds\": [{}],\n  \"planted_bugs_found\": {planted},\n  \"transitions\": {}\n}}\n",
        counts.operations,
        failed.len(),
        counts.requests,
        seeds.join(", "),
        counts.json(),
    );
    if let Ok(path) = std::env::var("KVXFER_SIM_REPORT") {
        std::fs::write(path, report).expect("the report can be written");
    }
    assert!(failed.is_empty(), "{} of {ran} seeds failed", failed.len());
}
