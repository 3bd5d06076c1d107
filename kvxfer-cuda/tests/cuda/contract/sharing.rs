//! Memory that two processes share.

use std::io::Write as _;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use kvxfer_cuda::driver::{
    CudaError, Device, DevicePtr, Handle, Mapped, Priority, Sharing, Uuid, cuda,
};
use rustix::fs::{MemfdFlags, memfd_create};

use super::MUCH;
use crate::harness::{
    DEADLINE, Peer, Wire, assert_nothing_lives, child_device, device, drain, get, parent, pattern,
    put, skip,
};

/// How much of shared memory is read and written, wherever it has more.
const LEN: u64 = 2 << 20;

pub(super) const CLAUSES: &[super::Clause] = &[
    (
        "sharing::another_process_reads_and_writes",
        "Memory that was exported as a descriptor and imported elsewhere is the same memory: each side reads what the \
         other one wrote, once that one's work is done.",
    ),
    (
        "sharing::an_import_outlives_its_descriptor",
        "A descriptor may be closed once it was imported, and imported again as long as it is open.",
    ),
    (
        "sharing::an_import_outlives_its_owners_release",
        "Imported memory stays when its owner unmaps and releases it, and counts as used until the importer lets go.",
    ),
    (
        "sharing::an_import_outlives_its_owner",
        "Imported memory stays when its owner is killed, and counts as used until the importer lets go.",
    ),
    ("sharing::a_killed_importer_lets_go", "What only a killed process held is free again."),
    (
        "sharing::fresh_memory_hides_an_old_writer",
        "Who imported the memory that lay behind a segment before writes there, and nowhere else.",
    ),
    (
        "sharing::a_dead_writer_writes_no_more",
        "When a process has been killed and reaped, nothing that it queued writes any more (without MPS).",
    ),
    (
        "sharing::what_is_no_memory_is_refused",
        "To import a descriptor of something else is refused, and the device works on.",
    ),
    (
        "sharing::plain_memory_is_opened_elsewhere",
        "Plain memory of a multiple of 2 MiB is opened by its IPC handle in another process, at its first byte, and \
         `cuMemGetAddressRange` tells there how much it is.",
    ),
    (
        "sharing::memory_is_shared_over_a_fabric",
        "Where device and host take part in a fabric, memory is imported by its fabric handle as it is by a descriptor.",
    ),
    (
        "sharing::a_handle_is_not_opened_at_home",
        "An IPC handle is refused in the process that made it.",
    ),
    (
        "sharing::a_device_has_one_name",
        "A device has the same UUID in every process, also where `CUDA_VISIBLE_DEVICES` gives it another ordinal.",
    ),
];

// The child.

#[test]
fn child() {
    for (role, play) in ROLES {
        if let Some(mut parent) = parent(role) {
            play(&mut parent);
            assert_nothing_lives();
        }
    }
}

type Role = (&'static str, fn(&mut Wire));

const ROLES: [Role; 4] = [("import", import), ("export", export), ("open", open), ("name", name)];

fn import(parent: &mut Wire) {
    let device = child_device();
    let (bytes, fd) = parent.receive_fd::<8>();
    let physical = device.import(fd.as_fd(), u64::from_le_bytes(bytes)).unwrap();
    drop(fd);
    let mapped = device.map(Arc::new(physical)).unwrap();
    obey(&device, mapped.ptr(), parent);
}

fn export(parent: &mut Wire) {
    let device = child_device();
    let mapped = mapped(&device, MUCH);
    fill(&device, mapped.ptr(), 7);
    parent.send_fd(&[1], mapped.physical().export().unwrap().as_fd());
    obey(&device, mapped.ptr(), parent);
}

fn open(parent: &mut Wire) {
    let device = child_device();
    let handle = match parent.receive() {
        [0] => Handle::Legacy(parent.receive()),
        _ => Handle::Fabric(parent.receive()),
    };
    if matches!(handle, Handle::Legacy(_)) {
        let error = device.import_handle(&handle, LEN + 1).unwrap_err();
        assert_eq!(error, CudaError::OutOfBounds { offset: 0, len: LEN + 1, bytes: LEN });
    }
    let mapped = device.map(Arc::new(device.import_handle(&handle, LEN).unwrap())).unwrap();
    obey(&device, mapped.ptr(), parent);
}

fn name(parent: &mut Wire) {
    let driver = cuda().unwrap();
    let count = Device::count(&driver).unwrap();
    parent.send(&[u8::try_from(count).unwrap()]);
    for ordinal in 0..count {
        parent.send(&Device::open(Arc::clone(&driver), ordinal).unwrap().uuid().0);
    }
}

/// Does what it is told until the parent is gone: sets all bytes (`f`), says whether all are so (`e`), or sets them
/// again and again, first one and then the rest (`s`).
fn obey(device: &Device, ptr: DevicePtr, parent: &mut Wire) {
    parent.send(&[0]);
    while let Some([order, byte]) = parent.order() {
        match order {
            b'f' => fill(device, ptr, byte),
            b'e' => {
                let same = get(device, ptr, LEN as usize).iter().all(|&b| b == byte);
                parent.send(&[u8::from(same)]);
                continue;
            }
            _ => scribble(device, ptr, byte, parent),
        }
        parent.send(&[byte]);
    }
}

/// Writes all the time, and answers after each order once more has been written.
fn scribble(device: &Device, ptr: DevicePtr, byte: u8, parent: &mut Wire) {
    let stream = device.stream(Priority::Default).unwrap();
    let start = Instant::now();
    parent.nonblocking();
    parent.send(&[byte]);
    while start.elapsed() < DEADLINE {
        for _ in 0..16 {
            for at in 0..16 {
                stream.fill(ptr.offset(at * LEN / 16), byte, LEN / 16).unwrap();
            }
        }
        drain(&stream);
        match parent.asked() {
            None => return,
            Some(true) => parent.send(&[byte]),
            Some(false) => {}
        }
    }
}

// The parent.

fn mapped(device: &Device, bytes: u64) -> Mapped {
    device.map(Arc::new(device.allocate(bytes).unwrap())).unwrap()
}

fn fill(device: &Device, ptr: DevicePtr, byte: u8) {
    let stream = device.stream(Priority::Default).unwrap();
    stream.fill(ptr, byte, LEN).unwrap();
    drain(&stream);
}

#[track_caller]
fn assert_filled(device: &Device, ptr: DevicePtr, byte: u8) {
    let bytes = get(device, ptr, LEN as usize);
    assert!(bytes.iter().all(|&b| b == byte), "not all are {byte}");
}

/// A child that has imported this memory.
fn importer(mapped: &Mapped) -> Peer {
    let mut peer = Peer::start("contract::sharing::child", "import");
    let fd = mapped.physical().export().unwrap();
    peer.wire.send_fd(&mapped.bytes().to_le_bytes(), fd.as_fd());
    assert_eq!(peer.wire.receive(), [0], "it is imported");
    peer
}

/// Has a child do something.
#[track_caller]
fn order(peer: &mut Peer, order: u8, byte: u8) -> u8 {
    peer.wire.send(&[order, byte]);
    peer.wire.receive::<1>()[0]
}

#[test]
fn another_process_reads_and_writes() {
    let device = device!();
    let mapped = mapped(&device, LEN);
    fill(&device, mapped.ptr(), 1);
    let mut peer = importer(&mapped);
    assert_eq!(order(&mut peer, b'e', 1), 1);
    assert_eq!(order(&mut peer, b'e', 2), 0);
    fill(&device, mapped.ptr(), 2);
    assert_eq!(order(&mut peer, b'e', 2), 1);
    order(&mut peer, b'f', 3);
    assert_filled(&device, mapped.ptr(), 3);
    peer.ends();
}

#[test]
fn an_import_outlives_its_descriptor() {
    let device = device!();
    let own = mapped(&device, LEN);
    let fd = own.physical().export().unwrap();
    let imports = [(); 2].map(|()| {
        let physical = device.import(fd.as_fd(), own.bytes()).unwrap();
        device.map(Arc::new(physical)).unwrap()
    });
    drop(fd);
    fill(&device, own.ptr(), 4);
    for import in &imports {
        assert_filled(&device, import.ptr(), 4);
    }
}

#[test]
fn an_import_outlives_its_owners_release() {
    let device = device!(counted);
    let before = device.memory().unwrap().0;
    let mapped = mapped(&device, MUCH);
    fill(&device, mapped.ptr(), 5);
    let mut peer = importer(&mapped);
    let held = device.memory().unwrap().0;
    drop(mapped);
    assert_eq!(order(&mut peer, b'e', 5), 1);
    assert_eq!(order(&mut peer, b'f', 6), 6);
    assert_eq!(order(&mut peer, b'e', 6), 1);
    super::assert_free(&device, held);
    peer.ends();
    super::assert_free(&device, before);
}

#[test]
fn an_import_outlives_its_owner() {
    let device = device!(counted);
    let before = device.memory().unwrap().0;
    let mut peer = Peer::start("contract::sharing::child", "export");
    let (_, fd) = peer.wire.receive_fd::<1>();
    let physical = device.import(fd.as_fd(), MUCH).unwrap();
    drop(fd);
    let mapped = device.map(Arc::new(physical)).unwrap();
    peer.kill();
    assert_filled(&device, mapped.ptr(), 7);
    fill(&device, mapped.ptr(), 8);
    assert_filled(&device, mapped.ptr(), 8);
    super::assert_free(&device, before - MUCH);
    drop(mapped);
    super::assert_free(&device, before);
}

#[test]
fn a_killed_importer_lets_go() {
    let device = device!(counted);
    let before = device.memory().unwrap().0;
    let mapped = mapped(&device, MUCH);
    let mut peer = importer(&mapped);
    drop(mapped);
    peer.kill();
    super::assert_free(&device, before);
}

#[test]
fn fresh_memory_hides_an_old_writer() {
    let device = device!();
    let old = mapped(&device, LEN);
    fill(&device, old.ptr(), 1);
    let mut peer = importer(&old);
    assert_eq!(order(&mut peer, b's', 2), 2);

    let fresh = mapped(&device, LEN);
    fill(&device, fresh.ptr(), 9);
    for _ in 0..20 {
        // It does keep writing, to where it always did.
        fill(&device, old.ptr(), 1);
        assert_eq!(order(&mut peer, b'?', 0), 2);
        assert_eq!(order(&mut peer, b'?', 0), 2);
        assert_filled(&device, fresh.ptr(), 9);
    }
    drop(old);
    assert_eq!(order(&mut peer, b'?', 0), 2);
    assert_filled(&device, fresh.ptr(), 9);
}

#[test]
fn a_dead_writer_writes_no_more() {
    let device = device!();
    for _ in 0..5 {
        let mapped = mapped(&device, LEN);
        fill(&device, mapped.ptr(), 1);
        let mut peer = importer(&mapped);
        assert_eq!(order(&mut peer, b's', 2), 2);
        peer.kill();
        fill(&device, mapped.ptr(), 3);
        for _ in 0..5 {
            assert_filled(&device, mapped.ptr(), 3);
        }
    }
}

#[test]
fn what_is_no_memory_is_refused() {
    let device = device!();
    let memfd = memfd_create("nothing", MemfdFlags::CLOEXEC).unwrap();
    std::fs::File::from(memfd.try_clone().unwrap()).write_all(&[0; 8192]).unwrap();
    let (pipe, _other) = std::io::pipe().unwrap();
    for fd in [memfd.as_fd(), pipe.as_fd()] {
        let mapped = device.import(fd, LEN).and_then(|physical| device.map(Arc::new(physical)));
        let error = mapped.unwrap_err();
        assert!(!error.is_sticky(), "{error}");
    }
    let mapped = mapped(&device, LEN);
    put(&device, mapped.ptr(), &pattern(4096, 1));
    assert!(get(&device, mapped.ptr(), 4096) == pattern(4096, 1));
}

/// Shares memory by 64 bytes, and has both sides write to it.
fn shared_by_name(device: &Device, sharing: Sharing) {
    let mapped = device.map(Arc::new(device.allocate_as(sharing, LEN).unwrap())).unwrap();
    fill(device, mapped.ptr(), 1);
    let mut peer = Peer::start("contract::sharing::child", "open");
    match mapped.physical().share().unwrap() {
        Handle::Legacy(name) => peer.wire.send(&[&[0], &name[..]].concat()),
        Handle::Fabric(name) => peer.wire.send(&[&[1], &name[..]].concat()),
        Handle::Fd(_) => panic!("a descriptor is no name"),
    }
    assert_eq!(peer.wire.receive(), [0], "it is opened");
    assert_eq!(order(&mut peer, b'e', 1), 1);
    order(&mut peer, b'f', 2);
    assert_filled(device, mapped.ptr(), 2);
    peer.ends();
}

#[test]
fn plain_memory_is_opened_elsewhere() {
    let device = device!();
    shared_by_name(&device, Sharing::Legacy);
}

#[test]
fn memory_is_shared_over_a_fabric() {
    let device = device!();
    if !device.supports_fabric() {
        return skip("the device has no fabric");
    }
    match device.allocate_as(Sharing::Fabric, LEN) {
        Ok(_) => shared_by_name(&device, Sharing::Fabric),
        // The device could, but its host takes part in none.
        Err(error) => skip(&error.to_string()),
    }
}

#[test]
fn a_handle_is_not_opened_at_home() {
    let device = device!();
    let physical = device.allocate_as(Sharing::Legacy, LEN).unwrap();
    let error = device.import_handle(&physical.share().unwrap(), LEN).unwrap_err();
    assert!(!error.is_sticky(), "{error}");
}

#[test]
fn a_device_has_one_name() {
    let device = device!();
    let names = |visible: Option<&str>| {
        let env: Vec<_> = visible.map(|list| ("CUDA_VISIBLE_DEVICES", list)).into_iter().collect();
        let mut peer = Peer::start_with("contract::sharing::child", "name", &env);
        let [count] = peer.wire.receive();
        let names: Vec<_> = (0..count).map(|_| Uuid(peer.wire.receive())).collect();
        peer.succeeds();
        names
    };
    let all = names(None);
    assert_eq!(all[0], device.uuid());
    assert_eq!(names(Some(&device.uuid().to_string())), [device.uuid()]);
    if std::env::var_os("CUDA_VISIBLE_DEVICES").is_none() && all.len() > 1 {
        assert_eq!(names(Some("1,0")), [all[1], all[0]]);
    }
}
