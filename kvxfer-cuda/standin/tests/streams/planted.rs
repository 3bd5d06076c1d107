//! Each ordering bug, and beside it the same calls in order. `races=0` leaves it to the order of
//! execution alone: then bytes are wrong. Otherwise the stand-in says what raced, and breaks the device.

use cudarc::driver::sys::{
    CUmemLocation, CUmemLocationType, CUmemcpyAttributes, CUmemcpySrcAccessOrder, CUresult,
};

use crate::harness::{
    Outcome, Stream, bind, device, gate, on_standin, on_standin_but, outcome, pinned, read,
    recorded, seeds, set, stream, write,
};

/// Bytes of a block.
const BLOCK: usize = 64 << 10;

fn wait_for(stream: Stream, other: Stream) {
    cu!(cuStreamWaitEvent(stream, recorded(other), 0));
}

/// The engine writes 8 layers, a side stream copies each behind it: `ordered`, or not.
fn layers(ordered: bool) -> Outcome {
    bind(0);
    let (engine, side) = (stream(), stream());
    let (kv, pool) = (device(8 * BLOCK), device(8 * BLOCK));
    let result = pinned(8 * BLOCK);
    cu!(cuMemsetD8_v2(kv, 0, 8 * BLOCK));
    cu!(cuCtxSynchronize());
    for layer in 0..8 {
        let at = (layer * BLOCK) as u64;
        cu!(cuMemsetD8Async(kv + at, layer as u8 + 1, BLOCK, engine));
        if ordered {
            wait_for(side, engine);
        }
        cu!(cuMemcpyDtoDAsync_v2(pool + at, kv + at, BLOCK, side));
    }
    cu!(cuMemcpyDtoHAsync_v2(result.cast(), pool, 8 * BLOCK, side));
    let expected: Vec<u8> = (0..8 * BLOCK).map(|at| (at / BLOCK) as u8 + 1).collect();
    outcome(&[side, engine], result, &expected)
}

#[test]
fn copies_behind_events_are_right() {
    on_standin(&seeds(""), || assert_eq!(layers(true), Outcome::Right));
}

#[test]
fn copies_that_wait_for_no_event_are_wrong() {
    on_standin(&["races=0".into()], || assert_eq!(layers(false), Outcome::Wrong));
}

#[test]
fn copies_that_wait_for_no_event_are_wrong_under_most_seeds() {
    on_standin_but(6, &seeds("races=0"), || assert_eq!(layers(false), Outcome::Wrong));
}

#[test]
fn copies_that_wait_for_no_event_race() {
    on_standin(&seeds(""), || assert_eq!(layers(false), Outcome::Broken));
}

/// A side stream reads blocks, which the engine uses again once it has waited for that: or at once.
fn reuse(ordered: bool) -> Outcome {
    bind(0);
    let (engine, side) = (stream(), stream());
    let kv = device(BLOCK);
    let (pool, result) = (device(8 * BLOCK), pinned(8 * BLOCK));
    for round in 0..8 {
        cu!(cuMemsetD8Async(kv, round as u8 + 1, BLOCK, engine));
        wait_for(side, engine);
        cu!(cuMemcpyDtoDAsync_v2(pool + (round * BLOCK) as u64, kv, BLOCK, side));
        if ordered {
            wait_for(engine, side);
        }
    }
    cu!(cuMemsetD8Async(kv, 99, BLOCK, engine));
    cu!(cuMemcpyDtoHAsync_v2(result.cast(), pool, 8 * BLOCK, side));
    let expected: Vec<u8> = (0..8 * BLOCK).map(|at| (at / BLOCK) as u8 + 1).collect();
    outcome(&[side, engine], result, &expected)
}

#[test]
fn blocks_reused_behind_a_read_event_are_right() {
    on_standin(&seeds(""), || assert_eq!(reuse(true), Outcome::Right));
}

#[test]
fn blocks_reused_too_early_race() {
    on_standin(&seeds(""), || assert_eq!(reuse(false), Outcome::Broken));
}

#[test]
fn blocks_reused_too_early_are_wrong() {
    on_standin_but(6, &seeds("races=0"), || assert_eq!(reuse(false), Outcome::Wrong));
}

/// A batch right behind what writes its source, with that source order.
fn batch(order: CUmemcpySrcAccessOrder) -> Outcome {
    bind(0);
    let stream = stream();
    let (kv, pool, result) = (device(BLOCK), device(BLOCK), pinned(BLOCK));
    cu!(cuMemsetD8Async(kv, 7, BLOCK, stream));
    let half = (BLOCK / 2) as u64;
    let mut dsts = [pool, pool + half];
    let mut srcs = [kv, kv + half];
    assert_eq!(submit(&mut dsts, &mut srcs, BLOCK / 2, order, stream), CUresult::CUDA_SUCCESS);
    cu!(cuMemcpyDtoHAsync_v2(result.cast(), pool, BLOCK, stream));
    outcome(&[stream], result, &[7; BLOCK])
}

fn submit(
    dsts: &mut [u64],
    srcs: &mut [u64],
    len: usize,
    order: CUmemcpySrcAccessOrder,
    stream: Stream,
) -> CUresult {
    let nowhere = CUmemLocation { type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_INVALID, id: 0 };
    let mut attributes = CUmemcpyAttributes {
        srcAccessOrder: order,
        srcLocHint: nowhere,
        dstLocHint: nowhere,
        flags: 0,
    };
    let mut sizes = vec![len; dsts.len()];
    let (mut from, mut failed) = (0, 0);
    code!(cuMemcpyBatchAsync(
        dsts.as_mut_ptr(),
        srcs.as_mut_ptr(),
        sizes.as_mut_ptr(),
        dsts.len(),
        &mut attributes,
        &mut from,
        1,
        &mut failed,
        stream
    ))
}

const IN_ORDER: CUmemcpySrcAccessOrder = CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;

#[test]
fn batches_in_stream_order_are_right() {
    on_standin(&seeds(""), || assert_eq!(batch(IN_ORDER), Outcome::Right));
}

#[test]
fn batches_out_of_stream_order_are_wrong() {
    on_standin(&seeds(""), || {
        assert_eq!(batch(CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_ANY), Outcome::Wrong);
        let now = CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_DURING_API_CALL;
        assert_eq!(batch(now), Outcome::Wrong);
    });
}

/// A batch of a copy there and one on: the second one's source is the first one's destination.
fn chain(overlap: bool) -> Outcome {
    bind(0);
    let stream = stream();
    let (kv, result) = (device(3 * BLOCK), pinned(2 * BLOCK));
    let block = BLOCK as u64;
    cu!(cuMemsetD8Async(kv, 1, 3 * BLOCK, stream));
    let (mut dsts, mut srcs) =
        ([kv + block, kv + 2 * block], [kv, if overlap { kv + block } else { kv }]);
    assert_eq!(submit(&mut dsts, &mut srcs, BLOCK, IN_ORDER, stream), CUresult::CUDA_SUCCESS);
    cu!(cuMemcpyDtoHAsync_v2(result.cast(), kv + block, 2 * BLOCK, stream));
    outcome(&[stream], result, &[1; 2 * BLOCK])
}

#[test]
fn batches_must_not_overlap() {
    on_standin(&seeds(""), || {
        assert_eq!(chain(false), Outcome::Right);
        assert_eq!(chain(true), Outcome::Wrong);
    });
}

#[test]
fn results_are_not_there_before_they_are_waited_for() {
    on_standin(&seeds("delay=10000"), || {
        bind(0);
        let stream = stream();
        let (kv, result) = (device(BLOCK), pinned(BLOCK));
        cu!(cuMemsetD8Async(kv, 5, BLOCK, stream));
        cu!(cuMemcpyDtoHAsync_v2(result.cast(), kv, BLOCK, stream));
        assert_eq!(read(result, BLOCK), [0; BLOCK]);
        cu!(cuStreamSynchronize(stream));
        assert_eq!(read(result, BLOCK), [5; BLOCK]);
    });
}

#[test]
fn memory_freed_under_queued_work_breaks_the_device() {
    on_standin(&seeds(""), || {
        bind(0);
        let stream = stream();
        let (kv, result) = (device(BLOCK), pinned(BLOCK));
        cu!(cuMemsetD8Async(kv, 5, BLOCK, stream));
        cu!(cuMemcpyDtoHAsync_v2(result.cast(), kv, BLOCK, stream));
        cu!(cuMemFree_v2(kv));
        assert_eq!(outcome(&[stream], result, &[5; BLOCK]), Outcome::Broken);
        // Sticky.
        let mut at = 0;
        assert_eq!(code!(cuMemAlloc_v2(&mut at, 1)), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
        // Other devices go on.
        bind(1);
        device(1);
    });
}

#[test]
fn pinned_memory_reused_before_the_upload_is_wrong() {
    let upload = |wait: bool| {
        bind(0);
        let stream = stream();
        let (kv, host, result) = (device(BLOCK), pinned(BLOCK), pinned(BLOCK));
        write(host, &[1; BLOCK]);
        cu!(cuMemcpyHtoDAsync_v2(kv, host.cast(), BLOCK, stream));
        if wait {
            cu!(cuStreamSynchronize(stream));
        }
        write(host, &[2; BLOCK]);
        cu!(cuMemcpyDtoHAsync_v2(result.cast(), kv, BLOCK, stream));
        outcome(&[stream], result, &[1; BLOCK])
    };
    on_standin(&seeds("delay=10000"), || {
        assert_eq!(upload(true), Outcome::Right);
        assert_eq!(upload(false), Outcome::Wrong);
    });
}

#[test]
fn a_gate_holds_a_stream_and_no_other() {
    on_standin(&seeds(""), || {
        bind(0);
        let (held, free) = (stream(), stream());
        let (door, results) = (pinned(4096), pinned(2 * BLOCK));
        let (one, other) = (device(BLOCK), device(BLOCK));
        gate(held, door);
        for (stream, at, result) in
            [(held, one, results), (free, other, results.wrapping_add(BLOCK))]
        {
            cu!(cuMemsetD8Async(at, 3, BLOCK, stream));
            cu!(cuMemcpyDtoHAsync_v2(result.cast(), at, BLOCK, stream));
        }
        cu!(cuStreamSynchronize(free));
        assert_eq!(code!(cuStreamQuery(held)), CUresult::CUDA_ERROR_NOT_READY);
        assert_eq!(read(results, 2 * BLOCK), [[0; BLOCK], [3; BLOCK]].concat());
        set(door, 1);
        cu!(cuStreamSynchronize(held));
        assert_eq!(read(results, 2 * BLOCK), [3; 2 * BLOCK]);
    });
}
