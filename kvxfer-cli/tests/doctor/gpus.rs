//! The program on the stand-in for the CUDA driver.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};

use kvxfer_cuda::{Agent, Memory};

use crate::fake::Folder;
use crate::pairs::config_in;

/// Has that program find the stand-in as its driver, in that folder.
fn on_standin(program: impl AsRef<OsStr>, folder: &Folder, standin: &str) -> Command {
    // Cargo built it for this test, beside it.
    let built = std::env::current_exe().unwrap().with_file_name("libkvxfer_standin.so");
    assert!(built.exists(), "{}", built.display());
    let _ = symlink(built, folder.0.join("libcuda.so.1"));
    let mut command = Command::new(program);
    command.env("LD_LIBRARY_PATH", &folder.0).env("KVXFER_STANDIN", standin);
    command.env_remove("CUDA_VISIBLE_DEVICES");
    command
}

/// What it prints where the driver is the stand-in, configured like that.
fn doctor(standin: &str, visible: Option<&str>, line: &[&str]) -> (i32, String) {
    let folder = Folder::new();
    let mut command = on_standin(env!("CARGO_BIN_EXE_kvxfer"), &folder, standin);
    command.args([&["doctor", "--buffer-size", "1MiB"], line].concat());
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
    let cuda_ipc = &report["paths"][0];
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
    assert_eq!(slices["paths"][0]["state"], "refused");
    let one = report("devices=4;hidden=1", Some("2"));
    assert_eq!(one["gpus"].as_array().unwrap().len(), 1);
    assert_eq!(one["gpus"][0]["uuid"], "GPU-6b767866-6572-2d73-7461-6e64696e0003");
    assert!(named(&one, "visible")["detail"].as_str().unwrap().contains("CUDA_VISIBLE_DEVICES=2"));
    assert_eq!(doctor("devices=0", None, &["--require", "cuda_ipc", "--quiet"]).0, 1);
}

const FOLDER: &str = "KVXFER_TEST_AGENT_IN";

/// Not a test of its own: the decode engine of the next one, in its own process, until nobody listens any more.
#[test]
fn agent_on_a_gpu() {
    let Some(folder) = std::env::var_os(FOLDER) else { return };
    let mut config = config_in(folder.as_ref());
    config.memory = Memory::Device(1);
    config.segments = 1;
    config.buffer_size = 4 << 20;
    let agent = Agent::start(config).unwrap();
    println!("\nlistening {}", agent.addresses()[0]);
    let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
}

#[test]
fn a_peer_whose_pool_is_on_a_gpu_is_reached_from_a_gpu() {
    let (folder, standin) = (Folder::new(), "devices=2");
    let mut command = on_standin(std::env::current_exe().unwrap(), &folder, standin);
    command.args(["gpus::agent_on_a_gpu", "--exact", "--nocapture"]).env(FOLDER, &folder.0);
    let mut agent = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    // Read on to the end of the test: who prints into a closed pipe fails.
    let mut lines = BufReader::new(agent.stdout.take().unwrap()).lines().map_while(Result::ok);
    let listening = lines.find_map(|line| Some(line.strip_prefix("listening ")?.to_owned()));
    let peer = listening.expect("an agent");
    let (code, text) = doctor(standin, None, &["--peer", &peer, "--require", "cuda_ipc", "--json"]);
    assert_eq!(code, 0, "{text}");
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(report["peer"]["chooses"], "cuda_ipc");
    let shm = report["paths"].as_array().unwrap().iter().find(|path| path["path"] == "shm");
    assert_eq!(shm.unwrap()["detail"], "the peer's pool is in GPU memory");
    // Without a GPU on this side there is no way.
    let (code, text) = doctor("devices=0", None, &["--peer", &peer]);
    assert!(code == 1 && text.contains("kv_buffer_device"), "{text}");
    drop(agent.stdin.take());
    assert!(agent.wait().unwrap().success());
}
