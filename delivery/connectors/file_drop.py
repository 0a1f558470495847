"""A folder as a downstream system: files of values that another system loads, CSV or Parquet.

Belongs here: reading what the files say, and dropping a file so that it is there whole or not at all. Does not: whether
the other system has loaded it. ACKED here means that the file stands in the folder and, read back, says the value.

``shape: state``: one file holds the value of every entity, and is replaced as a whole.
    The value of an entity is what its row says; its prior value is what it said just before. Other columns, other rows and
    their order stay. Somebody else's change (a person who saves another file in its place) is kept: under a lock the file
    is read, each row compared with what was expected, and the new file *exchanged* with the old one (``renameat2``);
    what came out must have the digest of what was read, otherwise it is put back and the outcome is ``conflict``. So the
    write is conditional, for whoever replaces the file, with the lock or without. (A program that writes into the file in
    place is only seen up to the exchange.) Each version displaced by another batch is kept in ``kept``.
``shape: batches``: each call drops one more file, never changed afterwards.
    The value of an entity is what the newest file that names it says, whoever dropped it, by modification time; a
    ``baseline`` (the other system's own export) counts as a file too. Prior value: what the newest file said before ours.
    The other system may take files away: a copy of each stays in ``kept``. A person's change is a file of theirs; one that
    lands between our read and our drop cannot be prevented, and is found in ``history``.
Rolling back drops a file, or a state, with the prior values; a file that was loaded is not unloaded by deleting it.
The same writes always make the same bytes. Files appear by write, fsync, rename, fsync of the folder.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from delivery.connectors import atomic_files
from delivery.connectors.base import (
    Capabilities,
    Change,
    Misconfigured,
    Reading,
    Unavailable,
    Write,
    Writes,
    Written,
    meaning,
)
from delivery.connectors.table_files import csv_of, fits, parquet_of, rows_of
from delivery.connectors.value_codec import Cells

Carried = Literal["before", "batch_id", "decision_id", "run_id", "idempotency_key"]


class FileDropSettings(Cells):
    """``kind: file_drop`` in a workflow's ``delivery`` section."""

    kind: Literal["file_drop"]
    path: str = Field(
        description="The folder that files are dropped in (batches), or the one file (state); below the workflow's folder, or absolute"
    )
    shape: Literal["batches", "state"] = Field(
        description="batches: one more file a call, never changed afterwards; state: one file with every entity"
    )
    format: Literal["csv", "parquet"] = Field(description="What the files hold")
    key: str = Field(description="Column that names the entity")
    value: str = Field(description="Column that holds the value")
    carry: tuple[Carried, ...] = Field(
        default=("batch_id", "decision_id", "before"),
        description="batches: further columns of a dropped file. run_id makes the bytes differ from run to run",
    )
    delimiter: str = Field(default=",", min_length=1, max_length=1, description="Between the fields of a CSV file")
    baseline: str | None = Field(
        default=None, description="batches: a file in which the other system says its current values, same columns"
    )
    missing_means: int | None = Field(
        default=None, description="The value of an entity that no file names; without: such an entity is missing"
    )
    kept: str | None = Field(
        default=None,
        description="Folder for copies of what was dropped or displaced; by default `.kept` beside the files",
    )
    bulk: int = Field(default=100_000, ge=1, description="Writes a call, and so a dropped file, may hold")
    lock_timeout_s: float = Field(default=10.0, gt=0, description="Longest wait for another process's lock")

    @model_validator(mode="after")
    def _columns(self) -> FileDropSettings:
        columns = [self.key, self.value, *(self.carry if self.shape == "batches" else ())]
        if len(set(columns)) != len(columns):
            raise ValueError(f"two columns have the same name: {columns}")
        if self.baseline is not None and self.shape == "state":
            raise ValueError("a state file is its own baseline; leave baseline out")
        return self


SETTINGS = FileDropSettings


def mapping(settings: FileDropSettings, folder: Path) -> str:
    """What gives a value its meaning (``base.meaning``)."""
    said = settings.model_dump(mode="json", include={"kind", "key", "value", "decimals", "names", "missing_means"})
    return meaning(**said)


def writes(settings: FileDropSettings, folder: Path) -> Writes:
    """Which column of which file or folder."""
    return Writes(f"file_drop:{(folder / settings.path).resolve()}", settings.value)


def writer(settings: FileDropSettings, folder: Path) -> Callable[[int], object]:
    """What stands in the cell of a value."""
    return settings.put


def connect(
    settings: FileDropSettings, *, environ: Mapping[str, str], folder: Path, clock: Callable[[], datetime]
) -> FileDrop:
    """The folder or file that the settings name; ``folder`` is the workflow's. Needs no secret. Misconfigured if absent."""
    return FileDrop(settings, folder=folder, clock=clock)


@dataclass(frozen=True)
class _File:
    """One file of values, parsed."""

    path: Path
    at_ns: int
    digest: str
    cells: Mapping[str, object]
    """What stands in each entity's cell."""


@dataclass(frozen=True)
class _State:
    """The state file as it was read: its bytes' digest, and enough to write it again with other values."""

    digest: str
    columns: tuple[str, ...]
    rows: list[list[Any]]
    table: Any
    """The Arrow table of a Parquet file, for its schema; None for CSV."""
    at: dict[str, int]
    """Where each entity's row is."""
    content: bytes = b""
    at_ns: int = 0
    newline: str = "\n"


class FileDrop:
    """One state file, or one folder of dropped files. See the module for what a value and a change are."""

    def __init__(self, settings: FileDropSettings, *, folder: Path, clock: Callable[[], datetime]) -> None:
        self.mapping = mapping(settings, folder)
        self._settings = settings
        self._clock = clock
        self._path = (folder / settings.path).resolve()
        self._folder = self._path if settings.shape == "batches" else self._path.parent
        if not self._folder.is_dir():
            raise Misconfigured(
                f"there is no folder {self._folder}; make it, so that files are not dropped where nobody looks"
            )
        if settings.shape == "state" and not self._path.exists() and settings.missing_means is None:
            raise Misconfigured(
                f"there is no file {self._path}; put one there with the columns {settings.key!r} and {settings.value!r}, "
                "or say what an entity without a row means (missing_means)"
            )
        self._kept = (folder / settings.kept).resolve() if settings.kept else self._folder / ".kept"
        self._lock_file = self._folder / f".{self._path.name}.lock"
        self._baseline = (folder / settings.baseline).resolve() if settings.baseline else None
        self._parsed: dict[tuple[Any, ...], _File] = {}
        self._parsing = threading.Lock()
        self._wrote: tuple[str, str] | None = None
        """The batch and the digest of the state that we wrote last."""
        self._exchanges = atomic_files.can_exchange(self._folder) if settings.shape == "state" else False
        self.system = f"file_drop:{self._path}:{settings.value}"

    def __repr__(self) -> str:
        return f"FileDrop({self.system})"

    @property
    def capabilities(self) -> Capabilities:
        """A folder of files cannot refuse; a state file can, where the filesystem can exchange two files in one step."""
        return Capabilities(
            conditional_write=self._exchanges,
            bulk_read=self._settings.bulk,
            bulk_write=self._settings.bulk,
            change_history=self._settings.shape == "batches",
        )

    def read(self, keys: Sequence[str]) -> dict[str, Reading]:
        s = self._settings
        try:
            if s.shape == "state":
                state = self._state()
                place = state.columns.index(s.value)
                cells = {key: state.rows[state.at[key]][place] for key in keys if key in state.at}
            else:
                cells = self._newest(set(keys))
        except OSError as error:
            raise self._of_read(error) from None
        return {key: self._reading(key, cells) for key in keys}

    def apply(self, writes: Sequence[Write], *, validate_only: bool = False) -> list[Written]:
        """All writes of the call in one file. An error before the file appears is ``not_applied``, one after it ``unknown``."""
        if validate_only:
            raise Misconfigured(f"{self.system}: a folder cannot check a write without making it")
        answers: dict[int, Written] = {}
        fit: dict[int, object] = {}
        seen: set[str] = set()
        for i, write in enumerate(writes):
            try:
                if write.key in seen:
                    raise ValueError("the same entity twice in one file")
                _check_text(write.key)
                fit[i] = self._settings.put(write.value)
                seen.add(write.key)
            except ValueError as error:
                answers[i] = Written(write.key, "refused", str(error))
        placed = False

        def appears() -> None:
            nonlocal placed
            placed = True

        try:
            with self._locked():
                self._tidy()
                if self._settings.shape == "state":
                    answers |= self._replace_state(writes, fit, appears)
                else:
                    answers |= self._drop(writes, fit, appears)
        except Unavailable as error:
            answers |= {i: Written(writes[i].key, "not_applied", str(error)) for i in fit}
        except OSError as error:
            says = atomic_files.reason(error)
            if not placed and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise Misconfigured(f"{self.system}: {says}; this user must be able to write there") from None
            answers |= {i: Written(writes[i].key, "unknown" if placed else "not_applied", says) for i in fit}
        return [answers[i] for i in range(len(writes))]

    def history(self, keys: Sequence[str], since: datetime) -> list[Change]:
        """Files of the folder (not of ``shape: state``) that gave an entity another value than the file before."""
        if self._settings.shape == "state":
            return []
        before: dict[str, int | None] = {}
        said: list[tuple[_File, str, int | None]] = []
        wanted = set(keys)
        try:
            for file in self._files():
                values = {key: self._settings.take(file.cells[key])[0] for key in wanted & file.cells.keys()}
                if atomic_files.moment(file.at_ns) >= since:
                    said += [(file, key, value) for key, value in values.items()]
                else:
                    before = values | before
                    if len(before) == len(wanted):
                        break
        except OSError as error:
            raise self._of_read(error) from None
        found = []
        for file, key, value in reversed(said):
            if key not in before or before[key] != value:
                ours = self._is_ours(file)
                actor = "signalbox" if ours else "baseline" if file.path == self._baseline else "somebody"
                found.append(Change(key, value, atomic_files.moment(file.at_ns), actor, ours))
            before[key] = value
        return found

    def close(self) -> None:
        self._parsed.clear()

    def _of_read(self, error: OSError) -> Unavailable | Misconfigured:
        if error.errno in (errno.EACCES, errno.EPERM):
            return Misconfigured(f"{self.system}: {atomic_files.reason(error)}; this user must be able to read it")
        return Unavailable(f"{self.system}: {atomic_files.reason(error)}")

    # -- what the files say

    def _reading(self, key: str, cells: Mapping[str, object]) -> Reading:
        if key in cells:
            value, says = self._settings.take(cells[key])
            return Reading(key, key, value, says=says)
        if self._settings.missing_means is not None:
            return Reading(key, key, self._settings.missing_means, says="no file names it")
        return Reading(key, key, None, state="missing", says="no file names it")

    def _newest(self, keys: set[str]) -> dict[str, object]:
        found: dict[str, object] = {}
        for file in self._files():
            for key in (keys - found.keys()) & file.cells.keys():
                found[key] = file.cells[key]
            if len(found) == len(keys):
                break
        return found

    def _files(self) -> Iterator[_File]:
        """Every file, newest first, parsed as it is asked for. A dropped file and its kept copy are one."""
        for at_ns, _, path, about in self._listed():
            file = self._parse(path, about)
            if file is not None:
                yield replace(file, path=path, at_ns=at_ns)

    def _listed(self) -> list[tuple[int, str, Path, os.stat_result]]:
        listed: dict[str, tuple[int, str, Path, os.stat_result]] = {}
        for place in (self._kept, self._folder):
            with suppress(FileNotFoundError), os.scandir(place) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or not entry.name.endswith(f".{self._settings.format}"):
                        continue
                    with suppress(FileNotFoundError):  # taken away while we looked
                        if entry.is_file():
                            about = entry.stat()
                            listed[entry.name] = (about.st_mtime_ns, entry.name, Path(entry.path), about)
        if self._baseline is not None:
            try:
                about = self._baseline.stat()
            except FileNotFoundError:
                raise Misconfigured(f"{self.system}: there is no baseline {self._baseline}") from None
            listed[str(self._baseline)] = (about.st_mtime_ns, "", self._baseline, about)
        return sorted(listed.values(), key=lambda one: one[:2], reverse=True)

    def _parse(self, path: Path, about: os.stat_result) -> _File | None:
        """None where it was taken away in the meantime and no copy is kept."""
        known = (str(path), about.st_ino, about.st_mtime_ns, about.st_size)
        with self._parsing:
            if known in self._parsed:
                return self._parsed[known]
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            copy = self._kept / path.name
            if path == copy or not copy.exists():
                return None
            content = copy.read_bytes()
        columns, rows, _, _ = rows_of(content, path, self._settings.format, self._settings.delimiter)
        key, value = self._columns_of(columns, path)
        cells: dict[str, object] = {}
        for row in rows:
            cells[str(row[key])] = row[value]
        if len(cells) != len(rows):
            raise Misconfigured(f"{path} names an entity twice in {self._settings.key!r}; correct it or take it away")
        file = _File(path, about.st_mtime_ns, atomic_files.digest(content), cells)
        with self._parsing:
            self._parsed[known] = file
        return file

    def _columns_of(self, columns: Sequence[str], path: Path) -> tuple[int, int]:
        for column in (self._settings.key, self._settings.value):
            if list(columns).count(column) != 1:
                raise Misconfigured(f"{path} needs the column {column!r} once; it has {list(columns)}")
        return list(columns).index(self._settings.key), list(columns).index(self._settings.value)

    def _is_ours(self, file: _File) -> bool:
        return file.path.stem.endswith(f"_{file.digest[:16]}")

    # -- one state file

    def _state(self) -> _State:
        s = self._settings
        try:
            with self._path.open("rb") as file:
                content, at_ns = file.read(), os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            if s.missing_means is None:
                raise Misconfigured(f"there is no file {self._path} any more") from None
            return _State("", (s.key, s.value), [], None, {})
        columns, rows, table, newline = rows_of(content, self._path, s.format, s.delimiter)
        key, _ = self._columns_of(columns, self._path)
        at = {str(row[key]): n for n, row in enumerate(rows)}
        if len(at) != len(rows):
            raise Misconfigured(f"{self._path} names an entity twice in {s.key!r}; correct it")
        return _State(atomic_files.digest(content), columns, rows, table, at, content, at_ns, newline)

    def _replace_state(
        self, writes: Sequence[Write], fit: Mapping[int, object], appears: Callable[[], None]
    ) -> dict[int, Written]:
        s = self._settings
        state = self._state()
        key, value = state.columns.index(s.key), state.columns.index(s.value)
        answers: dict[int, Written] = {}
        changed = False
        kind = state.table.schema.field(s.value).type if state.table is not None else None
        for i in sorted(fit, key=lambda i: writes[i].key):
            write = writes[i]
            row = state.at.get(write.key)
            now = s.missing_means if row is None else s.take(state.rows[row][value])[0]
            if row is None and s.missing_means is None:
                answers[i] = Written(write.key, "refused", "the file has no such row")
            elif now == write.value and row is not None:
                answers[i] = Written(write.key, "accepted", "the file says it already")
            elif now != write.expected:
                answers[i] = Written(write.key, "conflict", f"the file says {now}")
            elif kind is not None and not fits(fit[i], kind):
                answers[i] = Written(write.key, "refused", f"the column {s.value!r} is {kind} and cannot hold {fit[i]}")
            else:
                if row is None:
                    state.rows.append([None if state.table is not None else ""] * len(state.columns))
                    state.rows[-1][key] = write.key
                state.rows[-1 if row is None else row][value] = fit[i]
                changed = True
        if not changed:
            return answers
        rest = [i for i in fit if i not in answers]
        content = self._encoded(state)
        batch = writes[rest[0]].batch_id
        if state.digest and self._wrote != (batch, state.digest):
            self._keep_state(state.content, state.at_ns)
        new = self._temporary(content, self._folder)
        displaced = self._place(new, state.digest, atomic_files.digest(content), appears)
        if displaced is not None:
            return answers | {i: Written(writes[i].key, "conflict", displaced) for i in rest}
        self._wrote = (batch, atomic_files.digest(content))
        return answers | {i: Written(writes[i].key, "accepted", f"file {self._wrote[1][:16]}") for i in rest}

    def _encoded(self, state: _State) -> bytes:
        if self._settings.format == "csv":
            mark = b"\xef\xbb\xbf" if state.content.startswith(b"\xef\xbb\xbf") else b""
            return mark + csv_of([list(state.columns), *state.rows], self._settings.delimiter, state.newline)
        columns = {name: [row[n] for row in state.rows] for n, name in enumerate(state.columns)}
        return parquet_of(
            columns, state.table.schema if state.table is not None else self._schema(columns), self.system
        )

    def _place(self, new: Path, read: str, written: str, appears: Callable[[], None]) -> str | None:
        """Put the new file in the old one's place if that still has the digest ``read``; else say what is there."""
        if read == "":
            try:
                os.link(new, self._path)  # fails where somebody else made it first
            except FileExistsError:
                new.unlink()
                return "somebody made the file"
            appears()
            new.unlink()
        elif not self._exchanges:
            if atomic_files.digest(self._path.read_bytes()) != read:
                new.unlink()
                return "somebody replaced the file"
            os.replace(new, self._path)
            appears()
        else:
            shutil.copystat(self._path, new)
            os.utime(new)
            atomic_files.exchange(new, self._path)
            appears()
            if atomic_files.digest(new.read_bytes()) != read:
                self._put_back(new, written)
                return "somebody replaced the file while it was being written; theirs stands"
            new.unlink()
        atomic_files.sync(self._folder)
        return None

    def _put_back(self, theirs: Path, standing: str) -> None:
        """Exchange until what comes out is what we had put there: what somebody else put there last stands."""
        while True:
            candidate = atomic_files.digest(theirs.read_bytes())
            atomic_files.exchange(theirs, self._path)
            out = theirs.read_bytes()
            if atomic_files.digest(out) == standing:
                break
            standing = candidate  # replaced once more in the meantime: the newer one goes back in
        theirs.unlink()
        atomic_files.sync(self._folder)

    # -- a folder of files

    def _drop(
        self, writes: Sequence[Write], fit: Mapping[int, object], appears: Callable[[], None]
    ) -> dict[int, Written]:
        s = self._settings
        cells = self._newest({writes[i].key for i in fit})
        answers: dict[int, Written] = {}
        for i in fit:
            now = self._reading(writes[i].key, cells)
            if now.value == writes[i].value and now.key in cells:
                answers[i] = Written(now.key, "accepted", "the newest file says it already")
            elif now.state == "missing":
                answers[i] = Written(now.key, "refused", "no file names it")
            elif now.value != writes[i].expected:
                answers[i] = Written(now.key, "conflict", f"the newest file says {now.value}")
        rest = sorted((i for i in fit if i not in answers), key=lambda i: writes[i].key)
        if not rest:
            return answers
        carried: dict[Carried, Callable[[Write], object]] = {
            "before": lambda w: None if w.expected is None else s.put(w.expected),
            "batch_id": lambda w: w.batch_id,
            "decision_id": lambda w: w.decision_id,
            "run_id": lambda w: w.run_id,
            "idempotency_key": lambda w: w.idempotency_key,
        }
        columns: dict[str, list[Any]] = {s.key: [writes[i].key for i in rest], s.value: [fit[i] for i in rest]}
        columns |= {name: [carried[name](writes[i]) for i in rest] for name in s.carry}
        rows = [list(columns), *zip(*columns.values(), strict=True)]
        content = (
            csv_of(rows, s.delimiter, "\n")
            if s.format == "csv"
            else parquet_of(columns, self._schema(columns), self.system)
        )
        digest = atomic_files.digest(content)
        # Newer than every file there is, also where a clock was set back
        newest = max((at for at, *_ in self._listed()), default=0)
        at_ns = max(atomic_files.ns(self._clock()), newest + 1000)
        batch = re.sub(r"[^A-Za-z0-9.-]+", "-", writes[rest[0]].batch_id)[:80]
        name = f"{atomic_files.moment(at_ns):%Y%m%dT%H%M%S.%f}Z_{batch}_{digest[:16]}.{s.format}"
        new = self._temporary(content, self._folder)
        os.utime(new, ns=(at_ns, at_ns))
        os.rename(new, self._folder / name)
        appears()
        atomic_files.sync(self._folder)
        self._keep(name, content, at_ns)
        return answers | {i: Written(writes[i].key, "accepted", f"file {name}") for i in rest}

    # -- writing

    def _schema(self, columns: Iterable[str]) -> Any:
        """Of a Parquet file that we make ourselves."""
        import pyarrow as pa

        s = self._settings
        number = pa.decimal128(28, s.decimals) if s.decimals else pa.int64()
        kind = pa.string() if s.names is not None else number
        return pa.schema([(name, kind if name in (s.value, "before") else pa.string()) for name in columns])

    def _temporary(self, content: bytes, folder: Path) -> Path:
        path = folder / f".{self._path.name}.{os.getpid()}.{threading.get_ident()}.new"
        try:
            with path.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                path.unlink()
            raise
        return path

    def _keep(self, name: str, content: bytes, at_ns: int) -> None:
        """A copy of a file in ``kept``, whole or not at all."""
        self._kept.mkdir(exist_ok=True)
        place = self._kept / name
        with suppress(FileNotFoundError):
            if place.stat().st_mtime_ns == at_ns:
                return
        new = self._temporary(content, self._kept)
        os.utime(new, ns=(at_ns, at_ns))
        os.rename(new, place)
        atomic_files.sync(self._kept)

    def _keep_state(self, content: bytes, at_ns: int) -> None:
        self._keep(
            f"{atomic_files.moment(at_ns):%Y%m%dT%H%M%S.%f}Z_{atomic_files.digest(content)[:16]}.{self._settings.format}",
            content,
            at_ns,
        )

    def _tidy(self) -> None:
        """What a killed process left is kept, not deleted, and every dropped file gets its copy before it is taken away."""
        for left in self._folder.glob(f".{self._path.name}.*.new"):
            self._kept.mkdir(exist_ok=True)
            os.rename(left, self._kept / f".left{left.name}.{time.time_ns()}")
        if self._settings.shape == "batches":
            for at_ns, name, path, _ in self._listed():
                if path.parent == self._folder:
                    with suppress(FileNotFoundError):  # taken away while we looked
                        self._keep(name, path.read_bytes(), at_ns)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time, over threads and processes; another program may take the same lock with flock(1)."""
        with self._lock_file.open("a") as file:
            until = time.monotonic() + self._settings.lock_timeout_s
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        raise Unavailable(f"{self._lock_file} is locked by another process") from None
                    time.sleep(0.01)
            yield


def _check_text(key: str) -> None:
    try:
        key.encode()
    except UnicodeEncodeError:
        raise ValueError("the entity's name is no valid text") from None
    if "\0" in key:
        raise ValueError("the entity's name holds a NUL character")
