//! What the figures were measured on, and how much of it was ours.

use std::fs;
use std::process::Command;
use std::time::Instant;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde_json::{Value, json};

/// Pins this thread to the n-th core that it may use, counted around. Whether that was possible.
pub fn pin(n: usize) -> bool {
    let Ok(allowed) = sched_getaffinity(None) else { return false };
    let cores: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|&core| allowed.is_set(core)).collect();
    if cores.len() < 2 {
        return false;
    }
    let mut one = CpuSet::new();
    one.set(cores[n % cores.len()]);
    sched_setaffinity(None, &one).is_ok()
}

/// The load average of the last minute.
pub fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().and_then(|load| load.parse().ok()).unwrap_or(0.0)
}

/// Watches the machine from now on.
#[derive(Debug)]
pub struct Watch {
    /// Counted before any thread was pinned.
    cores: usize,
    load: f64,
    busy: f64,
    steal: f64,
    own: f64,
    since: Instant,
}

impl Watch {
    /// From now on.
    pub fn start() -> Self {
        let (busy, steal) = ticks();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self { cores, load: load(), busy, steal, own: own_ticks(), since: Instant::now() }
    }

    /// The machine, and how busy others kept it. Children count as ours once they are reaped.
    pub fn describe(&self) -> Value {
        let cores = self.cores as f64;
        let (busy, steal) = ticks();
        // 100 ticks a second: USER_HZ, on each Linux.
        let elapsed = self.since.elapsed().as_secs_f64() * 100.0;
        let others = ((busy - self.busy) - (own_ticks() - self.own)).max(0.0) / elapsed;
        let two_digits = |value: f64| (value * 100.0).round() / 100.0;
        json!({
            "cpu": cpu_model(),
            "cores": self.cores,
            "load_average": { "start": self.load, "end": load() },
            "cores_used_by_others": two_digits(others),
            "cores_stolen": two_digits((steal - self.steal) / elapsed),
            "noisy": self.load > cores / 2.0 || others > cores / 4.0,
        })
    }
}

fn cpu_model() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let widest = if text.contains(" avx512f ") { ", AVX-512" } else { "" };
    let model = field("model\t").map_or(String::new(), |model| format!(", model {model}"));
    field("model name").unwrap_or_else(|| "unknown".into()) + &model + widest
}

/// Ticks of all cores since boot: busy, and taken by the host.
fn ticks() -> (f64, f64) {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    let line = text.lines().next().unwrap_or_default();
    let ticks: Vec<f64> = line.split_whitespace().skip(1).flat_map(str::parse).collect();
    // user nice system idle iowait irq softirq steal
    let at = |index: usize| ticks.get(index).copied().unwrap_or(0.0);
    (at(0) + at(1) + at(2) + at(5) + at(6), at(7))
}

/// Ticks of this process and its reaped children.
fn own_ticks() -> f64 {
    let text = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // After the name, which may have spaces: state is field 3, utime to cstime are 14 to 17.
    let rest = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    rest.split_whitespace().skip(11).take(4).flat_map(str::parse::<f64>).sum()
}

/// What a command prints, or "unknown".
pub fn says(command: &str, arguments: &[&str]) -> String {
    let output = Command::new(command).args(arguments).output();
    let text = output.ok().filter(|output| output.status.success());
    text.map_or("unknown".into(), |output| String::from_utf8_lossy(&output.stdout).trim().into())
}

/// The commit, with a plus if there is more than that.
pub fn commit() -> String {
    let plus = if says("git", &["status", "--porcelain", "-uno"]).is_empty() { "" } else { "+" };
    says("git", &["rev-parse", "--short=12", "HEAD"]) + plus
}
