//! The side that takes: a consumer for whatever the client measures.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use kvxfer_core::path::PathName;
use kvxfer_core::{ErrorKind, Result};
use kvxfer_cuda::{Address, Role};

use super::Common;
use super::engine::{Engine, cpu};
use super::wire::{Answer, Ask, Load, Shape, VERSION, Wire};
use crate::Output;

/// How long a client may say nothing.
const IDLE: Duration = Duration::from_secs(600);
/// The most rounds of a case.
pub(super) const ROUNDS: u32 = 10_000;

/// Take what `kvxfer bench run` pushes, from one client at a time, until interrupted.
///
/// Whoever reaches the port can have this process take memory, up to --memory, and fill it with random numbers. There is
/// no authentication: listen where only you can reach it.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Args {
    /// Where to listen for clients; port 0 is any free one
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:0")]
    listen: String,
    /// Serve whoever listens there, and end with it: what `run` without a host starts
    #[arg(long, value_name = "ADDRESS", hide = true)]
    dial: Option<SocketAddr>,
    #[command(flatten)]
    common: Common,
}

pub(super) fn run(args: &Args, output: &mut Output<'_>) -> Result<()> {
    let patience = args.common.timeout;
    if let Some(client) = args.dial {
        let stream = TcpStream::connect_timeout(&client, patience);
        let stream = stream
            .map_err(|error| ErrorKind::Io.error(format!("{client} can't be dialled: {error}")))?;
        return session(&mut Wire::new(stream, IDLE)?, &args.common);
    }
    let refused = |error: std::io::Error| {
        ErrorKind::Io
            .error(format!("{} can't be listened on: {error}", args.listen))
            .fix("give --listen an address of this host and a free port")
    };
    let listener = TcpListener::bind(&args.listen).map_err(refused)?;
    let at = listener.local_addr().map_err(refused)?;
    // What is said here is for people; whether they read it does not matter.
    let _ = writeln!(
        output.out,
        "kvxfer bench serve: listening on {at}, one client at a time, up to {} MiB of memory; there: kvxfer bench run {at}",
        args.common.memory >> 20
    );
    let _ = output.out.flush();
    loop {
        let (stream, client) = listener.accept().map_err(refused)?;
        let _ = writeln!(output.out, "{client} is served");
        let _ = output.out.flush();
        let served = Wire::new(stream, IDLE).and_then(|mut wire| session(&mut wire, &args.common));
        let _ = match served {
            Ok(()) => writeln!(output.out, "{client} is done"),
            Err(error) => writeln!(output.err, "{client}: {error}"),
        };
        let _ = output.out.flush();
    }
}

/// Serves one client until it is done.
fn session(wire: &mut Wire, common: &Common) -> Result<()> {
    wire.say(&Answer::Hello { bench: VERSION, kvxfer: env!("CARGO_PKG_VERSION").into() })?;
    let mut engine = None;
    // Of its processor time, what was not spent on moving bytes.
    let mut aside = 0.0;
    while let Some(ask) = wire.hear()? {
        let answer = match ask {
            Ask::Start { shape, path, rounds } => {
                // First, so that two never share the memory.
                drop(engine.take());
                start(wire, common, shape, &path, rounds).map(|(started, address)| {
                    engine = Some(started);
                    Answer::Started { address }
                })
            }
            Ask::Load { round, check } => match &mut engine {
                None => Err(ErrorKind::Protocol.error("nothing was started")),
                Some(engine) => load(engine, round, check, common.timeout, &mut aside),
            },
        };
        wire.say(&answer.unwrap_or_else(|error| match error.lasting() {
            true => Answer::Refused { why: error.to_string() },
            false => Answer::Failed { why: error.to_string() },
        }))?;
    }
    Ok(())
}

fn start(
    wire: &Wire,
    common: &Common,
    shape: Shape,
    path: &str,
    rounds: u32,
) -> Result<(Engine, String)> {
    common.admits(shape, rounds)?;
    if rounds > ROUNDS {
        return Err(ErrorKind::OutOfBounds.error(format!("{rounds} rounds are too many")));
    }
    let path: PathName = path.parse()?;
    let mut config = Engine::config(Role::Consumer, shape);
    config.require_path = Some(path);
    config.listen = Some(Address::tcp(wire.local()?.to_string(), 0));
    common.settle(&mut config);
    let engine = Engine::start(config, shape, rounds)?;
    let tcp = engine.agent.addresses().iter().find(|at| matches!(at, Address::Tcp { .. }));
    let address = tcp.ok_or_else(|| ErrorKind::Io.error("the agent listens nowhere"))?.to_string();
    Ok((engine, address))
}

fn load(
    engine: &mut Engine,
    round: u32,
    check: bool,
    patience: Duration,
    aside: &mut f64,
) -> Result<Answer> {
    let mut apart = |engine: &mut Engine, what: &mut dyn FnMut(&mut Engine) -> Result<()>| {
        let before = cpu();
        let done = what(engine);
        *aside += cpu() - before;
        done
    };
    if check {
        apart(engine, &mut |engine| engine.wipe(round))?;
    }
    let (seconds, loaded) = engine.load(round, patience)?;
    let mut wrong = None;
    if check {
        apart(engine, &mut |engine| engine.wrong(round).map(|words| wrong = Some(words)))?;
    }
    let (bytes, path) = (loaded.bytes, loaded.path);
    Ok(Answer::Loaded(Load { seconds, bytes, path, wrong, cpu: cpu() - *aside }))
}
