"""Text of a domain -> token batches: the built-in corpora, the hub catalogue and the user's own files.

A domain is named by one string: a built-in corpus ("healthcare"), an entry of the hub catalogue ("pubmedqa") or a path. `load_texts` turns
it into documents, `load_calibration` into batches of token ids. `datasets` is imported where it is used: it is slow to import.
"""

import codecs
import difflib
import glob
import gzip
import hashlib
import os
import re
import tempfile
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from dpruner.errors import InputError

CORPORA = Path(__file__).parent / "starter" / "corpora"
SPLITS = ("calibration", "heldout")
HUB_LIMIT = 2000  # documents read from a hub data set when the caller sets no limit: streams such as C4 have no end to wait for
HELDOUT_EVERY = 5
PIECE_WORDS = 300
PLENTY = 8  # tokenise at most this many times the tokens asked for: enough to choose from, without tokenising a whole library
HUB_TIMEOUT = 5.0  # seconds
USUAL_COLUMNS = ("text", "content", "document")
BUILDERS = {".txt": "text", ".md": "text", ".csv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
SUPPORTED = f"{', '.join(BUILDERS)}, and .gz of all but parquet"

_LIBRARY_LOCK = threading.Lock()  # the settings below belong to the whole process: two threads must not save and restore them at once


@dataclass(frozen=True)
class HubDataset:
    """One entry of the hub catalogue.

    Attributes:
        repository: id on the Hugging Face hub; None where no public copy exists.
        config: configuration (subset) name; None for the only one.
        text: how a row becomes text, a template over its columns.
        licence: what the data card says, for the user to judge.
        calibration: hub split that serves as our calibration split.
        heldout: hub split that serves as our held-out split; None: there is one split only, and every fifth document of it is held out.
        revision: commit (or branch) to read; None where no pinned one is known.
        data_files: files to read where the repository has no loadable configuration.
        streaming: read on the fly, without downloading everything first.
        document_start: pattern of the row that opens a document of many rows; None: each row is a document.
        note: what to know, or what to do where there is no public copy.
    """

    repository: str | None
    config: str | None
    text: str
    licence: str
    calibration: str = "train"
    heldout: str | None = None
    revision: str | None = None
    data_files: str | None = None
    streaming: bool = False
    document_start: str | None = None
    note: str = ""


CATALOGUE = {
    "c4": HubDataset(
        "allenai/c4", "en", "{text}", "ODC-BY 1.0, and the terms of Common Crawl", heldout="validation",
        revision="1588ec454efa1a09f29cd18ddd04fe05fc8653a2", streaming=True,
    ),
    "wikitext2": HubDataset(
        "Salesforce/wikitext", "wikitext-2-raw-v1", "{text}", "CC BY-SA 3.0 and GFDL", heldout="test",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3", document_start=r" = [^=]", note="rows are lines; joined to articles",
    ),
    "pubmedqa": HubDataset(
        "qiaojin/PubMedQA", "pqa_unlabeled", "{question} {long_answer}", "MIT; abstracts may be their publishers'",
        revision="9001f2853fb87cab8d220904e0de81ac6973b318", note="the unlabelled part: no item of the labelled benchmark is in it",
    ),
    "mednli": HubDataset(
        None, None, "{sentence1} {sentence2}", "PhysioNet Credentialed Health Data License 1.5.0",
        note="sign its terms at https://physionet.org/content/mednli and give the path of your own jsonl file, with column sentence1",
    ),
    "meqsum": HubDataset("albertvillanova/meqsum", None, "{CHQ}\n{Summary}", "not stated", note="1,000 questions: copy of bigbio/meqsum"),
    "casehold": HubDataset(
        "coastalcph/lex_glue", "case_hold", "{context}", "CC BY 4.0", heldout="test",
        revision="c23fdff1a6bf74e0e1a71cb86f1e781d37da888c", note="the copy in LexGLUE",
    ),
    "billsum": HubDataset("FiscalNote/billsum", None, "{text}", "CC0 1.0", heldout="test"),
    "multilegalpile": HubDataset(
        "joelniklaus/Multi_Legal_Pile", None, "{text}", "CC BY-NC-SA 4.0", revision="refs/convert/parquet", streaming=True,
        data_files="en_all/partial-train/*.parquet", note="English; the hub's own Parquet copy, because the repository is a loading script",
    ),
}


def builtin_domains() -> list[str]:
    """Names of the built-in corpora, sorted: the folders that hold calibration texts."""
    return sorted({path.parent.parent.name for path in CORPORA.glob("*/calibration/*.txt")})


def domain_label(domain: str | Path) -> str:
    """A label of a domain that is safe in file names and never empty.

    Args:
        domain: built-in name, catalogue name or path.

    Returns:
        Built-in and catalogue names as they are; of a path its stem, of letters, digits, "-" and "_". A file that happens to be called like
        a built-in or catalogue domain gets "-file" appended, so that the two can stand side by side in one run.
    """
    name, names = str(domain), _names()
    if name in names:
        return name
    file = os.path.basename(os.path.abspath(os.path.expanduser(name)))  # "." and ".." become folder names
    stem = re.sub(r"(\.(txt|md|csv|jsonl|json|parquet))?(\.gz)?$", "", file, flags=re.IGNORECASE)
    label = re.sub(r"[^A-Za-z0-9_-]+", "-", stem)[:80].strip("-") or "domain"
    return f"{label}-file" if label in names else label


def load_texts(domain: str | Path, split: str = "calibration", column: str | None = None, limit: int | None = None) -> list[str]:
    """The documents of a domain.

    Files of the user come without splits. So that perplexity is never measured on what the scores were computed from, every fifth document
    (index % 5 == 4) is held out and the others calibrate: the same on every call, spread over the file (a file is often sorted by date or
    topic), and disjoint. Documents are the rows of a table or the files of a folder. When there are fewer than five, they are first cut at
    blank lines into pieces of about 300 words, so that a single text can be split too.

    Args:
        domain: built-in name, catalogue name, or path of a file or folder; a built-in or catalogue name goes before a path.
        split: "calibration" or "heldout".
        column: column that holds the text, for tables and hub data sets; others have no columns and ignore it.
        limit: at most this many documents; hub data sets stop at 2,000 when it is None.

    Returns:
        Documents, none of them empty, in a fixed order.

    Raises:
        InputError: for anything in the domain, the split or the column that cannot be used.
    """
    if split not in SPLITS:
        raise InputError(f'split "{split}"', "there is no such split", f"use {' or '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit}", "no document is left", "use 1 or more, or none for all documents")
    name = str(domain)
    if name in builtin_domains():
        texts = _builtin_texts(name, split)
    elif name in CATALOGUE:
        texts = _hub_texts(name, split, column, limit or HUB_LIMIT)
    else:
        texts = _file_texts(_existing_path(name), split, column)
    return texts[:limit]


def load_calibration(
    domain: str | Path, tokenizer, nsamples: int = 64, seqlen: int = 128, seed: int = 0,
    split: str = "calibration", column: str | None = None,
) -> list[Tensor]:
    """Token batches of a domain: same input and seed, same bits.

    Documents are put in an order drawn by `torch.Generator` from the seed, tokenised one by one with the tokenizer's special tokens and an
    eos after each where the tokenizer has one, joined, and cut by `token_windows`. A large corpus is tokenised only until it yields eight
    times the tokens asked for.

    Args:
        domain: as in `load_texts`.
        tokenizer: a transformers tokenizer.
        nsamples, seqlen: number of batches, and tokens in each.
        seed: of the order of documents and of the windows.
        split, column: as in `load_texts`.

    Returns:
        `nsamples` LongTensors of shape (1, seqlen), on the CPU.

    Raises:
        InputError: as `load_texts` and `token_windows`.
    """
    texts = load_texts(domain, split=split, column=column)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    ids = _token_stream((texts[index] for index in order), tokenizer, enough=PLENTY * nsamples * seqlen)
    return token_windows(ids, nsamples, seqlen, seed, name=f'text of domain "{domain_label(domain)}", {split} split')


def token_windows(ids: Tensor, nsamples: int, seqlen: int, seed: int, name: str = "text") -> list[Tensor]:
    """Cuts a stream of tokens into windows.

    With `nsamples * seqlen` tokens or more, the stream is laid out in slots of `seqlen` from a random start and `nsamples` slots are drawn:
    no token is used twice. With fewer, the stream is closed to a ring (documents end in eos, so its seam is one more document border) and
    the windows start evenly spaced around it from a random point: they overlap, and no token is used more than once more than another.

    Args:
        ids: LongTensor (tokens,).
        nsamples, seqlen: number of windows, and tokens in each.
        seed: of the start and of the draw.
        name: what to call the text in an error.

    Returns:
        `nsamples` LongTensors of shape (1, seqlen).

    Raises:
        InputError: `nsamples` or `seqlen` below 1, or fewer than `seqlen` tokens.
    """
    if nsamples < 1 or seqlen < 1:
        raise InputError(f"nsamples {nsamples} and seqlen {seqlen}", "both count something and must be positive", "use 1 or more")
    tokens = ids.numel()
    if tokens < seqlen:
        why = f"text shorter than one sequence ({tokens} tokens, a sequence takes {seqlen})"
        raise InputError(name, why, f"lower seqlen to {tokens} or less, or add text")
    generator = torch.Generator().manual_seed(seed)
    if tokens >= nsamples * seqlen:
        slots = tokens // seqlen
        phase = torch.randint(tokens - slots * seqlen + 1, (), generator=generator)
        starts = phase + seqlen * torch.randperm(slots, generator=generator)[:nsamples]
    else:
        phase = torch.randint(tokens, (), generator=generator)
        starts = phase + torch.arange(nsamples) * tokens // nsamples
    positions = (starts[:, None] + torch.arange(seqlen)) % tokens
    return list(ids[positions].split(1))


def tokens_available(domain: str | Path, tokenizer, split: str = "calibration", column: str | None = None) -> int:
    """Number of tokens a domain holds; `load_calibration` shows min(this, nsamples * seqlen) different ones. Arguments as there."""
    return _token_stream(load_texts(domain, split=split, column=column), tokenizer).numel()


def fingerprint(batches: list[Tensor]) -> str:
    """SHA-256 in hex over shapes and ids of token batches, equal on every machine."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(str(tuple(batch.shape)).encode())
        digest.update(batch.cpu().contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _token_stream(texts: Iterable[str], tokenizer, enough: int | None = None) -> Tensor:
    """Ids of documents joined in the order given, LongTensor (tokens,); stops at the end of the document that brings it to `enough`."""
    ids: list[int] = []
    for text in texts:
        # verbose=False: a document longer than the model's context is no mistake here, it is cut into windows.
        ids += tokenizer(text, verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        if enough is not None and len(ids) >= enough:
            break
    return torch.tensor(ids, dtype=torch.long)


def _names() -> list[str]:
    return [*builtin_domains(), *CATALOGUE]


def _share(documents: Iterable[str], split: str) -> Iterator[str]:
    """The documents of one split where there is only one pile: see `load_texts`."""
    for index, document in enumerate(documents):
        if (index % HELDOUT_EVERY == HELDOUT_EVERY - 1) == (split == "heldout"):
            yield document


def _builtin_texts(name: str, split: str) -> list[str]:
    texts = [path.read_text(encoding="utf-8").strip() for path in sorted((CORPORA / name / split).glob("*.txt"))]
    if not any(texts):
        raise InputError(f'built-in domain "{name}"', f"it has no {split} texts", "reinstall, or use another domain")
    return [text for text in texts if text]


# ---- hub ----


def _hub_texts(name: str, split: str, column: str | None, limit: int) -> list[str]:
    import datasets

    entry = CATALOGUE[name]
    if entry.repository is None:
        raise InputError(f'hub data set "{name}"', f"it has no public copy ({entry.licence})", entry.note)
    hub_split = entry.heldout if split == "heldout" and entry.heldout else entry.calibration
    reachable = True
    try:
        with _impatient_hub() as reachable:
            where = {"revision": entry.revision, "data_files": entry.data_files, "streaming": entry.streaming}
            rows = datasets.load_dataset(entry.repository, entry.config, split=hub_split, **where)
            texts = (_row_text(row, entry.text, column, name) for row in rows)
            texts = _joined(texts, entry.document_start) if entry.document_start else texts
            documents = (text.strip() for text in texts if text.strip())
            return list(islice(documents if entry.heldout else _share(documents, split), limit))
    except InputError:
        raise
    except Exception as error:  # the libraries below raise a dozen unrelated types, some of them private
        raise _hub_error(name, entry, reachable, error) from error


def _row_text(row: Mapping, template: str, column: str | None, name: str) -> str:
    if column and not isinstance(row.get(column, 0), str | None):
        why = f"it holds {type(row[column]).__name__}, not text" if column in row else "there is no such column"
        raise InputError(f'column "{column}" of hub data set "{name}"', why, f"use one of {', '.join(row)}")
    known = {key: "" if value is None else value for key, value in row.items()}
    return known[column] if column else template.format_map(known)


def _joined(texts: Iterable[str], start: str) -> Iterator[str]:
    """Documents of many rows, put together again; a row that matches `start` opens the next one."""
    document = ""
    for text in texts:
        if re.match(start, text):
            yield document
            document = ""
        document += text
    yield document


@contextmanager
def _impatient_hub() -> Iterator[bool]:
    """Makes an unreachable hub fail at once, for the length of a `with`; yields whether it was reached.

    By themselves the libraries try again for minutes. Offline mode is quick, and still finds what was downloaded before.
    """
    import datasets
    import huggingface_hub

    with _LIBRARY_LOCK:
        reachable = _hub_reachable()
        retries = {"STREAMING_OPEN_MAX_RETRIES": 3, "STREAMING_READ_MAX_RETRIES": 3}
        with (
            _settings(huggingface_hub.constants, {"HF_HUB_OFFLINE": not reachable}),
            _settings(datasets.config, {"HF_HUB_OFFLINE": not reachable, **retries}),
        ):
            yield reachable


def _hub_reachable() -> bool:
    """Whether the hub answers at all, asked once with the libraries' own client and thus through the user's proxy."""
    import datasets
    import huggingface_hub

    if huggingface_hub.constants.is_offline_mode() or datasets.config.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception:  # whatever it was, there is no answer
        return False
    return True


@contextmanager
def _settings(owner, values: Mapping) -> Iterator[None]:
    """Sets attributes of a module for the length of a `with`."""
    before = {key: getattr(owner, key) for key in values}
    try:
        vars(owner).update(values)
        yield
    finally:
        vars(owner).update(before)


def _hub_error(name: str, entry: HubDataset, reachable: bool, error: Exception) -> InputError:
    what = f'hub data set "{name}" ({entry.repository})'
    if _is_gated(error):
        page = f"https://huggingface.co/datasets/{entry.repository}"
        return InputError(what, "it is gated and this machine has no access", f"accept its terms at {page} and run `hf auth login`")
    if not reachable or isinstance(error, ConnectionError | TimeoutError):
        return InputError(what, "the hub cannot be reached from here", "check the network, or use a built-in domain or a file of your own")
    return InputError(what, f"it could not be read ({_reason(error)})", "try again later, or use a built-in domain or a file of your own")


def _is_gated(error: BaseException | None) -> bool:
    """Whether access was refused, here or in an error this one came from: `datasets` wraps the one that says so."""
    from huggingface_hub.errors import GatedRepoError

    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, GatedRepoError) or status in (401, 403) or "gated dataset" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


# ---- files of the user ----


def _existing_path(name: str) -> Path:
    path = Path(os.path.expanduser(name))
    try:
        if name.strip() and path.exists():
            return path
    except (OSError, ValueError):  # longer than a path may be, or with a NUL: no path at all
        pass
    if len(path.parts) > 1 or _builder(path):
        raise InputError(f'path "{name}"', "there is no such file or folder", "check the spelling, or give the full path")
    near = difflib.get_close_matches(name.lower(), _names(), n=1, cutoff=0.5)
    why = f"it is neither built in ({', '.join(builtin_domains())}) nor in the hub catalogue ({', '.join(CATALOGUE)}), nor a file here"
    fix = f'did you mean "{near[0]}"? If not, use another of these names or a path' if near else "use one of these names or a path"
    raise InputError(f'domain "{name}"', why, fix)


def _file_texts(path: Path, split: str, column: str | None) -> list[str]:
    documents = [text for raw in _read(path, column) if (text := raw.removeprefix("\ufeff").strip())]
    if not documents:
        raise InputError(f'"{path}"', "it holds no text", "add text, or give another file")
    if len(documents) < HELDOUT_EVERY:
        documents = [piece for document in documents for piece in _pieces(document)]
    texts = list(_share(documents, split))
    if not texts:
        why = f"too little text to hold some out ({len(documents)} pieces, every fifth is held out)"
        raise InputError(f'"{path}"', why, f"add text, to {HELDOUT_EVERY} documents or about {HELDOUT_EVERY * PIECE_WORDS} words at least")
    return texts


def _pieces(text: str) -> list[str]:
    """Cuts a text at blank lines into pieces of about 300 words; a longer paragraph is cut after every 300th word."""
    pieces, words = [""], 0
    for paragraph in re.split(r"\n\s*\n", text):
        for part in re.findall(rf"(?:\S+\s*){{1,{PIECE_WORDS}}}", paragraph):
            count = len(part.split())
            if words and words + count > PIECE_WORDS:
                pieces.append("")
                words = 0
            pieces[-1] += part + "\n\n"
            words += count
    return [piece.strip() for piece in pieces]


def _read(path: Path, column: str | None) -> Iterator[str]:
    """Raw documents of a file or folder: first the text files, each one document, then the rows of each table."""
    files = _usable_files(path)
    for file in files:
        _check_readable(file)
    if texts := [file for file in files if _builder(file) == "text"]:
        yield from _load_files("text", texts, None)
    for file in files:
        if _builder(file) != "text":
            yield from _load_files(_builder(file), [file], column)


def _usable_files(path: Path) -> list[Path]:
    if not path.is_dir():
        if _builder(path) is None:
            raise InputError(f'file "{path}"', "its extension is not supported", f"use one of {SUPPORTED}")
        return [path]
    files = sorted(file for file in path.rglob("*") if _builder(file) and file.is_file() and file.stat().st_size)
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]  # hidden ones are not meant
    if not files:
        raise InputError(f'folder "{path}"', "no file in it can be used", f"put files with text in it, of type {SUPPORTED}")
    return files


def _builder(path: Path) -> str | None:
    """The `datasets` builder that reads a file, by its extension; None where none does."""
    name = path.name.lower()
    builder = BUILDERS.get(Path(name.removesuffix(".gz")).suffix)
    return None if builder == "parquet" and name.endswith(".gz") else builder


def _check_readable(file: Path) -> None:
    """Raises InputError for an empty, unreadable or binary file, before a parser stumbles over it in its own words."""
    if not file.stat().st_size:
        raise InputError(f'file "{file}"', "it is empty", "add text, or give another file")
    if _builder(file) == "parquet":
        return
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with gzip.open(file) if file.name.lower().endswith(".gz") else open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                if b"\0" in block:
                    raise InputError(f'file "{file}"', "it is binary, not text", "give a text file, saved as UTF-8")
                decoder.decode(block)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise InputError(f'file "{file}"', "it is not UTF-8 text", "save it as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f'file "{file}"', f"it cannot be read ({_reason(error)})", "mend the file or its permissions") from error


def _load_files(builder: str, files: list[Path], column: str | None) -> list[str]:
    """Texts of files of one kind, through `datasets`, whose cache is gone afterwards."""
    import datasets

    options = {"sample_by": "document"} if builder == "text" else {}
    paths = [glob.escape(str(file.resolve())) for file in files]  # `datasets` takes paths for patterns
    with tempfile.TemporaryDirectory() as cache, _quiet_datasets():
        try:
            rows = datasets.load_dataset(builder, data_files=paths, split="train", cache_dir=cache, keep_in_memory=True, **options)
        except Exception as error:  # each parser raises its own types
            why = f"it is not a well-formed {builder} file, or has no rows ({_reason(error.__cause__ or error)})"
            raise InputError(f'file "{files[0]}"', why, "mend it, or export it again") from error
        return [text or "" for text in rows[_text_column(rows.features, column, files[0])]]


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """`datasets` without progress bars, log lines and calls home, for the length of a `with`.

    What goes wrong is said once, by the InputError. By itself the library reports each use of a builder to a download counter on the
    internet, even for local files: without a network that costs seconds, and a user's file is nobody's business.
    """
    import datasets

    with _LIBRARY_LOCK, _settings(datasets.config, {"HF_UPDATE_DOWNLOAD_COUNTS": False}):
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
    if column is None:
        usual = [name for wanted in USUAL_COLUMNS for name in texts if name.lower() == wanted]
        if len(texts) == 1 or usual:
            return texts[0] if len(texts) == 1 else usual[0]
        if not texts:
            raise InputError(f'file "{file}"', f"none of its columns ({', '.join(features)}) holds text", "give another file")
        raise InputError(f'file "{file}"', f"several of its columns hold text ({', '.join(texts)})", "say which column to read")
    if column not in features:
        raise InputError(f'column "{column}" of "{file}"', "there is no such column", f"use one of {', '.join(features)}")
    if column not in texts:
        why = f"it holds {getattr(features[column], 'dtype', type(features[column]).__name__)}, not text"
        raise InputError(f'column "{column}" of "{file}"', why, f"use one of {', '.join(texts)}" if texts else "give another file")
    return column


def _reason(error: BaseException) -> str:
    """The first line of another library's error, without the full stop, for the inside of a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160].rstrip(". ")
