//! Network interfaces.

use super::finding::{Area, Finding};
use super::host::Host;

/// `IFF_UP` and `IFF_LOOPBACK`.
const UP: u32 = 1;
const LOOPBACK: u32 = 8;

pub(super) fn check(host: &Host) -> Vec<Finding> {
    let mut up = Vec::new();
    for name in host.names("/sys/class/net") {
        let read = |what: &str| host.read(&format!("/sys/class/net/{name}/{what}"));
        let flags = read("flags")
            .and_then(|flags| u32::from_str_radix(flags.trim_start_matches("0x"), 16).ok())
            .unwrap_or(0);
        if flags & UP == 0 || flags & LOOPBACK != 0 || read("operstate").as_deref() == Some("down")
        {
            continue;
        }
        up.push(format!("{name} (MTU {})", read("mtu").as_deref().unwrap_or("unknown")));
    }
    let name = "interfaces";
    vec![match up.is_empty() {
        false => Finding::ok(Area::Network, name, up.join(", ")),
        true => Finding::absent(
            Area::Network,
            name,
            "none is up but the loopback: peers on this host only",
        ),
    }]
}
