//! The side that pushes, and measures.

use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use kvxfer_core::path::PathName;
use kvxfer_core::{ErrorKind, Result};

use super::Common;
use super::case::{Case, No, WARM};
use super::report::{Report, Row};
use super::serve::ROUNDS;
use super::wire::{Answer, Ask, Load, Shape, VERSION, Wire, gone};
use crate::Output;
use crate::values::size;

/// Measure pushes to `kvxfer bench serve`: each path, size of blocks, and count of them.
///
/// The exit code is 0; or 1 when nothing could be measured or the run ended early. A path that can't be had is a line
/// of the table, with the reason.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Args {
    /// What `serve` printed: host:port [default: a server is started on this host for as long as the run takes]
    #[arg(value_name = "HOST:PORT")]
    server: Option<String>,
    /// A path to measure; may be repeated
    #[arg(long, value_name = "PATH", value_delimiter = ',', default_value = "shm,ucx,tcp")]
    path: Vec<PathName>,
    /// Bytes of a block in one layer; may be repeated [default: 4KiB to 1MiB]
    #[arg(long, value_name = "SIZE", value_delimiter = ',', value_parser = size)]
    block: Vec<u64>,
    /// Blocks of a request; may be repeated [default: 16 and 64]
    #[arg(long, value_name = "COUNT", value_delimiter = ',')]
    count: Vec<u32>,
    /// Layers
    #[arg(long, value_name = "COUNT", default_value_t = 4)]
    layers: u32,
    /// Timed rounds of each case [default: 50]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..i64::from(ROUNDS - WARM)))]
    rounds: Option<u32>,
    /// Few cases and rounds: seconds, not minutes
    #[arg(long)]
    quick: bool,
    /// Write the figures there, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw GB/s over the size of blocks there, as SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

pub(super) fn run(args: &Args, output: &mut Output<'_>) -> i32 {
    let rounds = args.rounds.unwrap_or(if args.quick { 10 } else { 50 });
    let mut say = |error: &kvxfer_core::Error| {
        let _ = writeln!(output.err, "kvxfer bench run: {error}");
    };
    let mut server = match Server::reach(args) {
        Ok(server) => server,
        Err(error) => {
            say(&error);
            return 1;
        }
    };
    let mut report = Report::new(server.wire.peer(), rounds);
    // What was measured before an error is worth having.
    if let Err(error) = sweep(args, &mut server, &mut report) {
        say(&error);
        report.error = Some(error.to_string());
    }
    let measured = report.rows.iter().any(|row| row.figures.is_some());
    let mut code = i32::from(report.error.is_some() || !measured);
    let json = || {
        let json = serde_json::to_string_pretty(&report);
        json.map_err(|error| ErrorKind::Io.error(error.to_string()))
    };
    let files = [
        args.json.as_deref().map(|file| write(file, json())),
        args.plot.as_deref().map(|file| write(file, super::plot::svg(&report))),
    ];
    for error in files.into_iter().flatten().filter_map(Result::err) {
        say(&error);
        code = 1;
    }
    // Whoever closed the pipe has read enough.
    let _ = output.out.write_all(report.table().as_bytes());
    code
}

fn write(file: &Path, text: Result<String>) -> Result<()> {
    std::fs::write(file, text?).map_err(|error| {
        ErrorKind::Io.error(format!("{} can't be written: {error}", file.display()))
    })
}

/// The connection, and the process behind it if it is ours.
pub(super) struct Server {
    pub(super) wire: Wire,
    _process: Option<Process>,
}

struct Process(std::process::Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Server {
    fn reach(args: &Args) -> Result<Self> {
        let patience = args.common.timeout;
        let (stream, process) = match &args.server {
            Some(server) => (dial(server, patience)?, None),
            None => start(args).map(|(stream, process)| (stream, Some(process)))?,
        };
        let mut wire = Wire::new(stream, patience)?;
        match wire.hear()? {
            Some(Answer::Hello { bench: VERSION, .. }) => Ok(Self { wire, _process: process }),
            Some(Answer::Hello { kvxfer, .. }) => Err(ErrorKind::VersionMismatch
                .error(format!("the bench server is of kvxfer {kvxfer}"))
                .fix("run the same release on both sides")),
            other => Err(unexpected(wire.peer(), other)),
        }
    }

    pub(super) fn ask(&mut self, ask: &Ask) -> Result<Answer> {
        self.wire.say(ask)?;
        self.wire.hear()?.ok_or_else(|| gone(self.wire.peer(), "it closed the connection"))
    }

    pub(super) fn load(&mut self, round: u32, check: bool) -> Result<Load> {
        match self.ask(&Ask::Load { round, check })? {
            Answer::Loaded(load) => Ok(load),
            other => Err(unexpected(self.wire.peer(), Some(other))),
        }
    }
}

pub(super) fn unexpected(peer: &str, answer: Option<Answer>) -> kvxfer_core::Error {
    match answer {
        Some(Answer::Refused { why } | Answer::Failed { why }) => {
            ErrorKind::PeerLost.error(format!("the bench server at {peer} says: {why}"))
        }
        Some(other) => ErrorKind::Protocol.error(format!("{peer} said {other:?} out of turn")),
        None => gone(peer, "it closed the connection"),
    }
}

fn dial(server: &str, patience: Duration) -> Result<TcpStream> {
    let wrong = |why: String| {
        ErrorKind::Io
            .error(format!("no bench server is reached at {server}: {why}"))
            .fix("start kvxfer bench serve there, and give the host:port that it prints")
    };
    let found = server.to_socket_addrs().map_err(|error| wrong(error.to_string()))?;
    let mut why = "the name has no address".to_owned();
    for address in found {
        match TcpStream::connect_timeout(&address, patience) {
            Ok(stream) => return Ok(stream),
            Err(error) => why = error.to_string(),
        }
    }
    Err(wrong(why))
}

/// A server of our own, which dials us.
fn start(args: &Args) -> Result<(TcpStream, Process)> {
    let failed = |why: String| {
        ErrorKind::Io
            .error(format!("no bench server can be started on this host: {why}"))
            .fix("start kvxfer bench serve, and give what it prints to kvxfer bench run")
    };
    let io = |error: std::io::Error| failed(error.to_string());
    let listener = TcpListener::bind("127.0.0.1:0").map_err(io)?;
    listener.set_nonblocking(true).map_err(io)?;
    let at = listener.local_addr().map_err(io)?;
    let child = ourselves(&args.common, at).spawn().map_err(io)?;
    let mut process = Process(child);
    let started = Instant::now();
    loop {
        match listener.accept() {
            Ok((stream, _)) => return Ok((stream, process)),
            Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => return Err(io(error)),
            Err(_) => {}
        }
        if let Some(status) = process.0.try_wait().map_err(io)? {
            return Err(failed(format!("it ended with {status}")));
        }
        if started.elapsed() > args.common.timeout {
            return Err(failed("it does not dial in time".into()));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// This program as it was started, be it a program or a module of an interpreter, but to serve.
fn ourselves(common: &Common, at: SocketAddr) -> std::process::Command {
    let mut words = std::env::args_os();
    let program = words.next().unwrap_or_else(|| "kvxfer".into());
    let mut command = std::process::Command::new(program);
    command.args(words.take_while(|word| word != "bench"));
    command.args(["bench", "serve", "--dial", &at.to_string()]);
    command.args(["--memory", &common.memory.to_string()]);
    command.args(["--timeout", &common.timeout.as_secs_f64().to_string()]);
    command.args(common.trust_ucx_peers.then_some("--trust-ucx-peers"));
    for (name, file) in
        [("--socket-dir", &common.socket_dir), ("--ucx-library", &common.ucx_library)]
    {
        if let Some(file) = file {
            command.arg(name).arg(file);
        }
    }
    command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null());
    command
}

/// Each case, the smallest blocks first.
fn shapes(args: &Args) -> Result<Vec<Shape>> {
    let or = |given: &[u64], default: &[u64]| match given.is_empty() {
        true => default.to_vec(),
        false => given.to_vec(),
    };
    let counts = args.count.iter().map(|&count| count.into()).collect::<Vec<_>>();
    let (blocks, counts) = match args.quick {
        true => (or(&args.block, &[4 << 10, 64 << 10, 1 << 20]), or(&counts, &[64])),
        false => {
            let sizes = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20];
            (or(&args.block, &sizes), or(&counts, &[16, 64]))
        }
    };
    let layers = args.layers;
    let mut shapes = Vec::new();
    for &block in &blocks {
        for &count in &counts {
            let block_bytes = u32::try_from(block).map_err(|_| {
                ErrorKind::Config.error(format!("a block of {block} bytes")).fix("take below 4 GiB")
            })?;
            shapes.push(Shape { block_bytes, blocks: count as u32, layers });
        }
    }
    Ok(shapes)
}

fn sweep(args: &Args, server: &mut Server, report: &mut Report) -> Result<()> {
    let shapes = shapes(args)?;
    let rounds = report.rounds + WARM;
    let each = u64::from(rounds);
    // Hidden where nobody sees it.
    let bar = ProgressBar::new(each * (args.path.len() * shapes.len()) as u64);
    let style = ProgressStyle::with_template("{msg:24} [{bar:40}] {pos}/{len}, {eta} left");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    for (nth, &path) in args.path.iter().enumerate() {
        for (case, &shape) in shapes.iter().enumerate() {
            bar.set_position(each * (nth * shapes.len() + case) as u64);
            bar.set_message(format!("{path}, {} bytes × {}", shape.block_bytes, shape.blocks));
            let row = match Case::start(&args.common, server, path, shape, rounds)? {
                Ok(mut case) => {
                    let figures = case.measure(server, &bar)?;
                    Row::of(path.as_str(), shape, Ok(figures))
                }
                Err(No::Case(why)) => Row::of(path.as_str(), shape, Err(why)),
                Err(No::Path(why)) => {
                    report.rows.push(Row::refused(path.as_str(), why));
                    break;
                }
            };
            report.rows.push(row);
        }
    }
    bar.finish_and_clear();
    Ok(())
}
