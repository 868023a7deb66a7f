"""Files of the user -> documents: which files are meant, whether they can be read, which column holds the text.

`datasets` is imported where it is used: it is slow to import.
"""

import codecs
import glob
import gzip
import hashlib
import itertools
import json
import os
import re
import tempfile
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dpruner.errors import InputError

BUILDERS = {".txt": "text", ".md": "text", ".csv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
SUPPORTED = f"{', '.join(BUILDERS)}, and .gz of all but parquet"
USUAL_COLUMNS = ("text", "content", "document")
PIECE_WORDS = 300
MODEST = 100_000_000  # bytes that any file may have once it is unpacked
RATIO = 200           # larger ones may have so many times their size on disk: text packs 20 times at the very best

LIBRARY_LOCK = threading.RLock()  # what `settings` sets belongs to the whole process: two threads must not save and restore it at once


def existing(name: str) -> Path | None:
    """The file or folder of that name, None where the name does not even look like a path.

    Raises:
        InputError: it looks like a path, and there is nothing.
    """
    path = Path(name)
    try:
        path = Path(os.path.expanduser(name))
        if name.strip() and path.exists():
            return path
    except (OSError, ValueError):  # longer than a path may be, or with a NUL: no path at all
        pass
    if len(path.parts) > 1 or _builder(path):
        raise InputError(f"The path {name!r} was not found",
                         "there is no file or folder of that name", "check the spelling, or give the full path")
    return None


def documents(path: Path, column: str | None = None) -> list[str]:
    """The documents of a file or folder, none of them blank: first the text files, each one document, then the rows of each table.

    Args:
        path: a file, or a folder that is read with its subfolders, in the order of names, without hidden files.
        column: column that holds the text of the tables.

    Raises:
        InputError: for the first file that cannot be read, or where no text is found.
    """
    files = _usable_files(path)
    for file in files:
        require_readable(file)
    texts = [file for file in files if _builder(file) == "text"]
    found = _load("text", texts, None) if texts else []
    for file in files:
        if _builder(file) != "text":
            found += _load(_builder(file), [file], column)
    found = [text for raw in found if (text := raw.removeprefix("\ufeff").strip())]
    if not found:
        raise InputError(f"No text was found in {str(path)!r}", "all of it is blank", "add text, or give another file")
    return found


def fingerprint(path: Path) -> str:
    """SHA-256 in hex of a file, or over the names and bytes of the files in a folder that `documents` reads.

    Raises:
        InputError: there is no such file, or it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for file in _usable_files(path) if path.is_dir() else [path]:
            with open(file, "rb") as opened:
                content = hashlib.file_digest(opened, "sha256").digest()
            digest.update(file.relative_to(path).as_posix().encode() + b"\0" + content)
    except OSError as error:
        raise _unreadable(path, error.strerror.lower() if error.strerror else reason(error), "make it readable") from error
    return digest.hexdigest()


def pieces(text: str) -> list[str]:
    """Cuts a text at blank lines into pieces of about 300 words; a longer paragraph is cut after every 300th word."""
    found, words = [""], 0
    for paragraph in re.split(r"\n\s*\n", text):
        for part in re.findall(rf"(?:\S+\s*){{1,{PIECE_WORDS}}}", paragraph):
            count = len(part.split())
            if words and words + count > PIECE_WORDS:
                found.append("")
                words = 0
            found[-1] += part + "\n\n"
            words += count
    return [piece.strip() for piece in found]


def reason(error: BaseException) -> str:
    """The first line of another library's error, without the full stop, for the inside of a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160].rstrip(". ")


@contextmanager
def settings(owner, values: Mapping) -> Iterator[None]:
    """Sets attributes of a module for the length of a `with`."""
    with LIBRARY_LOCK:
        before = {key: getattr(owner, key) for key in values}
        try:
            vars(owner).update(values)
            yield
        finally:
            vars(owner).update(before)


def _unreadable(file: Path, why: str, fix: str) -> InputError:
    return InputError(f"The file {str(file)!r} cannot be read", why, fix)


def _usable_files(path: Path) -> list[Path]:
    if not path.is_dir():
        if _builder(path) is None:
            raise _unreadable(path, "its extension is not supported", f"give one of {SUPPORTED}")
        return [path]
    try:
        files = sorted(file for file in path.rglob("*") if _builder(file) and file.is_file() and file.stat().st_size)
    except OSError as error:
        raise InputError(f"The folder {str(path)!r} cannot be read", f"looking through it failed ({reason(error)})", "give a folder of texts") from error
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]  # hidden ones are not meant
    if not files:
        raise InputError(f"The folder {str(path)!r} cannot be read", "no file in it can be used",
                         f"put files with text in it, of type {SUPPORTED}")
    return files


def _builder(path: Path) -> str | None:
    """The `datasets` builder that reads a file, by its extension; None where none does."""
    name = path.name.lower()
    builder = BUILDERS.get(Path(name.removesuffix(".gz")).suffix)
    return None if builder == "parquet" and name.endswith(".gz") else builder


def require_readable(file: Path) -> None:
    """Refuse an empty, unreadable or binary file, broken JSON and what unpacks without end, before a parser stumbles over it in its own words.

    Raises:
        InputError: says what is wrong with it.
    """
    if not file.stat().st_size:
        raise _unreadable(file, "it is empty", "add text, or give another file")
    if _builder(file) == "parquet":
        return _require_modest(file, _parquet_sizes(file))
    decoder, limit = codecs.getincrementaldecoder("utf-8")(), _limit(file)
    try:
        with _opened(file) as stream:
            while block := stream.read(1 << 20):
                limit -= len(block)
                if limit < 0:
                    raise _bomb(file)
                if b"\0" in block:
                    raise _unreadable(file, "it is binary, not text", "give a text file, saved as UTF-8")
                decoder.decode(block)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise _unreadable(file, "it is not UTF-8 text", "save it as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(file, f"opening it failed ({reason(error)})", "mend the file or its permissions") from error
    if _builder(file) == "json":
        for _ in json_rows(file):
            pass


def _limit(file: Path) -> int:
    """Bytes that a file may have once it is unpacked."""
    return max(MODEST, RATIO * file.stat().st_size)


def _bomb(file: Path) -> InputError:
    return _unreadable(file, f"unpacked it is more than {RATIO} times as large as it is on disk, and no text is", "unpack it yourself, or give another file")


def _parquet_sizes(file: Path) -> Iterator[int]:
    """Bytes in a Parquet file: what it says of itself, then what is found in it, a few rows at a time.

    A text that is repeated a million times is stored once; only reading it out needs the memory of a million.

    Raises:
        InputError: it is no Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as reader:
            about = reader.metadata
            yield 8 * about.num_rows * about.num_columns
            groups = [about.row_group(i) for i in range(about.num_row_groups)]
            chunks = [group.column(i).total_uncompressed_size for group in groups for i in range(group.num_columns)]
            yield sum(chunks)
            rows = min(1024, max(1, 10 * MODEST // max([1, *chunks])))   # no value is larger than its chunk
            for batch in reader.iter_batches(batch_size=rows):
                yield sum((c.dictionary_decode() if pa.types.is_dictionary(c.type) else c).nbytes for c in batch.columns)
    except (pa.ArrowException, OSError, ValueError, NotImplementedError) as error:
        raise _unreadable(file, f"it is not a well-formed parquet file ({reason(error)})", "mend it, or export it again") from error


def _require_modest(file: Path, sizes: Iterator[int]) -> None:
    limit = _limit(file)
    for size in sizes:
        limit -= size
        if limit < 0:
            raise _bomb(file)


def _opened(file: Path):
    return gzip.open(file) if file.name.lower().endswith(".gz") else open(file, "rb")


def json_rows(file: Path) -> Iterator[dict | str]:
    """The rows of a JSON file: one in every line, or all in one list.

    Read by Python's own parser: at a null, or at great depth, pyarrow's would end with the whole process.

    Raises:
        InputError: it is no well-formed JSON, or a row of it is neither object nor text.
    """
    values = (v if isinstance(v, list) else [v] for v in _json_values(file))
    for i, row in enumerate(itertools.chain.from_iterable(values), 1):
        if not isinstance(row, dict | str):
            raise _unreadable(file, f"it is not a well-formed json file: its row {i} is {json.dumps(row)[:20]}, not an object",
                              "give an object for each document, with its text in a field")
        yield row


def _json_values(file: Path) -> Iterator:
    """The value of every line, or the one value over many lines."""
    at = 1
    try:
        with _opened(file) as stream:
            lines = ((number, line) for number, line in enumerate(stream, 1) if line.strip())
            at, first = next(lines, (1, b"[]"))
            try:
                value = json.loads(first)
            except ValueError:
                value = json.loads((first + b"".join(stream)).rstrip())
            yield value
            for at, line in lines:
                yield json.loads(line.rstrip())   # what is cut off ends on its own line
    except json.JSONDecodeError as error:   # which counts lines from where it began to read
        raise _no_json(file, f"{error.msg}: line {at + error.lineno - 1} column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise _no_json(file, f"{reason(error)}: line {at}") from error


def _no_json(file: Path, why: str) -> InputError:
    return _unreadable(file, f"it is not a well-formed json file ({why})", "mend it, or export it again")


def rows(file: Path) -> list[dict]:
    """The rows of a table, {column: value}; each document of a text file is a row with the one column "text".

    Raises:
        InputError: it cannot be read.
    """
    _usable_files(file)
    require_readable(file)
    if _builder(file) == "json":
        return [row if isinstance(row, dict) else {"text": row} for row in json_rows(file)]
    with _dataset(_builder(file), [file]) as table:
        return table.to_list()


def _load(builder: str, files: list[Path], column: str | None) -> list[str]:
    """Texts of files of one kind."""
    with _dataset(builder, files) as table:
        return [text or "" for text in table[_text_column(table.features, column, files[0])]]


@contextmanager
def _dataset(builder: str, files: list[Path]) -> Iterator:
    """Files of one kind, through `datasets`, whose cache is gone afterwards."""
    import datasets

    options = {"sample_by": "document"} if builder == "text" else {}
    paths = [glob.escape(str(file.resolve())) for file in files]  # `datasets` takes paths for patterns
    with tempfile.TemporaryDirectory() as cache, _quiet_datasets():
        try:
            table = datasets.load_dataset(builder, data_files=paths, split="train", cache_dir=cache, keep_in_memory=True, **options)
        except Exception as error:  # each parser raises its own types
            said = reason(error.__cause__ or error)
            why = "it has no rows" if "no data" in said else f"it is not a well-formed {builder} file, or has no rows ({said})"
            raise _unreadable(files[0], why, "mend it, or export it again") from error
        yield table


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """`datasets` without progress bars, log lines and calls home, for the length of a `with`.

    What goes wrong is said once, by the InputError. By itself the library reports each use of a builder to a download counter on the
    internet, even for local files: without a network that costs seconds, and a user's file is nobody's business.
    """
    import datasets

    with settings(datasets.config, {"HF_UPDATE_DOWNLOAD_COUNTS": False}):
        bars, level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
        try:
            datasets.disable_progress_bars()
            datasets.logging.set_verbosity(datasets.logging.CRITICAL)
            yield
        finally:
            datasets.logging.set_verbosity(level)
            if bars:
                datasets.enable_progress_bars()


def _text_column(features: Mapping, column: str | None, file: Path) -> str:
    """The column to read: the one named, else the only one of text, else the first with a usual name."""
    # Nested features have no dtype, or one that is no string; "large_string" is what pandas hands over.
    texts = [name for name, feature in features.items() if str(getattr(feature, "dtype", "")).endswith("string")]
    if column in texts:
        return column
    if not texts:
        raise _unreadable(file, f"none of its columns ({', '.join(features)}) holds text", "give another file")
    if column is not None:
        feature = features.get(column)
        why = f"it holds {getattr(feature, 'dtype', type(feature).__name__)}, not text" if column in features else "there is no such column"
        raise InputError(f"The column {column!r} of the file {str(file)!r} cannot be read", why, f"choose one of {', '.join(texts)}")
    usual = [name for wanted in USUAL_COLUMNS for name in texts if name.lower() == wanted]
    if len(texts) > 1 and not usual:
        raise _unreadable(file, f"several of its columns hold text ({', '.join(texts)})", "say which column to read")
    return (usual or texts)[0]
