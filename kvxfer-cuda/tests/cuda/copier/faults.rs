//! What a driver refuses, or reports afterwards, ends tasks with typed errors, and leaves nothing.

use kvxfer_core::{Error, ErrorKind};
use kvxfer_cuda::device::CopierConfig;
use kvxfer_cuda::driver::{Device, DevicePtr, Priority, cuda};

use super::{KERNEL, Rig, event, span, standin, sum};
use crate::harness::{DEADLINE, Peer, device, finish, live, on_standin, parent, skip};

const TEST: &str = "copier::faults::child";
/// By the kernel, and by batches.
const LENGTHS: [u64; 2] = [64, 4096];
const TASKS: usize = 4;
/// Of a task's own memory: what can't be seen to end may still read it when the next task is made.
const ROOM: u64 = 1 << 14;
const ASTRAY: u64 = 8;

/// What came of [`TASKS`] tasks, one after the other; one error where the copier did not even start.
struct Outcome {
    results: Vec<Result<(), Error>>,
    broken: Option<Error>,
    /// Whether it is known that nothing runs any more.
    drained: bool,
}

/// Copies fresh bytes by both ways, after an event of an engine's stream.
fn copy(rig: &mut Rig, device: &Device, memory: DevicePtr, byte: u8) -> Result<(), Error> {
    let all = LENGTHS.iter().sum::<u64>();
    let engine = device.stream(Priority::Default)?;
    let written = event(device);
    engine.fill(memory, byte, all)?;
    engine.record(&written)?;
    engine.synchronize()?;
    rig.copier.wait_for(&written)?;
    let mut at = 0;
    let spans = LENGTHS.map(|len| {
        let from = memory.offset(at);
        at += len;
        span(from, from.offset(all), len)
    });
    rig.copier.submit(7, &spans)?;
    let sums = LENGTHS.map(|len| sum(&vec![byte; len as usize]));
    let expected = sums.iter().fold(0_u64, |all, sum| all.wrapping_add(*sum));
    assert_eq!(rig.collect(1).remove(0).result?, expected);
    Ok(())
}

fn outcome(rig: &mut Rig, results: Vec<Result<(), Error>>) -> Outcome {
    let drained = rig.copier.drain(DEADLINE).is_ok();
    if !drained {
        // Who owns the memory keeps it. Here all runs to its end, and asking shows it.
        finish(rig.copier.launched());
    }
    Outcome { results, broken: rig.copier.is_broken(), drained }
}

fn scenario(device: &Device) -> Outcome {
    let config = CopierConfig { kernel_below: Some(1024), ..KERNEL };
    let mut rig = match Rig::try_new(device, config) {
        Ok(rig) => rig,
        Err(error) => return Outcome { results: vec![Err(error)], broken: None, drained: true },
    };
    let memory = device.buffer(TASKS as u64 * ROOM).unwrap();
    let results = (0..TASKS as u64)
        .map(|i| copy(&mut rig, device, memory.ptr().offset(i * ROOM), i as u8 + 1))
        .collect();
    assert_eq!(rig.copier.pending(), 0);
    outcome(&mut rig, results)
}

/// A copy to where nothing is.
fn astray(device: &Device) -> Outcome {
    let mut rig = Rig::new(device, KERNEL);
    let memory = device.buffer(ROOM).unwrap();
    let before = copy(&mut rig, device, memory.ptr(), 1);
    // SAFETY: not at all; this process is here to see what the device does then.
    let nowhere = unsafe { DevicePtr::from_raw(1 << 46) };
    // Each in a launch of its own, more than are under way at a time.
    for task in 0..ASTRAY {
        rig.copier.wait_for(&event(device)).unwrap();
        rig.copier.submit(task, &[span(memory.ptr(), nowhere, 64)]).unwrap();
    }
    let mut results = vec![before];
    let done = rig.collect(ASTRAY as usize);
    assert!(done.iter().map(|done| done.task).eq(0..ASTRAY));
    results.extend(done.into_iter().map(|done| done.result.map(drop)));
    results.push(copy(&mut rig, device, memory.ptr(), 2));
    outcome(&mut rig, results)
}

/// In whichever stand-in this process has. Says for each task "ok" or its error, whether the copier is broken,
/// whether it could be drained, and whether something is left.
#[test]
fn child() {
    for role in ["copies", "astray"] {
        let Some(mut parent) = parent(role) else { continue };
        let Outcome { results, broken, drained } = {
            let device = Device::open(cuda().unwrap(), 0).unwrap();
            if role == "astray" { astray(&device) } else { scenario(&device) }
        };
        let errors = results.iter().filter_map(|result| result.as_ref().err()).chain(&broken);
        assert!(errors.clone().all(|error| error.kind() == ErrorKind::Device), "{results:?}");
        assert!(errors.clone().all(|error| !error.retryable()));
        let say = |error: Option<&Error>| error.map_or("ok".into(), ToString::to_string);
        let mut lines: Vec<_> = results.iter().map(|result| say(result.as_ref().err())).collect();
        lines.push(say(broken.as_ref()));
        lines.push(drained.to_string());
        lines.push(live().is_some_and(|counts| counts.iter().any(|&count| count > 0)).to_string());
        parent.say(&lines.join("\n"));
        // Another device goes on.
        if let Ok(other) = Device::open(cuda().unwrap(), 1)
            && results.len() > 1
            && broken.is_some()
        {
            let mut rig = Rig::new(&other, KERNEL);
            let memory = other.buffer(ROOM).unwrap();
            copy(&mut rig, &other, memory.ptr(), 3).unwrap();
        }
    }
}

/// What became of each task ("ok" or the error), of the copier, and whether something is left.
fn run(role: &str, faults: &str) -> (Vec<String>, String, bool) {
    let setting = standin(faults);
    let mut peer = Peer::start_with(TEST, role, &[("KVXFER_STANDIN", &setting)]);
    let said = peer.wire.hear();
    peer.succeeds();
    let mut lines: Vec<_> = said.lines().map(str::to_owned).collect();
    let left = lines.pop().unwrap() == "true";
    assert_eq!(lines.pop().unwrap() == "true", !left, "who can't drain it, leaks it");
    let broken = lines.pop().unwrap();
    (lines, broken, left)
}

#[test]
fn without_memory_or_a_kernel_there_is_no_copier() {
    let _device = device!();
    if !on_standin() {
        return skip("only the stand-in fails on order");
    }
    for (call, times) in [
        ("cuStreamCreateWithPriority", 1),
        ("cuEventCreate", 5),
        ("cuMemHostAlloc", 4),
        ("cuMemAlloc", 4),
        ("cuModuleLoadData", 1),
        ("cuModuleGetFunction", 1),
    ] {
        for nth in 1..=times {
            let (results, _, left) = run("copies", &format!("fail={call}:{nth}:2"));
            let [error] = &results[..] else { panic!("{call} {nth}: {results:?}") };
            assert!(error.contains(call) && error.contains("OUT_OF_MEMORY"), "{error}");
            assert!(!left, "{call} {nth} leaves something");
        }
    }
}

#[test]
fn a_launch_that_fails_ends_its_task_only() {
    let _device = device!();
    if !on_standin() {
        return skip("only the stand-in fails on order");
    }
    for call in ["cuMemcpyHtoDAsync", "cuMemcpyBatchAsync", "cuLaunchKernel", "cuMemcpyDtoHAsync"] {
        let (results, broken, left) = run("copies", &format!("fail={call}:2:701"));
        assert!(results[1].contains(call), "{results:?}");
        assert_eq!([&*results[0], &results[2], &results[3], &broken], ["ok"; 4], "{call}");
        assert!(!left, "{call} leaves something");
    }
}

#[test]
fn what_only_tells_of_the_end_has_a_second_way() {
    let _device = device!();
    if !on_standin() {
        return skip("only the stand-in fails on order");
    }
    // The engine's record is the first of each task's three, then comes the one for those who reuse blocks.
    let (results, broken, left) = run("copies", "fail=cuEventRecord:5:400");
    assert!(results[1].contains("cuEventRecord"), "{results:?}");
    assert_eq!([&*results[0], &results[2], &results[3], &broken], ["ok"; 4]);
    assert!(!left);
    for fault in ["fail=cuEventRecord:6:400", "fail=cuEventSynchronize:0:400"] {
        let (results, broken, left) = run("copies", fault);
        assert!(results.iter().chain([&broken]).all(|result| result == "ok"), "{results:?}");
        assert!(!left, "{fault}");
    }
}

#[test]
fn without_order_nothing_more_is_copied() {
    let _device = device!();
    if !on_standin() {
        return skip("only the stand-in fails on order");
    }
    let (results, broken, left) = run("copies", "fail=cuStreamWaitEvent:2:400");
    assert_eq!(results[0], "ok");
    for error in results[1..].iter().chain([&broken]) {
        assert!(error.contains("cuStreamWaitEvent"), "{error}");
    }
    assert!(!left);
}

#[test]
fn a_sticky_error_ends_all_tasks_and_one_device() {
    let _device = device!();
    if !on_standin() {
        return skip("only the stand-in fails on order");
    }
    for call in ["cuMemcpyHtoDAsync", "cuMemcpyBatchAsync", "cuLaunchKernel", "cuEventSynchronize"]
    {
        let (results, broken, left) = run("copies", &format!("sticky={call}:2:719"));
        assert_eq!(results[0], "ok", "{call}");
        for error in results[1..].iter().chain([&broken]) {
            assert!(error.contains("LAUNCH_FAILED"), "{call}: {error}");
        }
        assert!(!left, "{call} leaves something");
    }
}

/// What the device itself finds out.
#[test]
fn a_copy_to_nowhere_ends_all_tasks() {
    let _device = device!();
    let (results, broken, left) = run("astray", "");
    assert_eq!(results.len(), ASTRAY as usize + 2);
    assert_eq!(results[0], "ok");
    for error in results[1..].iter().chain([&broken]) {
        assert!(error.contains("ILLEGAL_ADDRESS"), "{error}");
    }
    assert!(!left);
}

#[test]
fn what_can_not_be_seen_to_end_is_never_freed() {
    let _device = device!();
    if !on_standin() {
        return skip("only the stand-in fails on order");
    }
    let (results, broken, left) =
        run("copies", "fail=cuEventSynchronize:2:400,cuStreamSynchronize:3:400");
    assert_eq!(results[0], "ok");
    for error in results[1..].iter().chain([&broken]) {
        assert!(error.contains("cuStreamSynchronize"), "{error}");
    }
    assert!(left);
}
