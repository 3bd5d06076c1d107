//! kvxfer's command line, as a library: the program `kvxfer` and the Python package run the same.
//!
//! Each subcommand is a module with its arguments and a `run` that writes to what it is given and answers the exit
//! code: 0, or 1 for what the subcommand is there to find, or 2 for a command line that can't be understood.

pub mod bench;
pub mod doctor;
mod values;

use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};

use clap::builder::Str;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

/// The exit code of a command line that can't be understood.
pub const USAGE: i32 = 2;

#[derive(Debug, Parser)]
#[command(name = "kvxfer", about = "KV caches from a prefill engine to a decode engine.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Bench(bench::Args),
    Doctor(doctor::Args),
}

/// Where a subcommand writes.
pub struct Output<'a> {
    /// What was asked for.
    pub out: &'a mut dyn Write,
    /// What went wrong.
    pub err: &'a mut dyn Write,
    /// Whether people see `out`, and like colours.
    pub colour: bool,
}

/// Runs a command line, without the program's name; answers the exit code.
pub fn run<I>(args: I) -> i32
where
    I: IntoIterator<Item: Into<OsString>>,
{
    // Not locked: other threads may log meanwhile.
    let (mut out, mut err) = (io::stdout(), io::stderr());
    // https://no-color.org
    let colourless = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let colour = out.is_terminal() && !colourless;
    let code = run_with(args, &mut Output { out: &mut out, err: &mut err, colour });
    let _ = out.flush();
    code
}

/// The same with other places to write to.
pub fn run_with<I>(args: I, output: &mut Output<'_>) -> i32
where
    I: IntoIterator<Item: Into<OsString>>,
{
    let args = std::iter::once(OsString::from("kvxfer")).chain(args.into_iter().map(Into::into));
    let matches = Cli::command().version(Str::from(version())).try_get_matches_from(args);
    let cli = match matches.and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and the version are what was asked for.
            let _ = match error.use_stderr() {
                true => write!(output.err, "{}", error.render()),
                false => write!(output.out, "{}", error.render()),
            };
            return error.exit_code();
        }
    };
    match cli.command {
        Command::Bench(args) => bench::run(&args, output),
        Command::Doctor(args) => doctor::run(&args, output),
    }
}

/// What both sides of a link compare, for people: "0.1.0 (protocol 1, chunk keys 1)".
fn version() -> String {
    let (low, high) = kvxfer_core::wire::VERSIONS;
    let protocol = if low == high { format!("{low}") } else { format!("{low} to {high}") };
    format!(
        "{} (protocol {protocol}, chunk keys {})",
        env!("CARGO_PKG_VERSION"),
        kvxfer_core::key::KEY_VERSION
    )
}
