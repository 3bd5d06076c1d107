use std::fs::{self, Permissions};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::Duration;

use kvxfer_core::ErrorKind;
use kvxfer_cuda::control::{Address, Control, ControlConfig};
use rustix::process::{Resource, getrlimit, setrlimit};

use crate::harness::*;

const NOW: Duration = Duration::ZERO;

fn refused(config: ControlConfig) -> String {
    let error = Control::new(config).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config, "{error}");
    error.to_string()
}

#[test]
fn a_socket_folder_that_is_not_ours_alone_is_refused() {
    let folder = Folder::new();
    let sockets = folder.sockets();
    drop(Control::new(config(1, &sockets)).unwrap());
    assert_eq!(fs::metadata(&sockets).unwrap().permissions().mode() & 0o7777, 0o700);
    assert_eq!(fs::read_dir(&sockets).unwrap().count(), 0);

    for mode in [0o755, 0o770, 0o701] {
        fs::set_permissions(&sockets, Permissions::from_mode(mode)).unwrap();
        let error = refused(config(1, &sockets));
        assert!(
            error.contains(&format!("mode 0{mode:o}")) && error.contains("chmod 0700"),
            "{error}"
        );
    }
    fs::set_permissions(&sockets, Permissions::from_mode(0o700)).unwrap();
    let link = folder.0.join("link");
    std::os::unix::fs::symlink(&sockets, &link).unwrap();
    assert!(refused(config(1, &link)).contains("symbolic link"));
    let file = folder.0.join("file");
    fs::write(&file, "").unwrap();
    assert!(refused(config(1, &file)).contains("not a folder"));
    let error = refused(config(1, &folder.0.join("x".repeat(100))));
    assert!(error.contains("107") && error.contains("socket_dir"), "{error}");
}

#[test]
fn a_folder_of_another_user_is_refused() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can give a folder away");
        return;
    }
    let folder = Folder::new();
    let sockets = folder.sockets();
    fs::create_dir(&sockets).unwrap();
    fs::set_permissions(&sockets, Permissions::from_mode(0o700)).unwrap();
    std::os::unix::fs::chown(&sockets, Some(12345), None).unwrap();
    let error = refused(config(1, &sockets));
    assert!(error.contains("belongs to uid 12345"), "{error}");
}

#[test]
fn an_address_in_use_is_named_with_the_fix() {
    let folder = Folder::new();
    let one = Control::new(listening(1, &folder.sockets())).unwrap();
    let Address::Tcp { port, .. } = one.addresses()[0] else { panic!() };
    let listen = |address| ControlConfig { listen: Some(address), ..config(2, &folder.sockets()) };
    let error = refused(listen(Address::tcp("127.0.0.1", port)));
    assert!(error.contains(&format!("port {port} is in use")), "{error}");
    let error = refused(listen(Address::tcp("192.0.2.1", 0)));
    assert!(error.contains("no such address"), "{error}");
    let error = refused(listen(one.addresses()[1].clone()));
    assert!(error.contains("is in use"), "{error}");
}

#[test]
fn sockets_of_the_dead_are_replaced_and_other_files_left() {
    let folder = Folder::new();
    let sockets = folder.sockets();
    let mut b = Node::new(config(2, &sockets));
    // Dropping a listener of the standard library leaves its file, as a killed agent does.
    let dead = |path: &PathBuf| drop(UnixListener::bind(path).unwrap());
    let swept = sockets.join(format!("kvxfer-07070707-{}.sock", "09".repeat(16)));
    let (fixed, foreign, file) =
        (sockets.join("agent.sock"), sockets.join("other.sock"), sockets.join("file.sock"));
    dead(&swept);
    dead(&fixed);
    dead(&foreign);
    fs::write(&file, "precious").unwrap();

    let third = Node::new(config(3, &sockets));
    assert!(!swept.exists() && foreign.exists());
    drop(third);

    let at = |path: &PathBuf| ControlConfig {
        listen: Some(Address::Unix(path.clone())),
        ..ControlConfig::new(hello(4))
    };
    let mut fourth = Node::new(at(&fixed));
    let mut a = Node::new(dialling(1, &sockets, &Address::Unix(fixed.clone())));
    linked(&mut a, &mut fourth, NOW);
    drop(fourth);
    assert!(!fixed.exists());
    assert!(refused(at(&file)).contains("is in use"));
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");

    let mut a = Node::new(dialling(1, &folder.0.join("t"), &b.control.addresses()[0]));
    linked(&mut a, &mut b, NOW);
}

#[test]
fn a_storm_of_connections_stops_at_the_limit_and_passes() {
    let mut files = getrlimit(Resource::Nofile);
    files.current = files.maximum;
    setrlimit(Resource::Nofile, files).unwrap();

    let folder = Folder::new();
    let mut b = listening(2, &folder.sockets());
    b.limits.max_links = 100;
    let mut b = Node::new(b);
    let Address::Tcp { port, .. } = b.control.addresses()[0] else { panic!() };
    let mut a = dialling(1, &folder.sockets(), &b.control.addresses()[1]);
    a.limits.backoff = Duration::from_secs(1);
    let mut a = Node::new(a);
    let mut storm = Vec::new();
    for _ in 0..1000 {
        storm.push(TcpStream::connect(("127.0.0.1", port)).unwrap());
        b.control.poll(NOW, Some(Duration::ZERO), &mut b.events).unwrap();
    }
    until(&mut [&mut b], NOW, |nodes| (nodes[0].control.counts().over_limit == 900).then_some(()));
    a.control.dial(0, kvxfer_core::wire::Purpose::Push);
    let error = until(&mut [&mut a, &mut b], NOW, |nodes| nodes[0].dial_failed()).to_string();
    assert!(error.contains("100 connections"), "{error}");
    // None of the hundred says hello.
    let mut now = NOW;
    until(&mut [&mut a, &mut b], now, |nodes| {
        now += Duration::from_millis(100);
        nodes.iter_mut().for_each(|node| node.poll(now));
        nodes[0].up()
    });
    assert_eq!(b.control.counts().refused, 100);
}
