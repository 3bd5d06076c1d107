use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use kvxfer_core::wire::message::Chunk;
use kvxfer_core::wire::{Message, Purpose};
use kvxfer_core::{ChunkKey, ErrorKind, OfferId, SegmentId};
use kvxfer_cuda::control::{Address, Control, ControlConfig, Event, Limits};

use crate::harness::*;

const NOW: Duration = Duration::ZERO;

/// A message of about 600 KB.
fn big(number: u64) -> Message {
    let chunks = vec![Chunk { key: ChunkKey([number as u8; 32]), tokens: 16 }; 16 << 10];
    Message::Offer { offer: OfferId(number), request: "big".into(), chunks }
}

#[test]
fn a_unix_link_tells_who_is_there_and_carries_messages_both_ways() {
    let folder = Folder::new();
    let mut b = Node::new(config(2, &folder.sockets()));
    let mut a = Node::new(dialling(1, &folder.sockets(), &b.control.addresses()[0]));
    a.control.dial(0, Purpose::Observe);
    for side in 0..2 {
        let event = until(&mut [&mut a, &mut b], NOW, |nodes| nodes[side].events.pop());
        let Event::Up {
            link, dialled, purpose, peer, pid, pidfd, can_pass_fds, why_not_unix, ..
        } = event
        else {
            panic!("{event:?}")
        };
        assert_eq!(dialled, (side == 0).then_some(0));
        assert_eq!(purpose, Purpose::Observe);
        assert_eq!(peer.name, ["agent 2", "agent 1"][side]);
        assert_eq!(pid, Some(std::process::id()));
        assert!(pidfd.is_some() && can_pass_fds && why_not_unix.is_none());
        [&mut a, &mut b][side].control.send(link, &note(side as u64), &[]).unwrap();
    }
    for side in 0..2 {
        let message = until(&mut [&mut a, &mut b], NOW, |nodes| nodes[side].message());
        assert_eq!(message, note(1 - side as u64));
    }
}

#[test]
fn a_tcp_address_on_this_host_leads_to_the_unix_socket() {
    let folder = Folder::new();
    for host in ["127.0.0.1", "localhost"] {
        let mut b = Node::new(listening(2, &folder.sockets()));
        let Address::Tcp { port, .. } = b.control.addresses()[0] else { panic!() };
        let mut a = Node::new(dialling(1, &folder.sockets(), &Address::tcp(host, port)));
        a.control.dial(0, Purpose::Push);
        until(&mut [&mut a, &mut b], NOW, |nodes| {
            nodes[0].events.pop_if(|event| {
                matches!(
                    event,
                    Event::Up { can_pass_fds: true, why_not_unix: None, pidfd: Some(_), .. }
                )
            })
        });
        assert_eq!(b.control.counts().refused, 0);
    }
}

#[test]
fn tcp_carries_links_only_if_both_sides_allow_it() {
    let folder = Folder::new();
    for (dialler, listener) in [(false, false), (true, false), (false, true), (true, true)] {
        let mut b = listening(2, &folder.sockets());
        b.allow_insecure = listener;
        let mut b = Node::new(b);
        let mut a = dialling(1, &folder.sockets(), &b.control.addresses()[0]);
        a.allow_insecure = dialler;
        a.hello.boot_id = [8; 16];
        let mut a = Node::new(a);
        a.control.dial(0, Purpose::Push);
        if dialler && listener {
            let event = until(&mut [&mut a, &mut b], NOW, |nodes| nodes[0].events.pop());
            let Event::Up { link, can_pass_fds, why_not_unix, pid, .. } = event else {
                panic!("{event:?}")
            };
            assert!(!can_pass_fds && pid.is_none());
            assert!(why_not_unix.unwrap().contains("another host"));
            let null = File::open("/dev/null").unwrap();
            let error = a.control.send(link, &note(0), &[null.as_fd()]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NoPath);
            a.control.send(link, &big(1), &[]).unwrap();
            assert_eq!(until(&mut [&mut a, &mut b], NOW, |nodes| nodes[1].message()), big(1));
            continue;
        }
        let error = until(&mut [&mut a, &mut b], NOW, |nodes| nodes[0].dial_failed());
        assert_eq!(error.kind(), ErrorKind::NoPath);
        let text = error.to_string();
        assert!(text.contains("allow_insecure"), "{text}");
        assert!(text.contains(if dialler { "refused" } else { "another host" }), "{text}");
        assert!(b.up().is_none());
    }
}

#[test]
fn a_socket_that_cannot_be_seen_is_named() {
    let folder = Folder::new();
    let mut b = Node::new(listening(2, &folder.sockets()));
    let Address::Unix(path) = b.control.addresses()[1].clone() else { panic!() };
    std::fs::remove_file(&path).unwrap();
    let mut a = Node::new(dialling(1, &folder.0.join("t"), &b.control.addresses()[0]));
    a.control.dial(0, Purpose::Push);
    let error = until(&mut [&mut a, &mut b], NOW, |nodes| nodes[0].dial_failed()).to_string();
    assert!(error.contains(path.to_str().unwrap()) && error.contains("mount"), "{error}");
}

#[test]
fn descriptors_arrive_with_the_message_they_were_sent_with() {
    let folder = Folder::new();
    let mut b = Node::new(config(2, &folder.sockets()));
    let mut a = Node::new(dialling(1, &folder.sockets(), &b.control.addresses()[0]));
    let (link, _) = linked(&mut a, &mut b, NOW);
    let memfd = |text: String| {
        let fd = rustix::fs::memfd_create("t", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(fd);
        file.write_all(text.as_bytes()).unwrap();
        file
    };
    let mut random = 42u64;
    let mut sent = Vec::new();
    for number in 0..400u64 {
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let (message, count) = match random >> 60 {
            0 if number % 8 == 0 => (big(number), 0),
            0..4 => {
                let message = Message::Segment {
                    segment: SegmentId(number as u32),
                    generation: 0,
                    bytes: number,
                    probe: number,
                    transport: "shm".into(),
                    blob: vec![0; (random >> 40) as usize % 60_000],
                };
                (message, 1 + number % 3)
            }
            _ => (note(number), 0),
        };
        let files: Vec<_> = (0..count).map(|part| memfd(format!("{number}.{part}"))).collect();
        let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        a.control.send(link, &message, &fds).unwrap();
        sent.push((message, count));
        if random >> 58 & 3 == 0 {
            a.poll(NOW);
        }
        if random >> 56 & 3 == 0 {
            b.poll(NOW);
        }
    }
    until(&mut [&mut a, &mut b], NOW, |nodes| (nodes[1].events.len() == sent.len()).then_some(()));
    for (number, (event, (expected, count))) in b.events.into_iter().zip(sent).enumerate() {
        let Event::Message { message, fds, .. } = event else { panic!("{event:?}") };
        assert!(message == expected, "message {number} differs");
        assert_eq!(fds.len() as u64, count, "message {number}");
        for (part, fd) in fds.into_iter().enumerate() {
            let flags = rustix::io::fcntl_getfd(&fd).unwrap();
            assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
            let mut file = File::from(fd);
            std::io::Seek::rewind(&mut file).unwrap();
            let mut text = String::new();
            file.read_to_string(&mut text).unwrap();
            assert_eq!(text, format!("{number}.{part}"));
        }
    }
}

#[test]
fn a_peer_that_does_not_read_loses_its_link_and_nobody_waits() {
    let folder = Folder::new();
    let mut b = Node::new(config(2, &folder.sockets()));
    let mut a = dialling(1, &folder.sockets(), &b.control.addresses()[0]);
    a.limits = Limits { queue_bytes: 2 << 20, ..Limits::default() };
    let mut a = Node::new(a);
    let (link, _) = linked(&mut a, &mut b, NOW);
    let begun = Instant::now();
    let error = (0..100).find_map(|number| a.control.send(link, &big(number), &[]).err()).unwrap();
    assert!(begun.elapsed() < PATIENCE);
    assert!(error.to_string().contains("does not read"), "{error}");
    assert_eq!(a.control.send(link, &note(0), &[]).unwrap_err().kind(), ErrorKind::NotFound);
    a.poll(NOW);
    assert_eq!(a.down(), Some(error));
    assert!(a.down().is_none());
}

#[test]
fn closing_tells_the_other_side_why() {
    let folder = Folder::new();
    let mut b = Node::new(config(2, &folder.sockets()));
    let mut a = Node::new(dialling(1, &folder.sockets(), &b.control.addresses()[0]));
    let (_, link) = linked(&mut a, &mut b, NOW);
    b.control.send(link, &note(5), &[]).unwrap();
    b.control.close(link, &ErrorKind::LayoutMismatch.error("the layouts differ"));
    let error = until(&mut [&mut a, &mut b], NOW, |nodes| nodes[0].down());
    assert_eq!(a.message(), Some(note(5)));
    assert!(error.to_string().contains("the layouts differ"), "{error}");
    assert!(b.down().is_none());
}

#[test]
fn a_restarted_listener_is_found_again() {
    let folder = Folder::new();
    let mut b = Node::new(listening(2, &folder.sockets()));
    let Address::Tcp { port, .. } = b.control.addresses()[0] else { panic!() };
    let mut a = Node::new(dialling(1, &folder.sockets(), &b.control.addresses()[0]));
    linked(&mut a, &mut b, NOW);
    drop(b);
    assert_eq!(until(&mut [&mut a], NOW, |nodes| nodes[0].down()).kind(), ErrorKind::PeerLost);
    let mut now = Duration::from_secs(1);
    until(&mut [&mut a], now, |nodes| {
        now += Duration::from_millis(10);
        nodes[0].poll(now);
        nodes[0].dial_failed()
    });
    let config = ControlConfig {
        listen: Some(Address::tcp("127.0.0.1", port)),
        ..config(3, &folder.sockets())
    };
    let mut b = Node::new(config);
    let peer = until(&mut [&mut a, &mut b], now, |nodes| {
        nodes[0].poll(now);
        now += Duration::from_millis(10);
        nodes[0].events.iter().find_map(|event| match event {
            Event::Up { peer, .. } => Some(peer.incarnation),
            _ => None,
        })
    });
    assert_eq!(peer, hello(3).incarnation);
    a.control.forget(0);
    drop(b);
    until(&mut [&mut a], now, |nodes| nodes[0].down());
    now += Duration::from_secs(60);
    a.poll(now);
    assert!(a.dial_failed().is_none());
    assert_eq!(a.control.next_timeout(), None);
}

#[test]
fn two_threads_park_and_are_woken() {
    let folder = Folder::new();
    let b = Node::new(config(2, &folder.sockets()));
    let a = dialling(1, &folder.sockets(), &b.control.addresses()[0]);
    let begun = Instant::now();
    // Echoes until it is told to stop, which it learns only by being woken.
    let (stop, stopped) = crossbeam_channel::bounded::<()>(1);
    let waker = b.control.waker();
    let echo = move |mut control: Control| {
        let mut events = Vec::new();
        while stopped.try_recv().is_err() {
            control.poll(begun.elapsed(), None, &mut events).unwrap();
            for event in events.drain(..) {
                if let Event::Message { link, message, .. } = event {
                    control.send(link, &message, &[]).unwrap();
                }
            }
        }
    };
    let echo = std::thread::spawn(move || echo(b.control));
    let mut a = Node::new(a);
    a.control.dial(0, Purpose::Push);
    let poll = |a: &mut Node| {
        let mut events = Vec::new();
        a.control.poll(begun.elapsed(), Some(PATIENCE), &mut events).unwrap();
        assert!(begun.elapsed() < PATIENCE);
        a.events.append(&mut events);
    };
    let link = loop {
        poll(&mut a);
        if let Some(link) = a.up() {
            break link;
        }
    };
    for number in 0..1000 {
        a.control.send(link, &note(number), &[]).unwrap();
        while a.message().map(|message| assert_eq!(message, note(number))).is_none() {
            poll(&mut a);
        }
    }
    stop.send(()).unwrap();
    waker.wake();
    echo.join().unwrap();
}
