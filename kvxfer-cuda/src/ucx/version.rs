//! Which versions of UCX are used, and which understand each other.

use std::fmt;

use kvxfer_core::{Error, ErrorKind, Result};

/// A version of UCX.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// 1, so far.
    pub major: u16,
    /// 22, in 1.22.0.
    pub minor: u16,
    /// 0, in 1.22.0.
    pub patch: u16,
}

/// The oldest that is used. Since 1.14 an endpoint tells which transports it goes over (without that nobody knows
/// whether bytes go by RDMA), and a message's header is copied when asked.
pub const MINIMUM: Version = Version { major: 1, minor: 14, patch: 0 };

/// The oldest that is used with another minor version. Measured over TCP: 1.19 to 1.22 understand each other both
/// ways; 1.22 can't unpack the keys of 1.14 to 1.18.
const MIXED: Version = Version { major: 1, minor: 19, patch: 0 };

/// By how much minor versions may differ. A worker's address tells its release in four bits, which UCX reads as the
/// nearest release that has them; it promises no more.
const SPAN: u16 = 7;

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// Whether two sides' libraries can talk to each other: the same minor version, or both 1.19 or newer and at most
/// seven minor versions apart.
///
/// # Errors
/// `VersionMismatch`, which names both.
pub fn compatible(ours: Version, theirs: Version) -> Result<()> {
    let (older, newer) = (ours.min(theirs), ours.max(theirs));
    let same = (older.major, older.minor) == (newer.major, newer.minor);
    let near = older.major == newer.major && newer.minor - older.minor <= SPAN;
    if older >= MINIMUM && (same || (older >= MIXED && near)) {
        return Ok(());
    }
    let older_side = if theirs < ours { "the peer" } else { "this side" };
    let fix = format!("install UCX {}.{} for {older_side}", newer.major, newer.minor);
    Err(mismatch(
        format!("UCX {ours} here and {theirs} at the peer don't understand each other"),
        fix,
    ))
}

pub(super) fn mismatch(about: String, fix: String) -> Error {
    ErrorKind::VersionMismatch.error(about).fix(fix)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(text: &str) -> Version {
        let parts: Vec<u16> = text.split('.').map(|part| part.parse().unwrap()).collect();
        Version { major: parts[0], minor: parts[1], patch: parts[2] }
    }

    #[test]
    fn near_versions_talk_and_others_are_refused_by_name() {
        for (ours, theirs) in
            [("1.22.0", "1.23.0"), ("1.14.1", "1.14.0"), ("1.19.0", "1.26.0"), ("2.0.0", "2.3.0")]
        {
            compatible(version(ours), version(theirs)).unwrap();
            compatible(version(theirs), version(ours)).unwrap();
        }
        for (ours, theirs) in [
            ("1.22.0", "1.13.1"),
            ("1.13.0", "1.13.0"),
            ("1.18.1", "1.19.0"),
            ("1.19.0", "1.27.0"),
            ("1.99.0", "2.0.0"),
        ] {
            for (ours, theirs) in [(ours, theirs), (theirs, ours)] {
                let error = compatible(version(ours), version(theirs)).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::VersionMismatch);
                let text = error.to_string();
                assert!(
                    text.contains(&format!("UCX {ours} here and {theirs} at the peer")),
                    "{text}"
                );
            }
        }
        let text = compatible(version("1.22.0"), version("1.13.1")).unwrap_err().to_string();
        assert!(text.contains("(install UCX 1.22 for the peer)"), "{text}");
    }
}
