"""Reads what XLA compiled for a TPU: its optimised, scheduled HLO as text.

Only the text has it all: the compiler's own summary counts the body of a loop once and knows neither
which collectives run beside compute nor what a kernel does. Here every instruction is counted as
often as it is executed (of a conditional, every branch).
"""

import dataclasses
import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
          "f32": 4, "s64": 8, "u64": 8, "f64": 8}  # fmt: skip
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: its name, its shape and operands as text, what it does, and all that follows."""

    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def bytes(self) -> int:
        """Size of the result; of all of them, if there are several."""
        arrays = _ARRAY.findall(self.shape)
        return sum(_BYTES.get(kind, 0) * math.prod(_dims(dims)) for kind, dims in arrays)

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r"%([\w.\-]+)", self.rest.split(")", 1)[0])

    def called(self, attribute: str) -> str | None:
        """The computation that `attribute` (body, calls, ...) names."""
        match = re.search(attribute + r"=%?([\w.\-]+)", self.rest)
        return match and match[1]

    def number(self, key: str) -> int | None:
        """A whole number of the compiler's annotations or the attributes."""
        match = re.search(rf'"?{key}"?[:=]"?(\d+)', self.rest)
        return match and int(match[1])


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of the program, as often as `times`."""

    kind: str
    bytes: int  # of its result; of its operand for reduce-scatter
    is_async: bool
    times: int
    loop: str | None  # the body of the innermost loop that it is in


class CompiledProgram:
    """A compiled program. `trips` is how often a loop runs of which the compiler doesn't know it."""

    def __init__(self, text: str, trips: int = 1):
        self.computations, self._entry = _parse(text)
        self._trips = trips
        # (computation, how often it runs, innermost loop); what a fusion calls is part of it.
        self.executed = list(self._execute(self._entry, 1, None))

    def _execute(self, name: str, times: int, loop: str | None) -> Iterator[tuple[str, int, str | None]]:
        yield name, times, loop
        for i in self.computations[name].values():
            if i.opcode == "while":
                trips = self.trip_count(i)
                yield from self._execute(i.called("condition"), times * (trips + 1), loop)
                yield from self._execute(i.called("body"), times * trips, i.called("body"))
            elif i.opcode in ("call", "async-start"):
                inner = i.called("to_apply") or i.called("calls")
                if inner in self.computations:
                    yield from self._execute(inner, times, loop)
            elif i.opcode == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
                names = branches[1] if branches else i.rest.split("computation=", 1)[1]
                names = re.findall(r"%([\w.\-]+)", names)
                for branch in names if branches else names[:2]:
                    yield from self._execute(branch, times, loop)

    def trip_count(self, loop: Instruction) -> int:
        """How often the body of a `while` runs: scans count from 0 up to a constant."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(known[1])
        condition = self.computations[loop.called("condition")]
        last = list(condition.values())[-1]
        bounds = [condition[name] for name in last.operands if name in condition]
        constants = [b for b in bounds if b.opcode == "constant" and last.opcode == "compare"]
        return int(constants[0].rest.split(")")[0]) if constants else self._trips

    def loops(self) -> dict[str, int]:
        """Body of every loop -> its trip count."""
        return {
            i.called("body"): self.trip_count(i)
            for name, _, _ in self.executed
            for i in self.computations[name].values()
            if i.opcode == "while"
        }

    def cycles(self) -> int:
        """The compiler's estimate of all that isn't a collective or a Pallas kernel."""
        return sum(
            times * (i.number("estimated_cycles") or 0)
            for name, times, _ in self.executed
            for i in self.computations[name].values()
        )

    def matmul_flops(self) -> int:
        """Operations of all matrix products (two per multiply-add), those of kernels not counted."""
        return sum(times * self._flops_within(name) for name, times, _ in self.executed)

    @functools.cache  # noqa: B019  a program is read once and dropped
    def _flops_within(self, name: str) -> int:
        total = 0
        for i in self.computations[name].values():
            if i.opcode in ("convolution", "dot"):
                total += _product_flops(i, self.computations[name])
            elif i.opcode == "fusion":
                total += self._flops_within(i.called("calls"))
        return total

    def kernels(self, within: str | None = None) -> Counter[str]:
        """Names of the Pallas kernels -> how often each runs; of one computation only if named."""
        found: Counter[str] = Counter()
        for name, times, _ in self.executed:
            if within not in (None, name):
                continue
            for i in self.computations[name].values():
                if 'custom_call_target="tpu_custom_call"' in i.rest:
                    found[i.name.split(".")[0]] += times
        return found

    def kernel_flops(self) -> int:
        """Operations that the Pallas kernels say they do."""
        return sum(
            times * (i.number("flops") or 0)
            for name, times, _ in self.executed
            for i in self.computations[name].values()
            if 'custom_call_target="tpu_custom_call"' in i.rest
        )

    def collectives(self) -> list[Collective]:
        """All collectives. One that is spread over several fusions, which compute meanwhile, or that
        has a start and a done, is asynchronous and counts once."""
        found = []
        for name, times, loop in self.executed:
            seen = set()
            for i, is_async in self._collectives_within(name):
                channel = i.number("channel_id") if is_async else i.name
                if channel not in seen:
                    seen.add(channel)
                    found.append(self._collective(i, is_async, times, loop))
        return found

    def _collectives_within(self, name: str) -> Iterator[tuple[Instruction, bool]]:
        for i in self.computations[name].values():
            kind = i.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                yield i, kind != i.opcode
            elif i.opcode == "fusion":
                yield from ((inner, True) for inner, _ in self._collectives_within(i.called("calls")))

    def _collective(self, i: Instruction, is_async: bool, times: int, loop: str | None) -> Collective:
        kind, size = i.opcode.removesuffix("-start"), i.bytes
        if kind == "reduce-scatter":
            groups = re.search(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\})", i.rest)
            size *= int(groups[1] or groups[2].count(",") + 1) if groups else 1
        elif kind != i.opcode:
            # A start gives its operand beside its result.
            size = max(_BYTES.get(k, 0) * math.prod(_dims(d)) for k, d in _ARRAY.findall(i.shape))
        return Collective(kind, size, is_async, times, loop)


def _parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    computations: dict[str, dict[str, Instruction]] = defaultdict(dict)
    entry, current = "", None
    for line in text.splitlines():
        if not line.startswith(" "):
            match = _COMPUTATION.match(line)
            current = match[1] if match else None
            if match and line.startswith("ENTRY"):
                entry = match[1]
        elif current and (match := _INSTRUCTION.match(line)):
            computations[current][match[1]] = Instruction(*match.groups())
    return dict(computations), entry


def _dims(text: str) -> list[int]:
    return [int(d) for d in text.split(",") if d]


def _product_flops(i: Instruction, computation: dict[str, Instruction]) -> int:
    """Two operations per multiply-add. TPUs know only convolutions: an axis that isn't simply one of
    rows, columns or contraction has become a window, whose taps outside of the operand don't count."""
    lhs, rhs, out = (_dims(_ARRAY.search(x)[2]) for x in (*_operand_shapes(i, computation), i.shape))
    if i.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)[1]
        return 2 * math.prod(out) * math.prod(lhs[d] for d in _dims(contracted))
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest).groups()
    named = zip(labels, (lhs, rhs, out), strict=True)
    sizes = [dict(zip(names, dims, strict=True)) for names, dims in named]
    total = 2 * sizes[2]["b"] * sizes[2]["f"] * sizes[1]["i"]
    window = re.search(r"window=\{([^}]*)\}", i.rest)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}

    def field(name, axis, default):
        return fields[name].split("x")[axis] if name in fields else default

    for axis in range(len(lhs) - 2):
        stride, of_lhs, of_rhs = (
            int(field(name, axis, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate")
        )
        low = int(field("pad", axis, "0_0").split("_")[0])
        last = (sizes[0][str(axis)] - 1) * of_lhs
        starts = [o * stride - low for o in range(sizes[2][str(axis)])]
        taps = [k * of_rhs for k in range(sizes[1][str(axis)])]
        total *= sum(0 <= x + k <= last and (x + k) % of_lhs == 0 for x in starts for k in taps)
    return total


def _operand_shapes(i: Instruction, computation: dict[str, Instruction]) -> list[str]:
    inline = re.findall(r"(\w+\[[\d,]*\])\S* %", i.rest.split(")", 1)[0])
    return inline[:2] if len(inline) >= 2 else [computation[name].shape for name in i.operands[:2]]
