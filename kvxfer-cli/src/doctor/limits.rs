//! Memory and descriptors that this process may take.

use kvxfer_cuda::control::Limits;
use kvxfer_cuda::memory::{Bytes, Room};

use super::finding::{Area, Finding};
use super::host::Host;

pub(super) fn check(host: &Host) -> Vec<Finding> {
    let limits = host.read("/proc/self/limits").unwrap_or_default();
    let mut found = vec![memory(host)];
    found.extend(dev_shm(host));
    found.extend(memlock(host, &limits));
    found.extend(nofile(&limits));
    found.extend(huge_pages(host));
    found
}

fn memory(host: &Host) -> Finding {
    let (room, pool) = (Room::below(&host.root), Bytes(host.buffer_size));
    let limit =
        room.limit.map(|limit| format!(", of a limit of {}", Bytes(limit))).unwrap_or_default();
    let Some(available) = room.available else {
        return Finding::warn(Area::Limits, "memory", "what is available can't be read")
            .fix("mount /proc");
    };
    let detail = format!("{} available{limit}", Bytes(available));
    if available < host.buffer_size {
        return Finding::warn(Area::Limits, "memory", format!("{detail}: a pool of {pool} in host memory doesn't fit"))
            .fix("set buffer_size to less, or raise the container's memory limit (segments count as its memory)");
    }
    Finding::ok(Area::Limits, "memory", format!("{detail}; a pool of {pool} fits"))
}

/// Docker gives 64 MiB of it, which breaks other software; so it is said that it doesn't matter here.
fn dev_shm(host: &Host) -> Option<Finding> {
    let stat = rustix::fs::statvfs(host.path("/dev/shm")).ok()?;
    let bytes = Bytes(stat.f_blocks.saturating_mul(stat.f_frsize));
    let detail = format!("{bytes}; kvxfer does not use it, its segments are memfds");
    Some(Finding::ok(Area::Limits, "/dev/shm", detail))
}

fn memlock(host: &Host, limits: &str) -> Option<Finding> {
    let soft = soft(limits, "Max locked memory")?;
    let finding = match soft {
        None => Finding::ok(Area::Limits, "memlock", "unlimited"),
        Some(bytes) if bytes >= host.buffer_size => {
            Finding::ok(Area::Limits, "memlock", Bytes(bytes).to_string())
        }
        Some(bytes) if !host.has_rdma() => Finding::ok(
            Area::Limits,
            "memlock",
            format!("{}; only RDMA needs more, and there is no RDMA device", Bytes(bytes)),
        ),
        Some(bytes) => Finding::warn(
            Area::Limits,
            "memlock",
            format!(
                "{}: RDMA can't register a pool of {}",
                Bytes(bytes),
                Bytes(host.buffer_size)
            ),
        )
        .fix(
            "docker run --ulimit memlock=-1; Kubernetes has no such setting: set LimitMEMLOCK=infinity for the \
             container runtime's service on the node (CAP_IPC_LOCK does it only in the host's user namespace)",
        ),
    };
    Some(finding)
}

fn nofile(limits: &str) -> Option<Finding> {
    let links = Limits::default().max_links as u64;
    let (name, soft) = ("open files", soft(limits, "Max open files")?);
    Some(match soft {
        Some(files) if files < links => Finding::warn(
            Area::Limits,
            name,
            format!("{files}: an agent has two descriptors a link, and one a segment; its engine has more"),
        )
        .fix("raise it: ulimit -n 65536, or docker run --ulimit nofile=65536"),
        Some(files) => Finding::ok(Area::Limits, name, files.to_string()),
        None => Finding::ok(Area::Limits, name, "unlimited"),
    })
}

fn huge_pages(host: &Host) -> Option<Finding> {
    let text = host.read("/proc/meminfo")?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    let (total, size) = (field("HugePages_Total")?, field("Hugepagesize")?);
    // The chosen one stands in brackets.
    let shared = host
        .read("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
        .and_then(|text| Some(text.split_once('[')?.1.split_once(']')?.0.to_owned()))
        .unwrap_or_else(|| "not offered".to_owned());
    let detail = format!(
        "{total} of {} reserved, not used by kvxfer; transparent ones for shared memory: {shared}",
        Bytes(size << 10)
    );
    Some(Finding::ok(Area::Limits, "huge pages", detail))
}

/// The soft limit of that name in the text of /proc/self/limits: `Some(None)` is none.
fn soft(limits: &str, name: &str) -> Option<Option<u64>> {
    let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
    match line.split_whitespace().next()? {
        "unlimited" => Some(None),
        number => number.parse().ok().map(Some),
    }
}
