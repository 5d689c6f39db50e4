"""What a compiled program costs a device: FLOPs, bytes of memory traffic, bytes of collectives by kind.

XLA's own cost analysis counts the body of a loop once. Here loops count by their trips: matmuls are read off the
traced program (before the compiler fuses them), memory traffic and collectives off the compiled one.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "s4", "u4", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64", "c64"), 8),
}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
# They move nothing themselves, or what they call is counted.
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

ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a device moves, in bytes.

    Attributes:
      memory: read from and written to its main memory.
      collectives: received from other devices, by kind.
    """

    memory: float
    collectives: dict[str, float]


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    op: str
    operands: list[str]
    arguments: str  # as written
    rest: str  # attributes


def matmul_flops(jaxpr: Any, *, unknown_trips: int = 1) -> float:
    """FLOPs of all matmuls of a traced program, over all devices; kernels (Pallas) are not looked into.

    Args:
      jaxpr: from `jitted.trace(...).jaxpr`.
      unknown_trips: of loops whose length is data.
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
    """What a compiled program moves on one device.

    An operation reads its operands and writes its result, but for slices of larger arrays, which are read and
    updated in place, and for arrays that the compiler placed in another memory than the main one.

    Args:
      hlo_text: from `compiled.as_text()`.
      unknown_trips: of loops whose length is data.
    """
    computations, entry = _parse(hlo_text)
    memory = _Fold(computations, unknown_trips, lambda body: _memory_bytes(body, computations))
    kinds = {
        kind: _Fold(
            computations,
            unknown_trips,
            lambda body, kind=kind: _collective_bytes(body, kind),
            into_fusions=True,
        )(entry)
        for kind in COLLECTIVES
    }
    return Traffic(memory(entry), {kind: total for kind, total in kinds.items() if total})


class _Fold:
    """Sums `own` over a computation and what it calls, loops by their trips."""

    def __init__(
        self,
        computations: dict[str, list[_Instruction]],
        unknown_trips: int,
        own: Callable[[list[_Instruction]], float],
        *,
        into_fusions: bool = False,
    ):
        self._computations = computations
        self._unknown_trips = unknown_trips
        self._own = own
        self._into_fusions = into_fusions
        self._known: dict[str, float] = {}

    def __call__(self, name: str) -> float:
        if name not in self._known:
            body = self._computations.get(name, [])
            self._known[name] = self._own(body) + sum(map(self._called, body))
        return self._known[name]

    def _called(self, instruction: _Instruction) -> float:
        if instruction.op == "fusion" and not self._into_fusions:
            return 0.0
        if instruction.op not in ("while", "call", "conditional", "fusion", "async-start"):
            return 0.0  # reductions and the like call a scalar function
        found = TRIPS.search(instruction.rest)
        trips = 1
        if instruction.op == "while":
            trips = int(found[1]) if found else self._unknown_trips
        names = CALLED.findall(instruction.rest)
        for branches in BRANCHES.findall(instruction.rest):
            names += [branch.strip().lstrip("%") for branch in branches.split(",")]
        return trips * sum(map(self, names))


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """The instructions of every computation by its name, and the name of the entry."""
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
    """Where the parenthesis closes that opens at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text)


def _bytes_of(type_: str) -> float:
    """Of all arrays of a type that lie in main memory."""
    total = 0.0
    for dtype, dims, layout in ARRAY.findall(type_):
        if "S(" not in layout:
            total += BYTES.get(dtype, 0) * math.prod(int(d) for d in dims.split(",") if d)
    return total


def _all_bytes_of(type_: str) -> float:
    return _bytes_of(re.sub(r"\{[^}]*\}", "", type_))


def _collective_bytes(body: list[_Instruction], kind: str) -> float:
    """What the collectives of a computation bring: the size of the larger of operand and result."""
    types = {i.name: i.type for i in body}
    total = 0.0
    for i in body:
        if i.op in (kind, f"{kind}-start"):
            arrays = [*ARRAY.finditer(i.type)]
            result = max((_all_bytes_of(m[0]) for m in arrays), default=0.0)
            result = _all_bytes_of(i.type) if i.op == kind else result
            operands = sum(_all_bytes_of(types.get(name, "")) for name in i.operands)
            total += max(result, operands)
    return total


def _memory_bytes(body: list[_Instruction], computations: dict[str, list[_Instruction]]) -> float:
    types = {i.name: i.type for i in body}
    total = 0.0
    for i in body:
        if i.op in NO_TRAFFIC or i.op.endswith("-done"):
            continue
        if i.op == "dynamic-slice":
            total += 2 * _bytes_of(i.type)
        elif i.op == "dynamic-update-slice":
            total += 2 * _bytes_of(types.get(i.operands[1], ""))
        elif i.op == "fusion":
            (called,) = CALLED.findall(i.rest)[:1]
            total += _fusion_bytes(i, types, computations.get(called, []))
        else:
            total += _bytes_of(i.type) + sum(_bytes_of(types.get(n, "")) for n in i.operands)
    return total


def _fusion_bytes(fusion: _Instruction, types: dict[str, str], inside: list[_Instruction]) -> float:
    """A fusion's operands and result; of an operand that it only slices, the slices; of one that it updates, these."""
    inner_types = {i.name: i.type for i in inside}
    parameters = {int(i.arguments): i.name for i in inside if i.op == "parameter"}
    aliases: dict[str, str] = {}
    for i in inside:  # what is only another view of a parameter
        if i.op in ("bitcast", "copy", "reshape") and i.operands:
            aliases[i.name] = aliases.get(i.operands[0], i.operands[0])
    total, updated = 0.0, 0.0
    for number, operand in enumerate(fusion.operands):
        name = parameters.get(number, "")
        users = [
            i
            for i in inside
            if i.op not in ("bitcast", "copy", "reshape")
            and name in [aliases.get(o, o) for o in i.operands]
        ]
        if users and all(i.op == "dynamic-slice" for i in users):
            total += sum(_bytes_of(i.type) for i in users)
        elif users and all(
            i.op == "dynamic-update-slice" and aliases.get(i.operands[0], i.operands[0]) == name
            for i in users
        ):
            updated += sum(2 * _bytes_of(inner_types.get(i.operands[1], "")) for i in users)
        else:
            total += _bytes_of(types.get(operand, ""))
    return total + (updated or _bytes_of(fusion.type))
