//! Finding the library, or saying why not. What is loaded stays, so each is a process of its own.

use std::path::{Path, PathBuf};
use std::{env, fs};

use kvxfer_cuda::ucx::Library;

use crate::common::libucp::{library, of_version};
use crate::harness::*;

/// What a child does before it opens a library: nothing, or loads another copy.
const FIRST: &str = "KVXFER_TEST_UCX_FIRST";
const EXPLICIT: &str = "KVXFER_TEST_UCX_EXPLICIT";
const WHEEL: &str = "KVXFER_TEST_UCX_WHEEL";

/// The child: opens a library, and says which, or the error; and which signals are handled then.
pub(crate) fn open(mut wire: Wire) {
    let path = |name| env::var_os(name).map(PathBuf::from);
    for copy in path(FIRST).iter().flat_map(env::split_paths) {
        // SAFETY: a library of the tests, or UCX.
        std::mem::forget(unsafe { libloading::Library::new(copy) }.unwrap());
    }
    let (explicit, wheel) = (path(EXPLICIT), path(WHEEL));
    wire.say(&match Library::open(explicit.as_deref(), wheel.as_deref()) {
        Ok(library) => {
            let again = Library::open(explicit.as_deref(), None).unwrap();
            assert!(std::ptr::eq(library, again));
            format!("ok {} {} {}", library.version(), library.source(), library.path().display())
        }
        Err(error) => format!("{:?} {error}", error.kind()),
    });
    let status = fs::read_to_string("/proc/self/status").unwrap();
    wire.say(status.lines().find(|line| line.starts_with("SigCgt")).unwrap());
}

/// What the child says.
#[track_caller]
fn opened(variables: &[(&str, &str)]) -> String {
    opened_with_signals(variables).0
}

#[track_caller]
fn opened_with_signals(variables: &[(&str, &str)]) -> (String, String) {
    let mut peer = Peer::start_with("child", "open", variables);
    let said = (peer.wire.hear(), peer.wire.hear());
    peer.succeeds();
    said
}

#[track_caller]
fn contains(out: &str, parts: &[&str]) {
    for part in parts {
        assert!(out.contains(part), "no {part:?} in {out}");
    }
}

#[test]
fn no_library_is_an_error_that_says_where_it_was_looked_for() {
    let out = opened(&[]);
    if out.contains("ok 1.") {
        eprintln!("skipped: this system has a UCX");
        return;
    }
    contains(
        &out,
        &[
            "NoPath no UCX library was found: ucx_library is not set; none is loaded in this process; the system: libucp.so.0:",
            "no wheel libucx is installed",
            "pip install 'kvxfer[ucx-cu12]'",
        ],
    );
    let out = opened(&[(WHEEL, "/nowhere")]);
    contains(&out, &["NoPath", "the wheel: /nowhere/libucs.so: cannot open"]);
}

#[test]
fn what_is_no_libucp_is_refused() {
    let text = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    contains(&opened(&[(EXPLICIT, text)]), &["Config", text, "set ucx_library"]);
    contains(
        &opened(&[(EXPLICIT, "/nowhere.so")]),
        &["Config /nowhere.so can't be loaded", "No such file"],
    );
    let other = library("other", "int nothing;");
    contains(&opened(&[(EXPLICIT, &other)]), &["Config", &other, "it has no ucp_get_version"]);
    let part = of_version("part", 20);
    contains(&opened(&[(EXPLICIT, &part)]), &["Config", &part, "it has no ucp_get_version_string"]);
}

#[test]
fn an_old_library_is_refused_by_its_version() {
    let old = of_version("old", 10);
    contains(
        &opened(&[(EXPLICIT, &old)]),
        &["VersionMismatch", &old, "is UCX 1.10.2, older than 1.14.0", "newer"],
    );
    // Also when somebody else brought it.
    contains(&opened(&[(FIRST, &old)]), &["VersionMismatch", &old]);
}

#[test]
fn two_copies_in_one_process_are_refused_by_name() {
    let (one, other) = (of_version("one", 20), of_version("two", 20));
    let both = format!("{one}:{other}");
    let refused = "Config two copies of UCX in one process";
    contains(&opened(&[(FIRST, &both)]), &[refused, &one, &other]);
    // One is there, another is asked for.
    contains(&opened(&[(FIRST, &one), (EXPLICIT, &other)]), &[refused, &one, &other]);
    // The same by another name is no second one.
    let link = Path::new(env!("CARGO_TARGET_TMPDIR")).join("link.so");
    let _ = fs::remove_file(&link);
    std::os::unix::fs::symlink(&one, &link).unwrap();
    let out = opened(&[(FIRST, &one), (EXPLICIT, link.to_str().unwrap())]);
    contains(&out, &["it has no ucp_get_version_string"]);
}

#[test]
fn the_wheels_is_found_and_reused_and_leaves_signals_alone() {
    let Some(wheel) = wheel() else { return };
    let folder = wheel.join("lib");
    let (folder, file) = (folder.to_str().unwrap(), folder.join("libucp.so.0"));
    let file = file.to_str().unwrap();
    let (_, signals) = opened_with_signals(&[(EXPLICIT, "/nowhere.so")]);

    let named = format!("ok 1.22.0 ucx_library {file}");
    for explicit in [file, folder] {
        assert_eq!(opened_with_signals(&[(EXPLICIT, explicit)]), (named.clone(), signals.clone()));
    }
    assert_eq!(opened(&[(FIRST, file)]), format!("ok 1.22.0 was loaded {file}"));
    let (found, now) = opened_with_signals(&[(WHEEL, folder)]);
    assert_eq!(now, signals);
    // The system's comes first, where there is one.
    if !found.contains(" system ") {
        assert_eq!(found, format!("ok 1.22.0 wheel {folder}/libucp.so"));
    }
}
