//! `kvxfer bench`, between real processes on this host.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kvxfer_cli::{Output, run_with};
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_kvxfer");
const TINY: &[&str] =
    &["--block", "4KiB,64KiB", "--count", "20", "--layers", "2", "--timeout", "10"];

/// A folder of the test's own, with a name short enough for sockets in it.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("kvx-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    fn report(&self) -> Value {
        serde_json::from_str(&std::fs::read_to_string(self.file("json")).unwrap()).unwrap()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// `kvxfer bench serve`, and where it listens.
struct Server(Child, String);

impl Server {
    fn start(folder: &Folder) -> Self {
        let mut command = Command::new(PROGRAM);
        command.args(["bench", "serve", "--socket-dir", &folder.file("s")]);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.contains("listening on 127.0.0.1:"), "{line}");
        Self(child, line.split_whitespace().last().unwrap().into())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `kvxfer bench run` within this process.
fn run(line: &[&str]) -> (i32, String, String) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let line = [&["bench", "run"], line].concat();
    let code = run_with(line, &mut Output { out: &mut out, err: &mut err, colour: false });
    (code, String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
}

/// Whether each element is closed, in order.
fn well_formed(text: &str) -> bool {
    let mut open = Vec::new();
    for tag in text.split('<').skip(1) {
        let Some((tag, _)) = tag.split_once('>') else { return false };
        let name = tag.trim_matches('/').split_whitespace().next();
        match (tag.starts_with('/'), tag.ends_with('/')) {
            (true, _) if open.pop() != name => return false,
            (false, false) => open.extend(name),
            _ => {}
        }
    }
    open.is_empty()
}

/// The keys of an object, as the documentation has them.
fn has(value: &Value, keys: &[&str]) {
    let found: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
    let mut keys = keys.to_vec();
    keys.sort_unstable();
    assert_eq!(found, keys);
}

#[test]
fn each_path_is_measured_or_says_why_not_with_a_server_of_its_own() {
    let folder = Folder::new("own");
    let mut command = Command::new(PROGRAM);
    command.args(["bench", "run", "--rounds", "3", "--path", "local,shm,tcp"]).args(TINY);
    command.args(["--json", &folder.file("json"), "--plot", &folder.file("svg")]);
    let output = command.args(["--socket-dir", &folder.file("s")]).output().unwrap();
    let table = String::from_utf8(output.stdout).unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.is_empty(), "{table}\n{said}");
    assert!(table.contains("local") && table.contains("different processes"), "{table}");

    let report = folder.report();
    let of_report = ["schema", "kvxfer", "optimised", "server", "cores", "load_average", "rounds"];
    has(&report, &[&of_report[..], &["rows", "error"]].concat());
    assert_eq!((&report["schema"], &report["error"]), (&1.into(), &Value::Null));
    let rows = report["rows"].as_array().unwrap();
    let seen: Vec<_> = rows.iter().map(|row| (&row["path"], &row["block_bytes"])).collect();
    let (shm, tcp) = ("shm".into(), "tcp".into());
    let (small, large) = (4096.into(), 65536.into());
    let measured = [(&shm, &small), (&shm, &large), (&tcp, &small), (&tcp, &large)];
    assert_eq!(seen[1..], measured);
    assert!(seen[0] == (&"local".into(), &Value::Null) && rows[0]["figures"].is_null());
    for row in &rows[1..] {
        has(row, &["path", "block_bytes", "blocks", "layers", "refused", "figures"]);
        let figures = &row["figures"];
        let times = ["push", "load", "descriptors", "descriptors_per_s", "cpu_s_per_gb"];
        let path = ["bytes", "path", "lanes", "why_not_better", "verified_words"];
        has(figures, &[&times[..], &path[..]].concat());
        has(&figures["cpu_s_per_gb"], &["producer", "consumer"]);
        let bytes = row["block_bytes"].as_u64().unwrap() * 20 * 2;
        assert_eq!((&figures["path"], &figures["bytes"]), (&row["path"], &bytes.into()));
        assert_eq!(figures["verified_words"], bytes / 8);
        for times in [&figures["push"], &figures["load"]] {
            has(times, &["gbps", "p50_ms", "p90_ms", "p99_ms"]);
            let [p50, p90, p99] = ["p50_ms", "p90_ms", "p99_ms"].map(|key| times[key].as_f64());
            assert!(times["gbps"].as_f64() > Some(0.0) && p50 <= p90 && p90 <= p99, "{times}");
        }
        // Most blocks have no neighbour.
        let descriptors = figures["descriptors"].as_u64().unwrap();
        assert!((20..=40).contains(&descriptors), "{descriptors}");
        assert!(figures["cpu_s_per_gb"]["consumer"].as_f64() > Some(0.0), "{figures}");
    }
    let svg = std::fs::read_to_string(folder.file("svg")).unwrap();
    assert!(svg.starts_with("<svg") && well_formed(&svg), "{svg}");
    assert!(svg.contains("shm") && svg.contains("tcp") && !svg.contains("local"), "{svg}");
    assert!(!well_formed("<svg><text></svg>") && !well_formed("<svg>"));
}

#[test]
fn a_server_serves_one_client_after_another_and_its_end_is_an_error_in_time() {
    let folder = Folder::new("gone");
    let mut server = Server::start(&folder);
    let (address, sockets, json) = (server.1.clone(), folder.file("s"), folder.file("json"));
    let line = [&[&*address, "--socket-dir", &sockets, "--json", &json, "--path", "shm"], TINY];
    let line = line.concat();
    for _ in 0..2 {
        let (code, out, err) = run(&[&line[..], &["--rounds", "2"]].concat());
        assert_eq!((code, err.as_str()), (0, ""), "{out}");
    }
    let started = Instant::now();
    let killer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(1));
        server.0.kill().unwrap();
        server
    });
    let (code, _, err) = run(&[&line[..], &["--rounds", "9000", "--block", "1MiB"]].concat());
    killer.join().unwrap();
    assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
    assert_eq!(code, 1);
    assert!(err.contains("bench server at 127.0.0.1:") && err.contains("is gone"), "{err}");
    assert_eq!(format!("kvxfer bench run: {}\n", folder.report()["error"].as_str().unwrap()), err);
    let (code, _, err) = run(&line);
    assert!(code == 1 && err.contains("start kvxfer bench serve there"), "{err}");
}

#[test]
fn whoever_is_no_bench_server_is_told_apart() {
    for (says, error) in [("", "does not answer in time"), ("220 mail\n", "does not speak like")] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let other = std::thread::spawn(move || {
            let (mut client, _) = listener.accept().unwrap();
            client.write_all(says.as_bytes()).unwrap();
            std::thread::sleep(Duration::from_secs(1));
        });
        let (code, _, err) = run(&[&address, "--timeout", "0.5"]);
        assert!(code == 1 && err.contains(error), "{err}");
        other.join().unwrap();
    }
}

#[test]
fn what_does_not_fit_is_a_row_on_either_side() {
    let folder = Folder::new("fit");
    let server = Server::start(&folder);
    let sockets = folder.file("s");
    let line = ["--path", "shm", "--block", "100,1MiB", "--count", "4096", "--layers", "1"];
    let line = [&[&*server.1, "--socket-dir", &sockets], &line[..]].concat();
    for (memory, says) in [("1MiB", "it takes 16387 MiB"), ("64GiB", "the server says: it takes")] {
        let (code, out, err) = run(&[&line[..], &["--memory", memory]].concat());
        assert_eq!((code, err.as_str()), (1, ""));
        assert!(out.contains(says) && out.contains("multiple of 64"), "{out}");
    }
}
