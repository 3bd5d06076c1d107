use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kvxfer_core::{ErrorKind, Incarnation};
use kvxfer_cuda::control::{Address, Located, check_socket_dir, locate};

use crate::harness::*;

/// Asks while the node is polled.
fn located(node: &mut Node, address: &Address) -> kvxfer_core::Result<Located> {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let answer = locate(address, "a tool", PATIENCE);
            done.store(true, Ordering::Release);
            answer
        });
        while !done.load(Ordering::Acquire) {
            node.poll(Duration::ZERO);
        }
        asking.join().unwrap()
    })
}

#[test]
fn an_agent_says_who_it_is_over_tcp_and_over_its_socket() {
    let folder = Folder::new();
    let mut node = Node::new(listening(2, &folder.sockets()));
    let [tcp, unix] = node.control.addresses().to_vec().try_into().unwrap();
    let over_tcp = located(&mut node, &tcp).unwrap();
    assert_eq!(over_tcp.hello.incarnation, Incarnation([2; 16]));
    assert_eq!((over_tcp.pid, over_tcp.mortal), (None, false));
    let path = over_tcp.hello.unix_path.unwrap();
    assert_eq!(unix, Address::Unix(path.into()));
    let over_unix = located(&mut node, &unix).unwrap();
    assert_eq!(over_unix.hello.name, "agent 2");
    assert_eq!((over_unix.pid, over_unix.mortal), (Some(std::process::id()), true));
    assert!(node.events.is_empty(), "nothing has an effect");
}

/// A server of one connection, which says that and waits for the other side to leave.
fn says(what: &'static [u8]) -> Address {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(what).unwrap();
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
    });
    Address::tcp("127.0.0.1", port)
}

#[test]
fn who_is_no_agent_is_told_from_who_is_not_there() {
    let asked = |address: &Address, patience| locate(address, "a tool", patience).unwrap_err();
    let error = asked(&says(b"HTTP/1.1 400 Bad Request\r\n\r\n"), PATIENCE);
    assert_eq!(error.kind(), ErrorKind::Protocol);
    assert!(error.about().contains("look like HTTP"), "{error}");
    assert!(error.remedy().unwrap().contains("agent's own port"), "{error}");

    let error = asked(&says(b""), Duration::from_millis(50));
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert!(error.about().contains("says nothing"), "{error}");

    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let error = asked(&Address::tcp("127.0.0.1", closed), PATIENCE);
    assert_eq!(error.kind(), ErrorKind::PeerLost);
    assert!(error.remedy().unwrap().contains("start the decode engine"), "{error}");

    let folder = Folder::new();
    let error = asked(&Address::Unix(folder.0.join("gone.sock")), PATIENCE);
    assert_eq!(error.kind(), ErrorKind::NoPath);
    assert!(error.remedy().unwrap().contains("socket folder"), "{error}");
}

#[test]
fn a_folder_is_judged_without_being_made() {
    let folder = Folder::new();
    let sockets = folder.sockets();
    assert_eq!(check_socket_dir(&sockets), Ok(false));
    assert!(!sockets.exists());
    std::fs::create_dir(&sockets).unwrap();
    for (mode, why) in [(0o700, None), (0o750, Some("has mode 0750"))] {
        std::fs::set_permissions(&sockets, std::fs::Permissions::from_mode(mode)).unwrap();
        let judged = check_socket_dir(&sockets);
        match why {
            None => assert_eq!(judged, Ok(true)),
            Some(why) => {
                let error = judged.unwrap_err();
                assert!(error.about().contains(why), "{error}");
                assert!(error.remedy().unwrap().contains("chmod 0700"), "{error}");
            }
        }
    }
    let link = folder.0.join("link");
    std::os::unix::fs::symlink(&sockets, &link).unwrap();
    assert!(check_socket_dir(&link).unwrap_err().about().contains("symbolic link"));
    let long = folder.0.join("x".repeat(100));
    assert!(check_socket_dir(&long).unwrap_err().remedy().unwrap().contains("shorter path"));
    assert!(!long.exists());
}
