//! The folder through which two agents of one host meet.

use std::path::Path;

use kvxfer_core::path::PathName;
use kvxfer_cuda::control::check_socket_dir;

use super::finding::{Area, Finding};
use super::host::Host;

/// Descriptors go over Unix sockets, and over nothing else.
pub(super) const BY_DESCRIPTOR: &[PathName] = &[PathName::Shm, PathName::CudaIpc];

pub(super) fn check(host: &Host) -> Vec<Finding> {
    let folder = host.socket_dir.display();
    let finding = match check_socket_dir(&host.socket_dir) {
        Err(error) => Finding::failed(Area::Sockets, "folder", &error).needed_by(BY_DESCRIPTOR),
        Ok(_) if is_private(host) => Finding::warn(
            Area::Sockets,
            "folder",
            format!("{folder} is in this container's own file system: no other container sees it"),
        )
        .fix(
            "mount one folder into both containers at the same path (docker run -v; in Kubernetes an emptyDir for \
             one pod, a hostPath for two), with socket_dir in it",
        ),
        Ok(true) => Finding::ok(Area::Sockets, "folder", format!("{folder} is this user's alone")),
        Ok(false) => {
            Finding::ok(Area::Sockets, "folder", format!("{folder} is not there yet, and can be made"))
        }
    };
    vec![finding]
}

/// Whether the folder lies in the layers of a container rather than on something mounted into it.
fn is_private(host: &Host) -> bool {
    let Some(mounts) = host.read("/proc/self/mountinfo") else { return false };
    let folder = std::path::absolute(&host.socket_dir).unwrap_or_else(|_| host.socket_dir.clone());
    let mounted = mounts.lines().filter_map(|line| {
        // "36 35 98:0 /of/the/file/system /where rw,noatime master:1 - ext4 /dev/root rw"
        let (before, after) = line.split_once(" - ")?;
        Some((Path::new(before.split(' ').nth(4)?), after.split(' ').next()?))
    });
    let holds = mounted.filter(|(at, _)| folder.starts_with(at));
    // The last one of the longest covers the others.
    let covers = holds.max_by_key(|(at, _)| at.as_os_str().len());
    covers.is_some_and(|(at, kind)| at == Path::new("/") && matches!(kind, "overlay" | "aufs"))
}
