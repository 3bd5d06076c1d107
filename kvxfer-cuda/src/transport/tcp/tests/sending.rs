//! The sender, and targets that are not there or mean ill.

use std::io::{Read, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvxfer_core::transport::{Completion, SegmentHandle, Transport};
use kvxfer_core::{Error, ErrorKind, Incarnation, PostId};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::super::blob::Blob;
use super::super::frame::{Ack, Answer, Opening};
use super::super::{Tcp, socket};
use super::bench::{BYTES, Bench, DEADLINE, ONE, OWNER, WRITER, ZERO, content, post, wait, write};
use crate::memory::Regions;
use crate::transport::Target;

fn sender() -> Tcp {
    let mut regions = Regions::new();
    regions.keep(content()).unwrap();
    Tcp::new(WRITER, Arc::new(regions)).unwrap()
}

fn handle(addresses: Vec<SocketAddr>) -> SegmentHandle {
    let blob = Blob { generation: 1, addresses, tokens: vec![[3; 16]], bytes: BYTES };
    SegmentHandle { blob: blob.encode(), bytes: BYTES, fds: Vec::new() }
}

/// Waits for the ends of all posts.
#[track_caller]
fn ends(sender: &mut Tcp) -> Vec<Completion> {
    let (mut out, start) = (Vec::new(), Instant::now());
    loop {
        sender.poll(1 << 20, &mut out);
        if sender.pending() == 0 {
            return out;
        }
        assert!(start.elapsed() < DEADLINE);
        if sender.rests() {
            wait(&[sender.event_fd().unwrap()]);
        }
    }
}

/// All posts ended for one reason.
#[track_caller]
fn why(ends: Vec<Completion>, posts: usize) -> Error {
    assert_eq!(ends.len(), posts);
    let errors: Vec<_> = ends.into_iter().map(|end| end.result.unwrap_err()).collect();
    assert!(errors.windows(2).all(|pair| pair[0] == pair[1]));
    errors[0].clone()
}

/// An address where nothing answers: the queue of who listens there is full.
fn black_hole() -> (SocketAddr, Vec<std::os::fd::OwnedFd>) {
    let (listener, address) = socket::listen("127.0.0.1", 0).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let mut kept = vec![listener];
    kept.extend((0..4).map(|_| socket::connect(&address).unwrap()));
    (address, kept)
}

#[test]
fn posts_to_where_nothing_answers_end_by_the_deadline() {
    let (address, _kept) = black_hole();
    let mut sender = sender();
    sender.open = Duration::from_millis(100);
    sender.attach(OWNER, ZERO, handle(vec![address, address])).unwrap();
    for id in 0..3 {
        post(&mut sender, id, &[write(0, ZERO, 0, 100)]).unwrap();
    }
    // It sleeps until the deadlines, of the second address as well.
    let start = Instant::now();
    let error = why(ends(&mut sender), 3);
    assert!(start.elapsed() >= Duration::from_millis(100));
    assert_eq!(error.kind(), ErrorKind::NoPath);
    let text = error.to_string();
    assert!(text.contains(&address.to_string()) && text.contains("firewall"), "{text}");
    assert_eq!(post(&mut sender, 4, &[write(0, ZERO, 0, 1)]).unwrap_err(), error);
    assert!(!sender.holds(OWNER, None));
}

#[test]
fn another_address_is_tried() {
    let mut bench = Bench::new(2);
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut blob = bench.blob();
    blob.addresses.insert(0, closed);
    let mut sender = sender();
    let handle = SegmentHandle { blob: blob.encode(), bytes: BYTES, fds: Vec::new() };
    sender.attach(OWNER, ZERO, handle).unwrap();
    post(&mut sender, 1, &[write(0, ZERO, 0, 100)]).unwrap();
    assert!(bench.settle(&mut sender)[0].result.is_ok());

    sender.attach(OWNER, ZERO, super::sending::handle(vec![closed])).unwrap();
    let _ = post(&mut sender, 2, &[write(0, ZERO, 0, 100)]);
    let error = why(ends(&mut sender), 1);
    assert_eq!(error.kind(), ErrorKind::NoPath);
    assert!(error.to_string().contains("refused"), "{error}");
}

#[test]
fn a_target_that_is_another_or_talks_nonsense_ends_all_posts_once() {
    let good = Answer { stream: 0, owner: OWNER }.encode();
    let ack = |post, stored| Ack { post: PostId(post), stored }.encode();
    let other = Answer { stream: 0, owner: Incarnation([9; 16]) }.encode();
    let wrong_stream = Answer { stream: 1, owner: OWNER }.encode();
    let answers: [(Vec<u8>, ErrorKind); 7] = [
        (b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n".to_vec(), ErrorKind::Protocol),
        (other.to_vec(), ErrorKind::Protocol),
        (wrong_stream.to_vec(), ErrorKind::Protocol),
        (Vec::new(), ErrorKind::PeerLost),
        (good.to_vec(), ErrorKind::PeerLost),
        ([&good[..], &ack(9, true)].concat(), ErrorKind::Protocol),
        ([&good[..], &[0xFF; 16]].concat(), ErrorKind::Protocol),
    ];
    for (answer, kind) in answers {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut sender = sender();
        sender.attach(OWNER, ZERO, handle(vec![listener.local_addr().unwrap()])).unwrap();
        for id in 0..2 {
            post(&mut sender, id, &[write(0, ZERO, 0, 100)]).unwrap();
        }
        let (mut target, _) = listener.accept().unwrap();
        let mut out = Vec::new();
        sender.poll(1 << 20, &mut out);
        let mut opening = [0; Opening::BYTES];
        target.read_exact(&mut opening).unwrap();
        assert_eq!(Opening::decode(&opening).unwrap().token, [3; 16]);
        target.write_all(&answer).unwrap();
        // Closed when the sender has seen all of that.
        target.shutdown(std::net::Shutdown::Write).unwrap();
        out.extend(ends(&mut sender));
        let error = why(out, 2);
        assert_eq!(error.kind(), kind, "{answer:?}: {error}");
        assert_eq!(post(&mut sender, 4, &[write(0, ZERO, 0, 1)]).unwrap_err(), error);
    }
}

#[test]
fn an_acknowledgement_before_the_last_byte_was_sent_is_refused() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut sender = sender();
    sender.attach(OWNER, ZERO, handle(vec![listener.local_addr().unwrap()])).unwrap();
    let (mut target, _) = listener.accept().unwrap();
    let mut out = Vec::new();
    sender.poll(1 << 20, &mut out);
    target.write_all(&Answer { stream: 0, owner: OWNER }.encode()).unwrap();
    while !sender.streams().all(|stream| stream.is_idle()) {
        wait(&[sender.event_fd().unwrap()]);
        sender.poll(1 << 20, &mut out);
    }
    post(&mut sender, 1, &[write(0, ZERO, 0, BYTES)]).unwrap();
    sender.poll(1000, &mut out);
    target.write_all(&Ack { post: PostId(1), stored: true }.encode()).unwrap();
    wait(&[sender.event_fd().unwrap()]);
    while out.is_empty() {
        sender.poll(0, &mut out);
    }
    assert_eq!(why(out, 1).kind(), ErrorKind::Protocol);
}

#[test]
fn a_segment_that_is_let_go_of_is_held_until_what_was_begun_has_ended() {
    let mut bench = Bench::new(1);
    let mut sender = bench.sender();
    let second = bench.export(ONE);
    sender.attach(OWNER, ONE, second).unwrap();
    post(&mut sender, 1, &[write(0, ZERO, 0, 300_000)]).unwrap();
    bench.until(&mut sender, |_, sender| {
        sender.poll(1000, &mut Vec::new());
        sender.streams().any(|stream| stream.load > 0)
    });
    post(&mut sender, 2, &[write(0, ONE, 0, 100), write(0, ZERO, 400_000, 100)]).unwrap();
    post(&mut sender, 3, &[write(0, ONE, 200, 100)]).unwrap();
    sender.detach(OWNER, Some(ZERO));
    assert!(sender.holds(OWNER, Some(ZERO)), "post 1 was begun");
    assert_eq!(sender.pending(), 3);
    let ends = bench.settle(&mut sender);
    let ends: Vec<_> = ends.iter().map(|end| (end.id.0, end.result.is_ok())).collect();
    assert_eq!(ends, [(1, true), (2, false), (3, true)]);
    assert!(!sender.holds(OWNER, Some(ZERO)) && sender.holds(OWNER, Some(ONE)));
    assert!(bench.seen(ZERO)[..300_000] == content()[..300_000]);
    assert!(bench.seen(ZERO)[300_000..].iter().all(|&byte| byte == 0));
    assert!(bench.lost.is_empty());
}

#[test]
fn what_was_begun_for_a_segment_that_is_attached_anew_does_not_end_well() {
    let mut bench = Bench::new(1);
    let mut sender = bench.sender();
    post(&mut sender, 1, &[write(0, ZERO, 0, 300_000)]).unwrap();
    bench.until(&mut sender, |_, sender| {
        sender.poll(1000, &mut Vec::new());
        sender.streams().any(|stream| stream.load > 0)
    });
    bench.pool.replace(ZERO, &[]).unwrap();
    let handle = bench.export(ZERO);
    sender.attach(OWNER, ZERO, handle).unwrap();
    post(&mut sender, 2, &[write(0, ZERO, 500_000, 10)]).unwrap();
    let ends = bench.settle(&mut sender);
    let ends: Vec<_> = ends.iter().map(|end| (end.id.0, end.result.is_ok())).collect();
    assert_eq!(ends, [(1, false), (2, true)]);
    assert!(bench.seen(ZERO)[..500_000].iter().all(|&byte| byte == 0));
}

#[test]
fn a_target_that_reads_slowly_is_waited_for_asleep() {
    let mut bench = Bench::new(2);
    let mut sender = bench.sender();
    let mut out = Vec::new();
    let mut posted = 0;
    // More than any socket buffer takes; nobody reads.
    bench.until(&mut sender, |_, sender| {
        sender.poll(1 << 20, &mut out);
        sender.streams().all(|stream| stream.is_idle())
    });
    while posted < 64 {
        post(&mut sender, posted, &[write(0, ZERO, 0, BYTES)]).unwrap();
        posted += 1;
    }
    let start = Instant::now();
    while !sender.rests() {
        assert!(start.elapsed() < DEADLINE, "it never rests");
        sender.poll(1 << 20, &mut out);
    }
    assert!(out.is_empty());
    out.extend(bench.settle(&mut sender));
    assert_eq!(out.len() as u64, posted);
    assert!(out.iter().all(|end| end.result.is_ok()));
    // And with nothing to do, both sleep.
    assert!(sender.rests() && bench.target.rests());
    let mut fds = [sender.event_fd().unwrap(), bench.target.event_fd()]
        .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
    poll(&mut fds, Some(&Timespec::default())).unwrap();
    assert!(fds.iter().all(|fd| fd.revents().is_empty()), "it would be woken at once");
}
