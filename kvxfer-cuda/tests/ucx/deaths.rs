//! Sides that go away while bytes are under way.

use std::time::{Duration, Instant};

use kvxfer_core::ErrorKind;
use kvxfer_cuda::ucx::{Event, RemoteAddress, Worker};

use crate::harness::*;
use crate::processes::{connected, greet};

/// More than sockets hold.
const BIG: u64 = 32 << 20;
/// What needs no answer from anybody is done by then, on any machine.
const AT_ONCE: Duration = Duration::from_secs(5);

/// Lets a worker work until the peer is gone and these operations have ended, badly.
#[track_caller]
fn all_fail(worker: &mut Worker, tokens: &[u64]) {
    let (mut ended, mut lost) = (Vec::new(), false);
    until(worker, |worker| {
        while let Some(event) = worker.next_event() {
            match event {
                Event::Done { token, result } => {
                    assert_eq!(result.unwrap_err().kind(), ErrorKind::PeerLost);
                    ended.push(token);
                }
                Event::Lost(end, error) => {
                    assert_eq!(error.kind(), ErrorKind::PeerLost, "{error}");
                    worker.close(end);
                    lost = true;
                }
                Event::Message(_) => panic!("{event:?}"),
            }
        }
        (lost && ended.len() >= tokens.len() && worker.endpoints() == 0).then_some(())
    });
    ended.sort_unstable();
    assert_eq!(ended, tokens);
}

#[test]
fn a_consumer_that_ends_its_worker_gets_no_more_bytes() {
    let Some(context) = context() else { return };
    let mut consumer = Consumer::new(&context, BIG);
    let mut producer = Producer::new(&context, &consumer.blobs());
    let back = consumer.worker.connect(&producer.worker.address().unwrap()).unwrap();
    producer.push(BIG, 1);
    // The connection is up, and the put in the middle.
    let start = Instant::now();
    while !consumer.started() {
        producer.worker.progress();
        consumer.worker.progress();
        assert!(start.elapsed() < DEADLINE);
    }
    // More waits in the consumer's socket.
    while producer.worker.progress() {}

    let start = Instant::now();
    let Consumer { worker, pool, segment } = consumer;
    drop(worker);
    let took = start.elapsed();
    assert!(took < AT_ONCE, "{took:?}");
    let before = seen(&pool);
    assert!(before != content(BIG), "all had arrived: nothing was tested");
    // Registered or not makes no difference to what is sent over TCP.
    let _ = (segment, back);
    all_fail(&mut producer.worker, &[1]);
    assert!(seen(&pool) == before, "bytes arrived after the end");
    eprintln!("destroyed in {took:?}");
}

#[test]
fn a_consumer_killed_in_the_middle_of_a_put_ends_it_with_an_error() {
    let Some((mut producer, mut peer)) = connected() else { return };
    greet(&mut producer, &mut peer);
    // It takes nothing more from its sockets.
    peer.stop();
    for _ in 0..64 {
        for at in (0..producer.bytes).step_by(1 << 16) {
            producer.worker.put(producer.key, at, producer.source, at, 1 << 16).unwrap();
        }
    }
    producer.worker.flush(producer.end, 2).unwrap();
    producer.worker.send(producer.end, b"never", 3).unwrap();
    while producer.worker.progress() {}
    assert_eq!(producer.worker.next_event(), None);

    peer.kill();
    all_fail(&mut producer.worker, &[2, 3]);
    let start = Instant::now();
    drop(producer);
    assert!(start.elapsed() < AT_ONCE);
}

#[test]
fn puts_to_a_consumer_that_is_dead_already_end_too() {
    let Some((mut producer, mut peer)) = connected() else { return };
    greet(&mut producer, &mut peer);
    peer.kill();
    // Nothing was looked at since, and the socket takes the first ones.
    let refused = (0..1000)
        .filter(|_| producer.worker.put(producer.key, 0, producer.source, 0, 4096).is_err())
        .count();
    producer.worker.flush(producer.end, 1).unwrap();
    producer.worker.send(producer.end, b"never", 2).unwrap();
    all_fail(&mut producer.worker, &[1, 2]);
    eprintln!("{refused} of 1000 puts were refused at once");
}

#[test]
fn a_producer_dropped_in_the_middle_of_puts_is_gone_at_once() {
    let Some((mut producer, mut peer)) = connected() else { return };
    greet(&mut producer, &mut peer);
    peer.stop();
    producer.push(4096, 1);
    while producer.worker.progress() {}
    let start = Instant::now();
    drop(producer);
    let took = start.elapsed();
    assert!(took < AT_ONCE, "{took:?}");
    // The consumer is not asked how it takes that: over TCP UCX acknowledges each put, and ends the process when it
    // can't.
}

/// The child: writes once, says so, and waits to be killed.
pub(crate) fn produce(mut wire: Wire) {
    let context = context().unwrap();
    let blobs = [wire.take(), wire.take()];
    let mut producer = Producer::new(&context, &blobs);
    wire.pass(&producer.worker.address().unwrap().to_bytes());
    producer.push(1 << 16, 1);
    assert_eq!(event(&mut producer.worker), Event::Done { token: 1, result: Ok(()) });
    producer.worker.send(producer.end, b"all there", 2).unwrap();
    until(&mut producer.worker, |_| None)
}

#[test]
fn a_killed_producer_is_told_and_its_worker_ends_at_once() {
    let Some(context) = context() else { return };
    let mut consumer = Consumer::new(&context, BIG);
    let mut peer = Peer::start("child", "produce");
    for blob in consumer.blobs() {
        peer.wire.pass(&blob);
    }
    let address = RemoteAddress::from_bytes(&peer.wire.take()).unwrap();
    let back = consumer.worker.connect(&address).unwrap();
    assert_eq!(event(&mut consumer.worker), Event::Message(b"all there".to_vec()));
    assert!(consumer.seen() == content(BIG));

    peer.kill();
    let Event::Lost(end, error) = event(&mut consumer.worker) else { panic!("something else") };
    assert_eq!((end, error.kind()), (back, ErrorKind::PeerLost), "{error}");
    let start = Instant::now();
    drop(consumer.worker);
    assert!(start.elapsed() < AT_ONCE);
}
