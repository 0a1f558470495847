"""Servers that nobody here wrote, from npm, at pinned versions: installed for a test run, started on a free port, stopped by pid.

Belongs here: getting and running them. Does not: what they must be found to do (``tests/delivery/connectors/test_peers.py``). Where node or
npm is missing, or cannot install, a test that wants one is skipped with the reason.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

INSTALL_S, START_S = 240, 30


def installed(folder: Path, package: str) -> Path:
    """Where a package (``name@version``) lies after it was installed below ``folder``. Skips the test where it cannot be."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip(f"{package}: node and npm are not on this machine")
    wanted = ["--no-audit", "--no-fund", "--ignore-scripts", "--no-package-lock", package]
    try:
        done = subprocess.run(
            [npm, "install", "--prefix", str(folder), *wanted], capture_output=True, text=True, timeout=INSTALL_S, check=False
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        pytest.skip(f"{package}: npm did not install it within {INSTALL_S} s")
    if done.returncode:
        pytest.skip(
            f"{package}: npm cannot install it here ({(done.stderr.strip() or 'no reason given').splitlines()[0][:200]})"
        )
    return folder / "node_modules" / package.rsplit("@", 1)[0]


@contextlib.contextmanager
def serving(command: Sequence[str], ready: str, folder: Path) -> Iterator[str]:
    """Run ``node`` with a command in which ``{port}`` is a free port; gives the URL once ``ready`` below it answers."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with (folder / "peer.log").open("wb") as log:
        peer = subprocess.Popen(
            ["node", *(part.format(port=port) for part in command)], cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )  # fmt: skip
        try:
            end = time.monotonic() + START_S
            while not _answers(url + ready):
                if peer.poll() is not None or time.monotonic() > end:
                    pytest.fail(f"the peer did not start: {(folder / 'peer.log').read_text(errors='replace')[-500:]}")
                time.sleep(0.05)
            yield url
        finally:
            peer.terminate()
            try:
                peer.wait(5)
            except subprocess.TimeoutExpired:
                peer.kill()
                peer.wait(5)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def call(method: str, url: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Any:
    """One call as a person's own tool makes it; the answer's JSON."""
    asked = urllib.request.Request(url, method=method, headers={"content-type": "application/json", **(headers or {})})
    with urllib.request.urlopen(asked, None if body is None else json.dumps(body).encode(), timeout=5) as answer:
        return json.load(answer)
