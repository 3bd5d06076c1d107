//! Each thing that a driver can refuse ends as a typed error, and what was made until then is given back.
//!
//! The stand-in refuses on order, so each case is a child process with a stand-in of its own. Real drivers skip this.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};
use std::sync::Arc;

use kvxfer_cuda::driver::{Copy, CudaError, Device, PeerLink, Priority, Sharing, cuda};

use crate::harness::{
    Peer, Wire, drain, driver, get, live, on_standin, parent, put, scratch, skip, two_devices,
};

/// Uses everything once.
fn scenario() -> Result<(), CudaError> {
    let driver = cuda()?;
    Device::count(&driver)?;
    let device = Device::open(Arc::clone(&driver), 0)?;
    device.bind()?;
    device.driver_version()?;
    device.multiprocessors()?;
    device.memory()?;
    let peer = Device::open(driver, 1)?;
    device.link_to(peer.uuid())?;

    let physical = Arc::new(device.allocate(1 << 20)?);
    let mapped = device.map(Arc::clone(&physical))?;
    mapped.rdma_verified()?;
    let import = device.import(physical.export()?.as_fd(), physical.bytes())?;
    let import = device.map(Arc::new(import))?;
    peer.map(physical)?;
    let buffer = device.buffer(2 << 20)?;
    device.allocate_as(Sharing::Legacy, 1)?.share()?;
    let pinned = device.pinned(4096)?;

    let [side, other] = [device.stream(Priority::Lowest)?, device.stream(Priority::Default)?];
    let [first, last] = [device.event()?, device.event()?];
    let work = || {
        // Whatever happens, the stream is not left waiting.
        pinned.write(0, &1_u32.to_ne_bytes())?;
        side.hold(&pinned, 0, 1)?;
        side.upload(mapped.ptr(), &pinned, 0, 4096)?;
        side.copy(buffer.ptr(), mapped.ptr(), 4096)?;
        let to = |at| Copy { dst: buffer.ptr().offset(at), src: import.ptr(), len: 64 };
        side.copy_batch(&[to(4096), to(5000)])?;
        side.record(&first)?;
        other.wait(&first)?;
        other.fill(buffer.ptr(), 1, 64)?;
        other.download(&pinned, 0, buffer.ptr(), 4096)?;
        other.record(&last)?;
        last.is_done()?;
        last.wait()?;
        other.is_idle()?;
        other.synchronize()
    };
    let result = work();
    // Whose work it is waits for it, failed or not.
    let drained = [&side, &other].map(|stream| stream.synchronize());
    drained.into_iter().fold(result, Result::and)
}

/// The driver, and the first device.
fn start() -> Result<(), CudaError> {
    let driver = cuda()?;
    // What was found is the answer to all who ask.
    assert!(Arc::ptr_eq(&driver, &cuda()?));
    Device::open(driver, 0).map(drop)
}

/// Memory of a device that this process may not see.
fn import(parent: &mut Wire) -> Result<(), CudaError> {
    let (_, fd) = parent.receive_fd::<1>();
    let device = Device::open(cuda()?, 0)?;
    device.import(fd.as_fd(), 2 << 20).map(drop)
}

/// Memory of a device that the first one doesn't reach.
fn unreachable() -> Result<(), CudaError> {
    let driver = cuda()?;
    let [own, peer] = [Device::open(Arc::clone(&driver), 0)?, Device::open(driver, 1)?];
    assert!(matches!(own.link_to(peer.uuid())?, PeerLink::None { .. }));
    own.map(Arc::new(peer.allocate(1 << 20)?)).map(drop)
}

/// Work that ends the first device's context; then the second device, which goes on.
fn broken() -> Result<(), CudaError> {
    let driver = cuda()?;
    let [broken, sound] = [Device::open(Arc::clone(&driver), 0)?, Device::open(driver, 1)?];
    let result = {
        let (stream, event) = (broken.stream(Priority::Default)?, broken.event()?);
        let (buffer, pinned) = (broken.buffer(4096)?, broken.pinned(64)?);
        let mapped = broken.map(Arc::new(broken.allocate(1 << 20)?))?;
        stream.upload(mapped.ptr(), &pinned, 0, 64)?;
        let result = stream.copy(buffer.ptr(), mapped.ptr(), 64);
        // Whatever is asked afterwards answers the same.
        for after in [
            stream.fill(buffer.ptr(), 1, 1),
            stream.record(&event),
            event.wait(),
            stream.synchronize(),
            stream.is_idle().map(drop),
            broken.buffer(4096).map(drop),
            broken.allocate(1).map(drop),
            broken.memory().map(drop),
        ] {
            let error = after.unwrap_err();
            assert!(error.is_sticky(), "{error}");
            assert_eq!(error.code(), result.as_ref().unwrap_err().code());
        }
        result
    };
    let stream = sound.stream(Priority::Default)?;
    let buffer = sound.buffer(4096)?;
    put(&sound, buffer.ptr(), &[1; 4096]);
    stream.fill(buffer.ptr(), 2, 64)?;
    drain(&stream);
    assert_eq!(get(&sound, buffer.ptr(), 65)[63..], [2, 1]);
    result
}

/// Does what its role says in whichever stand-in this process has; then says what came of it, and what is
/// left.
#[test]
fn child() {
    for role in ["scenario", "start", "import", "unreachable", "broken"] {
        let Some(mut parent) = parent(role) else { continue };
        let result = match role {
            "start" => start(),
            "import" => import(&mut parent),
            "unreachable" => unreachable(),
            "broken" => broken(),
            _ => scenario(),
        };
        say(&mut parent, &result);
    }
}

fn say(parent: &mut Wire, result: &Result<(), CudaError>) {
    let text = result.as_ref().map_or_else(ToString::to_string, |()| "fine".to_owned());
    let left = live().map_or(0, |counts| counts.iter().sum());
    parent.say(&format!("{result:?}\n{text}\n{left}"));
}

/// What came of everything.
#[derive(Debug)]
struct Outcome {
    result: String,
    text: String,
    left: u64,
}

fn with(standin: &str) -> Outcome {
    run("scenario", &[("KVXFER_STANDIN", standin)])
}

fn run(role: &str, env: &[(&str, &str)]) -> Outcome {
    outcome(Peer::start_with("faults::child", role, env))
}

fn outcome(mut peer: Peer) -> Outcome {
    let said = peer.wire.hear();
    peer.succeeds();
    let mut lines = said.lines().map(str::to_owned);
    let mut line = || lines.next().unwrap();
    Outcome { result: line(), text: line(), left: line().parse().unwrap() }
}

/// Whether there is no stand-in, which is said.
fn no_standin() -> bool {
    if driver().is_none() {
        return true;
    }
    if !on_standin() {
        skip("only the stand-in fails on order");
    }
    !on_standin()
}

fn failed(call: &str, code: i32) -> String {
    format!("Err(Failed {{ call: {call:?}, code: {code} }})")
}

/// Calls that the scenario can fail in, with the name that a fault has.
const CALLS: [&str; 38] = [
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetName",
    "cuDeviceGetUuid_v2",
    "cuDevicePrimaryCtxRetain",
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuThreadExchangeStreamCaptureMode",
    "cuDriverGetVersion",
    "cuDeviceGetAttribute",
    "cuMemGetInfo_v2",
    "cuDeviceCanAccessPeer",
    "cuDeviceGetP2PAttribute",
    "cuMemGetAllocationGranularity",
    "cuMemCreate",
    "cuMemAddressReserve",
    "cuMemMap",
    "cuMemSetAccess",
    "cuPointerGetAttribute",
    "cuMemExportToShareableHandle",
    "cuMemImportFromShareableHandle",
    "cuMemAlloc_v2",
    "cuIpcGetMemHandle",
    "cuMemHostAlloc",
    "cuCtxGetStreamPriorityRange",
    "cuStreamCreateWithPriority",
    "cuEventCreate",
    "cuStreamWaitValue32_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyAsync",
    "cuMemcpyBatchAsync",
    "cuEventRecord",
    "cuStreamWaitEvent",
    "cuMemsetD8Async",
    "cuEventQuery",
    "cuEventSynchronize",
    "cuMemcpyDtoHAsync_v2",
    "cuStreamSynchronize",
];

fn base(call: &str) -> &str {
    call.trim_end_matches("_v2")
}

#[test]
fn without_faults_it_is_fine_and_nothing_is_left() {
    if no_standin() {
        return;
    }
    let outcome = with("");
    assert_eq!((outcome.result.as_str(), outcome.left), ("Ok(())", 0), "{}", outcome.text);
}

#[test]
fn each_call_that_fails_is_named_and_nothing_is_left() {
    if no_standin() {
        return;
    }
    for call in CALLS {
        // A code of a driver that is newer than we are.
        for (nth, code) in [(1, 400), (2, 4321)] {
            let outcome = with(&format!("fail={}:{nth}:{code}", base(call)));
            if nth == 1 || outcome.result != "Ok(())" {
                assert_eq!(outcome.result, failed(call, code), "{}", outcome.text);
            }
            assert!(outcome.text.contains(&code.to_string()) || outcome.text == "fine");
            assert_eq!(outcome.left, 0, "{call} {nth}: something is left");
        }
    }
}

#[test]
fn what_can_not_be_given_back_is_no_panic() {
    if no_standin() {
        return;
    }
    for call in [
        "cuMemRelease",
        "cuMemAddressFree",
        "cuMemUnmap",
        "cuMemFree",
        "cuMemFreeHost",
        "cuStreamDestroy",
        "cuEventDestroy",
        "cuDevicePrimaryCtxRelease",
    ] {
        assert_eq!(with(&format!("fail={call}:0:999")).result, "Ok(())", "{call}");
    }
}

#[test]
fn a_driver_that_is_not_there_is_an_error() {
    if no_standin() {
        return;
    }
    let starts = |env: &[(&str, &str)]| {
        let outcome = run("start", env);
        assert_eq!(outcome.left, 0);
        outcome.result
    };
    assert_eq!(starts(&[("KVXFER_STANDIN", "")]), "Ok(())");
    assert_eq!(starts(&[("KVXFER_STANDIN", "devices=0")]), "Err(NoDevice)");
    assert_eq!(starts(&[("CUDA_VISIBLE_DEVICES", "")]), "Err(NoDevice)");
    let missing = |symbol: &str| format!("Err(MissingSymbol {{ symbol: {symbol:?} }})");
    for symbol in ["cuInit", "cuMemCreate", "cuMemAlloc_v2", "cuLaunchKernel"] {
        let standin = format!("missing={symbol}");
        assert_eq!(starts(&[("KVXFER_STANDIN", &standin)]), missing(symbol));
    }
    // Some library that is no driver at all.
    let folder = scratch().join("no-driver");
    fs::create_dir_all(&folder).unwrap();
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let libc = maps.split_whitespace().find(|word| word.ends_with("/libc.so.6")).unwrap();
    let _ = fs::remove_file(folder.join("libcuda.so.1"));
    symlink(libc, folder.join("libcuda.so.1")).unwrap();
    assert_eq!(starts(&[("LD_LIBRARY_PATH", folder.to_str().unwrap())]), missing("cuInit"));
    // A driver that does not start, and the stub of a toolkit.
    assert_eq!(starts(&[("KVXFER_STANDIN", "fail=cuInit:1:803")]), failed("cuInit", 803));
    assert!(starts(&[("KVXFER_STANDIN", "fail=cuInit:1:34")]).starts_with("Err(NoLibrary"));
}

#[test]
fn out_of_memory_is_told_from_other_errors() {
    if no_standin() {
        return;
    }
    for call in ["cuMemCreate", "cuMemAlloc_v2", "cuMemHostAlloc", "cuDevicePrimaryCtxRetain"] {
        let outcome = with(&format!("fail={}:1:2", base(call)));
        assert_eq!((outcome.result, outcome.left), (failed(call, 2), 0));
        assert_eq!(outcome.text, format!("{call}: CUDA_ERROR_OUT_OF_MEMORY (2)"));
    }
    // The scenario needs 4 MiB on the first device at once.
    let outcome = with("memory=3MiB");
    assert_eq!((outcome.result, outcome.left), (failed("cuMemAlloc_v2", 2), 0));
}

#[test]
fn memory_of_a_hidden_device_is_refused() {
    if no_standin() {
        return;
    }
    let Some(devices) = two_devices() else { return };
    let physical = devices[1].allocate(1 << 20).unwrap();
    for (standin, result) in [
        ("", "Ok(())".to_owned()),
        ("hidden=1", failed("cuMemImportFromShareableHandle", 101)),
        (
            "fail=cuMemImportFromShareableHandle:1:999",
            failed("cuMemImportFromShareableHandle", 999),
        ),
    ] {
        // With what this process has, for the ledger has to be the same.
        let own = std::env::var("KVXFER_STANDIN").unwrap_or_default();
        let standin = format!("{own};{standin}");
        let mut peer = Peer::start_with("faults::child", "import", &[("KVXFER_STANDIN", &standin)]);
        peer.wire.send_fd(&[0], physical.export().unwrap().as_fd());
        let outcome = outcome(peer);
        assert_eq!((outcome.result, outcome.left), (result, 0), "{standin}");
    }
}

#[test]
fn memory_is_shared_over_a_fabric_where_there_is_one() {
    if no_standin() {
        return;
    }
    let own = std::env::var("KVXFER_STANDIN").unwrap_or_default();
    let test = "contract::sharing::memory_is_shared_over_a_fabric";
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test])
        .env("KVXFER_STANDIN", format!("{own};fabric=1"))
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !errors.contains("skipped"), "{errors}");
}

#[test]
fn a_peer_out_of_reach_is_refused() {
    if no_standin() {
        return;
    }
    let outcome = run("unreachable", &[("KVXFER_STANDIN", "nvlink=")]);
    assert!(outcome.result.starts_with("Err(Failed { call: \"cuMemSetAccess\""), "{outcome:?}");
    assert_eq!(outcome.left, 0);
    let outcome = with("fail=cuMemSetAccess:2:217");
    assert_eq!((outcome.result, outcome.left), (failed("cuMemSetAccess", 217), 0));
}

#[test]
fn a_sticky_error_ends_one_device_only() {
    if no_standin() {
        return;
    }
    for code in [700, 719] {
        let standin = format!("sticky=cuMemcpyAsync:1:{code}");
        let outcome = run("broken", &[("KVXFER_STANDIN", &standin)]);
        assert_eq!(outcome.result, failed("cuMemcpyAsync", code), "{}", outcome.text);
        assert_eq!(outcome.left, 0, "{code}");
    }
}

#[test]
fn without_batches_copies_are_the_same() {
    if no_standin() {
        return;
    }
    for (driver, result) in [
        (12020, "Ok(())".to_owned()),
        (12080, failed("cuMemcpyBatchAsync", 400)),
        (13000, failed("cuMemcpyBatchAsync_v2", 400)),
    ] {
        let outcome = with(&format!("driver={driver};fail=cuMemcpyBatchAsync:1:400"));
        assert_eq!((outcome.result, outcome.left), (result, 0));
    }
    for standin in ["driver=12020", "driver=12080", "driver=13000", "fail=cuMemcpyBatchAsync:0:801"]
    {
        let status = Command::new(std::env::current_exe().unwrap())
            .arg("contract::copies::")
            .env("KVXFER_STANDIN", standin)
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(status.success(), "{standin}");
    }
}
