//! What ends, and what must end.

use std::path::Path;
use std::time::{Duration, Instant};

use cudarc::driver::sys::CUresult;

use crate::harness::{
    bind, device, event, gate, live, on_standin, pinned, read, seeds, set, stream,
};

const BLOCK: usize = 64 << 10;

#[test]
fn a_process_may_end_with_work_that_waits_for_ever() {
    on_standin(&seeds(""), || {
        bind(0);
        let (stream, door, kv) = (stream(), pinned(4096), device(BLOCK));
        gate(stream, door);
        cu!(cuMemsetD8Async(kv, 1, BLOCK, stream));
        // Somebody waits for it, too.
        let address = stream as usize;
        std::thread::spawn(move || {
            bind(0);
            code!(cuStreamSynchronize(address as _))
        });
        assert_eq!(code!(cuStreamQuery(stream)), CUresult::CUDA_ERROR_NOT_READY);
    });
}

#[test]
fn waiting_for_what_never_comes_ends_in_an_error() {
    on_standin(&["stuck=100".into()], || {
        bind(0);
        let (stream, door) = (stream(), pinned(4096));
        gate(stream, door);
        let start = Instant::now();
        assert_eq!(code!(cuStreamSynchronize(stream)), CUresult::CUDA_ERROR_LAUNCH_TIMEOUT);
        assert!(start.elapsed() >= Duration::from_millis(100));
        // Nothing is broken by that.
        set(door, 1);
        cu!(cuStreamSynchronize(stream));
    });
}

#[test]
fn a_destroyed_stream_ends_its_work() {
    on_standin(&seeds("delay=5"), || {
        bind(0);
        let (stream, door, flag) = (stream(), pinned(4096), pinned(4096));
        gate(stream, door);
        cu!(cuStreamWriteValue32_v2(stream, flag as u64, 9, 0));
        cu!(cuStreamDestroy_v2(stream));
        assert_eq!(live("streams"), 0);
        assert_eq!(read(flag, 1), [0]);
        set(door, 1);
        while read(flag, 1) != [9] {
            std::thread::yield_now();
        }
    });
}

#[test]
fn what_is_made_and_destroyed_is_counted() {
    on_standin(&["".into()], || {
        bind(0);
        let kept = (stream(), event());
        let (gone, done) = (stream(), event());
        assert_eq!((live("streams"), live("events")), (2, 2));
        cu!(cuStreamDestroy_v2(gone));
        cu!(cuEventDestroy_v2(done));
        // The NULL stream is nobody's.
        cu!(cuMemsetD8_v2(device(8), 0, 8));
        assert_eq!((live("streams"), live("events")), (1, 1));
        // With the context goes all that it has.
        let mut current = 0;
        cu!(cuCtxGetDevice(&mut current));
        cu!(cuDevicePrimaryCtxRelease_v2(current));
        assert_eq!((live("streams"), live("events")), (0, 0));
        let _ = kept;
    });
}

#[test]
fn nothing_runs_while_nothing_is_to_be_done() {
    on_standin(&["delay=1".into()], || {
        bind(0);
        let stream = stream();
        cu!(cuMemsetD8Async(device(8), 0, 8, stream));
        cu!(cuStreamSynchronize(stream));
        let before = cpu_time();
        std::thread::sleep(Duration::from_millis(300));
        let spent = cpu_time() - before;
        assert!(spent < Duration::from_millis(20), "{spent:?} of 300 ms");
    });
}

/// What this process has used.
fn cpu_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("readable");
    let fields: Vec<&str> = stat.rsplit(')').next().expect("fields").split_whitespace().collect();
    // User and system time, in hundredths of a second.
    let ticks: u64 =
        fields[11..13].iter().map(|ticks| ticks.parse::<u64>().expect("a number")).sum();
    Duration::from_millis(10 * ticks)
}

#[test]
fn work_that_was_dropped_with_its_device_holds_nobody_up() {
    on_standin(&seeds("sticky=cuMemGetInfo:1:719"), || {
        bind(0);
        let (stream, door) = (stream(), pinned(4096));
        gate(stream, door);
        let address = stream as usize;
        let (say, bound) = std::sync::mpsc::channel();
        let waiter = std::thread::spawn(move || {
            bind(0);
            say.send(std::fs::read_link("/proc/thread-self")).expect("somebody listens");
            code!(cuStreamSynchronize(address as _))
        });
        let waiting = bound.recv().expect("it says so").expect("its name");
        let start = Instant::now();
        while !sleeps(&waiting) {
            assert!(start.elapsed() < Duration::from_secs(20), "it does not wait");
            std::thread::yield_now();
        }
        let start = Instant::now();
        let (mut free, mut total) = (0, 0);
        let failed = CUresult::CUDA_ERROR_LAUNCH_FAILED;
        assert_eq!(code!(cuMemGetInfo_v2(&mut free, &mut total)), failed);
        assert_eq!(code!(cuStreamQuery(stream)), failed);
        // Whoever came before the failure is woken by it, who came after is refused.
        assert_eq!(waiter.join().map_err(drop), Ok(failed));
        assert!(start.elapsed() < Duration::from_secs(20), "woken by nobody");
    });
}

fn sleeps(thread: &Path) -> bool {
    let stat = Path::new("/proc").join(thread).join("stat");
    let stat = std::fs::read_to_string(stat).expect("readable");
    stat.rsplit(')').next().is_some_and(|fields| fields.starts_with(" S"))
}

#[test]
fn late_failures_come_when_the_work_would_run() {
    on_standin(&seeds("late=cuMemsetD8Async:2:719"), || {
        bind(0);
        let (stream, kv) = (stream(), device(8));
        cu!(cuMemsetD8Async(kv, 1, 8, stream));
        cu!(cuStreamSynchronize(stream));
        cu!(cuMemsetD8Async(kv, 1, 8, stream));
        let failed = CUresult::CUDA_ERROR_LAUNCH_FAILED;
        assert_eq!(code!(cuStreamSynchronize(stream)), failed);
        assert_eq!(code!(cuMemsetD8Async(kv, 1, 8, stream)), failed);
    });
}

#[test]
fn work_that_never_ends_holds_its_stream_and_no_other() {
    on_standin(&seeds("late=cuMemsetD8Async:1:0;stuck=100"), || {
        bind(0);
        let (stuck, sound, kv) = (stream(), stream(), device(16));
        cu!(cuMemsetD8Async(kv, 1, 8, stuck));
        cu!(cuMemsetD8Async(kv + 8, 2, 8, sound));
        cu!(cuStreamSynchronize(sound));
        assert_eq!(code!(cuStreamQuery(stuck)), CUresult::CUDA_ERROR_NOT_READY);
        assert_eq!(code!(cuStreamSynchronize(stuck)), CUresult::CUDA_ERROR_LAUNCH_TIMEOUT);
        assert_eq!(code!(cuStreamQuery(stuck)), CUresult::CUDA_ERROR_NOT_READY);
    });
}
