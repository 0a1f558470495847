"""Measures training on CPU, OpenCL and CUDA, whichever are there, on the same rows, and that they learn the same.

Belongs here: the rows, one process a training, the table. Does not: anything that the product imports.

Run: ``python -m benchmarks.gpu_training --rows 1000000,10000000,50000000 --columns 50`` on a machine with a GPU;
``python -m benchmarks.gpu_training --rows 20000 --pocl`` on one without (PoCL: OpenCL on the CPU, which says that it runs and
nothing of how fast a GPU is). LightGBM's wheel has CPU and OpenCL, a build with USE_CUDA has CPU and CUDA: run it once under
each with the same ``--results`` file, and the last prints them all.

A training is one call of ``models.booster.train`` from an Arrow table of 32-bit floats, binning included; a small one before it
pays for compiling kernels. Log losses are of 200,000 other rows, always scored on the CPU; they must agree within two
standard errors of the loss itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

DEVICES = {"cpu": ("cpu", {}), "gpu": ("gpu", {}), "gpu single": ("gpu", {"gpu_use_dp": False}), "cuda": ("cuda", {})}
"""By name: the device, and parameters beyond the project's. ``gpu`` adds in double precision, as the project does."""
JUDGED = 200_000


def rows(n: int, columns: int, seed: int) -> tuple[pa.Table, np.ndarray]:
    """(n, columns) normal floats and a 0/1 target of a few of them; made in pieces, since 50 million rows are 10 GB."""
    rng = np.random.default_rng(seed)
    score = np.zeros(n, dtype=np.float32)
    table = {}
    for i in range(columns):
        column = rng.standard_normal(n, dtype=np.float32)
        if i < 8:
            score += (0.6 - 0.07 * i) * (column if i % 2 else np.abs(column) - 0.8)
        table[f"c{i}"] = pa.array(column)
    return pa.table(table), (score + rng.standard_normal(n, dtype=np.float32) > 0).astype(np.float32)


def train(name: str, n: int, columns: int, rounds: int, leaves: int, threads: int) -> dict[str, Any]:
    """One training in this process."""
    from models import booster

    device, more = DEVICES[name]
    try:
        booster.resolve_device(device)
    except booster.DeviceMissing as missing:
        return {"missing": str(missing)}
    encoding = booster.Encoding(tuple(f"c{i}" for i in range(columns)), {})
    how: dict[str, Any] = {
        "encoding": encoding, "seed": 1, "device": device, "threads": threads,
        "params": {"objective": "binary", "num_leaves": leaves, "learning_rate": 0.1, "min_data_in_leaf": 100, **more},
    }  # fmt: skip
    table, y = rows(min(n, 5000), columns, 3)
    booster.train(encoding.arrow(table), y, rounds=2, **how)
    table, y = rows(n, columns, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.perf_counter()
    model = booster.train(encoding.arrow(table), y, rounds=rounds, **how)
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    del table
    held, truth = rows(JUDGED, columns, 2)
    p = booster.predict(model, encoding.matrix(held), threads=threads)
    loss = -np.log(np.where(truth > 0, p, 1 - p))
    return {
        "seconds": seconds, "loss": float(loss.mean()), "error": float(loss.std() / np.sqrt(len(loss))),
        "megabytes": (peak - before) / 1024, "digest": booster.digest(booster.booster_bytes(model))[:12],
    }  # fmt: skip


def machine() -> str:
    """The processor, its cores, and the GPU as its driver names it."""
    said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout if _there("nvidia-smi") else ""
    name = next((x.split(":")[1] for x in _lines("/proc/cpuinfo") if x.startswith("model name")), platform.processor())
    return f"{name.strip()}, {os.cpu_count()} cores; {said.splitlines()[0].split(' (UUID')[0] if said else 'no NVIDIA GPU'}"


def _there(command: str) -> bool:
    return any(Path(folder, command).exists() for folder in os.environ.get("PATH", "").split(os.pathsep))


def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines() if Path(file).exists() else []


def _pocl() -> str:
    found = [f for f in files("pocl-binary-distribution") or [] if "libpocl" in f.name and ".so" in f.name]
    return str(Path(str(found[0].locate())).resolve())


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--rows", default="20000", help="sizes, with commas between")
    ask.add_argument("--columns", type=int, default=50)
    ask.add_argument("--rounds", type=int, default=100)
    ask.add_argument("--leaves", type=int, default=63)
    ask.add_argument("--devices", default=",".join(DEVICES), help="names, with commas between")
    ask.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    ask.add_argument("--pocl", action="store_true", help="run OpenCL on the CPU, with the driver of the group dev")
    ask.add_argument("--results", type=Path, help="a file that figures of several runs are kept in")
    ask.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    said = ask.parse_args()
    if said.child:
        name, n = said.child[0], int(said.child[1])
        print(json.dumps(train(name, n, said.columns, said.rounds, said.leaves, said.threads)))
        return
    environment = {**os.environ, **({"OCL_ICD_FILENAMES": _pocl()} if said.pocl else {})}
    found: dict[str, dict[str, Any]] = {}
    if said.results and said.results.exists():
        found = json.loads(said.results.read_text())
    shape = [f"--{k}={getattr(said, k)}" for k in ("columns", "rounds", "leaves", "threads")]
    sizes = [int(n) for n in said.rows.split(",")]
    for n in sizes:
        for name in said.devices.split(","):
            command = [sys.executable, "-m", "benchmarks.gpu_training", *shape, "--child", name, str(n)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                result: dict[str, Any] = {"missing": (done.stderr.strip().splitlines() or ["killed"])[-1]}
            else:
                result = json.loads(done.stdout.splitlines()[-1])
            key = f"{n} {name}"
            if "missing" not in result or key not in found:
                found[key] = result
            print(f"{n:,} rows, {name}: {result}", file=sys.stderr, flush=True)
            if said.results:
                said.results.write_text(json.dumps(found, indent=1))
    print(
        f"\n{machine()}; {said.columns} columns, {said.rounds} trees × {said.leaves} leaves, {said.threads} threads\n"
    )
    print(
        "| rows | device | training | against CPU | log loss | difference | memory above the rows |\n|---|---|---|---|---|---|---|"
    )
    apart = []
    for n in sizes:
        base = found.get(f"{n} cpu", {})
        for name in DEVICES:
            one = found.get(f"{n} {name}")
            if one is None:
                continue
            if "missing" in one:
                print(f"| {n:,} | {name} | {one['missing'].split(':')[0][:110]} | | | | |")
                continue
            faster, differs = "", ""
            if "seconds" in base:
                faster = f"{base['seconds'] / one['seconds']:.2f}×"
                differs = f"{one['loss'] - base['loss']:+.5f}"
                if abs(one["loss"] - base["loss"]) > 2 * base["error"]:
                    apart.append(f"{n:,} rows: {name} differs from cpu by {differs}, noise is {base['error']:.5f}")
            print(
                f"| {n:,} | {name} | {one['seconds']:.1f} s | {faster} | {one['loss']:.5f} ± {one['error']:.5f} | {differs} "
                f"| {one['megabytes']:,.0f} MB |"
            )
    print(f"\n`python -m benchmarks.gpu_training {' '.join(sys.argv[1:])}`")
    assert not apart, "; ".join(apart)


if __name__ == "__main__":
    main()
