//! The kernel: what is needed, and what is better with a newer one.

use kvxfer_core::path::PathName;

use super::finding::{Area, Finding};
use super::host::Host;

/// A host pool's segments are sealed memfds.
const IN_HOST_MEMORY: &[PathName] = &[PathName::Local, PathName::Shm, PathName::Tcp];

pub(super) fn check(host: &Host) -> Vec<Finding> {
    vec![version(host), memfd(host)]
}

fn version(host: &Host) -> Finding {
    let Some(release) = host.read("/proc/sys/kernel/osrelease") else {
        return Finding::warn(Area::Kernel, "version", "/proc is not mounted")
            .fix("mount /proc: agents tell by it whether they are on one host");
    };
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let version = match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor),
        _ => {
            return Finding::warn(Area::Kernel, "version", format!("{release} is no version"))
                .fix("use Linux 6.5 or newer");
        }
    };
    // Each is a fall-back, not a failure: memory that a dead writer may still reach is replaced, never reused.
    let lacks = match version {
        (..5, _) | (5, ..3) => "has no pidfd, so no peer's death is seen (5.3)",
        (5, _) | (6, ..5) => "does not show the death of a peer in another PID namespace (6.5)",
        _ => {
            return Finding::ok(Area::Kernel, "version", format!("Linux {release}"));
        }
    };
    Finding::warn(
        Area::Kernel,
        "version",
        format!("Linux {release} {lacks}: memory it wrote to is replaced instead of reused"),
    )
    .fix("use Linux 6.5 or newer, or let both engines share a PID namespace")
}

fn memfd(host: &Host) -> Finding {
    match &host.pool {
        Ok(()) => Finding::ok(Area::Kernel, "memfd", "sealed shared memory can be made and mapped"),
        Err(error) => Finding::failed(Area::Kernel, "memfd", error).needed_by(IN_HOST_MEMORY),
    }
}
