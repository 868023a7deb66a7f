"""Single weights of a run: their values from the model's own files, their general importance from the cache, their scores from ranks and edges.

Everything is read lazily, a rectangle at a time, in the (out, in) sense; no model is ever loaded.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dpruner import starter
from dpruner.config import split_domain
from dpruner.errors import InputError
from dpruner.loading import STARTER
from dpruner.store import opened


def model_folder(record: Mapping) -> Path:
    """The folder on this disk that holds the files of the model a run pruned; nothing is downloaded.

    Args:
        record: run.json.

    Raises:
        InputError: the model is neither embedded, nor a folder here, nor in the hub's local cache.
    """
    name, revision = record["config"]["model"], (record.get("model") or {}).get("commit") or record["config"].get("revision")
    if name == STARTER:
        return Path(starter.PATH)
    try:
        if Path(name).is_dir():
            return Path(name)
        from huggingface_hub import snapshot_download   # slow to import, and only hub ids need it
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except Exception as error:   # the hub's library has a dozen ways to say no
        raise InputError("The values of the weights are not shown", f"the model {name!r} is not on this machine",
                         "bring its folder back, or download it as it was used") from error


def read_weights(folder: Path, name: str, shape: tuple[int, ...], rows: slice, columns: slice, transposed: bool = False) -> np.ndarray:
    """A rectangle of one weight from a model's safetensors files.

    Args:
        folder: of the model, as `model_folder` finds it.
        name: full parameter name. Files of a bare decoder leave out its first part, which is allowed for.
        shape: of the whole weight as stored; files that hold another are refused.
        rows, columns: without a step, in the (out, in) sense.
        transposed: the weight is stored as (in, out).

    Returns:
        float32 (rows, columns).

    Raises:
        InputError: no file holds such a weight.
    """
    path, key = _where(folder, name)
    if path is None:
        raise InputError("The values of the weights are not shown", f"no .safetensors file in {str(folder)!r} holds {name}",
                         "use the model folder that the run was made from")
    with opened(path) as file:
        found = tuple(file.get_slice(key).get_shape())
    if found != tuple(shape):
        raise InputError("The values of the weights are not shown", f"{name} has the shape {found} in {str(folder)!r} and {tuple(shape)} in the run",
                         "use the model folder that the run was made from")
    return read_tile(path, key, rows, columns, transposed)


def _where(folder: Path, name: str) -> tuple[Path | None, str]:
    """The file that holds a weight, and what it calls it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = {key: folder / Path(file).name for key, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
        except (ValueError, KeyError, AttributeError, OSError) as error:
            raise InputError(f"The file {index} cannot be read", "it is damaged", "download the model again") from error
    else:
        files = {}
        for path in sorted(folder.glob("*.safetensors")):
            with opened(path) as file:
                files |= dict.fromkeys(file.keys(), path)
    if name in files:
        return files[name], name
    alike = [key for key in files if name.endswith(f".{key}") or key.endswith(f".{name}")]
    return (files[alike[0]], alike[0]) if len(alike) == 1 else (None, name)


def read_tile(path: Path, name: str, rows: slice, columns: slice, transposed: bool = False) -> np.ndarray:
    """A rectangle of a matrix of numbers in a safetensors file, float32 (rows, columns), without reading the rest.

    Raises:
        InputError: the file is missing or damaged, or holds no such matrix.
    """
    first, second = (columns, rows) if transposed else (rows, columns)
    with opened(Path(path)) as file:
        values = file.get_slice(name)[first, second].float()
        return (values.t() if transposed else values).numpy().copy()


def general_file(record: Mapping, cache: Path) -> Path | None:
    """The cached general importance that a run was made with; None where it is not there any more.

    Args:
        record: run.json.
        cache: the folder of caches that `dpruner.run` was given.
    """
    try:
        config = record["config"]
        wanted = {"model": record["model"]["fingerprint"], "calibration": record["calibration"][split_domain(config["general"])[0]],
                  "device": record["device"]["type"], "torch": record["versions"]["torch"], "mode": config["general_mode"],
                  "sparsity": config["general_sparsity"]}
    except (KeyError, TypeError):   # a record without them belongs to no file
        return None
    for path in sorted(Path(cache).glob("general/*.safetensors")):
        try:
            with opened(path) as file:
                if json.loads((file.metadata() or {}).get("key", "null")) == wanted:
                    return path
        except (InputError, ValueError):
            continue   # a damaged one is no one's
    return None


def read_edges(path: Path, name: str) -> np.ndarray:
    """The scores between which the 256 bins of a matrix's ranks lie, float32 (257,).

    Raises:
        InputError: the file is missing or damaged, or holds no such matrix.
    """
    with opened(Path(path)) as file:
        return file.get_tensor(name).numpy().copy()


def score_ranges(ranks: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Between which two scores each weight's score lies, as far as its rank tells.

    Args:
        ranks: uint8 of any shape.
        edges: (257,), as `read_edges` gives them.

    Returns:
        float32 (..., 2): lowest and highest of the weight's bin.
    """
    return np.stack([edges[:-1][ranks], edges[1:][ranks]], axis=-1)
