//! What was measured: for programs and for people.

use std::fmt::Write;

use kvxfer_core::path::Refusal;
use serde::Serialize;

use super::wire::Shape;

/// Of the report's fields: it grows when one goes or changes its meaning.
pub const SCHEMA: u32 = 1;

/// All that was measured. Its JSON is documented in docs/bench.md.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The release.
    pub kvxfer: &'static str,
    /// Whether this program was built to be fast; the figures of another say little.
    pub optimised: bool,
    /// The other side.
    pub server: String,
    /// Cores that this process may use.
    pub cores: usize,
    /// The load average of the last minute at the start; `None` where /proc does not say.
    pub load_average: Option<f64>,
    /// Timed rounds of each case.
    pub rounds: u32,
    /// Each case, and each path that can't be had.
    pub rows: Vec<Row>,
    /// What ended the run early.
    pub error: Option<String>,
}

/// One case, or a path that can't be had.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The path that was required.
    pub path: String,
    /// Bytes of a block in one layer; `None` for a path that can't be had at all.
    pub block_bytes: Option<u32>,
    /// Blocks of a request.
    pub blocks: Option<u32>,
    /// Its layers.
    pub layers: Option<u32>,
    /// Why there are no figures.
    pub refused: Option<String>,
    /// They.
    pub figures: Option<Figures>,
}

/// What was measured of a case.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// Bytes of a request.
    pub bytes: u64,
    /// The path that its bytes took.
    pub path: String,
    /// Which of its ways, where it has several.
    pub lanes: Option<String>,
    /// Each better path, and why it was not taken.
    pub why_not_better: Vec<Refusal>,
    /// From the offer until the last commit is acknowledged, on the side that pushes.
    pub push: Times,
    /// From the pool into the other engine's blocks.
    pub load: Times,
    /// Contiguous pieces that a request consisted of.
    pub descriptors: u64,
    /// The same for each second of a median push.
    pub descriptors_per_s: f64,
    /// Processor time of all threads for 10^9 bytes that were pushed and loaded.
    pub cpu_s_per_gb: Cpu,
    /// Words of the request that was compared, not one of which was wrong.
    pub verified_words: u64,
}

/// Rounds, in order of length.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Times {
    /// 10^9 bytes a second, in a median round.
    pub gbps: f64,
    /// Milliseconds that half of the rounds stay below.
    pub p50_ms: f64,
    /// And nine of ten.
    pub p90_ms: f64,
    /// And 99 of 100; of fewer rounds it is the longest.
    pub p99_ms: f64,
}

/// Processor seconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Cpu {
    /// Of the side that pushes.
    pub producer: f64,
    /// Of the other.
    pub consumer: f64,
}

impl Times {
    pub(super) fn of(mut seconds: Vec<f64>, bytes: u64) -> Self {
        seconds.sort_unstable_by(f64::total_cmp);
        let at = |share: f64| {
            let index = (seconds.len() as f64 * share).ceil() as usize;
            seconds.get(index.max(1) - 1).copied().unwrap_or(f64::NAN)
        };
        Self {
            gbps: bytes as f64 / at(0.5) / 1e9,
            p50_ms: at(0.5) * 1e3,
            p90_ms: at(0.9) * 1e3,
            p99_ms: at(0.99) * 1e3,
        }
    }
}

impl Row {
    /// A path that can't be had.
    pub(super) fn refused(path: &str, why: String) -> Self {
        let path = path.to_owned();
        Self {
            path,
            block_bytes: None,
            blocks: None,
            layers: None,
            refused: Some(why),
            figures: None,
        }
    }

    /// A case, with its figures or why there are none.
    pub(super) fn of(path: &str, shape: Shape, result: Result<Figures, String>) -> Self {
        let (figures, refused) = match result {
            Ok(figures) => (Some(figures), None),
            Err(why) => (None, Some(why)),
        };
        let Shape { block_bytes, blocks, layers } = shape;
        let path = path.to_owned();
        Self {
            path,
            block_bytes: Some(block_bytes),
            blocks: Some(blocks),
            layers: Some(layers),
            refused,
            figures,
        }
    }
}

impl Report {
    pub(super) fn new(server: &str, rounds: u32) -> Self {
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        Self {
            schema: SCHEMA,
            kvxfer: env!("CARGO_PKG_VERSION"),
            optimised: !cfg!(debug_assertions),
            server: server.into(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            load_average: load.split(' ').next().and_then(|load| load.parse().ok()),
            rounds,
            rows: Vec::new(),
            error: None,
        }
    }

    /// The report as lines of text.
    pub(super) fn table(&self) -> String {
        let mut text =
            format!("kvxfer {} bench: {} rounds a case, host memory", self.kvxfer, self.rounds);
        let load = self.load_average.map_or("unknown".into(), |load| load.to_string());
        let _ = writeln!(text, ", {} cores, load average {load}", self.cores);
        if !self.optimised {
            text += "! this program was built without optimisation: its figures say little\n";
        }
        let _ = writeln!(
            text,
            "\n{:32}{:^38}{:^10}{:>15}{:>16}\n{:8}{:>8}{:>7}{:>9}{:>11}{:>9}{:>9}{:>9}{:>10}{:>15}{:>16}",
            "",
            "push",
            "load",
            "",
            "CPU s/GB",
            "path",
            "block",
            "count",
            "bytes",
            "GB/s",
            "p50 ms",
            "p90 ms",
            "p99 ms",
            "GB/s",
            "descriptors/s",
            "push + take"
        );
        for row in &self.rows {
            let number =
                |value: Option<u32>| value.map_or(String::new(), |value| value.to_string());
            let block = row.block_bytes.map_or(String::new(), |bytes| size(bytes.into()));
            let _ = write!(text, "{:8}{block:>8}{:>7}", row.path, number(row.blocks));
            let _ = match (&row.figures, &row.refused) {
                (Some(of), _) => writeln!(
                    text,
                    "{:>9}{:>11.2}{:>9.2}{:>9.2}{:>9.2}{:>10.2}{:>15.0}{:>16}",
                    size(of.bytes),
                    of.push.gbps,
                    of.push.p50_ms,
                    of.push.p90_ms,
                    of.push.p99_ms,
                    of.load.gbps,
                    of.descriptors_per_s,
                    format!("{:.2} + {:.2}", of.cpu_s_per_gb.producer, of.cpu_s_per_gb.consumer)
                ),
                (None, why) => writeln!(text, "  – {}", why.as_deref().unwrap_or_default()),
            };
        }
        text
    }
}

/// "64K", "1M".
pub(super) fn size(bytes: u64) -> String {
    let units = [(30, "G"), (20, "M"), (10, "K")];
    match units.into_iter().find(|(shift, _)| bytes >= 1 << shift) {
        None => bytes.to_string(),
        Some((shift, unit)) => {
            let whole = bytes as f64 / (1_u64 << shift) as f64;
            // One digit, where there is anything to be said by it.
            format!("{}{unit}", (whole * 10.0).round() / 10.0)
        }
    }
}
