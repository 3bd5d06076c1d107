//! What the findings, and the peer's answer, mean for each path.

use kvxfer_core::path::PathName;
use serde::{Serialize, Serializer};

use super::finding::{Finding, State};
use super::peer::Judged;

/// Whether a path can be had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// Which.
    #[serde(serialize_with = "name")]
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

/// A verdict on each path. The first finding that is in its way is the reason, for it comes with a fix; then what the
/// peer says.
pub(super) fn verdicts(
    findings: &[Finding],
    peer: Option<&Judged>,
    required: &[PathName],
) -> Vec<Verdict> {
    let verdict = |path: PathName| {
        let blocking = findings.iter().find(|finding| finding.blocks(path));
        let refused = match (blocking, peer) {
            (Some(finding), _) => Some((finding.detail.clone(), finding.fix.clone())),
            (None, Some(judged)) => judged.why_not(path).map(|why| (why, None)),
            (None, None) => None,
        };
        let (state, detail, fix) = match refused {
            Some((detail, fix)) => (State::Refused, detail, fix),
            None => (State::Ok, about(path).to_owned(), None),
        };
        Verdict { path, state, detail, fix, required: required.contains(&path) }
    };
    PathName::ALL.into_iter().map(verdict).collect()
}

fn about(path: PathName) -> &'static str {
    match path {
        PathName::CudaIpc => "between processes of this host, KV in GPU memory",
        PathName::Local => "between agents of one process",
        PathName::Shm => "between processes of this host, KV in host memory",
        PathName::Ucx => "between hosts, by RDMA",
        PathName::Tcp => "between hosts, KV in host memory, with allow_insecure on both sides",
    }
}

pub(super) fn name<S: Serializer>(path: &PathName, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(path.as_str())
}

pub(super) fn names<S: Serializer>(paths: &[PathName], to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(paths.iter().map(|path| path.as_str()))
}
