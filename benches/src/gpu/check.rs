//! What runs on a machine's own GPUs.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kvxfer_cuda::driver::{Device, PeerLink};
use serde_json::{Value, json};

use super::rates::{Figures, Producer};
use super::suite::{self, Outcome, Outcomes, Suite};
use super::summary::{self, Pair};
use super::work::{FULL, SMALL};
use super::{devices, on_standin, standin};
use crate::Result;
use crate::machine::{Watch, commit, says};
use crate::report::target;

/// The exit status that says that there is no GPU, and so nothing was checked.
pub const NO_GPU: u8 = 77;
/// How often each side is killed in the middle of copies.
const KILLS: &str = "50";
const LIMIT: Duration = Duration::from_secs(240);

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The tests are built, and the results go to `docs/` and `target/reports/`.
    Tree,
    /// The tests lie beside this program, and the results go to `gpu-check-results/` where it is started.
    Bundle,
    /// Everything small, on the stand-in: it shows that this program works, and nothing else.
    Rehearsal,
}

/// Runs it. The exit status.
///
/// # Errors
/// Something can't be built, started or written.
pub fn run(root: &Path, mode: Mode) -> Result<u8> {
    let all = match devices() {
        Ok((_, all)) => all,
        Err(error) => {
            println!("gpu-check: no GPU here, so nothing was checked: {error}");
            return Ok(NO_GPU);
        }
    };
    if on_standin() != (mode == Mode::Rehearsal) {
        println!(
            "gpu-check: nothing was checked: {}",
            match mode {
                Mode::Rehearsal => "a rehearsal is for the stand-in, and this is a GPU's driver",
                _ =>
                    "this driver is the stand-in, which proves nothing about GPUs (--rehearse tries this program)",
            }
        );
        return Ok(NO_GPU);
    }
    let watch = Watch::start();
    let outcomes = tests(root, mode)?;
    println!("{}", suite::table(&outcomes));
    let mut pairs = vec![pair(&all[0], &all[0], mode)?];
    for (at, one) in all.iter().enumerate() {
        for other in &all[at + 1..] {
            // Each pair once: the links are alike in both directions.
            pairs.push(pair(one, other, mode)?);
        }
    }
    let failed =
        suite::count(&outcomes).1 + pairs.iter().filter(|pair| pair.figures.is_err()).count();
    if mode == Mode::Rehearsal {
        for Pair { figures, .. } in &pairs {
            figures.as_ref().map_err(|error| format!("copies: {error}"))?;
        }
        println!("rehearsed: each copy was verified, and none was timed for anybody");
    } else {
        let about = about(&all, mode, &watch)?;
        write(root, mode, &about, &outcomes, &pairs)?;
    }
    Ok(u8::from(failed > 0))
}

/// The machine: what the results hold for.
fn about(all: &[Device], mode: Mode, watch: &Watch) -> Result<Value> {
    let commit = match mode {
        Mode::Bundle => fs::read_to_string(beside("COMMIT")?)?.trim().to_owned(),
        _ => commit(),
    };
    let device = |device: &Device| -> Result<Value> {
        let links = all.iter().filter(|other| other.uuid() != device.uuid()).map(|other| {
            let link = device.link_to(other.uuid())?;
            Ok(json!({
                "uuid": other.uuid().to_string(),
                "link": link.to_string(),
                "access": !matches!(link, PeerLink::None { .. }),
                "native_atomics": link == PeerLink::NvLink,
            }))
        });
        Ok(json!({
            "name": device.name(),
            "uuid": device.uuid().to_string(),
            "bytes": device.memory()?.1,
            "multiprocessors": device.multiprocessors()?,
            "posix_fd": device.supports_posix_fd(),
            "fabric": device.supports_fabric(),
            "mig": device.is_mig(),
            "mps": device.under_mps(),
            "peers": links.collect::<Result<Vec<_>>>()?,
        }))
    };
    Ok(json!({
        "commit": commit,
        "date": says("date", &["-u", "+%Y-%m-%dT%H:%M:%SZ"]),
        "driver": all[0].driver_version()?,
        "machine": watch.describe(),
        "gpus": all.iter().map(device).collect::<Result<Vec<_>>>()?,
    }))
}

/// A file beside this program.
fn beside(name: &str) -> Result<PathBuf> {
    Ok(std::env::current_exe()?.with_file_name(name))
}

fn tests(root: &Path, mode: Mode) -> Result<Outcomes> {
    let binaries = match mode {
        Mode::Bundle => BTreeMap::from([
            ("cuda".to_owned(), beside("cuda")?),
            ("conformance".to_owned(), beside("conformance")?),
        ]),
        _ => suite::build(root, &["--workspace", "--test", "conformance"], &[])?,
    };
    let mut env = vec![
        ("KVXFER_REQUIRE_CUDA".to_owned(), "1".to_owned()),
        ("KVXFER_KILLS".to_owned(), KILLS.to_owned()),
    ];
    let mut filters = vec![];
    if mode == Mode::Rehearsal {
        // `make standin` runs the others.
        env = standin::accounts(&target().join("standin/rehearsal"))?;
        filters = vec!["contract::streams::"];
    }
    let suite = |name: &'static str, filters, but| -> Result<Suite> {
        let binary = binaries.get(name).cloned().ok_or(format!("no test {name:?} was built"))?;
        Ok(Suite { name, binary, filters, but, env: env.clone(), limit: LIMIT })
    };
    // The table is about files of the tree.
    let suites = [
        suite("cuda", filters, [&suite::BODIES[..], &["contract::table::"]].concat())?,
        suite("conformance", vec!["cuda_ipc"], vec![])?,
    ];
    let mut outcomes = Outcomes::new();
    for suite in suites {
        let start = Instant::now();
        outcomes.extend(suite.run(&mut suite::tell)?);
        println!("{} ran for {:.0?}", suite.name, start.elapsed());
    }
    Ok(outcomes)
}

fn pair(from: &Device, to: &Device, mode: Mode) -> Result<Pair> {
    let size = if mode == Mode::Rehearsal { SMALL } else { FULL };
    let link = from.link_to(to.uuid())?;
    let mut pair = Pair {
        from: from.uuid().to_string(),
        to: to.uuid().to_string(),
        link: link.to_string(),
        cut_over: 0,
        figures: Ok(Vec::new()),
    };
    if matches!(link, PeerLink::None { .. }) {
        // Not a failure: there is nothing to measure.
        return Ok(pair);
    }
    println!("copies from {} to {}, {link}", pair.from, pair.to);
    let measured = (|| -> Result<(u64, String, Vec<Figures>)> {
        let mut producer = Producer::start(from, to.ordinal(), size)?;
        let mut figures = Vec::new();
        for &block in size.blocks {
            for scattered in [true, false] {
                figures.push(producer.measure(block, scattered)?);
            }
        }
        Ok((producer.cut_over(), producer.link(), figures))
    })();
    match measured {
        Ok((cut_over, link, figures)) => {
            pair.cut_over = cut_over;
            pair.link = link;
            pair.figures = Ok(figures);
        }
        Err(error) => {
            println!("FAILED  {error}");
            pair.figures = Err(error.to_string());
        }
    }
    Ok(pair)
}

fn write(
    root: &Path,
    mode: Mode,
    about: &Value,
    outcomes: &Outcomes,
    pairs: &[Pair],
) -> Result<()> {
    let reports = match mode {
        Mode::Bundle => PathBuf::from("gpu-check-results"),
        _ => target().join("reports"),
    };
    fs::create_dir_all(&reports)?;
    let hardware = match mode {
        Mode::Bundle => reports.join("hardware.json"),
        _ => root.join("docs/hardware.json"),
    };
    let pretty =
        |value: &Value| -> Result<String> { Ok(serde_json::to_string_pretty(value)? + "\n") };
    let mut seen: Value = fs::read_to_string(&hardware)
        .ok()
        .and_then(|text| serde_json::from_str(&text).ok())
        .unwrap_or_else(|| json!({ "runs": [] }));
    let passed: Vec<&str> = outcomes
        .iter()
        .filter(|(_, outcome)| **outcome == Outcome::Passed)
        .filter_map(|(name, _)| name.strip_prefix("cuda::"))
        .collect();
    if let Some(runs) = seen["runs"].as_array_mut() {
        runs.push(json!({
            "device": about["gpus"][0]["name"],
            "driver": about["driver"],
            "commit": about["commit"],
            "date": about["date"],
            "passed": passed,
        }));
    }
    fs::write(&hardware, pretty(&seen)?)?;
    let mut report = about.clone();
    report["tests"] = suite::report(outcomes);
    report["pairs"] = pairs.iter().map(summary::json).collect();
    fs::write(reports.join("gpu.json"), pretty(&report)?)?;
    let text = summary::markdown(about, outcomes, pairs);
    fs::write(reports.join("gpu.md"), &text)?;
    println!("\n{text}");
    println!(
        "{} and gpu.md have it, {} what passed",
        reports.join("gpu.json").display(),
        hardware.display()
    );
    Ok(())
}
