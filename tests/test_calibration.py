"""Text of a domain -> token batches: splits, columns, windows, the hub catalogue, and every way a user's file can be wrong."""

import ast
import gzip
import json
import re
import socket
import string
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import datasets
import huggingface_hub
import pandas as pd
import pytest
import torch

from dpruner import calibration, files
from dpruner import hub as catalogue
from dpruner.calibration import CATALOGUE, CORPORA, builtin_domains, domain_label, fingerprint
from dpruner.calibration import load_calibration, load_tasks, load_texts, token_windows, tokens_available
from dpruner.errors import InputError
from dpruner.hub import HubDataset

REAL = Path(__file__).parents[2] / "shared" / "corpora"
WORDS = dict.fromkeys(["general", "healthcare", "legal"], (6000, 1500)) | dict.fromkeys(["finance", "science", "code"], (3000, 1000))
ROWS = [f"Document number {index} speaks of its own subject." for index in range(23)]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(CORPORA.parent / "model")


def write(path: Path, content: str | bytes) -> Path:
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def refused(domain, *parts: str, load=load_texts, **options) -> None:
    """Asserts one InputError that is one sentence and says all of `parts`."""
    with pytest.raises(InputError) as error:
        load(str(domain), **options)
    is_one_sentence(error.value)
    for part in parts:
        assert part in str(error.value), error.value


def is_one_sentence(error: InputError) -> None:
    """Asserts "A statement: a clause; an instruction." on one line; what a library said stands in brackets and is its own affair."""
    message, why = str(error), re.sub(r" \(.*\)$", "", error.why)
    assert "\n" not in message and message.endswith(".") and not message.endswith(".."), message
    assert re.match(r"(The|No|nsamples =) .*(is|was|has|can|cannot|could not)\b", error.what), message
    assert re.match(r"[a-z]", why) and re.match(r"[a-z]", error.fix), message
    for part in (error.what, why, error.fix):
        assert not re.search(r"[.!] |[?;]|: |[.!,]$", part), message


# ---- built-in ----


@pytest.mark.parametrize("domain", WORDS)
def test_builtin_corpora_are_large_enough_and_their_splits_share_no_sentence(domain):
    texts = {split: load_texts(domain, split) for split in ("calibration", "heldout")}
    for split, least in zip(texts, WORDS[domain], strict=True):
        assert len(texts[split]) == len(list((CORPORA / domain / split).glob("*.txt")))
        assert sum(len(text.split()) for text in texts[split]) >= least
    sentences = {split: _sentences(documents) for split, documents in texts.items()}
    assert min(map(len, sentences.values())) > 40
    assert not sentences["calibration"] & sentences["heldout"]


def _sentences(documents: list[str]) -> set[str]:
    """Sentences of six words and more, symbols not counted; shorter ones ("mid = (lo + hi) // 2") are anybody's."""
    pieces = (" ".join(piece.lower().split()) for text in documents for piece in re.split(r"(?<=[.!?])\s|\n", text))
    return {piece for piece in pieces if len(re.findall(r"[a-z]+", piece)) >= 6}


@pytest.mark.parametrize("domain", ["healthcare", "legal"])
def test_tasks_are_forty_answerable_items(domain):
    items = load_tasks(domain)
    assert [item["id"] for item in items] == [f"{domain}-{number:03}" for number in range(1, 41)]
    for item in items:
        assert set(item) == {"id", "kind", "context", "question", "choices", "answer"}
        assert isinstance(item["context"], str) and item["question"] and len(set(item["choices"])) == len(item["choices"])
        assert len(item["choices"]) == 5 if item["kind"] == "five-choice" else item["choices"] == ["yes", "no", "maybe"]
        assert item["choices"][item["answer"]] and item["answer"] >= 0
    assert {item["kind"] for item in items} == {"five-choice", "yes-no-maybe"}


@pytest.mark.parametrize("domain", ["finance", "c4", "notes.txt", "", "../corpora/legal"])
def test_a_domain_without_tasks_is_refused(domain):
    refused(domain, repr(domain), "has no tasks", "choose one of healthcare, legal", load=load_tasks)


def test_builtin_domains_are_discovered_and_read_in_file_order(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "CORPORA", tmp_path)
    for name, text in (("zoo/calibration/b.txt", "second\n"), ("zoo/calibration/a.txt", "first\n"), ("ark/calibration/a.txt", "ark")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert builtin_domains() == ["ark", "zoo"]
    assert load_texts("zoo") == ["first", "second"]
    assert load_texts("zoo", limit=1) == ["first"]
    refused("zoo", "'zoo' has no heldout texts", split="heldout")


# ---- files of the user ----


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", jsonl([{"id": index, "text": row} for index, row in enumerate(ROWS)])),
        ("rows.jsonl.gz", jsonl([{"text": row} for row in ROWS])),
        ("rows.json", json.dumps([{"text": row} for row in ROWS], indent=1)),
        ("rows.csv", "id,text\n" + "".join(f'{index},"{row}"\n' for index, row in enumerate(ROWS))),
        ("rows.CSV.gz", "text\n" + "".join(f'"{row}"\n' for row in ROWS)),
        ("odd [final] *?.jsonl", jsonl([{"text": row} for row in ROWS])),
    ],
)
def test_every_fifth_row_of_a_table_is_held_out(tmp_path, name, content):
    path = write(tmp_path / name, content)
    heldout = load_texts(str(path), "heldout")
    assert heldout == [ROWS[index] for index in (4, 9, 14, 19)]
    assert load_texts(path) == [row for row in ROWS if row not in heldout]
    assert load_texts(str(path), limit=3) == ROWS[:3]


def test_parquet(tmp_path):
    pd.DataFrame({"n": range(23), "body": ROWS}).to_parquet(tmp_path / "rows.parquet")
    assert load_texts(str(tmp_path / "rows.parquet"), "heldout") == [ROWS[index] for index in (4, 9, 14, 19)]


def test_a_folder_is_read_in_name_order_one_document_a_text_file(tmp_path):
    (tmp_path / "sub").mkdir()
    for index in range(6):
        write(tmp_path / f"{index}.{'md' if index % 2 else 'txt.gz'}", f"note {index}\n\nof two paragraphs")
    write(tmp_path / "sub" / "late.txt", "late")
    write(tmp_path / "rows.csv", "text,n\nrow a,1\n,2\nrow b,3\n")  # a row without text is no document
    write(tmp_path / ".hidden.txt", "hidden")
    write(tmp_path / "picture.png", b"\0\1")
    write(tmp_path / "blank.txt", "")
    documents = [f"note {index}\n\nof two paragraphs" for index in range(6)] + ["late", "row a", "row b"]
    assert load_texts(str(tmp_path), column="text") == documents[:4] + documents[5:]
    assert load_texts(str(tmp_path), "heldout", column="text") == [documents[4]]


@pytest.mark.parametrize("name", ["one.txt", "one.md.gz"])
def test_a_single_text_is_cut_at_blank_lines(tmp_path, name):
    paragraphs = [" ".join(f"w{index}.{word}" for word in range(100)) for index in range(33)]
    path = str(write(tmp_path / name, "\ufeff" + "\r\n\r\n".join(paragraphs)))
    calibration_texts, heldout = load_texts(path), load_texts(path, "heldout")
    assert heldout == ["\n\n".join(paragraphs[start : start + 3]) for start in (12, 27)]
    assert len(calibration_texts) == 9
    assert sorted(" ".join(calibration_texts + heldout).split()) == sorted(" ".join(paragraphs).split())


def test_a_text_without_blank_lines_is_cut_too(tmp_path):
    words = [f"word{index}" for index in range(1700)]
    path = str(write(tmp_path / "lines.txt", "\n".join(words)))
    assert load_texts(path, "heldout") == ["\n".join(words[1200:1500])]
    assert [len(text.split()) for text in load_texts(path)] == [300, 300, 300, 300, 200]


def test_column(tmp_path):
    rows = [{"question": f"q{index}", "Content": f"c{index}", "n": index} for index in range(5)]
    path = write(tmp_path / "rows.jsonl", jsonl(rows))
    assert load_texts(str(path)) == ["c0", "c1", "c2", "c3"]
    assert load_texts(str(path), column="question", split="heldout") == ["q4"]
    refused(path, "The column 'answer'", "no such column", "choose one of question, Content.", column="answer")
    refused(path, "The column 'n'", "int64", "choose one of question, Content.", column="n")
    refused(write(tmp_path / "two.csv", "a,b\nx,y\n"), "two.csv", "a, b", "say which")
    refused(write(tmp_path / "numbers.csv", "a,b\n1,2\n"), "none of its columns (a, b)")
    refused(write(tmp_path / "nested.jsonl", jsonl([{"text": ["a", "b"]}])), "none of its columns (text)")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.txt", "", "it is empty"),
        ("empty.parquet", "", "it is empty"),
        ("blank.txt", " \n\t\n\n", "No text was found"),
        ("blank.txt.gz", "", "No text was found"),
        ("blank.csv", "text,n\n,1\n", "none of its columns"),
        ("blank.jsonl", '{"text": "  "}\n', "No text was found"),
        ("binary.txt", b"text\0text", "binary"),
        ("latin.txt", "caf\u00e9".encode("latin-1"), "not UTF-8"),
        ("cut.csv", "text\ncaf\u00e9".encode()[:-1], "not UTF-8"),
        ("broken.txt.gz", None, "opening it failed (Not a gzipped file"),
        ("book.pdf", "text", ".txt, .md, .csv, .jsonl, .json, .parquet"),
        ("rows.parquet.gz", "text", "extension is not supported"),
        ("bad.csv", "text,n\na,1\nb,2,3,4\n", "Expected 2 fields in line 3, saw 4"),
        ("header.csv", "text\n", "has no rows"),
        ("bad.jsonl", '{"text": "a"}\n{"text": \n', "not a well-formed json file (Expecting value: line 2 column 9)"),
        ("gaps.jsonl.gz", '\n{"text": "a"}\n\n{"text": b}\n{"text": "c"}\n', "(Expecting value: line 4 column 10)"),
        ("first.jsonl", '\n\n{"text": "a"\n{"text": "b"}\n', "line 4 column 1)"),
        ("list.json", '\n[\n\n{"text": "a"},\n{"text": b}]\n', "(Expecting value: line 5 column 10)"),
        ("deep.jsonl", '{"text": "a"}\n' + "[" * 99_999, "maximum recursion depth exceeded while decoding a JSON array from a unicode string: line 2)"),
        ("bad.parquet", "nonsense", "well-formed parquet"),
    ],
)
def test_a_bad_file_is_one_clear_sentence_and_leaves_nothing_behind(tmp_path, monkeypatch, capfd, name, content, reason):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    path = tmp_path / name
    path.write_bytes(b"no gzip at all") if content is None else write(path, content)
    refused(path, name, reason)
    assert not list(scratch.iterdir())
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([name, "scratch"])
    assert capfd.readouterr().err == ""  # neither progress bars nor the parser's own complaint


def test_reading_leaves_no_cache_and_no_setting_behind_and_stays_off_the_network(tmp_path, monkeypatch):
    def state():
        config = datasets.config
        switches = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity(), config.HF_UPDATE_DOWNLOAD_COUNTS
        return sorted(Path(config.HF_DATASETS_CACHE).rglob("*")), switches, sorted(scratch.iterdir())

    looked_up = []
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: looked_up.append(args))
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    before = state()
    assert load_texts(str(write(tmp_path / "rows.csv", "text\na\nb\n"))) == ["a", "b"]
    assert state() == before
    assert not looked_up


def test_a_tiny_file_calibrates_but_cannot_be_held_out(tmp_path, tokenizer):
    path = write(tmp_path / "tiny.txt", "Ten words are not enough to fill one whole sequence.")
    assert len(load_texts(str(path))) == 1
    refused(path, "No text of", "can be held out", "takes 5 documents", "this has 1;", split="heldout")
    tokens = tokens_available(str(path), tokenizer)
    short = ("The calibration text of", "tiny.txt' is shorter than one sequence", f"{tokens} tokens and a sequence takes 128; lower seqlen")
    refused(path, *short, load=load_calibration, tokenizer=tokenizer, nsamples=2, seqlen=128)
    assert load_calibration(str(path), tokenizer, nsamples=2, seqlen=tokens)[0].shape == (1, tokens)


def test_folders_paths_splits_and_names_that_cannot_be_used(tmp_path):
    write(tmp_path / "picture.png", b"\0")
    refused(tmp_path, "no file in it can be used", ".jsonl")
    refused(tmp_path / "gone.txt", "The path", "gone.txt", "no file or folder of that name")
    refused("gone.csv", "The path 'gone.csv' was not found")
    refused("helthcare", "The domain 'helthcare' is not known", "healthcare, legal", "c4, wikitext2", "take 'healthcare' if that was meant")
    refused("PubMedQa", "take 'pubmedqa'")
    for name in ("", " ", "x" * 5000, "nul\0", "\n!\n"):
        refused(name, "hub catalogue", "take one of these names")
    refused("legal", "The split 'test'", "calibration or heldout", split="test")
    refused("legal", "The limit 0", limit=0)


def test_labels_are_file_names():
    assert domain_label("legal") == "legal"
    assert domain_label("pubmedqa") == "pubmedqa"
    assert domain_label("/data/My notes (v2).jsonl.gz") == "My-notes-v2"
    assert domain_label(Path("notes/2024_q1")) == "2024_q1"
    assert domain_label("~/corpora/legal.txt") == "legal-file"
    assert domain_label("/") == domain_label("\u043c\u0435\u0434\u0438\u0446\u0438\u043d\u0430.txt") == "domain"
    assert domain_label("..") == re.sub(r"[^A-Za-z0-9_-]+", "-", Path("..").resolve().name).strip("-")
    assert set(domain_label("a/b\\c:d*e?.md")) <= set(string.ascii_letters + string.digits + "-_")


# ---- hub ----


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub: `hub.rows` is what every data set holds, `hub.calls` what was asked for."""

    class Hub:
        rows, calls, error = [], [], None

        def load(self, repository, config, **options):
            self.calls.append((repository, config, options))
            if self.error:
                raise self.error
            local = datasets.Dataset.from_list(self.rows)
            return local.to_iterable_dataset() if options["streaming"] else local

    stand_in = Hub()
    stand_in.calls = []
    monkeypatch.setattr(datasets, "load_dataset", stand_in.load)
    monkeypatch.setattr(catalogue, "_reachable", lambda: True)
    return stand_in


def test_catalogue_rows_become_text(hub):
    hub.rows = [{"question": f"Does {index}?", "context": {"contexts": ["x"]}, "long_answer": f"It does {index}."} for index in range(11)]
    hub.rows[1]["long_answer"] = None
    assert load_texts("pubmedqa", limit=3) == ["Does 0? It does 0.", "Does 1?", "Does 2? It does 2."]
    assert load_texts("pubmedqa", "heldout") == ["Does 4? It does 4.", "Does 9? It does 9."]
    assert load_texts("pubmedqa", column="question", limit=1) == ["Does 0?"]
    refused("pubmedqa", "abstract", "question, context, long_answer", column="abstract")
    refused("pubmedqa", "it holds dict", column="context")
    assert {call[:2] for call in hub.calls} == {("qiaojin/PubMedQA", "pqa_unlabeled")}


def test_catalogue_splits_streams_and_limits(hub):
    hub.rows = [{"text": f"page {index}"} for index in range(2500)]
    assert len(load_texts("c4")) == 2000  # an endless stream must end without being asked
    assert load_texts("c4", "heldout", limit=2) == ["page 0", "page 1"]
    asked = [options for _, _, options in hub.calls]
    assert [options["split"] for options in asked] == ["train", "validation"]
    assert all(options["streaming"] and len(options["revision"]) == 40 for options in asked)
    assert not any("trust_remote_code" in options for options in asked)


def test_wikitext_lines_are_joined_to_articles(hub):
    lines = ["", " = Robert Boulter = \n", "", " An actor . \n", " = = Career = = \n", " Plays . \n", "", " = Du Fu = \n", " A poet . \n"]
    hub.rows = [{"text": line} for line in lines]
    assert load_texts("wikitext2") == ["= Robert Boulter = \n An actor . \n = = Career = = \n Plays .", "= Du Fu = \n A poet ."]


def test_every_catalogue_entry_can_be_asked(hub):
    columns = {field for entry in CATALOGUE.values() for _, field, _, _ in string.Formatter().parse(entry.text) if field}
    hub.rows = [{column: f"{column} {index}" for column in columns} for index in range(10)]
    for name, entry in CATALOGUE.items():
        if entry.repository is None:
            refused(name, "no public copy", "physionet.org", "path of your own")
            continue
        assert len(load_texts(name, limit=2)) == (1 if entry.document_start else 2), name
        assert load_texts(name, "heldout", limit=1), name
        assert hub.calls[-1][0] == entry.repository and "/" in entry.repository and entry.licence


def test_gated_and_broken_hub_data_sets(hub):
    hub.error = datasets.exceptions.DatasetNotFoundError("Dataset 'allenai/c4' is a gated dataset on the Hub.")
    refused("c4", "it is gated", "https://huggingface.co/datasets/allenai/c4", "hf auth login")
    refusal = RuntimeError("401 Client Error")
    refusal.response = type("Response", (), {"status_code": 401})()
    hub.error = OSError("wrapped")
    hub.error.__cause__ = refusal
    refused("c4", "it is gated")
    hub.error = ConnectionError("Couldn't reach 'allenai/c4' on the Hub")
    refused("c4", "cannot be reached")
    hub.error = ValueError("Unknown split.\nLong story.")
    refused("c4", "could not be loaded", "stopped (Unknown split)")


def test_an_unreachable_hub_is_reported_at_once_and_changes_no_setting(monkeypatch):
    monkeypatch.setattr(catalogue, "_reachable", lambda: False)
    monkeypatch.setitem(CATALOGUE, "nowhere", HubDataset("nobody/no-such-data-set-of-this-name", None, "{text}", "none"))
    settings = [(huggingface_hub.constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")]
    settings += [(datasets.config, f"STREAMING_{step}_MAX_RETRIES") for step in ("OPEN", "READ")]
    before = [getattr(owner, key) for owner, key in settings]
    start = time.monotonic()
    refused("nowhere", "the hub cannot be reached from here", "file of your own")
    assert time.monotonic() - start < 5
    assert before == [getattr(owner, key) for owner, key in settings]


def test_reachability_is_one_short_question(monkeypatch):
    asked = []

    class Session:
        def head(self, url, timeout):
            asked.append(timeout)
            raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    assert not catalogue._reachable()
    assert asked == [catalogue.TIMEOUT]
    monkeypatch.setattr(Session, "head", lambda *args, **options: "any answer")
    assert catalogue._reachable()
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert not catalogue._reachable()


# ---- windows and batches ----


def test_windows_are_disjoint_while_there_is_enough():
    for tokens, nsamples, seqlen in ((100, 4, 16), (64, 4, 16), (79, 4, 16), (5, 5, 1)):
        windows = token_windows(torch.arange(tokens), nsamples, seqlen, seed=3)
        assert [window.shape for window in windows] == [(1, seqlen)] * nsamples
        assert all(window.dtype == torch.long and (window.diff() == 1).all() for window in windows)
        assert len(torch.cat(windows).unique()) == nsamples * seqlen
    starts = {token_windows(torch.arange(1000), 1, 10, seed)[0][0, 0].item() % 10 for seed in range(40)}
    assert len(starts) == 1  # 1000 is 100 slots exactly: no room for another start
    starts = {token_windows(torch.arange(1005), 1, 10, seed)[0][0, 0].item() for seed in range(40)}
    assert len({start % 10 for start in starts}) > 3 and len(starts) > 25


@pytest.mark.parametrize(("tokens", "nsamples", "seqlen"), [(100, 7, 16), (17, 64, 16), (16, 5, 16), (50, 3, 49), (101, 33, 20)])
def test_overlapping_windows_use_every_token_equally_often(tokens, nsamples, seqlen):
    windows = token_windows(torch.arange(tokens), nsamples, seqlen, seed=1)
    assert len(windows) == nsamples
    assert all(set((window.diff() % tokens).flatten().tolist()) <= {1} for window in windows)
    used = Counter(torch.cat(windows).flatten().tolist())
    assert set(used) == set(range(tokens))
    assert max(used.values()) - min(used.values()) <= 1
    assert len({token_windows(torch.arange(tokens), nsamples, seqlen, seed)[0][0, 0].item() for seed in range(20)}) > 5


def test_windows_refuse_what_cannot_be_cut():
    with pytest.raises(InputError, match="The text is shorter than one sequence: it has 7 tokens .* lower seqlen to 7 or less") as error:
        token_windows(torch.arange(7), 1, 8, seed=0)
    is_one_sentence(error.value)
    for nsamples, seqlen in ((0, 8), (1, 0), (-1, 8)):
        with pytest.raises(InputError, match=f"nsamples = {nsamples} and seqlen = {seqlen} cannot be used") as error:
            token_windows(torch.arange(100), nsamples, seqlen, seed=0)
        is_one_sentence(error.value)


def test_documents_keep_their_borders_and_are_shuffled(tmp_path, tokenizer):
    path = str(write(tmp_path / "rows.jsonl", jsonl([{"text": row} for row in ROWS])))
    texts = load_texts(path)
    documents = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    total = sum(map(len, documents))
    assert tokens_available(path, tokenizer) == total
    stream = load_calibration(path, tokenizer, nsamples=1, seqlen=total, seed=5)[0][0].tolist()
    cuts = [index + 1 for index, token in enumerate(stream) if token == tokenizer.eos_token_id]
    found = [stream[start:stop] for start, stop in zip([0, *cuts], cuts)]
    assert sorted(found) == sorted(documents)
    assert found != documents


def test_an_eos_of_the_tokenizer_is_not_doubled_and_a_missing_one_not_invented():
    class Plain:
        eos_token_id = None

        def __call__(self, text, verbose):
            assert verbose is False
            return {"input_ids": [ord(letter) for letter in text]}

    plain, closing = Plain(), Plain()
    closing.eos_token_id = ord("b")
    assert calibration._token_stream(["ab", "cd"], plain).tolist() == [97, 98, 99, 100]
    assert calibration._token_stream(["ab", "cd"], closing).tolist() == [97, 98, 99, 100, 98]
    assert calibration._token_stream(["ab", "cd", "ef"], plain, enough=3).tolist() == [97, 98, 99, 100]


def test_same_seed_same_bits_and_the_splits_differ(tokenizer, caplog):
    batches = load_calibration("healthcare", tokenizer, nsamples=4, seqlen=64, seed=7)
    assert [batch.shape for batch in batches] == [(1, 64)] * 4
    assert all(batch.dtype == torch.long and int(batch.max()) < len(tokenizer) for batch in batches)
    assert fingerprint(batches) == fingerprint(load_calibration("healthcare", tokenizer, nsamples=4, seqlen=64, seed=7))
    others = [
        load_calibration("healthcare", tokenizer, nsamples=4, seqlen=64, seed=8),
        load_calibration("healthcare", tokenizer, nsamples=4, seqlen=64, seed=7, split="heldout"),
        load_calibration("legal", tokenizer, nsamples=4, seqlen=64, seed=7),
    ]
    assert len({fingerprint(each) for each in [batches, *others]}) == 4
    assert "longer than" not in caplog.text  # documents longer than the model's context are no mistake


def test_fingerprint_knows_shapes_and_not_storage():
    batches = [torch.arange(8).reshape(1, 8)]
    assert fingerprint(batches) == fingerprint([torch.arange(16)[::2].reshape(1, 8).div(2).long()])
    assert re.fullmatch(r"[0-9a-f]{64}", fingerprint(batches))
    assert len({fingerprint(each) for each in (batches, [torch.arange(8).reshape(2, 4)], [torch.arange(1, 9).reshape(1, 8)], [])}) == 4


@pytest.mark.skipif(not REAL.is_dir(), reason="the larger real texts are not here")
def test_real_texts(tokenizer):
    path = REAL / "healthcare" / "heldout.jsonl.gz"
    rows = [json.loads(line)["text"].strip() for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    assert len(rows) >= 5
    assert load_texts(path, "heldout") == rows[4::5]
    assert load_texts(path) == [row for index, row in enumerate(rows) if index % 5 != 4]
    batches = load_calibration(path, tokenizer, nsamples=8, seqlen=128)
    assert len(torch.cat(batches).unique()) > 100
    assert tokens_available(path, tokenizer) > 8 * 128


@pytest.mark.parametrize(("module", "ours"), [
    (calibration, {"torch", "dpruner", "dpruner.errors", "dpruner.hub", "dpruner.starter"}),
    (catalogue, {"dpruner.errors", "dpruner.files"}),
    (files, {"dpruner.errors"}),
])
def test_slow_libraries_are_not_imported_at_the_top_and_imports_point_one_way(module, ours):
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert imported - set(sys.stdlib_module_names) - {"collections.abc"} == ours
