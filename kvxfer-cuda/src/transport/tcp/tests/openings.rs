//! Who is let in.

use std::time::Duration;

use kvxfer_core::Incarnation;

use super::super::frame::Opening;
use super::super::target::STRANGERS;
use super::bench::{Bench, WRITER, frame, span, wait};
use crate::transport::Target;

#[test]
fn strangers_are_closed_and_counted() {
    let mut bench = Bench::new(1);
    bench.export(super::bench::ZERO);
    let says: [&[u8]; 5] = [
        b"GET / HTTP/1.1\r\nHost: decode\r\n\r\n",
        &[0x16, 3, 1, 2, 0, 1, 0, 1, 0xFC],
        b"KVXFER\r\n and then a hello",
        b"KVXDATA\r and that was almost right",
        &[0; 4096],
    ];
    for (count, says) in (1..).zip(says) {
        bench.stranger(says).is_closed(&mut bench);
        assert_eq!(bench.target.refused(), count);
    }
    // Who leaves in the middle of an opening is one too.
    drop(bench.stranger(b"KVXDATA\n and"));
    while bench.target.refused() < 6 {
        wait(&[bench.target.event_fd()]);
        bench.poll();
    }
    assert!(bench.lost.is_empty());
    bench.is_untouched();
}

#[test]
fn a_token_opens_one_connection_once_for_its_writer_and_stream() {
    let mut bench = Bench::new(2);
    let tokens = bench.blob().tokens;
    let mut closed = 0;
    let mut refuse = |bench: &mut Bench, opening: Opening| {
        // Had it been let in, this would be stored.
        let bytes = [&opening.encode()[..], &frame(1, &[span(0, 100)])].concat();
        bench.stranger(&bytes).is_closed(bench);
        closed += 1;
        assert_eq!(bench.target.refused(), closed);
        bench.is_untouched();
    };
    let [first, second] = [0, 1].map(|at| tokens[at]);
    let good = Opening { stream: 0, token: first, writer: WRITER };
    let mut almost = first;
    almost[15] ^= 1;
    for wrong in [
        Opening { token: almost, ..good },
        Opening { token: [0; 16], ..good },
        Opening { token: second, ..good },
        Opening { stream: 1, ..good },
        Opening { stream: 2, ..good },
        Opening { stream: u32::MAX, ..good },
        Opening { writer: Incarnation([9; 16]), ..good },
    ] {
        refuse(&mut bench, wrong);
    }
    // None of that used it up.
    let _open = bench.opened(0, first);
    refuse(&mut bench, good);
    bench.target.cut_off(WRITER);
    refuse(&mut bench, Opening { stream: 1, token: second, writer: WRITER });

    // What a writer gets after it was cut off is new.
    let again = bench.blob().tokens;
    assert!(again.iter().all(|token| !tokens.contains(token)));
    refuse(&mut bench, good);
    bench.opened(1, again[1]);
}

#[test]
fn later_handles_come_without_tokens() {
    let mut bench = Bench::new(3);
    let first = bench.blob();
    assert_eq!((first.addresses, first.tokens.len()), (vec![bench.target.address()], 3));
    let second = bench.blob();
    assert_eq!((second.addresses.len(), second.tokens.len()), (0, 0));
    assert_eq!(second.generation, first.generation);
}

#[test]
fn who_says_too_little_is_closed_in_time_and_the_target_wakes_for_it() {
    let mut bench = Bench::new(1);
    bench.target.open = Duration::from_millis(20);
    let mut silent = bench.stranger(b"");
    let mut slow = bench.stranger(b"KVXDATA\n");
    silent.is_closed(&mut bench);
    slow.is_closed(&mut bench);
    assert_eq!(bench.target.refused(), 2);
}

#[test]
fn strangers_are_bounded_and_do_not_keep_others_out() {
    let mut bench = Bench::new(1);
    let token = bench.blob().tokens[0];
    let mut strangers: Vec<_> = (0..STRANGERS).map(|_| bench.stranger(b"KVX")).collect();
    let mut writer = bench.stranger(&Opening { stream: 0, token, writer: WRITER }.encode());
    strangers[0].is_closed(&mut bench);
    assert!(writer.hear::<32>(&mut bench).is_some());
    assert_eq!(bench.target.refused(), 1);
    // The others may still say the rest.
    assert_eq!(bench.target.strangers.len(), STRANGERS - 1);
}
