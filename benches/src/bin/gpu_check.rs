//! `make standin` and `make gpu-check`: the tests that need a CUDA driver, on the stand-in or on this machine's own.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use kvxfer_benches::gpu::check::{self, Mode};
use kvxfer_benches::gpu::{consumer, standin};
use kvxfer_benches::{Result, child};

const USAGE: &str = "\
usage: gpu-check                    everything, on this machine's GPUs
       gpu-check --bundle           the same with the tests that lie beside this program
       gpu-check --rehearse         everything small, on the stand-in: whether this program works
       gpu-check --standin FOLDER   the tests on the stand-in, whose libcuda.so.1 lies there";

fn main() -> ExitCode {
    match run() {
        Ok(code) => code.into(),
        Err(error) => {
            eprintln!("gpu-check: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<u8> {
    match child::role()? {
        Some((role, socket)) if role == consumer::ROLE => {
            return consumer::serve(socket).map(|()| 0);
        }
        Some((role, _)) => return Err(format!("no child has the role {role:?}").into()),
        None => {}
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        [] => check::run(&root()?, Mode::Tree),
        ["--bundle"] => check::run(Path::new("."), Mode::Bundle),
        ["--rehearse"] => check::run(&root()?, Mode::Rehearsal),
        ["--standin", folder] => Ok(u8::from(standin::run(&root()?, Path::new(folder))? > 0)),
        _ => Err(USAGE.into()),
    }
}

/// The tree that this program was built from.
fn root() -> Result<PathBuf> {
    Ok(Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize()?)
}
