//! The Unix socket and the folder it lives in.
//!
//! Whoever can connect here can be handed memory, so the folder must be ours alone. A socket becomes
//! visible under its name (`….sock`) only once it listens: it is bound under another and renamed. So a
//! visible socket that refuses a connection is dead, and a successor may remove it.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use kvxfer_core::wire::Hello;
use kvxfer_core::{Error, ErrorKind, Result};
use rustix::fs::{Access, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::failed;

/// Bytes in `sockaddr_un.sun_path`, the closing zero included.
const PATH_MAX: usize = 108;
/// What a socket is called until it listens. As long as [`SUFFIX`], so that no length is lost.
const BINDING: &str = ".bind";
const SUFFIX: &str = ".sock";
/// Connections that wait to be accepted. The kernel lowers it to `net.core.somaxconn`.
pub(super) const BACKLOG: i32 = 1024;

/// A listening Unix socket. Its file goes when this does.
#[derive(Debug)]
pub(super) struct UnixListener {
    pub(super) socket: OwnedFd,
    pub(super) path: PathBuf,
    /// Device and inode of the file, so that a successor's is left alone.
    file: (u64, u64),
}

impl UnixListener {
    /// Listens in `folder` under a name that no other agent has: the boot's and the incarnation's.
    /// What dead agents of this boot left there is removed.
    pub(super) fn in_folder(folder: &Path, hello: &Hello) -> Result<Self> {
        let folder = std::path::absolute(folder).map_err(|error| {
            ErrorKind::Io.error(format!("cannot resolve the folder {}: {error}", folder.display()))
        })?;
        let prefix = format!("kvxfer-{}-", hex(&hello.boot_id[..4]));
        let path = folder.join(format!("{prefix}{}{SUFFIX}", hex(&hello.incarnation.0)));
        let guard = verify(&folder)?;
        sweep(&folder, &prefix);
        Self::bind(&folder, &guard, path)
    }

    /// Listens under that very path. A socket there is replaced if nobody listens to it.
    pub(super) fn at(path: &Path) -> Result<Self> {
        let folder = path.parent().unwrap_or(Path::new("/"));
        let guard = verify(folder)?;
        match fs::symlink_metadata(path) {
            Err(_) => {}
            Ok(_) if is_dead(path) => {
                tracing::info!(path = %path.display(), "replacing the socket of a dead agent");
            }
            Ok(_) => {
                return Err(ErrorKind::Config.error(format!("{} is in use", path.display())).fix(
                    "stop the agent that listens there, or remove the file, or use another path",
                ));
            }
        }
        Self::bind(folder, &guard, path.to_owned())
    }

    fn bind(folder: &Path, guard: &File, path: PathBuf) -> Result<Self> {
        let about = |errno| failed(&format!("cannot listen at {}", path.display()), errno);
        let socket = socket().map_err(about)?;
        let mut binding = path.clone().into_os_string();
        if let Some(stem) = path.to_str().and_then(|path| path.strip_suffix(SUFFIX)) {
            binding = stem.into();
        }
        binding.push(BINDING);
        let binding = PathBuf::from(binding);
        let name = name(&binding)?;
        let _ = fs::remove_file(&binding);
        rustix::net::bind(&socket, &name).map_err(about)?;
        let file = fs::symlink_metadata(&binding).map_err(|error| io(&binding, &error))?;
        // The descriptor owns the file from here on, so every way out removes it.
        let mut listener = Self { socket, path: binding.clone(), file: (file.dev(), file.ino()) };
        fs::set_permissions(&binding, Permissions::from_mode(0o600))
            .map_err(|error| io(&binding, &error))?;
        rustix::net::listen(&listener.socket, BACKLOG).map_err(about)?;
        fs::rename(&binding, &path).map_err(|error| io(&path, &error))?;
        listener.path = path;
        // The folder that was verified is the one that the path led to.
        let (held, seen) = (guard.metadata(), fs::symlink_metadata(folder));
        match (held, seen) {
            (Ok(held), Ok(seen)) if (held.dev(), held.ino()) == (seen.dev(), seen.ino()) => {
                Ok(listener)
            }
            _ => Err(ErrorKind::Config
                .error(format!("the folder {} was replaced while we bound in it", folder.display()))
                .fix("put the folder where only this user can write, such as /run/user/<uid>")),
        }
    }
}

impl Drop for UnixListener {
    fn drop(&mut self) {
        if let Ok(file) = fs::symlink_metadata(&self.path)
            && (file.dev(), file.ino()) == self.file
        {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Connects. `Err` tells apart, by its number, a socket that is not visible from one that is busy.
pub(super) fn connect(path: &Path) -> Result<rustix::io::Result<OwnedFd>> {
    let name = name(path)?;
    let connect = || {
        let socket = socket()?;
        rustix::net::connect(&socket, &name)?;
        Ok(socket)
    };
    Ok(connect())
}

fn socket() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

fn name(path: &Path) -> Result<SocketAddrUnix> {
    let length = path.as_os_str().len();
    if length >= PATH_MAX {
        return Err(ErrorKind::Config
            .error(format!(
                "the socket path {} has {length} bytes, Unix sockets allow {}",
                path.display(),
                PATH_MAX - 1
            ))
            .fix("set socket_dir to a shorter path"));
    }
    SocketAddrUnix::new(path).map_err(|errno| failed(&path.display().to_string(), errno))
}

/// Whether agents can use that folder; says whether it is there already. Creates nothing.
///
/// # Errors
/// `Config`: it is not ours alone, can't be written to, or can't be created; or its path is too long.
pub fn check_socket_dir(folder: &Path) -> Result<bool> {
    let folder = std::path::absolute(folder)
        .map_err(|error| ErrorKind::Io.error(format!("{}: {error}", folder.display())))?;
    name(&folder.join(format!("kvxfer-{}-{}{SUFFIX}", hex(&[0; 4]), hex(&[0; 16]))))?;
    let there = fs::symlink_metadata(&folder).is_ok();
    if there {
        inspect(&folder)?;
    }
    let exists = |path: &&Path| fs::symlink_metadata(path).is_ok();
    let written = folder.ancestors().find(exists).unwrap_or(Path::new("/"));
    rustix::fs::access(written, Access::WRITE_OK | Access::EXEC_OK).map_err(|errno| {
        let error = std::io::Error::from(errno);
        match there {
            true => refusal(&folder, &format!("cannot be written to: {error}")),
            false => {
                refusal(&folder, &format!("cannot be created in {}: {error}", written.display()))
            }
        }
        .fix("set socket_dir to a folder that this user can write to")
    })?;
    Ok(there)
}

/// Makes sure that the folder is there and ours alone, and holds it.
fn verify(folder: &Path) -> Result<File> {
    if let Err(error) = DirBuilder::new().mode(0o700).recursive(true).create(folder)
        && fs::symlink_metadata(folder).is_err()
    {
        return Err(refusal(folder, &format!("cannot be created: {error}"))
            .fix("set socket_dir to a folder that this user can create"));
    }
    inspect(folder)
}

fn refusal(folder: &Path, why: &str) -> Error {
    ErrorKind::Config.error(format!("the socket folder {} {why}", folder.display()))
}

/// Makes sure that the folder is ours alone, and holds it.
fn inspect(folder: &Path) -> Result<File> {
    let refuse = |why: String, fix: &str| Err(refusal(folder, &why).fix(fix));
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::PATH;
    let opened = OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(folder);
    let meta = opened.as_ref().map_or_else(|_| fs::symlink_metadata(folder), File::metadata);
    let (file, meta) = match (opened, meta) {
        (Ok(file), Ok(meta)) => (file, meta),
        (_, Ok(meta)) if meta.is_symlink() => {
            return refuse("is a symbolic link".into(), "set socket_dir to the folder itself");
        }
        (_, Ok(meta)) if !meta.is_dir() => {
            return refuse("is not a folder".into(), "set socket_dir to a folder");
        }
        (Err(error), _) | (_, Err(error)) => {
            return refuse(format!("cannot be opened: {error}"), "check its permissions");
        }
    };
    let (owner, us) = (meta.uid(), rustix::process::geteuid().as_raw());
    if owner != us {
        let why = format!("belongs to uid {owner}, and we run as uid {us}");
        return refuse(why, "set socket_dir to a folder of this user");
    }
    let mode = meta.mode() & 0o7777;
    if mode & 0o077 != 0 {
        let why = format!("has mode {mode:04o}: others could reach the sockets in it");
        return refuse(why, &format!("run chmod 0700 {}", folder.display()));
    }
    Ok(file)
}

/// Removes sockets of agents that died without removing theirs.
fn sweep(folder: &Path, prefix: &str) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let ours = name.to_str().is_some_and(|n| n.starts_with(prefix) && n.ends_with(SUFFIX));
        if ours && is_dead(&entry.path()) {
            tracing::info!(path = %entry.path().display(), "removing the socket of a dead agent");
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// A socket that nobody listens to. (A full backlog is somebody, and other files refuse too.)
fn is_dead(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket())
        && matches!(connect(path), Ok(Err(Errno::CONNREFUSED)))
}

fn io(path: &Path, error: &std::io::Error) -> Error {
    ErrorKind::Io.error(format!("cannot set up the socket {}: {error}", path.display()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
