//! Whole tasks through the queue and its tables, with memory that is a vector.

use kvxfer_core::sum::{STEP, Sum, word_key};
use proptest::prelude::*;

use super::super::Summed;
use super::super::kernels::{Item, tiles};
use super::super::table::{ITEMS, Limits, SLICE, SUMS};
use super::*;
use crate::driver::DevicePtr;

const MEMORY: usize = 1 << 20;

fn ptr(addr: u64) -> DevicePtr {
    // SAFETY: an index of a vector; no work of a device is given it.
    unsafe { DevicePtr::from_raw(addr) }
}

fn limits() -> Limits {
    Limits { kernel_below: 4096, summed: Summed::Source, bytes: SLICE * 2 }
}

fn span(src: u64, len: u64) -> Span {
    Span { src: ptr(src), dst: Some(ptr(src + (1 << 32))), len, key: word_key(7, 0) }
}

/// What a GPU does with a table: copies to `stored`, and the sum of each task.
fn run(table: &Table, memory: &[u8], stored: &mut [u8]) -> Vec<u64> {
    for copy in table.copies() {
        let (from, to, len) = (copy.src.addr(), copy.dst.addr() - (1 << 32), copy.len as usize);
        stored[to as usize..][..len].copy_from_slice(&memory[from as usize..][..len]);
    }
    let tasks = table.tasks();
    let mut sums = vec![0_u64; (tasks.end - tasks.start) as usize];
    let mut tile = 0;
    for &Item { src, dst, len, key, slot, first_tile } in table.items() {
        assert_eq!(first_tile, tile);
        tile += tiles(len);
        let bytes = if src < 1 << 32 {
            memory[src as usize..][..len as usize].to_vec()
        } else {
            stored[(src - (1 << 32)) as usize..][..len as usize].to_vec()
        };
        if dst != 0 {
            stored[(dst - (1 << 32)) as usize..][..len as usize].copy_from_slice(&bytes);
        }
        // Its first word has that key.
        let mut sum = Sum::new(key.wrapping_sub(STEP));
        sum.update(&bytes);
        sums[slot as usize] = sums[slot as usize].wrapping_add(sum.finish());
    }
    assert_eq!(tile, table.tiles());
    sums
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn every_byte_is_copied_and_summed_once(
        tasks in proptest::collection::vec(proptest::collection::vec(0..300_000_u64, 0..6), 1..12),
        kernel_below in prop_oneof![Just(0), Just(u64::MAX), 1..200_000_u64],
        summed in prop_oneof![Just(Summed::Source), Just(Summed::Destination)],
        slots in 1..4_usize,
    ) {
        let memory: Vec<u8> = (0..MEMORY as u64).map(|i| ((i * 0x9E37) >> 7) as u8).collect();
        let mut stored = vec![0; MEMORY];
        let mut queue = Queue::<()>::new();
        let mut expected = Vec::new();
        for (id, lens) in tasks.iter().enumerate() {
            let (mut at, mut index, mut sum) = (0, 0, Sum::new(id as u64));
            let mut spans = Vec::new();
            for &len in lens {
                let len = len.min(MEMORY as u64 - at);
                let mut span = span(at, len);
                span.key = word_key(id as u64, index);
                spans.push(span);
                sum.update(&memory[at as usize..][..len as usize]);
                (at, index) = (at + len, sum.index());
            }
            queue.push(id as u64, &spans).unwrap();
            expected.push((id as u64, sum.finish(), at as usize));
        }
        let limits = Limits { kernel_below, summed, bytes: SLICE * 2 };
        let mut tables: Vec<_> = (0..slots).map(|_| Table::new(limits)).collect();
        let mut done = Vec::new();
        loop {
            let mut taken = 0;
            for table in &mut tables {
                table.clear();
                taken += usize::from(queue.take(table));
            }
            queue.end(&mut done);
            for table in &tables[..taken] {
                prop_assert!(table.items().iter().map(|item| item.len).sum::<u64>() <= SLICE * 2);
                let long = table.copies().iter().all(|copy| copy.len >= kernel_below);
                let short = table.items().iter().filter(|item| item.dst != 0).all(|item| item.len < kernel_below);
                prop_assert!(long && short);
                let mut read_again = table.items().iter().filter(|item| item.dst == 0);
                prop_assert!(read_again.all(|item| (item.src < 1 << 32) == (summed == Summed::Source)));
                let sums = run(table, &memory, &mut stored);
                queue.settle(table.tasks(), Ok(&sums));
            }
            if taken == 0 {
                break;
            }
        }
        queue.end(&mut done);
        prop_assert_eq!(queue.len(), 0);
        let done: Vec<_> = done.into_iter().map(|done| (done.task, done.result.unwrap())).collect();
        prop_assert_eq!(done, expected.iter().map(|&(id, sum, _)| (id, sum)).collect::<Vec<_>>());
        let most = expected.iter().map(|&(_, _, bytes)| bytes).max().unwrap();
        prop_assert!(stored[..most] == memory[..most]);
    }
}

/// Fills a table and says which tasks it has.
fn take(queue: &mut Queue<u32>, table: &mut Table) -> Range<u64> {
    table.clear();
    queue.take(table);
    table.tasks()
}

#[test]
fn a_task_is_taken_after_its_event_and_not_held_by_a_later_one() {
    let mut queue = Queue::new();
    let mut table = Table::new(limits());
    queue.push(10, &[span(0, 8)]).unwrap();
    let events: Vec<_> = (0..3_u32).map(Arc::new).collect();
    queue.wait_for(&events[0]);
    queue.wait_for(&events[0]);
    queue.wait_for(&events[1]);
    // A task of nothing between the event and who waits for it.
    queue.push(11, &[]).unwrap();
    queue.push(12, &[span(0, 8)]).unwrap();
    queue.wait_for(&events[2]);
    queue.push(13, &[span(0, 8)]).unwrap();

    assert_eq!(queue.wait(), None);
    assert_eq!(take(&mut queue, &mut table), 0..1);
    assert_eq!((queue.wait().as_deref(), queue.wait().as_deref()), (Some(&0), Some(&1)));
    assert_eq!(queue.wait(), None);
    assert_eq!(take(&mut queue, &mut table), 2..3);
    assert_eq!(queue.wait().as_deref(), Some(&2));
    assert_eq!(take(&mut queue, &mut table), 3..4);
    assert_eq!(take(&mut queue, &mut table), 0..0);
    // Nobody needs it yet.
    queue.wait_for(&events[0]);
    assert_eq!(queue.wait(), None);
}

#[test]
fn events_before_tasks_of_nothing_do_not_stop_what_follows() {
    let mut queue = Queue::new();
    let mut table = Table::new(limits());
    queue.push(0, &[]).unwrap();
    queue.push(1, &[]).unwrap();
    queue.wait_for(&Arc::new(5_u32));
    queue.push(2, &[span(0, 8)]).unwrap();
    assert_eq!(queue.wait().as_deref(), Some(&5));
    assert_eq!(take(&mut queue, &mut table), 2..3);
}

#[test]
fn a_full_queue_refuses_what_can_be_repeated() {
    let mut queue = Queue::<u32>::new();
    let many = vec![span(0, 8); SPANS + 1];
    // Alone it is taken, however much it is.
    queue.push(0, &many).unwrap();
    let error = queue.push(1, &[span(0, 8)]).unwrap_err();
    assert!(error.retryable() && error.kind() == ErrorKind::PoolFull);
    let mut table = Table::new(limits());
    let mut launches = 0;
    while !take(&mut queue, &mut table).is_empty() {
        assert!(table.items().len() <= ITEMS);
        launches += 1;
        queue.settle(table.tasks(), Ok(&[1]));
    }
    let mut done = Vec::new();
    queue.end(&mut done);
    assert_eq!(done.len(), 1);
    assert_eq!(*done[0].result.as_ref().unwrap(), launches);

    for id in 0..TASKS as u64 {
        queue.push(id, &[]).unwrap();
    }
    assert!(queue.push(0, &[]).unwrap_err().retryable());
}

#[test]
fn a_launch_has_at_most_so_many_tasks() {
    let mut queue = Queue::<u32>::new();
    for id in 0..2 * SUMS as u64 {
        // Every other one is of nothing.
        let spans = [span(0, 8)];
        queue.push(id, &spans[..(id % 2 == 0).into()]).unwrap();
    }
    let mut table = Table::new(limits());
    assert_eq!(take(&mut queue, &mut table), 0..SUMS as u64 - 1);
    assert_eq!(take(&mut queue, &mut table), SUMS as u64..2 * SUMS as u64 - 1);
    assert!(take(&mut queue, &mut table).is_empty());
}

#[test]
fn what_failed_or_was_given_up_ends_when_nothing_of_it_is_under_way() {
    let mut queue = Queue::<u32>::new();
    let mut table = Table::new(limits());
    let mut done = Vec::new();
    // The second is too long for one launch.
    for (id, len) in [(0, 8), (1, 4 * SLICE), (2, 8), (3, 0)] {
        queue.push(id, &[span(0, len)]).unwrap();
    }
    queue.wait_for(&Arc::new(1));
    let first = take(&mut queue, &mut table);
    assert_eq!(first, 0..2);
    queue.give_up(&ErrorKind::Closed.error("given up"));
    assert!(take(&mut queue, &mut table).is_empty() && queue.wait().is_none());
    queue.end(&mut done);
    assert!(done.is_empty());
    queue.settle(first, Err(ErrorKind::Device.error("failed")));
    queue.end(&mut done);
    let kinds: Vec<_> = done.iter().map(|done| done.result.as_ref().map_err(Error::kind)).collect();
    assert_eq!(
        kinds,
        [Err(ErrorKind::Device), Err(ErrorKind::Device), Err(ErrorKind::Closed), Ok(&0)]
    );
    // It goes on.
    queue.push(4, &[span(0, 8)]).unwrap();
    assert_eq!(take(&mut queue, &mut table), 4..5);
}
