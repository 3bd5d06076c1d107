//! A producer here, a consumer in another process, whose UCX may be another one.

use kvxfer_core::sum::Sum;
use kvxfer_cuda::ucx::{Event, RemoteAddress};

use crate::harness::*;

pub(crate) const BYTES: u64 = 1 << 20;

/// The child: shows its segment, answers each message and tells the sum of what it sees then, until the producer
/// goes.
pub(crate) fn consume(mut wire: Wire) {
    let context = context().unwrap();
    let mut consumer = Consumer::new(&context, BYTES);
    for blob in consumer.blobs() {
        wire.pass(&blob);
    }
    let producer = RemoteAddress::from_bytes(&wire.take()).unwrap();
    let back = consumer.worker.connect(&producer).unwrap();
    loop {
        match event(&mut consumer.worker) {
            Event::Message(message) => {
                wire.send(&sum(&consumer.seen()).to_le_bytes());
                consumer.worker.send(back, &message, 0).unwrap();
            }
            Event::Done { result, .. } => result.unwrap(),
            // The producer's worker is gone.
            Event::Lost(end, _) => {
                assert_eq!(end, back);
                return;
            }
        }
    }
}

fn sum(bytes: &[u8]) -> u64 {
    let mut sum = Sum::new(42);
    sum.update(bytes);
    sum.finish()
}

/// A child that consumes, and the producer here that is connected with it.
pub(crate) fn connected() -> Option<(Producer, Peer)> {
    let context = context()?;
    // To see which versions understand each other; not all do on lo, so name another KVXFER_TEST_UCX_DEVICE.
    let other = std::env::var("KVXFER_TEST_UCX_OTHER");
    let variables = other.as_deref().map(|path| vec![(LIBRARY, path)]).unwrap_or_default();
    let mut peer = Peer::start_with("child", "consume", &variables);
    let blobs = [peer.wire.take(), peer.wire.take()];
    let producer = Producer::new(&context, &blobs);
    peer.wire.pass(&producer.worker.address().unwrap().to_bytes());
    Some((producer, peer))
}

/// Both sides are connected when this returns.
pub(crate) fn greet(producer: &mut Producer, peer: &mut Peer) {
    producer.worker.send(producer.end, b"hello", 0).unwrap();
    let mut seen = 0;
    while seen < 2 {
        let event = event(&mut producer.worker);
        assert!(
            matches!(event, Event::Message(_) | Event::Done { token: 0, result: Ok(()) }),
            "{event:?}"
        );
        seen += 1;
    }
    peer.wire.receive::<8>();
}

#[test]
fn another_process_sees_all_bytes_when_it_is_told() {
    let Some((mut producer, mut peer)) = connected() else { return };
    producer.push(4096, 1);
    assert_eq!(event(&mut producer.worker), Event::Done { token: 1, result: Ok(()) });
    producer.worker.send(producer.end, b"ping", 2).unwrap();
    let seen = events(&mut producer.worker, |event| *event == Event::Message(b"ping".to_vec()));
    assert!(seen.contains(&Event::Done { token: 2, result: Ok(()) }), "{seen:?}");
    assert_eq!(peer.wire.receive(), sum(&content(BYTES)).to_le_bytes());

    // A closed endpoint tells the peer nothing, as long as the worker is there: the connection stays for the way
    // back.
    producer.worker.close(producer.end);
    until(&mut producer.worker, |worker| (worker.endpoints() == 0).then_some(()));
    drop(producer);
    peer.succeeds();
}
