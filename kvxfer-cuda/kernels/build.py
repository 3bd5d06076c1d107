"""Compiles and checks the kernels of kv.cu; needs no GPU. `make kernels` runs it.

1. PTX, by the oldest NVRTC of CUDA 12, is what kv.ptx says (KVXFER_WRITE=1 writes it).
2. It becomes machine code for sm_80, sm_90 and sm_100 without spilling, its loads side by side.
3. The source does what a naive loop does, on the host under ASAN and UBSAN (check.c).
4. So does the PTX, executed by ptx.py.
5. Both checks notice planted bugs.

Writes target/reports/kernels.json. Run by the python of env/cuda.
"""

import ctypes
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ptx

HERE = Path(__file__).resolve().parent
REPORT = HERE.parents[1] / "target" / "reports" / "kernels.json"
KERNEL = "kvx_copy_sum"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
NVRTC_OPTIONS = [
    "--gpu-architecture=compute_80",
    "--std=c++11",
    # The one division of floats only guesses.
    "--prec-div=false",
    # Keeps a header out that NVRTC includes by itself, with globals named after a hash.
    "-D__NV_TARGET_H",
]
CC_OPTIONS = (
    "-std=gnu11 -O1 -g -Wall -Wextra -Werror -fsanitize=address,undefined -fno-sanitize-recover=all"
)
Result = dict[str, Any]

TILE, LANES, STEP, MASK = 512, 8, 0x9E3779B97F4A7C15, (1 << 64) - 1

# Bugs in kv.cu that check.c has to notice: what is replaced (it is there once), by what.
SOURCE_BUGS = {
    "a stride too wide": ("tile += KVX_GROUPS;", "tile += KVX_GROUPS + 1;"),
    "slots mixed up": ("if (here != slot)", "if (here < slot)"),
    "a word of the tail left out": ("done = len / 16 * 2;", "done = len / 8;"),
    "vectors where words are aligned": ("if (odd % 16 == 0)", "if (odd % 8 == 0)"),
    "over the end of a run": ("left < KVX_TILE ? (u32)left : KVX_TILE", "KVX_TILE"),
    "an item entered a tile late": ("index + k) <= tile", "index + k) < tile"),
    "left where it ended": ("if (left <= KVX_GROUPS", "if (left < KVX_GROUPS"),
    "keys that stand still": ("key += KVX_GROUPS * KVX_TILE / 8 * KVX_STEP;", ""),
    "summed, not copied": (
        "    if (copy) {\n        KVX_UNROLL\n        for",
        "    if (0) {\n        for",
    ),
}
# The same in kv.ptx, for ptx.py: the first match is replaced.
PTX_BUGS = {
    "halves of a vector exchanged": (
        r"(st\.global\.v2\.u64 \[%rd\d+\]), \{(%rd\d+), (%rd\d+)\}",
        r"\1, {\3, \2}",
    ),
    "a product without its addend": (r"(mad\.wide\.u32 %rd\d+, %r\d+, %r\d+), %rd\d+", r"\1, 0"),
    "a sum stored, not added": (r"red\.global\.add\.u64", "st.global.u64"),
}


def nvidia(pattern: str) -> Path:
    packages = Path(sys.prefix) / "lib"
    found = sorted(packages.glob(f"python*/site-packages/nvidia/{pattern}"))
    if not found:
        sys.exit(f"build.py: no {pattern} in {packages}; run it with $(env/cuda)/venv/bin/python")
    return found[0]


def compile_ptx(source: bytes) -> str:
    """By NVRTC, which is a library."""
    nvrtc = ctypes.CDLL(str(nvidia("cuda_nvrtc/lib/libnvrtc.so.12")))
    program = ctypes.c_void_p()

    def text(get: str) -> str:
        size = ctypes.c_size_t()
        getattr(nvrtc, f"{get}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(max(size.value, 1))
        getattr(nvrtc, get)(program, buffer)
        return buffer.value.decode()

    options = (ctypes.c_char_p * len(NVRTC_OPTIONS))(*(o.encode() for o in NVRTC_OPTIONS))
    code = nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"kv.cu", 0, None, None)
    code = code or nvrtc.nvrtcCompileProgram(program, len(options), options)
    log = text("nvrtcGetProgramLog").strip()
    if code or log:
        raise RuntimeError(f"NVRTC answers {code}\n{log}")
    return text("nvrtcGetPTX")


def check_ptx(write: bool) -> Result:
    """The committed PTX is this source's."""
    made = compile_ptx((HERE / "kv.cu").read_bytes())
    committed = HERE / "kv.ptx"
    if write:
        committed.write_text(made)
    if not committed.exists() or committed.read_text() != made:
        raise RuntimeError("kv.ptx is not what kv.cu gives; KVXFER_WRITE=1 make kernels writes it")
    isa = re.search(r"\.version (\S+)\n\.target (\S+)", made)
    assert isa is not None
    return {
        "nvrtc": version("nvidia-cuda-nvrtc-cu12"),
        "isa": isa[1],
        "target": isa[2],
        "bytes": len(made),
    }


def check_sass(architecture: str, folder: Path) -> Result:
    """Machine code: nothing in local memory, and a tile's vectors are all asked for at once."""
    cubin = folder / f"{architecture}.cubin"
    ptxas = [str(nvidia("*/bin/ptxas")), "-v", f"-arch={architecture}", "-o", str(cubin)]
    done = subprocess.run([*ptxas, str(HERE / "kv.ptx")], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    frame = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", done.stderr
    )
    registers = re.search(r"Used (\d+) registers", done.stderr)
    assert frame is not None and registers is not None, done.stderr
    disassembler = str(nvidia("*/bin/nvdisasm"))
    sass = subprocess.run(
        [disassembler, str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    codes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+((?:@!?U?P\w+\s+)?[A-Z][\w.]*)", sass)
    # Loads of 16 bytes without a condition, one behind the other.
    rows = re.findall(r"(?:; LDG\S*128 )+", "".join(f"; {code} " for code in codes))
    unwanted = {code for code in codes if re.search(r"\b(LDL|STL|CALL|BAR|SHFL|VOTE)\b", code)}
    result = {
        "architecture": architecture,
        "registers": int(registers[1]),
        "stack_bytes": int(frame[1]),
        "spill_bytes": int(frame[2]) + int(frame[3]),
        "instructions": len(codes),
        "vector_loads_in_a_row": max((row.count("LDG") for row in rows), default=0),
        "vector_stores": sum("STG" in code and code.endswith("128") for code in codes),
    }
    if unwanted:
        raise RuntimeError(f"not a plain loop: {unwanted}")
    if result["stack_bytes"] or result["spill_bytes"]:
        raise RuntimeError(f"registers are spilled: {result}")
    if result["vector_loads_in_a_row"] < 4 or result["vector_stores"] < 4:
        raise RuntimeError(f"vectors are not loaded side by side: {result}")
    return result


def run_host(name: str, folder: Path, edit: tuple[str, str] | None = None) -> str:
    """What check.c says of kv.cu, perhaps edited; raises where it fails."""
    tree = folder / name.replace(" ", "-")
    tree.mkdir()
    for file in ("check.c", "host.c", "host.h", "kv.cu"):
        text = (HERE / file).read_text()
        if edit and file == "kv.cu":
            if text.count(edit[0]) != 1:
                sys.exit(f"build.py: kv.cu does not have {edit[0]!r} once ({name})")
            text = text.replace(*edit)
        (tree / file).write_text(text)
    # An edit may leave something unused.
    options = [*CC_OPTIONS.split(), *(["-Wno-error"] if edit else [])]
    command = [os.environ.get("CC", "gcc"), *options, "check.c", "-o", "check"]
    built = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if built.returncode:
        sys.exit(f"build.py: {name}: {built.stderr}")
    done = subprocess.run(["./check"], cwd=tree, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return done.stdout.strip()


def checksum(data: bytes, key: int) -> int:
    """By the definition in kvxfer-core/src/sum.rs; `key` is the first word's."""
    total = 0
    for index in range(0, len(data), 8):
        x = int.from_bytes(data[index : index + 8], "little") ^ ((key + index // 8 * STEP) & MASK)
        total += x + (x & 0xFFFFFFFF) * (x >> 32)
    return total & MASK


def run_ptx(text: str, launches: int, seed: int) -> Result:
    """Launches of random items; raises where bytes or sums are wrong."""
    kernel = ptx.Kernel(text, KERNEL)
    instructions = 0
    for launch in range(launches):
        rng = random.Random(f"{seed} {launch}")
        memory, table, tiles, runs = ptx.Memory(), b"", 0, []
        slots = rng.randint(1, 3)
        expected = [0] * slots
        step, same = rng.choice((1, 8, 16)), rng.choice((None, rng.randint(1, 128)))
        for index in range(rng.randint(1, 12)):
            length = step * (same or rng.randint(1, 1200 // step))
            data, key = rng.randbytes(length), rng.getrandbits(64)
            source = (2 * index + 2 << 40) + rng.choice((0, step % 16))
            target = (2 * index + 3 << 40) + rng.choice((0, step % 16)) if rng.random() < 0.8 else 0
            slot = index * slots // 12
            memory.add(source, data, writable=False)
            if target:
                runs.append((data, memory.add(target, bytes(length), writable=True)))
            table += b"".join(v.to_bytes(8, "little") for v in (source, target, length, key))
            table += slot.to_bytes(4, "little") + tiles.to_bytes(4, "little")
            tiles += -(-length // TILE)
            expected[slot] = expected[slot] + checksum(data, key) & MASK
        memory.add(1 << 30, table, writable=False)
        sums = memory.add(1 << 31, bytes(8 * LANES * slots), writable=True)
        grid, block = rng.randint(1, 2), rng.choice((32, 64))
        arguments = (1 << 30, len(table) // 40, tiles, 1 << 31)
        instructions += kernel.run(memory, grid, block, arguments)
        if any(data != copied for data, copied in runs):
            raise RuntimeError(f"launch {launch}: wrong bytes")
        words = [int.from_bytes(sums[i : i + 8], "little") for i in range(0, len(sums), 8)]
        found = [sum(words[LANES * i : LANES * (i + 1)]) & MASK for i in range(slots)]
        if found != expected:
            raise RuntimeError(f"launch {launch}: sums {found}, expected {expected}")
    return {"launches": launches, "instructions": instructions}


def run_far(text: str) -> Result:
    """The last warp of a launch of 6 GiB: offsets beyond 32 bits."""
    length, block = 6 << 30, 512
    base, key, data = 1 << 40, 0x1234567890ABCDEF, random.Random(1).randbytes(4 * TILE)
    tiles = length // TILE
    grid = tiles * LANES // block
    offset = length - len(data)
    memory = ptx.Memory()
    memory.add(base + offset, data, writable=False)
    copied = memory.add(2 * base + offset, bytes(len(data)), writable=True)
    table = b"".join(v.to_bytes(8, "little") for v in (base, 2 * base, length, key, 0))
    memory.add(1 << 30, table, writable=False)
    sums = memory.add(1 << 31, bytes(8 * LANES), writable=True)
    threads = range(grid * block - 32, grid * block)
    ptx.Kernel(text, KERNEL).run(memory, grid, block, (1 << 30, 1, tiles, 1 << 31), threads)
    total = sum(int.from_bytes(sums[i : i + 8], "little") for i in range(0, len(sums), 8)) & MASK
    if data != copied or total != checksum(data, key + offset // 8 * STEP):
        raise RuntimeError("wrong far from the start")
    return {"offset": offset}


def noticed(check: Callable[..., object], *arguments: object) -> bool:
    try:
        check(*arguments)
    except (RuntimeError, ptx.Fault):
        return True
    return False


def main() -> None:
    report: dict[str, list[Result | str]] = {}
    failed = 0

    def step(name: str, check: Callable[..., Result | str], *arguments: object) -> None:
        nonlocal failed
        result: Result | str
        try:
            result = check(*arguments)
        except (RuntimeError, ptx.Fault) as error:
            failed += 1
            result = {"failed": str(error)}
        report.setdefault(name, []).append(result)
        print(f"{name}: {json.dumps(result)}", flush=True)

    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(2) as pool:
        folder = Path(place)
        step("ptx", check_ptx, os.environ.get("KVXFER_WRITE") == "1")
        for architecture in ARCHITECTURES:
            step("sass", check_sass, architecture, folder)
        host = pool.submit(run_host, "host", folder)
        bugs = {
            name: pool.submit(noticed, run_host, name, folder, edit)
            for name, edit in SOURCE_BUGS.items()
        }
        text = (HERE / "kv.ptx").read_text()
        step("executed ptx", run_ptx, text, 60, 1)
        step("executed ptx, far on", run_far, text)
        for name, (pattern, by) in PTX_BUGS.items():
            broken, count = re.subn(pattern, by, text, count=1)
            if count != 1:
                sys.exit(f"build.py: kv.ptx has nothing like {pattern!r} ({name})")
            step("planted in the ptx", planted, name, noticed(run_ptx, broken, 60, 1))
        step("host run under ASAN and UBSAN", host.result)
        for name, bug in bugs.items():
            step("planted in the source", planted, name, bug.result())
    passed = sum(len(results) for results in report.values()) - failed
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps({"passed": passed, "failed": failed, **report}, indent=2) + "\n")
    print(f"kernels: {passed} passed, {failed} failed")
    sys.exit(failed != 0)


def planted(name: str, found: bool) -> Result:
    if not found:
        raise RuntimeError(f"not noticed: {name}")
    return {"noticed": name}


if __name__ == "__main__":
    main()
