"""``make bench``: every measurement, one after another; name some to run only those (``python -m benchmarks daily_run``)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ORDER = (
    "daily_run", "landing", "budget_policy", "advertising_world", "priority_policy", "ledger", "verify", "push", "rollback",
    "regression", "drift", "conformal", "students", "training_memory",
)  # fmt: skip


def main() -> int:
    """Run the named benchmarks (all where none is named); the exit code counts those that failed."""
    wanted = sys.argv[1:] or ORDER
    unknown = [name for name in wanted if not Path(__file__).with_name(f"{name}.py").is_file()]
    if unknown:
        print(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(ORDER)}")
        return 2
    failed = []
    for name in wanted:
        print(f"\n== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"\nfailed or short of their target: {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    raise SystemExit(main())
