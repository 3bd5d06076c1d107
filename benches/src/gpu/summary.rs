//! What was proven, for the README and as JSON.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::{Value, json};

use super::rates::{Figures, WAYS};
use super::suite::{Outcome, Outcomes, count};
use crate::stats::Ratio;

/// What was measured from one GPU to another, or to itself.
#[derive(Debug)]
pub struct Pair {
    /// UUID of the writer's.
    pub from: String,
    /// UUID of the reader's.
    pub to: String,
    /// How they are joined.
    pub link: String,
    /// Shorter copies go by the kernel, as it was measured, in bytes.
    pub cut_over: u64,
    /// One for each size of blocks, scattered and not; or what failed.
    pub figures: Result<Vec<Figures>, String>,
}

fn size(bytes: u64) -> String {
    if bytes < 1 << 20 { format!("{} KiB", bytes >> 10) } else { format!("{} MiB", bytes >> 20) }
}

fn interval(ratio: Ratio) -> Value {
    json!({ "median": ratio.median, "low": ratio.low, "high": ratio.high })
}

/// All of a pair.
pub fn json(pair: &Pair) -> Value {
    let mut value = json!({
        "from": pair.from, "to": pair.to, "link": pair.link, "kernel_below_bytes": pair.cut_over,
    });
    match &pair.figures {
        Ok(figures) => value["figures"] = figures.iter().map(figure).collect(),
        Err(error) => value["error"] = error.as_str().into(),
    }
    value
}

fn figure(figures: &Figures) -> Value {
    let ways: serde_json::Map<String, Value> = WAYS
        .iter()
        .enumerate()
        .map(|(way, (name, _))| {
            let value = json!({
                "gb_per_s": figures.gbps[way],
                "of_plain_copy": interval(figures.of_plain[way]),
                "cpu_ns_per_block": figures.ns_per_block[way],
                "cpu_us_per_layer": figures.us_per_layer[way],
            });
            ((*name).to_owned(), value)
        })
        .collect();
    json!({
        "block_bytes": figures.job.block,
        "scattered": figures.job.scattered,
        "plain_copy_gb_per_s": figures.plain_gbps,
        "ways": ways,
    })
}

/// Tests by what they are about: the first two parts of their names.
fn areas(outcomes: &Outcomes) -> BTreeMap<String, Outcomes> {
    let mut areas: BTreeMap<String, Outcomes> = BTreeMap::new();
    for (name, outcome) in outcomes {
        let area: Vec<&str> = name.split("::").take(2).collect();
        areas.entry(area.join("::")).or_default().insert(name.clone(), outcome.clone());
    }
    areas
}

/// A table for the README.
pub fn markdown(about: &Value, outcomes: &Outcomes, pairs: &[Pair]) -> String {
    let text = |value: &Value| value.as_str().unwrap_or("unknown").to_owned();
    let driver = about["driver"].as_u64().unwrap_or(0);
    let mut out = format!(
        "Commit {}, {}, driver {}.{}:\n\n",
        text(&about["commit"]),
        text(&about["date"]),
        driver / 1000,
        driver % 1000 / 10
    );
    for gpu in about["gpus"].as_array().into_iter().flatten() {
        let _ = writeln!(out, "* {}, {}", text(&gpu["name"]), text(&gpu["uuid"]));
        for peer in gpu["peers"].as_array().into_iter().flatten() {
            let _ = writeln!(
                out,
                "  * to {}: {}, peer access {}, native atomics {}",
                text(&peer["uuid"]),
                text(&peer["link"]),
                peer["access"],
                peer["native_atomics"]
            );
        }
    }
    out += "\n| tests on the GPU | passed | failed | skipped |\n|---|---|---|---|\n";
    for (area, outcomes) in areas(outcomes) {
        let (passed, failed, skipped) = count(&outcomes);
        let _ = writeln!(out, "| `{area}` | {passed} | {failed} | {skipped} |");
    }
    for (name, outcome) in outcomes {
        match outcome {
            Outcome::Failed => {
                let _ = writeln!(out, "\nFailed: `{name}`");
            }
            Outcome::Skipped(why) => {
                let _ = writeln!(out, "\nSkipped: `{name}`: {why}");
            }
            Outcome::Passed => {}
        }
    }
    for pair in pairs {
        let _ = write!(out, "\n{}", rates(pair));
    }
    if pairs.iter().all(|pair| pair.from == pair.to) {
        out +=
            "\nOne GPU: nothing was copied over NVLink, and nothing here says anything about it.\n";
    }
    out
}

fn rates(pair: &Pair) -> String {
    let (from, to) = (&pair.from, &pair.to);
    let way = if from == to {
        format!("between two processes on one GPU ({from})")
    } else {
        format!("from {from} to {to} over {}", pair.link)
    };
    let figures = match &pair.figures {
        Err(error) => return format!("Copies {way} failed: {error}\n"),
        Ok(figures) if figures.is_empty() => return format!("No copies {way}.\n"),
        Ok(figures) => figures,
    };
    let mut out = format!(
        "Copies {way}, in GB/s of payload, with their checksums; in brackets the share of one plain copy of as many bytes \
         to the same place, [95 % interval]. Measured cut-over: {}.\n\n\
         | blocks | plain copy | kernel | copy engine | calibrated | CPU per block, calibrated | per layer |\n\
         |---|---|---|---|---|---|---|\n",
        size(pair.cut_over)
    );
    for it in figures {
        let cell = |way: usize| {
            let Ratio { median, low, high } = it.of_plain[way];
            format!("{:.1} ({median:.2} [{low:.2} {high:.2}])", it.gbps[way])
        };
        let place = if it.job.scattered { "scattered" } else { "in a row" };
        let _ = writeln!(
            out,
            "| {} {place} | {:.1} | {} | {} | {} | {:.0} ns | {:.1} us |",
            size(it.job.block),
            it.plain_gbps,
            cell(0),
            cell(1),
            cell(2),
            it.ns_per_block[2],
            it.us_per_layer[2]
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::work::Job;
    use super::*;

    fn pair(to: &str, link: &str) -> Pair {
        let ratio = Ratio { median: 0.9, low: 0.8, high: 1.0 };
        Pair {
            from: "GPU-a".into(),
            to: to.into(),
            link: link.into(),
            cut_over: 64 << 10,
            figures: Ok(vec![Figures {
                job: Job { block: 4096, scattered: true, seed: 1 },
                plain_gbps: 100.0,
                gbps: [90.0; 3],
                of_plain: [ratio; 3],
                ns_per_block: [10.0; 3],
                us_per_layer: [80.0; 3],
            }]),
        }
    }

    #[test]
    fn one_gpu_says_nothing_about_nvlink() {
        let about = json!({ "commit": "abc", "date": "today", "driver": 13010, "gpus": [] });
        let outcomes = Outcomes::from([
            ("cuda::contract::a".to_owned(), Outcome::Passed),
            ("cuda::contract::b".to_owned(), Outcome::Skipped("one device only".into())),
        ]);
        let one = markdown(&about, &outcomes, &[pair("GPU-a", "same GPU")]);
        assert!(one.contains("driver 13.1") && one.contains("nothing was copied over NVLink"));
        assert!(one.contains("| `cuda::contract` | 1 | 0 | 1 |"), "{one}");
        assert!(one.contains("| 4 KiB scattered | 100.0 | 90.0 (0.90 [0.80 1.00])"), "{one}");
        let two =
            markdown(&about, &outcomes, &[pair("GPU-a", "same GPU"), pair("GPU-b", "NVLink")]);
        assert!(two.contains("from GPU-a to GPU-b over NVLink"));
        assert!(!two.contains("nothing was copied over NVLink"));
    }
}
