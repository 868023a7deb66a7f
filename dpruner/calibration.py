"""Text of a domain -> token batches: the built-in corpora, the hub catalogue and the user's own files.

A domain is named by one string: a built-in corpus ("healthcare"), an entry of the hub catalogue ("pubmedqa") or a path. `load_texts` turns
it into documents, `load_calibration` into batches of token ids, `load_tasks` gives the questions of a built-in domain.
"""

import contextlib
import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from dpruner import files, hub
from dpruner.errors import InputError
from dpruner.hub import CATALOGUE, HELDOUT_EVERY
from dpruner.starter import CORPORA

SPLITS = ("calibration", "heldout")
PLENTY = 8  # tokenise at most this many times the tokens asked for: enough to choose from, without tokenising a whole library


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
    with contextlib.suppress(ValueError):  # the home of a user whose name no system can have
        name = os.path.expanduser(name)
    file = os.path.basename(os.path.abspath(name))  # "." and ".." become folder names
    stem = re.sub(rf"({'|'.join(map(re.escape, files.BUILDERS))})?(\.gz)?$", "", file, flags=re.IGNORECASE)
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
        raise InputError(f"The split {split!r} is not known", "a domain has two splits", f"choose {' or '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise InputError(f"The limit {limit} cannot be used", "no document would be left", "give 1 or more, or none for all documents")
    name = str(domain)
    if name in builtin_domains():
        texts = _builtin_texts(name, split)
    elif name in CATALOGUE:
        with hub.documents(name, split, column) as documents:
            texts = list(islice(documents if CATALOGUE[name].heldout else _share(documents, split), limit or hub.LIMIT))
    elif path := files.existing(name):
        texts = _file_texts(path, split, column)
    else:
        near = difflib.get_close_matches(name.lower(), _names(), n=1, cutoff=0.5)
        why = f"it is neither built in ({', '.join(builtin_domains())}) nor in the hub catalogue ({', '.join(CATALOGUE)}), nor a file here"
        fix = f"take {near[0]!r} if that was meant, or another of these names or a path" if near else "take one of these names or a path"
        raise InputError(f"The domain {name!r} is not known", why, fix)
    return texts[:limit]


def load_tasks(domain: str | Path) -> list[dict]:
    """The questions that come with a built-in domain, written for this project.

    Args:
        domain: built-in name.

    Returns:
        One dict per question, in the order of the file: "id"; "kind", which is "five-choice" or "yes-no-maybe"; "context", the passage to
        read, which can be empty; "question"; "choices", a list of str; "answer", the index of the right choice.

    Raises:
        InputError: the domain has no tasks.
    """
    found = {path.parent.name: path for path in sorted(CORPORA.glob("*/tasks.jsonl"))}
    if str(domain) not in found:
        raise InputError(f"The domain {str(domain)!r} has no tasks", "they are written by hand, for a few built-in domains only",
                         f"choose one of {', '.join(found)}")
    return [json.loads(line) for line in found[str(domain)].read_text(encoding="utf-8").splitlines()]


def load_calibration(domain: str | Path, tokenizer, nsamples: int = 64, seqlen: int = 128, seed: int = 0, split: str = "calibration",
                     column: str | None = None) -> list[Tensor]:
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
    return token_windows(ids, nsamples, seqlen, seed, name=f"The {split} text of {str(domain)!r}")


def token_windows(ids: Tensor, nsamples: int, seqlen: int, seed: int, name: str = "The text") -> list[Tensor]:
    """Cuts a stream of tokens into windows.

    With `nsamples * seqlen` tokens or more, the stream is laid out in slots of `seqlen` from a random start and `nsamples` slots are drawn:
    no token is used twice. With fewer, the stream is closed to a ring (documents end in eos, so its seam is one more document border) and
    the windows start evenly spaced around it from a random point: they overlap, and no token is used more than once more than another.

    Args:
        ids: LongTensor (tokens,).
        nsamples, seqlen: number of windows, and tokens in each.
        seed: of the start and of the draw.
        name: what to call the text at the beginning of an error.

    Returns:
        `nsamples` LongTensors of shape (1, seqlen).

    Raises:
        InputError: `nsamples` or `seqlen` below 1, or fewer than `seqlen` tokens.
    """
    if nsamples < 1 or seqlen < 1:
        raise InputError(f"nsamples = {nsamples} and seqlen = {seqlen} cannot be used", "each is a count of 1 or more",
                         "give a larger number")
    tokens = ids.numel()
    if tokens < seqlen:
        raise InputError(f"{name} is shorter than one sequence", f"it has {tokens} tokens and a sequence takes {seqlen}",
                         f"lower seqlen to {tokens} or less, or add text")
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
        raise InputError(f"The built-in domain {name!r} has no {split} texts", "its folder is incomplete",
                         "install this project again, or choose another domain")
    return [text for text in texts if text]


def _file_texts(path: Path, split: str, column: str | None) -> list[str]:
    documents = files.documents(path, column)
    if len(documents) < HELDOUT_EVERY:
        documents = [piece for document in documents for piece in files.pieces(document)]
    texts = list(_share(documents, split))
    if not texts:
        raise InputError(f"No text of {str(path)!r} can be held out",
                         f"it takes {HELDOUT_EVERY} documents or pieces of about {files.PIECE_WORDS} words, and this has {len(documents)}",
                         "add text, or give a longer file")
    return texts
