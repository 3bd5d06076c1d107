//! The machine as the checks see it: files below a root, and what can't be read from files, as plain values.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kvxfer_cuda::driver;
use kvxfer_cuda::memory::HostPool;

use super::gpu::Survey;
use super::ucx::Ucx;

/// A machine. Checks are functions of it, so tests give them another one.
#[derive(Debug)]
pub struct Host {
    /// Where /proc, /sys and /dev are.
    pub root: PathBuf,
    /// The environment.
    pub env: BTreeMap<String, String>,
    /// The folder of the Unix sockets.
    pub socket_dir: PathBuf,
    /// Bytes of the pool that is planned.
    pub buffer_size: u64,
    /// What became of a small pool.
    pub pool: kvxfer_core::Result<()>,
    /// What the CUDA driver says; `None` when it was not asked.
    pub gpus: Option<driver::Result<Survey>>,
    /// What became of looking for UCX; `None` when it was not looked for.
    pub ucx: Option<kvxfer_core::Result<Ucx>>,
}

impl Host {
    /// This one, without GPUs and UCX: to look for those opens libraries.
    pub fn here(socket_dir: PathBuf, buffer_size: u64) -> Self {
        Self {
            root: "/".into(),
            env: std::env::vars_os()
                .filter_map(|(key, value)| {
                    Some((key.into_string().ok()?, value.into_string().ok()?))
                })
                .collect(),
            socket_dir,
            buffer_size,
            pool: HostPool::new(1, 4096).map(drop),
            gpus: None,
            ucx: None,
        }
    }

    pub(super) fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    pub(super) fn has(&self, path: &str) -> bool {
        self.path(path).exists()
    }

    /// A file's text without the white space around it.
    pub(super) fn read(&self, path: &str) -> Option<String> {
        let text = std::fs::read_to_string(self.path(path)).ok()?;
        Some(text.trim().to_owned())
    }

    /// What a symbolic link holds.
    pub(super) fn link(&self, path: &str) -> Option<String> {
        let target = std::fs::read_link(self.path(path)).ok()?;
        Some(target.to_string_lossy().into_owned())
    }

    /// The names in a folder, sorted; none if it is not there.
    pub(super) fn names(&self, folder: impl AsRef<Path>) -> Vec<String> {
        let folder = folder.as_ref().to_string_lossy().into_owned();
        let entries = std::fs::read_dir(self.path(&folder)).into_iter().flatten().flatten();
        let mut names: Vec<_> =
            entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        names
    }

    pub(super) fn env(&self, key: &str) -> Option<&str> {
        self.env.get(key).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// The value of a line `key:` of /proc/self/status.
    pub(super) fn status(&self, key: &str) -> Option<String> {
        let text = self.read("/proc/self/status")?;
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
        Some(line.trim().to_owned())
    }

    /// Whether any RDMA device is visible.
    pub(super) fn has_rdma(&self) -> bool {
        !self.names("/sys/class/infiniband").is_empty()
    }
}
