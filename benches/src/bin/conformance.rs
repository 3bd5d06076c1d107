//! `make conformance`: every transport held to the same contract, one line each.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use kvxfer_benches::Result;
use kvxfer_benches::gpu::standin;
use kvxfer_benches::gpu::suite::{self, Outcome, Outcomes, Suite};
use kvxfer_benches::machine::{commit, says};
use kvxfer_benches::report::target;
use serde_json::{Value, json};

/// The transports that have to be there; `fault` is the decorator of tests.
const TRANSPORTS: [&str; 6] =
    ["local", "shm", "cuda_ipc", "cuda_ipc_fabric", "cuda_ipc_legacy", "tcp"];
/// For all tests, on a busy machine.
const LIMIT: Duration = Duration::from_secs(900);
const USAGE: &str = "usage: conformance STANDIN   the folder with the stand-in's libcuda.so.1";

fn main() -> ExitCode {
    match run() {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("conformance: {error}");
            ExitCode::FAILURE
        }
    }
}

/// How many tests failed.
fn run() -> Result<usize> {
    let folder = std::env::args().nth(1).ok_or(USAGE)?;
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize()?;
    let tests = suite::build(&root, &["--workspace", "--test", "conformance"], &[])?;
    let binary = tests.get("conformance").cloned().ok_or("cargo built no test \"conformance\"")?;
    let outcomes = suite(binary, Path::new(&folder))?.run(&mut suite::tell)?;
    let transports = by_transport(&outcomes);
    println!("{}", table(&transports));
    let missing: Vec<&str> =
        TRANSPORTS.into_iter().filter(|name| !transports.contains_key(*name)).collect();
    if !missing.is_empty() {
        return Err(format!("no test ran for {}", missing.join(", ")).into());
    }
    let mut report = suite::report(&outcomes);
    report["transports"] =
        transports.iter().map(|(name, outcomes)| (name.clone(), figures(outcomes))).collect();
    report["commit"] = commit().into();
    report["date"] = says("date", &["-u", "+%Y-%m-%dT%H:%M:%SZ"]).into();
    std::fs::create_dir_all(target().join("reports"))?;
    let text = serde_json::to_string_pretty(&report)? + "\n";
    std::fs::write(target().join("reports/conformance.json"), text)?;
    println!("target/reports/conformance.json has each test");
    Ok(suite::count(&outcomes).1)
}

fn suite(binary: PathBuf, folder: &Path) -> Result<Suite> {
    let mut env = standin::accounts(&target().join("standin/conformance"))?;
    env.push(standin::found_in(folder));
    let but = suite::BODIES.into();
    Ok(Suite { name: "conformance", binary, filters: vec![], but, env, limit: LIMIT })
}

/// The outcomes by the name of the module that they are in: "conformance::shm::…".
fn by_transport(outcomes: &Outcomes) -> BTreeMap<String, Outcomes> {
    let mut transports: BTreeMap<String, Outcomes> = BTreeMap::new();
    for (name, outcome) in outcomes {
        let module = name.split("::").nth(1).unwrap_or(name);
        transports.entry(module.into()).or_default().insert(name.clone(), outcome.clone());
    }
    transports
}

/// Why tests were skipped, each reason once.
fn reasons(outcomes: &Outcomes) -> String {
    let whys: BTreeSet<&str> = outcomes
        .values()
        .filter_map(|outcome| match outcome {
            Outcome::Skipped(why) => Some(why.as_str()),
            Outcome::Passed | Outcome::Failed => None,
        })
        .collect();
    whys.into_iter().collect::<Vec<_>>().join("; ")
}

fn figures(outcomes: &Outcomes) -> Value {
    let (passed, failed, skipped) = suite::count(outcomes);
    let why = reasons(outcomes);
    let reason = if why.is_empty() { Value::Null } else { why.into() };
    json!({ "passed": passed, "failed": failed, "skipped": skipped, "reason": reason })
}

fn table(transports: &BTreeMap<String, Outcomes>) -> String {
    let head = format!("{:<20} {:>7} {:>7} {:>8}", "", "passed", "failed", "skipped");
    let line = |(name, outcomes): (&String, &Outcomes)| {
        let (passed, failed, skipped) = suite::count(outcomes);
        let why = reasons(outcomes);
        format!("{name:<20} {passed:>7} {failed:>7} {skipped:>8}  {why}").trim_end().to_owned()
    };
    [head].into_iter().chain(transports.iter().map(line)).collect::<Vec<_>>().join("\n")
}
