//! The CUDA driver, the GPUs that it shows, and how they reach each other.

use kvxfer_core::Error;
use kvxfer_core::path::PathName;
use kvxfer_cuda::driver::{self, Attribute, CudaError, PeerLink, Visible};
use kvxfer_cuda::memory::Bytes;
use serde::Serialize;

use super::finding::{Area, Finding};
use super::host::Host;

const NEEDED_BY: &[PathName] = &[PathName::CudaIpc];

/// What the driver says.
#[derive(Clone, Debug)]
pub struct Survey {
    /// The CUDA version it is made for: 12080 is 12.8.
    pub driver: i32,
    /// In the order in which this process counts.
    pub gpus: Vec<Gpu>,
}

/// A GPU that this process sees.
#[derive(Clone, Debug, Serialize)]
pub struct Gpu {
    /// Its number in this process.
    pub ordinal: u32,
    /// Its name in all processes.
    pub uuid: String,
    /// The same as peers say it.
    #[serde(skip)]
    pub id: [u8; 16],
    /// The product.
    pub name: String,
    /// "9.0" for Hopper.
    pub compute_capability: String,
    /// Bytes it has in all.
    pub memory: u64,
    /// Whether it is a slice of one.
    pub mig: bool,
    /// Whether an MPS server works for this process.
    pub mps: bool,
    /// Whether it has virtual memory management.
    pub virtual_memory: bool,
    /// Whether its memory can be handed over as a file descriptor.
    pub posix_fd: bool,
    /// Whether its memory can be handed to other hosts of one NVLink fabric.
    pub fabric: bool,
    /// Whether network cards can reach its memory by themselves.
    pub rdma: bool,
    /// Whether they can without the module nvidia-peermem.
    pub dma_buf: bool,
    /// How it reaches each GPU, itself included.
    pub links: Vec<Link>,
}

/// How a GPU reaches one of the GPUs.
#[derive(Clone, Debug, Serialize)]
pub struct Link {
    /// That one's number.
    pub to: u32,
    /// By what.
    pub kind: LinkKind,
    /// The driver's rank of it: the lower, the faster.
    pub rank: Option<i32>,
    /// If by nothing: why.
    pub why: Option<&'static str>,
    /// If by nothing: what to do.
    pub fix: Option<&'static str>,
}

/// What joins two GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LinkKind {
    /// They are one.
    Same,
    /// NVLink.
    NvLink,
    /// PCIe, peer to peer.
    Pcie,
    /// Nothing.
    None,
}

impl Survey {
    /// Asks the driver of this machine. No context is made, so no GPU memory is used.
    ///
    /// # Errors
    /// The driver's.
    pub fn here() -> driver::Result<Self> {
        let visible = Visible::all(&driver::cuda()?)?;
        let driver = visible.first().ok_or(CudaError::NoDevice)?.driver_version()?;
        let gpus = visible.iter().map(|gpu| Gpu::ask(gpu, &visible)).collect::<Result<_, _>>()?;
        Ok(Self { driver, gpus })
    }
}

impl Gpu {
    fn ask(gpu: &Visible, all: &[Visible]) -> driver::Result<Self> {
        let (major, minor) = gpu.compute_capability()?;
        let link = |other: &Visible| {
            let link = gpu.link_to(other.uuid())?;
            let (kind, why, fix) = match link {
                PeerLink::Same => (LinkKind::Same, None, None),
                PeerLink::NvLink => (LinkKind::NvLink, None, None),
                PeerLink::Pcie => (LinkKind::Pcie, None, None),
                PeerLink::None { why, fix } => (LinkKind::None, Some(why), Some(fix)),
            };
            let ranked = matches!(kind, LinkKind::NvLink | LinkKind::Pcie);
            let rank = ranked.then(|| gpu.rank_to(other).ok()).flatten();
            Ok(Link { to: other.ordinal(), kind, rank, why, fix })
        };
        Ok(Self {
            ordinal: gpu.ordinal(),
            uuid: gpu.uuid().to_string(),
            id: gpu.uuid().0,
            name: gpu.name().to_owned(),
            compute_capability: format!("{major}.{minor}"),
            memory: gpu.total_memory()?,
            mig: gpu.is_mig(),
            mps: gpu.under_mps(),
            virtual_memory: gpu.supports(Attribute::VirtualMemory),
            posix_fd: gpu.supports_posix_fd(),
            fabric: gpu.supports_fabric(),
            rdma: gpu.supports(Attribute::Rdma),
            dma_buf: gpu.supports(Attribute::DmaBuf),
            links: all.iter().map(link).collect::<driver::Result<_>>()?,
        })
    }

    /// Whether its memory can be handed to another process in the way that we do it.
    pub(super) fn shares(&self) -> bool {
        self.virtual_memory && self.posix_fd && !self.mig
    }
}

pub(super) fn check(host: &Host) -> Vec<Finding> {
    let survey = match &host.gpus {
        None => return Vec::new(),
        Some(Err(error)) => return vec![no_driver(host, error)],
        Some(Ok(survey)) => survey,
    };
    let mut found = vec![driver(host, survey)];
    found.extend(survey.gpus.iter().map(|gpu| device(gpu, survey)));
    found.push(visibility(host, survey));
    found.extend(links(survey));
    found
}

fn no_driver(host: &Host, error: &CudaError) -> Finding {
    let nvidia = host.has("/proc/driver/nvidia") || host.has("/dev/nvidiactl");
    let missing = matches!(error, CudaError::NoLibrary { .. } | CudaError::NoDevice);
    let mut finding = Finding::failed(Area::Gpu, "driver", &Error::from(error.clone()));
    if missing && !nvidia {
        // A machine without GPUs is not a broken one.
        finding.state = super::finding::State::Absent;
    }
    finding.needed_by(NEEDED_BY)
}

fn driver(host: &Host, survey: &Survey) -> Finding {
    let cuda = format!("for CUDA {}.{}", survey.driver / 1000, survey.driver % 1000 / 10);
    // "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build …"
    let module = host.read("/proc/driver/nvidia/version").and_then(|text| {
        let line = text.lines().next()?.to_owned();
        let open = if line.contains("Open Kernel Module") { " (open)" } else { "" };
        let starts = |word: &&str| word.starts_with(|c: char| c.is_ascii_digit());
        let version = line.split_whitespace().find(|word| starts(word) && word.contains('.'))?;
        Some(format!(", kernel module {version}{open}"))
    });
    Finding::ok(Area::Gpu, "driver", cuda + &module.unwrap_or_default())
}

fn device(gpu: &Gpu, survey: &Survey) -> Finding {
    let name = format!("GPU {}", gpu.ordinal);
    let mut detail = format!(
        "{}, {}, {}, compute capability {}",
        gpu.name,
        gpu.uuid,
        Bytes(gpu.memory),
        gpu.compute_capability
    );
    let notes = [
        (gpu.rdma, "GPUDirect RDMA"),
        (gpu.dma_buf, "dma-buf"),
        (gpu.fabric, "fabric handles"),
        (gpu.mps, "under MPS"),
    ];
    for (_, note) in notes.iter().filter(|(has, _)| *has) {
        detail += &format!(", {note}");
    }
    let (why, fix) = if gpu.mig {
        (
            "is a MIG slice, which shares no memory with other processes",
            "give kvxfer whole GPUs, or keep KV in host memory",
        )
    } else if !gpu.shares() {
        (
            "can't hand out memory as file descriptors",
            "use an NVIDIA driver and a GPU with virtual memory management (Volta or newer, not under vGPU)",
        )
    } else {
        return Finding::ok(Area::Gpu, &name, detail);
    };
    let detail = format!("{detail}: it {why}");
    // It takes one that can.
    match survey.gpus.iter().any(Gpu::shares) {
        true => Finding::warn(Area::Gpu, &name, detail),
        false => Finding::refused(Area::Gpu, &name, detail).needed_by(NEEDED_BY),
    }
    .fix(fix)
}

/// Whether GPUs are hidden from this process: memory of those can't be imported.
fn visibility(host: &Host, survey: &Survey) -> Finding {
    let (name, seen) = ("visible", survey.gpus.len());
    let choice = host
        .env("CUDA_VISIBLE_DEVICES")
        .map(|choice| format!(" (CUDA_VISIBLE_DEVICES={choice})"))
        .unwrap_or_default();
    let there = host.names("/proc/driver/nvidia/gpus").len();
    let number =
        |name: &String| name.strip_prefix("nvidia").is_some_and(|n| n.parse::<u32>().is_ok());
    let nodes = host.names("/dev").iter().filter(|name| number(name)).count();
    if nodes < there {
        let detail = format!(
            "{nodes} of this host's {there} GPUs are in this container: memory of the others can't be imported"
        );
        return Finding::warn(Area::Gpu, name, detail).fix(
            "give both containers all GPUs of the host (--gpus all), and choose with CUDA_VISIBLE_DEVICES",
        );
    }
    let of = if there > seen { format!(" of {there}") } else { String::new() };
    Finding::ok(Area::Gpu, name, format!("{seen}{of}{choice}"))
}

fn links(survey: &Survey) -> Option<Finding> {
    let all = || survey.gpus.iter().flat_map(|gpu| gpu.links.iter().map(move |link| (gpu, link)));
    let count = |kind| all().filter(|(_, link)| link.kind == kind).count();
    let (nvlink, pcie, none) =
        (count(LinkKind::NvLink), count(LinkKind::Pcie), count(LinkKind::None));
    if nvlink + pcie + none == 0 {
        return None;
    }
    let detail = format!("{nvlink} NVLink, {pcie} PCIe, {none} closed, each direction counted");
    let closed = all().find(|(_, link)| link.kind == LinkKind::None);
    Some(match closed {
        Some((from, link)) => {
            let why = link.why.unwrap_or("unknown");
            let detail = format!("{detail}, as from {} to {}: {why}", from.ordinal, link.to);
            let finding = Finding::warn(Area::Gpu, "links", detail);
            Finding { fix: link.fix.map(str::to_owned), ..finding }
        }
        None => Finding::ok(Area::Gpu, "links", detail),
    })
}
