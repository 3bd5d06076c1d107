//! Which path a producer's bytes take, and why not a better one.
//!
//! Each side says of every path what it is [able](Ability) to do; the consumer, which owns the memory, adds what only
//! it sees of the pair ([`Pair`]), and takes the best that both are able to. Nothing here looks at the machine: the
//! same question has the same answer, so all of it is one table (`docs/paths.md`).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Error, ErrorKind, Result};

/// A way for bytes to move. In the order of preference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PathName {
    /// Copies by the GPU, into another GPU's memory or its own.
    CudaIpc,
    /// Stores into memory of the same process.
    Local,
    /// Stores into memory that two processes of a host share.
    Shm,
    /// UCX: RDMA, if there is any.
    Ucx,
    /// Sockets.
    Tcp,
}

impl PathName {
    /// All, the best first.
    pub const ALL: [Self; 5] = [Self::CudaIpc, Self::Local, Self::Shm, Self::Ucx, Self::Tcp];

    /// As logs, metrics and `require_path` spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::CudaIpc => "cuda_ipc",
            Self::Local => "local",
            Self::Shm => "shm",
            Self::Ucx => "ucx",
            Self::Tcp => "tcp",
        }
    }
}

impl fmt::Display for PathName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for PathName {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|path| path.as_str() == name).ok_or_else(|| {
            let all = Self::ALL.map(Self::as_str).join(", ");
            ErrorKind::Config
                .error(format!("{name:?} is no path"))
                .fix(format!("take one of {all}"))
        })
    }
}

/// What one side says of one path. Others' names may be of releases to come, so they are text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ability {
    /// The path.
    pub path: String,
    /// What the other side's transport needs to know of this side, or why it can't be had here.
    pub able: std::result::Result<Vec<u8>, String>,
}

impl Ability {
    /// It can be had.
    pub fn able(path: PathName, blob: Vec<u8>) -> Self {
        Self { path: path.as_str().into(), able: Ok(blob) }
    }

    /// It can't.
    pub fn unable(path: PathName, why: impl Into<String>) -> Self {
        Self { path: path.as_str().into(), able: Err(why.into()) }
    }
}

/// Why a path was not taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The path.
    pub path: String,
    /// The reason.
    pub why: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.why)
    }
}

/// The path that was taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// It.
    pub path: PathName,
    /// Each better one, and why it was not.
    pub refused: Vec<Refusal>,
}

/// What a consumer sees of a pair beside what each says of itself. Each is `Ok` where it holds.
#[derive(Clone, Debug)]
pub struct Pair {
    /// The two are agents of one process.
    pub one_process: bool,
    /// Descriptors, or names that are as good, can be passed to the producer, so it can be handed memory.
    pub hands_memory: std::result::Result<(), String>,
    /// The pool is on a GPU, and whether the producer's GPU reaches it; `None` where the pool is in host memory.
    pub gpus: Option<std::result::Result<(), String>>,
    /// Whether the producer's KV is on a GPU.
    pub kv_on_gpu: bool,
}

/// The paths that lead to memory of that kind, the best first.
pub fn candidates(on_gpu: bool) -> &'static [PathName] {
    match on_gpu {
        false => &[PathName::Local, PathName::Shm, PathName::Ucx, PathName::Tcp],
        true => &[PathName::CudaIpc, PathName::Ucx],
    }
}

impl Pair {
    /// Why this pair cannot have a candidate, whatever both are able to.
    fn forbids(&self, path: PathName) -> Option<&str> {
        let hands_memory = self.hands_memory.as_ref();
        match path {
            PathName::CudaIpc => match &self.gpus {
                None => Some("the KV is in host memory"),
                Some(reach) => hands_memory.and(reach.as_ref()).err().map(String::as_str),
            },
            PathName::Local if !self.one_process => Some("the two are different processes"),
            PathName::Shm => hands_memory.err().map(String::as_str),
            PathName::Local | PathName::Ucx | PathName::Tcp => None,
        }
    }
}

/// Each path that leads to the pool, the best first, and why it can't be had, if it can't.
///
/// # Errors
/// `NoPath`: the pool and the KV are in memory of different kinds.
pub fn judge(
    pair: &Pair,
    consumer: &[Ability],
    producer: &[Ability],
    required: Option<PathName>,
) -> Result<Vec<(PathName, Option<String>)>> {
    if pair.kv_on_gpu != pair.gpus.is_some() {
        let (pool, kv) = if pair.kv_on_gpu { ("host", "GPU") } else { ("GPU", "host") };
        return Err(ErrorKind::NoPath
            .error(format!("the pool is in {pool} memory, and the producer's KV in {kv} memory"))
            .fix("set kv_buffer_device to the same on both sides"));
    }
    let why = |path| match required {
        Some(required) if required != path => Some(format!("{required} is required")),
        _ => pair
            .forbids(path)
            .map(str::to_owned)
            .or_else(|| unable("consumer", consumer, path))
            .or_else(|| unable("producer", producer, path)),
    };
    Ok(candidates(pair.gpus.is_some()).iter().map(|&path| (path, why(path))).collect())
}

/// The best path that the pair allows and both are able to.
///
/// # Errors
/// `NoPath`: there is none, or `required` can't be had. The message has the reason for each.
pub fn choose(
    pair: &Pair,
    consumer: &[Ability],
    producer: &[Ability],
    required: Option<PathName>,
) -> Result<Choice> {
    let mut refused = Vec::new();
    for (path, why) in judge(pair, consumer, producer, required)? {
        match why {
            None => return Ok(Choice { path, refused }),
            Some(why) => refused.push(Refusal { path: path.as_str().into(), why }),
        }
    }
    let of_it = |refusal: &&Refusal| required.is_none_or(|path| path.as_str() == refusal.path);
    let whys: Vec<String> = refused.iter().filter(of_it).map(Refusal::to_string).collect();
    Err(match required {
        None => ErrorKind::NoPath.error(format!("no path to this producer: {}", whys.join("; "))),
        Some(path) if whys.is_empty() => ErrorKind::NoPath
            .error(format!("{path} is required, which does not lead to memory of this kind")),
        Some(_) => ErrorKind::NoPath
            .error(format!("the required path cannot be had: {}", whys.join("; ")))
            .fix("set up what is missing, or unset require_path"),
    })
}

/// Why a side can't have a path.
fn unable(side: &str, abilities: &[Ability], path: PathName) -> Option<String> {
    match abilities.iter().find(|ability| ability.path == path.as_str()) {
        Some(Ability { able: Ok(_), .. }) => None,
        Some(Ability { able: Err(why), .. }) => Some(format!("the {side} says: {why}")),
        None => Some(format!("the {side} does not know it")),
    }
}
