//! Runs test binaries and reads what they print, one result a test.
//!
//! The test harness of Rust knows no test that finds at run time that it can't run. Ours say so: a line
//! `skipped: WHY (NAME)` on standard error, and then they pass.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::Result;

/// How a test ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It ran, and what it says is so.
    Passed,
    /// It is not so, or the test did not come to its end.
    Failed,
    /// It could not run here, and why.
    Skipped(String),
}

/// A test's name, with its binary's before it, and how it ended.
pub type Outcomes = BTreeMap<String, Outcome>;

/// What is no test, but what another process does in one.
pub const BODIES: [&str; 1] = ["::child"];

/// A binary, which of its tests are to run, and what it is told.
#[derive(Clone, Debug)]
pub struct Suite {
    /// What its tests' names start with.
    pub name: &'static str,
    /// The binary.
    pub binary: PathBuf,
    /// Parts of the names of tests to run; none for all.
    pub filters: Vec<&'static str>,
    /// Parts of the names of tests that are not to run.
    pub but: Vec<&'static str>,
    /// Environment.
    pub env: Vec<(String, String)>,
    /// For all of it.
    pub limit: Duration,
}

impl Suite {
    /// Runs it, telling each outcome as it comes.
    ///
    /// # Errors
    /// The binary can't be started, or its output can't be read. Tests that fail are no error.
    pub fn run(&self, tell: &mut dyn FnMut(&str, &Outcome)) -> Result<Outcomes> {
        let mut child = Command::new(&self.binary)
            .args(&self.filters)
            .args(self.but.iter().flat_map(|but| ["--skip", but]))
            .args(["--test-threads", "2", "--color", "never"])
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("{}: {error}", self.binary.display()))?;
        let (lines, told) = mpsc::channel();
        let readers = [
            child.stdout.take().map(|out| lines_of(out, lines.clone())),
            child.stderr.take().map(|out| lines_of(out, lines)),
        ];
        let mut reader = Reader::default();
        let end = Instant::now() + self.limit;
        let mut overdue = false;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match told.recv_timeout(left) {
                Ok(line) => reader.line(&line),
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    overdue = true;
                    child.kill()?;
                    break;
                }
            }
        }
        let status = child.wait()?;
        for reader in readers.into_iter().flatten() {
            let _ = reader.join();
        }
        while let Ok(line) = told.try_recv() {
            reader.line(&line);
        }
        let mut outcomes = Outcomes::new();
        for (name, outcome) in reader.outcomes() {
            let name = format!("{}::{name}", self.name);
            tell(&name, &outcome);
            outcomes.insert(name, outcome);
        }
        let failed = outcomes.values().any(|outcome| *outcome == Outcome::Failed);
        if overdue || (!status.success() && !failed) {
            // A binary that dies has failed, whatever its tests said.
            let why = if overdue { "ran into its limit" } else { "died" };
            let name = format!("{}::the binary {why} ({status})", self.name);
            tell(&name, &Outcome::Failed);
            outcomes.insert(name, Outcome::Failed);
        }
        if failed {
            eprintln!("{}", reader.log.join("\n"));
        }
        Ok(outcomes)
    }
}

fn lines_of(
    out: impl Read + Send + 'static,
    lines: mpsc::Sender<String>,
) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        for line in BufReader::new(out).lines().map_while(std::result::Result::ok) {
            if lines.send(line).is_err() {
                break;
            }
        }
    })
}

/// Reads what the test harness prints.
#[derive(Debug, Default)]
struct Reader {
    ended: BTreeMap<String, bool>,
    skipped: BTreeMap<String, String>,
    log: Vec<String>,
}

impl Reader {
    fn line(&mut self, line: &str) {
        if let Some((name, result)) = line.strip_prefix("test ").and_then(|l| l.split_once(" ... "))
        {
            match result {
                "ok" => drop(self.ended.insert(name.into(), true)),
                "FAILED" => drop(self.ended.insert(name.into(), false)),
                _ => {}
            }
        } else if let Some(at) = line.find("skipped: ")
            && let Some((why, name)) =
                line[at + 9..].strip_suffix(')').and_then(|l| l.rsplit_once(" ("))
        {
            self.skipped.insert(name.into(), why.into());
        } else {
            self.log.push(line.into());
        }
    }

    fn outcomes(&self) -> impl Iterator<Item = (&String, Outcome)> {
        self.ended.iter().map(|(name, &passed)| {
            let outcome = match (passed, self.skipped.get(name)) {
                (false, _) => Outcome::Failed,
                (true, Some(why)) => Outcome::Skipped(why.clone()),
                (true, None) => Outcome::Passed,
            };
            (name, outcome)
        })
    }
}

/// Prints what is not as it should be.
pub fn tell(name: &str, outcome: &Outcome) {
    match outcome {
        Outcome::Passed => {}
        Outcome::Failed => println!("FAILED  {name}"),
        Outcome::Skipped(why) => println!("skipped {name}: {why}"),
    }
}

/// How many passed, failed and were skipped.
pub fn count(outcomes: &Outcomes) -> (usize, usize, usize) {
    let of = |what: fn(&Outcome) -> bool| outcomes.values().filter(|outcome| what(outcome)).count();
    (
        of(|outcome| *outcome == Outcome::Passed),
        of(|outcome| *outcome == Outcome::Failed),
        of(|outcome| matches!(outcome, Outcome::Skipped(_))),
    )
}

/// The counts, and each test's outcome.
pub fn report(outcomes: &Outcomes) -> Value {
    let (passed, failed, skipped) = count(outcomes);
    let tests: serde_json::Map<String, Value> = outcomes
        .iter()
        .map(|(name, outcome)| {
            let outcome = match outcome {
                Outcome::Passed => "passed".into(),
                Outcome::Failed => "failed".into(),
                Outcome::Skipped(why) => format!("skipped: {why}"),
            };
            (name.clone(), outcome.into())
        })
        .collect();
    json!({ "passed": passed, "failed": failed, "skipped": skipped, "tests": tests })
}

/// A table: one line for each module of each binary.
pub fn table(outcomes: &Outcomes) -> String {
    let mut modules: BTreeMap<String, Outcomes> = BTreeMap::new();
    for (name, outcome) in outcomes {
        let module = name.rsplit_once("::").map_or(name.as_str(), |(module, _)| module);
        modules.entry(module.into()).or_default().insert(name.clone(), outcome.clone());
    }
    let mut lines = vec![format!("{:<44} {:>7} {:>7} {:>8}", "", "passed", "failed", "skipped")];
    for (module, outcomes) in modules.iter().chain([(&"all".to_owned(), outcomes)]) {
        let (passed, failed, skipped) = count(outcomes);
        lines.push(format!("{module:<44} {passed:>7} {failed:>7} {skipped:>8}"));
    }
    lines.join("\n")
}

/// Builds the tests of `kvxfer-cuda` that need a driver and tells where they are, by name.
///
/// # Errors
/// They don't build; cargo said why.
pub fn build(
    root: &Path,
    args: &[&str],
    env: &[(&str, &str)],
) -> Result<BTreeMap<String, PathBuf>> {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()))
        .current_dir(root)
        .args(["build", "--locked", "--features", "kvxfer-cuda/faults", "--test", "cuda"])
        .args(["--message-format", "json-render-diagnostics"])
        .args(args)
        .envs(env.iter().copied())
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        return Err("the tests don't build".into());
    }
    let messages = output.stdout.split(|&byte| byte == b'\n');
    let built = messages.filter_map(|line| serde_json::from_slice::<Value>(line).ok());
    Ok(built
        .filter_map(|message| {
            let name = message["target"]["name"].as_str()?.to_owned();
            Some((name, PathBuf::from(message["executable"].as_str()?)))
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_harness_prints_is_read() {
        let mut reader = Reader::default();
        for line in [
            "running 4 tests",
            "test one::a ... ok",
            "skipped: one device only (two::b)",
            "test two::b ... ok",
            "test two::c ... FAILED",
            "test d ... ignored",
            "thread 'two::c' panicked",
        ] {
            reader.line(line);
        }
        let outcomes: Outcomes =
            reader.outcomes().map(|(name, outcome)| (name.clone(), outcome)).collect();
        assert_eq!(count(&outcomes), (1, 1, 1));
        assert_eq!(outcomes["two::b"], Outcome::Skipped("one device only".into()));
        assert_eq!(report(&outcomes)["tests"]["two::c"], "failed");
        assert!(reader.log.contains(&"thread 'two::c' panicked".to_owned()));
        assert!(table(&outcomes).contains("two"));
    }

    #[test]
    fn a_binary_that_dies_or_hangs_has_failed() {
        let mut suite = Suite {
            name: "x",
            binary: "/bin/false".into(),
            filters: Vec::new(),
            but: Vec::new(),
            env: Vec::new(),
            limit: Duration::from_secs(60),
        };
        assert_eq!(count(&suite.run(&mut |_, _| ()).unwrap()), (0, 1, 0));
        // It waits for its input, which never comes: `tail` gets options that make it follow /dev/null.
        suite.binary = "/usr/bin/tail".into();
        suite.filters = vec!["-f", "/dev/null"];
        suite.limit = Duration::from_millis(200);
        assert_eq!(count(&suite.run(&mut |_, _| ()).unwrap()).1, 1);
    }
}
