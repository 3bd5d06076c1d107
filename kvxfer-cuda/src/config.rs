//! What an agent is told about itself.

use std::path::PathBuf;
use std::time::Duration;

use kvxfer_core::gc::{AfterRetrieve, GcConfig};
use kvxfer_core::layout::KvLayout;
use kvxfer_core::path::{PathName, candidates};
use kvxfer_core::{Error, ErrorKind, Result};

use crate::control::Address;
use crate::driver::Sharing;

/// The most data connections from one producer.
pub(crate) const MAX_STREAMS: u32 = 16;

/// What an agent may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Pushes what its engine computed.
    Producer,
    /// Grants memory, and loads what arrives into its engine.
    Consumer,
    /// Both.
    Both,
}

impl Role {
    /// Whether it pushes.
    pub fn produces(self) -> bool {
        self != Self::Consumer
    }

    /// Whether it takes.
    pub fn consumes(self) -> bool {
        self != Self::Producer
    }
}

/// Where an engine keeps its KV, and a consumer its pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Memory {
    /// In the host's memory.
    #[default]
    Host,
    /// On the GPU of that ordinal, as this process counts.
    Device(u32),
}

/// An agent's configuration.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// What it may do.
    pub role: Role,
    /// For people: "decode-0 rank 1".
    pub name: String,
    /// Geometry of the engine's KV.
    pub layout: KvLayout,
    /// Consumer: the address producers dial.
    pub listen: Option<Address>,
    /// Producer: the consumers.
    pub peers: Vec<Address>,
    /// Folder for Unix sockets; both sides of a host share it. Created with mode 0700.
    pub socket_dir: PathBuf,
    /// Where the KV is, on both sides of a link the same.
    pub memory: Memory,
    /// Consumer: how a pool on a GPU is shared with producers; they follow. File descriptors, unless producers are on
    /// other hosts of one NVLink domain (fabric: MNNVL, IMEX), or the driver or the container can't export memory as
    /// descriptors (legacy). With legacy, memory that had to be replaced under a producer that lives stays allocated
    /// until its process ends.
    pub sharing: Sharing,
    /// Consumer: bytes of the pool.
    pub buffer_size: u64,
    /// Consumer: into how many segments the pool is cut. One producer writes to a segment at a time.
    pub segments: u32,
    /// Consumer: what to give up, and when.
    pub gc: GcConfig,
    /// Consumer: how long leave to write lasts unless renewed.
    pub grant_ttl: Duration,
    /// Consumer: how long it can last with renewals.
    pub grant_cap: Duration,
    /// Consumer: how long a writer may take to show that it stopped.
    pub fence_timeout: Duration,
    /// Consumer: how long producers have to say whether they offered all they have.
    pub ask_timeout: Duration,
    /// Consumer: most bytes granted to one producer and not yet committed.
    pub window: u64,
    /// Producer: how long the engine's blocks are held for a consumer that has no room.
    pub hold: Duration,
    /// A peer that is silent for so long is gone. The same on all agents.
    pub silence: Duration,
    /// Producer: a consumer that it cannot be used with (another model, say) is dialled again after half to all of
    /// that time.
    pub refused_backoff: Duration,
    /// Also talk over TCP, where nothing proves who the peer is.
    pub allow_insecure: bool,
    /// The path a link must have; a link on any other is refused.
    pub require_path: Option<PathName>,
    /// Whether a link whose path failed twice may take the next best one. It is said when it does.
    pub failover: bool,
    /// Consumer: the port for `tcp` data connections; 0 for any free one.
    pub data_port: u16,
    /// Consumer: how many of them a producer opens.
    pub tcp_streams: u32,
    /// What UCX is taken from: a file called libucp.so.0, or a folder with one. `None`: what the process has loaded,
    /// then the system's, then `ucx_wheel`.
    pub ucx_library: Option<PathBuf>,
    /// Where the Python wheel's UCX is, if it is installed.
    pub ucx_wheel: Option<PathBuf>,
    /// Also take the `ucx` path where UCX has no RDMA. Its bytes go where the sender says then, so each peer has to be
    /// trusted with this process's memory.
    pub trust_ucx_peers: bool,
    /// The network devices that UCX may use, as `UCX_NET_DEVICES` has them. `None`: as UCX thinks.
    pub ucx_devices: Option<String>,
    /// Deliberate faults, for tests.
    #[cfg(feature = "faults")]
    pub fault: Option<Fault>,
    /// The host that it says it is on, for tests.
    #[cfg(feature = "faults")]
    pub boot_id: Option<[u8; 16]>,
}

/// A deliberate fault.
#[cfg(feature = "faults")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Consumer: flip one byte of each chunk after its commit.
    FlipAfterCommit,
    /// Producer: never send a commit.
    HoldCommit,
    /// Producer: writes end well and nothing arrives.
    DropWrites,
}

impl AgentConfig {
    /// A configuration with the defaults of the documentation.
    pub fn new(role: Role, layout: KvLayout) -> Self {
        Self {
            role,
            name: String::new(),
            layout,
            listen: None,
            peers: Vec::new(),
            socket_dir: default_socket_dir(),
            memory: Memory::Host,
            sharing: Sharing::default(),
            buffer_size: 1 << 30,
            segments: 8,
            gc: GcConfig {
                enabled: true,
                after_retrieve: AfterRetrieve::Drop,
                high_watermark: 0.9,
                low_watermark: 0.7,
                unclaimed_ttl: Duration::from_secs(60),
                overdue_after: Duration::from_secs(10),
                batch: 256,
            },
            grant_ttl: Duration::from_secs(10),
            grant_cap: Duration::from_secs(120),
            fence_timeout: Duration::from_secs(5),
            ask_timeout: Duration::from_millis(250),
            window: 256 << 20,
            hold: Duration::from_secs(30),
            silence: Duration::from_secs(10),
            refused_backoff: Duration::from_secs(60),
            allow_insecure: false,
            require_path: None,
            failover: false,
            data_port: 0,
            tcp_streams: 2,
            ucx_library: None,
            ucx_wheel: None,
            trust_ucx_peers: false,
            ucx_devices: None,
            #[cfg(feature = "faults")]
            fault: None,
            #[cfg(feature = "faults")]
            boot_id: None,
        }
    }

    /// Checks what can be checked without touching anything.
    ///
    /// # Errors
    /// `Config`, naming the field and the fix.
    pub fn validate(&self) -> Result<()> {
        self.layout.validate()?;
        let config = |about: String| ErrorKind::Config.error(about);
        if self.role.produces() && self.peers.is_empty() {
            return Err(config("a producer has no peers".into())
                .fix("set peers to the addresses of the consumers"));
        }
        if self.role.consumes() {
            if self.segments == 0 {
                return Err(config("segments is 0".into()).fix("set it to at least 1"));
            }
            if self.segment_pages() == 0 {
                return Err(self.segments_too_small());
            }
        }
        if self.memory == Memory::Host && self.sharing != Sharing::default() {
            return Err(config(format!(
                "sharing is {}, which is for KV in GPU memory, and this is in host memory",
                self.sharing
            ))
            .fix("unset sharing, or set kv_buffer_device to where the KV is"));
        }
        if self.tcp_streams == 0 || self.tcp_streams > MAX_STREAMS {
            return Err(config(format!("tcp_streams is {}", self.tcp_streams))
                .fix(format!("set it to 1 to {MAX_STREAMS}")));
        }
        let paths = candidates(self.memory != Memory::Host);
        match self.require_path {
            Some(path) if !paths.contains(&path) => Err(config(format!(
                "require_path names {path}, which is no path of KV in {} memory",
                if self.memory == Memory::Host { "host" } else { "GPU" }
            ))
            .fix(format!(
                "use {}, or set kv_buffer_device to where the KV is",
                paths.iter().map(|path| path.as_str()).collect::<Vec<_>>().join(" or ")
            ))),
            _ => Ok(()),
        }
    }

    fn segments_too_small(&self) -> Error {
        let (bytes, page) = (self.buffer_size, self.layout.page_bytes());
        let segments = u64::from(self.segments);
        let about = format!(
            "buffer_size is {bytes} bytes in segments = {segments} equal parts, each written to by one producer at a \
             time: {} bytes a part, and each must hold a page, which takes {page} in this model",
            bytes / segments
        );
        let fewer = match bytes / page {
            0 => format!("segments to 1 and buffer_size to at least {page}"),
            most => format!("segments to at most {most}"),
        };
        let least = page * segments;
        ErrorKind::Config
            .error(about)
            .fix(format!("set buffer_size to at least {least}, or {fewer}"))
    }

    /// Pages in one segment.
    pub fn segment_pages(&self) -> u32 {
        let pages = self.buffer_size / u64::from(self.segments.max(1)) / self.layout.page_bytes();
        u32::try_from(pages).unwrap_or(u32::MAX)
    }
}

/// `$XDG_RUNTIME_DIR/kvxfer`, else `/tmp/kvxfer-UID`.
pub fn default_socket_dir() -> PathBuf {
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(dir) if !dir.is_empty() => PathBuf::from(dir).join("kvxfer"),
        _ => {
            let uid = rustix::process::getuid().as_raw();
            std::env::temp_dir().join(format!("kvxfer-{uid}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_way_to_share_gpu_memory_is_for_gpu_memory() {
        let group = kvxfer_core::layout::Group { block_tokens: 16, block_bytes: vec![1 << 10] };
        let layout = KvLayout::one_group("m", "bytes", 256, group);
        let mut config = AgentConfig::new(Role::Consumer, layout);
        for sharing in [Sharing::Fabric, Sharing::Legacy] {
            config.sharing = sharing;
            config.memory = Memory::Device(0);
            config.validate().unwrap();
            config.memory = Memory::Host;
            let error = config.validate().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(error.to_string().contains("unset sharing"), "{error}");
        }
    }

    #[test]
    fn a_pool_whose_segments_hold_no_page_names_both_keys_and_what_would_do() {
        let group = kvxfer_core::layout::Group { block_tokens: 16, block_bytes: vec![1 << 20] };
        let layout = KvLayout::one_group("m", "bytes", 256, group);
        let config = AgentConfig::new(Role::Consumer, layout);
        for (mib, fix, fixed_mib, fixed_segments) in [
            (1, "set buffer_size to at least 8388608, or segments to at most 1", 1, 1),
            (7, "set buffer_size to at least 8388608, or segments to at most 7", 7, 7),
            (0, "8388608, or segments to 1 and buffer_size to at least 1048576", 1, 1),
        ] {
            let config = AgentConfig { buffer_size: mib << 20, ..config.clone() };
            let error = config.validate().unwrap_err().to_string();
            assert!(error.contains("segments = 8") && error.contains(fix), "{error}");
            for (mib, segments) in [(8, 8), (fixed_mib, fixed_segments)] {
                let fixed = AgentConfig { buffer_size: mib << 20, segments, ..config.clone() };
                fixed.validate().unwrap();
            }
        }
    }
}
