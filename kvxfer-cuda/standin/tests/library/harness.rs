//! Plays: tests in several processes, each of which is this binary, run again for the one test.

use std::any::type_name;
use std::env;
use std::ffi::c_int;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

const ROLE: &str = "KVXFER_STANDIN_ROLE";
const SHARED: &str = "KVXFER_STANDIN_FOLDER";
const DEADLINE: Duration = Duration::from_secs(60);

/// Calls an entry point by its name; the code that it answers.
macro_rules! cu {
    ($name:ident($($arg:expr),* $(,)?)) => {{
        type Code = std::ffi::c_int;
        // SAFETY: each test passes what the driver's documentation asks for, or what the stand-in refuses
        // before it looks.
        unsafe {
            let library = cudarc::driver::sys::culib();
            let name = concat!(stringify!($name), "\0");
            let call = library.get::<unsafe extern "C" fn($($crate::harness::any!($arg)),*) -> Code>(name.as_bytes());
            (call.unwrap())($($arg),*)
        }
    }};
}
macro_rules! any {
    ($arg:expr) => {
        _
    };
}
pub(crate) use {any, cu};

/// Calls an entry point that has to answer 0.
macro_rules! ok {
    ($($call:tt)*) => {
        assert_eq!($crate::harness::cu!($($call)*), 0, stringify!($($call)*))
    };
}
pub(crate) use ok;

/// The test's process runs `play` as `"first"` in a new process with that configuration, and passes when
/// that one does. To be called with a closure of the test's own: its name is the test's.
pub(crate) fn play<F: FnOnce(&str, &Stage)>(config: &str, play: F) {
    // "library::module::test::{{closure}}"
    let name = type_name::<F>().split_once("::").unwrap().1;
    let name = name.split("::{{").next().unwrap();
    if let Ok(role) = env::var(ROLE) {
        let folder = PathBuf::from(env::var_os(SHARED).unwrap());
        return play(&role, &Stage { name, folder });
    }
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let folder = scratch().join(format!("kvxfer-standin-{}-{number}", std::process::id()));
    fs::create_dir(&folder).unwrap();
    link_library(&folder);
    let stage = Stage { name, folder };
    let status = stage.spawn("first", config, Stdio::null()).wait();
    fs::remove_dir_all(&stage.folder).unwrap();
    assert!(status.success(), "{status}");
}

/// Memory, if it can be had: the files of a ledger are as large as devices.
fn scratch() -> PathBuf {
    let memory = PathBuf::from("/dev/shm");
    if memory.is_dir() { memory } else { env::temp_dir() }
}

/// Where a play takes place.
pub(crate) struct Stage {
    name: &'static str,
    folder: PathBuf,
}

impl Stage {
    /// Removed when the play is over.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Another process of this play. "{folder}" in its configuration is a folder for this play alone.
    pub(crate) fn spawn(&self, role: &str, config: &str, stdin: impl Into<Stdio>) -> Actor {
        self.spawn_with(role, config, stdin, None)
    }

    /// As [`Stage::spawn`], with a value of `CUDA_VISIBLE_DEVICES`.
    pub(crate) fn spawn_with(
        &self,
        role: &str,
        config: &str,
        stdin: impl Into<Stdio>,
        visible: Option<&str>,
    ) -> Actor {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args([self.name, "--exact", "--nocapture", "--quiet"]);
        command.env(ROLE, role).env(SHARED, &self.folder);
        command.env("LD_LIBRARY_PATH", &self.folder);
        command.env("KVXFER_STANDIN", config.replace("{folder}", self.folder.to_str().unwrap()));
        command.env_remove("CUDA_VISIBLE_DEVICES");
        command.envs(visible.map(|visible| ("CUDA_VISIBLE_DEVICES", visible)));
        command.stdin(stdin).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stdout = child.stdout.take().unwrap();
        Actor { child, stdout }
    }
}

/// Puts the library into a folder, under the driver's name.
fn link_library(folder: &Path) {
    // Cargo built it for this binary, beside it.
    let built = env::current_exe().unwrap().with_file_name("libkvxfer_standin.so");
    symlink(built, folder.join("libcuda.so.1")).unwrap();
}

/// Another process. Killed when it is dropped.
pub(crate) struct Actor {
    child: Child,
    stdout: ChildStdout,
}

impl Actor {
    /// Waits until it says [`say`] that; fails when it ends, or says it too late.
    pub(crate) fn expect(&mut self, line: &str) {
        let mut heard = String::new();
        while !heard.ends_with(&format!("\n{line}\n")) {
            readable(&self.stdout);
            let mut byte = [0];
            match self.stdout.read(&mut byte).unwrap() {
                0 => panic!("it ended before it said {line:?}: {heard}"),
                _ => heard.push(char::from(byte[0])),
            }
        }
    }

    pub(crate) fn kill(&mut self) -> ExitStatus {
        self.child.kill().unwrap();
        self.child.wait().unwrap()
    }

    /// Its end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let pid = Pid::from_child(&self.child);
        // What it says goes where this process's words go.
        let mut said = Vec::new();
        loop {
            readable(&self.stdout);
            let mut bytes = [0; 4096];
            match self.stdout.read(&mut bytes).unwrap() {
                0 => break,
                len => said.extend_from_slice(&bytes[..len]),
            }
        }
        print!("{}", String::from_utf8_lossy(&said));
        readable(&pidfd_open(pid, PidfdFlags::empty()).unwrap());
        self.child.wait().unwrap()
    }

    /// Asserts that it passes.
    pub(crate) fn passes(mut self) {
        let status = self.wait();
        assert!(status.success(), "{status}");
    }

    /// Asserts that it dies of that signal.
    pub(crate) fn dies_of(mut self, signal: i32) {
        let status = self.wait();
        assert_eq!(status.signal(), Some(signal), "{status}");
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        // Fails only when it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits for something to read, or the end.
fn readable(fd: &impl std::os::fd::AsFd) {
    let timeout = Timespec { tv_sec: DEADLINE.as_secs() as i64, tv_nsec: 0 };
    let ready = poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&timeout)).unwrap();
    assert_eq!(ready, 1, "nothing for {DEADLINE:?}");
}

/// Tells the parent something.
pub(crate) fn say(line: &str) {
    // The test harness writes here too, without ends of lines.
    println!("\n{line}");
    io::stdout().flush().unwrap();
}

/// The parent's descriptor, passed as `stdin`.
pub(crate) const PASSED: c_int = 0;

pub(crate) fn start() {
    ok!(cuInit(0_u32));
}

/// Starts, with the primary context of a device current.
pub(crate) fn start_on(device: c_int) {
    start();
    retain(device);
}

/// Makes the primary context of a device current.
pub(crate) fn retain(device: c_int) {
    let mut context = 0_usize;
    ok!(cuDevicePrimaryCtxRetain(&mut context, device));
    ok!(cuCtxSetCurrent(context));
}

/// Asserts that this process holds nothing, when the contexts of these devices are released.
pub(crate) fn nothing_is_left(devices: &[c_int]) {
    for device in devices {
        ok!(cuDevicePrimaryCtxRelease_v2(*device));
    }
    assert_eq!(report(), [0; 9]);
}

/// Allocations, mappings, handles, streams, events, pinned, modules, contexts, reservations.
pub(crate) fn report() -> [u64; 9] {
    let mut counts = [0; 9];
    assert_eq!(cu!(kvxfer_standin_report(counts.as_mut_ptr(), counts.len())), 9);
    counts
}

pub(crate) fn free_memory() -> usize {
    let (mut free, mut total) = (0_usize, 0_usize);
    ok!(cuMemGetInfo_v2(&mut free, &mut total));
    free
}

pub(crate) const MIB: usize = 1 << 20;

/// `CUmemLocation` of a device.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Location {
    pub(crate) kind: c_int,
    pub(crate) id: c_int,
}

/// `CUmemAllocationProp`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Properties {
    pub(crate) kind: c_int,
    pub(crate) handles: c_int,
    pub(crate) location: Location,
    pub(crate) win32: usize,
    pub(crate) flags: [u8; 8],
}

/// `CUmemAccessDesc`.
#[repr(C)]
pub(crate) struct Access {
    pub(crate) location: Location,
    pub(crate) rights: c_int,
}

pub(crate) const POSIX: c_int = 1;

pub(crate) fn on(device: c_int) -> Location {
    Location { kind: 1, id: device }
}

/// Memory of a device that can be exported, and reached by RDMA.
pub(crate) fn properties(device: c_int) -> Properties {
    let flags = [0, 1, 0, 0, 0, 0, 0, 0];
    Properties { kind: 1, handles: POSIX, location: on(device), win32: 0, flags }
}

/// Creates physical memory; the code that the driver answers is the error.
pub(crate) fn create(device: c_int, bytes: usize) -> Result<u64, c_int> {
    let mut handle = 0_u64;
    match cu!(cuMemCreate(&mut handle, bytes, &properties(device), 0_u64)) {
        0 => Ok(handle),
        code => Err(code),
    }
}

pub(crate) fn export(handle: u64) -> OwnedFd {
    let mut fd: c_int = -1;
    ok!(cuMemExportToShareableHandle((&raw mut fd).cast::<u8>(), handle, POSIX, 0_u64));
    // SAFETY: the driver just made it.
    unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) }
}

pub(crate) fn import(fd: c_int) -> Result<u64, c_int> {
    let mut handle = 0_u64;
    match cu!(cuMemImportFromShareableHandle(&mut handle, fd as usize, POSIX)) {
        0 => Ok(handle),
        code => Err(code),
    }
}

/// Reserves addresses and maps memory there, for a device to read and write.
pub(crate) fn map(handle: u64, bytes: usize, device: c_int) -> u64 {
    let mut start = 0_u64;
    ok!(cuMemAddressReserve(&mut start, bytes, 0_usize, 0_u64, 0_u64));
    ok!(cuMemMap(start, bytes, 0_usize, handle, 0_u64));
    assert_eq!(set_access(start, bytes, device, 3), 0);
    start
}

pub(crate) fn set_access(start: u64, bytes: usize, device: c_int, rights: c_int) -> c_int {
    let access = Access { location: on(device), rights };
    cu!(cuMemSetAccess(start, bytes, &access, 1_usize))
}

/// Undoes [`map`].
pub(crate) fn unmap(start: u64, bytes: usize) {
    ok!(cuMemUnmap(start, bytes));
    ok!(cuMemAddressFree(start, bytes));
}
