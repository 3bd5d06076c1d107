//! Namespaces and capabilities: what kvxfer does not need, and the one that can be in its way.

use super::finding::{Area, Finding};
use super::host::Host;

/// The inode numbers that the kernel gives to the first namespaces of these kinds.
const FIRST: [(&str, u64); 3] = [("pid", 0xEFFF_FFFC), ("ipc", 0xEFFF_FFFF), ("user", 0xEFFF_FFFD)];

/// Capabilities that other libraries ask for, by their bits.
const KNOWN: [(u32, &str); 3] = [(14, "IPC_LOCK"), (19, "SYS_PTRACE"), (21, "SYS_ADMIN")];

pub(super) fn check(host: &Host) -> Vec<Finding> {
    let mut found: Vec<_> = namespaces(host).into_iter().collect();
    found.extend(user(host));
    found.extend(capabilities(host));
    found
}

fn inode(host: &Host, of: &str) -> Option<u64> {
    let link = host.link(&format!("/proc/{of}"))?;
    link.split_once('[')?.1.strip_suffix(']')?.parse().ok()
}

/// Whether a namespace is the host's; `None` when that can't be told.
fn is_first(host: &Host, kind: &str) -> Option<bool> {
    let ours = inode(host, &format!("self/ns/{kind}"))?;
    if let Some((_, first)) = FIRST.iter().find(|(known, _)| *known == kind) {
        return Some(ours == *first);
    }
    // Process 1 is the host's only where all processes are to be seen.
    let all = is_first(host, "pid") == Some(true);
    all.then(|| inode(host, &format!("1/ns/{kind}")).map(|first| first == ours))?
}

fn namespaces(host: &Host) -> Option<Finding> {
    let kinds = ["pid", "ipc", "net"];
    let words: Vec<_> = kinds
        .iter()
        .filter(|kind| inode(host, &format!("self/ns/{kind}")).is_some())
        .map(|kind| {
            let whose = match is_first(host, kind) {
                Some(true) => "the host's",
                Some(false) => "its own",
                None => "unknown",
            };
            format!("{kind} {whose}")
        })
        .collect();
    if words.is_empty() {
        return None;
    }
    let detail = format!("{}; kvxfer needs to share none of them", words.join(", "));
    Some(Finding::ok(Area::Isolation, "namespaces", detail))
}

fn user(host: &Host) -> Option<Finding> {
    let name = "user namespace";
    match is_first(host, "user")? {
        true => Some(Finding::ok(Area::Isolation, name, "the host's")),
        false => Some(
            Finding::warn(
                Area::Isolation,
                name,
                "its own: to the kernel, a process in another one is another user, and is refused",
            )
            .fix("run both engines in one user namespace (Kubernetes: leave hostUsers at true)"),
        ),
    }
}

fn capabilities(host: &Host) -> Option<Finding> {
    let bits = u64::from_str_radix(&host.status("CapEff")?, 16).ok()?;
    let has: Vec<_> =
        KNOWN.iter().filter(|(bit, _)| bits >> bit & 1 == 1).map(|(_, name)| *name).collect();
    let has = if has.is_empty() { "none of note".to_owned() } else { has.join(", ") };
    let detail = format!("{has}; kvxfer needs none, neither IPC_LOCK nor SYS_PTRACE");
    Some(Finding::ok(Area::Isolation, "capabilities", detail))
}
