//! How often what happened under which fault, so that no violations means something.

use std::collections::BTreeMap;

use kvxfer_core::ErrorKind;
use kvxfer_core::wire::Message;

use crate::plan::Mode;

#[derive(Default)]
pub(crate) struct Counts {
    pub(crate) mode: Option<Mode>,
    pub(crate) operations: u64,
    pub(crate) requests: u64,
    table: BTreeMap<(&'static str, &'static str), u64>,
    active: Vec<(&'static str, u64)>,
}

/// The column of what happens while nothing is wrong.
const QUIET: &str = "no fault";

impl Counts {
    /// A fault is in force until then.
    pub(crate) fn fault(&mut self, fault: &'static str, until: u64) {
        *self.table.entry(("(times)", fault)).or_default() += 1;
        self.active.retain(|(name, _)| *name != fault);
        self.active.push((fault, until));
    }

    pub(crate) fn step(&mut self, step: &'static str, now: u64) {
        self.active.retain(|(_, until)| *until > now);
        for (fault, _) in &self.active {
            *self.table.entry((step, fault)).or_default() += 1;
        }
        if self.active.is_empty() {
            *self.table.entry((step, QUIET)).or_default() += 1;
        }
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.operations += other.operations;
        self.requests += other.requests;
        for (key, count) in other.table {
            *self.table.entry(key).or_default() += count;
        }
    }

    pub(crate) fn total(&self, step: &str) -> u64 {
        self.table.iter().filter(|((name, _), _)| *name == step).map(|(_, count)| count).sum()
    }

    fn columns(&self) -> Vec<&'static str> {
        let mut columns: Vec<_> = self.table.keys().map(|(_, fault)| *fault).collect();
        columns.sort_unstable();
        columns.dedup();
        columns
    }

    fn rows(&self) -> Vec<&'static str> {
        let mut rows: Vec<_> = self.table.keys().map(|(step, _)| *step).collect();
        rows.dedup();
        rows
    }

    pub(crate) fn print(&self) {
        let columns = self.columns();
        println!("{:32} {}", "", columns.iter().map(|c| format!("{c:>17}")).collect::<String>());
        for row in self.rows() {
            let cells = columns.iter().map(|column| {
                let count = self.table.get(&(row, column)).copied().unwrap_or(0);
                format!("{count:>17}")
            });
            println!("{row:32} {}", cells.collect::<String>());
        }
    }

    /// `{"transition": {"fault": count, …}, …}`
    pub(crate) fn json(&self) -> String {
        let rows = self.rows().into_iter().map(|row| {
            let cells = self
                .table
                .iter()
                .filter(|((name, _), _)| *name == row)
                .map(|((_, fault), count)| format!("\"{fault}\": {count}"));
            format!("    \"{row}\": {{{}}}", cells.collect::<Vec<_>>().join(", "))
        });
        format!("{{\n{}\n  }}", rows.collect::<Vec<_>>().join(",\n"))
    }
}

pub(crate) fn failure(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Corrupt => "load failed: corrupt",
        ErrorKind::Timeout => "load failed: timeout",
        ErrorKind::PeerLost => "load failed: peer lost",
        ErrorKind::Closed => "load failed: released",
        ErrorKind::NotFound => "load failed: not found",
        _ => "load failed: other",
    }
}

pub(crate) fn name(message: &Message) -> &'static str {
    match message {
        Message::Ping => "Ping",
        Message::Bye { .. } => "Bye",
        Message::Attach { .. } => "Attach",
        Message::Offer { .. } => "Offer",
        Message::Withdraw { .. } => "Withdraw",
        Message::Commit { .. } => "Commit",
        Message::Abort { .. } => "Abort",
        Message::FenceAck { .. } => "FenceAck",
        Message::Renew { .. } => "Renew",
        Message::Told { .. } => "Told",
        Message::Retired { .. } => "Retired",
        Message::Attached { .. } => "Attached",
        Message::Probed { .. } => "Probed",
        Message::Segment { .. } => "Segment",
        Message::Retire { .. } => "Retire",
        Message::Granted { .. } => "Granted",
        Message::Have { .. } => "Have",
        Message::Pending { .. } => "Pending",
        Message::Busy { .. } => "Busy",
        Message::Refused { .. } => "Refused",
        Message::CommitAck { outcome, .. } => match outcome {
            kvxfer_core::wire::message::CommitOutcome::Indexed => "CommitAck indexed",
            kvxfer_core::wire::message::CommitOutcome::Expired => "CommitAck expired",
        },
        Message::Revoke { .. } => "Revoke",
        Message::Ask { .. } => "Ask",
        Message::Claim { .. } => "Claim",
        Message::Claimed { .. } => "Claimed",
        Message::Release { .. } => "Release",
        Message::Pushed { .. } => "Pushed",
        Message::Ended { .. } => "Ended",
        Message::Examine { .. } => "Examine",
        Message::Examined { .. } => "Examined",
    }
}
