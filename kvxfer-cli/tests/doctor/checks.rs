//! Each warning and each refusal.

use State::{Absent, Ok, Refused, Warn};
use kvxfer_cli::doctor::{LinkKind, State};
use kvxfer_core::ErrorKind;
use kvxfer_core::path::PathName;
use kvxfer_cuda::driver::CudaError;

use crate::fake::{Fake, chmod, is_root, no_library, survey};

/// The reason for which a path is refused.
fn why(fake: &Fake, path: PathName) -> Option<String> {
    let report = fake.report(&[]);
    let verdict = report.paths.iter().find(|verdict| verdict.path == path).unwrap();
    (!verdict.is_ok()).then(|| verdict.detail.clone())
}

#[test]
fn a_healthy_machine_has_nothing_to_fix() {
    let report = Fake::new().report(&[]);
    for finding in &report.findings {
        assert_eq!((finding.state, &finding.fix), (Ok, &None), "{finding:?}");
    }
    assert!(report.ok);
    let can: Vec<_> = report.paths.iter().filter(|verdict| verdict.is_ok()).collect();
    let can: Vec<_> = can.iter().map(|verdict| verdict.path).collect();
    assert_eq!(
        can,
        [PathName::CudaIpc, PathName::Local, PathName::Shm, PathName::Ucx, PathName::Tcp]
    );
}

#[test]
fn an_empty_root_is_no_reason_to_fail() {
    let fake = Fake::new();
    fake.drop("");
    let report = fake.report(&[]);
    assert!(report.findings.iter().any(|finding| finding.state == Warn));
}

#[test]
fn old_kernels_miss_deaths() {
    let fake = Fake::new();
    for (release, state, detail) in [
        ("4.18.0-513.el8", Warn, "no pidfd"),
        ("5.2.1", Warn, "no pidfd"),
        ("5.3.0", Warn, "another PID namespace"),
        ("6.4.9", Warn, "another PID namespace"),
        ("6.5.0", Ok, "Linux 6.5.0"),
        ("10.0-rc1", Ok, "Linux 10.0-rc1"),
        ("custom", Warn, "no version"),
    ] {
        fake.put("proc/sys/kernel/osrelease", release);
        fake.finds("version", state, detail, if state == Ok { "" } else { "6.5" });
    }
    fake.drop("proc/sys/kernel/osrelease");
    fake.finds("version", Warn, "/proc is not mounted", "mount /proc");
}

#[test]
fn a_pool_that_cannot_be_made_refuses_the_paths_of_host_memory() {
    let mut fake = Fake::new();
    fake.host.pool =
        Err(ErrorKind::Io.error("memfd_create: Operation not permitted").fix("allow it"));
    fake.finds("memfd", Refused, "not permitted", "allow it");
    assert!(why(&fake, PathName::Shm).unwrap().contains("not permitted"));
    assert!(why(&fake, PathName::Local).is_some());
    assert_eq!(why(&fake, PathName::CudaIpc), None);
}

#[test]
fn memory_that_is_too_little_is_seen_before_the_pool_is_made() {
    let fake = Fake::new();
    fake.finds("memory", Ok, "31 GiB available, of a limit of 32 GiB", "");
    fake.put("sys/fs/cgroup/memory.current", "34000000000\n");
    fake.finds("memory", Warn, "a pool of 1 GiB in host memory doesn't fit", "buffer_size");
    fake.drop("proc/meminfo");
    fake.drop("sys/fs/cgroup");
    fake.finds("memory", Warn, "can't be read", "mount /proc");
}

#[test]
fn locked_memory_matters_to_rdma_alone() {
    let fake = Fake::new();
    fake.finds("memlock", Ok, "unlimited", "");
    fake.edit(
        "proc/self/limits",
        "unlimited            unlimited",
        "65536                65536    ",
    );
    fake.finds(
        "memlock",
        Warn,
        "64 KiB: RDMA can't register a pool of 1 GiB",
        "--ulimit memlock=-1",
    );
    fake.drop("sys/class/infiniband");
    fake.finds("memlock", Ok, "64 KiB; only RDMA needs more", "");
    fake.edit("proc/self/limits", "65536 ", "2147483648 ");
    fake.finds("memlock", Ok, "2 GiB", "");
}

#[test]
fn few_descriptors_and_small_shared_memory() {
    let fake = Fake::new();
    fake.edit("proc/self/limits", "1048576              1048576", "256                  1048576");
    fake.finds("open files", Warn, "256", "ulimit -n");
    fake.finds(
        "huge pages",
        Ok,
        "8 of 2 MiB reserved, not used by kvxfer; transparent ones for shared memory: advise",
        "",
    );
    fake.put("dev/shm/x", "");
    fake.finds("/dev/shm", Ok, "does not use it", "");
}

#[test]
fn namespaces_are_compared_with_the_hosts() {
    let fake = Fake::new();
    fake.finds("namespaces", Ok, "pid its own, ipc its own, net unknown", "");
    fake.finds("capabilities", Ok, "IPC_LOCK; kvxfer needs none", "");
    fake.link("proc/self/ns/pid", "pid:[4026531836]");
    fake.link("proc/1/ns/net", "net:[4026532003]");
    fake.finds("namespaces", Ok, "pid the host's, ipc its own, net the host's", "");
    fake.link("proc/1/ns/net", "net:[4026531840]");
    fake.finds("namespaces", Ok, "net its own", "");
    fake.finds("user namespace", Ok, "the host's", "");
    fake.link("proc/self/ns/user", "user:[4026532999]");
    fake.finds("user namespace", Warn, "another user", "hostUsers");
}

#[test]
fn a_socket_folder_that_is_not_ours_alone_is_refused() {
    let mut fake = Fake::new();
    fake.finds("folder", Ok, "this user's alone", "");
    chmod(&fake.host.socket_dir, 0o755);
    fake.finds("folder", Refused, "mode 0755", "chmod 0700");
    assert!(why(&fake, PathName::Shm).is_some() && why(&fake, PathName::CudaIpc).is_some());
    assert_eq!(why(&fake, PathName::Local), None);
    chmod(&fake.host.socket_dir, 0o700);
    if !is_root() {
        chmod(&fake.folder.0, 0o500);
        fake.host.socket_dir = fake.folder.0.join("new");
        fake.finds("folder", Refused, "cannot be created", "write to");
        chmod(&fake.folder.0, 0o700);
    }
    fake.host.socket_dir = fake.folder.0.join("new/deep");
    fake.finds("folder", Ok, "is not there yet", "");
    assert!(!fake.host.socket_dir.exists());
    fake.host.socket_dir = fake.folder.0.join("x".repeat(60));
    fake.finds("folder", Refused, "bytes", "shorter");
}

#[test]
fn a_socket_folder_inside_the_container_is_seen_by_no_other() {
    let fake = Fake::new();
    let parent = fake.folder.0.parent().unwrap().display().to_string();
    fake.put("proc/self/mountinfo", "1 0 0:50 / / rw master:1 - overlay overlay rw\n");
    fake.finds("folder", Warn, "no other container", "mount one folder into both");
    // The same folder, with a volume there.
    fake.put(
        "proc/self/mountinfo",
        &format!(
            "1 0 0:50 / / rw - overlay overlay rw\n2 1 8:1 / {parent} rw - ext4 /dev/sda rw\n"
        ),
    );
    fake.finds("folder", Ok, "", "");
    // No container.
    fake.put("proc/self/mountinfo", "1 0 8:1 / / rw - ext4 /dev/sda rw\n");
    fake.finds("folder", Ok, "", "");
}

#[test]
fn a_machine_without_gpus_is_not_broken_and_one_that_lost_them_is() {
    let mut fake = Fake::new();
    fake.host.gpus = Some(Err(no_library()));
    fake.finds("driver", Refused, "libcuda.so.1", "--gpus");
    fake.drop("proc/driver");
    fake.drop("dev");
    fake.finds("driver", Absent, "libcuda.so.1", "--gpus");
    assert!(why(&fake, PathName::CudaIpc).unwrap().contains("libcuda.so.1"));
    fake.host.gpus = Some(Err(CudaError::NoDevice));
    fake.finds("driver", Absent, "shows no device", "CUDA_VISIBLE_DEVICES");
    fake.host.gpus = Some(Err(CudaError::MissingSymbol { symbol: "cuMemMap" }));
    fake.finds("driver", Refused, "cuMemMap", "12.0");
    fake.host.gpus = None;
    assert!(fake.report(&[]).findings.iter().all(|finding| finding.name != "driver"));
}

#[test]
fn gpus_are_told_with_what_they_can() {
    let mut fake = Fake::new();
    fake.finds("driver", Ok, "CUDA 12.8, kernel module 570.86.15 (open)", "");
    fake.finds("GPU 1", Ok, "NVIDIA H200, GPU-00000000-0000-0000-0000-000000000001, 140 GiB", "");
    fake.finds("visible", Ok, "2 (CUDA_VISIBLE_DEVICES=0,1)", "");
    fake.finds("links", Ok, "2 NVLink, 0 PCIe, 0 closed", "");
    let mut found = survey(LinkKind::Pcie);
    found.gpus[0].mig = true;
    found.gpus[1].mps = true;
    fake.host.gpus = Some(std::result::Result::Ok(found.clone()));
    fake.finds("GPU 0", Warn, "is a MIG slice", "whole GPUs");
    fake.finds("GPU 1", Ok, "under MPS", "");
    assert_eq!(why(&fake, PathName::CudaIpc), None);
    found.gpus[1].posix_fd = false;
    fake.host.gpus = Some(std::result::Result::Ok(found));
    fake.finds("GPU 1", Refused, "file descriptors", "Volta");
    assert!(why(&fake, PathName::CudaIpc).unwrap().contains("MIG"));
    fake.host.gpus = Some(std::result::Result::Ok(survey(LinkKind::None)));
    fake.finds(
        "links",
        Warn,
        "2 closed, each direction counted, as from 0 to 1: the driver allows",
        "other GPUs",
    );
}

#[test]
fn gpus_that_the_container_hides_are_counted() {
    let mut fake = Fake::new();
    fake.drop("dev/nvidia1");
    fake.finds("visible", Warn, "1 of this host's 2 GPUs", "--gpus all");
    fake.put("dev/nvidia1", "");
    let mut one = survey(LinkKind::NvLink);
    one.gpus.pop();
    one.gpus[0].links.pop();
    fake.host.gpus = Some(std::result::Result::Ok(one));
    fake.finds("visible", Ok, "1 of 2", "");
    assert!(fake.report(&[]).findings.iter().all(|finding| finding.name != "links"));
}

#[test]
fn rdma_ports_nodes_and_the_way_to_gpu_memory() {
    let mut fake = Fake::new();
    fake.finds("mlx5_0:1", Ok, "InfiniBand, 400 Gb/sec (4X NDR), ACTIVE", "");
    fake.finds("GPUDirect", Ok, "nvidia_peermem", "");
    fake.put("sys/class/infiniband/mlx5_0/ports/1/state", "2: INIT\n");
    fake.finds("mlx5_0:1", Warn, "INIT", "subnet manager");
    fake.put("sys/class/infiniband/mlx5_0/ports/1/state", "1: DOWN\n");
    fake.finds("mlx5_0:1", Warn, "DOWN", "cable");
    fake.drop("dev/infiniband");
    fake.finds("nodes", Warn, "mlx5_0 can't be opened", "--device=/dev/infiniband");
    fake.drop("sys/module");
    fake.finds("GPUDirect", Ok, "dma-buf", "");
    let mut found = survey(LinkKind::NvLink);
    found.gpus.iter_mut().for_each(|gpu| gpu.dma_buf = false);
    fake.host.gpus = Some(std::result::Result::Ok(found));
    fake.finds("GPUDirect", Warn, "neither", "modprobe nvidia-peermem");
    fake.drop("sys/class/infiniband");
    fake.finds("devices", Absent, "no RDMA device", "");
}

#[test]
fn libraries_and_interfaces() {
    let mut fake = Fake::new();
    fake.finds("library", Ok, "1.22.0, /usr/lib64/libucp.so.0.0.0 (system)", "");
    fake.finds("transports", Ok, "those built in, and cuda, ib; takes GPU memory", "");
    fake.drop("usr");
    fake.finds("transports", Ok, "those built in; takes GPU memory", "");
    let mut ucx = fake.host.ucx.clone().unwrap().unwrap();
    ucx.cuda = Err(ErrorKind::NoPath.error("no such device").fix("ucx_info -d"));
    fake.host.ucx = Some(std::result::Result::Ok(ucx));
    fake.finds("start", Refused, "no such device", "ucx_info");
    fake.host.ucx = Some(Err(ErrorKind::NoPath.error("no UCX library was found").fix("install")));
    fake.finds("library", Absent, "no UCX library", "install");
    fake.host.ucx = Some(Err(ErrorKind::VersionMismatch.error("UCX 1.8.0 is too old")));
    fake.finds("library", Refused, "too old", "");
    fake.finds("interfaces", Ok, "eth0 (MTU 9000)", "");
    fake.put("sys/class/net/eth0/operstate", "down\n");
    fake.finds("interfaces", Absent, "loopback", "");
}
