//! Bytes between two processes, and the report over all benchmarks.

use kvxfer_benches::machine::Watch;
use kvxfer_benches::report::Report;
use kvxfer_benches::{Result, child, handover, network, transfer};

/// Timed rounds, each with new block tables.
const ROUNDS: usize = 20;

fn main() -> Result<()> {
    match child::role()? {
        Some((role, socket)) if role == "consumer" => transfer::consumer(socket),
        Some((role, socket)) if role == "receiver" => network::receiver(socket),
        Some((role, socket)) if role == "decode" => handover::decode(socket),
        Some((role, _)) => Err(format!("no child has the role {role:?}").into()),
        None => parent(),
    }
}

fn parent() -> Result<()> {
    let watch = Watch::start();
    let mut report = Report::default();
    // `cargo bench --bench transfer -- network`, while working on that.
    if std::env::args().any(|argument| argument == "network") {
        networks(&mut report)?;
        return report.finish(&watch);
    }
    report.criterion()?;
    report.churn();
    handovers(&mut report)?;
    transfers(&mut report)?;
    networks(&mut report)?;
    report.finish(&watch)
}

fn transfers(report: &mut Report) -> Result<()> {
    report.transfers();
    let mut producer = transfer::Producer::start()?;
    for shift in [12, 14, 15, 16, 18, 20, 22] {
        report.transfer(&producer.measure(1 << shift, ROUNDS)?);
    }
    // Nothing scattered: the ceiling.
    report.transfer(&producer.measure(transfer::MOVED, ROUNDS)?);
    Ok(())
}

fn networks(report: &mut Report) -> Result<()> {
    report.networks();
    let mut sender = network::Sender::start()?;
    for shift in [12, 14, 16, 18, 20] {
        report.network(&sender.measure(1 << shift, ROUNDS)?);
    }
    Ok(())
}

/// Before the transfers, which pin this thread and so all that it starts.
fn handovers(report: &mut Report) -> Result<()> {
    report.handovers();
    let mut prefill = handover::Prefill::start()?;
    for (blocks, rounds) in [(1, 50), (16, 30), (128, 12)] {
        report.handover(&prefill.measure(blocks, rounds)?);
    }
    Ok(())
}
