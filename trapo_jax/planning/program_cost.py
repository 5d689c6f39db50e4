"""Computes the cost of a compiled program on one device: FLOPs, memory traffic, and bytes received in collectives.

XLA's cost analysis counts a loop's body once; this module counts it once per iteration. Matmuls are counted in the
traced program (before the compiler fuses them), and memory traffic and collectives in the compiled program.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "s4", "u4", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64", "c64"), 8),
}
COLLECTIVES: tuple[str, ...] = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
# Operations that move no data, or that call a computation that is counted separately.
NO_TRAFFIC = frozenset(
    [
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "while",
        "conditional",
        "call",
        "opt-barrier",
        "partition-id",
        "replica-id",
        "iota",
        "async-start",
        "async-update",
        "async-done",
        "all-gather-done",
        "all-reduce-done",
        "collective-permute-done",
        "copy-done",
    ]
)
VIEWS = ("bitcast", "copy", "reshape")
UPDATE_OPERAND = {
    "dynamic-update-slice": 1,
    "scatter": 2,
}  # index of the operand that is written to operand 0 in place

ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
INDEX = re.compile(r"index=(\d+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
CHANNEL = re.compile(r"channel_id=(\d+)")
# Marks a collective that is split into pieces, which overlap with the iterations of a loop. The start, the pieces and
# the end of such a collective all have the type of the whole collective.
CHAIN_ID = 'chain_id="'
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Number of bytes that a device moves.

    Attributes:
      memory: bytes read from and written to main memory.
      collectives: bytes received from other devices, by kind of collective.
    """

    memory: float
    collectives: dict[str, float]


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    op: str
    operands: list[str]
    arguments: str  # The text between the parentheses.
    rest: str  # The text after the parentheses, which contains the attributes.


def matmul_flops(jaxpr: Any, *, unknown_trips: int = 1) -> float:
    """Returns the FLOPs of all matmuls in a traced program, summed over all devices, excluding Pallas kernels.

    Args:
      jaxpr: the `jaxpr` of `jitted.trace(...)`.
      unknown_trips: assumed number of iterations of loops whose length depends on data.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    total = 0.0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            sizes = eqn.invars[0].aval.shape
            depth = math.prod(sizes[i] for i in contracted)
            total += 2 * depth * math.prod(eqn.outvars[0].aval.shape)
        elif name == "pallas_call":
            continue
        elif name == "while":
            total += unknown_trips * matmul_flops(params["body_jaxpr"], unknown_trips=unknown_trips)
        elif name == "cond":
            total += max(
                matmul_flops(branch, unknown_trips=unknown_trips) for branch in params["branches"]
            )
        else:
            trips = params["length"] if name == "scan" else 1
            trips *= math.prod(params["mesh"].shape.values()) if name == "shard_map" else 1
            for inner in _inner_jaxprs(params):
                total += trips * matmul_flops(inner, unknown_trips=unknown_trips)
    return total


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in params:
            yield params[name]


def traffic(hlo_text: str, *, unknown_trips: int = 1) -> Traffic:
    """Returns the bytes that a compiled program moves on one device.

    Every operation is counted as reading its operands and writing its result, with two exceptions: slices of larger
    arrays are read and updated in place, and arrays that the compiler placed outside main memory are not counted.

    Args:
      hlo_text: the output of `compiled.as_text()`.
      unknown_trips: assumed number of iterations of loops whose length depends on data.
    """
    computations, entry = _parse(hlo_text)
    calls = _CallCounts(computations, unknown_trips)
    calls.follow(entry, times=1, in_fusion=False)
    memory, collectives = 0.0, dict.fromkeys(COLLECTIVES, 0.0)
    pieces: dict[
        str, tuple[int, str, float]
    ] = {}  # (times, kind, bytes) of split collectives, keyed by channel
    for (name, in_fusion), times in calls.times.items():
        body = computations[name]
        memory += 0.0 if in_fusion else times * _memory_bytes(body, computations)
        for instruction in body:
            kind = instruction.op.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            size = _collective_bytes(instruction, body)
            if CHAIN_ID not in instruction.rest:
                collectives[kind] += times * size
                continue
            channel = CHANNEL.findall(instruction.rest)[0]
            fewest = min(times, pieces.get(channel, (times, "", 0.0))[0])
            pieces[channel] = (fewest, kind, size)
    for times, kind, size in pieces.values():
        collectives[kind] += times * size
    return Traffic(memory, {kind: total for kind, total in collectives.items() if total})


class _CallCounts:
    """Counts how often each computation runs.

    Attributes:
      times: number of runs, keyed by the computation's name and whether it is part of a fusion.
    """

    def __init__(self, computations: dict[str, list[_Instruction]], unknown_trips: int):
        self.times: dict[tuple[str, bool], int] = {}
        self._computations = computations
        self._unknown_trips = unknown_trips

    def follow(self, name: str, *, times: int, in_fusion: bool) -> None:
        """Adds `times` runs of a computation and of the computations that it calls."""
        if name not in self._computations:
            return
        self.times[name, in_fusion] = self.times.get((name, in_fusion), 0) + times
        for i in self._computations[name]:
            if i.op not in ("while", "call", "conditional", "fusion", "async-start"):
                continue  # Other operations, such as reductions, call only scalar functions.
            trips = self._trips(i) if i.op == "while" else 1
            names = CALLED.findall(i.rest)
            for branches in BRANCHES.findall(i.rest):
                names += [branch.strip().lstrip("%") for branch in branches.split(",")]
            for called in names:
                self.follow(called, times=times * trips, in_fusion=in_fusion or i.op == "fusion")

    def _trips(self, loop: _Instruction) -> int:
        """Returns the number of iterations, stated by the compiler or implied by a condition `counter < constant`."""
        if found := TRIPS.search(loop.rest):
            return int(found[1])
        ((condition, body),) = LOOP.findall(loop.rest)
        inside = {i.name: i for i in self._computations.get(condition, [])}
        for i in inside.values():
            if i.op != "compare" or "direction=LT" not in i.rest:
                continue
            counter, limit = (inside[name] for name in i.operands)
            if limit.op == "constant" and (index := INDEX.search(counter.rest)):
                return -(-int(limit.arguments) // self._stride(body, int(index[1])))
        return self._unknown_trips

    def _stride(self, body: str, index: int) -> int:
        """Returns the increment of the `index`-th loop variable per iteration. It exceeds 1 in unrolled loops."""
        instructions = self._computations.get(body, [])
        inside = {i.name: i for i in instructions}
        step = inside.get(instructions[-1].operands[index])
        constants = [inside[n] for n in step.operands if n in inside] if step else []
        values = [int(i.arguments) for i in constants if i.op == "constant"]
        return values[0] if step and step.op == "add" and len(values) == 1 else 1


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Returns the instructions of all computations, keyed by name, and the name of the entry computation."""
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")) and line.rstrip().endswith("{"):
            name = line.removeprefix("ENTRY").strip().split(" ")[0].split("(")[0].lstrip("%")
            computations[name] = current = []
            entry = name if line.startswith("ENTRY") else entry
        elif " = " in line and line.startswith(" "):
            current.append(_instruction(line))
    return computations, entry


def _instruction(line: str) -> _Instruction:
    left, right = line.strip().removeprefix("ROOT ").split(" = ", 1)
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    type_, call = right[:end], right[end:].strip()
    op, _, _ = call.partition("(")
    close = _closing(call, len(op))
    arguments = call[len(op) + 1 : close]
    operands = re.findall(r"%([\w.\-]+)", arguments)
    return _Instruction(left.lstrip("%"), type_, op, operands, arguments, call[close + 1 :])


def _closing(text: str, start: int) -> int:
    """Returns the position of the closing parenthesis that matches the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text)


def _bytes_of(type_: str) -> float:
    """Returns the total size in bytes of a type's arrays in main memory."""
    total = 0.0
    for dtype, dims, layout in ARRAY.findall(type_):
        if "S(" not in layout:
            total += BYTES.get(dtype, 0) * math.prod(int(d) for d in dims.split(",") if d)
    return total


def _all_bytes_of(type_: str) -> float:
    """Returns the total size in bytes of a type's arrays, regardless of memory space."""
    return _bytes_of(re.sub(r"\{[^}]*\}", "", type_))


def _collective_bytes(i: _Instruction, body: list[_Instruction]) -> float:
    """Returns the bytes received in a collective: the size of its operands or its result, whichever is larger."""
    sizes = [_all_bytes_of(array[0]) for array in ARRAY.finditer(i.type)]
    # The type of a start operation includes the operand.
    result = max(sizes, default=0.0) if i.op.endswith("-start") else sum(sizes)
    operands = sum(_all_bytes_of(o.type) for o in body if o.name in i.operands)
    return max(result, operands)


def _memory_bytes(body: list[_Instruction], computations: dict[str, list[_Instruction]]) -> float:
    """Returns the memory traffic of one run of a computation, excluding the computations that it calls."""
    types = {i.name: i.type for i in body}
    total = 0.0
    for i in body:
        if i.op in NO_TRAFFIC or i.op.endswith("-done"):
            continue
        if i.op == "dynamic-slice":
            total += 2 * _bytes_of(i.type)
        elif i.op in UPDATE_OPERAND:
            total += 2 * _bytes_of(types.get(i.operands[UPDATE_OPERAND[i.op]], ""))
        elif i.op == "fusion":
            total += _fusion_bytes(i, types, computations)
        else:
            arrays = [_bytes_of(array[0]) for array in ARRAY.finditer(i.type)]
            # The type of a start operation includes the operand.
            total += max(arrays, default=0.0) if i.op.endswith("-start") else sum(arrays)
            total += sum(_bytes_of(types.get(n, "")) for n in i.operands)
    return total


def _fusion_bytes(
    fusion: _Instruction, types: dict[str, str], computations: dict[str, list[_Instruction]]
) -> float:
    """Returns the memory traffic of a fusion: its operands and its result.

    If an operand is sliced or updated in place, only the slices or updates are counted. Values that the fusion only
    passes through, such as the buffers of a concurrent collective, are not counted.
    """
    (called, *_) = CALLED.findall(fusion.rest)
    inside = computations[called]
    inner_types = {i.name: i.type for i in inside}
    reads, updates = 0.0, 0.0
    for number, operand in enumerate(fusion.operands):
        read, updated = _parameter_bytes(called, number, types.get(operand, ""), computations)
        reads, updates = reads + read, updates + updated
    if updates:
        return reads + updates
    root = inside[-1]
    if root.op != "tuple":
        return reads + _bytes_of(fusion.type)
    passed_through = {i.name for i in inside if i.op == "parameter" or CHAIN_ID in i.rest}
    return reads + sum(_bytes_of(inner_types[n]) for n in root.operands if n not in passed_through)


def _parameter_bytes(
    name: str, number: int, type_: str, computations: dict[str, list[_Instruction]]
) -> tuple[float, float]:
    """Returns the bytes read from a parameter of a fused computation, and the bytes read and written in place."""
    inside = computations[name]
    types = {i.name: i.type for i in inside}
    (parameter,) = [i.name for i in inside if i.op == "parameter" and int(i.arguments) == number]
    views = {parameter}  # Names of the parameter and of its views.
    reads, updates = 0.0, 0.0
    for i in inside:
        if not views & set(i.operands) or CHAIN_ID in i.rest or i.op == "tuple":
            continue
        if i.op in VIEWS:
            views.add(i.name)
        elif i.op == "dynamic-slice" and i.operands[0] in views:
            reads += _bytes_of(i.type)
        elif i.op in UPDATE_OPERAND and i.operands[0] in views:
            updates += 2 * _bytes_of(types.get(i.operands[UPDATE_OPERAND[i.op]], ""))
        elif i.op == "fusion":
            (called, *_) = CALLED.findall(i.rest)
            for inner, operand in enumerate(i.operands):
                if operand in views:
                    read, updated = _parameter_bytes(called, inner, type_, computations)
                    reads, updates = reads + read, updates + updated
        else:
            reads += _bytes_of(type_)
    return min(reads, _bytes_of(type_)), updates
