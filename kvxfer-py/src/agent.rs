//! The worker half's agent.

use std::path::PathBuf;
use std::time::Duration;

use kvxfer_core::gc::{AfterRetrieve, GcConfig};
use kvxfer_core::session::{LoadRequest, PushRange};
use kvxfer_core::{ClaimId, ErrorKind, LoadId, OfferId, Result};
use kvxfer_cuda::driver::{EngineStream, Sharing};
use kvxfer_cuda::{Agent as CoreAgent, AgentConfig, KvLayer, Memory, Role, default_socket_dir};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::errors::raise;
use crate::keys::{Layout, words};

#[pyclass(frozen, module = "kvxfer._kvxfer")]
pub(crate) struct Loaded {
    #[pyo3(get)]
    load: u64,
    #[pyo3(get)]
    error: Option<String>,
    #[pyo3(get)]
    bytes: u64,
    #[pyo3(get)]
    tokens: u64,
    #[pyo3(get)]
    seconds: f64,
    #[pyo3(get)]
    path: String,
}

#[pyclass(frozen, module = "kvxfer._kvxfer")]
pub(crate) struct Path {
    #[pyo3(get)]
    peer: String,
    #[pyo3(get)]
    to_peer: bool,
    #[pyo3(get)]
    name: &'static str,
    #[pyo3(get)]
    lanes: Option<String>,
    #[pyo3(get)]
    refused: Vec<(String, String)>,
    #[pyo3(get)]
    gbps: Option<f64>,
}

impl From<kvxfer_cuda::Path> for Path {
    fn from(path: kvxfer_cuda::Path) -> Self {
        Self {
            peer: path.peer_name,
            to_peer: path.to_peer,
            name: path.name.as_str(),
            lanes: path.lanes,
            refused: path.refused.into_iter().map(|refusal| (refusal.path, refusal.why)).collect(),
            gbps: path.gbps,
        }
    }
}

#[pyclass(frozen, module = "kvxfer._kvxfer")]
pub(crate) struct Agent(CoreAgent);

#[pymethods]
impl Agent {
    #[new]
    #[pyo3(signature = (*, role, layout, name=String::new(), listen=None, peers=Vec::new(), socket_dir=None,
        buffer_size=1 << 30, segments=8, gc=true, gc_policy="drop", high_watermark=0.9, low_watermark=0.7,
        unclaimed_ttl=60.0, load_timeout=30.0, hold_timeout=30.0, lease=10.0, allow_insecure=false,
        require_path=None, failover=false, data_port=0, tcp_streams=2, ucx_library=None, ucx_wheel=None,
        ucx_devices=None, trust_ucx_peers=false, memory="host", sharing="posix_fd"))]
    #[expect(clippy::too_many_arguments, reason = "keywords, each a documented setting")]
    fn new(
        py: Python<'_>,
        role: &str,
        layout: &Layout,
        name: String,
        listen: Option<&str>,
        peers: Vec<String>,
        socket_dir: Option<String>,
        buffer_size: u64,
        segments: u32,
        gc: bool,
        gc_policy: &str,
        high_watermark: f32,
        low_watermark: f32,
        unclaimed_ttl: f64,
        load_timeout: f64,
        hold_timeout: f64,
        lease: f64,
        allow_insecure: bool,
        require_path: Option<String>,
        failover: bool,
        data_port: u16,
        tcp_streams: u32,
        ucx_library: Option<PathBuf>,
        ucx_wheel: Option<PathBuf>,
        ucx_devices: Option<String>,
        trust_ucx_peers: bool,
        memory: &str,
        sharing: &str,
    ) -> PyResult<Self> {
        let role = match role {
            "producer" => Role::Producer,
            "consumer" => Role::Consumer,
            "both" => Role::Both,
            other => return Err(bad("role", other, "producer, consumer or both")),
        };
        let after_retrieve = match gc_policy {
            "drop" => AfterRetrieve::Drop,
            "keep" => AfterRetrieve::Keep,
            other => return Err(bad("gc_policy", other, "drop or keep")),
        };
        let memory = match (memory, memory.strip_prefix("cuda:").map(str::parse)) {
            ("host", _) => Memory::Host,
            (_, Some(Ok(ordinal))) => Memory::Device(ordinal),
            _ => return Err(bad("memory", memory, "host or cuda:N")),
        };
        let sharing = match sharing {
            "posix_fd" => Sharing::PosixFd,
            "fabric" => Sharing::Fabric,
            "legacy" => Sharing::Legacy,
            other => return Err(bad("sharing", other, "posix_fd, fabric or legacy")),
        };
        let defaults = AgentConfig::new(role, layout.0.clone());
        let lease = seconds("lease", lease)?;
        let config = AgentConfig {
            name,
            memory,
            sharing,
            listen: listen.map(str::parse).transpose().map_err(raise)?,
            peers: peers.iter().map(|peer| peer.parse()).collect::<Result<_>>().map_err(raise)?,
            socket_dir: socket_dir.map_or_else(default_socket_dir, Into::into),
            buffer_size,
            segments,
            gc: GcConfig {
                enabled: gc,
                after_retrieve,
                high_watermark,
                low_watermark,
                unclaimed_ttl: seconds("unclaimed_ttl", unclaimed_ttl)?,
                ..defaults.gc
            },
            grant_ttl: lease,
            // A step of a long prompt takes as long as it takes; who waits has a deadline of its own.
            grant_cap: defaults.grant_cap.max(seconds("load_timeout", load_timeout)?).max(lease),
            hold: seconds("hold_timeout", hold_timeout)?,
            silence: lease,
            allow_insecure,
            require_path: require_path.as_deref().map(str::parse).transpose().map_err(raise)?,
            failover,
            data_port,
            tcp_streams,
            ucx_library,
            ucx_wheel,
            ucx_devices,
            trust_ucx_peers,
            #[cfg(feature = "faults")]
            fault: fault()?,
            ..defaults
        };
        py.detach(|| CoreAgent::start(config)).map(Self).map_err(raise)
    }

    #[getter]
    fn address(&self) -> PyResult<String> {
        let none = || raise(ErrorKind::Config.error("this agent has no Unix socket"));
        self.0.observer_address().map(ToString::to_string).ok_or_else(none)
    }

    #[getter]
    fn addresses(&self) -> Vec<String> {
        self.0.addresses().iter().map(ToString::to_string).collect()
    }

    fn register(&self, py: Python<'_>, layers: Vec<(usize, u32, u64)>) -> PyResult<()> {
        let layers = layers
            .into_iter()
            .map(|(address, blocks, stride)| KvLayer { address, blocks, stride })
            .collect();
        // SAFETY: Python's promise, which the stub's documentation states: the caller keeps the tensors alive
        // until `close` has returned, and gives a load's blocks to nobody else.
        py.detach(|| unsafe { self.0.register(layers) }).map_err(raise)
    }

    fn begin_step(&self, py: Python<'_>, ranges: Vec<(u64, u32, Vec<Vec<u8>>)>) -> PyResult<()> {
        let ranges = ranges
            .into_iter()
            .map(|(offer, first_chunk, tables)| {
                let tables: Vec<_> =
                    tables.iter().map(|ids| words(ids)).collect::<PyResult<_>>()?;
                PushRange::new(self.0.layout(), OfferId(offer), first_chunk, &tables).map_err(raise)
            })
            .collect::<PyResult<Vec<_>>>()?;
        py.detach(|| self.0.begin_step(ranges)).map_err(raise)
    }

    #[pyo3(signature = (layer, stream=None))]
    fn layer_ready(&self, py: Python<'_>, layer: u32, stream: Option<u64>) -> PyResult<()> {
        py.detach(|| match self.stream(stream)? {
            None => self.0.layer_ready(layer),
            Some(stream) => self.0.layer_ready_on(layer, &stream),
        })
        .map_err(raise)
    }

    #[pyo3(signature = (stream=None))]
    fn end_step(&self, py: Python<'_>, stream: Option<u64>) -> PyResult<()> {
        py.detach(|| match self.stream(stream)? {
            None => self.0.end_step(),
            Some(stream) => self.0.end_step_on(&stream),
        })
        .map_err(raise)
    }

    fn reads_done(&self, py: Python<'_>, stream: u64) -> PyResult<()> {
        py.detach(|| self.0.reads_done_on(&self.engine_stream(stream)?)).map_err(raise)
    }

    #[pyo3(signature = (load, claim, first_chunk, chunks, blocks, stream=None))]
    #[expect(clippy::too_many_arguments, reason = "what a load is, as plain values")]
    fn load(
        &self,
        py: Python<'_>,
        load: u64,
        claim: u64,
        first_chunk: u32,
        chunks: u32,
        blocks: Vec<Vec<u8>>,
        stream: Option<u64>,
    ) -> PyResult<()> {
        let blocks = blocks.iter().map(|ids| words(ids)).collect::<PyResult<_>>()?;
        let request =
            LoadRequest { load: LoadId(load), claim: ClaimId(claim), first_chunk, chunks };
        py.detach(|| match self.stream(stream)? {
            None => self.0.load(request, blocks),
            Some(stream) => self.0.load_on(request, blocks, &stream),
        })
        .map_err(raise)
    }

    fn poll(&self, py: Python<'_>) -> Vec<Loaded> {
        let mut loaded = Vec::new();
        py.detach(|| self.0.poll(&mut loaded));
        loaded
            .into_iter()
            .map(|one| Loaded {
                load: one.load.0,
                error: one.result.err().map(|error| error.to_string()),
                bytes: one.bytes,
                tokens: one.tokens,
                seconds: one.seconds,
                path: one.path,
            })
            .collect()
    }

    fn wait(&self, py: Python<'_>, seconds: f64) -> bool {
        let patience = Duration::try_from_secs_f64(seconds).unwrap_or_default();
        py.detach(|| self.0.wait(patience))
    }

    fn wait_connected(&self, py: Python<'_>, seconds: f64) -> bool {
        let patience = Duration::try_from_secs_f64(seconds).unwrap_or_default();
        py.detach(|| self.0.wait_connected(patience))
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = py.detach(|| self.0.stats()).map_err(raise)?;
        let dict = PyDict::new(py);
        let (consumer, producer, pool) = (stats.consumer, stats.producer, stats.pool);
        for (name, value) in [
            ("offered_chunks", consumer.offered),
            ("granted_chunks", consumer.granted),
            ("committed_chunks", consumer.committed),
            ("late_commits", consumer.late_commits),
            ("had_chunks", consumer.had),
            ("revoked_grants", consumer.revoked),
            ("refused_chunks", consumer.refused),
            ("claims", consumer.claims),
            ("loads", consumer.loads),
            ("failed_loads", consumer.failed_loads),
            ("corrupt_chunks", consumer.corrupt),
            ("overdue_chunks", consumer.overdue),
            ("replaced_segments", consumer.replaced_segments),
            ("pushed_chunks", producer.committed),
            ("late_chunks", producer.late),
            ("known_chunks", producer.had),
            ("skipped_chunks", producer.skipped),
            ("failed_posts", producer.failed_posts),
            ("open_offers", stats.open_offers),
            ("pushed_bytes", stats.pushed_bytes),
            ("posts", stats.posts),
            ("runs", stats.runs),
            ("loaded_bytes", stats.loaded_bytes),
            ("links", stats.links),
            ("pages", pool.pages.into()),
            ("pages_free", pool.free.into()),
            ("pages_granted", pool.granted.into()),
            ("pages_committed", pool.committed.into()),
            ("pages_condemned", pool.condemned.into()),
            ("pages_quarantined", pool.quarantined.into()),
            ("pages_leaked", stats.pages_leaked.into()),
        ] {
            dict.set_item(name, value)?;
        }
        Ok(dict)
    }

    fn paths(&self, py: Python<'_>) -> PyResult<Vec<Path>> {
        let stats = py.detach(|| self.0.stats()).map_err(raise)?;
        Ok(stats.paths.into_iter().map(Path::from).collect())
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.0.close()).map_err(raise)
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __exit__(
        &self,
        py: Python<'_>,
        _kind: &Bound<'_, PyAny>,
        _value: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        self.close(py)
    }
}

impl Agent {
    fn stream(&self, handle: Option<u64>) -> Result<Option<EngineStream>> {
        handle.map(|handle| self.engine_stream(handle)).transpose()
    }

    fn engine_stream(&self, handle: u64) -> Result<EngineStream> {
        // SAFETY: Python's promise, which the stub's documentation states: it is a stream of this agent's GPU, and
        // alive during the call.
        unsafe { self.0.engine_stream(handle) }
    }
}

fn seconds(name: &str, value: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(value)
        .map_err(|_| bad(name, &value.to_string(), "a number of seconds"))
}

fn bad(name: &str, value: &str, wanted: &str) -> PyErr {
    raise(ErrorKind::Config.error(format!("{name} is {value:?}")).fix(format!("use {wanted}")))
}

/// `KVXFER_FAULT`, in builds for tests.
#[cfg(feature = "faults")]
fn fault() -> PyResult<Option<kvxfer_cuda::Fault>> {
    match std::env::var("KVXFER_FAULT").as_deref() {
        Err(_) | Ok("") => Ok(None),
        Ok("flip-after-commit") => Ok(Some(kvxfer_cuda::Fault::FlipAfterCommit)),
        Ok("hold-commit") => Ok(Some(kvxfer_cuda::Fault::HoldCommit)),
        Ok(other) => Err(bad("KVXFER_FAULT", other, "flip-after-commit or hold-commit")),
    }
}
