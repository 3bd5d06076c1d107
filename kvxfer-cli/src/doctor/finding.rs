//! What a check says.

use kvxfer_core::path::PathName;
use serde::Serialize;

use super::paths;

/// What a finding is about. The order is that of the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Area {
    /// What the kernel offers.
    Kernel,
    /// What this process may take of memory and descriptors.
    Limits,
    /// Namespaces and capabilities.
    Isolation,
    /// The folder of the Unix sockets.
    Sockets,
    /// The CUDA driver, its GPUs and their links.
    Gpu,
    /// Network cards that reach memory by themselves.
    Rdma,
    /// The UCX library.
    Ucx,
    /// Network interfaces.
    Network,
    /// The other agent.
    Peer,
}

impl Area {
    /// As people read it.
    pub fn title(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Limits => "limits",
            Self::Isolation => "isolation",
            Self::Sockets => "sockets",
            Self::Gpu => "GPU",
            Self::Rdma => "RDMA",
            Self::Ucx => "UCX",
            Self::Network => "network",
            Self::Peer => "peer",
        }
    }
}

/// How it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be, or of no consequence.
    Ok,
    /// It works, and something is likely to go wrong.
    Warn,
    /// What needs it does not work.
    Refused,
    /// It is not there, and not everybody has it. What needs it does not work.
    Absent,
}

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it is about.
    pub area: Area,
    /// What of it.
    pub name: String,
    /// How it stands.
    pub state: State,
    /// What was found.
    pub detail: String,
    /// What to do, if there is anything to do.
    pub fix: Option<String>,
    /// The paths that do not work when it is refused or absent.
    #[serde(serialize_with = "paths::names")]
    pub needed_by: &'static [PathName],
}

impl Finding {
    fn new(area: Area, name: &str, state: State, detail: String) -> Self {
        Self { area, name: name.to_owned(), state, detail, fix: None, needed_by: &[] }
    }

    pub(super) fn ok(area: Area, name: &str, detail: impl Into<String>) -> Self {
        Self::new(area, name, State::Ok, detail.into())
    }

    pub(super) fn warn(area: Area, name: &str, detail: impl Into<String>) -> Self {
        Self::new(area, name, State::Warn, detail.into())
    }

    pub(super) fn refused(area: Area, name: &str, detail: impl Into<String>) -> Self {
        Self::new(area, name, State::Refused, detail.into())
    }

    pub(super) fn absent(area: Area, name: &str, detail: impl Into<String>) -> Self {
        Self::new(area, name, State::Absent, detail.into())
    }

    /// A library's error: what it was about, and its fix.
    pub(super) fn failed(area: Area, name: &str, error: &kvxfer_core::Error) -> Self {
        let finding = Self::refused(area, name, error.about());
        Self { fix: error.remedy().map(str::to_owned), ..finding }
    }

    #[must_use]
    pub(super) fn fix(self, fix: impl Into<String>) -> Self {
        Self { fix: Some(fix.into()), ..self }
    }

    #[must_use]
    pub(super) fn needed_by(self, paths: &'static [PathName]) -> Self {
        Self { needed_by: paths, ..self }
    }

    /// Whether that path does not work because of it.
    pub fn blocks(&self, path: PathName) -> bool {
        matches!(self.state, State::Refused | State::Absent) && self.needed_by.contains(&path)
    }
}
