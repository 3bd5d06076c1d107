//! The control plane when descriptors run out. Alone in its process, because the limit is the process's.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use kvxfer_core::wire::{Hello, Purpose, VERSIONS};
use kvxfer_core::{GrantId, Incarnation};
use kvxfer_cuda::control::{Address, Control, ControlConfig, Event};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const PATIENCE: Duration = Duration::from_secs(30);

fn hello(number: u8) -> Hello {
    Hello {
        versions: VERSIONS,
        key_versions: (1, 1),
        incarnation: Incarnation([number; 16]),
        purpose: Purpose::Locate,
        boot_id: [7; 16],
        unix_path: None,
        name: "test".into(),
    }
}

#[test]
fn accepting_pauses_while_links_go_on_and_resumes() {
    let folder = std::env::temp_dir().join(format!("kvxfer-fds-{}", std::process::id()));
    let mut b = Control::new(ControlConfig {
        listen: Some(Address::tcp("127.0.0.1", 0)),
        socket_dir: Some(folder.clone()),
        ..ControlConfig::new(hello(2))
    })
    .unwrap();
    let peers = b.addresses()[1..].to_vec();
    let mut a = Control::new(ControlConfig { peers, ..ControlConfig::new(hello(1)) }).unwrap();
    let Address::Tcp { port, .. } = b.addresses()[0] else { panic!() };
    let (begun, mut now) = (Instant::now(), Duration::ZERO);
    let mut events = Vec::new();
    let mut step = |a: &mut Control, b: &mut Control| {
        assert!(begun.elapsed() < PATIENCE);
        now += Duration::from_millis(1);
        a.poll(now, Some(Duration::from_millis(1)), &mut events).unwrap();
        b.poll(now, Some(Duration::from_millis(1)), &mut events).unwrap();
        std::mem::take(&mut events)
    };

    a.dial(0, Purpose::Push);
    let mut link = None;
    while link.is_none() {
        for event in step(&mut a, &mut b) {
            if let Event::Up { link: up, dialled: Some(_), .. } = event {
                link = Some(up);
            }
        }
    }

    let before = getrlimit(Resource::Nofile);
    let clients: Vec<_> =
        (0..4).map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap()).collect();
    // No descriptor beyond those that are open.
    let next = std::fs::File::open("/dev/null").unwrap();
    let limit = std::os::fd::AsRawFd::as_raw_fd(&next) as u64;
    drop(next);
    setrlimit(Resource::Nofile, Rlimit { current: Some(limit), ..before }).unwrap();
    while b.counts().accept_pauses < 3 {
        step(&mut a, &mut b);
    }
    a.send(link.unwrap(), &kvxfer_core::wire::Message::Revoke { grant: GrantId(5) }, &[]).unwrap();
    let mut heard = false;
    while !heard {
        for event in step(&mut a, &mut b) {
            heard |= matches!(event, Event::Message { .. });
            assert!(!matches!(event, Event::Down { .. }), "{event:?}");
        }
    }

    setrlimit(Resource::Nofile, before).unwrap();
    drop(clients);
    // Those who waited are served now: a new dial over the same listener gets through behind them.
    let peers = b.addresses()[..1].to_vec();
    let mut c = Control::new(ControlConfig { peers, ..ControlConfig::new(hello(3)) }).unwrap();
    c.dial(0, Purpose::Push);
    while !step(&mut c, &mut b).iter().any(|event| matches!(event, Event::Up { .. })) {}
    let pauses = b.counts().accept_pauses;
    for _ in 0..300 {
        step(&mut c, &mut b);
    }
    assert_eq!(b.counts().accept_pauses, pauses);
    drop(b);
    let _ = std::fs::remove_dir_all(folder);
}
