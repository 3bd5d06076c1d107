"""Executes the PTX of kv.cu, slowly: one thread after the other, with every address checked.

The host run (check.c) covers everything but what only a GPU sees: the inline assembly of kv.cu and
what the compiler made of the rest. This covers those. It knows the instructions that the kernel
has, and ends at any other.
"""

import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

Registers = dict[str, int | float]
Operand = Callable[[Registers], int | float]


class Fault(Exception):
    """An access that a GPU refuses."""


@dataclass
class Memory:
    """Runs of bytes at addresses."""

    runs: list[tuple[int, bytearray, bool]] = field(default_factory=list)

    def add(self, address: int, data: bytes, *, writable: bool) -> bytearray:
        run = bytearray(data)
        self.runs.append((address, run, writable))
        return run

    def at(self, address: int, size: int, *, write: bool) -> tuple[bytearray, int]:
        if address % size:
            raise Fault(f"misaligned: {size} bytes at {address:#x}")
        for start, run, writable in self.runs:
            if start <= address and address + size <= start + len(run) and (writable or not write):
                return run, address - start
        raise Fault(f"{'store' if write else 'load'} of {size} bytes at {address:#x}")


def single(value: float) -> float:
    """As rounded to 32 bits."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def width(kind: str) -> int:
    return int(kind[1:])


INTEGER: dict[str, Callable[..., int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "mul.wide": lambda a, b: a * b,
    "mad.lo": lambda a, b, c: a * b + c,
    "mad.wide": lambda a, b, c: a * b + c,
    "div": lambda a, b: a // b,
    "min": min,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "shl": lambda a, b: a << b,
    "shr": lambda a, b: a >> b,
    "mov": lambda a: a,
    "cvt": lambda a: a,
}
FLOAT: dict[str, Callable[..., float]] = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "div.full": lambda a, b: a / b,
}
COMPARE: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
# What takes a signed type and does the same with an unsigned one.
SIGNLESS = {"add", "sub", "mul.lo", "mad.lo", "mov"}


class Kernel:
    """The one entry of a PTX text."""

    def __init__(self, text: str, name: str) -> None:
        head, _, body = text.partition(f".entry {name}(")
        if not head or ".entry" in body:
            raise ValueError(f"not one entry called {name}")
        parameters, _, body = body.partition(")")
        self.parameters = re.findall(r"\w+_param_\d+", parameters)
        self.memory = Memory()
        self.labels: dict[str, int] = {}
        # (guard, whether it is negated, what to do): it answers where to go on, if not behind.
        self.code: list[tuple[str | None, bool, Callable[[Registers], int | None]]] = []
        body = re.sub(r"//[^\n]*", "", body[body.index("{") + 1 : body.rindex("}")])
        lines = [line.strip() for line in body.splitlines()]
        lines = [line for line in lines if line and not line.startswith(".")]
        count = 0
        for line in lines:
            if line.endswith(":"):
                self.labels[line[:-1]] = count
            else:
                count += 1
        for line in lines:
            if not line.endswith(":"):
                self.code.append(self.instruction(line))

    def run(
        self,
        memory: Memory,
        grid: int,
        block: int,
        arguments: Iterable[int],
        threads: Iterable[int] | None = None,
    ) -> int:
        """These threads of the grid, or all. How many instructions that were."""
        self.memory = memory
        given = dict(zip(self.parameters, arguments, strict=True))
        done = 0
        for thread in range(grid * block) if threads is None else threads:
            registers: Registers = dict(given)
            registers["%ctaid.x"], registers["%tid.x"] = divmod(thread, block)
            registers["%nctaid.x"], registers["%ntid.x"] = grid, block
            at = 0
            while at >= 0:
                guard, negated, action = self.code[at]
                to = None if guard and bool(registers[guard]) == negated else action(registers)
                at = at + 1 if to is None else to
                done += 1
        return done

    def instruction(self, line: str) -> tuple[str | None, bool, Callable[[Registers], int | None]]:
        match = re.fullmatch(r"(?:@(!?)(%p\d+)\s+)?([\w.:]+)\s*(.*);", line)
        if match is None:
            raise ValueError(f"not understood: {line}")
        negated, guard, code, rest = match.groups()
        operands = [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)]
        return guard, negated == "!", self.action(code, operands, line)

    def action(
        self, code: str, operands: list[str], line: str
    ) -> Callable[[Registers], int | None]:
        if code in ("ret", "exit"):
            return lambda _: -1
        if code in ("bra", "bra.uni"):
            to = self.labels[operands[0]]
            return lambda _: to
        name, _, kind = code.rpartition(".")
        if name == "ld.param":
            parameter, mask = operands[1].strip("[]"), (1 << width(kind)) - 1
            target = operands[0]
            return lambda r: r.__setitem__(target, int(r[parameter]) & mask)
        if name in ("ld.global", "ld.global.L1::no_allocate.v2"):
            return self.load(operands, width(kind) // 8)
        if name in ("st.global", "st.global.v2"):
            return self.store(operands, width(kind) // 8)
        if code == "red.global.add.u64":
            return self.add(operands)
        target, values = operands[0], [operand(part) for part in operands[1:]]
        if name.startswith("setp."):
            compare = COMPARE[name[5:]]
            if kind[0] == "s" and name[5:] not in ("eq", "ne"):
                raise ValueError(f"not known: {line}")
            a, b = values
            mask = (1 << width(kind)) - 1
            return lambda r: r.__setitem__(target, compare(int(a(r)) & mask, int(b(r)) & mask))
        if name == "selp":
            a, b, p = values
            return lambda r: r.__setitem__(target, a(r) if p(r) else b(r))
        if code == "or.pred":
            a, b = values
            return lambda r: r.__setitem__(target, a(r) or b(r))
        if code == "cvt.rn.f32.u32":
            return lambda r: r.__setitem__(target, single(values[0](r)))
        if code == "cvt.rzi.u32.f32":
            return lambda r: r.__setitem__(target, min(int(values[0](r)), (1 << 32) - 1))
        if kind == "f32":
            compute = FLOAT[name]
            return lambda r: r.__setitem__(target, single(compute(*(v(r) for v in values))))
        return self.integer(name, kind, target, values, line)

    def integer(
        self, name: str, kind: str, target: str, values: list[Operand], line: str
    ) -> Callable[[Registers], int | None]:
        bits = width(kind)
        if name.startswith("cvt."):
            # To the first of two types, from the second.
            bits = min(bits, width(name[4:]))
            name = "cvt"
        known = kind[0] in "ub" or (kind[0] == "s" and name in SIGNLESS)
        if name not in INTEGER or not known:
            raise ValueError(f"not known: {line}")
        compute, mask = INTEGER[name], (1 << bits) - 1
        # The third operand of mad.wide is as wide as the result.
        masks = [mask, mask, (1 << 64) - 1]
        result = (1 << 64) - 1 if name.endswith(".wide") else mask

        def run(r: Registers) -> None:
            given = [int(v(r)) & m for v, m in zip(values, masks, strict=False)]
            r[target] = compute(*given) & result

        return run

    def load(self, operands: list[str], size: int) -> Callable[[Registers], None]:
        targets, address = names(operands[0]), place(operands[1])

        def run(r: Registers) -> None:
            data, at = self.memory.at(address(r), size * len(targets), write=False)
            for index, target in enumerate(targets):
                start = at + index * size
                r[target] = int.from_bytes(data[start : start + size], "little")

        return run

    def store(self, operands: list[str], size: int) -> Callable[[Registers], None]:
        address, sources = place(operands[0]), names(operands[1])

        def run(r: Registers) -> None:
            data, at = self.memory.at(address(r), size * len(sources), write=True)
            for index, source in enumerate(sources):
                start = at + index * size
                value = int(r[source]) & ((1 << (8 * size)) - 1)
                data[start : start + size] = value.to_bytes(size, "little")

        return run

    def add(self, operands: list[str]) -> Callable[[Registers], None]:
        address, value = place(operands[0]), operand(operands[1])

        def run(r: Registers) -> None:
            data, at = self.memory.at(address(r), 8, write=True)
            sum_ = int.from_bytes(data[at : at + 8], "little") + int(value(r))
            data[at : at + 8] = (sum_ & ((1 << 64) - 1)).to_bytes(8, "little")

        return run


def names(text: str) -> list[str]:
    return [part.strip() for part in text.strip("{}").split(",")]


def place(text: str) -> Callable[[Registers], int]:
    """An address in brackets: a register, and perhaps a number."""
    register, _, offset = text.strip("[]").partition("+")
    number = int(offset or "0", 0)
    return lambda r: int(r[register]) + number


def operand(text: str) -> Operand:
    if text.startswith("%"):
        return lambda r: r[text]
    if text.startswith("0f"):
        value = struct.unpack(">f", bytes.fromhex(text[2:]))[0]
        return lambda _: value
    number = int(text.rstrip("U"), 0)
    return lambda _: number
