"""Files that users bring: kept in `uploads/` beside the runs under safe names, checked again here, made into text."""

import contextlib
import gzip
import hashlib
import io
import itertools
import json
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pyarrow.parquet

from dpruner import files, store, worker
from dpruner.errors import InputError

TYPES = [*(t.removeprefix(".") for t in files.BUILDERS), "gz"]
LARGEST = 50_000_000    # bytes; the browser asks the server for the same limit, but a browser can be told anything
UNPACKED = 10           # times that, after unpacking
SEEN = 200              # rows that are looked at to find the columns


def folder(runs: Path) -> Path:
    """Where the files of all users lie."""
    return runs / "uploads"


def save(name: str, content: bytes, runs: Path) -> Path:
    """Keep a file under a name made of safe characters and its content's fingerprint: the same file twice is one file.

    Raises:
        InputError: the type is not supported, or it is empty or too large.
    """
    name = Path(name.replace("\\", "/")).name
    suffixes = re.search(rf"({'|'.join(map(re.escape, files.BUILDERS))})(\.gz)?$", name, flags=re.IGNORECASE)
    if suffixes is None or suffixes[0].lower() == ".parquet.gz":
        raise InputError(f"The file {name!r} cannot be read", "its type is not supported", f"give one of {files.SUPPORTED}")
    if not content:
        raise InputError(f"The file {name!r} cannot be used", "it is empty", "add text, or give another file")
    if len(content) > LARGEST or suffixes[2] and _unpacked(name, content) > UNPACKED * LARGEST:
        raise InputError(f"The file {name!r} is too large", f"it may have {LARGEST // 10**6} MB, and {UNPACKED} times that once unpacked",
                         "give a part of it, or its path on this machine")
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", name[:suffixes.start()])[:60].strip("-") or "text"
    path = folder(runs) / f"{stem}-{hashlib.sha256(content).hexdigest()[:8]}" / f"{stem}{suffixes[0].lower()}"
    if not path.is_file():
        with store.replacing(path) as temporary:
            temporary.write_bytes(content)
    return path


def _unpacked(name: str, content: bytes) -> int:
    """Bytes in a gzip file, counted up to the limit only."""
    found = 0
    try:
        with gzip.open(io.BytesIO(content)) as stream:
            while (block := len(stream.read(2**20))) and found <= UNPACKED * LARGEST:
                found += block
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"The file {name!r} cannot be read", "it is no complete gzip file", "pack it again") from error
    return found


def saved(runs: Path) -> list[Path]:
    """All files that were brought, newest first."""
    found = [p for p in folder(runs).glob("*/*") if p.is_file() and p.parent.name.startswith(p.name.split(".")[0] + "-")]
    return sorted(found, key=lambda p: -p.stat().st_mtime)


def delete(path: Path, runs: Path) -> None:
    """Remove a file that was brought, and what was made of it.

    Raises:
        InputError: a run that has not ended reads it, or it cannot be removed.
    """
    readers = [run.id for run in store.find_runs(runs) if _reads(run, path)]
    if readers:
        raise InputError(f"The file {path.name!r} cannot be deleted", f"the run {readers[0]} reads it", "wait until it has ended, or cancel it")
    try:
        shutil.rmtree(path.parent)
    except FileNotFoundError:   # somebody else deleted it
        pass
    except OSError as error:
        raise InputError(f"The file {path.name!r} could not be deleted", str(error.strerror).lower(), "check its permissions") from error


def _reads(run: store.Run, path: Path) -> bool:
    try:
        return str(path.parent.absolute()) in " ".join(run.config["domains"]) and worker.state(run)["state"] in worker.GOING
    except InputError:   # a damaged folder reads nothing
        return False


@contextlib.contextmanager
def named(runs: Path) -> Iterator[None]:
    """What is wrong with a file is said of its name: where it was put is nothing to its user."""
    try:
        yield
    except InputError as error:
        where = re.compile(rf"{re.escape(str(folder(runs).absolute()))}/[^/]+/")
        raise InputError(*(where.sub("", words) for words in (error.what, error.why, error.fix))) from error


def text_columns(path: Path) -> list[str]:
    """The columns of a table that hold text; none where the file has no columns.

    Raises:
        InputError: the file is no text, or its table cannot be read.
    """
    files.require_readable(path)
    kind = next(s for s in path.suffixes[::-1] if s != ".gz")
    try:
        if kind == ".parquet":
            return [f.name for f in pyarrow.parquet.read_schema(path) if str(f.type).endswith("string")]
        if kind == ".csv":
            table = pd.read_csv(path, nrows=SEEN)
        elif kind in (".jsonl", ".json"):
            table = pd.DataFrame(row if isinstance(row, dict) else {"text": row} for row in itertools.islice(files.json_rows(path), SEEN))
        else:
            return []
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise InputError(f"The file {path.name!r} cannot be read", f"it is not a well-formed {kind[1:]} file ({files.reason(error)})",
                         "mend it, or export it again") from error
    return [str(c) for c in table if table[c].map(lambda v: isinstance(v, str)).any()]


def as_text(path: Path, column: str) -> Path:
    """One column of a table as a file of its own, so that every file can have a column of its own in one run.

    Raises:
        InputError: as `dpruner.files.documents`.
    """
    safe = re.sub(r"[^A-Za-z0-9_-]+", "-", column)[:40]
    made = path.parent / f"{path.name.split('.')[0]}-{safe}-{hashlib.sha256(column.encode()).hexdigest()[:4]}.jsonl"
    if not made.is_file():
        lines = (json.dumps({"text": text}, ensure_ascii=False) for text in files.documents(path, column))
        with store.replacing(made) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return made
