"""What a stranger may give: names, settings, files, models and run folders. A clear sentence each, no traceback, nothing written outside."""

import gzip
import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_model import is_one_sentence

from app import __main__ as server
from app import demo
from dpruner import InputError, RunConfig, calibration, cli, estimate, export, files, loading, pipeline, store, tasks, worker
from dpruner.config import METHODS
from dpruner.store import Run

# a thousand examples, always the same ones; `make hostile` takes ten thousand, others every time
FULL = settings.default.max_examples == 10_000
MANY = settings(max_examples=10_000 if FULL else 1000, derandomize=not FULL, deadline=None, database=None, suppress_health_check=list(HealthCheck))


# ---- settings

ODD = st.one_of(st.text(max_size=12), st.sampled_from(["", ".", "..", "/", "../..", "~", "~root", "a=b", "=", "a=", "=b", "x" * 5000, "nan", "legal",
                                                       "CON", "-rf", "--json", "*", "[x]", "{}", "%s%n", "'; --", "\ud800", "a\0b", "\n", "‮"]))
VALUE = st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-2, 4), st.floats(), st.sampled_from([0.5, 10**30, -0.0]), ODD,
                  st.lists(ODD, max_size=3), st.dictionaries(ODD, ODD, max_size=2))
FIELDS = list(RunConfig().to_dict())
RANDOM = st.dictionaries(st.one_of(st.sampled_from(FIELDS), ODD), VALUE, max_size=5)
SANE = {"domains": st.lists(st.one_of(ODD, st.sampled_from(["legal", "finance", "a=legal"])), min_size=1, max_size=3),
        "methods": st.lists(st.sampled_from(METHODS), min_size=1, max_size=3), "sparsity": st.floats(-0.1, 1.1),
        "granularity": st.sampled_from(["matrix", "row", "2:4", "4:2", "0:0", "1:1", ":", "matrix:", "²:4"]),
        "formula": st.sampled_from(["balanced", "taylor", "release"]), "lam": st.one_of(st.none(), st.floats()),
        "nsamples": st.integers(0, 10**7), "seed": st.integers(-1, 2**64), "dtype": st.sampled_from([None, "float32", "int8"]), "memory": st.sampled_from([None, "1KB", "300MB", "1GB", "9e9"]),
        "compensate": st.sampled_from([None, "after", "walk"]), "finetune": st.booleans(), "seqlen": st.integers(0, 200)}


@pytest.fixture
def names(monkeypatch):
    """The built-in domains, looked for on the disk once and not twenty thousand times."""
    found = calibration.builtin_domains()
    monkeypatch.setattr(calibration, "builtin_domains", lambda: found)


@pytest.fixture(scope="module")
def blank(llama):
    """A tiny model without weights."""
    return loading.blank_model(str(llama))


@MANY
@given(st.one_of(RANDOM, st.fixed_dictionaries({}, optional=SANE)))
def test_any_settings_are_taken_or_refused_in_one_sentence(names, blank, given_settings):
    try:
        config = RunConfig.from_dict(given_settings)
        config.check()
    except InputError as error:
        assert is_one_sentence(error), error
        return
    for device in ("cpu", "cuda"):   # and told what they take
        try:
            estimate.require_memory(config, blank, device)
            assert 0 < sum(estimate.peak_memory(config, blank, device).values()) < float("inf")
            pipeline.prunable_sparsity(config, blank)
        except InputError as error:
            assert is_one_sentence(error), error
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict(), ensure_ascii=False).encode())) == config   # it can be kept and repeated
    for name in [config.general, *config.domains]:
        assert re.fullmatch(r"[A-Za-z0-9_-]+", config_label(name))


def config_label(domain: str) -> str:
    from dpruner.config import split_domain
    return split_domain(domain)[0]


@MANY
@given(st.lists(st.one_of(ODD, st.sampled_from(["prune", "--sparsity", "--domain", "--config", "--nsamples", "--halves", "nan", "1e999"])).map(
    lambda word: word.encode("utf-8", "backslashreplace").decode()), max_size=5))
def test_any_words_on_the_command_line_are_settings_or_an_exit_code(capsys, words):
    try:
        cli.settings(cli.parser().parse_args(["prune", *words]), {}).check()
    except SystemExit as end:
        assert end.code in (0, 2)
    except InputError as error:
        assert is_one_sentence(error), error
    capsys.readouterr()


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"[" * 100_000, b"\xff\xfe", b'{"config": 3}', b'{"sparsity": NaN}', b'{"domains": ["\\ud800"]}',
                                     b'{"nsamples": 1' + b"0" * 5000 + b"}", b'{"nsamples": 1000000000000}', b'{"\\u0000": 1}'])
def test_a_config_file_of_anything_is_one_sentence(content, tmp_path, capsys):
    (tmp_path / "run.json").write_bytes(content)
    assert cli.main(["prune", "--config", str(tmp_path / "run.json"), "--domain", "no-such", "--runs", str(tmp_path / "runs")]) == 1
    said = capsys.readouterr()
    assert said.out == "" and re.fullmatch(r"[^\n]+: [^\n]+; [^\n]+\.\n", said.err) and "unexpectedly" not in said.err
    assert not (tmp_path / "runs").exists()


# ---- names


@pytest.mark.parametrize("name", ["../x", "..", "/etc/passwd", "a/b", "a\\b", "a\0b", "", "a b", "\ud800", "x" * 10_000 + "/"])
def test_no_name_leads_out_of_a_run_folder(name, small, tmp_path):
    for method, domain in ((name, "legal"), ("dpruner", name)):
        with pytest.raises(InputError) as caught:
            small.run.path("masks", method, domain)
        assert is_one_sentence(caught.value)
        with pytest.raises(InputError):
            export(small.run, method, domain, tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../x", "..", "/etc", "a\0b", "\ud800", "~\0", "*", "x" * 5000, "."])
def test_a_run_of_any_name_is_found_or_refused(name, small):
    with pytest.raises(InputError) as caught:
        store.open_run(name, small.runs)
    assert is_one_sentence(caught.value)


@pytest.mark.parametrize("name", ["~\0", "a\0b", "~no-such-user/x", "\ud800", "x" * 5000, "..", "../../no-such.txt", "a=b/../../c"])
def test_a_domain_of_any_name_is_read_or_refused(name, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(InputError) as caught:
        calibration.load_texts(name)
    assert is_one_sentence(caught.value)
    with pytest.raises(InputError):
        tasks.load_task(name)


def test_odd_labels_of_domains_are_files_in_the_run_folder(small):
    for label in ("../../etc/x", "a/b", "..", "x\0y", " ", "é", "-", "legal~1", "a" * 1000):
        found = config_label(f"{label}=legal") if "/" not in label else config_label(label)
        path = small.run.path("masks", "dpruner", found)
        assert path.resolve().parent == (small.run.folder / "masks").resolve() and len(path.name) < 255 and "~" not in found


def test_a_run_folder_with_links_is_not_written_to(small, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    folder = shutil.copytree(small.run.folder, tmp_path / "runs" / small.run.id)
    store.write_json(folder / "status.json", {**Run(folder).status, "state": "cancelled"})
    (folder / "log.txt").symlink_to(outside / "log.txt")
    with pytest.raises(InputError, match="'log.txt' is a link that leads out of the run folder"):
        worker.resume(Run(folder), tmp_path / "cache")
    (folder / "log.txt").unlink()
    (folder / "evaluations").symlink_to(outside)
    from dpruner import evaluations
    with pytest.raises(InputError, match="'evaluations' is a link"):
        evaluations.evaluate(Run(folder))
    assert not any(outside.iterdir()) and not (tmp_path / "cache").exists()


# ---- files of a run


def safetensors(path, header: dict | bytes, body: bytes = b"", size: int | None = None):
    """A safetensors file that says what it likes."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header) if size is None else size) + header + body)
    return path


def tensor(shape, begin=0, end=8, dtype="U8"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


LYING = {   # (header, body, size that the file tells of its header)
    "a header of 2⁶³ bytes": (b"{}", b"", 2**63),
    "a header longer than the file": (b"{}", b"", 10_000),
    "a header that is no JSON": (b"\xff" * 16, b"", None),
    "a header of depth": (b'{"a":' * 50_000, b"", None),
    "data beyond the end": ({"w": tensor([2**40], 0, 2**40)}, b"\0" * 8, None),
    "a shape that is not the data's": ({"w": tensor([2**40])}, b"\0" * 8, None),
    "a shape whose size overflows": ({"w": tensor([2**32, 2**32])}, b"\0" * 8, None),
    "negative offsets": ({"w": tensor([8], -8, 0)}, b"\0" * 8, None),
    "data that overlaps": ({"w": tensor([8]), "v": tensor([8])}, b"\0" * 8, None),
    "an unknown type": ({"w": tensor([8], dtype="EVIL")}, b"\0" * 8, None),
}


@pytest.mark.parametrize("how", LYING)
def test_a_lying_safetensors_header_is_damage(how, tmp_path, llama):
    header, body, size = LYING[how]
    path = safetensors(tmp_path / "x.safetensors", header, body, size)
    for read in (store.read_tensors, store.read_masks, store.read_scores, store.LazyMasks):
        with pytest.raises(InputError, match="damaged") as caught:
            read(path)
        assert is_one_sentence(caught.value)
    folder = shutil.copytree(llama, tmp_path / "model")
    shutil.copy(path, folder / "model.safetensors")
    with pytest.raises(InputError) as caught:
        loading.load_model(str(folder), device="cpu")
    assert is_one_sentence(caught.value)


@pytest.mark.parametrize("shapes", ['{"w": [1000000000000]}', '{"w": [1000000, 1000000]}', '{"w": [64]}', '{"w": []}', '{"w": [-8, -8]}', '{"w": "8"}', "[]", "7",
                                    '{"v": [8]}', "{}", '{"w": [8.5]}', '{"w": [[8]]}', '{"w": null}', "[" * 100_000, '{"w": [8], "v": [8]}'])
def test_a_mask_file_whose_shapes_lie_takes_no_memory(shapes, tmp_path):
    save_file({"w": torch.zeros(1, dtype=torch.uint8)}, tmp_path / "m.safetensors", {"shapes": shapes})
    for read in (store.read_masks, store.LazyMasks):
        with pytest.raises(InputError, match="damaged"):
            read(tmp_path / "m.safetensors")


@pytest.mark.parametrize("cut", [slice(0, 0), slice(0, 4), slice(4, None), slice(0, -4), slice(0, -8), slice(0, 100), slice(-50, None)])
def test_a_torn_table_is_damage(cut, small, tmp_path):
    (tmp_path / "t.parquet").write_bytes((small.run.folder / "metrics.parquet").read_bytes()[cut])
    with pytest.raises(InputError) as caught:
        store.read_table(tmp_path / "t.parquet")
    assert is_one_sentence(caught.value)


def test_a_table_with_any_byte_changed_is_read_or_refused(small, tmp_path):
    whole, random = (small.run.folder / "metrics.parquet").read_bytes(), np.random.default_rng(0)
    for at in random.integers(0, len(whole), 300):
        content = bytearray(whole)
        content[at] ^= 1 << random.integers(8)
        (tmp_path / "t.parquet").write_bytes(content)
        try:
            files.require_readable(tmp_path / "t.parquet")
            store.read_table(tmp_path / "t.parquet")
        except InputError as error:
            assert is_one_sentence(error), error


# ---- files of a user


def test_what_unpacks_without_end_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MODEST", 10**6)
    with gzip.open(tmp_path / "zeros.txt.gz", "wb") as file:
        for _ in range(100):
            file.write(b" " * 10**6)
    pa.parquet.write_table(pa.table({"text": pa.array(["x" * 10**5] * 5000).dictionary_encode()}), tmp_path / "repeated.parquet")   # 500 MB once read
    pa.parquet.write_table(pa.table({"text": pa.array([["x" * 10**5]]).take(pa.array([0] * 5000))}), tmp_path / "nested.parquet")
    pa.parquet.write_table(pa.table({"text": ["a"], "n": [0]}).take(pa.array(np.zeros(4 * 10**6, int))), tmp_path / "rows.parquet")
    for name in ("zeros.txt.gz", "repeated.parquet", "nested.parquet", "rows.parquet"):
        assert (tmp_path / name).stat().st_size < 10**6
        for read in (files.require_readable, files.documents, files.rows):
            with pytest.raises(InputError, match="more than 200 times as large as it is on disk") as caught:
                read(tmp_path / name)
            assert is_one_sentence(caught.value)


@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_a_table_that_repeats_itself_modestly_is_read(kind, tmp_path):
    text = pa.array(["the same words", None, "others"] * 100, getattr(pa, kind)())
    pa.parquet.write_table(pa.table({"text": text, "n": pa.array(range(300))}), tmp_path / "t.parquet")
    assert files.documents(tmp_path / "t.parquet") == ["the same words", "others"] * 100


@pytest.mark.parametrize("content", [b"PAR1", b"PAR1" * 5, b"PAR1" + b"\xff" * 100 + b"PAR1", b"PAR1" + struct.pack("<I", 2**31) + b"PAR1",
                                     np.random.default_rng(1).bytes(5000)])
def test_a_parquet_file_that_is_none_is_refused(content, tmp_path):
    (tmp_path / "t.parquet").write_bytes(content)
    for read in (files.require_readable, files.documents, files.rows):
        with pytest.raises(InputError, match="not a well-formed parquet file") as caught:
            read(tmp_path / "t.parquet")
        assert is_one_sentence(caught.value)


# ---- models


def change(folder, **values):
    store.write_json(folder / "config.json", json.loads((folder / "config.json").read_text()) | values)


def indexed(*names):
    def make(folder):
        torch.save({"w": torch.ones(1)}, folder / "evil.bin")
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        keys = list(store.read_tensors(folder / "part.safetensors"))
        store.write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": {k: names[i % len(names)] for i, k in enumerate(keys)}})
    return make


MODELS = {   # what is done to a model's folder, and a word of the refusal
    "an index that names a pickle": (indexed("part.safetensors", "evil.bin"), "only safetensors"),
    "an index that leads out of the folder": (indexed("../llama/model.safetensors"), "only safetensors"),
    "an index of nonsense": (indexed(3), "only safetensors"),
    "an index that is no JSON": (lambda f: (indexed("part.safetensors")(f), (f / "model.safetensors.index.json").write_text("{")), "could not be loaded"),
    "a config that names a pickle": (lambda f: change(f, transformers_weights="adapter_model.bin"), "only safetensors"),
    "a thousand million blocks": (lambda f: change(f, num_hidden_layers=10**9), "no model has so many"),
    "a hidden size without end": (lambda f: change(f, hidden_size=2**40, head_dim=2**38), "could not be loaded"),
    "a vocabulary without end": (lambda f: change(f, vocab_size=2**50), "could not be loaded"),
    "negative sizes": (lambda f: change(f, intermediate_size=-5), "could not be loaded"),
    "sizes that are words": (lambda f: change(f, hidden_size="rm -rf"), "could not be loaded"),
    "quantised by a stranger": (lambda f: change(f, quantization_config={"quant_method": "gptq", "bits": 4}), "could not be loaded"),
}


@pytest.mark.parametrize("how", MODELS)
def test_a_hostile_model_is_refused_and_says_why(how, llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "model")
    MODELS[how][0](folder)
    with pytest.raises(InputError, match=MODELS[how][1]) as caught:
        loading.load_model(str(folder), device="cpu")
    assert is_one_sentence(caught.value)


def test_weights_in_several_files_are_read(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "model")
    model, _ = loading.load_model(str(folder), device="cpu")
    shutil.rmtree(folder)
    model.save_pretrained(folder, max_shard_size="20KB")
    for path in llama.glob("tokenizer*"):
        shutil.copy(path, folder)
    assert (folder / "model.safetensors.index.json").is_file()
    again, _ = loading.load_model(str(folder), device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


# ---- the server


@pytest.mark.parametrize(("options", "listens", "local"), [([], "127.0.0.1", True), (["--server.address", "0.0.0.0"], "0.0.0.0", False),
                                                           (["--server.port", "1", "--server.address=::"], "::", False),
                                                           (["--server.address=::1"], "::1", True), (["--server.address", "localhost"], "localhost", True)])
def test_the_server_binds_to_this_machine_unless_told_otherwise(options, listens, local):
    assert (server.address(options), server.is_local(listens)) == (listens, local)


def test_it_does_so_where_there_is_no_config_file(tmp_path):
    asked = "from app import __main__ as server; print(server.address([]))"
    done = subprocess.run([sys.executable, "-c", asked], cwd=tmp_path, env={"PYTHONPATH": str(Path(server.__file__).parents[1])}, capture_output=True,
                          text=True)
    assert done.stdout == "127.0.0.1\n", done.stderr


@pytest.mark.parametrize(("options", "opened"), [([], False), (["--server.address", "0.0.0.0"], True)])
def test_it_says_what_an_open_server_changes(options, opened, monkeypatch, capsys):
    monkeypatch.setattr(demo, "ensure", lambda: None)
    monkeypatch.setattr("streamlit.web.cli.main", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["app", *options])
    with pytest.raises(SystemExit):
        server.main()
    assert sys.argv[-1] == f"--server.address={options[1] if options else '127.0.0.1'}"
    said = capsys.readouterr().err
    assert (said.count("\n") == 1 and "open to the network at 0.0.0.0: whoever reaches this machine can start runs on it" in said) if opened else said == ""


def test_runs_as_tables_of_another_make_are_read_by_pandas_alone(tmp_path):
    """A Parquet file may carry Python objects for pandas in its metadata: they are names, nothing is built from them."""
    table = pa.Table.from_pandas(pd.DataFrame({"a": [1]}))
    evil = {**table.schema.metadata, b"pandas": table.schema.metadata[b"pandas"].replace(b'"int64"', b'"__import__(\'os\').system(\'touch it-ran\')"')}
    pa.parquet.write_table(table.replace_schema_metadata(evil), tmp_path / "t.parquet")
    try:
        store.read_table(tmp_path / "t.parquet")
    except InputError as error:
        assert is_one_sentence(error)
    assert not (tmp_path / "it-ran").exists()
