"""The hub catalogue: data sets known by one word, read through `datasets`, and an unreachable hub that fails at once.

`datasets` and `huggingface_hub` are imported where they are used: they are slow to import.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from dpruner.errors import InputError
from dpruner.files import LIBRARY_LOCK, reason, settings

LIMIT = 2000  # documents read from a data set when the caller sets no limit: streams such as C4 have no end to wait for
TIMEOUT = 5.0  # seconds
HELDOUT_EVERY = 5  # of one pile of documents, every fifth is held out


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
        tasks: (configuration, split) whose rows are the items of a task; None where it has no task.
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
    tasks: tuple[str | None, str] | None = None
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
        revision="9001f2853fb87cab8d220904e0de81ac6973b318", tasks=("pqa_labeled", "train"),
        note="the unlabelled part: no item of the labelled benchmark is in it",
    ),
    "mednli": HubDataset(
        None, None, "{sentence1} {sentence2}", "PhysioNet Credentialed Health Data License 1.5.0", tasks=(None, "test"),
        note="sign its terms at https://physionet.org/content/mednli and give the path of your own jsonl file, with column sentence1",
    ),
    "meqsum": HubDataset(
        "albertvillanova/meqsum", None, "{CHQ}\n{Summary}", "not stated", tasks=(None, "train"), note="1,000 questions: copy of bigbio/meqsum",
    ),
    "casehold": HubDataset(
        "coastalcph/lex_glue", "case_hold", "{context}", "CC BY 4.0", heldout="test",
        revision="c23fdff1a6bf74e0e1a71cb86f1e781d37da888c", tasks=("case_hold", "test"), note="the copy in LexGLUE",
    ),
    "billsum": HubDataset("FiscalNote/billsum", None, "{text}", "CC0 1.0", heldout="test", tasks=(None, "test")),
    "multilegalpile": HubDataset(
        "joelniklaus/Multi_Legal_Pile", None, "{text}", "CC BY-NC-SA 4.0", revision="refs/convert/parquet", streaming=True,
        data_files="en_all/partial-train/*.parquet", note="English; the hub's own Parquet copy, because the repository is a loading script",
    ),
}


@contextmanager
def documents(name: str, split: str, column: str | None = None) -> Iterator[Iterator[str]]:
    """The documents of a catalogue entry, read one by one for the length of a `with`.

    Args:
        name: key of CATALOGUE.
        split: "calibration" or "heldout"; an entry without a held-out split gives the same documents for both.
        column: read this column instead of the entry's template.

    Yields:
        An iterator of documents, none of them blank, in the order of the hub. What goes wrong while it is read is refused here too.

    Raises:
        InputError: no public copy, no access, no answer from the hub, a column that holds no text, or anything the libraries raise.
    """
    entry = CATALOGUE[name]
    with _rows(name, entry.config, entry.heldout if split == "heldout" and entry.heldout else entry.calibration) as rows:
        texts = (_row_text(row, entry.text, column, name) for row in rows)
        texts = _joined(texts, entry.document_start) if entry.document_start else texts
        yield (text.strip() for text in texts if text.strip())


def task_rows(name: str) -> list[dict]:
    """The items of a catalogue entry's task, as the hub has them.

    Where the entry has one pile of rows only, these are the ones that calibration keeps back (see `calibration.load_texts`).

    Args:
        name: key of CATALOGUE, of an entry with `tasks`.

    Raises:
        InputError: as `documents`.
    """
    entry = CATALOGUE[name]
    with _rows(name, *entry.tasks) as rows:
        found = [dict(row) for row in rows]
    one_pile = entry.heldout is None and entry.tasks == (entry.config, entry.calibration)
    return found[HELDOUT_EVERY - 1::HELDOUT_EVERY] if one_pile else found


@contextmanager
def _rows(name: str, config: str | None, split: str) -> Iterator:
    """The rows of a configuration and split of a catalogue entry. What goes wrong while they are read is refused here too."""
    import datasets

    entry = CATALOGUE[name]
    if entry.repository is None:
        raise InputError(f"The hub data set {name!r} cannot be downloaded", f"it has no public copy ({entry.licence})", entry.note)
    where = {"revision": entry.revision, "data_files": entry.data_files, "streaming": entry.streaming}
    with impatient() as reachable:
        try:
            yield datasets.load_dataset(entry.repository, config, split=split, **where)
        except InputError:
            raise
        except Exception as error:  # the libraries below raise a dozen unrelated types, some of them private
            raise _refusal(name, entry.repository, reachable, error) from error


def _row_text(row: Mapping, template: str, column: str | None, name: str) -> str:
    if not column:
        return template.format_map({key: "" if value is None else value for key, value in row.items()})
    if column in row and isinstance(row[column], str | None):
        return row[column] or ""
    why = f"it holds {type(row[column]).__name__}, not text" if column in row else "there is no such column"
    raise InputError(f"The column {column!r} of the hub data set {name!r} cannot be read", why, f"choose one of {', '.join(row)}")


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
def impatient() -> Iterator[bool]:
    """Makes an unreachable hub fail at once, for the length of a `with`; yields whether it was reached.

    By themselves the libraries try again for minutes. Offline mode is quick, and still finds what was downloaded before.
    """
    import datasets
    import huggingface_hub

    with LIBRARY_LOCK:
        reachable = _reachable()
        offline, retries = {"HF_HUB_OFFLINE": not reachable}, {"STREAMING_OPEN_MAX_RETRIES": 3, "STREAMING_READ_MAX_RETRIES": 3}
        with settings(huggingface_hub.constants, offline), settings(datasets.config, offline | retries):
            yield reachable


def _reachable() -> bool:
    """Whether the hub answers at all, asked once with the libraries' own client and thus through the user's proxy."""
    import datasets
    import huggingface_hub

    if huggingface_hub.constants.is_offline_mode() or datasets.config.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=TIMEOUT)
    except Exception:  # whatever it was, there is no answer
        return False
    return True


def _refusal(name: str, repository: str, reachable: bool, error: Exception) -> InputError:
    if _is_gated(error):
        why = "it is gated and this machine has no access"
        fix = f"accept its terms at https://huggingface.co/datasets/{repository} and log in with `hf auth login`"
    elif not reachable or isinstance(error, ConnectionError | TimeoutError):
        why = "the hub cannot be reached from here"
        fix = "check the network, or use a built-in domain or a file of your own"
    else:
        why = f"the library that reads it stopped ({reason(error)})"
        fix = "try again later, or use a built-in domain or a file of your own"
    return InputError(f"The hub data set {name!r} ({repository}) could not be loaded", why, fix)


def _is_gated(error: BaseException | None) -> bool:
    """Whether access was refused, here or in an error this one came from: `datasets` wraps the one that says so."""
    from huggingface_hub.errors import GatedRepoError

    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, GatedRepoError) or status in (401, 403) or "gated dataset" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
