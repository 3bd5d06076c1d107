//! A machine that is a folder, in good health until a test changes it.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use clap::Parser;
use kvxfer_cli::doctor::{Args, Finding, Gpu, Host, Link, LinkKind, Report, State, Survey, Ucx};
use kvxfer_cuda::driver::CudaError;

/// A folder of the test's own, with a name short enough for sockets in it.
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("kvx-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub(crate) struct Fake {
    pub(crate) folder: Folder,
    pub(crate) host: Host,
}

impl Fake {
    /// A container with two GPUs and a network card.
    pub(crate) fn new() -> Self {
        let folder = Folder::new();
        let sockets = folder.0.join("sockets");
        fs::create_dir(&sockets).unwrap();
        fs::set_permissions(&sockets, fs::Permissions::from_mode(0o700)).unwrap();
        let host = Host {
            root: folder.0.join("root"),
            env: [("CUDA_VISIBLE_DEVICES".to_owned(), "0,1".to_owned())].into(),
            socket_dir: sockets,
            buffer_size: 1 << 30,
            pool: Ok(()),
            gpus: Some(Ok(survey(LinkKind::NvLink))),
            ucx: Some(Ok(Ucx {
                version: "1.22.0".into(),
                path: "/usr/lib64/libucp.so.0.0.0".into(),
                source: "system".into(),
                cuda: Ok(true),
            })),
        };
        let fake = Self { folder, host };
        // What is temporary is on a volume.
        let volume = fake.folder.0.parent().unwrap().display();
        fake.put(
            "proc/self/mountinfo",
            &format!("{LAYERS}\n3 1 8:1 / {volume} rw - ext4 /dev/sda1 rw\n"),
        );
        for (path, text) in [
            ("proc/sys/kernel/osrelease", "6.8.0-45-generic\n"),
            ("proc/sys/kernel/random/boot_id", "00112233-4455-6677-8899-aabbccddeeff\n"),
            (
                "proc/meminfo",
                "MemAvailable: 67108864 kB\nHugePages_Total: 8\nHugepagesize: 2048 kB\n",
            ),
            ("proc/self/cgroup", "0::/\n"),
            ("proc/self/limits", LIMITS),
            ("proc/self/status", "Name:\tkvxfer\nCapEff:\t0000000000004000\n"),
            (
                "proc/driver/nvidia/version",
                "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n",
            ),
            ("proc/driver/nvidia/gpus/0000:01:00.0/information", ""),
            ("proc/driver/nvidia/gpus/0000:02:00.0/information", ""),
            ("dev/nvidia0", ""),
            ("dev/nvidia1", ""),
            ("dev/nvidiactl", ""),
            ("sys/fs/cgroup/memory.max", "34359738368\n"),
            ("sys/fs/cgroup/memory.current", "1073741824\n"),
            (
                "sys/kernel/mm/transparent_hugepage/shmem_enabled",
                "always within_size [advise] never deny force\n",
            ),
            ("sys/class/infiniband/mlx5_0/ports/1/state", "4: ACTIVE\n"),
            ("sys/class/infiniband/mlx5_0/ports/1/link_layer", "InfiniBand\n"),
            ("sys/class/infiniband/mlx5_0/ports/1/rate", "400 Gb/sec (4X NDR)\n"),
            ("sys/class/infiniband_verbs/uverbs0/ibdev", "mlx5_0\n"),
            ("sys/class/infiniband_verbs/abi_version", "6\n"),
            ("dev/infiniband/uverbs0", ""),
            ("sys/module/nvidia_peermem/refcnt", "0\n"),
            ("sys/class/net/eth0/flags", "0x1003\n"),
            ("sys/class/net/eth0/operstate", "up\n"),
            ("sys/class/net/eth0/mtu", "9000\n"),
            ("sys/class/net/lo/flags", "0x9\n"),
            ("sys/class/net/lo/operstate", "unknown\n"),
            ("sys/class/net/lo/mtu", "65536\n"),
            ("usr/lib64/ucx/libuct_cuda.so", ""),
            ("usr/lib64/ucx/libuct_ib.so", ""),
        ] {
            fake.put(path, text);
        }
        for (kind, inode) in [
            ("pid", 4_026_532_001_u64),
            ("ipc", 4_026_532_002),
            ("user", 4_026_531_837),
            ("net", 4_026_532_003),
        ] {
            fake.link(&format!("proc/self/ns/{kind}"), &format!("{kind}:[{inode}]"));
        }
        fake
    }

    pub(crate) fn put(&self, path: &str, text: &str) {
        let path = self.host.root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    pub(crate) fn link(&self, path: &str, target: &str) {
        let path = self.host.root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let _ = fs::remove_file(&path);
        symlink(target, path).unwrap();
    }

    /// Removes a file, or a folder with all in it.
    pub(crate) fn drop(&self, path: &str) {
        let path = self.host.root.join(path);
        let gone = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        gone.unwrap();
    }

    /// Files of `path` with `from` replaced.
    pub(crate) fn edit(&self, path: &str, from: &str, to: &str) {
        let text = fs::read_to_string(self.host.root.join(path)).unwrap();
        assert!(text.contains(from), "{text}");
        self.put(path, &text.replace(from, to));
    }

    pub(crate) fn report(&self, line: &[&str]) -> Report {
        Report::of(&self.host, &args(line))
    }

    /// The one finding of that name.
    pub(crate) fn finding(&self, name: &str) -> Finding {
        let report = self.report(&[]);
        let mut named = report.findings.iter().filter(|finding| finding.name == name);
        let finding = named.next().unwrap_or_else(|| panic!("no {name:?} in {report:#?}"));
        assert_eq!(named.next(), None);
        finding.clone()
    }

    /// Checks a finding: how it stands, and parts of what it says and advises.
    #[track_caller]
    pub(crate) fn finds(&self, name: &str, state: State, detail: &str, fix: &str) {
        let finding = self.finding(name);
        assert_eq!(finding.state, state, "{finding:?}");
        assert!(finding.detail.contains(detail), "{finding:?}");
        match fix {
            "" => assert_eq!(finding.fix, None, "{finding:?}"),
            fix => assert!(finding.fix.as_ref().is_some_and(|f| f.contains(fix)), "{finding:?}"),
        }
    }
}

/// The arguments of a command line.
pub(crate) fn args(line: &[&str]) -> Args {
    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }
    Line::try_parse_from([&["doctor"], line].concat()).unwrap().args
}

/// The error of a machine without a driver.
pub(crate) fn no_library() -> CudaError {
    CudaError::NoLibrary { why: "libcuda.so.1 can't be opened" }
}

/// Two GPUs, joined like that.
pub(crate) fn survey(kind: LinkKind) -> Survey {
    let gpu = |ordinal: u32| Gpu {
        ordinal,
        id: [ordinal as u8; 16],
        uuid: format!("GPU-00000000-0000-0000-0000-00000000000{ordinal}"),
        name: "NVIDIA H200".into(),
        compute_capability: "9.0".into(),
        memory: 140 << 30,
        mig: false,
        mps: false,
        virtual_memory: true,
        posix_fd: true,
        fabric: false,
        rdma: true,
        dma_buf: true,
        links: (0..2)
            .map(|to| {
                let kind = if to == ordinal { LinkKind::Same } else { kind };
                let none = kind == LinkKind::None;
                Link {
                    to,
                    kind,
                    rank: matches!(kind, LinkKind::NvLink | LinkKind::Pcie).then_some(0),
                    why: none.then_some("the driver allows no peer access between the two"),
                    fix: none.then_some("choose other GPUs"),
                }
            })
            .collect(),
    };
    Survey { driver: 12080, gpus: vec![gpu(0), gpu(1)] }
}

const LIMITS: &str = "\
Limit                     Soft Limit           Hard Limit           Units
Max open files            1048576              1048576              files
Max locked memory         unlimited            unlimited            bytes
";

const LAYERS: &str = "1 0 0:50 / / rw,relatime master:1 - overlay overlay rw";

/// Whether these tests run as root, whom no mode of a folder keeps out.
pub(crate) fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0)
}

pub(crate) fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}
