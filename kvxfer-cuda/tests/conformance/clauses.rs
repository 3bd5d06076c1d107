//! The contract, clause by clause.

use kvxfer_core::transport::Write;
use kvxfer_core::{ErrorKind, Incarnation, PostId, SegmentId};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use std::time::Instant;

use crate::bench::{BYTES, Bench, DEADLINE};
use crate::model::{Model, ONE, ZERO, ends, write};

pub fn an_accepted_post_ends_once_and_is_visible(bench: &mut dyn Bench) {
    let mut model = Model::new(bench, 1);
    let peer = bench.peer(0);
    let mut expected = Vec::new();
    for id in 0..5 {
        let at = id * 70_000;
        let writes = [write(0, at, ZERO, at, 65_536), write(1, at + 8, ONE, at + 24, 4096)];
        bench.post(0, id, id + 9, &writes).unwrap();
        expected.push((PostId(id), peer, Some(model.post(0, id + 9, &writes))));
    }
    assert_eq!(bench.transport().pending(), 5);
    assert_eq!(ends(bench), expected);
    assert_eq!(bench.transport().pending(), 0);
    model.check(bench);
}

pub fn a_refused_post_leaves_no_trace(bench: &mut dyn Bench) {
    let model = Model::new(bench, 2);
    let stranger = Incarnation([0xEE; 16]);
    let good = [write(0, 0, ZERO, 0, 100)];
    let post = kvxfer_core::transport::Post {
        id: PostId(1),
        peer: stranger,
        grant: None,
        seed: 0,
        writes: &good,
    };
    let refused = bench.transport().post(post).unwrap_err();
    assert_eq!((refused.kind(), refused.retryable()), (ErrorKind::NotFound, false));

    let refused = bench.post(0, 2, 0, &[write(0, 0, SegmentId(2), 0, 100)]).unwrap_err();
    assert_eq!((refused.kind(), refused.retryable()), (ErrorKind::NotFound, false));
    let refused = bench.post(0, 3, 0, &[write(2, 0, ZERO, 0, 100)]).unwrap_err();
    assert_eq!((refused.kind(), refused.retryable()), (ErrorKind::NotFound, false));

    let peer = bench.peer(0);
    bench.transport().detach(peer, Some(ONE));
    let refused = bench.post(0, 4, 0, &[write(0, 0, ONE, 0, 100)]).unwrap_err();
    assert_eq!((refused.kind(), refused.retryable()), (ErrorKind::NotFound, false));

    assert_eq!(bench.transport().pending(), 0);
    assert_eq!(ends(bench), []);
    model.check(bench);
}

pub fn ranges_are_checked_without_overflow(bench: &mut dyn Bench) {
    let mut model = Model::new(bench, 3);
    let beyond = [
        (BYTES, 1),
        (BYTES - 1, 2),
        (0, BYTES + 1),
        (BYTES + 1, 0),
        (1, u64::MAX),
        (u64::MAX, 1),
        (u64::MAX, u64::MAX),
        (u64::MAX - 7, 8),
        (1 << 63, 1 << 63),
    ];
    for (offset, len) in beyond {
        for writes in [[write(0, offset, ZERO, 0, len)], [write(0, 0, ZERO, offset, len)]] {
            let refused = bench.post(0, 1, 0, &writes).unwrap_err();
            assert_eq!(
                (refused.kind(), refused.retryable()),
                (ErrorKind::OutOfBounds, false),
                "{writes:?}"
            );
        }
    }
    assert_eq!(ends(bench), []);

    let to_the_end = [write(0, 0, ZERO, 0, BYTES), write(1, BYTES - 1, ONE, BYTES - 1, 1)];
    bench.post(0, 2, 7, &to_the_end).unwrap();
    let sum = model.post(0, 7, &to_the_end);
    assert_eq!(ends(bench), [(PostId(2), bench.peer(0), Some(sum))]);
    model.check(bench);
}

pub fn a_post_is_checked_before_its_first_byte_moves(bench: &mut dyn Bench) {
    let mut model = Model::new(bench, 4);
    let good = [write(0, 0, ZERO, 0, 5000)];
    bench.post(0, 1, 0, &good).unwrap();
    for bad in [write(0, 0, ONE, BYTES, 1), write(9, 0, ONE, 0, 1), write(0, 0, SegmentId(7), 0, 1)]
    {
        bench.post(0, 2, 0, &[write(0, 0, ZERO, 8192, 4096), bad]).unwrap_err();
    }
    // What was accepted before, and what comes after, is not disturbed.
    let after = [write(1, 0, ONE, 100, 999)];
    bench.post(0, 3, 5, &after).unwrap();
    let peer = bench.peer(0);
    let sums = [model.post(0, 0, &good), model.post(0, 5, &after)];
    let expected = [(PostId(1), peer, Some(sums[0])), (PostId(3), peer, Some(sums[1]))];
    assert_eq!(ends(bench), expected);
    model.check(bench);
}

pub fn overlapping_writes_are_refused(bench: &mut dyn Bench) {
    let mut model = Model::new(bench, 5);
    let place = |dst, len| write(0, 0, ZERO, dst, len);
    for writes in [
        vec![place(0, 100), place(99, 100)],
        vec![place(99, 100), place(0, 100)],
        vec![place(50, 8), place(50, 8)],
        vec![place(500, 8), place(0, 400), place(200, 8)],
        vec![place(0, 8), write(0, 0, ONE, 0, 8), place(4, 8)],
    ] {
        let refused = bench.post(0, 1, 0, &writes).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::OutOfBounds, "{writes:?}");
    }
    assert_eq!(ends(bench), []);

    // Neighbours, other segments and other posts do not overlap; nor does a source.
    let writes =
        [place(100, 100), place(0, 100), write(0, 0, ONE, 50, 100), place(200, 9), place(150, 0)];
    bench.post(0, 2, 0, &writes).unwrap();
    bench.post(0, 3, 0, &writes[..1]).unwrap();
    let (first, second) = (model.post(0, 0, &writes), model.post(0, 0, &writes[..1]));
    let peer = bench.peer(0);
    assert_eq!(ends(bench), [(PostId(2), peer, Some(first)), (PostId(3), peer, Some(second))]);
    model.check(bench);
}

pub fn empty_posts_and_empty_writes_end_well(bench: &mut dyn Bench) {
    let model = Model::new(bench, 6);
    bench.post(0, 1, 5, &[]).unwrap();
    bench.post(0, 2, 5, &[write(0, 0, ZERO, 0, 0), write(1, BYTES, ONE, BYTES, 0)]).unwrap();
    let peer = bench.peer(0);
    assert_eq!(ends(bench), [(PostId(1), peer, Some(0)), (PostId(2), peer, Some(0))]);
    model.check(bench);
}

pub fn block_sizes_and_alignments(bench: &mut dyn Bench) {
    let mut model = Model::new(bench, 7);
    let peer = bench.peer(0);
    let mut expected = Vec::new();
    let mut id = 0;
    let sizes = (8..=20).flat_map(|shift| [(1 << shift) - 1, 1 << shift, (1 << shift) + 1]);
    for size in sizes.chain([1, 2, 7, 9, 15, 17, 63, 65]) {
        for (src, dst) in [(0, 0), (1, 0), (0, 1), (3, 5), (8, 24), (64, 63), (4095, 32)] {
            let writes = [write(0, src, ZERO, dst, size), write(1, src, ONE, dst + size, size)];
            bench.post(0, id, id, &writes).unwrap();
            expected.push((PostId(id), peer, Some(model.post(0, id, &writes))));
            id += 1;
            if bench.by_itself() {
                // These posts overlap; see `Bench::by_itself`.
                assert_eq!(ends(bench), expected, "{size} bytes from {src} to {dst}");
                expected.clear();
            }
        }
        assert_eq!(ends(bench), expected, "{size} bytes");
        expected.clear();
    }
    model.check(bench);
}

pub fn the_sum_runs_over_spans_in_order(bench: &mut dyn Bench) {
    let mut model = Model::new(bench, 8);
    // Spans with padded last words, and the same spans the other way round.
    let mut writes =
        [write(0, 3, ZERO, 0, 13), write(1, 5, ZERO, 64, 4099), write(0, 9, ONE, 7, 1)];
    bench.post(0, 1, 77, &writes).unwrap();
    let forward = model.post(0, 77, &writes);
    writes.reverse();
    bench.post(0, 2, 77, &writes).unwrap();
    let backward = model.post(0, 77, &writes);
    assert_ne!(forward, backward);
    let peer = bench.peer(0);
    assert_eq!(ends(bench), [(PostId(1), peer, Some(forward)), (PostId(2), peer, Some(backward))]);
}

pub fn a_small_budget_moves_a_little_and_no_budget_nothing(bench: &mut dyn Bench) {
    let mut model = Model::new(bench, 9);
    let writes = [write(0, 1, ZERO, 8, 100_001), write(1, 0, ONE, 0, 1 << 20)];
    bench.post(0, 1, 3, &writes).unwrap();
    let mut out = Vec::new();
    bench.transport().poll(0, &mut out);
    bench.transport().poll(1, &mut out);
    assert!(out.is_empty(), "a byte of budget moved a megabyte");
    let mut polls = 0;
    while out.is_empty() {
        bench.transport().poll(10_000, &mut out);
        polls += 1;
        assert!(polls < 10_000);
    }
    assert!(polls > 10, "{polls} polls of 10 kB for a megabyte");
    let sum = model.post(0, 3, &writes);
    assert_eq!(out[0].result.clone().unwrap(), sum);
    assert_eq!(ends(bench), []);
    model.check(bench);
}

pub fn posts_to_two_peers_stay_apart(bench: &mut dyn Bench) {
    let mut model = Model::new(bench, 10);
    let mut expected = Vec::new();
    for id in 0..20 {
        let consumer = id as usize % 2;
        let writes = [write(0, id * 999, ZERO, id * 2048, 2000)];
        bench.post(consumer, id, id, &writes).unwrap();
        expected.push((PostId(id), bench.peer(consumer), Some(model.post(consumer, id, &writes))));
    }
    assert_eq!(ends(bench), expected);
    model.check(bench);
}

pub fn detaching_ends_what_is_under_way_once(bench: &mut dyn Bench) {
    let mut model = Model::new(bench, 11);
    let (gone, stays) = (bench.peer(0), bench.peer(1));
    for id in 0..10 {
        let writes = [write(0, 0, ZERO, id * 300_000, 300_000)];
        bench.post(id as usize % 2, id, id, &writes).unwrap();
    }
    let mut out = Vec::new();
    bench.transport().poll(100_000, &mut out);
    bench.transport().detach(gone, None);
    // They come out of polls without a budget: the next one, where polls are what moves bytes.
    let (start, mut polls) = (Instant::now(), 0);
    let mut of_gone = 0;
    while of_gone < 5 {
        assert!(start.elapsed() < DEADLINE && (bench.by_itself() || polls == 0), "{out:?}");
        bench.transport().poll(0, &mut out);
        polls += 1;
        of_gone = out.iter().filter(|end| end.peer == gone).count();
    }
    bench.fence(0);
    let at_end: Vec<u8> = bench.read(0, ZERO, 0, BYTES);

    out.extend(bench.settle());
    let mut ids: Vec<_> = out.iter().map(|end| end.id.0).collect();
    ids.sort_unstable();
    assert_eq!(ids, (0..10).collect::<Vec<_>>());
    for end in &out {
        if end.peer == stays {
            let writes = [write(0, 0, ZERO, end.id.0 * 300_000, 300_000)];
            assert_eq!(end.result.clone().unwrap(), model.post(1, end.id.0, &writes));
        } else if let Err(error) = &end.result {
            assert!(!error.retryable());
        }
    }
    // No byte moved after the end.
    assert!(bench.read(0, ZERO, 0, BYTES) == at_end);
    assert!(bench.read(1, ZERO, 0, BYTES) != at_end);
    bench.post(0, 99, 0, &[write(0, 0, ZERO, 0, 8)]).unwrap_err();
    bench.transport().detach(gone, None);
    assert_eq!(ends(bench), []);
}

pub fn detaching_one_segment_leaves_the_others(bench: &mut dyn Bench) {
    let mut model = Model::new(bench, 12);
    let peer = bench.peer(0);
    let both = [write(0, 0, ONE, 0, 8192), write(0, 0, ZERO, 9000, 8192)];
    let other = [write(1, 0, ONE, 20_000, 8192)];
    bench.post(0, 1, 0, &both).unwrap();
    bench.post(0, 2, 0, &other).unwrap();
    // The first write of post 1 may be done by now, and still the post as a whole is not.
    let mut out = Vec::new();
    bench.transport().poll(8192, &mut out);
    let mut finished = !out.is_empty();
    bench.transport().detach(peer, Some(ZERO));
    out.extend(bench.settle());
    out.sort_unstable_by_key(|end| end.id);
    assert_eq!(out.iter().map(|end| end.id.0).collect::<Vec<_>>(), [1, 2]);
    finished |= out[0].result.is_ok();
    let partial = model.post(0, 0, &both);
    if finished {
        assert_eq!(out[0].result.clone().unwrap(), partial);
    }
    assert_eq!(out[1].result.clone().unwrap(), model.post(0, 0, &other));

    bench.post(0, 3, 0, &both).unwrap_err();
    bench.attach(0, ZERO);
    bench.post(0, 4, 0, &both).unwrap();
    assert_eq!(ends(bench), [(PostId(4), peer, Some(partial))]);
    model.check(bench);
}

pub fn attaching_again_replaces(bench: &mut dyn Bench) {
    let mut model = Model::new(bench, 13);
    let peer = bench.peer(0);
    let writes = [write(0, 0, ZERO, 0, 500_000)];
    bench.post(0, 1, 0, &writes).unwrap();
    let mut out = Vec::new();
    bench.transport().poll(50_000, &mut out);
    let finished = !out.is_empty();
    bench.replace(0, ZERO);
    bench.attach(0, ZERO);
    out.extend(bench.settle());
    assert_eq!(out.len(), 1);
    // `Ok` would say that the consumer can see the bytes, and it looks at other memory now.
    assert!(finished || out[0].result.is_err());
    model.check(bench);

    bench.post(0, 2, 0, &writes).unwrap();
    let sum = model.post(0, 0, &writes);
    assert_eq!(ends(bench), [(PostId(2), peer, Some(sum))]);
    model.check(bench);

    // A writer that was not told writes where nobody looks.
    bench.replace(0, ZERO);
    model.clear(0, ZERO);
    bench.post(0, 3, 0, &writes).unwrap();
    assert_eq!(ends(bench).len(), 1);
    model.check(bench);
}

pub fn malformed_handles_are_refused(bench: &mut dyn Bench) {
    let mut model = Model::new(bench, 14);
    let peer = bench.peer(0);
    let spoil: [fn(&mut kvxfer_core::transport::SegmentHandle); 6] = [
        |handle| handle.blob.clear(),
        |handle| handle.blob[0] ^= 0xFF,
        |handle| handle.blob.push(0),
        |handle| *handle.blob.last_mut().unwrap() ^= 1,
        |handle| handle.bytes += 1,
        |handle| handle.fds.push(std::fs::File::open("/dev/null").unwrap().into()),
    ];
    for (i, spoil) in spoil.into_iter().enumerate() {
        let mut handle = bench.handle(0, ZERO);
        spoil(&mut handle);
        let refused = bench.transport().attach(peer, ZERO, handle).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Protocol, "handle {i}");
    }
    // What was attached still is.
    let writes = [write(0, 0, ZERO, 0, 4096)];
    bench.post(0, 1, 0, &writes).unwrap();
    let sum = model.post(0, 0, &writes);
    assert_eq!(ends(bench), [(PostId(1), peer, Some(sum))]);
    model.check(bench);
}

pub fn a_full_queue_can_be_retried(bench: &mut dyn Bench) {
    let mut model = Model::new(bench, 15);
    let writes: Vec<Write> = (0..64).map(|i| write(0, i * 256, ZERO, i * 256, 256)).collect();
    let mut accepted = 0;
    let refused = loop {
        match bench.post(0, accepted, 1, &writes) {
            Ok(()) => accepted += 1,
            Err(refused) => break refused,
        }
        assert!(accepted < 1 << 20, "the queue has no bound");
    };
    assert!(refused.retryable());
    assert_eq!(bench.transport().pending() as u64, accepted);
    let sum = model.post(0, 1, &writes);
    let ended = ends(bench);
    assert_eq!(ended.len() as u64, accepted);
    assert!(ended.iter().all(|end| end.2 == Some(sum)));
    bench.post(0, accepted, 1, &writes).unwrap();
    assert_eq!(ends(bench).len(), 1);
    model.check(bench);
}

pub fn a_post_larger_than_the_queue_is_taken_alone(bench: &mut dyn Bench) {
    let mut model = Model::new(bench, 16);
    let writes: Vec<Write> = (0..100_000).map(|i| write(0, i * 16, ZERO, i * 16, 16)).collect();
    bench.post(0, 1, 1, &writes).unwrap();
    let sum = model.post(0, 1, &writes);
    assert_eq!(ends(bench), [(PostId(1), bench.peer(0), Some(sum))]);
    model.check(bench);
}

/// Scattered writes that do not overlap: laid out one after the other, then shuffled.
fn scattered() -> impl Strategy<Value = Vec<Write>> {
    let len = prop_oneof![1..300_u64, Just(4096), Just(32_768), 1..100_000_u64];
    let piece = (0..2_u32, 0..2_u32, 0..3000_u64, 0..BYTES, len);
    proptest::collection::vec(piece, 0..24)
        .prop_map(|pieces| {
            let mut ends = [0; 2];
            pieces
                .into_iter()
                .map(|(region, segment, gap, src, len)| {
                    let dst = ends[segment as usize] + gap;
                    ends[segment as usize] = dst + len;
                    write(region, src.min(BYTES - len), SegmentId(segment), dst, len)
                })
                .filter(|write| write.dst + write.len <= BYTES)
                .collect::<Vec<_>>()
        })
        .prop_shuffle()
}

pub fn random_posts_leave_what_a_model_says(bench: &mut dyn Bench) {
    let mut model = Model::new(bench, 17);
    let mut runner = TestRunner::new(Config { cases: 32, ..Config::default() });
    let bench = std::cell::RefCell::new(bench);
    let model = std::cell::RefCell::new(&mut model);
    let post = (0..2_usize, any::<u64>(), scattered(), 0..400_000_u64);
    let posts = proptest::collection::vec(post, 1..6);
    runner
        .run(&posts, |posts| {
            let (mut bench, mut model) = (bench.borrow_mut(), model.borrow_mut());
            let (mut out, mut expected) = (Vec::new(), Vec::new());
            for (id, (consumer, seed, writes, budget)) in (0..).zip(&posts) {
                bench.post(*consumer, id, *seed, writes).unwrap();
                expected.push((id, bench.peer(*consumer), model.post(*consumer, *seed, writes)));
                bench.transport().poll(*budget, &mut out);
                if bench.by_itself() {
                    // These posts overlap; see `Bench::by_itself`.
                    out.extend(bench.settle());
                }
            }
            out.extend(bench.settle());
            let mut ended: Vec<_> =
                out.into_iter().map(|end| (end.id.0, end.peer, end.result.unwrap())).collect();
            ended.sort_unstable();
            prop_assert_eq!(ended, expected);
            model.check(&**bench);
            Ok(())
        })
        .unwrap();
}
