//! Stream capture: what a library must keep out of.

use std::ptr;

use cudarc::driver::sys::{CUresult, CUstreamCaptureMode, CUstreamCaptureStatus};

use crate::harness::{Stream, bind, device, event, on_standin, pinned, read, recorded, stream};

const GLOBAL: CUstreamCaptureMode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
const THREAD: CUstreamCaptureMode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
const RELAXED: CUstreamCaptureMode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;

fn status(stream: Stream) -> u32 {
    let mut status = CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    cu!(cuStreamIsCapturing(stream, &mut status));
    status as u32
}

fn end(stream: Stream) -> CUresult {
    let mut graph = ptr::null_mut();
    let result = code!(cuStreamEndCapture(stream, &mut graph));
    assert_eq!(graph.is_null(), result != CUresult::CUDA_SUCCESS);
    result
}

#[test]
fn captured_work_does_not_run() {
    on_standin(&["".into()], || {
        bind(0);
        let (stream, kv, result) = (stream(), device(64), pinned(64));
        cu!(cuMemsetD8Async(kv, 1, 64, stream));
        cu!(cuStreamSynchronize(stream));
        assert_eq!(status(stream), 0);
        cu!(cuStreamBeginCapture_v2(stream, GLOBAL));
        assert_eq!(status(stream), 1);
        cu!(cuMemsetD8Async(kv, 2, 64, stream));
        assert_eq!(end(stream), CUresult::CUDA_SUCCESS);
        assert_eq!(status(stream), 0);
        cu!(cuMemcpyDtoHAsync_v2(result.cast(), kv, 64, stream));
        cu!(cuStreamSynchronize(stream));
        assert_eq!(read(result, 64), [1; 64]);
    });
}

#[test]
fn an_event_recorded_in_a_capture_draws_in_whoever_waits_for_it() {
    on_standin(&["".into()], || {
        bind(0);
        let (engine, side) = (stream(), stream());
        cu!(cuStreamBeginCapture_v2(engine, THREAD));
        let event = recorded(engine);
        cu!(cuStreamWaitEvent(side, event, 0));
        assert_eq!(status(side), 1);
        let captured = CUresult::CUDA_ERROR_CAPTURED_EVENT;
        assert_eq!(code!(cuEventQuery(event)), captured);
        assert_eq!(code!(cuEventSynchronize(event)), captured);
        // Nobody waited for the side stream again.
        assert_eq!(end(side), CUresult::CUDA_ERROR_STREAM_CAPTURE_UNMATCHED);
        assert_eq!(end(engine), CUresult::CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
        assert_eq!(status(side), 0);

        cu!(cuStreamBeginCapture_v2(engine, THREAD));
        cu!(cuEventRecord(event, engine));
        cu!(cuStreamWaitEvent(side, event, 0));
        cu!(cuStreamWaitEvent(engine, recorded(side), 0));
        assert_eq!(end(engine), CUresult::CUDA_SUCCESS);
    });
}

#[test]
fn waiting_for_a_capturing_stream_breaks_the_capture() {
    on_standin(&["".into()], || {
        bind(0);
        let stream = stream();
        for query in [false, true] {
            cu!(cuStreamBeginCapture_v2(stream, RELAXED));
            let result = if query {
                code!(cuStreamQuery(stream))
            } else {
                code!(cuStreamSynchronize(stream))
            };
            assert_eq!(result, CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
            assert_eq!(status(stream), 2);
            let invalid = CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
            assert_eq!(code!(cuEventRecord(event(), stream)), invalid);
            assert_eq!(end(stream), invalid);
        }
    });
}

#[test]
fn a_global_capture_forbids_event_queries_in_all_threads_but_those_apart() {
    on_standin(&["".into()], || {
        bind(0);
        let stream = stream();
        let event = event() as usize;
        let query = |apart: bool| {
            let elsewhere = move || {
                bind(0);
                let mut mode = RELAXED;
                if apart {
                    cu!(cuThreadExchangeStreamCaptureMode(&mut mode));
                    assert_eq!(mode, GLOBAL);
                }
                code!(cuEventQuery(event as _))
            };
            std::thread::spawn(elsewhere).join().expect("no panic")
        };
        cu!(cuStreamBeginCapture_v2(stream, GLOBAL));
        assert_eq!(query(true), CUresult::CUDA_SUCCESS);
        assert_eq!(end(stream), CUresult::CUDA_SUCCESS);
        cu!(cuStreamBeginCapture_v2(stream, GLOBAL));
        assert_eq!(query(false), CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        assert_eq!(end(stream), CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        // As it forbids allocations.
        cu!(cuStreamBeginCapture_v2(stream, GLOBAL));
        let mut at = 0;
        let unsupported = CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        assert_eq!(code!(cuMemAlloc_v2(&mut at, 8)), unsupported);
        assert_eq!(end(stream), CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        cu!(cuStreamBeginCapture_v2(stream, THREAD));
        assert_eq!(query(false), CUresult::CUDA_SUCCESS);
        assert_eq!(end(stream), CUresult::CUDA_SUCCESS);
    });
}

#[test]
fn the_null_stream_and_a_capture_keep_apart() {
    on_standin(&["".into()], || {
        bind(0);
        let null = ptr::null_mut();
        let mut blocking = null;
        cu!(cuStreamCreate(&mut blocking, 0));
        assert_eq!(
            code!(cuStreamBeginCapture_v2(null, RELAXED)),
            CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
        );
        let at = device(4);
        cu!(cuStreamBeginCapture_v2(blocking, RELAXED));
        let implicit = CUresult::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
        assert_eq!(code!(cuMemsetD8Async(at, 0, 4, null)), implicit);
        let mut status = CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        assert_eq!(code!(cuStreamIsCapturing(null, &mut status)), implicit);
        assert_eq!(end(blocking), CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    });
}

#[test]
fn a_capture_waits_for_nothing_outside_it() {
    on_standin(&["".into()], || {
        bind(0);
        let (stream, other) = (stream(), stream());
        let outside = recorded(other);
        cu!(cuStreamBeginCapture_v2(stream, RELAXED));
        assert_eq!(
            code!(cuStreamWaitEvent(stream, outside, 0)),
            CUresult::CUDA_ERROR_STREAM_CAPTURE_ISOLATION
        );
    });
}

#[test]
fn a_capture_ends_with_its_stream() {
    on_standin(&["".into()], || {
        bind(0);
        let (engine, side) = (stream(), stream());
        cu!(cuStreamBeginCapture_v2(engine, GLOBAL));
        cu!(cuStreamWaitEvent(side, recorded(engine), 0));
        cu!(cuStreamDestroy_v2(side));
        assert_eq!(end(engine), CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        cu!(cuStreamBeginCapture_v2(engine, GLOBAL));
        cu!(cuStreamDestroy_v2(engine));
        // Nothing is forbidden any more.
        device(8);
    });
}
