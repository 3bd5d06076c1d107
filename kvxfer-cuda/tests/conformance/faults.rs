//! The faults are the ones that were asked for.

use kvxfer_core::PostId;
use kvxfer_core::sum::Sum;
use kvxfer_cuda::transport::fault::{Act, Faults};

use crate::bench::{Bench, faulty};
use crate::model::{Model, ZERO, ends, write};

#[test]
fn each_act_does_what_it_says_to_its_post_only() {
    let faults = Faults::new();
    let mut bench = faulty(faults.clone());
    let mut model = Model::new(&mut bench, 1);
    let writes = |id: u64| [write(0, id * 8192, ZERO, id * 8192, 8192)];
    let acts = [None, Some(Act::Refuse), Some(Act::Fail), Some(Act::Flip), Some(Act::Delay(3))];
    for (id, act) in (0..).zip(acts) {
        act.into_iter().for_each(|act| faults.next(act));
        let posted = bench.post(0, id, 5, &writes(id));
        assert_eq!(
            posted.err().map(|error| error.retryable()),
            (act == Some(Act::Refuse)).then_some(true)
        );
    }
    assert_eq!((faults.posts(), bench.transport().pending()), (5, 4));

    let mut out = Vec::new();
    bench.transport().poll(u64::MAX, &mut out);
    assert_eq!(out.iter().map(|end| end.id.0).collect::<Vec<_>>(), [0, 2, 3]);
    assert!(out[1].result.is_err());
    for polls in 1..=3 {
        assert_eq!((bench.transport().pending(), out.len()), (1, 3), "{polls}");
        bench.transport().poll(0, &mut out);
    }
    assert_eq!((bench.transport().pending(), out[3].id), (0, PostId(4)));

    // Spoilt bytes in good faith: what is stored does not fit the sum that was told.
    let told = out[2].result.clone().unwrap();
    assert_eq!(told, model.post(0, 5, &writes(3)));
    let mut stored = Sum::new(5);
    stored.update(&bench.read(0, ZERO, 3 * 8192, 8192));
    assert_ne!(stored.finish(), told);
}

#[test]
fn dropped_writes_end_well_and_leave_nothing() {
    let mut bench = faulty(Faults::each(Act::Drop));
    let mut model = Model::new(&mut bench, 4);
    let before = bench.read(0, ZERO, 0, 8192);
    let writes = [write(0, 0, ZERO, 0, 5000), write(1, 0, ZERO, 6000, 100)];
    bench.post(0, 1, 5, &writes).unwrap();
    let sum = model.post(0, 5, &writes);
    assert_eq!(ends(&mut bench), [(PostId(1), bench.peer(0), Some(sum))]);
    assert!(bench.read(0, ZERO, 0, 8192) == before);
}

#[test]
fn a_held_transport_moves_nothing_until_it_is_released() {
    let faults = Faults::new();
    let mut bench = faulty(faults.clone());
    let mut model = Model::new(&mut bench, 2);
    let writes = [write(0, 0, ZERO, 0, 4096)];
    faults.hold();
    bench.post(0, 1, 0, &writes).unwrap();
    let mut out = Vec::new();
    for _ in 0..100 {
        bench.transport().poll(u64::MAX, &mut out);
    }
    assert!(out.is_empty());
    assert_eq!(bench.transport().pending(), 1);
    model.check(&bench);

    faults.release();
    assert_eq!(ends(&mut bench).len(), 1);
    model.post(0, 0, &writes);
    model.check(&bench);
}

#[test]
fn the_same_seed_gives_the_same_faults() {
    let run = |seed| {
        let mut bench = faulty(Faults::seeded(seed, 3));
        Model::new(&mut bench, 3);
        let mut story = Vec::new();
        for id in 0..60 {
            let refused = bench.post(0, id, 0, &[write(0, 0, ZERO, id * 64, 64)]).is_err();
            let mut out = Vec::new();
            bench.transport().poll(u64::MAX, &mut out);
            story.push((
                refused,
                out.iter().map(|end| (end.id, end.result.is_ok())).collect::<Vec<_>>(),
            ));
        }
        let last: Vec<_> = ends(&mut bench).iter().map(|end| (end.0, end.2)).collect();
        (story, last, bench.read(0, ZERO, 0, 4096))
    };
    let first = run(7);
    assert!(first == run(7));
    assert!(first != run(8));
    assert!(first.0.iter().any(|(refused, _)| *refused), "no post was refused");
}
