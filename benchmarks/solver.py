"""How fast the solver is, against the textbook algorithm on the same inputs to the same stopping precision.

    python benchmarks/solver.py [--device cuda] [--repeats N] [--textbook-steps N] [--threads N]

Prints a table and exits 0 when every threshold holds, 1 when one does not. On a CPU, times are CPU seconds of this
process, so that a busy machine does not change the ratios, on one thread, as a merge solves a matrix; on a GPU,
seconds. Where the float32 textbook comes to rest is a matter of its rounding, and so of the number of threads: its
steps stand beside its time.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from poemerge import Factored, Solution, solve

# What both algorithms stop at: solve's default. On float32 deltas the textbook's own rounding keeps its theta moving by
# more than this, so that it runs on to its limit of steps (the released code's); the float64 row shows both converge.
RTOL = 1e-6
TEXTBOOK_STEPS = 50
PRIOR_PRECISION = 1e-3
PRIOR: dict[str, Any] = {"prior": "relative", "prior_precision": PRIOR_PRECISION}
Side = Literal["output", "input"]


def task_vectors(experts: int, rows: int, columns: int, *, seed: int, rank: int | None = None) -> Tensor:
    """Deltas with power-law spectra (σ_k ~ k^-0.7) whose singular subspaces are half the experts' common ones.

    Float32 `[expert, out, in]`, norms spread by a third around 1; of rank `rank` when given.
    """
    generator = torch.Generator().manual_seed(seed)
    rank = rank or min(rows, columns)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def basis(common: Tensor) -> Tensor:
        own = torch.linalg.qr(normal(*common.shape))[0]
        return torch.linalg.qr(0.5 * common + 0.5 * own)[0]

    left, right = (torch.linalg.qr(normal(size, rank))[0] for size in (rows, columns))
    deltas = []
    for _ in range(experts):
        spectrum = torch.arange(1, rank + 1) ** -0.7 * torch.exp(0.3 * normal(rank))
        delta = (basis(left) * spectrum) @ basis(right).mT
        deltas.append(delta / delta.norm() * torch.exp(0.3 * normal(1)))
    return torch.stack(deltas)


def adapters(experts: int, size: int, rank: int, *, seed: int) -> list[tuple[Tensor, Tensor, float]]:
    """LoRA factors (B, A, 1.0) of `task_vectors` of that rank."""
    pairs = []
    for delta in task_vectors(experts, size, size, seed=seed, rank=rank):
        left, values, right = torch.svd_lowrank(delta, q=rank + 8)
        pairs.append(
            (left[:, :rank] * values[:rank].sqrt(), (right[:, :rank] * values[:rank].sqrt()).mT.contiguous(), 1.0)
        )
    return pairs


def textbook(deltas: Tensor, *, scale_factor: float, side: str, most: int) -> tuple[Tensor, int]:
    """The released algorithm, step by step: every A_iᵀ(Θ − A_i) anew, then one linear solve; Cauchy, γ² = f‖A_i‖².

    Returns theta and the steps it took.
    """
    if side == "input":
        theta, steps = textbook(deltas.mT.contiguous(), scale_factor=scale_factor, side="output", most=most)
        return theta.mT, steps
    grams = deltas @ deltas.mT
    products = grams @ deltas
    identity = torch.eye(deltas.shape[1], device=deltas.device, dtype=deltas.dtype)
    scale_sq = scale_factor * deltas.square().sum((1, 2))
    trace = grams.diagonal(dim1=1, dim2=2).sum(1)
    prior = PRIOR_PRECISION * trace.sum() / deltas.shape[1]
    theta = torch.linalg.solve(grams.sum(0) + prior * identity, products.sum(0))
    for step in range(1, most + 1):
        residual_sq = torch.stack([(delta.mT @ (theta - delta)).square().sum() for delta in deltas])
        weights = 1 / (scale_sq + residual_sq)
        if step == 1:
            prior = PRIOR_PRECISION * (weights * trace).sum() / deltas.shape[1]
        matrix = prior * identity
        right = torch.zeros_like(theta)
        for weight, gram, product in zip(weights, grams, products, strict=True):
            matrix = matrix.add(gram, alpha=float(weight))
            right = right.add(product, alpha=float(weight))
        previous, theta = theta, torch.linalg.solve(matrix, right)
        if (theta - previous).norm() <= RTOL * theta.norm():
            break
    return theta, step


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    device: str
    repeats: int
    textbook_steps: int


@dataclass(frozen=True)
class Row:
    """One comparison: what, theirs and ours, their ratio, and the least that is asked for (None: for information)."""

    what: str
    theirs: str
    ours: str
    ratio: float
    least: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the ratio is as large as asked for."""
        return self.least is None or self.ratio >= self.least


def timed(function: Callable[[], Any], device: str, repeats: int) -> tuple[float, Any]:
    """The least seconds of `repeats` runs, and the result."""
    best, result = float("inf"), None
    for _ in range(repeats):
        if device != "cpu":
            torch.cuda.synchronize()
        clock = time.process_time if device == "cpu" else time.perf_counter
        start = clock()
        result = function()
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, clock() - start)
    return best, result


def error(theta: Tensor, exact: Tensor) -> float:
    """‖Θ − exact‖ / ‖exact‖."""
    return float((theta.double() - exact).norm() / exact.norm())


def dense_rows(
    shape: tuple[int, int], side: Side, options: Options, dtype: torch.dtype, least: float | None
) -> list[Row]:
    """One dense matrix of 8 experts: seconds, how far the two end apart, work over the floor."""
    deltas = task_vectors(8, *shape, seed=0).to(options.device, dtype)
    theirs, (reference, steps) = timed(
        lambda: textbook(deltas, scale_factor=0.01, side=side, most=options.textbook_steps), options.device, 1
    )

    def ours_once() -> Solution:
        return solve(deltas, expert="cauchy", scale="task-norm", scale_factor=0.01, side=side, rtol=RTOL, **PRIOR)

    ours, solution = timed(ours_once, options.device, options.repeats)
    what = f"dense {str(dtype).removeprefix('torch.')}, 8 experts {shape[0]}×{shape[1]}, side {side}"
    m, n = shape if side == "output" else shape[::-1]
    return [
        Row(what, f"{theirs:.2f} s, {steps} steps", f"{ours:.2f} s, {solution.steps} steps", theirs / ours, least),
        Row("    apart (float32 on both sides)", "", f"{error(solution.theta, reference.double()):.1e}", 0.0),
        floor_row(ours_once, 8, m, n),
    ]


class Traffic(TorchDispatchMode):
    """Bytes that every operation reads and writes, were nothing kept in a cache; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation's tensors and carry it out."""
        result = func(*args, **(kwargs or {}))
        if not (isinstance(func, torch._ops.OpOverload) and func.is_view):
            leaves = tree_leaves((args, kwargs, result))
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            self.total += sum(min(one.nbytes, one.untyped_storage().nbytes()) for one in tensors)
        return result


def floor_row(run: Callable[[], Solution], experts: int, m: int, n: int) -> Row:
    """Flops and bytes of a solve over the floor: N products A_iA_iᵀ and G_iA_i; every delta read, theta written.

    Products are counted as they are carried out, factorisations (which the counter leaves out) by their formula.
    """
    with FlopCounterMode(display=False) as counter, Traffic() as traffic:
        solution = run()
    solves = solution.steps + 1
    flops = counter.get_total_flops() + solves * (m**3 / 3 + 2 * m * m * n)
    least_flops = experts * 4 * m * m * n
    least_bytes = 4 * (experts + 1) * m * n
    text = f"flops ×{flops / least_flops:.1f}, bytes ×{traffic.total / least_bytes:.0f}"
    return Row("    over the floor of the method", "", text, flops / least_flops)


def lora_rows(options: Options) -> list[Row]:
    """Adapters: factored, against the textbook on the dense deltas they stand for; errors are against float64."""
    factors = [(b.to(options.device), a.to(options.device), scaling) for b, a, scaling in adapters(8, 768, 16, seed=1)]
    dense = torch.stack([scaling * (b @ a) for b, a, scaling in factors])
    theirs, (reference, steps) = timed(
        lambda: textbook(dense, scale_factor=0.01, side="output", most=options.textbook_steps), options.device, 1
    )
    settings: dict[str, Any] = {
        "expert": "cauchy",
        "side": "output",
        "scale": "task-norm",
        "scale_factor": 0.01,
        **PRIOR,
    }

    def ours_once() -> Solution:
        solution = solve(factors, rtol=RTOL, **settings)
        assert isinstance(solution.theta, Factored)
        solution.theta.pair()  # what a merge adds to the base's weight
        return solution

    ours, solution = timed(ours_once, options.device, 5 * options.repeats)
    precise = [(b.double(), a.double(), scaling) for b, a, scaling in factors]
    exact = solve(precise, rtol=1e-12, max_steps=500, **settings).dense()
    mine, its = error(solution.dense(), exact), error(reference, exact)
    what = "LoRA r=16, 8 experts 768×768, side output"
    return [
        Row(what, f"{theirs:.2f} s, {steps} steps", f"{ours:.4f} s, {solution.steps} steps", theirs / ours, 100.0),
        Row("    error against float64", f"{its:.1e}", f"{mine:.1e}", its / mine, 1.0),
    ]


def stiff_rows(device: str) -> list[Row]:
    """Steps of plain and accelerated majorise–minimise at scale_factor 1e-3, and the energies they end at."""
    rows = []
    for scale in ("task-norm", "gram-norm"):
        for shape in ((8, 192, 192), (5, 128, 48)):
            for seed in (0, 1):
                deltas = task_vectors(*shape, seed=seed).double().to(device)
                settings: dict[str, Any] = {"side": "output", "scale": scale, "scale_factor": 1e-3}
                settings |= {"expert": "cauchy", "rtol": RTOL, "max_steps": 3000}
                plain = solve(deltas, accelerate=False, **settings, **PRIOR)
                fast = solve(deltas, **settings, **PRIOR)
                rise = float((fast.energy[-1] - plain.energy[-1]) / plain.energy[-1])
                what = f"stiff, {shape[0]} experts {shape[1]}×{shape[2]}, {scale} 1e-3, seed {seed}"
                rows.append(
                    Row(what, f"{plain.steps} plain", f"{fast.steps} accelerated", plain.steps / fast.steps, 2.0)
                )
                rows.append(Row("    energy above the plain one's end", "", f"{rise:+.1e}", float(rise <= 1e-9), 1.0))
    return rows


def batch_row(repeats: int) -> list[Row]:
    """On a GPU: 24 equal matrices at once against one after the other."""
    deltas = torch.stack([task_vectors(8, 384, 384, seed=seed) for seed in range(24)]).cuda()
    settings: dict[str, Any] = {
        "expert": "cauchy",
        "side": "output",
        "scale": "gram-norm",
        "scale_factor": 0.1,
        "rtol": RTOL,
    }
    single, _ = timed(lambda: [solve(one, **settings, **PRIOR) for one in deltas], "cuda", repeats)
    together, _ = timed(lambda: solve(deltas, **settings, **PRIOR), "cuda", repeats)
    return [Row("24 matrices 384×384, 8 experts", f"{single:.3f} s", f"{together:.3f} s", single / together, 1.0)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparisons, print the table, return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=2, help="runs of ours, of which the fastest counts (default 2)")
    parser.add_argument("--textbook-steps", type=int, default=TEXTBOOK_STEPS, help="its limit of steps (default 50)")
    parser.add_argument(
        "--only", default="", help="run the comparisons whose name holds this: square tall lora stiff batch"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of a product on a CPU (default 1)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    options = Options(given.device, given.repeats, given.textbook_steps)
    parts: dict[str, Callable[[], list[Row]]] = {
        "square": lambda: dense_rows((768, 768), "output", options, torch.float32, 5.0),
        "square float64": lambda: dense_rows((768, 768), "output", options, torch.float64, None),
        "tall output": lambda: dense_rows((3072, 768), "output", options, torch.float32, 5.0),
        "tall input": lambda: dense_rows((3072, 768), "input", options, torch.float32, 5.0),
        "lora": lambda: lora_rows(options),
        "stiff": lambda: stiff_rows(options.device),
    }
    if options.device != "cpu":
        parts["batch"] = lambda: batch_row(options.repeats)
    print(f"{'':58} {'textbook':>20} {'poemerge':>26} {'ratio':>9}", flush=True)
    held = True
    for row in (row for name, part in parts.items() if given.only in name for row in part()):
        verdict = "" if row.least is None else ("  ok" if row.holds else f"  BELOW {row.least:g}")
        ratio = f"{row.ratio:>9.1f}" if row.ratio else " " * 9
        print(f"{row.what:58} {row.theirs:>20} {row.ours:>26} {ratio}{verdict}", flush=True)
        held &= row.holds
    print("every threshold holds" if held else "a threshold does not hold")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
