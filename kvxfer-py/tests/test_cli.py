"""The command line as it is installed; what it finds is tested in Rust."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import kvxfer

pytestmark = pytest.mark.skipif(
    kvxfer.Agent.__module__ == "fake", reason="the native module is not built"
)

MODULE = [sys.executable, "-m", "kvxfer"]
SCRIPT = [str(Path(sys.executable).parent / "kvxfer")]


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)


@pytest.mark.parametrize("program", [MODULE, SCRIPT], ids=["module", "script"])
def test_it_runs_as_a_program_and_as_a_module(program):
    version = run(*program, "--version")
    assert (version.returncode, version.stderr) == (0, "")
    assert version.stdout.startswith(f"kvxfer {kvxfer.__version__} (protocol ")


def test_the_report_is_json(tmp_path):
    found = run(*MODULE, "doctor", "--json", "--socket-dir", str(tmp_path / "sockets"))
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout)
    assert report["kvxfer"] == kvxfer.__version__
    states = {path["path"]: path["state"] for path in report["paths"]}
    assert states["local"] == "ok"
    assert list(states) == ["cuda_ipc", "local", "shm", "ucx", "tcp"]


def test_exit_codes_are_the_programs():
    assert run(*MODULE, "doctor", "--no-such-option").returncode == 2
    closed = run(*MODULE, "doctor", "--quiet", "--peer", "127.0.0.1:1", "--require", "shm")
    assert (closed.returncode, closed.stdout) == (1, "")
    assert "Connection refused" in closed.stderr


def test_it_can_be_called(capfd):
    assert kvxfer._kvxfer.cli(["doctor", "--quiet", "--require", "local"]) == 0
    assert capfd.readouterr() == ("", "")
