//! The native module `kvxfer._kvxfer`: a thin translation between Python and `kvxfer-cuda`.
//!
//! Every call that may block or lock releases the GIL; no thread of ours ever takes it. The stub
//! `python/kvxfer/_kvxfer.pyi` documents each class and is checked against this module.

mod agent;
mod errors;
mod keys;
mod observer;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use tracing::level_filters::LevelFilter;

/// Version, build profile, and which paths this build has.
#[pyfunction]
fn build_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let info = PyDict::new(py);
    info.set_item("version", env!("CARGO_PKG_VERSION"))?;
    info.set_item("profile", if cfg!(debug_assertions) { "debug" } else { "release" })?;
    info.set_item("paths", kvxfer_core::path::PathName::ALL.map(|path| path.as_str()))?;
    info.set_item("faults", cfg!(feature = "faults"))?;
    info.set_item("wire_versions", kvxfer_core::wire::VERSIONS)?;
    info.set_item("key_version", kvxfer_core::key::KEY_VERSION)?;
    Ok(info)
}

/// Runs the command line, without the program's name, and answers its exit code.
#[pyfunction]
fn cli(py: Python<'_>, argv: Vec<String>) -> i32 {
    py.detach(|| kvxfer_cli::run(argv))
}

#[pymodule]
fn _kvxfer(module: &Bound<'_, PyModule>) -> PyResult<()> {
    log_to_stderr();
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_function(wrap_pyfunction!(build_info, module)?)?;
    module.add_function(wrap_pyfunction!(cli, module)?)?;
    module.add_class::<keys::Layout>()?;
    module.add_class::<keys::Keys>()?;
    module.add_class::<keys::Keyspace>()?;
    module.add_class::<agent::Loaded>()?;
    module.add_class::<agent::Agent>()?;
    module.add_class::<agent::Path>()?;
    module.add_class::<observer::Observer>()?;
    errors::add(module)
}

/// The progress thread logs without the GIL, so not through Python's `logging`: to stderr, where the engines log
/// too. `KVXFER_LOG` sets the level.
fn log_to_stderr() {
    let level = std::env::var("KVXFER_LOG").ok().and_then(|level| level.parse().ok());
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(level.unwrap_or(LevelFilter::INFO))
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .finish();
    // An error means that the process has a subscriber: then it is the right one.
    let _ = tracing::subscriber::set_global_default(subscriber);
}
