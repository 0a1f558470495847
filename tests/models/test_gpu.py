"""Training on ``gpu`` (OpenCL) with LightGBM's own wheel, on PoCL: a driver that runs OpenCL on the CPU.

One child process, since the loader reads its driver from the environment once. It takes 20 s: nearly all of it PoCL compiling
LightGBM's kernels, which no test may share through a cache in somebody's home.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import pytest

CHILD = """
import json, logging, sys
import numpy as np
import pyarrow as pa
from models import booster
logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
said = {}
for device in ("auto", "gpu", "cuda"):
    try:
        said[device] = booster.resolve_device(device)
    except booster.DeviceMissing as missing:
        said[device] = str(missing)
rng = np.random.default_rng(0)
n = 4000
table = pa.table({"a": rng.integers(0, 14, n), "b": rng.integers(0, 14, n), "k": [f"k{i}" for i in rng.integers(0, 8, n)]})
y = (table["a"].to_numpy() + 3 * (table["k"].to_numpy() == "k1") + rng.normal(size=n) > 7).astype(float)
encoding = booster.Encoding.learn(table, ["a", "b"], ["k"])
x, half = encoding.matrix(table), n // 2
def train(device, seed):
    params = {"objective": "binary", "bagging_fraction": 0.7, "bagging_freq": 1, "num_leaves": 7}
    model = booster.train(x[:half], y[:half], encoding=encoding, params=params, rounds=15, seed=seed, device=device)
    p = booster.predict(model, x[half:])
    loss = -np.mean(np.where(y[half:] > 0, np.log(p), np.log1p(-p)))
    return {"loss": loss, "digest": booster.digest(booster.booster_bytes(model)), "text": model.model_to_string()}
if said["gpu"] == "gpu":
    said["runs"] = {name: train(device, seed) for name, device, seed in (
        ("gpu", "gpu", 1), ("again", "gpu", 1), ("other", "gpu", 2), ("cpu", "cpu", 1), ("cpu other", "cpu", 2))}
print(json.dumps(said))
"""


def pocl() -> Path:
    """PoCL's library in its wheel."""
    try:
        found = [f for f in files("pocl-binary-distribution") or [] if "libpocl" in f.name and ".so" in f.name]
    except PackageNotFoundError:
        found = []
    if not found:
        if (sys.platform, platform.machine()) != ("linux", "x86_64"):
            pytest.skip(f"PoCL has no wheel for {sys.platform} on {platform.machine()}")
        pytest.fail("pocl-binary-distribution is not installed: it is in the group dev")
    return Path(str(found[0].locate())).resolve()


def child(folder: Path, **environment: str) -> tuple[dict[str, Any], str]:
    # HOME too: LightGBM (Boost.Compute) keeps compiled kernels there
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OCL_", "POCL_", "OPENCL_"))}
    given = {**kept, "HOME": str(folder), "POCL_CACHE_DIR": str(folder / "pocl"), "OCL_ICD_VENDORS": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", CHILD], env={**given, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture(scope="module")
def on_pocl(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    return child(tmp_path_factory.mktemp("opencl"), OCL_ICD_FILENAMES=str(pocl()))


def test_the_wheel_trains_on_opencl_and_auto_takes_it_and_says_so(on_pocl: tuple[dict[str, Any], str]) -> None:
    said, log = on_pocl
    assert said["gpu"] == "gpu" and said["auto"] == "gpu"
    assert "device auto: training on gpu" in log
    assert "device_type: gpu" in said["runs"]["gpu"]["text"] and "gpu_use_dp: 1" in said["runs"]["gpu"]["text"]


def test_opencl_learns_what_the_cpu_learns(on_pocl: tuple[dict[str, Any], str]) -> None:
    runs = on_pocl[0]["runs"]
    noise = abs(runs["cpu"]["loss"] - runs["cpu other"]["loss"])
    print({name: run["loss"] for name, run in runs.items()})
    assert abs(runs["gpu"]["loss"] - runs["cpu"]["loss"]) <= max(noise, 1e-3)


def test_the_same_seed_gives_the_same_bytes_on_opencl(on_pocl: tuple[dict[str, Any], str]) -> None:
    runs = on_pocl[0]["runs"]
    assert runs["gpu"]["digest"] == runs["again"]["digest"] != runs["other"]["digest"]


def test_cuda_is_not_in_the_wheel_and_is_refused_with_the_way_out(on_pocl: tuple[dict[str, Any], str]) -> None:
    assert "device 'cuda' was asked for" in on_pocl[0]["cuda"] and "USE_CUDA" in on_pocl[0]["cuda"]


def test_without_a_driver_the_device_is_missing_and_auto_takes_the_cpu(tmp_path: Path) -> None:
    said, log = child(tmp_path)
    assert "device 'gpu' was asked for and cannot train here" in said["gpu"] and "OpenCL driver" in said["gpu"]
    assert said["auto"] == "cpu" and "training on cpu" in log
