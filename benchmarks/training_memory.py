"""Measures what training needs beside the rows: from an Arrow table as it is, against from a matrix made of it.

Belongs here: the rows, one process a way, the table. Does not: anything that the product imports.

Run: ``python -m benchmarks.training_memory [--rows 1000000] [--columns 50]``. Asked: no second copy of the rows, the same Booster.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pyarrow as pa


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def child(way: str, n: int, columns: int) -> dict[str, float | str]:
    from models import booster

    rng = np.random.default_rng(1)
    table = pa.table({f"c{i}": rng.standard_normal(n) for i in range(columns - 2)})
    for name in ("k", "l"):
        table = table.append_column(
            name, pa.array(rng.integers(0, 30, n).astype(str)).dictionary_encode().cast(pa.string())
        )
    y = (table["c0"].to_numpy() > 0).astype(float)
    encoding = booster.Encoding.learn(table, table.column_names[:-2], ["k", "l"])
    params = {"objective": "binary", "num_leaves": 31}
    how: dict[str, Any] = {
        "encoding": encoding,
        "params": params,
        "rounds": 5,
        "seed": 1,
        "device": "cpu",
        "threads": 2,
    }
    small = table.slice(0, 1000)
    booster.train(encoding.matrix(small), y[:1000], **how)  # what LightGBM itself needs, once
    before, begun = _peak(), time.perf_counter()
    model = booster.train(encoding.arrow(table) if way == "arrow" else encoding.matrix(table), y, **how)
    seconds = time.perf_counter() - begun
    return {
        "rows_mb": table.nbytes / 2**20, "before_mb": before, "more_mb": _peak() - before, "seconds": seconds,
        "digest": booster.digest(booster.booster_bytes(model))[:12],
    }  # fmt: skip


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--rows", type=int, default=1_000_000)
    ask.add_argument("--columns", type=int, default=50)
    ask.add_argument("--child", help=argparse.SUPPRESS)
    said = ask.parse_args()
    if said.child:
        print(json.dumps(child(said.child, said.rows, said.columns)))
        return
    found = {}
    for way in ("matrix", "arrow"):
        command = [sys.executable, "-m", "benchmarks.training_memory", "--child", way]
        command += [f"--rows={said.rows}", f"--columns={said.columns}"]
        found[way] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"{said.rows:,} rows x {said.columns} columns, {found['arrow']['rows_mb']:,.0f} MB in Arrow\n")
    print("| trained from | memory beyond the rows | seconds | Booster |\n|---|---|---|---|")
    for way, one in found.items():
        print(f"| {way} | {one['more_mb']:,.0f} MB | {one['seconds']:.1f} | {one['digest']} |")
    assert found["matrix"]["digest"] == found["arrow"]["digest"], "the Boosters differ"
    saved = found["matrix"]["more_mb"] - found["arrow"]["more_mb"]
    assert saved > 0.8 * said.rows * said.columns * 8 / 2**20, f"only {saved:.0f} MB saved: there is a second copy"


if __name__ == "__main__":
    main()
