//! What is printed.

use std::collections::BTreeSet;
use std::path::Path;

use kvxfer_cli::Output;
use kvxfer_cli::doctor::{LinkKind, Peer, Report, Survey, say};

use crate::fake::{Fake, args, no_library, survey};

fn print(report: &Report, line: &[&str], colour: bool) -> (i32, String, String) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let mut output = Output { out: &mut out, err: &mut err, colour };
    let code = say(report, &args(line), &mut output);
    (code, String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
}

/// A machine that has one of each state.
fn mixed() -> Fake {
    let mut fake = Fake::new();
    fake.put("proc/sys/kernel/osrelease", "5.15.0\n");
    fake.drop("sys/class/infiniband");
    let Survey { driver, mut gpus } = survey(LinkKind::Pcie);
    for gpu in &mut gpus {
        gpu.posix_fd = false;
    }
    fake.host.gpus = Some(Ok(Survey { driver, gpus }));
    fake
}

/// Compares with a file, which `KVXFER_WRITE=1` writes.
fn compare(name: &str, fake: &Fake, text: &str) {
    let text = text
        .replace(fake.folder.0.to_str().unwrap(), "/FOLDER")
        .replace(env!("CARGO_PKG_VERSION"), "VERSION");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("KVXFER_WRITE").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let golden = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(golden == text, "{} is not this (KVXFER_WRITE=1 writes it):\n{text}", path.display());
}

#[test]
fn the_json_is_as_committed() {
    let fake = mixed();
    let line = ["--json", "--require", "cuda_ipc"];
    let (code, out, err) = print(&fake.report(&line), &line, true);
    assert_eq!((code, err.as_str()), (1, ""));
    compare("report-1.json", &fake, &out);
}

#[test]
fn the_table_is_as_committed() {
    let fake = mixed();
    let (code, out, err) = print(&fake.report(&[]), &[], false);
    assert_eq!((code, err.as_str()), (0, ""));
    compare("report.txt", &fake, &out);
    let (_, coloured, _) = print(&fake.report(&[]), &[], true);
    assert!(coloured.contains("\x1b[33m!\x1b[0m version"));
    let mut plain = coloured;
    for code in ["0", "1", "2", "31", "32", "33"] {
        plain = plain.replace(&format!("\x1b[{code}m"), "");
    }
    assert_eq!(plain, out);
}

#[test]
fn the_exit_code_is_about_what_is_required() {
    let mut fake = Fake::new();
    fake.host.gpus = Some(Err(no_library()));
    for (line, code) in [
        (&[][..], 0),
        (&["--require", "shm"], 0),
        (&["--require", "local,shm"], 0),
        (&["--require", "cuda_ipc"], 1),
        (&["--require", "shm", "--require", "cuda_ipc"], 1),
        (&["--require", "ucx"], 0),
    ] {
        let quiet = [line, &["--quiet"]].concat();
        let report = fake.report(&quiet);
        let (answer, out, err) = print(&report, &quiet, true);
        assert_eq!((answer, out.as_str(), report.ok), (code, "", code == 0), "{line:?}");
        assert_eq!(err.lines().count(), code as usize, "{err}");
        assert!(err.is_empty() || err.starts_with("kvxfer doctor: "), "{err}");
    }
}

/// The names of all fields, however deep.
fn fields(value: &serde_json::Value, names: &mut BTreeSet<String>) {
    match value {
        serde_json::Value::Object(object) => {
            for (name, value) in object {
                names.insert(name.clone());
                fields(value, names);
            }
        }
        serde_json::Value::Array(array) => array.iter().for_each(|value| fields(value, names)),
        _ => {}
    }
}

#[test]
fn each_field_is_documented() {
    let mut report = mixed().report(&[]);
    report.peer = Some(Peer {
        address: String::new(),
        name: String::new(),
        incarnation: String::new(),
        protocol: (1, 1),
        chunk_keys: (1, 1),
        same_host: true,
        unix_path: None,
        chooses: None,
    });
    let mut names = BTreeSet::new();
    fields(&serde_json::to_value(&report).unwrap(), &mut names);
    let document = include_str!("../../../docs/doctor.md");
    let missing: Vec<_> =
        names.iter().filter(|name| !document.contains(&format!("`{name}`"))).collect();
    assert!(missing.is_empty(), "docs/doctor.md lacks {missing:?}");
}
