//! The UCX library: which one an agent would take, and what it can.

use std::path::{Path, PathBuf};

use kvxfer_core::ErrorKind;
use kvxfer_core::path::PathName;
use kvxfer_cuda::ucx::{Context, Library, Options};

use super::finding::{Area, Finding, State};
use super::host::Host;

const NEEDED_BY: &[PathName] = &[PathName::Ucx];

/// The library that was found.
#[derive(Clone, Debug)]
pub struct Ucx {
    /// "1.22.0".
    pub version: String,
    /// Its file.
    pub path: PathBuf,
    /// How it was found.
    pub source: String,
    /// Whether it takes GPU memory, or why it doesn't start.
    pub cuda: kvxfer_core::Result<bool>,
}

impl Ucx {
    /// As an agent with these settings finds it.
    ///
    /// # Errors
    /// Those of [`Library::open`].
    pub fn here(explicit: Option<&Path>, wheel: Option<&Path>) -> kvxfer_core::Result<Self> {
        let library = Library::open(explicit, wheel)?;
        Ok(Self {
            version: library.version().to_string(),
            path: library.path().to_owned(),
            source: library.source().to_string(),
            cuda: Context::new(library, &Options::default()).and_then(|ucx| ucx.takes_cuda()),
        })
    }
}

pub(super) fn check(host: &Host) -> Vec<Finding> {
    let name = "library";
    let ucx = match &host.ucx {
        None => return Vec::new(),
        Some(Ok(ucx)) => ucx,
        Some(Err(error)) => {
            let mut finding = Finding::failed(Area::Ucx, name, error).needed_by(NEEDED_BY);
            if error.kind() == ErrorKind::NoPath {
                // A machine without it is not a broken one.
                finding.state = State::Absent;
            }
            return vec![finding];
        }
    };
    let (version, path) = (&ucx.version, ucx.path.display());
    let mut found =
        vec![Finding::ok(Area::Ucx, name, format!("{version}, {path} ({})", ucx.source))];
    match &ucx.cuda {
        Ok(cuda) => {
            let gpus = if *cuda { "takes GPU memory" } else { "takes host memory only" };
            let detail = format!("{}; {gpus}", modules(host, &ucx.path));
            found.push(Finding::ok(Area::Ucx, "transports", detail));
        }
        Err(error) => found.push(Finding::failed(Area::Ucx, "start", error).needed_by(NEEDED_BY)),
    }
    found
}

/// Its transports are modules, in a folder beside it; some are built in.
fn modules(host: &Host, library: &Path) -> String {
    let folder = library.parent().unwrap_or(Path::new("/")).join("ucx");
    let modules = host.names(folder).into_iter().filter_map(|name| {
        let module = name.strip_prefix("libuct_")?;
        module.strip_suffix(".so").map(str::to_owned)
    });
    let modules: Vec<_> = modules.collect();
    match modules.is_empty() {
        true => "those built in".to_owned(),
        false => format!("those built in, and {}", modules.join(", ")),
    }
}
