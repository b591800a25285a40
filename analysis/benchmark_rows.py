"""The rows of the benchmark: what is measured, where, and the bar it has to reach.

A new row is one line in ROWS; a new way of observing is one function in benchmark_ways.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import benchmark_peers as peers
import benchmark_ways as ways
from benchmark_bounds import BOUNDS
from benchmark_cases import (
    CONV_64,
    CONV_768,
    CONV_768_64,
    FC_4096,
    FIFTY,
    IMAGENET,
    MANY,
    MNIST_64,
    MNIST_512,
    Case,
    Run,
    Setting,
)
from benchmark_scaling import SCALING, VARIED

Kind = Literal["turns", "contest", "total", "alone", "GiB", "result", "step", "scaling"]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Kinds: "turns" takes turns with the plain step and other rows of its case, and counts plain
    steps; "total" does so by sums instead of medians, "alone" in a process of its own, because it
    may take too much memory; "contest" takes turns with its rivals, and counts how often it fits
    into the fastest one's time; "GiB", "result" and "step" are peaks of memory, in GiB, in sizes of
    the result and in peaks of the plain step; "scaling" is the exponent of time in a size.
    """

    case: Case
    name: str
    title: str
    prepare: Callable[[Setting], Run]
    bar: float | None = None
    stretch: float | None = None
    kind: Kind = "turns"
    rivals: tuple["Row", ...] = ()
    peer: bool = False  # another library, which may be absent or fail
    threads: int | None = None  # CPU threads of its own
    only: Literal["", "cpu", "gpu"] = ""  # where the row stands in the table; "": everywhere

    @property
    def key(self) -> str:
        """What --rows is matched with."""
        return f"{self.case.name}/{self.name}"

    @property
    def bound(self) -> str:
        """What bounds it, if it misses its bar."""
        return BOUNDS.get(self.key, "")


def peer(case: Case, name: str, title: str, prepare: Callable[[Setting], Run]) -> Row:
    threads = 1 if "ASDL" in title else None  # unstable with more
    return Row(case, name, title, prepare, peer=True, threads=threads)


def both(row: Row) -> tuple[Row, Row]:
    """The row, and the same without the compiled kernels, of which GPUs have none."""
    title, prepare = f"{row.title}, torch only", partial(ways.torch_only, row.prepare)
    kind: Kind = "turns" if row.kind == "contest" else row.kind
    return row, Row(row.case, f"{row.name}-torch", title, prepare, kind=kind, only="cpu")


def contest(row: Row, *rivals: Row) -> Row:
    """The same row, timed against its rivals."""
    return replace(row, kind="contest", rivals=rivals)


def per_sample(case: Case) -> Row:
    rivals = (
        peer(case, "per-sample-func", "... by torch.func", peers.torch_func_per_sample),
        peer(case, "per-sample-backpack", "... by BackPACK", peers.backpack_per_sample),
        peer(case, "per-sample-opacus", "... by Opacus", peers.opacus_per_sample),
        peer(case, "per-sample-asdl", "... by ASDL", peers.asdl_per_sample),
    )
    row = Row(case, "per-sample", "per-sample gradients", ways.per_sample_gradients, bar=1.0)
    return contest(row, *rivals)


one_sign_D = partial(ways.squared_errors, fisher="rademacher")
exact_D = partial(ways.squared_errors, fisher="exact")
exact_all = partial(ways.everything, fisher="exact")
one_sign_all = partial(ways.everything, fisher="rademacher")
exact_natural = partial(ways.natural_gradients, fisher="exact")
one_sign_natural = partial(ways.natural_gradients, fisher="rademacher")
exact_128 = partial(ways.natural_gradients, fisher="exact", rows=128)
exact_64 = partial(ways.natural_gradients, fisher="exact", rows=64)
joint_alone = partial(ways.natural_gradients_alone, fisher="rademacher", sharing="joint")
expand_all = partial(ways.natural_gradients_alone, fisher="rademacher")
expand_512 = partial(ways.natural_gradients_alone, fisher="rademacher", rows=512)
one_layer = partial(ways.measured_step, layers=["0"], fisher="rademacher")
one_layer_256 = partial(one_layer, rows=256)
one_natural = partial(ways.natural_gradients_alone, layers=["0"], fisher="rademacher")
one_joint = partial(one_natural, sharing="joint")
all_512 = partial(ways.measured_step, fisher="rademacher", rows=512)
asdl_exact = partial(peers.asdl_unit_fishers, fisher="fisher_exact")
asdl_natural_mc = partial(peers.asdl_natural_gradients, fisher="fisher_mc")
asdl_natural_exact = partial(peers.asdl_natural_gradients, fisher="fisher_exact")
economy = partial(peers.cockpit, configuration="economy")
full = partial(peers.cockpit, configuration="full")

ACTIVATIONS = "step + mean and variance of every unit's output"
NATURAL = "step + everything + all natural gradients"
CONVOLVED = "step + all natural gradients, one sign"
MATERIALISED = "exact unit Fishers, materialised"
OVERHEAD = "Monitor(overhead=0.05): 1.05 ± 0.01"
MEASURED = "step + s, k of all units, one sign"

ASDL_FISHER = peer(MNIST_64, "fisher-asdl", "... by ASDL, exact", asdl_exact)
ASDL_EXACT = peer(MNIST_64, "asdl-exact", "... by ASDL, exact", asdl_natural_exact)
ASDL_MC = peer(MNIST_64, "asdl-mc", "... by ASDL, MC", asdl_natural_mc)

KERNELS = (  # a compiled kernel takes part in these
    Row(MNIST_64, "activations", ACTIVATIONS, ways.activation_statistics, 1.15, 1.05),
    Row(CONV_64, "activations", ACTIVATIONS, ways.activation_statistics, 1.10, 1.03),
    Row(MNIST_64, "d-sign", "step + D, one random sign", one_sign_D, 1.6, 1.4),
    Row(CONV_64, "d-sign", "step + D, one random sign", one_sign_D, 1.4, 1.25),
    Row(MNIST_64, "d-exact", "step + exact D", exact_D, 2.6, 2.0),
    Row(MNIST_512, "d-exact", "step + exact D", exact_D, 3.3, 2.8),
    Row(MNIST_64, "all-exact", "step + everything, exact", exact_all, 12, 4.5),
    Row(MNIST_64, "all-sign", "step + everything, one sign", one_sign_all, 9, 3.0),
    Row(MNIST_64, "natural-exact", f"{NATURAL}, exact", exact_natural, 14, 5),
    Row(MNIST_64, "natural-sign", f"{NATURAL}, one sign", one_sign_natural, 11, 3.5),
    Row(MNIST_512, "natural-all", f"{NATURAL}, exact, all rows", exact_natural, 25, 10),
    Row(MNIST_512, "natural-128", f"{NATURAL}, exact, 128 rows", exact_128, 14, 4),
    Row(MNIST_512, "natural-64", f"{NATURAL}, exact, 64 rows", exact_64, 10, 2.5),
    Row(CONV_64, "natural-joint", f"{CONVOLVED}, true block (joint)", joint_alone, 2.5, 2.0),
    Row(CONV_64, "natural-512", f"{CONVOLVED}, 512 positions", expand_512),
    Row(CONV_64, "natural-expand", f"{CONVOLVED}, every position", expand_all),
    Row(FIFTY, "every-50th", "everything each 50th step", ways.training_observed, 1.15, 1.08),
    Row(MANY, "overhead", OVERHEAD, ways.training_with_overhead, 1.06, kind="total"),
    contest(Row(MNIST_64, "fisher", MATERIALISED, ways.unit_fishers, 15, 25), ASDL_FISHER),
)
LARGE = (
    Row(FC_4096, "measure", MEASURED, one_layer, 30, 5, kind="alone"),
    Row(CONV_768, "measure", MEASURED, one_layer, 30, 5, kind="alone"),
    Row(CONV_768, "measure-256", f"{MEASURED}, 256 positions", one_layer_256, kind="alone"),
)
LARGER = (
    Row(FC_4096, "natural", CONVOLVED, one_natural, 3.0),
    Row(CONV_768_64, "natural-joint", f"{CONVOLVED}, true block (joint)", one_joint, 2.2),
    Row(IMAGENET, "measure", f"{MEASURED}, 512 positions", all_512, 20),
    Row(IMAGENET, "natural", f"{CONVOLVED}, 512 positions", expand_512, 60),
    Row(IMAGENET, "natural-joint", f"{CONVOLVED}, true block (joint)", joint_alone, 60),
)
ON_GPU = (
    *(replace(row, kind="alone", only="gpu") for row in LARGER),
    Row(IMAGENET, "memory", f"{CONVOLVED}, 512 positions", expand_512, 2, kind="step", only="gpu"),
)
ROWS = (
    Row(MNIST_64, "hooks", "hooks when not measuring", ways.idle_hooks, 1.01, 1.00),
    Row(MNIST_64, "keep", "step that keeps a and δ", ways.keep, 1.10, 1.05),
    *(each for row in KERNELS for each in both(row)),
    Row(MNIST_64, "fisher-memory", MATERIALISED, ways.unit_fishers, 1.2, kind="result"),
    contest(
        Row(MNIST_64, "natural-asdl", f"{NATURAL}, exact", exact_natural, 300, 800), ASDL_EXACT
    ),
    contest(
        Row(MNIST_64, "natural-asdl-mc", f"{NATURAL}, one sign", one_sign_natural, 300, 800),
        ASDL_MC,
    ),
    per_sample(MNIST_64),
    per_sample(CONV_64),
    *(each for row in LARGE for each in both(row)),
    Row(FC_4096, "memory", MEASURED, one_layer, 4, kind="GiB"),
    Row(CONV_768, "memory", MEASURED, one_layer, 4, kind="GiB"),
    *ON_GPU,
    peer(MNIST_64, "c-backpack", "BackPACK DiagGGNExact (c only)", peers.backpack_c),
    peer(MNIST_64, "kfac-asdl", "ASDL K-FAC, another quantity", peers.asdl_kfac),
    peer(MNIST_64, "kfac-curvlinops", "step + curvlinops K-FAC factors", peers.curvlinops_kfac),
    peer(MNIST_64, "kfac-pytorch", "step + kfac-pytorch", peers.kfac_pytorch),
    peer(MNIST_64, "delve", "step + delve's activation covariance", peers.delve),
    peer(MNIST_64, "cockpit", "step + Cockpit economy", economy),
    peer(MNIST_64, "cockpit-full", "step + Cockpit full", full),
    peer(CONV_64, "cockpit", "step + Cockpit economy", economy),
    peer(CONV_64, "delve", "step + delve's activation covariance", peers.delve),
    *(
        Row(SCALING, size, f"growth with {size}", ways.measured_now, kind="scaling")
        for size in VARIED
    ),
)
