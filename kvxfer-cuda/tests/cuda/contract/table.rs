//! `docs/driver-contract.md`: which behaviours there are, and which of them real hardware has shown.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use super::{Clause, capture, context, copies, kernels, memory, sharing, streams};

const ALL: [(&str, &[Clause]); 7] = [
    ("Streams and events", streams::CLAUSES),
    ("Copies", copies::CLAUSES),
    ("Memory", memory::CLAUSES),
    ("Two processes", sharing::CLAUSES),
    ("Kernels", kernels::CLAUSES),
    ("Graph capture", capture::CLAUSES),
    ("Contexts and threads", context::CLAUSES),
];

const HEAD: &str = "\
# What we rely on the CUDA driver for

Each row is a behaviour of the driver that kvxfer counts on, and the test that shows it: `cargo test --package
kvxfer-cuda --test cuda contract`, on whichever `libcuda.so.1` is found. All of them pass on the stand-in (`make
standin`), which does what its authors believe that the driver does. So a row reads `assumed` until its test has passed
on a real GPU; `make gpu-check` runs them there, and `hardware.json` beside this file holds what passed.

Made by the test `contract::table::the_table_is_as_committed`; `KVXFER_WRITE=1` has it written.
";

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs")
}

/// On which hardware a test has passed: the last one that `hardware.json` names.
fn seen(hardware: &Value, test: &str) -> String {
    let runs = hardware.get("runs").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let run = runs.iter().rev().find(|run| {
        run.get("passed")
            .and_then(Value::as_array)
            .is_some_and(|passed| passed.iter().any(|name| name == test))
    });
    let Some(run) = run else { return "`assumed`".into() };
    let device = run.get("device").and_then(Value::as_str).unwrap_or("a GPU");
    match run.get("driver").and_then(Value::as_u64) {
        Some(driver) => {
            format!("seen on {device}, driver {}.{}", driver / 1000, driver % 1000 / 10)
        }
        None => format!("seen on {device}"),
    }
}

fn table(hardware: &Value) -> String {
    let mut text = HEAD.to_owned();
    for (title, clauses) in ALL {
        let _ = write!(text, "\n## {title}\n\n| behaviour | test | status |\n|---|---|---|\n");
        for (test, behaviour) in clauses {
            let status = seen(hardware, &format!("contract::{test}"));
            let _ = writeln!(text, "| {behaviour} | `{test}` | {status} |");
        }
    }
    text
}

#[test]
fn the_table_is_as_committed() {
    let hardware = fs::read_to_string(docs().join("hardware.json")).unwrap();
    let now = table(&serde_json::from_str(&hardware).unwrap());
    let path = docs().join("driver-contract.md");
    if std::env::var_os("KVXFER_WRITE").is_some_and(|value| value == "1") {
        fs::write(&path, &now).unwrap();
    }
    let committed = fs::read_to_string(path).unwrap_or_default();
    assert!(
        committed == now,
        "docs/driver-contract.md is out of date: run this with KVXFER_WRITE=1"
    );
}

#[test]
fn hardware_turns_an_assumption_into_a_sight() {
    let hardware = serde_json::json!({ "runs": [
        { "device": "NVIDIA A", "driver": 12080, "passed": ["contract::a", "contract::b"] },
        { "device": "NVIDIA B", "driver": 13010, "passed": ["contract::b"] },
    ]});
    assert_eq!(seen(&hardware, "contract::a"), "seen on NVIDIA A, driver 12.8");
    assert_eq!(seen(&hardware, "contract::b"), "seen on NVIDIA B, driver 13.1");
    assert_eq!(seen(&hardware, "contract::c"), "`assumed`");
    assert_eq!(seen(&Value::Null, "contract::c"), "`assumed`");
}

#[test]
fn each_clause_is_a_test_and_each_test_a_clause() {
    let list = Command::new(std::env::current_exe().unwrap())
        .args(["contract::", "--list", "--format", "terse"])
        .output()
        .unwrap();
    let list = String::from_utf8(list.stdout).unwrap();
    let tests: BTreeSet<&str> = list
        .lines()
        .filter_map(|line| line.strip_suffix(": test")?.strip_prefix("contract::"))
        .filter(|test| !test.starts_with("table::") && !test.ends_with("::child"))
        .collect();
    let clauses: Vec<&str> =
        ALL.iter().flat_map(|(_, clauses)| *clauses).map(|&(test, _)| test).collect();
    assert_eq!(tests, clauses.iter().copied().collect());
    assert_eq!(clauses.len(), tests.len(), "one is listed twice");
    let statements: BTreeSet<&str> =
        ALL.iter().flat_map(|(_, clauses)| *clauses).map(|&(_, behaviour)| behaviour).collect();
    assert_eq!(statements.len(), clauses.len(), "two tests show the same");
}
