//! The tests that need a driver, on the stand-in.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::Result;
use crate::gpu::suite::{self, Outcomes, Suite};
use crate::machine::{commit, says};
use crate::report::target;

/// For all tests of one binary, on a busy machine.
const LIMIT: Duration = Duration::from_secs(900);

/// What has a stand-in's devices counted across processes.
///
/// # Errors
/// The folder for its accounts can't be made.
pub fn accounts(folder: &Path) -> Result<Vec<(String, String)>> {
    // What an earlier run left is of processes that are gone.
    let _ = fs::remove_dir_all(folder);
    fs::create_dir_all(folder)?;
    let standin = format!("devices=2;fabric=1;ledger={}", folder.display());
    Ok(vec![("KVXFER_REQUIRE_CUDA".into(), "1".into()), ("KVXFER_STANDIN".into(), standin)])
}

/// What has the stand-in found as the driver.
pub fn found_in(folder: &Path) -> (String, String) {
    let more = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
    let colon = if more.is_empty() { "" } else { ":" };
    ("LD_LIBRARY_PATH".into(), format!("{}{colon}{more}", folder.display()))
}

/// The suites: the tests on a driver, the conformance of what needs one, and the planted bugs.
fn suites(
    tests: &BTreeMap<String, PathBuf>,
    planted: &BTreeMap<String, PathBuf>,
    env: &[(String, String)],
) -> Result<Vec<Suite>> {
    let named = |binaries: &BTreeMap<String, PathBuf>, name: &str| {
        binaries.get(name).cloned().ok_or(format!("cargo built no test {name:?}"))
    };
    let suite = |name, binary, filters| Suite {
        name,
        binary,
        filters,
        but: suite::BODIES.into(),
        env: env.to_vec(),
        limit: LIMIT,
    };
    Ok(vec![
        suite("cuda", named(tests, "cuda")?, vec![]),
        suite("conformance", named(tests, "conformance")?, vec!["cuda_ipc"]),
        suite("planted", named(planted, "cuda")?, vec!["::planted"]),
    ])
}

/// Builds and runs them, prints a table and writes `target/reports/standin.json`. How many failed.
///
/// # Errors
/// Something can't be built, started or written, or no test ran.
pub fn run(root: &Path, folder: &Path) -> Result<usize> {
    // As `make rust` builds them, so that nothing is built again.
    let tests = suite::build(root, &["--workspace", "--test", "conformance"], &[])?;
    let elsewhere = target().join("planted");
    let elsewhere = elsewhere.to_str().ok_or("a target folder that is no text")?;
    let planted = suite::build(
        root,
        &["--package", "kvxfer-cuda", "--target-dir", elsewhere],
        &[("RUSTFLAGS", "--cfg kvxfer_planted")],
    )?;
    let mut env = accounts(&target().join("standin/accounts"))?;
    env.push(found_in(folder));
    let found = target().join("standin/planted.json");
    let _ = fs::remove_file(&found);
    env.push(("KVXFER_PLANTED_REPORT".into(), found.display().to_string()));
    let mut outcomes = Outcomes::new();
    for suite in suites(&tests, &planted, &env)? {
        let ran = suite.run(&mut suite::tell)?;
        if ran.is_empty() {
            return Err(format!("{} ran no test", suite.name).into());
        }
        outcomes.extend(ran);
    }
    println!("{}", suite::table(&outcomes));
    let mut report = suite::report(&outcomes);
    // Each planted bug, and the test that found it.
    let planted = fs::read(&found).ok();
    report["planted"] =
        planted.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or(Value::Null);
    report["commit"] = commit().into();
    report["date"] = says("date", &["-u", "+%Y-%m-%dT%H:%M:%SZ"]).into();
    fs::create_dir_all(target().join("reports"))?;
    let text = serde_json::to_string_pretty(&report)? + "\n";
    fs::write(target().join("reports/standin.json"), text)?;
    println!("target/reports/standin.json has each test");
    Ok(suite::count(&outcomes).1)
}
