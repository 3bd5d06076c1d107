//! Network cards that reach memory by themselves, and whether they reach a GPU's.

use super::finding::{Area, Finding};
use super::host::Host;

const DEVICES: &str = "/sys/class/infiniband";

pub(super) fn check(host: &Host) -> Vec<Finding> {
    let devices = host.names(DEVICES);
    if devices.is_empty() {
        return vec![Finding::absent(Area::Rdma, "devices", "no RDMA device is visible")];
    }
    let mut found: Vec<_> = devices.iter().flat_map(|device| ports(host, device)).collect();
    found.extend(verbs(host, &devices));
    found.extend(gpu_direct(host));
    found
}

fn ports(host: &Host, device: &str) -> Vec<Finding> {
    let folder = format!("{DEVICES}/{device}/ports");
    let port = |number: String| {
        let read = |what: &str| host.read(&format!("{folder}/{number}/{what}")).unwrap_or_default();
        // "4: ACTIVE"
        let state = read("state");
        let state = state.rsplit(": ").next().unwrap_or("unknown").to_owned();
        let name = format!("{device}:{number}");
        let detail = format!("{}, {}, {state}", read("link_layer"), read("rate"));
        match state.as_str() {
            "ACTIVE" => Finding::ok(Area::Rdma, &name, detail),
            "INIT" => {
                Finding::warn(Area::Rdma, &name, detail).fix("start a subnet manager (opensm)")
            }
            _ => Finding::warn(Area::Rdma, &name, detail)
                .fix("check the cable and the switch port, or leave this device out"),
        }
    };
    host.names(&folder).into_iter().map(port).collect()
}

/// A container sees devices in /sys that it has no node for.
fn verbs(host: &Host, devices: &[String]) -> Option<Finding> {
    let class = "/sys/class/infiniband_verbs";
    let usable = |device: &&String| {
        host.names(class).iter().any(|verbs| {
            host.read(&format!("{class}/{verbs}/ibdev")).as_ref() == Some(*device)
                && host.has(&format!("/dev/infiniband/{verbs}"))
        })
    };
    let without: Vec<_> = devices.iter().filter(|device| !usable(device)).cloned().collect();
    if without.is_empty() {
        return None;
    }
    let detail = format!("{} can't be opened here: no node in /dev/infiniband", without.join(", "));
    Some(Finding::warn(Area::Rdma, "nodes", detail).fix(
        "give the container /dev/infiniband (docker run --device=/dev/infiniband, or an RDMA device plug-in)",
    ))
}

fn gpu_direct(host: &Host) -> Option<Finding> {
    let survey = host.gpus.as_ref()?.as_ref().ok()?;
    let name = "GPUDirect";
    let module = ["nvidia_peermem", "nv_peer_mem"]
        .into_iter()
        .find(|module| host.has(&format!("/sys/module/{module}")));
    if let Some(module) = module {
        return Some(Finding::ok(Area::Rdma, name, format!("by the module {module}")));
    }
    if survey.gpus.iter().any(|gpu| gpu.dma_buf) {
        return Some(Finding::ok(Area::Rdma, name, "by dma-buf"));
    }
    Some(
        Finding::warn(Area::Rdma, name, "neither nvidia-peermem nor dma-buf: GPU memory is staged in host memory")
            .fix("run modprobe nvidia-peermem on the host, or use the driver's open kernel modules (dma-buf)"),
    )
}
