"""Prints plans as terminal tables."""

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from trapo_jax.planning.plan import Plan
from trapo_jax.planning.programs import Program
from trapo_jax.planning.topology import GIB

FITS = {True: "yes", False: "no", None: "?"}
COMPARISON_HEADER = (
    "topology",
    "fits",
    "training",
    "sampling",
    "train step >=",
    "bound by",
    "MFU <=",
)


def print_plan(plan: Plan, console: Console) -> None:
    """Prints the resources that each program needs on one device, and whether the run fits."""
    title = (
        f"{plan.topology.name}, mesh {plan.mesh}: {plan.num_params / 1e9:.2f}B parameters, rows of "
        f"{plan.row_len} tokens, attention {plan.decoder.attention}; values per device"
    )
    if plan.out_of_memory:
        console.print(f"{title}\n{plan.out_of_memory[1]}")
    else:
        console.print(programs_table(title, plan))
        memory = f" of {plan.topology.chip.memory / GIB:.0f}" if plan.topology.chip else ""
        for phase, size in plan.needed_bytes.items():
            console.print(f"{phase}: {size / GIB:.2f}{memory} GiB")
    for advice in plan.advice:
        console.print(f"does not fit; try {advice}")


def programs_table(title: str, plan: Plan) -> Table:
    """Returns a table with one column per program."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for program in plan.programs:
        table.add_column(program.name, justify="right")

    def add_row(name: str, text: Callable[[Program], str]) -> None:
        table.add_row(name, *map(text, plan.programs))

    add_row("arguments", lambda p: f"{p.arguments / GIB:,.2f} GiB")
    add_row("temporaries", lambda p: f"{p.temporaries / GIB:,.2f} GiB")
    add_row("FLOPs", lambda p: f"{p.flops:.3g}")
    add_row("memory traffic", lambda p: f"{p.traffic.memory / GIB:,.1f} GiB")
    for kind in sorted({kind for p in plan.programs for kind in p.traffic.collectives}):
        received = lambda p, kind=kind: p.traffic.collectives.get(kind, 0.0)
        add_row(
            kind,
            lambda p, received=received: f"{received(p) / GIB:,.2f} GiB" if received(p) else "",
        )
    if plan.topology.chip:
        bounds = {p.name: p.lower_bounds(plan.topology) for p in plan.programs}
        for kind in ("compute", "memory", "interconnect"):
            add_row(f"{kind} alone", lambda p, kind=kind: f"{bounds[p.name][kind]:.3g} s")
        add_row("bound by", lambda p: max(bounds[p.name], key=bounds[p.name].__getitem__))
        add_row("MFU at most", lambda p: f"{plan.mfu_bound(p):.0%}")
    add_row("compiled in", lambda p: f"{p.compile_secs:.0f} s")
    return table


def print_comparison(plans: Sequence[Plan], console: Console) -> None:
    """Prints one row per plan: whether it fits, its memory, and bounds on its train step."""
    table = Table(title="comparison", title_justify="left")
    for i, column in enumerate(COMPARISON_HEADER):
        table.add_column(column, justify="left" if i == 0 else "right")
    for plan in plans:
        cells = [plan.topology.name, FITS[plan.fits]]
        cells += [f"{size / GIB:.1f} GiB" for size in plan.needed_bytes.values()]
        if plan.programs and plan.topology.chip:
            bounds = plan.programs[0].lower_bounds(plan.topology)
            slowest = max(bounds, key=bounds.__getitem__)
            cells += [
                f"{bounds[slowest]:.1f} s",
                slowest,
                f"{plan.mfu_bound(plan.programs[0]):.0%}",
            ]
        table.add_row(*cells)
    console.print(table)
