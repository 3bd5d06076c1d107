//! Finding a libucp, opening it, and looking whether it will do.

use std::ffi::{CStr, CString, OsStr};
use std::fmt::{self, Write as _};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::{fs, mem};

use kvxfer_core::{Error, ErrorKind, Result};
use libloading::os::unix::{Library as Opened, RTLD_LOCAL, RTLD_NOW};
use parking_lot::Mutex;
use ucx_sys::{Ucp, Untyped, ucs_status_t};

use super::version::mismatch;
use super::{MINIMUM, Version, environment, mapped};

/// The name under which the system has it.
const SONAME: &str = "libucp.so.0";
/// Linux: only if it is there already.
const RTLD_NOLOAD: i32 = 4;
/// The wheel's own loader opens these names (each a file of its own, not a link) in that order. Doing the same,
/// whoever uses that loader later gets our copy.
const WHEEL: [&str; 3] = ["libucs.so", "libuct.so", "libucp.so"];

/// Where a library was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// At the path that was given.
    Explicit,
    /// Somebody in this process had loaded it.
    Loaded,
    /// Where the system's loader looks.
    System,
    /// In the Python wheel.
    Wheel,
}

/// An open libucp. It is never closed: UCX leaves threads and fork handlers behind.
#[derive(Debug)]
pub struct Library {
    pub(super) ucp: Ucp,
    version: Version,
    path: PathBuf,
    source: Source,
    looked: String,
}

impl Library {
    /// The process's one libucp, found at the first success: at `explicit` (the setting `ucx_library`: the file, or
    /// its folder) and nowhere else; or a copy that the process has already; or the system's; or that of the Python
    /// wheel, whose libraries are in the folder `wheel`.
    ///
    /// A copy that is loaded here is told to leave the process's signals, its `mmap` and its stdout alone. One that
    /// was there goes by what its owner told it.
    ///
    /// # Errors
    /// `NoPath`: there is none; the message says where it was looked for. `Config`: the explicit path is no
    /// libucp, or there would be two copies in this process, which is known to hang. `VersionMismatch`: it is
    /// too old. `Io`: `/proc` can't be read.
    pub fn open(explicit: Option<&Path>, wheel: Option<&Path>) -> Result<&'static Self> {
        static OPENED: Mutex<Option<&'static Library>> = Mutex::new(None);
        let explicit =
            explicit.map(|path| if path.is_dir() { path.join(SONAME) } else { path.into() });
        let explicit = explicit.as_deref();
        let mut opened = OPENED.lock();
        let loaded = one_at_most(explicit)?;
        if let Some(library) = *opened {
            return Ok(library);
        }
        let found = environment::quietly(|| Self::find(explicit, loaded, wheel))?;
        let library: &'static Self = Box::leak(Box::new(found));
        tracing::info!(version = %library.version, path = %library.path.display(), source = %library.source, "UCX");
        Ok(opened.insert(library))
    }

    fn find(
        explicit: Option<&Path>,
        loaded: Option<PathBuf>,
        wheel: Option<&Path>,
    ) -> Result<Self> {
        if let Some(path) = explicit {
            let library = open(path.as_os_str(), 0).map_err(|why| {
                let about = format!("{} can't be loaded: {why}", path.display());
                ErrorKind::Config
                    .error(about)
                    .fix("set ucx_library to a libucp.so, or leave it out")
            })?;
            return Self::check(library, path.into(), Source::Explicit, String::new());
        }
        let mut looked = String::from("ucx_library is not set");
        if let Some(path) = loaded {
            let library = open(path.as_os_str(), RTLD_NOLOAD).map_err(|why| {
                let about = format!("{} is mapped here but can't be used: {why}", path.display());
                ErrorKind::Config.error(about).fix("restart the process")
            })?;
            return Self::check(library, path, Source::Loaded, looked);
        }
        looked += "; none is loaded in this process";
        match open(OsStr::new(SONAME), 0) {
            Ok(library) => {
                let path = one_at_most(None)?.unwrap_or_else(|| SONAME.into());
                return Self::check(library, path, Source::System, looked);
            }
            Err(why) => _ = write!(looked, "; the system: {why}"),
        }
        let Some(folder) = wheel else {
            looked += "; no wheel libucx is installed";
            return Err(not_found(&looked));
        };
        match open_wheel(folder) {
            Ok(library) => Self::check(library, folder.join(WHEEL[2]), Source::Wheel, looked),
            Err(why) => {
                _ = write!(looked, "; the wheel: {why}");
                Err(not_found(&looked))
            }
        }
    }

    fn check(library: Opened, path: PathBuf, source: Source, looked: String) -> Result<Self> {
        let find = |name: &'static str| {
            // SAFETY: a function's address; it is given its type by whoever looked for it.
            unsafe { library.get::<Untyped>(name.as_bytes()) }.ok().map(|symbol| *symbol)
        };
        let unusable = |why: String| {
            let about = format!("{} can't be used: {why}", path.display());
            ErrorKind::Config
                .error(about)
                .fix(format!("set ucx_library to the libucp.so of UCX {MINIMUM} or newer"))
        };
        // Before all others, so that an old one is told by its version and not by what it lacks.
        let name = "ucp_get_version";
        let call = find(name).ok_or_else(|| unusable(format!("it has no {name}")))?;
        let (mut major, mut minor, mut patch) = (0, 0, 0);
        // SAFETY: the header declares it so; it writes three integers.
        unsafe {
            type GetVersion = unsafe extern "C" fn(*mut u32, *mut u32, *mut u32);
            mem::transmute::<Untyped, GetVersion>(call)(&mut major, &mut minor, &mut patch);
        }
        let short = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
        let version = Version { major: short(major), minor: short(minor), patch: short(patch) };
        if version < MINIMUM {
            let about = format!("{} is UCX {version}, older than {MINIMUM}", path.display());
            return Err(mismatch(
                about,
                format!("install a newer one, and set ucx_library to its libucp.so ({})", EXTRAS),
            ));
        }
        // SAFETY: it is libucp, by its name and its version; it stays loaded, for `library` is forgotten below, and
        // if this fails nothing of it is used.
        let ucp = unsafe { Ucp::load(find) }.map_err(|error| unusable(error.to_string()))?;
        mem::forget(library);
        Ok(Self { ucp, version, path, source, looked })
    }

    /// Its version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How it was found.
    pub fn source(&self) -> Source {
        self.source
    }

    /// What was looked for before it, for people; empty where it was named.
    pub fn looked(&self) -> &str {
        &self.looked
    }

    /// What a status means, in UCX's words.
    pub(super) fn says(&self, status: ucs_status_t) -> String {
        // SAFETY: takes any status and gives a string: a constant, or for an unknown one a buffer of its own.
        let text = unsafe { CStr::from_ptr((self.ucp.ucs_status_string)(status)) };
        text.to_string_lossy().into_owned()
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Explicit => "ucx_library",
            Self::Loaded => "was loaded",
            Self::System => "system",
            Self::Wheel => "wheel",
        })
    }
}

const EXTRAS: &str = "pip install 'kvxfer[ucx-cu12]' or 'kvxfer[ucx-cu13]' brings one without RDMA";

fn not_found(looked: &str) -> Error {
    ErrorKind::NoPath
        .error(format!("no UCX library was found: {looked}"))
        .fix(format!("install UCX {MINIMUM} or newer, or set ucx_library; {EXTRAS}"))
}

/// The copy in this process, if there is one. With an explicit one there must be no other.
fn one_at_most(explicit: Option<&Path>) -> Result<Option<PathBuf>> {
    let mut paths: Vec<_> = mapped::copies()?.into_iter().map(|copy| copy.path).collect();
    if let Some(explicit) = explicit {
        // One that doesn't exist is no copy; opening it will say so.
        let there = paths.iter().any(|path| same_file(path, explicit));
        if !there && !paths.is_empty() && explicit.exists() {
            paths.push(explicit.into());
        }
    }
    if let [first, second, ..] = &paths[..] {
        let about = format!(
            "two copies of UCX in one process hang sooner or later: {} and {}",
            first.display(),
            second.display()
        );
        return Err(ErrorKind::Config
            .error(about)
            .fix("set ucx_library to the one that the others of this process load"));
    }
    Ok(paths.pop())
}

fn same_file(one: &Path, other: &Path) -> bool {
    let file = |path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino()));
    matches!((file(one), file(other)), (Ok(one), Ok(other)) if one == other)
}

/// # Errors
/// The loader's words.
fn open(name: &OsStr, flags: i32) -> std::result::Result<Opened, String> {
    // SAFETY: its constructors are made to run in any process. That the file is what its name says is the word of the
    // operator, or of the system.
    unsafe { Opened::open(Some(name), RTLD_NOW | RTLD_LOCAL | flags) }.map_err(|error| {
        let reason = std::error::Error::source(&error).map(ToString::to_string);
        reason.unwrap_or_else(|| error.to_string())
    })
}

fn open_wheel(folder: &Path) -> std::result::Result<Opened, String> {
    let [needed @ .., ucp] = WHEEL;
    for name in needed {
        mem::forget(open(folder.join(name).as_os_str(), 0)?);
    }
    open(folder.join(ucp).as_os_str(), 0)
}

/// A text for C.
pub(super) fn c_string(text: &str) -> Result<CString> {
    CString::new(text)
        .map_err(|_| ErrorKind::Config.error(format!("{text:?} has a zero byte in it")))
}
