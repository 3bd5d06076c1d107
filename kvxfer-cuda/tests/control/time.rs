use std::time::Duration;

use kvxfer_core::ErrorKind;
use kvxfer_core::wire::Purpose;
use kvxfer_cuda::control::{ControlConfig, Event, Redial};

use crate::harness::*;

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn an_idle_link_lives_on_pings_alone_and_nothing_else_wakes_us() {
    let folder = Folder::new();
    let mut b = Node::new(config(2, &folder.sockets()));
    let mut a = Node::new(dialling(1, &folder.sockets(), &b.control.addresses()[0]));
    linked(&mut a, &mut b, Duration::ZERO);
    let (mut now, mut polls) = (Duration::ZERO, 0);
    while now < 100 * SECOND {
        let next = a.control.next_timeout().unwrap().min(b.control.next_timeout().unwrap());
        now = next.max(now);
        for node in [&mut a, &mut b] {
            node.control.poll(now, Some(Duration::ZERO), &mut node.events).unwrap();
        }
        // Once more, so that what one just sent is read at the same time.
        for node in [&mut a, &mut b] {
            node.control.poll(now, Some(Duration::ZERO), &mut node.events).unwrap();
        }
        polls += 1;
    }
    assert!(a.events.is_empty() && b.events.is_empty(), "{:?} {:?}", a.events, b.events);
    assert!(polls < 100, "{polls} wake-ups in 100 s");
}

#[test]
fn a_silent_peer_is_lost_after_the_lease() {
    let folder = Folder::new();
    let mut b = Node::new(config(2, &folder.sockets()));
    let mut a = Node::new(dialling(1, &folder.sockets(), &b.control.addresses()[0]));
    let (link, _) = linked(&mut a, &mut b, SECOND);
    // b is stopped: a goes on talking, and hears nothing.
    for half in 2..22 {
        a.control.poll(half * SECOND / 2, Some(Duration::ZERO), &mut a.events).unwrap();
        a.control.send(link, &note(1), &[]).unwrap();
        assert!(a.down().is_none(), "after {half} half seconds");
    }
    a.control.poll(11 * SECOND, Some(Duration::ZERO), &mut a.events).unwrap();
    let error = a.down().unwrap();
    assert_eq!(error.kind(), ErrorKind::PeerLost);
    assert!(error.to_string().contains("silent for 10s"), "{error}");
}

/// One that is stopped may go on reading what it was told of once it runs again, so it is not gone.
#[test]
fn silence_does_not_part_the_halves_of_an_engine() {
    let folder = Folder::new();
    let mut b = Node::new(config(2, &folder.sockets()));
    let mut a = Node::new(dialling(1, &folder.sockets(), &b.control.addresses()[0]));
    linked_for(Purpose::Observe, &mut a, &mut b, SECOND);
    for second in [11, 100, 10_000] {
        for node in [&mut a, &mut b] {
            node.control.poll(second * SECOND, Some(Duration::ZERO), &mut node.events).unwrap();
            assert!(node.down().is_none(), "after {second} s");
        }
    }
}

#[test]
fn after_a_pause_what_came_meanwhile_counts() {
    let folder = Folder::new();
    let mut b = Node::new(config(2, &folder.sockets()));
    let mut a = Node::new(dialling(1, &folder.sockets(), &b.control.addresses()[0]));
    let (_, link) = linked(&mut a, &mut b, Duration::ZERO);
    b.control.send(link, &note(3), &[]).unwrap();
    b.control.poll(SECOND, Some(Duration::ZERO), &mut b.events).unwrap();
    a.control.poll(600 * SECOND, Some(Duration::ZERO), &mut a.events).unwrap();
    assert_eq!(a.message(), Some(note(3)));
    assert!(a.down().is_none());
    // And it counts from now on.
    a.control.poll(609 * SECOND, Some(Duration::ZERO), &mut a.events).unwrap();
    assert!(a.down().is_none());
    a.control.poll(619 * SECOND, Some(Duration::ZERO), &mut a.events).unwrap();
    assert!(a.down().is_some());
}

#[test]
fn a_poll_that_waited_long_does_not_shorten_a_lease() {
    let folder = Folder::new();
    let mut b = Node::new(config(2, &folder.sockets()));
    let mut a = Node::new(dialling(1, &folder.sockets(), &b.control.addresses()[0]));
    linked(&mut a, &mut b, Duration::ZERO);
    // At 9 s b says something, which ends a poll of a that began at 0.
    b.control.poll(9 * SECOND, Some(Duration::ZERO), &mut b.events).unwrap();
    a.control.poll(Duration::ZERO, Some(PATIENCE), &mut a.events).unwrap();
    a.control.poll(11 * SECOND, Some(Duration::ZERO), &mut a.events).unwrap();
    assert!(a.down().is_none());
}

#[test]
fn who_was_refused_comes_back_late_and_finds_who_was_restarted_meanwhile() {
    let folder = Folder::new();
    let mut b = Node::new(listening(2, &folder.sockets()));
    let address = b.control.addresses()[0].clone();
    let mut a = Node::new(dialling(1, &folder.sockets(), &address));
    let mut now = SECOND;
    let (_, mut at_b) = linked(&mut a, &mut b, now);
    let gone = |nodes: &mut [&mut Node]| {
        nodes[0].events.pop_if(|event| matches!(event, Event::Down { .. }))
    };
    for _ in 0..3 {
        let why = ErrorKind::LayoutMismatch.error("the models differ");
        assert_eq!(b.control.close(at_b, &why), None, "it has not dialled");
        let Event::Down { error, redial: Some(Redial { after, refused: true }), .. } =
            until(&mut [&mut a, &mut b], now, gone)
        else {
            panic!("not told to stay away")
        };
        assert!(error.to_string().contains("the models differ"), "{error}");
        assert!((30 * SECOND..=60 * SECOND).contains(&after), "{after:?}");
        // The clock starts at the next poll.
        a.poll(now);
        now += after;
        for _ in 0..2 {
            a.poll(now - Duration::from_millis(1));
            b.poll(now - Duration::from_millis(1));
        }
        assert!(a.events.is_empty() && b.events.is_empty(), "dialled too early");
        at_b = until(&mut [&mut a, &mut b], now, |nodes| nodes[1].up());
        until(&mut [&mut a, &mut b], now, |nodes| nodes[0].up());
    }
    // Refused once more, and gone: from then on it is looked for as often as any other.
    b.control.close(at_b, &ErrorKind::LayoutMismatch.error("the models differ"));
    until(&mut [&mut a, &mut b], now, gone);
    drop(b);
    a.poll(now);
    now += 60 * SECOND;
    until(&mut [&mut a], now, |nodes| nodes[0].dial_failed());
    let begun = now;
    let again = ControlConfig { listen: Some(address), ..config(3, &folder.sockets()) };
    let mut b = Node::new(again);
    until(&mut [&mut a, &mut b], now, |nodes| {
        now += Duration::from_millis(10);
        nodes[0].poll(now);
        nodes[0].up()
    });
    assert!(now < begun + 10 * SECOND, "{:?}", now - begun);
}

#[test]
fn who_refuses_the_one_it_dialled_leaves_it_alone_as_long() {
    let folder = Folder::new();
    let mut b = Node::new(config(2, &folder.sockets()));
    let mut a = Node::new(dialling(1, &folder.sockets(), &b.control.addresses()[0]));
    let (at_a, _) = linked(&mut a, &mut b, SECOND);
    let redial = a.control.close(at_a, &ErrorKind::NoPath.error("not this path")).unwrap();
    assert!(redial.refused && redial.after >= 30 * SECOND, "{redial:?}");
    until(&mut [&mut a, &mut b], SECOND, |nodes| nodes[1].down());
    a.poll(SECOND + redial.after);
    let (at_a, _) = linked(&mut a, &mut b, SECOND + redial.after);
    let redial = a.control.close(at_a, &ErrorKind::Protocol.error("nonsense")).unwrap();
    assert!(!redial.refused && redial.after < SECOND, "{redial:?}");
}
