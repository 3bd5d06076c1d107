//! Memory that several processes hold.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Stdio;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::harness::*;

const SHARED: &str = "memory=8MiB;ledger={folder}/ledger";
const PIECE: usize = 4 * MIB;

fn send(socket: &UnixStream, fd: impl AsFd) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [fd.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(socket, &[IoSlice::new(b"x")], &mut control, SendFlags::empty()).unwrap();
}

fn receive(socket: impl AsFd) -> OwnedFd {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    recvmsg(socket, &mut [IoSliceMut::new(&mut [0])], &mut control, RecvFlags::CMSG_CLOEXEC)
        .unwrap();
    match control.drain().next() {
        Some(RecvAncillaryMessage::ScmRights(mut fds)) => fds.next().unwrap(),
        _ => panic!("no descriptor came"),
    }
}

#[test]
fn an_importer_keeps_memory_that_its_killed_owner_had() {
    play(SHARED, |role, stage| {
        start_on(0);
        match role {
            "first" => {
                let (here, there) = UnixStream::pair().unwrap();
                let mut owner = stage.spawn("owner", SHARED, OwnedFd::from(there));
                owner.expect("sent");
                assert_eq!(free_memory(), 0);
                assert_eq!(create(0, 2 * MIB), Err(2));
                owner.kill();
                // What it had not sent is free; what is in the socket isn't.
                assert_eq!(free_memory(), PIECE);

                let fd = receive(&here);
                let mut importer = stage.spawn("importer", SHARED, Stdio::from(fd));
                importer.expect("mapped");
                assert_eq!(free_memory(), PIECE);
                importer.kill();
                assert_eq!(free_memory(), 2 * PIECE);
                let files = std::fs::read_dir(stage.folder().join("ledger")).unwrap();
                assert_eq!(files.count(), 1, "all but the lock is swept");
                nothing_is_left(&[0]);
            }
            "owner" => {
                let (sent, kept) = (create(0, PIECE).unwrap(), create(0, PIECE).unwrap());
                map(kept, PIECE, 0);
                send(&stdin_socket(), export(sent));
                say("sent");
                std::thread::park();
            }
            _ => {
                let handle = import(PASSED).unwrap();
                map(handle, PIECE, 0);
                ok!(cuMemRelease(handle));
                say("mapped");
                std::thread::park();
            }
        }
    });
}

fn stdin_socket() -> UnixStream {
    std::io::stdin().as_fd().try_clone_to_owned().unwrap().into()
}

#[test]
fn a_descriptor_that_nobody_read_holds_memory_until_its_socket_is_closed() {
    play(SHARED, |_, _| {
        start_on(0);
        let (here, there) = UnixStream::pair().unwrap();
        let handle = create(0, PIECE).unwrap();
        send(&here, export(handle));
        ok!(cuMemRelease(handle));
        drop(here);
        assert_eq!(free_memory(), PIECE);
        assert_eq!(report()[0], 0, "this process has none");
        drop(there);
        assert_eq!(free_memory(), 2 * PIECE);
        nothing_is_left(&[0]);
    });
}

#[test]
fn memory_of_a_hidden_device_is_refused_and_of_an_invisible_one_is_not() {
    play("", |role, stage| {
        start();
        match role {
            "first" => {
                let handle = create(1, 2 * MIB).unwrap();
                stage.spawn("refused", "hidden=1", Stdio::from(export(handle))).passes();
                let fd = export(handle);
                stage.spawn_with("imported", "", Stdio::from(fd), Some("0")).passes();
                let fd = export(handle);
                stage.spawn_with("no link", "p2p=", Stdio::from(fd), Some("0")).passes();
            }
            "refused" => assert_eq!(import(PASSED), Err(101)),
            role => {
                let handle = import(PASSED).unwrap();
                let mut start = 0_u64;
                ok!(cuMemAddressReserve(&mut start, 2 * MIB, 0_usize, 0_u64, 0_u64));
                ok!(cuMemMap(start, 2 * MIB, 0_usize, handle, 0_u64));
                let refused = if role == "imported" { 0 } else { 101 };
                assert_eq!(set_access(start, 2 * MIB, 0, 3), refused);
                // What is imported is not passed on.
                let mut fd = -1;
                assert_eq!(cu!(cuMemExportToShareableHandle(&mut fd, handle, POSIX, 0_u64)), 1);
                unmap(start, 2 * MIB);
                ok!(cuMemRelease(handle));
                assert_eq!(report(), [0; 9]);
            }
        }
    });
}

/// A handle of bytes travels as a file that is `stdin`.
fn pass(stage: &Stage, handle: &[u8; 64]) -> Stdio {
    let path = stage.folder().join("handle");
    std::fs::write(&path, handle).unwrap();
    std::fs::File::open(path).unwrap().into()
}

fn passed() -> [u8; 64] {
    let mut handle = [0; 64];
    std::io::Read::read_exact(&mut std::io::stdin(), &mut handle).unwrap();
    handle
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Handle([u8; 64]);

#[test]
fn legacy_handles_open_in_another_process_only() {
    let config = "devices=3;nvlink=0-1;memory=8MiB;ledger={folder}/ledger";
    play(config, |role, stage| {
        let open = |handle: [u8; 64], flags: u32| {
            let mut start = 0_u64;
            (cu!(cuIpcOpenMemHandle_v2(&mut start, Handle(handle), flags)), start)
        };
        start_on(if role == "far" { 2 } else { 0 });
        match role {
            "first" => {
                let (mut start, mut handle) = (0_u64, [0; 64]);
                ok!(cuMemAlloc_v2(&mut start, PIECE));
                ok!(cuIpcGetMemHandle(&mut handle, start + 5));
                assert_eq!(cu!(cuIpcGetMemHandle(&mut handle, 5_u64)), 1);
                assert_eq!(open(handle, 1).0, 201);
                stage.spawn("far", config, pass(stage, &handle)).passes();
                let mut opener = stage.spawn("opener", config, pass(stage, &handle));
                opener.expect("open");
                ok!(cuMemFree_v2(start));
                assert_eq!(free_memory(), PIECE, "an importer keeps it");
                stage.spawn("late", config, pass(stage, &handle)).passes();
                opener.kill();
                assert_eq!(free_memory(), 2 * PIECE);
                nothing_is_left(&[0]);
            }
            "far" => assert_eq!(open(passed(), 1).0, 217),
            "late" => assert_eq!(open(passed(), 1).0, 205),
            _ => {
                let handle = passed();
                assert_eq!(open(handle, 0).0, 1);
                assert_eq!(open([7; 64], 1).0, 400);
                let (code, start) = open(handle, 1);
                assert_eq!((code, cu!(cuMemFree_v2(start))), (0, 1));
                ok!(cuIpcCloseMemHandle(start));
                assert_eq!(cu!(cuIpcCloseMemHandle(start)), 1);
                assert_eq!(report()[..2], [0, 0]);
                assert_eq!(open(handle, 1).0, 0);
                say("open");
                std::thread::park();
            }
        }
    });
}

#[test]
fn fabric_handles_work_where_there_is_a_fabric() {
    play("fabric=1", |role, stage| {
        start();
        let import = |handle: [u8; 64]| {
            let mut imported = 0_u64;
            (cu!(cuMemImportFromShareableHandle(&mut imported, handle.as_ptr(), 8_i32)), imported)
        };
        if role == "first" {
            let (mut wanted, mut memory, mut handle) = (properties(1), 0_u64, [0_u8; 64]);
            wanted.handles = 8;
            ok!(cuMemCreate(&mut memory, 2 * MIB, &wanted, 0_u64));
            ok!(cuMemExportToShareableHandle(handle.as_mut_ptr(), memory, 8_i32, 0_u64));
            stage.spawn("importer", "fabric=1", pass(stage, &handle)).passes();
            stage.spawn("hidden", "fabric=1;hidden=1", pass(stage, &handle)).passes();
            ok!(cuMemRelease(memory));
            assert_eq!(import(handle).0, 205);
            assert_eq!(report(), [0; 9]);
        } else if role == "hidden" {
            assert_eq!(import(passed()).0, 101);
        } else {
            let (code, memory) = import(passed());
            assert_eq!(code, 0);
            unmap(map(memory, 2 * MIB, 0), 2 * MIB);
            ok!(cuMemRelease(memory));
            assert_eq!(report(), [0; 9]);
        }
    });
}
