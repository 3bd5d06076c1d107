//! How much memory this process may still take.
//!
//! Shared memory that goes beyond the limit of a container doesn't fail: the kernel kills someone. So
//! the pool asks first.

use std::fmt;
use std::fs;
use std::path::Path;

/// What this process may still take, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// The least of what the host has available and what each memory cgroup above this process has left. `None` when
    /// nothing can be read.
    pub available: Option<u64>,
    /// The lowest limit of those cgroups, if one has a limit.
    pub limit: Option<u64>,
}

impl Room {
    /// Of this process.
    pub fn here() -> Self {
        Self::below(Path::new("/"))
    }

    /// As the files of /proc and /sys below `root` have it.
    pub fn below(root: &Path) -> Self {
        let read = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
        let host = field(&read("proc/meminfo"), "MemAvailable:").map(|kib| kib * 1024);
        let groups = groups(&read("proc/self/cgroup"), &root.join("sys/fs/cgroup"));
        Self {
            available: host.into_iter().chain(groups.iter().map(|group| group.left)).min(),
            limit: groups.iter().map(|group| group.limit).filter(|&limit| limit < NO_LIMIT).min(),
        }
    }
}

/// Of this process: [`Room::available`].
pub(super) fn available() -> Option<u64> {
    Room::here().available
}

/// What version 1 writes where there is no limit is about the largest number.
const NO_LIMIT: u64 = 1 << 60;

#[derive(Debug, PartialEq, Eq)]
struct Group {
    limit: u64,
    left: u64,
}

/// Each cgroup of `/proc/self/cgroup`'s text that limits memory.
fn groups(text: &str, root: &Path) -> Vec<Group> {
    let mut found = Vec::new();
    for line in text.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let (mount, files) = match controllers {
            "" => (root.to_owned(), ["memory.max", "memory.current", "inactive_file"]),
            "memory" => (
                root.join("memory"),
                ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"],
            ),
            _ => continue,
        };
        // A container may see its group's path as the host spells it, and only the mount's root is
        // there: so what is missing is passed over.
        for group in Path::new(path.trim_start_matches('/')).ancestors() {
            found.extend(group_at(&mount.join(group), files));
        }
    }
    found
}

fn group_at(group: &Path, [limit, usage, cache]: [&str; 3]) -> Option<Group> {
    let number = |file: &str| fs::read_to_string(group.join(file)).ok()?.trim().parse().ok();
    // "max" is no number, and no limit.
    let limit: u64 = number(limit)?;
    let usage: u64 = number(usage)?;
    let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    // The kernel gives up the file cache before it refuses anything.
    let cache = field(&stat, cache).unwrap_or(0);
    Some(Group { limit, left: limit.saturating_sub(usage.saturating_sub(cache)) })
}

fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        (words.next()? == name).then(|| words.next()?.parse().ok())?
    })
}

/// A number of bytes as people write it: "64 MiB", "1.5 GiB".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
        let Some((shift, unit)) = units.into_iter().find(|(shift, _)| self.0 >> shift > 0) else {
            return write!(f, "{} bytes", self.0);
        };
        if self.0.trailing_zeros() >= shift {
            write!(f, "{} {unit}", self.0 >> shift)
        } else {
            write!(f, "{:.1} {unit}", self.0 as f64 / (1_u64 << shift) as f64)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_some_memory() {
        assert!(available().unwrap() > 1 << 20);
    }

    #[test]
    fn the_tightest_group_counts_and_its_file_cache_does_not() {
        let root = std::env::temp_dir().join(format!("kvxfer-cgroup-{}", std::process::id()));
        let put = |path: &str, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        put("proc/meminfo", "MemTotal: 8 kB\nMemAvailable: 5 kB\n");
        put("proc/self/cgroup", "9:name=systemd:/\n4:memory:/v1/gone\n0::/pod/box\n");
        put("sys/fs/cgroup/pod/box/memory.max", "max\n");
        put("sys/fs/cgroup/pod/box/memory.current", "10\n");
        put("sys/fs/cgroup/pod/memory.max", "1000\n");
        put("sys/fs/cgroup/pod/memory.current", "700\n");
        put("sys/fs/cgroup/pod/memory.stat", "anon 400\ninactive_file 300\n");
        assert_eq!(Room::below(&root), Room { available: Some(600), limit: Some(1000) });
        put("sys/fs/cgroup/memory/v1/memory.limit_in_bytes", "500\n");
        put("sys/fs/cgroup/memory/v1/memory.usage_in_bytes", "600\n");
        assert_eq!(Room::below(&root), Room { available: Some(0), limit: Some(500) });
        put("sys/fs/cgroup/memory/v1/memory.limit_in_bytes", "9223372036854771712\n");
        assert_eq!(Room::below(&root), Room { available: Some(600), limit: Some(1000) });
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(Room::below(&root), Room::default());
    }

    #[test]
    fn sizes_read_well() {
        let sizes = [0, 4095, 4096, 3 << 29, 1 << 30, 5 << 40];
        let texts = ["0 bytes", "4.0 KiB", "4 KiB", "1.5 GiB", "1 GiB", "5 TiB"];
        for (size, text) in sizes.into_iter().zip(texts) {
            assert_eq!(Bytes(size).to_string(), text);
        }
    }
}
