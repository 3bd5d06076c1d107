//! Two workers in one process.

use std::time::Instant;

use kvxfer_core::ErrorKind;
use kvxfer_cuda::ucx::{EndpointId, Event, Lane, Worker};

use crate::harness::*;

const BYTES: u64 = 1 << 20;

/// Lets both work until `done` gives something.
#[track_caller]
pub(crate) fn both<T>(
    one: &mut Worker,
    other: &mut Worker,
    mut done: impl FnMut(&mut Worker, &mut Worker) -> Option<T>,
) -> T {
    let start = Instant::now();
    loop {
        one.progress();
        other.progress();
        if let Some(done) = done(one, other) {
            return done;
        }
        assert!(start.elapsed() < DEADLINE, "it does not happen");
    }
}

fn pair() -> Option<(Producer, Consumer, EndpointId)> {
    let context = context()?;
    let mut consumer = Consumer::new(&context, BYTES);
    let producer = Producer::new(&context, &consumer.blobs());
    let back = consumer.worker.connect(&producer.worker.address().unwrap()).unwrap();
    Some((producer, consumer, back))
}

#[test]
fn what_was_put_and_flushed_is_there_when_the_message_comes() {
    let Some((mut producer, mut consumer, back)) = pair() else { return };
    for (round, piece) in [(1, BYTES), (2, 4096), (3, 1000)] {
        producer.push(piece, round);
        let done = Event::Done { token: round, result: Ok(()) };
        both(&mut producer.worker, &mut consumer.worker, |producer, _| {
            (producer.next_event()? == done).then_some(())
        });
        producer.worker.send(producer.end, &[round as u8, 7], 100).unwrap();
        let ping =
            both(&mut producer.worker, &mut consumer.worker, |_, consumer| consumer.next_event());
        assert_eq!(ping, Event::Message(vec![round as u8, 7]));
        assert!(consumer.seen() == content(BYTES), "round {round}");

        consumer.worker.send(back, b"pong", 200).unwrap();
        let mut seen = Vec::new();
        both(&mut producer.worker, &mut consumer.worker, |producer, _| {
            seen.extend(producer.next_event());
            (seen.len() == 2).then_some(())
        });
        assert!(seen.contains(&Event::Message(b"pong".to_vec())), "{seen:?}");
        assert!(seen.contains(&Event::Done { token: 100, result: Ok(()) }), "{seen:?}");
        assert_eq!(consumer.worker.next_event(), Some(Event::Done { token: 200, result: Ok(()) }));
    }
    let tcp = Lane { transport: "tcp".into(), device: "lo".into() };
    let lanes = producer.worker.lanes(producer.end).unwrap();
    assert!(!lanes.is_empty() && lanes.iter().all(|lane| *lane == tcp), "{lanes:?}");
    eprintln!("lanes: {lanes:?}");
}

#[test]
fn nothing_moves_while_ranges_are_wrong_or_ends_are_closed() {
    let Some((mut producer, mut consumer, _)) = pair() else { return };
    let Producer { worker, end, key, source, .. } = &mut producer;
    for (dst, src, len) in [(0, 1, BYTES), (1, 0, BYTES), (u64::MAX, 0, 1), (0, u64::MAX, 1)] {
        let error = worker.put(*key, dst, *source, src, len).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfBounds);
    }
    assert_eq!(worker.send(*end, &[0; 65], 1).unwrap_err().kind(), ErrorKind::OutOfBounds);
    worker.close_key(*key);
    assert_eq!(worker.put(*key, 0, *source, 0, 1).unwrap_err().kind(), ErrorKind::NotFound);
    worker.close(*end);
    assert_eq!(worker.flush(*end, 1).unwrap_err().kind(), ErrorKind::Closed);
    both(worker, &mut consumer.worker, |worker, _| (worker.endpoints() == 0).then_some(()));
    assert_eq!(worker.next_event(), None);
}

#[test]
fn closing_ends_what_is_under_way_and_keys_that_puts_name_stay_until_then() {
    let Some((mut producer, consumer, _)) = pair() else { return };
    // The consumer does not work, so nothing gets through.
    producer.push(4096, 1);
    producer.worker.send(producer.end, b"ping", 2).unwrap();
    producer.worker.close_key(producer.key);
    producer.worker.close(producer.end);
    let mut tokens = Vec::new();
    until(&mut producer.worker, |worker| {
        while let Some(event) = worker.next_event() {
            let Event::Done { token, result: Err(error) } = event else { panic!("{event:?}") };
            assert_eq!(error.kind(), ErrorKind::PeerLost, "{error}");
            tokens.push(token);
        }
        (worker.endpoints() == 0 && tokens.len() == 2).then_some(())
    });
    tokens.sort_unstable();
    assert_eq!(tokens, [1, 2]);
    drop(consumer);
}
