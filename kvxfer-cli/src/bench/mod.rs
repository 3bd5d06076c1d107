//! `kvxfer bench`: how fast KV moves between two agents, by each path that joins them.
//!
//! `serve` is a decode engine and `run` a prefill engine without models. They agree on each case over a TCP connection of
//! their own; the bytes go between agents, as an engine's do. Each case is pushed in rounds: the clock runs from the
//! offer until the last commit is acknowledged, on the side that pushes, and around the load on the other. Tables of
//! blocks are made beforehand, the memory has been written, and the data is compared in a round that is not timed.

mod case;
mod engine;
mod plot;
mod report;
mod run;
mod serve;
mod wire;

use std::path::PathBuf;
use std::time::Duration;

use kvxfer_core::{ErrorKind, Result};
use kvxfer_cuda::AgentConfig;

use crate::Output;
use crate::values::{seconds, size};
use engine::Engine;
use wire::Shape;

pub use report::{Cpu, Figures, Report, Row, SCHEMA, Times};

/// How fast KV moves between two processes or hosts, by each path; in host memory only, for now.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    which: Which,
}

#[derive(Clone, Debug, clap::Subcommand)]
enum Which {
    Serve(serve::Args),
    Run(run::Args),
}

/// What both sides are told.
#[derive(Clone, Debug, clap::Args)]
struct Common {
    /// The most memory that a case may take on this side
    #[arg(long, value_name = "SIZE", default_value = "4GiB", value_parser = size)]
    memory: u64,
    /// Seconds that the other side has for each answer
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    timeout: Duration,
    /// The folder of the Unix sockets, the same on both sides [default: as an agent chooses it]
    #[arg(long, value_name = "FOLDER", env = "KVXFER_SOCKET_DIR")]
    socket_dir: Option<PathBuf>,
    /// What UCX is taken from: libucp.so.0, or a folder with it [default: the system's, or the wheel's]
    #[arg(long, value_name = "FILE", env = "KVXFER_UCX_LIBRARY")]
    ucx_library: Option<PathBuf>,
    /// Where the Python wheel's UCX is: the package knows
    #[arg(long, value_name = "FOLDER", env = "KVXFER_UCX_WHEEL", hide = true)]
    ucx_wheel: Option<PathBuf>,
    /// Measure ucx also where it has no RDMA: as agents do that have the same setting
    #[arg(long)]
    trust_ucx_peers: bool,
}

impl Common {
    /// Whether a case is possible and fits.
    fn admits(&self, shape: Shape, rounds: u32) -> Result<()> {
        let takes = Engine::takes(shape, rounds);
        let none = [shape.block_bytes, shape.blocks, shape.layers].contains(&0);
        if none || !shape.block_bytes.is_multiple_of(64) {
            return Err(ErrorKind::OutOfBounds
                .error(format!("{shape:?} is no request"))
                .fix("take blocks of a multiple of 64 bytes, and one or more of them"));
        }
        if takes > self.memory.into() {
            return Err(ErrorKind::PoolFull
                .error(format!("it takes {} MiB of memory", takes >> 20))
                .fix("raise --memory on both sides, or measure fewer or smaller blocks"));
        }
        Ok(())
    }

    fn settle(&self, config: &mut AgentConfig) {
        if let Some(folder) = &self.socket_dir {
            config.socket_dir.clone_from(folder);
        }
        config.ucx_library.clone_from(&self.ucx_library);
        config.ucx_wheel.clone_from(&self.ucx_wheel);
        config.trust_ucx_peers = self.trust_ucx_peers;
    }
}

/// Serves or measures; answers the exit code.
pub fn run(args: &Args, output: &mut Output<'_>) -> i32 {
    match &args.which {
        Which::Serve(args) => match serve::run(args, output) {
            Ok(()) => 0,
            Err(error) => {
                let _ = writeln!(output.err, "kvxfer bench serve: {error}");
                1
            }
        },
        Which::Run(args) => run::run(args, output),
    }
}
