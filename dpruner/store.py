"""Run folders: plain files, each written under a temporary name and renamed, read back lazily (layout in README)."""

import contextlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open

from dpruner import leftovers, memory
from dpruner.errors import InputError
from dpruner.masks import Scores, pack, unpack

STATES = ("queued", "running", "done", "failed", "cancelled")
WAITING = {"state": "queued", "stage": "starting", "about": "", "done": 0, "total": 1, "progress": 0.0, "eta_seconds": None,
           "elapsed_seconds": 0.0, "error": None}   # a status before its run's process has a say
RECORDS = ("run.json", "status.json")   # what a run is; without them it is none
LAST = "metrics.parquet"                # the last file that a run writes
TABLES = ("stats.parquet", "losses.parquet", LAST)
ROW_GROUP = 2**16   # rows of a table that are read, or passed over, together
KINDS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
         torch.int16: "I16", torch.int8: "I8", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL"}   # as safetensors calls them


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; renamed to it when the body ends well, removed when it does not. Readers never see half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{leftovers.mark()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _make_durable(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def clear_leftovers(folder: Path) -> None:
    """Remove temporary files of a process that was killed while it wrote; only for a folder that nobody writes to now."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


def _make_durable(folder: Path) -> None:
    """Names are written to the disk too: after a power cut, what was written first is there first."""
    with contextlib.suppress(OSError):   # not every system knows folders as files
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: Path, data) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict:
    """
    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"The file {path} was not found", "the run folder is incomplete or was deleted", "check the name of the run") from None
    except (ValueError, OSError, RecursionError) as error:
        raise _damaged(path) from error
    if not isinstance(data, dict):
        raise _damaged(path)
    return data


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    with replacing(path) as temporary:
        save_file(tensors, temporary, dict(metadata or {}))


def save_file(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """A safetensors file, in the memory of one tensor, and the same bytes for the same content.

    The library's own writer wants all of them on the host at once, puts the metadata in another order every time, and hides a full disk in its words.
    """
    order = sorted(tensors, key=lambda n: (-tensors[n].element_size(), n))   # so that each begins at a multiple of its elements' size
    header, end = {"__metadata__": dict(sorted(metadata.items()))}, 0
    for name in order:
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": KINDS[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    words = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    words = words.ljust(-(-len(words) // 8) * 8)
    with open(path, "wb") as file:
        file.write(len(words).to_bytes(8, "little") + words)
        for name in order:
            file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def read_tensors(path: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file.

    Raises:
        InputError: the file is missing or damaged.
    """
    with opened(path, device) as file:
        return {n: file.get_tensor(n) for n in file.keys()}


@contextlib.contextmanager
def opened(path: Path, device: str = "cpu"):
    """A safetensors file, read lazily.

    Raises:
        InputError: the file is missing or damaged.
    """
    if not path.is_file():
        raise InputError(f"The file {path} was not found", "this run did not write it, or it was deleted", "check the names of method and domain")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise _damaged(path) from error


def write_table(path: Path, rows: pd.DataFrame) -> None:
    write_tables(path, [rows])


def write_tables(path: Path, tables: Iterable[pd.DataFrame]) -> None:
    """Tables of the same columns below each other in one file, in the memory of one of them; there is at least one."""
    with replacing(path) as temporary, contextlib.ExitStack() as opened:
        writer = None
        for table in (pa.Table.from_pandas(rows, preserve_index=False) for rows in tables):
            writer = writer or opened.enter_context(pq.ParquetWriter(temporary, table.schema))
            writer.write_table(table, ROW_GROUP)


def read_table(path: Path, filters: list[tuple] | None = None) -> pd.DataFrame:
    """
    Args:
        filters: (column, operator, value) that every row has to meet; the others are passed over.

    Raises:
        InputError: the file is missing or damaged.
    """
    if not path.is_file():
        raise InputError(f"The file {path} was not found", "this run did not write it, or it was deleted", "resume the run, which makes anew what is missing")
    try:
        return pd.read_parquet(path, filters=filters)
    except Exception as error:   # what a file says of itself to pandas may be anything, and fails in as many ways
        raise _damaged(path) from error


def whole(path: Path) -> bool:
    """Whether a file of tensors is there and as long as its header says, or a table is there with its footer, which is written last."""
    try:
        if path.suffix == ".parquet":
            pq.read_metadata(path)
            return True
        with opened(path):
            return True
    except (InputError, pa.ArrowException, OSError):
        return False


def _damaged(path: Path) -> InputError:
    return InputError(f"The file {path} cannot be read", "it is damaged or of another format", "delete its folder and run again" if path.name in RECORDS
                      else "resume its run, which makes anew what is damaged")


def write_masks(path: Path, masks: Mapping[str, torch.Tensor]) -> None:
    """Masks as bits (numpy.packbits along the last axis, little-endian), their shapes in the metadata."""
    shapes = {n: list(m.shape) for n, m in masks.items()}
    write_tensors(path, {n: pack(m) for n, m in masks.items()}, {"shapes": json.dumps(shapes), "packing": "numpy.packbits axis=-1 little"})


def read_masks(path: Path) -> dict[str, torch.Tensor]:
    """{name: BoolTensor} of a mask file.

    Raises:
        InputError: the file is missing, damaged, or no mask file.
    """
    masks = LazyMasks(path)
    return {n: memory.kept(masks[n]) for n in masks}


class LazyMasks(Mapping):
    """The masks of a mask file, {name: BoolTensor}, each read when it is asked for: two models' masks can be compared in the memory of two matrices."""

    def __init__(self, path: Path):
        with opened(path) as file:
            try:
                self.path, self.shapes = path, json.loads((file.metadata() or {})["shapes"])
                packed = {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}
                # what the metadata says is believed only where the bytes are there: otherwise it decides how much memory is taken
                honest = packed == {n: (*shape[:-1], -(-shape[-1] // 8)) for n, shape in self.shapes.items()}
            except (KeyError, ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
                raise _damaged(path) from error
        if not honest:
            raise _damaged(path)

    def __getitem__(self, name: str) -> torch.Tensor:
        with opened(self.path) as file:
            return unpack(file.get_tensor(name), self.shapes[name])

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self):
        return len(self.shapes)


def write_scores(path: Path, scores: Scores, metadata: Mapping[str, str] | None = None) -> None:
    """Scores with the names of those stored as (in, out)."""
    write_tensors(path, scores, {"transposed": json.dumps(sorted(scores.transposed)), **(metadata or {})})


def read_scores(path: Path) -> Scores:
    """
    Raises:
        InputError: the file is missing, damaged, or holds no scores.
    """
    with opened(path) as file:
        try:
            return Scores({n: file.get_tensor(n) for n in file.keys()}, json.loads((file.metadata() or {})["transposed"]))
        except (KeyError, ValueError) as error:
            raise _damaged(path) from error


class Run:
    """A run folder: `run.json`, `status.json`, `masks/`, `ranks/`, `weights/`, `stats.parquet`, `metrics.parquet`.

    Args:
        folder: of an existing run.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def __repr__(self):
        return f"Run({str(self.folder)!r})"

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def record(self) -> dict:
        """run.json: config, versions, seeds, fingerprints.

        Raises:
            InputError: the file is missing or damaged.
        """
        path = self.folder / "run.json"
        found = read_json(path)
        if not (isinstance(found.get("config"), dict) and isinstance(found.get("model", {}), dict)):
            raise _damaged(path)
        return found

    @property
    def config(self) -> dict:
        """The settings, as `RunConfig(**run.config)` takes them."""
        return self.record["config"]

    @property
    def status(self) -> dict:
        """status.json: its state is one of STATES. A run of which there is no more than run.json is about to begin, or was when it died.

        Raises:
            InputError: the file is damaged, or there is no run.
        """
        path = self.folder / "status.json"
        with contextlib.suppress(OSError):
            if not path.is_file():
                return {**WAITING, "pid": None, "born": (self.folder / "run.json").stat().st_mtime}
        found = read_json(path)
        if found.get("state") not in STATES:
            raise _damaged(path)
        return found

    def path(self, kind: str, method: str, domain: str) -> Path:
        """Where masks, ranks, edges or weights of a method and domain (by its label) lie.

        Raises:
            InputError: a name that no method or domain can have, such as one that leads out of the run folder.
        """
        for name in (method, domain):
            if not re.fullmatch(r"[A-Za-z0-9_~-]+", name):
                raise InputError(f"The run {self.id} holds nothing of {name!r}", "names of methods and domains are made of letters, digits, - and _",
                                 "check the names of method and domain")
        return self.folder / kind / f"{method}@{domain}.safetensors"

    def pairs(self) -> list[tuple[str, str]]:
        """(method, domain) of every mask in the run; those of half a domain's text ("legal~1") are not among them."""
        found = [tuple(p.stem.split("@", 1)) for p in sorted((self.folder / "masks").glob("*@*.safetensors"))]
        return [(method, domain) for method, domain in found if "~" not in domain]

    def masks(self, method: str, domain: str) -> dict[str, torch.Tensor]:
        """{name: BoolTensor, True = kept}."""
        return read_masks(self.path("masks", method, domain))

    def ranks(self, method: str, domain: str) -> dict[str, torch.Tensor]:
        """{name: uint8 bins of the rank in its matrix}; not there for methods whose score exists only inside a walk."""
        return read_tensors(self.path("ranks", method, domain))

    def weights(self, method: str, domain: str) -> dict[str, torch.Tensor] | None:
        """Compensated weights {name: Tensor}, None where the method leaves the kept weights alone."""
        path = self.path("weights", method, domain)
        return read_tensors(path) if path.is_file() else None

    def require_own_files(self) -> None:
        """Refuse to write into a folder of links: what they point to is not this run's.

        Raises:
            InputError: names the first link.
        """
        for path in sorted(self.folder.rglob("*")):
            if path.is_symlink():
                raise InputError(f"The run {self.id} cannot be written to", f"its file {str(path.relative_to(self.folder))!r} is a link that leads out of the run folder",
                                 "put the file itself in its place")

    def stats(self) -> pd.DataFrame:
        """One row per method, domain and matrix, row, column or head."""
        return read_table(self.folder / "stats.parquet")

    def losses(self) -> pd.DataFrame:
        """One row per window of held-out text and model: method, domain ("" of the dense model), text, window, loss in nats, tokens."""
        return read_table(self.folder / "losses.parquet")

    def metrics(self) -> pd.DataFrame:
        """One row per figure: method, domain, text, metric, value, low, high, n."""
        return read_table(self.folder / "metrics.parquet")


def new_run(root: str | Path, name: str, settings: Mapping | None = None) -> Run:
    """A run folder with a fresh id: time, then what it is about.

    Args:
        root: folder of the run folders.
        name: what it is about.
        settings: put into run.json before anything else is there, so that whatever becomes of the run it is listed and can go on.

    Raises:
        InputError: no folder can be made there; then there is none.
    """
    safe = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:60]
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
        folder = Path(root) / f"{stamp}-{safe}{suffix}"
        try:
            folder.mkdir(parents=True)
            if settings is not None:
                write_json(folder / "run.json", {"config": settings, "created": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
            return Run(folder)
        except FileExistsError:
            continue
        except OSError as error:
            with contextlib.suppress(OSError):
                folder.rmdir()   # it holds nothing yet
            raise InputError(f"No run folder can be made in {str(root)!r}", str(error.strerror).lower(), "name another folder for the runs") from error
    raise InputError(f"No run folder could be made in {root}", "a thousand runs started in this second", "try again")


def find_runs(root: str | Path) -> list[Run]:
    """The runs below a folder, newest first."""
    return [Run(p.parent) for p in sorted(Path(root).glob("*/run.json"), reverse=True)]


def open_run(name: str | Path, root: str | Path = "runs") -> Run:
    """A run by its folder, its id, or the start of its id; "last" is the newest.

    Raises:
        InputError: there is no such run, or several.
    """
    with contextlib.suppress(OSError):   # a name longer than the file system allows
        if (Path(name) / "run.json").is_file():
            return Run(name)
    runs = find_runs(root)
    found = runs[:1] if str(name) == "last" else [r for r in runs if r.id == str(name)] or [r for r in runs if r.id.startswith(str(name))]
    if len(found) != 1:
        known = ", ".join(r.id for r in runs[:5]) or "none yet"
        raise InputError(f"The run {str(name)!r} was not found" if not found else f"The run {str(name)!r} is not unique",
                         f"the folder {root} holds {known}", "give one of these ids, a run folder, or 'last'")
    return found[0]
