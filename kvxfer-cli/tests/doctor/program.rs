//! The command line, from its arguments to its exit code.

use kvxfer_cli::{Output, run_with};

use crate::fake::Folder;

fn run(line: &[&str]) -> (i32, String, String) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let code = run_with(line, &mut Output { out: &mut out, err: &mut err, colour: false });
    (code, String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
}

#[test]
fn what_was_asked_for_goes_to_the_output_and_mistakes_do_not() {
    let (code, out, err) = run(&["--version"]);
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.starts_with(concat!("kvxfer ", env!("CARGO_PKG_VERSION"), " (protocol ")), "{out}");
    let (code, out, _) = run(&["doctor", "--help"]);
    assert!(code == 0 && out.contains("cuda_ipc"), "{out}");
    for (line, says) in [
        (&[][..], "Usage"),
        (&["surgeon"], "surgeon"),
        (&["doctor", "--require", "rdma"], "cuda_ipc"),
        (&["doctor", "--peer", "decode-0"], "no port"),
        (&["doctor", "--buffer-size", "1GB"], "GiB"),
        (&["doctor", "--buffer-size", "99999999TiB"], "GiB"),
        (&["doctor", "--timeout", "0"], "seconds from"),
        (&["doctor", "--timeout", "NaN"], "seconds from"),
        (&["doctor", "--json", "--quiet"], "--quiet"),
    ] {
        let (code, out, err) = run(line);
        assert_eq!((code, out.as_str()), (2, ""), "{line:?}");
        assert!(err.contains(says), "{line:?}: {err}");
    }
}

#[test]
fn this_machine_can_be_examined() {
    let folder = Folder::new();
    let sockets = folder.0.join("s");
    let line = ["doctor", "--buffer-size", "1MiB", "--socket-dir", sockets.to_str().unwrap()];
    let (code, out, err) = run(&line);
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.contains("\nkernel\n") && out.contains("\npaths\n"), "{out}");
    assert!(out.contains("✓ shm "), "{out}");
    assert!(!sockets.exists(), "nothing is left behind");
    let probe = [&line[..], &["--quiet", "--require", "shm"]].concat();
    assert_eq!(run(&probe), (0, String::new(), String::new()));
}
