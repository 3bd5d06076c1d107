//! Rust errors as Python exceptions: one class a kind, all under `KvxferError`.

use kvxfer_core::{Error, ErrorKind};
use pyo3::exceptions::{PyException, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple, PyType};

static BASE: PyOnceLock<Py<PyType>> = PyOnceLock::new();
static CONFIG: PyOnceLock<Py<PyType>> = PyOnceLock::new();

macro_rules! kinds {
    ($($name:ident => $kind:pat, $doc:literal;)*) => {
        mod classes {
            use super::*;
            $(#[allow(non_upper_case_globals)]
            pub(super) static $name: PyOnceLock<Py<PyType>> = PyOnceLock::new();)*
        }

        /// Adds the exceptions to the module.
        pub(crate) fn add(module: &Bound<'_, PyModule>) -> PyResult<()> {
            let py = module.py();
            let exception = py.get_type::<PyException>();
            let base = class(module, &BASE, "KvxferError",
                "Anything that goes wrong in kvxfer.", &[exception])?;
            class(module, &CONFIG, "ConfigError",
                "The configuration contradicts itself, or names something unknown.",
                &[base.clone(), py.get_type::<PyValueError>()])?;
            $(class(module, &classes::$name, stringify!($name), $doc, std::slice::from_ref(&base))?;)*
            Ok(())
        }

        /// The exception that mirrors an error.
        pub(crate) fn raise(error: Error) -> PyErr {
            let slot = match error.kind() {
                ErrorKind::Config => &CONFIG,
                $($kind => &classes::$name,)*
                _ => &BASE,
            };
            Python::attach(|py| match slot.get(py) {
                Some(class) => PyErr::from_type(class.bind(py).clone(), error.to_string()),
                None => PyException::new_err(error.to_string()),
            })
        }
    };
}

kinds! {
    LayoutMismatch => ErrorKind::LayoutMismatch, "The two sides' models or layouts differ; the message names the field.";
    VersionMismatch => ErrorKind::VersionMismatch, "The two sides speak no common version of the protocol.";
    ProtocolError => ErrorKind::Protocol, "A peer sent bytes that the protocol does not allow.";
    PeerLost => ErrorKind::PeerLost, "A peer went away, or was restarted.";
    Timeout => ErrorKind::Timeout, "A deadline passed.";
    PoolFull => ErrorKind::PoolFull, "The pool cannot hold what was asked.";
    Corrupt => ErrorKind::Corrupt, "Stored bytes are not the bytes that were sent.";
    NoPath => ErrorKind::NoPath, "The path that was required, or any path at all, cannot be had.";
    OutOfBounds => ErrorKind::OutOfBounds, "A range lies outside the memory it was meant for.";
    NotFound => ErrorKind::NotFound, "Something by that name is not known here (any more).";
    Closed => ErrorKind::Closed, "The agent is closed, or about to be.";
    IoError => ErrorKind::Io, "The operating system refused something.";
    DeviceError => ErrorKind::Device, "The accelerator, or its driver, refused something.";
}

/// Makes an exception class and adds it to the module.
fn class<'py>(
    module: &Bound<'py, PyModule>,
    slot: &'static PyOnceLock<Py<PyType>>,
    name: &str,
    doc: &str,
    bases: &[Bound<'py, PyType>],
) -> PyResult<Bound<'py, PyType>> {
    let py = module.py();
    let class = slot.get_or_try_init(py, || {
        let body = PyDict::new(py);
        body.set_item("__doc__", doc)?;
        body.set_item("__module__", "kvxfer._kvxfer")?;
        let made = py.get_type::<PyType>().call1((name, PyTuple::new(py, bases)?, body))?;
        Ok::<_, PyErr>(made.cast_into::<PyType>()?.unbind())
    })?;
    let class = class.bind(py).clone();
    module.add(name, &class)?;
    Ok(class)
}
