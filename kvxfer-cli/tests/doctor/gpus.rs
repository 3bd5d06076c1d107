//! The program on the stand-in for the CUDA driver.

use std::os::unix::fs::symlink;
use std::process::Command;

use crate::fake::Folder;

/// What it prints where the driver is the stand-in, configured like that.
fn doctor(standin: &str, visible: Option<&str>, line: &[&str]) -> (i32, String) {
    let folder = Folder::new();
    // Cargo built it for this test, beside it.
    let built = std::env::current_exe().unwrap().with_file_name("libkvxfer_standin.so");
    assert!(built.exists(), "{}", built.display());
    symlink(built, folder.0.join("libcuda.so.1")).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvxfer"));
    command.args([&["doctor", "--buffer-size", "1MiB"], line].concat());
    command.env("LD_LIBRARY_PATH", &folder.0).env("KVXFER_STANDIN", standin);
    command.env_remove("CUDA_VISIBLE_DEVICES");
    command.envs(visible.map(|visible| ("CUDA_VISIBLE_DEVICES", visible)));
    let output = command.output().unwrap();
    (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap())
}

/// The report of it, as JSON.
fn report(standin: &str, visible: Option<&str>) -> serde_json::Value {
    let (code, text) = doctor(standin, visible, &["--json"]);
    assert_eq!(code, 0, "{text}");
    serde_json::from_str(&text).unwrap()
}

fn kinds(report: &serde_json::Value, gpu: usize) -> Vec<&str> {
    let links = report["gpus"][gpu]["links"].as_array().unwrap();
    links.iter().map(|link| link["kind"].as_str().unwrap()).collect()
}

fn named<'a>(report: &'a serde_json::Value, name: &str) -> &'a serde_json::Value {
    let findings = report["findings"].as_array().unwrap();
    findings.iter().find(|finding| finding["name"] == name).unwrap()
}

#[test]
fn devices_and_their_links_are_shown() {
    let report = report("devices=3;memory=1GiB;nvlink=0-1;p2p=1-2", None);
    assert_eq!(kinds(&report, 0), ["same", "nvlink", "none"]);
    assert_eq!(kinds(&report, 1), ["nvlink", "same", "pcie"]);
    assert_eq!(report["gpus"][1]["links"][0]["rank"], 0);
    assert_eq!(report["gpus"][1]["links"][2]["rank"], 1);
    let first = &report["gpus"][0];
    assert_eq!(first["uuid"], "GPU-6b767866-6572-2d73-7461-6e64696e0000");
    assert_eq!(
        (&first["memory"], &first["compute_capability"]),
        (&(1 << 30).into(), &"9.0".into())
    );
    assert_eq!((&first["posix_fd"], &first["virtual_memory"]), (&true.into(), &true.into()));
    assert_eq!(named(&report, "links")["state"], "warn");
    let cuda_ipc = &report["paths"][2];
    assert_eq!((&cuda_ipc["path"], &cuda_ipc["state"]), (&"cuda_ipc".into(), &"ok".into()));
}

#[test]
fn the_matrix_is_printed() {
    let (code, text) = doctor("devices=2", None, &["--require", "cuda_ipc"]);
    assert_eq!(code, 0, "{text}");
    let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    for row in [&["0", "·", "NVLink", "(0)"][..], &["1", "NVLink", "(0)", "·"]] {
        assert!(rows.iter().any(|found| found == row), "{text}");
    }
}

#[test]
fn slices_and_choices_are_told() {
    let slices = report("devices=2;mig=0,1", None);
    assert_eq!(named(&slices, "GPU 0")["state"], "refused");
    assert_eq!(slices["paths"][2]["state"], "refused");
    let one = report("devices=4;hidden=1", Some("2"));
    assert_eq!(one["gpus"].as_array().unwrap().len(), 1);
    assert_eq!(one["gpus"][0]["uuid"], "GPU-6b767866-6572-2d73-7461-6e64696e0003");
    assert!(named(&one, "visible")["detail"].as_str().unwrap().contains("CUDA_VISIBLE_DEVICES=2"));
    assert_eq!(doctor("devices=0", None, &["--require", "cuda_ipc", "--quiet"]).0, 1);
}
