//! `kvxfer doctor`: what this machine can do, and what it can do together with a peer.
//!
//! A check is a function of a [`Host`] and answers [`Finding`]s. A finding knows which paths need what it is about, so
//! the verdict on a path follows from the findings alone. What a path needs is asked of the code that will need
//! it: the pool is tried, the socket folder is judged as an agent judges it, and the peer's socket is connected to.
//!
//! Nothing is left behind, and no GPU memory is used.

mod finding;
mod gpu;
mod host;
mod isolation;
mod kernel;
mod limits;
mod network;
mod paths;
mod peer;
mod rdma;
mod sockets;
mod table;
mod ucx;

use std::path::PathBuf;
use std::time::Duration;

use kvxfer_core::path::PathName;
use kvxfer_cuda::control::Address;
use kvxfer_cuda::default_socket_dir;
use serde::Serialize;

use crate::Output;
use crate::values::{seconds, size};

pub use finding::{Area, Finding, State};
pub use gpu::{Gpu, Link, LinkKind, Survey};
pub use host::Host;
pub use paths::Verdict;
pub use peer::Peer;
pub use ucx::Ucx;

/// Of the report's fields: it grows when one goes or changes its meaning.
pub const SCHEMA: u32 = 1;

/// What this machine can do, and with --peer, what it can do together with that agent.
///
/// The exit code is 0; or 1 when a path of --require, or the peer, or every path to it, is refused; or 2 when the
/// command line is wrong.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The agent of the other engine: host:port, or unix:/path
    #[arg(long, value_name = "ADDRESS")]
    pub peer: Option<Address>,
    /// A path that has to be possible: cuda_ipc, local, shm, ucx or tcp; may be repeated
    #[arg(long, value_name = "PATH", value_delimiter = ',')]
    pub require: Vec<PathName>,
    /// The folder of the Unix sockets [default: as an agent chooses it]
    #[arg(long, value_name = "FOLDER", env = "KVXFER_SOCKET_DIR")]
    pub socket_dir: Option<PathBuf>,
    /// What UCX is taken from: libucp.so.0, or a folder with it [default: the system's, or the wheel's]
    #[arg(long, value_name = "FILE", env = "KVXFER_UCX_LIBRARY")]
    pub ucx_library: Option<PathBuf>,
    /// Where the Python wheel's UCX is: the package knows
    #[arg(long, value_name = "FOLDER", env = "KVXFER_UCX_WHEEL", hide = true)]
    pub ucx_wheel: Option<PathBuf>,
    /// The pool that is planned: 512MiB, 1GiB, or bytes
    #[arg(long, value_name = "SIZE", env = "KVXFER_BUFFER_SIZE", default_value = "1GiB", value_parser = size)]
    pub buffer_size: u64,
    /// Seconds that the peer has for each answer
    #[arg(long, value_name = "SECONDS", default_value = "3", value_parser = seconds)]
    pub timeout: Duration,
    /// Examine the peer over TCP too, as agents do that have the same setting
    #[arg(long, env = "KVXFER_ALLOW_INSECURE")]
    pub allow_insecure: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Print nothing but, on standard error, what is refused: for probes
    #[arg(long, conflicts_with = "json")]
    pub quiet: bool,
}

/// All that was found. Its JSON is documented in docs/doctor.md.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The release.
    pub kvxfer: &'static str,
    /// Whether the exit code is 0.
    pub ok: bool,
    /// Why it is not.
    pub refused: Vec<String>,
    /// The peer, if it answered.
    pub peer: Option<Peer>,
    /// What was found, area by area.
    pub findings: Vec<Finding>,
    /// The GPUs that are visible.
    pub gpus: Vec<Gpu>,
    /// Each path.
    pub paths: Vec<Verdict>,
}

impl Report {
    /// Examines a machine, and its peer if there is one.
    pub fn of(host: &Host, args: &Args) -> Self {
        let mut findings = Vec::new();
        let checks = [
            kernel::check,
            limits::check,
            isolation::check,
            sockets::check,
            gpu::check,
            rdma::check,
            ucx::check,
            network::check,
        ];
        for check in checks {
            findings.extend(check(host));
        }
        let pair = args.peer.as_ref().map(|address| peer::check(host, address, args, &findings));
        let (peer, judged) = match pair {
            Some(pair) => {
                findings.extend(pair.findings);
                (pair.peer, pair.judged)
            }
            None => (None, None),
        };
        let gpus = match &host.gpus {
            Some(Ok(survey)) => survey.gpus.clone(),
            _ => Vec::new(),
        };
        let paths = paths::verdicts(&findings, judged.as_ref(), &args.require);
        let refused = refused(args, &findings, &paths);
        Self {
            schema: SCHEMA,
            kvxfer: env!("CARGO_PKG_VERSION"),
            ok: refused.is_empty(),
            refused,
            peer,
            findings,
            gpus,
            paths,
        }
    }
}

/// What makes the exit code 1, a line each.
fn refused(args: &Args, findings: &[Finding], paths: &[Verdict]) -> Vec<String> {
    let line = |what: &str, detail: &str, fix: &Option<String>| match fix {
        Some(fix) => format!("{what}: {detail} ({fix})"),
        None => format!("{what}: {detail}"),
    };
    let required = paths.iter().filter(|verdict| verdict.required && !verdict.is_ok());
    let mut refused: Vec<_> = required
        .map(|verdict| line(verdict.path.as_str(), &verdict.detail, &verdict.fix))
        .collect();
    if refused.is_empty() && args.peer.is_some() && !paths.iter().any(Verdict::is_ok) {
        // Nothing was required in particular, so any path would do.
        let about = |finding: &&Finding| finding.area == Area::Peer && finding.state != State::Ok;
        let why = findings.iter().find(about);
        refused.push(why.map_or("peer: no path leads to it".into(), |finding| {
            line("peer", &finding.detail, &finding.fix)
        }));
    }
    refused
}

/// Examines this machine and says what was found; answers the exit code.
pub fn run(args: &Args, output: &mut Output<'_>) -> i32 {
    // A probe that asks for shared memory, every few seconds, wakes no GPU and opens no library.
    let gpu_paths = [PathName::CudaIpc, PathName::Ucx];
    let quick = args.quiet
        && !args.require.is_empty()
        && !args.require.iter().any(|path| gpu_paths.contains(path));
    let socket_dir = args.socket_dir.clone().unwrap_or_else(default_socket_dir);
    let mut host = Host::here(socket_dir, args.buffer_size);
    if !quick {
        host.gpus = Some(Survey::here());
        host.ucx = Some(Ucx::here(args.ucx_library.as_deref(), args.ucx_wheel.as_deref()));
    }
    say(&Report::of(&host, args), args, output)
}

/// Prints a report in the way that was asked for; answers the exit code.
pub fn say(report: &Report, args: &Args, output: &mut Output<'_>) -> i32 {
    // Whoever closed the pipe has read enough.
    let _ = if args.quiet {
        report.refused.iter().try_for_each(|line| writeln!(output.err, "kvxfer doctor: {line}"))
    } else if args.json {
        serde_json::to_writer_pretty(&mut *output.out, report)
            .map_err(std::io::Error::from)
            .and_then(|()| writeln!(output.out))
    } else {
        output.out.write_all(table::render(report, output.colour).as_bytes())
    };
    i32::from(!report.ok)
}
