//! What puts two accesses in order, so that they don't race.

use std::ptr;

use crate::harness::{
    Event, Outcome, Stream, bind, device, gate, on_standin, outcome, pinned, read, recorded, seeds,
    set, stream,
};

const BLOCK: usize = 16 << 10;

/// One stream writes, and another one reads after `order`.
fn handed_over(order: impl Fn(Stream, Stream)) -> Outcome {
    bind(0);
    let (one, other) = (stream(), stream());
    let (kv, result) = (device(BLOCK), pinned(BLOCK));
    cu!(cuMemsetD8Async(kv, 3, BLOCK, one));
    order(one, other);
    cu!(cuMemcpyDtoHAsync_v2(result.cast(), kv, BLOCK, other));
    outcome(&[other, one], result, &[3; BLOCK])
}

fn waits(order: fn(Stream, Stream)) {
    assert_eq!(handed_over(order), Outcome::Right);
}

#[test]
fn what_the_host_waited_for_is_in_order() {
    on_standin(&seeds(""), || {
        waits(|one, _| cu!(cuStreamSynchronize(one)));
        waits(|one, _| cu!(cuEventSynchronize(recorded(one))));
        waits(|_, _| cu!(cuCtxSynchronize()));
    });
}

#[test]
fn what_the_host_asked_for_is_in_order() {
    use cudarc::driver::sys::CUresult::CUDA_ERROR_NOT_READY as NOT_READY;
    on_standin(&seeds(""), || {
        waits(|one, _| while code!(cuStreamQuery(one)) == NOT_READY {});
        waits(|one, _| {
            let event: Event = recorded(one);
            while code!(cuEventQuery(event)) == NOT_READY {}
        });
    });
}

#[test]
fn what_was_waited_for_over_a_third_stream_is_in_order() {
    on_standin(&seeds(""), || {
        waits(|one, other| {
            let third = stream();
            cu!(cuStreamWaitEvent(third, recorded(one), 0));
            cu!(cuStreamWaitEvent(other, recorded(third), 0));
        });
        // The event of what a stream has done already counts as well.
        waits(|one, other| {
            let (third, event) = (stream(), recorded(one));
            cu!(cuStreamWaitEvent(third, event, 0));
            cu!(cuStreamSynchronize(third));
            cu!(cuStreamWaitEvent(other, event, 0));
            cu!(cuStreamDestroy_v2(third));
        });
    });
}

#[test]
fn values_in_memory_are_an_order() {
    on_standin(&seeds(""), || {
        // From stream to stream.
        waits(|one, other| {
            let flag = pinned(4096);
            cu!(cuStreamWriteValue32_v2(one, flag as u64, 1, 0));
            gate(other, flag);
        });
        // From a stream to the host, and from the host to a stream.
        waits(|one, other| {
            let (flag, door) = (pinned(4096), pinned(4096));
            gate(other, door);
            cu!(cuStreamWriteValue32_v2(one, flag as u64, 1, 0));
            while read(flag, 1) != [1] {
                std::thread::yield_now();
            }
            set(door, 1);
        });
    });
}

#[test]
fn an_event_recorded_before_the_work_is_no_order() {
    on_standin(&seeds(""), || {
        bind(0);
        let (one, other) = (stream(), stream());
        let (kv, result) = (device(BLOCK), pinned(BLOCK));
        let early = recorded(one);
        cu!(cuMemsetD8Async(kv, 3, BLOCK, one));
        cu!(cuStreamWaitEvent(other, early, 0));
        cu!(cuMemcpyDtoHAsync_v2(result.cast(), kv, BLOCK, other));
        assert_eq!(outcome(&[other, one], result, &[3; BLOCK]), Outcome::Broken);
    });
}

#[test]
fn a_host_that_waited_for_another_stream_has_no_order() {
    on_standin(&seeds(""), || {
        let of_another = |_, _| {
            let third = stream();
            cu!(cuMemsetD8Async(device(8), 0, 8, third));
            cu!(cuStreamSynchronize(third));
        };
        assert_eq!(handed_over(of_another), Outcome::Broken);
    });
}

#[test]
fn reads_side_by_side_and_neighbours_don_t_race() {
    on_standin(&seeds(""), || {
        bind(0);
        let streams = [(); 4].map(|()| stream());
        let (kv, results) = (device(4 * BLOCK), pinned(4 * BLOCK));
        cu!(cuMemsetD8_v2(kv, 1, 4 * BLOCK));
        cu!(cuStreamSynchronize(ptr::null_mut()));
        for (index, stream) in streams.into_iter().enumerate() {
            cu!(cuMemcpyDtoHAsync_v2(
                results.wrapping_add(index * BLOCK).cast(),
                kv,
                BLOCK,
                stream
            ));
        }
        for stream in streams {
            cu!(cuStreamSynchronize(stream));
        }
        for (index, stream) in streams.into_iter().enumerate() {
            // One byte less would do; one more would be the neighbour's.
            cu!(cuMemsetD8Async(kv + (index * BLOCK) as u64, 2, BLOCK, stream));
        }
        assert_eq!(outcome(&streams, results, &[1; 4 * BLOCK]), Outcome::Right);
        cu!(cuMemsetD8Async(kv, 3, BLOCK + 1, streams[0]));
        cu!(cuMemsetD8Async(kv + BLOCK as u64, 3, BLOCK, streams[1]));
        assert_eq!(outcome(&streams, results, &[1; 4 * BLOCK]), Outcome::Broken);
    });
}
