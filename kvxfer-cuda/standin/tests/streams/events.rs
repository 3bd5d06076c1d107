//! Events, the NULL stream, host functions: what the driver's documentation promises.

use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

use cudarc::driver::sys::CUresult;

use crate::harness::{
    Outcome, bind, device, event, gate, on_standin, outcome, pinned, read, recorded, seeds, set,
    stream,
};

const BLOCK: usize = 32 << 10;

#[test]
fn an_event_that_was_never_recorded_is_done_and_holds_nobody() {
    on_standin(&seeds(""), || {
        bind(0);
        let (stream, event) = (stream(), event());
        cu!(cuEventQuery(event));
        cu!(cuEventSynchronize(event));
        cu!(cuStreamWaitEvent(stream, event, 0));
        cu!(cuStreamSynchronize(stream));
    });
}

#[test]
fn a_wait_means_the_latest_record_before_it() {
    on_standin(&seeds(""), || {
        bind(0);
        let (one, held, waiting) = (stream(), stream(), stream());
        let door = pinned(4096);
        let event = recorded(one);
        cu!(cuStreamWaitEvent(waiting, event, 0));
        // Recorded again, behind a gate: the wait above is not for this.
        gate(held, door);
        cu!(cuEventRecord(event, held));
        cu!(cuStreamSynchronize(waiting));
        assert_eq!(code!(cuEventQuery(event)), CUresult::CUDA_ERROR_NOT_READY);
        cu!(cuStreamWaitEvent(waiting, event, 0));
        assert_eq!(code!(cuStreamQuery(waiting)), CUresult::CUDA_ERROR_NOT_READY);
        // What waits for an event goes on when the event is gone.
        cu!(cuEventDestroy_v2(event));
        set(door, 1);
        cu!(cuStreamSynchronize(waiting));
    });
}

#[test]
fn asking_often_enough_gets_it_done() {
    on_standin(&seeds("delay=100000"), || {
        bind(0);
        let stream = stream();
        let (kv, result) = (device(BLOCK), pinned(BLOCK));
        cu!(cuMemsetD8Async(kv, 4, BLOCK, stream));
        cu!(cuMemcpyDtoHAsync_v2(result.cast(), kv, BLOCK, stream));
        let event = recorded(stream);
        assert_eq!(code!(cuEventQuery(event)), CUresult::CUDA_ERROR_NOT_READY);
        while code!(cuEventQuery(event)) == CUresult::CUDA_ERROR_NOT_READY {
            std::thread::yield_now();
        }
        assert_eq!(read(result, BLOCK), [4; BLOCK]);
    });
}

#[test]
fn work_that_nobody_waits_for_runs_in_the_end() {
    on_standin(&seeds("delay=5"), || {
        bind(0);
        let (stream, flag) = (stream(), pinned(4096));
        cu!(cuStreamWriteValue32_v2(stream, flag as u64, 7, 0));
        while read(flag, 4) != [7, 0, 0, 0] {
            std::thread::yield_now();
        }
    });
}

#[test]
fn events_and_streams_belong_to_a_device() {
    on_standin(&seeds(""), || {
        let zero = bind(0);
        let (stream_0, event_0) = (stream(), recorded(ptr::null_mut()));
        bind(1);
        let stream_1 = stream();
        let invalid = CUresult::CUDA_ERROR_INVALID_HANDLE;
        assert_eq!(code!(cuEventRecord(event_0, stream_1)), invalid);
        assert_eq!(code!(cuMemsetD8Async(device(4), 0, 4, stream_0)), invalid);
        // Waiting goes across.
        cu!(cuStreamWaitEvent(stream_1, event_0, 0));
        cu!(cuStreamSynchronize(stream_1));
        cu!(cuCtxSetCurrent(zero));
        cu!(cuStreamDestroy_v2(stream_0));
        assert_eq!(code!(cuStreamQuery(stream_0)), invalid);
        cu!(cuEventDestroy_v2(event_0));
        assert_eq!(code!(cuEventQuery(event_0)), invalid);
        cu!(cuCtxSetCurrent(ptr::null_mut()));
        assert_eq!(code!(cuStreamQuery(stream_1)), CUresult::CUDA_ERROR_INVALID_CONTEXT);
    });
}

#[test]
fn the_null_stream_orders_blocking_streams_and_no_others() {
    on_standin(&seeds("races=0"), || {
        bind(0);
        let mut blocking = ptr::null_mut();
        cu!(cuStreamCreate(&mut blocking, 0));
        let apart = stream();
        let (kv, results) = (device(3 * BLOCK), pinned(3 * BLOCK));
        let at = |block: usize| kv + (block * BLOCK) as u64;
        let result = |block: usize| results.wrapping_add(block * BLOCK).cast::<c_void>();
        cu!(cuMemsetD8_v2(kv, 0, 3 * BLOCK));
        cu!(cuCtxSynchronize());
        // A blocking stream waits for the NULL stream, and the NULL stream for it.
        cu!(cuMemsetD8Async(at(0), 1, BLOCK, ptr::null_mut()));
        cu!(cuMemcpyDtoDAsync_v2(at(1), at(0), BLOCK, blocking));
        cu!(cuMemcpyDtoHAsync_v2(result(1), at(1), BLOCK, ptr::null_mut()));
        assert_eq!(outcome(&[ptr::null_mut()], result(1).cast(), &[1; BLOCK]), Outcome::Right);
        // A stream apart is overtaken by neither.
        let door = pinned(4096);
        gate(ptr::null_mut(), door);
        cu!(cuMemsetD8Async(at(2), 2, BLOCK, ptr::null_mut()));
        cu!(cuMemcpyDtoHAsync_v2(result(2), at(2), BLOCK, apart));
        assert_eq!(outcome(&[apart], result(2).cast(), &[0; BLOCK]), Outcome::Right);
        assert_eq!(code!(cuStreamQuery(ptr::null_mut())), CUresult::CUDA_ERROR_NOT_READY);
        set(door, 1);
        cu!(cuCtxSynchronize());
    });
}

#[test]
fn pageable_memory_is_read_before_and_written_before_the_call_returns() {
    on_standin(&seeds("delay=100000"), || {
        bind(0);
        let (stream, kv) = (stream(), device(BLOCK));
        let mut bytes = vec![6_u8; BLOCK];
        cu!(cuMemcpyHtoDAsync_v2(kv, bytes.as_ptr().cast(), BLOCK, stream));
        bytes.fill(0);
        cu!(cuMemcpyDtoHAsync_v2(bytes.as_mut_ptr().cast(), kv, BLOCK, stream));
        assert_eq!(bytes, [6; BLOCK]);
    });
}

#[test]
fn copies_of_what_is_no_memory_are_refused_at_once() {
    on_standin(&["".into()], || {
        bind(0);
        let (stream, kv) = (stream(), device(BLOCK));
        let invalid = CUresult::CUDA_ERROR_INVALID_VALUE;
        assert_eq!(code!(cuMemcpyDtoDAsync_v2(kv, kv + 1, BLOCK, stream)), invalid);
        assert_eq!(code!(cuMemsetD8Async(kv + 1, 0, BLOCK, stream)), invalid);
        assert_eq!(code!(cuStreamWaitValue32_v2(stream, kv + 1, 0, 0)), invalid);
        cu!(cuStreamSynchronize(stream));
    });
}

static CALLS: AtomicU32 = AtomicU32::new(0);

/// Writes down how many calls came before, and what the driver answers to one from inside.
unsafe extern "C" fn note(data: *mut c_void) {
    let refused = code!(cuCtxSynchronize()) == CUresult::CUDA_ERROR_NOT_PERMITTED;
    // SAFETY: a number that outlives the test's stream.
    unsafe {
        data.cast::<u32>().write(CALLS.fetch_add(1, Ordering::SeqCst) + u32::from(!refused) * 100)
    };
}

#[test]
fn host_functions_run_in_order_and_may_not_call_the_driver() {
    on_standin(&seeds(""), || {
        bind(0);
        let stream = stream();
        let places = [0; 2].map(|_: i32| pinned(4096).cast::<u32>());
        for place in places {
            cu!(cuLaunchHostFunc(stream, Some(note), place.cast()));
        }
        cu!(cuStreamSynchronize(stream));
        let seen = places.map(|place| read(place.cast(), 4)[0]);
        assert_eq!(seen, [0, 1]);
    });
}
