"""A kind of model and a kind of policy that somebody adds: a module each and a line each in the catalog, and a day is lived."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import WorkflowHarness

ROOT = Path(__file__).parents[2]
ADDED = ROOT / "tests" / "support" / "added_kinds"
ROOMS = ("common", "data_checks", "delivery", "models", "pipeline", "assets", "orchestration", "tests", "workflows")


def test_a_module_and_a_line_each_are_all_that_a_new_kind_takes(ads: WorkflowHarness, tmp_path: Path) -> None:
    product = tmp_path / "product"
    for room in ROOMS:
        shutil.copytree(ROOT / room, product / room, ignore=shutil.ignore_patterns("__pycache__", "data"))
    shutil.copy(ADDED / "mean.py", product / "models" / "learners")
    shutil.copy(ADDED / "nudge.py", product / "models" / "policies")
    catalog = product / "models" / "catalog.py"
    text = catalog.read_text().replace('    "response",\n', '    "response",\n    "mean",\n')
    catalog.write_text(text.replace('    "priority",\n', '    "priority",\n    "nudge",\n'))

    folder = product / "workflows" / "ad_budget"
    said = (folder / "workflow.yaml").read_text()
    said = re.sub(r"^model:\n(?: .*\n)+", "model:\n  kind: mean\n", said, flags=re.M)
    said = re.sub(r"^policy:\n(?: .*\n)+", "policy:\n  kind: nudge\n  decide_on: budget_micros > 0\n", said, flags=re.M)
    (folder / "workflow.yaml").write_text(said)

    bench = ads.copy(tmp_path / "bench")
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.added_kinds.lives_a_day", str(folder), str(bench.root), str(bench.last)],
        cwd=product, env=os.environ | {"PYTHONPATH": str(product), "SIGNALBOX_WORKFLOWS": str(folder.parent)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == [], found["wrong"]
    passed, reasons = found["gate"]
    assert passed and "what a nudge would have brought nobody logged" in reasons, reasons
    assert (found["step"], found["shadow"], found["written"]) == ("champion", 0, "1.23")
    assert found["changed"] > 0 and found["performance"] > 0 and found["limits"] == ["policy.step"]
