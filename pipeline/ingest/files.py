"""Landing files: finding them, taking a copy that cannot change, undoing gzip and zip.

Belongs here: everything about a file as bytes. Does not: what stands in it (``pipeline.ingest.readers``).
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import fsspec.core
from fsspec.implementations.local import LocalFileSystem

from common.errors import SignalboxError

if TYPE_CHECKING:
    from pipeline.workflow import Source

MAX_BYTES = 8 << 30
BLOCK = 1 << 20


class FileRefused(SignalboxError, ValueError):
    """A file cannot be read as declared; the message names the file, the place in it and the way out."""


class FileChanged(FileRefused):
    """A file was replaced or written to while it was read."""


@dataclass(frozen=True)
class LandingFile:
    """One file of the landing zone: its name in the manifest, and where it lies."""

    name: str
    path: str
    base: str
    fs: Any


@dataclass(frozen=True)
class Snapshot:
    """A private copy of a file: what it held at one moment, unpacked.

    ``file_id`` is the SHA-256 of the raw bytes, ``size`` their number.
    """

    name: str
    content: Path
    file_id: str
    size: int


def without_secrets(text: str) -> str:
    """A text with its addresses without user, password, query and fragment."""
    return _ADDRESS.sub(lambda found: found[1] + re.split("[?#]", _without_user(found[2]), maxsplit=1)[0], text)


def _without_user(rest: str) -> str:
    """What follows ``://`` without user and password, also where the password was written with a raw / or @."""
    host, slash, path = rest.partition("/")
    if "@" in host:
        return host.rpartition("@")[2] + slash + path
    odd = re.search(r":(?!\d+$)", host) is not None and "@" in path
    return path.partition("@")[2] if odd else rest


# a chained address (zip://*.csv::https://…) is two
_ADDRESS = re.compile(r"(://)((?:(?!::)\S)*)")


def _set_aside(name: str) -> bool:
    """Whether a name is that of a hidden or unfinished file."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return any(p.startswith((".", "__MACOSX")) for p in parts) or name.lower().endswith((".tmp", ".part"))


def _climbs_out(name: str) -> bool:
    flat = name.replace("\\", "/")
    return flat.startswith("/") or bool(re.match(r"[A-Za-z]:", flat)) or ".." in flat.split("/")


def discover(root: str | Path, source: Source, days: Sequence[date] | None = None) -> list[LandingFile]:
    """The files of a source, sorted by name; ``{day}`` in its pattern stands for each of ``days`` (any day when None).

    ``root`` is the workflow's landing folder (or an fsspec URL); hidden and unfinished files are left out.
    Raises FileRefused for a pattern that climbs out of the landing zone.
    """
    pattern, address = source.files, "://" in source.files
    if ".." in pattern.replace("\\", "/").split("/") or (not address and _climbs_out(pattern)):
        raise FileRefused(
            f"files: {without_secrets(pattern)}: climbs out of the landing zone; "
            "name files below it, or an fsspec URL such as s3://bucket/folder/*.csv"
        )
    if address:
        fixed = re.split(r"[*?\[{]", pattern, maxsplit=1)[0].rsplit("/", 1)[0]
        relative = pattern[len(fixed) + 1 :]
    else:
        fixed, relative = str(root), pattern
    fs, base = fsspec.core.url_to_fs(fixed)
    fs.invalidate_cache()
    spans = [day.isoformat() for day in days] if days is not None else ["[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]"]
    found: dict[str, LandingFile] = {}
    for span in spans if "{day}" in relative else [""]:
        wanted = f"{glob.escape(base.rstrip('/'))}/{relative.replace('{day}', span)}"
        for path, info in fs.glob(wanted, detail=True).items():
            below = path[len(base.rstrip("/")) + 1 :]
            if info["type"] == "directory" or (info.get("islink") and os.path.isdir(path)) or _set_aside(below):
                continue
            name = without_secrets(f"{fixed}/{below}") if address else below
            name = name.encode("utf-8", "backslashreplace").decode()
            found[name] = LandingFile(name=name, path=path, base=base, fs=fs)
    return [found[name] for name in sorted(found)]


def _fingerprint(file: LandingFile) -> tuple[Any, ...]:
    """What changes when a file is replaced or written to; also refuses what is no plain file of the landing zone."""
    try:
        file.path.encode()
    except UnicodeEncodeError:
        raise FileRefused(f"{file.name}: its name is not UTF-8; rename it") from None
    if isinstance(file.fs, LocalFileSystem):
        if not Path(os.path.realpath(file.path)).is_relative_to(os.path.realpath(file.base)):
            raise FileRefused(f"{file.name}: leads out of the landing zone through a link; copy the file into it")
        try:
            seen = os.stat(file.path)
        except FileNotFoundError:
            raise FileChanged(f"{file.name}: is gone, or a link to nothing; put the file back") from None
        if not stat.S_ISREG(seen.st_mode):
            raise FileRefused(f"{file.name}: is not a plain file")
        return seen.st_size, seen.st_mtime_ns, seen.st_ino, seen.st_dev
    file.fs.invalidate_cache()
    info = file.fs.info(file.path)
    return tuple(
        str(info.get(k)) for k in ("size", "ETag", "etag", "mtime", "LastModified", "last_modified", "created")
    )


def _copy(file: LandingFile, target: Path, max_bytes: int) -> tuple[str, int]:
    """SHA-256 and number of the bytes copied."""
    digest, size = hashlib.sha256(), 0
    with file.fs.open(file.path, "rb") as incoming, target.open("wb") as kept:
        while block := incoming.read(BLOCK):
            size += len(block)
            if size > max_bytes:
                raise FileRefused(f"{file.name}: is larger than {max_bytes:,} bytes; split it, or raise max_bytes")
            digest.update(block)
            kept.write(block)
    return digest.hexdigest(), size


def _gunzipped(packed: Path, name: str) -> Iterator[bytes]:
    good = 0
    with packed.open("rb") as file:
        stream, data = zlib.decompressobj(wbits=31), file.read(BLOCK)
        while data:
            try:
                block = stream.decompress(data, BLOCK)
            except zlib.error as error:
                raise FileRefused(
                    f"{name}: the gzip is damaged after {good:,} good bytes ({error}); send the file again"
                ) from error
            good += len(block)
            yield block
            data = stream.unconsumed_tail
            if stream.eof:
                # another member, or the zeros with which some programs fill up the last block
                data = stream.unused_data.lstrip(b"\0")
                while not data and (more := file.read(BLOCK)):
                    data = more.lstrip(b"\0")
                stream = zlib.decompressobj(wbits=31) if data else stream
            elif not data:
                data = file.read(BLOCK)
        if not stream.eof:
            raise FileRefused(f"{name}: the gzip is truncated, {good:,} bytes were good; send the file again")


def _unzipped(packed: Path, name: str) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(packed) as archive:
            members = archive.infolist()
            climbing = next((m.orig_filename for m in members if _climbs_out(m.orig_filename)), None)
            if climbing is not None:
                raise FileRefused(f"{name}: the zip's member {climbing!r} climbs out of the archive; pack it anew")
            data = [m for m in members if not m.is_dir() and not _set_aside(m.filename)]
            if len(data) != 1:
                some = ", ".join(m.filename for m in data[:3]) or "none"
                raise FileRefused(
                    f"{name}: a zip must hold one data file, this one holds {len(data)} ({some}); pack each alone"
                )
            if data[0].flag_bits & 1:
                raise FileRefused(f"{name}: the zip's member {data[0].filename!r} is encrypted; send it unencrypted")
            with archive.open(data[0]) as member:
                while block := member.read(BLOCK):
                    yield block
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
        raise FileRefused(f"{name}: the zip is damaged ({error}); send the file again") from error


def _packing(path: Path) -> str:
    """gzip or zip, known by the first bytes; empty for any other file."""
    with path.open("rb") as file:
        magic = file.read(4)
    return "gzip" if magic[:2] == b"\x1f\x8b" else "zip" if magic in (b"PK\x03\x04", b"PK\x05\x06") else ""


def _unpacked(packed: Path, target: Path, name: str, max_bytes: int) -> Path:
    """The content of a gzip or zip; any other file as it is."""
    outer = _packing(packed)
    if not outer:
        return packed
    size = 0
    with target.open("wb") as out:
        for block in _gunzipped(packed, name) if outer == "gzip" else _unzipped(packed, name):
            size += len(block)
            if size > max_bytes:
                raise FileRefused(f"{name}: unpacks to more than {max_bytes:,} bytes; split it, or raise max_bytes")
            out.write(block)
    inner = _packing(target)
    if inner:
        raise FileRefused(f"{name}: is a {inner} within a {outer}; pack the file once")
    return target


def day_of(source: Source, name: str) -> date | None:
    """The day that ``{day}`` stands for in a file's name; None where the pattern has none or the name no real day."""
    if "{day}" not in source.files:
        return None
    pattern = (
        fnmatch.translate(source.files.replace("{day}", "\0"))
        .replace("\\\0", "\0")
        .replace("\0", r"(\d{4}-\d{2}-\d{2})", 1)
    )
    found = re.match(pattern, name) or re.search(r"(\d{4}-\d{2}-\d{2})", name)
    try:
        return date.fromisoformat(found[1]) if found else None
    except ValueError:
        return None  # 2026-02-31 has the form of a day and is none


def _settled_copy(file: LandingFile, target: Path, max_bytes: int) -> tuple[str, int]:
    """SHA-256 and number of the bytes copied, of a file that nobody wrote to meanwhile (after a second try)."""
    for last in (False, True):
        before = _fingerprint(file)
        try:
            digest, size = _copy(file, target, max_bytes)
            same = _fingerprint(file) == before and (not isinstance(before[0], int) or size == before[0])
        except FileNotFoundError:
            same = False
        except OSError as error:
            raise FileRefused(f"{file.name}: cannot be read ({error})") from error
        if same:
            break
        if last:
            raise FileChanged(
                f"{file.name}: was replaced while it was read, twice; write it beside as .part, then rename it"
            )
    return digest, size


def digest(file: LandingFile, *, max_bytes: int = MAX_BYTES) -> tuple[str, int]:
    """SHA-256 and size (bytes) of a file as it lies there. Raises FileRefused as ``snapshot`` does, but for what is inside."""
    return _settled_copy(file, Path(os.devnull), max_bytes)


def snapshot(file: LandingFile, folder: Path, *, max_bytes: int = MAX_BYTES) -> Snapshot:
    """Copy a file into a private folder while hashing it, and unpack it there.

    Raises FileChanged when the file was replaced or written to meanwhile (after a second try), and FileRefused when it
    is empty, damaged, larger than ``max_bytes`` (also when unpacked), or leads out of the landing zone.
    """
    digest, size = _settled_copy(file, folder / "packed", max_bytes)
    if size == 0:
        raise FileRefused(f"{file.name}: empty file (0 bytes); send it again, or a file with a header and no rows")
    content = _unpacked(folder / "packed", folder / "content", file.name, max_bytes)
    return Snapshot(file.name, content, digest, size)
