//! Libraries that say they are UCX.

use std::path::Path;
use std::process::Command;
use std::{env, fs};

/// A library with these lines of C in it.
pub fn library(folder: &str, source: &str) -> String {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(folder);
    fs::create_dir_all(&folder).unwrap();
    let (text, library) = (folder.join("libucp.c"), folder.join("libucp.so.0"));
    fs::write(&text, source).unwrap();
    let compiler = env::var("CC").unwrap_or_else(|_| "cc".into());
    let made =
        Command::new(compiler).args(["-shared", "-fPIC", "-o"]).args([&library, &text]).status();
    assert!(made.unwrap().success());
    library.to_str().unwrap().to_owned()
}

/// A libucp of version 1.`minor`.2, with nothing else in it.
pub fn of_version(folder: &str, minor: u32) -> String {
    let source = format!(
        "void ucp_get_version(unsigned *a, unsigned *b, unsigned *c) {{ *a = 1; *b = {minor}; *c = 2; }}"
    );
    library(folder, &source)
}
