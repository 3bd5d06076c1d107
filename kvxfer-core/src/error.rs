//! One error for the whole library: what went wrong, with what, and what to do about it.

use std::fmt;

/// What kind of thing went wrong. The Python exceptions mirror these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The configuration contradicts itself, or names something unknown.
    Config,
    /// The two sides' models or layouts differ; the message names the field.
    LayoutMismatch,
    /// The two sides speak no common version of the protocol.
    VersionMismatch,
    /// A peer sent bytes that the protocol does not allow.
    Protocol,
    /// A peer went away, or was restarted.
    PeerLost,
    /// A deadline passed.
    Timeout,
    /// The pool cannot hold what was asked.
    PoolFull,
    /// Stored bytes are not the bytes that were sent.
    Corrupt,
    /// The path that was required, or any path at all, cannot be had.
    NoPath,
    /// A range lies outside the memory it was meant for.
    OutOfBounds,
    /// Something by that name is not known here (any more).
    NotFound,
    /// The agent is closed, or about to be.
    Closed,
    /// The operating system refused something.
    Io,
    /// The accelerator, or its driver, refused something.
    Device,
}

/// An error: the kind, what it was about, and the fix where there is one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Error {
    kind: ErrorKind,
    about: String,
    fix: Option<String>,
    retryable: bool,
}

/// A result of this library.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of that kind; `about` is a clause that says what failed and with what: "segment 3 of
    /// peer 1f20ab77 is 4096 bytes, 8192 were promised".
    pub fn new(kind: ErrorKind, about: impl Into<String>) -> Self {
        Self { kind, about: about.into(), fix: None, retryable: false }
    }

    /// Adds what the reader can do: "set buffer_size to at least 64MiB".
    #[must_use]
    pub fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = Some(fix.into());
        self
    }

    /// Marks that the same call may succeed later.
    #[must_use]
    pub fn retry(mut self) -> Self {
        self.retryable = true;
        self
    }

    /// The kind.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// What failed, without what to do about it.
    pub fn about(&self) -> &str {
        &self.about
    }

    /// What the reader can do, if that is known.
    pub fn remedy(&self) -> Option<&str> {
        self.fix.as_deref()
    }

    /// Whether the same call may succeed later.
    pub fn retryable(&self) -> bool {
        self.retryable
    }

    /// Whether it stays true for a link until someone configures one of its sides anew, so that a peer that was
    /// refused for it need not come back soon.
    pub fn lasting(&self) -> bool {
        use ErrorKind::{Config, LayoutMismatch, NoPath, VersionMismatch};
        matches!(self.kind, Config | LayoutMismatch | VersionMismatch | NoPath)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.about)?;
        match &self.fix {
            Some(fix) => write!(f, " ({fix})"),
            None => Ok(()),
        }
    }
}

impl ErrorKind {
    /// `about` as an error of this kind.
    pub fn error(self, about: impl Into<String>) -> Error {
        Error::new(self, about)
    }
}
