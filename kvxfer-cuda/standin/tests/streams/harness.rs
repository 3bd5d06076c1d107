//! Each test runs in a process of its own whose driver is the stand-in; and a little order in the
//! driver's calls.

use std::any::type_name;
use std::ffi::c_void;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, ptr};

use cudarc::driver::sys::{self, CUresult};

/// What no child needs as long as.
const DEADLINE: Duration = Duration::from_secs(60);

/// Runs the test's body in a child on the stand-in so configured, once per configuration, and fails
/// when one fails. To be called once in a test, with a closure of the test's own.
pub fn on_standin<F: Fn()>(configs: &[String], body: F) {
    on_standin_but(0, configs, body);
}

/// The same; so many may fail.
pub fn on_standin_but<F: Fn()>(may_fail: usize, configs: &[String], body: F) {
    if env::var_os("KVXFER_STANDIN_CHILD").is_some() {
        return body();
    }
    // "streams::module::test::{{closure}}"
    let name = type_name::<F>().split_once("::").expect("a path").1;
    let name = name.split("::{{").next().expect("a name");
    let failed: Vec<&String> = configs.iter().filter(|config| !run(name, config)).collect();
    assert!(failed.len() <= may_fail, "{name} failed with {failed:?}");
}

/// The same configuration under some seeds.
pub fn seeds(config: &str) -> Vec<String> {
    (0..12).map(|seed| format!("seed={seed};{config}")).collect()
}

/// Whether it passes.
fn run(name: &str, config: &str) -> bool {
    let mut child = Command::new(env::current_exe().expect("this program"))
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env("KVXFER_STANDIN_CHILD", "1")
        .env("KVXFER_STANDIN", config)
        .env("LD_LIBRARY_PATH", folder())
        .stdout(Stdio::null())
        .spawn()
        .expect("a child");
    let end = Instant::now() + DEADLINE;
    let status = loop {
        if let Some(status) = child.try_wait().expect("a status") {
            break status;
        }
        if Instant::now() > end {
            child.kill().expect("it is ours");
            child.wait().expect("a status");
            panic!("{name} ({config}) took more than {DEADLINE:?}");
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    status.success()
}

/// A folder that has the stand-in as `libcuda.so.1`.
fn folder() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("libcuda");
    let built = env::current_exe().expect("this program").with_file_name("libkvxfer_standin.so");
    assert!(built.exists(), "{} is built with this test", built.display());
    fs::create_dir_all(&folder).expect("a folder");
    let link = folder.join("libcuda.so.1");
    if fs::read_link(&link).is_ok_and(|to| to == built) {
        return folder;
    }
    // Another test may do the same.
    let new = folder.join(format!("new-{:?}", std::thread::current().id()));
    symlink(built, &new).expect("a link");
    fs::rename(new, link).expect("the link in its place");
    folder
}

/// Calls the driver; answers its code.
macro_rules! code {
    ($name:ident($($arg:expr),* $(,)?)) => {
        // SAFETY: the tests keep to the driver's rules, or break them on purpose where the stand-in answers.
        unsafe { cudarc::driver::sys::$name($($arg),*) }
    };
}

/// Calls the driver, which must succeed.
macro_rules! cu {
    ($name:ident($($arg:expr),* $(,)?)) => {
        assert_eq!(
            code!($name($($arg),*)),
            cudarc::driver::sys::CUresult::CUDA_SUCCESS,
            stringify!($name)
        )
    };
}

pub type Stream = sys::CUstream;
pub type Event = sys::CUevent;

/// Makes a device's context current.
pub fn bind(ordinal: i32) -> sys::CUcontext {
    let (mut device, mut context) = (0, ptr::null_mut());
    cu!(cuInit(0));
    cu!(cuDeviceGet(&mut device, ordinal));
    cu!(cuDevicePrimaryCtxRetain(&mut context, device));
    cu!(cuCtxSetCurrent(context));
    context
}

/// A stream that is not ordered with the NULL stream.
pub fn stream() -> Stream {
    let mut stream = ptr::null_mut();
    cu!(cuStreamCreate(&mut stream, 1));
    stream
}

pub fn event() -> Event {
    let mut event = ptr::null_mut();
    cu!(cuEventCreate(&mut event, 3));
    event
}

/// An event behind what the stream has.
pub fn recorded(stream: Stream) -> Event {
    let event = event();
    cu!(cuEventRecord(event, stream));
    event
}

pub fn device(bytes: usize) -> u64 {
    let mut at = 0;
    cu!(cuMemAlloc_v2(&mut at, bytes));
    at
}

/// Pinned host memory, zero.
pub fn pinned(bytes: usize) -> *mut u8 {
    let mut at: *mut c_void = ptr::null_mut();
    cu!(cuMemHostAlloc(&mut at, bytes, 0));
    at.cast()
}

pub fn write(at: *mut u8, bytes: &[u8]) {
    // SAFETY: tests name pinned memory of at least that size.
    unsafe { at.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
}

pub fn read(at: *const u8, len: usize) -> Vec<u8> {
    // SAFETY: as above.
    unsafe { std::slice::from_raw_parts(at, len) }.to_vec()
}

/// Opens or closes a gate: a value that a stream waits for.
pub fn set(gate: *mut u8, value: u32) {
    // SAFETY: as above; aligned, as it is the start of an allocation.
    unsafe { gate.cast::<u32>().write_volatile(value) };
}

pub fn gate(stream: Stream, gate: *mut u8) {
    cu!(cuStreamWaitValue32_v2(stream, gate as u64, 1, 0));
}

/// What came of work that may be ordered wrongly.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    Right,
    /// Other bytes than expected.
    Wrong,
    /// An illegal address, from then on.
    Broken,
}

/// Waits for a stream and compares pinned memory.
pub fn outcome(streams: &[Stream], at: *const u8, expected: &[u8]) -> Outcome {
    for stream in streams {
        match code!(cuStreamSynchronize(*stream)) {
            CUresult::CUDA_SUCCESS => {}
            CUresult::CUDA_ERROR_ILLEGAL_ADDRESS => return Outcome::Broken,
            other => panic!("{other:?}"),
        }
    }
    if read(at, expected.len()) == expected { Outcome::Right } else { Outcome::Wrong }
}

/// How many of a kind are alive.
pub fn live(kind: &str) -> u64 {
    type Report = unsafe extern "C" fn(*mut u64, usize) -> i32;
    let kinds = ["allocations", "mappings", "handles", "streams", "events", "pinned", "modules"];
    let mut counts = [0; 7];
    // SAFETY: the stand-in is loaded, and its function has this type.
    unsafe {
        let report = sys::culib().get::<Report>(b"kvxfer_standin_report").expect("the stand-in");
        report(counts.as_mut_ptr(), counts.len());
    }
    counts[kinds.iter().position(|name| *name == kind).expect("a kind")]
}
