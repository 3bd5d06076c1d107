//! Sizes, offsets and constants, as the C compiler sees them in UCX's own headers.
//!
//! The headers are those of `$KVXFER_TEST_UCX`, what `env/ucx` prints. Without them the comparison is with
//! `tests/layout.txt`, which `KVXFER_WRITE=1` writes from the headers.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use ucx_sys::{CONSTANTS, STRUCTS};

/// All that is to agree, one on a line.
fn ours() -> String {
    let mut text = String::new();
    for (name, bytes, fields) in STRUCTS {
        writeln!(text, "{name} {bytes}").unwrap();
        for (field, offset) in *fields {
            writeln!(text, "{name}.{field} {offset}").unwrap();
        }
    }
    for (name, value) in CONSTANTS {
        writeln!(text, "{name} {value}").unwrap();
    }
    text
}

/// A program that prints the same.
fn program() -> String {
    let mut c = String::from(
        "#include <stdio.h>\n#include <stddef.h>\n#include <ucp/api/ucp.h>\nint main(void) {\n",
    );
    for (name, _, fields) in STRUCTS {
        writeln!(c, "printf(\"{name} %zu\\n\", sizeof({name}));").unwrap();
        for (field, _) in *fields {
            writeln!(c, "printf(\"{name}.{field} %zu\\n\", offsetof({name}, {field}));").unwrap();
        }
    }
    for (name, _) in CONSTANTS {
        writeln!(c, "printf(\"{name} %lld\\n\", (long long){name});").unwrap();
    }
    c + "}\n"
}

fn theirs(ucx: &Path) -> String {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let (source, binary) = (folder.join("layout.c"), folder.join("layout"));
    fs::write(&source, program()).unwrap();
    let compiler = env::var("CC").unwrap_or_else(|_| "cc".into());
    let compiled = Command::new(compiler)
        .arg("-I")
        .arg(ucx.join("include"))
        .args([source.as_os_str(), "-o".as_ref(), binary.as_os_str()])
        .status();
    assert!(compiled.unwrap().success());
    let printed = Command::new(binary).output().unwrap();
    assert!(printed.status.success());
    String::from_utf8(printed.stdout).unwrap()
}

#[test]
fn the_shapes_are_those_of_the_header() {
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/layout.txt");
    let Some(ucx) = env::var_os("KVXFER_TEST_UCX") else {
        eprintln!("no KVXFER_TEST_UCX: compared with tests/layout.txt only");
        assert_eq!(ours(), fs::read_to_string(committed).unwrap());
        return;
    };
    let theirs = theirs(Path::new(&ucx));
    assert_eq!(ours(), theirs);
    if env::var_os("KVXFER_WRITE").is_some() {
        fs::write(&committed, &theirs).unwrap();
    }
    assert_eq!(theirs, fs::read_to_string(committed).unwrap());
}
