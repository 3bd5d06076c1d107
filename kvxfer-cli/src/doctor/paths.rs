//! What the findings mean for each path.

use std::fmt;

use clap::ValueEnum;
use serde::Serialize;

use super::finding::{Finding, State};

/// A path, as `require_path` spells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum PathName {
    /// Within a process.
    Local,
    /// Shared memory of a host.
    Shm,
    /// From GPU to GPU of a host.
    CudaIpc,
    /// By RDMA, with UCX.
    Ucx,
    /// Over TCP.
    Tcp,
}

/// All of them.
pub const ALL: &[PathName] =
    &[PathName::Local, PathName::Shm, PathName::CudaIpc, PathName::Ucx, PathName::Tcp];

impl PathName {
    /// Whether this release has it.
    fn is_built(self) -> bool {
        matches!(self, Self::Local | Self::Shm | Self::CudaIpc)
    }

    fn about(self) -> &'static str {
        match self {
            Self::Local => "between agents of one process",
            Self::Shm => "between processes of this host, KV in host memory",
            Self::CudaIpc => "between processes of this host, KV in GPU memory",
            Self::Ucx => "between hosts, by RDMA",
            Self::Tcp => "between hosts, over TCP",
        }
    }
}

impl fmt::Display for PathName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Local => "local",
            Self::Shm => "shm",
            Self::CudaIpc => "cuda_ipc",
            Self::Ucx => "ucx",
            Self::Tcp => "tcp",
        })
    }
}

/// Whether a path can be had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// Which.
    pub path: PathName,
    /// `Ok` or `Refused`.
    pub state: State,
    /// What it is for, or why it is refused.
    pub detail: String,
    /// What would help.
    pub fix: Option<String>,
    /// Whether somebody requires it.
    pub required: bool,
}

impl Verdict {
    /// Whether it can be had.
    pub fn is_ok(&self) -> bool {
        self.state == State::Ok
    }
}

/// A verdict on each path. The first finding that is in its way is the reason.
pub(super) fn verdicts(findings: &[Finding], required: &[PathName]) -> Vec<Verdict> {
    let verdict = |&path: &PathName| {
        let blocking = findings.iter().find(|finding| finding.blocks(path));
        let (state, detail, fix) = match blocking {
            _ if !path.is_built() => {
                (State::Refused, "this release of kvxfer does not have it yet".to_owned(), None)
            }
            Some(finding) => (State::Refused, finding.detail.clone(), finding.fix.clone()),
            None => (State::Ok, path.about().to_owned(), None),
        };
        Verdict { path, state, detail, fix, required: required.contains(&path) }
    };
    ALL.iter().map(verdict).collect()
}
