//! The UCX library: whether there is one, and what it can.

use super::finding::{Area, Finding};
use super::host::Host;

/// Where distributions, and NVIDIA's packages, put it.
const FOLDERS: [&str; 8] = [
    "/usr/local/ucx/lib",
    "/opt/hpcx/ucx/lib",
    "/usr/local/lib",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/lib64",
    "/usr/lib64",
    "/usr/lib",
];

pub(super) fn check(host: &Host) -> Vec<Finding> {
    let configured = host.env("LD_LIBRARY_PATH").unwrap_or_default().split(':').map(str::to_owned);
    let folders = configured.filter(|folder| !folder.is_empty());
    let mut folders = folders.chain(FOLDERS.map(str::to_owned));
    let found = folders.find(|folder| host.has(&format!("{folder}/libucp.so.0")));
    let Some(folder) = found else {
        return vec![Finding::absent(Area::Ucx, "library", "no libucp.so.0 in the usual places")];
    };
    let modules: Vec<_> = host
        .names(format!("{folder}/ucx"))
        .iter()
        .filter_map(|name| Some(name.strip_prefix("libuct_")?.strip_suffix(".so")?.to_owned()))
        .collect();
    let transports = match modules.is_empty() {
        true => "no transport beyond those built in".to_owned(),
        false => format!("transports {}", modules.join(", ")),
    };
    vec![Finding::ok(Area::Ucx, "library", format!("{folder}/libucp.so.0; {transports}"))]
}
