//! One table, and `target/reports/bench.json`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::machine::{Watch, commit, says};
use crate::stats::Ratio;
use crate::{Result, churn, handover, network, transfer};

/// Figures by name.
#[derive(Debug, Default)]
pub struct Report {
    figures: Map<String, Value>,
    lines: Vec<String>,
}

/// The folder that cargo builds in.
pub fn target() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
    std::env::var_os("CARGO_TARGET_DIR").map_or(own, PathBuf::from)
}

fn size(bytes: u64) -> String {
    if bytes < 1 << 20 { format!("{} KiB", bytes >> 10) } else { format!("{} MiB", bytes >> 20) }
}

fn interval(ratio: Ratio) -> String {
    format!("{:.2} [{:.2} {:.2}]", ratio.median, ratio.low, ratio.high)
}

fn round(value: f64) -> Value {
    json!((value * 1e4).round() / 1e4)
}

fn ratio(ratio: Ratio) -> Value {
    json!({ "median": round(ratio.median), "low": round(ratio.low), "high": round(ratio.high) })
}

impl Report {
    /// A line of the table: nothing but text.
    fn line(&mut self, text: impl Into<String>) {
        self.lines.push(text.into());
    }

    /// What criterion left in target/criterion: the middle estimate, by item where the benchmark says how many there are.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn criterion(&mut self) -> Result<()> {
        let mut found = BTreeMap::new();
        collect(&target().join("criterion"), &mut found)?;
        self.line(format!("{:<44} {:>12} {:>16}", "single parts (one thread)", "a call", ""));
        for (name, (ns, per, unit)) in found {
            let rate = if unit == "byte" { 1.0 / per } else { per };
            let shown = if unit == "byte" { "GB/s".into() } else { format!("ns/{unit}") };
            self.line(format!("  {name:<42} {:>12} {rate:>9.2} {shown}", time(ns)));
            let mut figures = json!({ "ns": round(ns) });
            figures[shown.replace('/', "_per_").replace("GB_per_s", "gb_per_s")] = round(rate);
            self.figures.insert(name, figures);
        }
        Ok(())
    }

    /// How fragmented a pool becomes.
    pub fn churn(&mut self) {
        let (_, extents) = churn::churned();
        let name = "pool/extents a chunk after churn";
        self.line(format!("  {name:<42} {:>12} {extents:>9.2} of 16 pages", ""));
        self.figures.insert(name.into(), json!({ "extents": round(extents), "pages": 16 }));
    }

    /// The heading of the lines that [`Report::transfer`] adds.
    pub fn transfers(&mut self) {
        self.line(format!(
            "\n{:<26} {:>8} {:>8} {:>8}   {:<18} {:<18} {:<18}",
            "scattered blocks, GB/s",
            "kvxfer",
            "memcpy",
            "bare nt",
            "kvxfer/memcpy",
            "by CPU time",
            "kvxfer/bare nt"
        ));
    }

    /// One size of blocks.
    pub fn transfer(&mut self, it: &transfer::Figures) {
        let [kvxfer, memcpy, streaming] = it.gbps;
        let what = match it.block {
            transfer::MOVED => "one piece".into(),
            block => size(block),
        };
        self.line(format!(
            "  {:<24} {kvxfer:>8.2} {memcpy:>8.2} {streaming:>8.2}   {:<18} {:<18} {:<18}",
            format!("{} {what}", it.path),
            interval(it.memcpy),
            interval(it.memcpy_cpu),
            it.streaming.map_or("-".into(), interval),
        ));
        let figures = json!({
            "path": it.path,
            "block_bytes": it.block,
            "moved_bytes": transfer::MOVED,
            "rounds": it.rounds,
            "gb_per_s": round(kvxfer),
            "memcpy_gb_per_s": round(memcpy),
            "bare_streaming_gb_per_s": it.streaming.map(|_| round(streaming)),
            "over_memcpy": ratio(it.memcpy),
            "over_memcpy_by_cpu_time": ratio(it.memcpy_cpu),
            "over_bare_streaming": it.streaming.map(ratio),
            "cpu_s_per_gb": round(it.cpu_per_gb[0]),
            "memcpy_cpu_s_per_gb": round(it.cpu_per_gb[1]),
        });
        self.figures.insert(format!("transfer/{}/{what}", it.path), figures);
    }

    /// The heading of the lines that [`Report::network`] adds.
    pub fn networks(&mut self) {
        self.line(format!(
            "\n{:<26} {:>8} {:>8}   {:<18} {:<18}",
            "the same by loopback, GB/s",
            "kvxfer",
            "socket",
            "kvxfer/socket",
            "CPU s/GB (sent, received)"
        ));
    }

    /// One size of blocks.
    pub fn network(&mut self, it: &network::Figures) {
        let what = size(it.block);
        let ([kvxfer, socket], [sent, received]) = (it.gbps, it.cpu_per_gb);
        self.line(format!(
            "  {:<24} {kvxfer:>8.2} {socket:>8.2}   {:<18} {sent:.2}, {received:.2}",
            format!("{} {what}", it.path),
            interval(it.socket)
        ));
        let figures = json!({
            "path": it.path,
            "block_bytes": it.block,
            "moved_bytes": transfer::MOVED,
            "rounds": it.rounds,
            "gb_per_s": round(kvxfer),
            "socket_gb_per_s": round(socket),
            "over_socket": ratio(it.socket),
            "cpu_s_per_gb_sent": round(sent),
            "cpu_s_per_gb_received": round(received),
        });
        self.figures.insert(format!("transfer/{}/{what}", it.path), figures);
    }

    /// The heading of the lines that [`Report::handover`] adds.
    pub fn handovers(&mut self) {
        self.line(format!(
            "\n{:<26} {:>8} {:>8} {:>8} {:>12}   {:<18}",
            "hand-over, ms", "claimed", "loaded", "p90", "two memcpys", "memcpys/kvxfer"
        ));
    }

    /// One size of requests.
    pub fn handover(&mut self, it: &handover::Figures) {
        let path = handover::PATH.as_str();
        self.line(format!(
            "  {:<24} {:>8.2} {:>8.2} {:>8.2} {:>12.2}   {:<18}",
            format!("{path} {} x 2 MiB", it.blocks),
            it.claimed_ms,
            it.loaded_ms,
            it.loaded_p90_ms,
            it.two_copies_ms,
            interval(it.two_copies)
        ));
        let figures = json!({
            "path": path,
            "blocks": it.blocks,
            "bytes": it.bytes,
            "rounds": it.rounds,
            "offer_to_claimed_ms_p50": round(it.claimed_ms),
            "offer_to_loaded_ms_p50": round(it.loaded_ms),
            "offer_to_loaded_ms_p90": round(it.loaded_p90_ms),
            "two_memcpys_ms": round(it.two_copies_ms),
            "over_two_memcpys": ratio(it.two_copies),
        });
        self.figures.insert(format!("handover/{path}/{} blocks", it.blocks), figures);
    }

    /// Prints the table and writes the file.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn finish(self, watch: &Watch) -> Result<()> {
        let machine = watch.describe();
        let (date, commit) = (says("date", &["-u", "+%Y-%m-%dT%H:%M:%SZ"]), commit());
        println!("\n{}", self.lines.join("\n"));
        let noisy = machine["noisy"] == true;
        println!(
            "\n{date}, commit {commit}, {} cores of {}; load average {} to {}, others used {} cores{}",
            machine["cores"],
            machine["cpu"].as_str().unwrap_or("unknown"),
            machine["load_average"]["start"],
            machine["load_average"]["end"],
            machine["cores_used_by_others"],
            if noisy { ".\nNOISY: read the ratios, not the rest" } else { "" }
        );
        println!(
            "GB/s and ms are medians; ratios are medians of neighbours in time [95 % interval]. kvxfer includes planning \
             and the\nchecksum; memcpy is the C library's, bare nt streams past the cache, socket is one connection that sends one\npiece \
             of memory into one buffer; none of them sums. All one thread on each side."
        );
        let report = json!({
            "date": date, "commit": commit, "machine": machine, "figures": self.figures
        });
        let file = target().join("reports/bench.json");
        fs::create_dir_all(target().join("reports"))?;
        fs::write(&file, serde_json::to_string_pretty(&report)? + "\n")?;
        println!("target/reports/bench.json has it all");
        Ok(())
    }
}

/// A time that was measured.
fn time(ns: f64) -> String {
    match ns {
        ns if ns < 1e4 => format!("{ns:.1} ns"),
        ns if ns < 1e7 => format!("{:.1} us", ns / 1e3),
        ns => format!("{:.1} ms", ns / 1e6),
    }
}

/// Walks criterion's folder: name to (ns, ns an item, what an item is).
fn collect(folder: &Path, found: &mut BTreeMap<String, (f64, f64, String)>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.ends_with("new") {
            let read = |file: &str| -> Result<Value> {
                Ok(serde_json::from_slice(&fs::read(path.join(file))?)?)
            };
            let (estimates, benchmark) = (read("estimates.json")?, read("benchmark.json")?);
            let ns = estimates["median"]["point_estimate"].as_f64().ok_or("no median")?;
            let name = benchmark["full_id"].as_str().ok_or("no name")?.to_owned();
            let (kind, count) =
                match benchmark["throughput"].as_object().and_then(|t| t.iter().next()) {
                    Some((kind, count)) => (kind.as_str(), count.as_f64().unwrap_or(1.0)),
                    None => ("", 1.0),
                };
            let unit = match (kind, name.split('/').next()) {
                ("Bytes", _) => "byte",
                (_, Some("keys")) => "token",
                (_, Some("plan")) => "descriptor",
                (_, Some("pool")) => "page",
                _ => "call",
            };
            found.insert(name, (ns, ns / count, unit.into()));
        } else if path.is_dir() {
            collect(&path, found)?;
        }
    }
    Ok(())
}
