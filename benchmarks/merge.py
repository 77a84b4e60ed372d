"""Speed and memory of merging: against the floor of reading and writing, mergekit, and the released code's way.

    python benchmarks/merge.py --work /tmp/bench                    # the whole table, about an hour on 2 cores
    python benchmarks/merge.py --work /tmp/bench --only floor,lora  # of floor lora memory both mergekit released gpu

Checkpoints are Llama-shaped and generated under --work (about 1 GB each in float32, 24 layers). Ratios come from runs
that take turns within one process or one loop, so that other work on the machine touches both sides alike: the median
over the rounds of (seconds of one run / seconds of the other in the same round) counts. mergekit is taken from
--mergekit (its own venv: pip install mergekit) and skipped, with a line, without it.
Exit status 0 when every target that was measured holds, 1 when one does not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from poemerge.merging import merge
from poemerge.params import MergeParams

VOCABULARY = 32_000
SECTIONS = ("floor", "lora", "memory", "both", "mergekit", "released", "gpu")
MEMORY = {
    "mean": ("--method", "mean"),
    "ties": ("--method", "ties"),
    "poe (gaussian, output side)": ("--side", "output", "--expert-family", "gaussian"),
}
ROUNDS = 5
DISK = False


@dataclass(frozen=True)
class Size:
    """Depth and width of the generated models; 24 layers of width 896 are 1.05 GB in float32."""

    layers: int
    width: int

    @property
    def feed_forward(self) -> int:
        """Width between the feed-forward layers."""
        return self.width * 19 // 7


def config(size: Size) -> dict[str, Any]:
    """config.json of the generated models."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size.width,
        "intermediate_size": size.feed_forward,
        "num_hidden_layers": size.layers,
        "num_attention_heads": 14,
        "num_key_value_heads": 14,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "rms_norm_eps": 1e-5,
    }


def shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the generated models."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, size.width)}
    hidden, inner = size.width, size.feed_forward
    for i in range(size.layers):
        prefix = f"model.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            found[f"{prefix}self_attn.{name}.weight"] = (hidden, hidden)
        found[f"{prefix}mlp.gate_proj.weight"] = found[f"{prefix}mlp.up_proj.weight"] = (inner, hidden)
        found[f"{prefix}mlp.down_proj.weight"] = (hidden, inner)
        found[f"{prefix}input_layernorm.weight"] = found[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
    return {**found, "model.norm.weight": (hidden,)}


def make_models(work: Path, size: Size, experts: int) -> tuple[Path, dict[str, Path]]:
    """A base and full experts of it; made once and kept."""
    folder = work / f"full-{size.layers}-{size.width}"
    names = ["base", *(f"e{i}" for i in range(experts))]
    generator = torch.Generator().manual_seed(size.layers)
    missing = [name for name in names if not (folder / name / "model.safetensors").is_file()]
    if missing:
        base = {name: torch.empty(shape).normal_(0, 0.02, generator=generator) for name, shape in shapes(size).items()}
        for name in missing:
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / "config.json").write_text(json.dumps(config(size)))
            own = base
            if name != "base":
                generator.manual_seed(names.index(name))
                own = {k: v + torch.empty_like(v).normal_(0, 1e-3, generator=generator) for k, v in base.items()}
            save_file(own, folder / name / "partial", metadata={"format": "pt"})
            (folder / name / "partial").rename(folder / name / "model.safetensors")
    return folder / "base", {name: folder / name for name in names[1:]}


def make_adapters(work: Path, size: Size, count: int, rank: int = 16) -> dict[str, Path]:
    """LoRA adapters of every linear layer, in PEFT's layout."""
    found = {}
    for i in range(count):
        folder = work / f"lora-{size.layers}-{size.width}" / f"a{i}"
        found[folder.name] = folder
        if (folder / "adapter_model.safetensors").is_file():
            continue
        generator = torch.Generator().manual_seed(i)
        tensors = {}
        for name, shape in shapes(size).items():
            if "proj" in name:
                path = f"base_model.model.{name.removesuffix('.weight')}"
                tensors[f"{path}.lora_A.weight"] = torch.empty(rank, shape[1]).normal_(0, 0.03, generator=generator)
                tensors[f"{path}.lora_B.weight"] = torch.empty(shape[0], rank).normal_(0, 0.01, generator=generator)
        folder.mkdir(parents=True)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))
    return found


def floor(base: Path, experts: Mapping[str, Path], out: Path, *, read: bool) -> None:
    """Read the base and every expert once and write one model, with safetensors alone.

    Every tensor is read into memory; without `read` nothing is: one entry of each mapped page is looked at. Nothing is
    added up, and the base's pages are written again.
    """
    for folder in [base, *experts.values()] if read else experts.values():
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - not a mapping
                    handle.get_tensor(name).clone() if read else handle.get_tensor(name).view(-1)[::1024].sum()
    out.mkdir(exist_ok=True)
    save_file(load_file(base / "model.safetensors"), out / "model.safetensors", metadata={"format": "pt"})


Seconds = dict[str, list[tuple[float, float]]]
"""Of each run, round by round: seconds on the clock, and processor seconds of all threads."""


def take_turns(runs: Mapping[str, Callable[[], None]], inputs: Sequence[Path], outputs: Sequence[Path]) -> Seconds:
    """Seconds of each run, round by round, in turns; no run finds any of the `outputs`, its own or another's.

    With --disk a run finds none of the folders `inputs` in memory, and ends when what it wrote is on the disk.
    """
    seconds: Seconds = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            for out in outputs:
                shutil.rmtree(out, ignore_errors=True)
            if DISK:
                settle(inputs, forget=True)
            clock, processor = time.perf_counter(), time.process_time()
            run()
            if DISK:
                settle(outputs)
            seconds[name].append((time.perf_counter() - clock, time.process_time() - processor))
    return seconds


def settle(folders: Sequence[Path], *, forget: bool = False) -> None:
    """Wait until the folders' files are on the disk, and let the system `forget` their pages."""
    for file in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        if forget:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


class Table:
    """Rows as they are measured, and whether the targets hold."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, what: str, figure: float, unit: str, target: float | None, note: str = "") -> None:
        holds = None if target is None else figure <= target
        self.rows.append({"what": what, "figure": figure, "unit": unit, "target": target, "holds": holds, "note": note})
        verdict = "" if target is None else f"  target ≤ {target:g}: {'holds' if holds else 'MISSED'}"
        print(f"{what:<58} {figure:8.2f} {unit:<8}{verdict}  {note}", flush=True)


def compare(
    table: Table, baseline: str, seconds: Seconds, targets: Mapping[str, float | None], but: Sequence[str] = ()
) -> None:
    """Add each run's ratio to the baseline's: the median over the rounds, on the clock and of processor time."""
    floors = seconds[baseline]
    table.add(baseline, statistics.median(clock for clock, _ in floors), "s", None, f"rounds {_rounds(floors)}")
    for name, own in seconds.items():
        if name not in (baseline, *but):
            clock, processor = (
                statistics.median(one[i] / other[i] for one, other in zip(own, floors, strict=True)) for i in (0, 1)
            )
            note = f"processor × {processor:.2f}; rounds {_rounds(own)}"
            table.add(f"{name} / {baseline}", clock, "×", targets.get(name), note)


def _rounds(seconds: list[tuple[float, float]]) -> str:
    return ", ".join(f"{clock:.2f}" for clock, _ in seconds)


READ = "floor: read and written"
TOUCHED = "pages touched and written"


def _floors(base: Path, experts: Mapping[str, Path], out: Path) -> dict[str, Callable[[], None]]:
    """The floor, and beside it how long a reader takes who copies nothing."""
    return {
        READ: lambda: floor(base, experts, out, read=True),
        TOUCHED: lambda: floor(base, experts, out, read=False),
    }


def against_floors(table: Table, seconds: Seconds, targets: Mapping[str, float | None]) -> None:
    """`compare` with the floor, which the targets are of, and with touched pages."""
    compare(table, READ, seconds, targets, but=[TOUCHED])
    compare(table, TOUCHED, seconds, {}, but=[READ])


def run_floor(work: Path, table: Table, size: Size) -> None:
    """mean and task arithmetic of four full experts against the floor."""
    base, experts = make_models(work, size, 4)
    out = work / "out"

    def ours(method: str) -> Callable[[], None]:
        return lambda: void(merge(base, experts, out / method, MergeParams.model_validate({"method": method})))

    runs = _floors(base, experts, work / "floor-out")
    runs |= {method: ours(method) for method in ("mean", "task_arithmetic")}
    outputs = [work / "floor-out", out / "mean", out / "task_arithmetic"]
    seconds = take_turns(runs, [base, *experts.values()], outputs)
    against_floors(table, seconds, {"mean": 1.5, "task_arithmetic": 1.5})


def void(_: object) -> None:
    """Drop a result."""


def run_lora(work: Path, table: Table, size: Size) -> None:
    """PoE of eight adapters against reading the base and writing the result."""
    base, _ = make_models(work, size, 0)
    adapters = make_adapters(work, size, 8)
    runs = _floors(base, {}, work / "floor-out")

    def ours(side: str) -> Callable[[], None]:
        return lambda: void(merge(base, adapters, work / "out" / "lora", MergeParams.model_validate({"side": side})))

    runs |= {f"poe, 8 adapters r=16, side {side}": ours(side) for side in ("both", "output")}
    outputs = [work / "floor-out", work / "out" / "lora"]
    against_floors(
        table, take_turns(runs, [base, *adapters.values()], outputs), {"poe, 8 adapters r=16, side both": 3.0}
    )


MEASURE = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
said = process.stderr.read()
_, status, usage = os.wait4(process.pid, 0)
print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_maxrss, said[-2000:]]))
"""


def peak(command: list[str]) -> tuple[float, float]:
    """(seconds, peak resident GB) of a command, as /usr/bin/time -v counts them; raises when it fails.

    A small process starts it: Linux counts what the one that starts a program held to the program's own peak.
    """
    started = time.perf_counter()
    measured = subprocess.run([sys.executable, "-c", MEASURE, *command], stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - started
    code, kilobytes, said = json.loads(measured.stdout)
    if code:
        raise RuntimeError(f"{' '.join(command[:4])} … ended with {code}: {said}")
    return seconds, kilobytes * 1024 / 1e9


def command(base: Path, experts: Mapping[str, Path], out: Path, *flags: str) -> list[str]:
    """`poemerge merge` as a user types it."""
    given = [text for name, path in experts.items() for text in ("--expert", f"{name}={path}")]
    return [sys.executable, "-m", "poemerge", "merge", "--base", str(base), *given, "--out", str(out), *flags]


def run_memory(work: Path, table: Table, size: Size, runs: Mapping[str, tuple[str, ...]]) -> None:
    """Peak resident memory with the default budget of 4 GB, and how little it depends on the depth."""
    for label, flags in runs.items():
        peaks = []
        for depth in (size.layers, 2 * size.layers):
            base, experts = make_models(work, Size(depth, size.width), 4)
            seconds, resident = peak(command(base, experts, work / "out" / "memory", *flags))
            peaks.append(resident)
            target = 1.5 if depth == size.layers else None
            table.add(f"{label}: peak of 4 full experts, {depth} layers", resident, "GB", target, f"{seconds:.1f} s")
        table.add(f"{label}: peak at {2 * size.layers} layers / at {size.layers}", peaks[1] / peaks[0], "×", 1.1)


def run_mergekit(work: Path, table: Table, size: Size, program: Path) -> None:
    """The same methods on the same files, in turns: seconds and peak memory of ours over mergekit's."""
    if not program.is_file():
        print(f"mergekit is skipped: no {program} (python -m venv VENV; VENV/bin/pip install mergekit)", flush=True)
        return
    base, experts = make_models(work, size, 4)
    for method in ("linear", "task_arithmetic", "ties"):
        parameters: dict[str, Any] = {"weight": 0.25 if method == "linear" else 0.4}
        if method == "ties":
            parameters = {"weight": 1.0, "density": 0.2}
        models = [{"model": str(path), "parameters": parameters} for path in experts.values()]
        recipe: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "float32"}
        if method != "linear":
            recipe["base_model"] = str(base)
        (work / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
        theirs = [str(program), str(work / "recipe.yaml"), str(work / "out" / "mergekit"), "--no-copy-tokenizer"]
        ours = command(base, experts, work / "out" / "ours", "--method", "mean" if method == "linear" else method)
        figures: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
        for _ in range(ROUNDS):
            shutil.rmtree(work / "out" / "mergekit", ignore_errors=True)
            figures["theirs"].append(peak(theirs))
            figures["ours"].append(peak(ours))
        own, other = (min(seconds for seconds, _ in figures[name]) for name in ("ours", "theirs"))
        table.add(
            f"{method}: seconds of ours / of mergekit", own / other, "×", 1.0, f"{own:.1f} s against {other:.1f} s"
        )
        own, other = (statistics.median(gb for _, gb in figures[name]) for name in ("ours", "theirs"))
        table.add(
            f"{method}: peak of ours / of mergekit", own / other, "×", 1.0, f"{own:.2f} GB against {other:.2f} GB"
        )


def released_way(base: Path, experts: Mapping[str, Path], out: Path, eps: float, jitter: float, steps: int) -> None:
    """The released code in its own manner: everything in memory, one layer at a time, every residual recomputed.

    Cauchy, output side, rows in square blocks, stop on an absolute change of 1e-5; what is no matrix is averaged.
    """
    start = load_file(base / "model.safetensors")
    tuned = [load_file(path / "model.safetensors") for path in experts.values()]
    result = {}
    for name, value in start.items():
        deltas = torch.stack([one[name] - value for one in tuned])
        if value.ndim != 2 or "embed" in name:
            result[name] = value + deltas.mean(0)
            continue
        blocks = [_textbook(block, eps, jitter, steps) for block in torch.split(deltas, value.shape[1], dim=1)]
        result[name] = value + torch.cat(blocks)
    out.mkdir(parents=True, exist_ok=True)
    save_file(result, out / "model.safetensors", metadata={"format": "pt"})


def _textbook(deltas: torch.Tensor, eps: float, jitter: float, steps: int) -> torch.Tensor:
    grams = deltas @ deltas.mT
    targets = grams @ deltas
    identity = jitter * torch.eye(deltas.shape[1])
    scales = eps * deltas.square().sum((1, 2))
    theta: torch.Tensor = torch.linalg.solve(grams.sum(0) + identity, targets.sum(0))
    for _ in range(steps):
        residuals = (deltas.mT @ (theta - deltas)).square().sum((1, 2))
        weights = 1 / (scales + residuals)
        new = torch.linalg.solve(
            (weights[:, None, None] * grams).sum(0) + identity, (weights[:, None, None] * targets).sum(0)
        )
        change = (new - theta).norm()
        theta = new
        if change < 1e-5:
            break
    return theta


def run_released(work: Path, table: Table, size: Size) -> None:
    """Two layers of the same shapes, the same settings: whole runs, and the peak of each."""
    base, experts = make_models(work, Size(2, size.width), 4)
    ours = command(base, experts, work / "out" / "released-ours", "--preset", "paper-vit")
    theirs = [sys.executable, __file__, "--work", str(work), "--released-run", "--width", str(size.width)]
    figures: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
    for _ in range(2):
        figures["theirs"].append(peak(theirs))
        figures["ours"].append(peak(ours))
    own, other = (min(seconds for seconds, _ in figures[name]) for name in ("ours", "theirs"))
    table.add(
        "2 layers, poe: seconds of ours / of the released way", own / other, "×", 1.0, f"{own:.1f} s, {other:.1f} s"
    )
    own, other = (figures[name][0][1] for name in ("ours", "theirs"))
    table.add(
        "2 layers, poe: peak of ours / of the released way", own / other, "×", None, f"{own:.2f} GB, {other:.2f} GB"
    )


def run_gpu(table: Table) -> None:
    """Layer shapes of a 7B model, 8 experts, on CUDA: seconds a layer and the share of the product's ceiling."""
    if not torch.cuda.is_available():
        print("the GPU part is skipped: no CUDA device here", flush=True)
        return
    import poemerge

    device = torch.device("cuda")
    a = torch.randn(8192, 8192, device=device)
    a @ a
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(10):
        a @ a
    torch.cuda.synchronize()
    ceiling = 10 * 2 * 8192**3 / (time.perf_counter() - started)
    total = 0.0
    for shape, count in (((4096, 4096), 4), ((11008, 4096), 2), ((4096, 11008), 1)):
        deltas = torch.randn(8, *shape, device=device) * 1e-3
        side = "output" if shape[0] <= shape[1] else "input"
        for _ in range(2):  # the first one warms up
            torch.cuda.synchronize()
            started = time.perf_counter()
            solution = poemerge.solve(deltas, side=side, rtol=1e-5)  # type: ignore[arg-type]
            torch.cuda.synchronize()
            seconds = time.perf_counter() - started
        least = 2.0 * 2 * 8 * shape[0] * shape[1] * min(shape)
        note = f"{solution.steps} steps, {least / seconds / ceiling:.0%} of the product's ceiling"
        table.add(f"{shape[0]}×{shape[1]}, 8 experts, side {side}", seconds, "s", None, note)
        total += count * seconds
        del deltas
    name = torch.cuda.get_device_name()
    table.add("a layer of a 7B model", total, "s", None, f"{name}; 32 layers: {32 * total:.0f} s")


def main() -> int:
    """Measure what was asked for; 0 when every target holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, required=True, help="a folder with about 20 GB free; models are kept in it"
    )
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"some of {','.join(SECTIONS)}")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=896, help="a multiple of 28; 448 makes models of a quarter's size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--disk", action="store_true", help="floor and lora: from the disk and onto it, not from memory"
    )
    parser.add_argument("--mergekit", type=Path, default=Path("mergekit-venv/bin/mergekit-yaml"))
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--released-run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.released_run:
        base, experts = make_models(args.work, Size(2, args.width), 4)
        released_way(base, experts, args.work / "out" / "released", eps=0.3, jitter=1e-3, steps=50)
        return 0
    (args.work / "out").mkdir(parents=True, exist_ok=True)
    table, size = Table(), Size(args.layers, args.width)
    global ROUNDS, DISK
    ROUNDS, DISK = args.rounds, args.disk
    sections: dict[str, Callable[[], None]] = {
        "floor": lambda: run_floor(args.work, table, size),
        "lora": lambda: run_lora(args.work, table, size),
        "memory": lambda: run_memory(args.work, table, size, MEMORY),
        "both": lambda: run_memory(args.work, table, size, {"poe": ()}),
        "mergekit": lambda: run_mergekit(args.work, table, size, args.mergekit),
        "released": lambda: run_released(args.work, table, size),
        "gpu": lambda: run_gpu(table),
    }
    for name in args.only.split(","):
        sections[name]()
    if args.json is not None:
        args.json.write_text(json.dumps(table.rows, indent=1) + "\n")
    return 0 if all(row["holds"] is not False for row in table.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
