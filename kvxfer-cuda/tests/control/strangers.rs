use std::io::{ErrorKind::WouldBlock, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use kvxfer_core::wire::{self, Purpose};
use kvxfer_core::{ErrorKind, Incarnation};
use kvxfer_cuda::control::Address;

use crate::harness::*;

const NOW: Duration = Duration::ZERO;

fn connect(node: &Node) -> TcpStream {
    let Address::Tcp { port, .. } = node.control.addresses()[0] else { panic!() };
    let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_nonblocking(true).unwrap();
    stream
}

/// What the stream says before it ends, if it has ended.
fn ended(stream: &mut TcpStream, said: &mut Vec<u8>) -> Option<()> {
    match stream.read_to_end(said) {
        Err(error) if error.kind() == WouldBlock => None,
        _ => Some(()),
    }
}

#[test]
fn whoever_speaks_something_else_is_let_go_and_others_are_served() {
    let folder = Folder::new();
    let mut b = listening(2, &folder.sockets());
    b.allow_insecure = true;
    let mut b = Node::new(b);
    let mut good = Vec::new();
    wire::encode_hello(&wire::Hello { purpose: Purpose::Push, ..hello(9) }, &mut good).unwrap();
    let early = {
        let mut bytes = wire::frame::MAGIC.to_vec();
        wire::encode(&note(1), Incarnation([9; 16]), 1, &mut bytes).unwrap();
        bytes
    };
    let long = {
        let mut bytes = wire::frame::MAGIC.to_vec();
        bytes.extend(5000u32.to_le_bytes());
        bytes.extend([0; 20]);
        bytes
    };
    let forged = {
        let mut bytes = good.clone();
        wire::encode(&note(1), Incarnation([8; 16]), 1, &mut bytes).unwrap();
        bytes
    };
    let strangers: [&[u8]; 6] = [
        b"GET /metrics HTTP/1.1\r\nHost: decode\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        &[0xA5; 3000],
        &early,
        &long,
        &good.iter().map(|byte| byte ^ 0x40).collect::<Vec<_>>(),
    ];
    let count = strangers.len() as u64;
    for bytes in strangers {
        let (mut stream, mut said) = (connect(&b), Vec::new());
        stream.write_all(bytes).unwrap();
        until(&mut [&mut b], NOW, |_| ended(&mut stream, &mut said));
        assert!(said.is_empty(), "{said:?}");
    }
    assert_eq!(b.control.counts().refused, count);
    assert!(b.events.is_empty(), "{:?}", b.events);

    // A frame of another incarnation, on a link that is up.
    let (mut stream, mut said) = (connect(&b), Vec::new());
    stream.write_all(&forged).unwrap();
    until(&mut [&mut b], NOW, |_| ended(&mut stream, &mut said));
    assert!(b.up().is_some());
    assert_eq!(b.down().unwrap().kind(), ErrorKind::Protocol);

    let mut a = Node::new(dialling(1, &folder.sockets(), &b.control.addresses()[0]));
    linked(&mut a, &mut b, NOW);
}

#[test]
fn half_a_hello_is_waited_for_no_longer_than_the_timeout() {
    let folder = Folder::new();
    let mut b = Node::new(listening(2, &folder.sockets()));
    let (mut silent, mut slow, mut said) = (connect(&b), connect(&b), Vec::new());
    let mut bytes = Vec::new();
    wire::encode_hello(&hello(9), &mut bytes).unwrap();
    slow.write_all(&bytes[..20]).unwrap();
    for tenth in 0..20 {
        b.poll(Duration::from_millis(100 * tenth));
        // Talking does not buy time.
        slow.write_all(&bytes[20 + tenth as usize..][..1]).unwrap();
        assert!(ended(&mut silent, &mut said).is_none() && ended(&mut slow, &mut said).is_none());
    }
    let mut a = Node::new(dialling(1, &folder.sockets(), &b.control.addresses()[0]));
    let now = Duration::from_millis(1900);
    linked(&mut a, &mut b, now);
    let now = Duration::from_millis(2500);
    until(&mut [&mut b], now, |_| ended(&mut silent, &mut said).and(Some(())));
    until(&mut [&mut b], now, |_| ended(&mut slow, &mut said));
    assert_eq!(b.control.counts().refused, 2);
    assert!(b.down().is_none());
}

#[test]
fn who_connects_and_leaves_is_no_stranger() {
    let folder = Folder::new();
    let mut b = Node::new(listening(2, &folder.sockets()));
    drop(connect(&b));
    let mut a = Node::new(dialling(1, &folder.sockets(), &b.control.addresses()[0]));
    linked(&mut a, &mut b, NOW);
    assert_eq!(b.control.counts().refused, 0);
}

#[test]
fn two_versions_without_overlap_name_each_other() {
    let folder = Folder::new();
    let mut b = listening(2, &folder.sockets());
    b.hello.versions = (4, 5);
    let mut b = Node::new(b);
    for address in b.control.addresses().to_vec() {
        let mut a = dialling(1, &folder.sockets(), &address);
        a.hello.versions = (2, 3);
        let mut a = Node::new(a);
        a.control.dial(0, Purpose::Push);
        let error = until(&mut [&mut a, &mut b], NOW, |nodes| nodes[0].dial_failed());
        assert_eq!(error.kind(), ErrorKind::VersionMismatch);
        let text = error.to_string();
        assert!(text.contains("2 to 3") && text.contains("4 to 5"), "{text}");
    }
    assert_eq!(b.control.counts().refused, 2);
    assert!(b.events.is_empty());

    let mut a = dialling(1, &folder.sockets(), &b.control.addresses()[0]);
    a.hello.versions = (3, 4);
    let mut a = Node::new(a);
    let (link, _) = linked(&mut a, &mut b, NOW);
    a.control.send(link, &note(1), &[]).unwrap();
    assert_eq!(until(&mut [&mut a, &mut b], NOW, |nodes| nodes[1].message()), note(1));
}
