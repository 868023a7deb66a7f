"""The command line: what it prints and leaves, its exit codes, and one clear sentence for everything that cannot work."""

import errno
import json
import re
import shutil

import pytest
from rich.console import Console
from safetensors.torch import load_file
from test_model import BROKEN, broken, is_one_sentence

from dpruner import RunConfig, cli, estimate, evaluations, experiments, loading, pipeline, store, tables
from dpruner.errors import InputError

pytestmark = pytest.mark.usefixtures("elsewhere")

QUICK = ["--domain", "legal", "--nsamples", "4", "--seqlen", "16", "--no-evaluate", "--no-halves", "--general-mode", "static"]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder as the place where the command is typed, so that whatever it leaves is seen."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


def prune(*more, model=None) -> list[str]:
    """`prune` with little work."""
    return ["prune", *(["--model", str(model)] if model else []), *QUICK, *more]


def refusal(arguments, capfd, place) -> str:
    """Asserts exit code 1, one sentence on one line of stderr, and nothing else anywhere; returns it."""
    left = sorted(place.rglob("*"))
    assert cli.main([str(a) for a in arguments]) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err.endswith(".\n") and "Traceback" not in err, (out, err)
    assert "unexpected" not in err and ": " in err and "; " in err, err
    assert sorted(place.rglob("*")) == left
    return err


# ---- prune ----


def test_prune_prints_a_table_and_writes_to_runs_and_cache_where_it_was_typed(llama, elsewhere, capfd):
    assert cli.main(["prune", "--model", str(llama), "--method", "dpruner", "--method", "random", "--domain", "legal",
                     "--domain", "finance", "--nsamples", "4", "--seqlen", "16", "--eval-documents", "1", "--eval-seqlen", "128"]) == 0
    out, err = capfd.readouterr()
    assert err == ""   # no bars where nobody watches, no noise of the libraries
    (run,) = store.find_runs("runs")
    assert {path.name for path in elsewhere.iterdir()} == {"runs", "cache"} and run.config["domains"] == ["legal", "finance"]
    for word in (run.id, "legal", "finance", "dense", "random", "50.0% / 44.5%", "Jaccard", "λ changed", f"runs/{run.id}"):
        assert word in out, word


def test_a_run_that_was_not_evaluated_has_no_perplexities_in_its_table(llama, capfd):
    assert cli.main(prune("--method", "magnitude", "--method", "random", model=llama)) == 0
    out = capfd.readouterr().out
    assert "magnitude   50.0% / 44.5%" in out and "random" in out and "Removed: " in out
    assert not any(word in out for word in ("erplexity", "its domain", "open domain", "dense", "–"))


def test_json_is_the_summary_and_nothing_else(llama, capfd):
    assert cli.main(prune("--json", "--method", "magnitude", model=llama)) == 0
    out, err = capfd.readouterr()
    told = json.loads(out)
    assert err == "" and told["state"] == "done" and told["rows"][0]["method"] == "magnitude" and told["folder"] == f"runs/{told['id']}"


def test_a_dry_run_tells_what_a_run_would_take_and_leaves_nothing(llama, elsewhere, capfd, monkeypatch):
    assert cli.main(prune("--dry-run", "--device", "cpu", model=llama)) == 0
    out, _ = capfd.readouterr()
    assert all(word in out for word in ("Before it starts, on cpu in float32", "memory of the device", "run folder and cache", "free on the device now",
                                        "nothing else")) and re.search(r"time +\d+ s .*\n.*memory of the device +\d+ MB +program \(\d+ MB\)", out), out
    assert cli.main(prune("--dry-run", "--json", "--device", "cpu", "--memory", "1GB", model=llama)) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["memory"]["program"] > 10**8 and told["cautions"] == [] and told["plan"]["outside"] is False
    monkeypatch.setattr(estimate, "available_memory", lambda device: 10**8)
    monkeypatch.setattr(estimate, "room", lambda folder: 1000 if folder.name == "runs" else 10**12)
    assert cli.main(prune("--dry-run", "--device", "cpu", model=llama)) == 0
    out = capfd.readouterr().out
    assert "The run will probably not fit into memory: it takes about" in out and "The disk has no room for the run: it takes about" in out
    for wrong, said in ((("--memory", "1MB"), "does not fit into 1MB"), (("--domain", "nosuch", "--no-evaluate"), "domain 'nosuch' is not known")):
        assert said in refusal(prune("--dry-run", "--device", "cpu", *wrong, model=llama), capfd, elsewhere)
    assert not any(elsewhere.iterdir())


def test_every_setting_is_an_option(llama, tmp_path, capfd):
    arguments = ["--sparsity", "0.25", "--granularity", "row", "--formula", "taylor", "--lam", "2", "--compensate", "after",
                 "--hessian", "domain", "--fisher", "domain", "--general", "science", "--general-sparsity", "0.3", "--seed", "3",
                 "--device", "cpu", "--dtype", "bfloat16", "--baseline-calibration", "mix", "--finetune", "--epochs", "1",
                 "--runs", str(tmp_path / "r"), "--cache", str(tmp_path / "c"), "--sparsity-of", "prunable", "--eval-documents", "7",
                 "--eval-seqlen", "64", "--method", "wanda", "--method", "dpruner", "--json"]
    assert cli.main(prune(*arguments, model=llama)) == 0
    (run,) = store.find_runs(tmp_path / "r")
    assert run.config == RunConfig(
        model=str(llama), domains=("legal",), methods=("wanda", "dpruner"), sparsity=0.25, granularity="row", formula="taylor", lam=2.0,
        compensate="after", hessian="domain", fisher="domain", general="science", general_sparsity=0.3, general_mode="static", nsamples=4,
        seqlen=16, baseline_calibration="mix", finetune=True, epochs=1, halves=False, evaluate=False, eval_seqlen=64, eval_documents=7,
        seed=3, device="cpu", dtype="bfloat16").to_dict()
    assert json.loads(capfd.readouterr().out)["rows"][0]["sparsity of prunable weights"] == pytest.approx(0.25, abs=0.01)


def test_a_file_of_ones_own_can_be_a_domain_by_another_name(llama, elsewhere, capfd):
    rows = [{"text": f"Clause {i}: the tenant pays on the first of the month.", "id": i} for i in range(30)]
    (elsewhere / "contracts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["prune", "--model", str(llama), "--domain", "leases=contracts.jsonl", "--column", "text",
                     "--nsamples", "4", "--seqlen", "16", "--method", "random", "--no-halves", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["rows"][0]["domain"] == "leases" and set(told["rows"][0]["perplexity"]) == {"leases", "general"}


# ---- the same run again ----


def test_a_run_repeated_from_its_run_json_writes_the_same_bytes(small, elsewhere, capfd):
    assert cli.main(["prune", "--config", str(small.run.folder / "run.json"), "--json"]) == 0
    out, err = capfd.readouterr()
    again = store.Run(json.loads(out)["folder"])
    assert err == "" and again.config == small.run.config
    masks = sorted((small.run.folder / "masks").iterdir())
    assert len(masks) == len(list((again.folder / "masks").iterdir())) >= 6
    for path in masks:
        assert path.read_bytes() == (again.folder / "masks" / path.name).read_bytes(), path.name
    assert json.loads(out)["rows"] == json.loads(json.dumps(small.summary["rows"]))


def test_options_override_the_config_and_a_plain_object_of_settings_will_do(llama, elsewhere, capfd):
    (elsewhere / "mine.json").write_text(json.dumps({"model": str(llama), "sparsity": 0.3, "seed": 5, "methods": ["random"]}))
    assert cli.main(prune("--config", "mine.json", "--sparsity", "0.4", "--json")) == 0
    config = store.Run(json.loads(capfd.readouterr().out)["folder"]).config
    assert (config["sparsity"], config["seed"], config["methods"], config["model"]) == (0.4, 5, ["random"], str(llama))


def test_a_repeated_run_that_sees_another_model_or_text_says_so(small, elsewhere, capfd):
    record = small.run.record
    record["model"]["fingerprint"] = "0" * 64
    record["calibration"]["legal"] = "1" * 64
    (elsewhere / "run.json").write_text(json.dumps(record))
    assert cli.main(["prune", "--config", "run.json", "--no-evaluate", "--method", "magnitude", "--json"]) == 0
    err = capfd.readouterr().err
    assert err.count("Not the same run") == 2 and "the model differs" in err and "calibration text of legal differs" in err


# ---- runs ----


def test_runs_lists_and_shows(small, capfd):
    assert cli.main(["runs", "--runs", str(small.runs)]) == 0
    assert capfd.readouterr().out == f"{small.run.id}: done\n"
    for name in ("last", small.run.id, small.run.id[:8], str(small.run.folder)):
        assert cli.main(["runs", name, "--runs", str(small.runs), "--json"]) == 0
        assert json.loads(capfd.readouterr().out) == json.loads(json.dumps(small.summary))
    assert cli.main(["runs", "last", "--runs", str(small.runs)]) == 0
    assert small.run.id in capfd.readouterr().out
    assert cli.main(["runs", "--json", "--runs", str(small.runs)]) == 0
    assert [r["state"] for r in json.loads(capfd.readouterr().out)] == ["done"]


def test_runs_says_what_failed_what_runs_and_that_there_is_none(elsewhere, capfd):
    assert cli.main(["runs"]) == 0
    assert "no runs" in capfd.readouterr().out
    for name, status in (("1-bad", {"state": "failed", "error": {"what": "W", "why": "Y", "what to do": "D"}}),
                         ("2-stopped", {"state": "cancelled", "error": None})):
        store.write_json(elsewhere / "runs" / name / "run.json", {"config": {}})
        store.write_json(elsewhere / "runs" / name / "status.json", {"stage": "walk", "progress": 0.5, "pid": 0, **status})
    assert cli.main(["runs"]) == 0
    assert capfd.readouterr().out == "2-stopped: cancelled\n1-bad: failed. W: Y; D.\n"
    assert cli.main(["runs", "1-bad"]) == 0
    assert capfd.readouterr().out == "1-bad: failed. W: Y; D.\n"


@pytest.mark.parametrize("name", ["nowhere", "2099", "../.."])
def test_an_unknown_run_is_refused(name, small, elsewhere, capfd):
    assert small.run.id in refusal(["runs", name, "--runs", small.runs], capfd, elsewhere)


@pytest.mark.parametrize("damaged", ["status.json", "metrics.parquet"])
def test_a_damaged_run_is_named(damaged, small, elsewhere, capfd):
    for path in small.run.folder.glob("*.*"):
        (elsewhere / "runs" / "one").mkdir(parents=True, exist_ok=True)
        (elsewhere / "runs" / "one" / path.name).write_bytes(path.read_bytes()[:50] if path.name == damaged else path.read_bytes())
    assert damaged in refusal(["runs", "one"], capfd, elsewhere)


# ---- export ----


def test_export_says_where_and_how_large(small, elsewhere, capfd):
    assert cli.main(["export", "last", "--runs", str(small.runs), "--method", "dpruner", "--domain", "legal", "--to", "out"]) == 0
    out, err = capfd.readouterr()
    assert err == "" and out.startswith("Wrote out (0.3 MB)") and out.count("\n") == 1
    assert cli.main(["export", str(small.run.folder), "--method", "random", "--domain", "legal", "--to", "out2", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["folder"] == "out2" and told["bytes"] == sum(path.stat().st_size for path in (elsewhere / "out2").iterdir())
    masks = small.run.masks("random", "legal")
    written = load_file(elsewhere / "out2" / "model.safetensors")
    assert all(not written[n][~m].any() and written[n][m].count_nonzero() == m.sum() for n, m in masks.items())


@pytest.mark.parametrize("method, domain, to, word", [
    ("wanda", "legal", "out", "holds no mask of wanda"), ("dpruner", "finance", "out", "holds no mask"),
    ("dpruner", "legal", "full", "not empty"),
])
def test_an_export_that_cannot_be_is_refused(method, domain, to, word, small, elsewhere, capfd):
    (elsewhere / "full").mkdir()
    (elsewhere / "full" / "thesis.txt").write_text("years of work")
    said = refusal(["export", "last", "--runs", small.runs, "--method", method, "--domain", domain, "--to", to], capfd, elsewhere)
    assert word in said


# ---- one clear sentence ----


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_model_folder_is_one_sentence(how, llama, tmp_path, elsewhere, capfd, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = broken(llama, tmp_path, how)
    capfd.readouterr()   # bars of the library that wrote the folder
    assert BROKEN[how][1] in refusal(prune(model=folder), capfd, elsewhere)
    assert not (folder / "it-ran").exists()


@pytest.mark.parametrize("name", ["startr", "nobody/no-such-model", "/no/such/folder", "./nowhere"])
def test_an_unknown_model_is_one_sentence(name, elsewhere, capfd, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = refusal(prune(model=name), capfd, elsewhere)
    assert repr(name) in said and "'starter'" in said


BAD = {   # options, and a word of the refusal
    "unknown domain": (["--domain", "medicine"], "medicine"),
    "a path that does not exist": (["--domain", "texts/mine.jsonl"], "texts/mine.jsonl"),
    "an empty file": (["--domain", "empty.txt"], "empty.txt"),
    "too little text": (["--domain", "short.txt", "--seqlen", "100"], "100"),
    "text shorter than one sequence": (["--domain", "short.txt", "--seqlen", "128"], "shorter than one sequence"),
    "a column that is not there": (["--domain", "rows.jsonl", "--column", "body"], "body"),
    "the same domain twice": (["--domain", "finance", "--domain", "finance"], "'finance' stands twice"),
    "two paths of one name": (["--domain", "a/notes.txt", "--domain", "b/notes.txt"], "'notes' stands twice"),
    "two names for one thing": (["--domain", "general=short.txt"], "both called 'general'"),
    "the same method twice": (["--method", "random", "--method", "random"], "'random' stands twice"),
    "unknown method": (["--method", "magic"], "'magic'"),
    "unknown formula": (["--formula", "simple"], "'simple'"),
    "unknown granularity": (["--granularity", "column"], "'column'"),
    "impossible granularity": (["--granularity", "4:2"], "'4:2'"),
    "unknown compensation": (["--compensate", "before"], "; leave it out, or choose one of after, walk."),
    "unknown hessian": (["--hessian", "none"], "'none'"),
    "unknown mode": (["--general-mode", "fast"], "'fast'"),
    "unknown precision": (["--dtype", "int4"], "dtype = 'int4' is not known: it has a few fixed values; leave it out, or choose one of float32, b"),
    "unknown share": (["--sparsity-of", "everything"], "'everything'"),
    "more than everything": (["--sparsity", "1.5"], "1.5"),
    "less than nothing": (["--sparsity", "-0.1"], "-0.1"),
    "no number": (["--sparsity", "nan"], "nan"),
    "infinitely much": (["--sparsity", "inf"], "inf"),
    "general sparsity": (["--general-sparsity", "52"], "52"),
    "n:m against sparsity": (["--granularity", "2:4", "--sparsity", "0.6"], "contradict"),
    "n:m against the whole model": (["--granularity", "2:4", "--sparsity-of", "model"], "whole model"),
    "more than is prunable": (["--sparsity", "0.95", "--sparsity-of", "model"], "0.95"),
    "a walk with rows": (["--granularity", "row", "--compensate", "walk"], "'row'"),
    "sparsegpt with n:m": (["--granularity", "2:4", "--method", "sparsegpt"], "sparsegpt"),
    "negative lambda": (["--lam", "-1"], "λ = -1.0"),
    "lambda that is no number": (["--lam", "nan"], "λ = nan"),
    "lambda that overflows": (["--lam", "1e308"], "λ = 1e+308 cannot be used: it weighs the general side, from 0 to 1e+12"),
    "no memory": (["--memory", "0"], "The memory '0' is too small"),
    "less than a byte of memory": (["--memory", "0.5"], "The memory '0.5' is too small"),
    "less than no memory": (["--memory=-1GB"], "The memory '-1GB' is not known"),
    "a domain without a name": (["--domain", ""], "domains = ('',) cannot be used: one of its names is empty"),
    "a name without end": (["--domain", "x" * 5000], f"The domain '{'x' * 288} … {'x' * 83}' is not known"),
    "no samples": (["--nsamples", "0"], "nsamples = 0"),
    "one token": (["--seqlen", "1"], "seqlen = 1"),
    "beyond the model's maximum": (["--seqlen", "129"], "set seqlen to 128 or less"),
    "windows beyond the model's maximum": (["--evaluate", "--eval-seqlen", "129"], "set eval_seqlen to 128 or less"),
    "windows of one token": (["--eval-seqlen", "1"], "eval_seqlen = 1"),
    "no documents": (["--eval-documents", "0"], "eval_documents = 0"),
    "no epochs": (["--epochs", "0"], "epochs = 0"),
    "negative seed": (["--seed", "-1"], "seed = -1"),
    "a seed too large": (["--seed", str(2**64)], "seed"),
    "a device that is not there": (["--device", "cuda:99"], "'cuda:99'"),
    "an unknown device": (["--device", "abacus"], "'abacus'"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(what, llama, elsewhere, capfd):
    (elsewhere / "empty.txt").write_text("")
    (elsewhere / "short.txt").write_text("Far too short, and yet two lines.\n\nThe second.\n\nA third.\n\nFour.\n\nFive.\n\n")
    (elsewhere / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    for folder in ("a", "b"):
        (elsewhere / folder).mkdir()
        (elsewhere / folder / "notes.txt").write_text("some text")
    options, word = BAD[what]
    usual = QUICK[2:] if "--domain" in options else QUICK   # without its domain
    arguments = ["prune", "--model", str(llama), *usual, *options]
    said = refusal(arguments, capfd, elsewhere)
    assert word in said
    with pytest.raises(InputError) as caught:   # in the same words from Python
        pipeline.run(cli.settings(cli.parser().parse_args(arguments), {}))
    assert is_one_sentence(caught.value) and said == f"{caught.value}\n"


@pytest.mark.parametrize("settings, word", [
    ({"nsamples": "many"}, "nsamples = 'many'"), ({"nsamples": 4.5}, "nsamples = 4.5"), ({"nsamples": True}, "nsamples = True"),
    ({"nsamples": None}, "it takes a whole number;"), ({"sparsity": "half"}, "sparsity = 'half' cannot be used: it takes a number from 0 to 1;"), ({"sparsity": None}, "sparsity = None"),
    ({"domains": 5}, "domains = 5"), ({"domains": None}, "domains = None"), ({"domains": {"legal": 1}}, "domains"),
    ({"domains": ["legal", 3]}, "domains"),
    ({"domains": []}, "domain"), ({"domains": [""]}, "one of its names is empty"), ({"methods": []}, "method"), ({"methods": [["random"]]}, "it takes a list of names"),
    ({"finetune": "yes"}, "it takes true or false"), ({"finetune": 1}, "finetune = 1"), ({"model": 7}, "model = 7"),
    ({"granularity": 4}, "granularity = 4"),
    ({"device": 0}, "it takes text or nothing"), ({"lam": "1"}, "lam = '1' cannot be used: it takes a number or nothing;"), ({"sparsty": 0.5}, "'sparsty'"), ({"config": []}, "no object of settings"),
])
def test_a_setting_of_the_wrong_kind_in_a_config_file_is_refused(settings, word, llama, elsewhere, capfd):
    (elsewhere / "run.json").write_text(json.dumps({"model": str(llama), **settings}))
    assert word in refusal(["prune", "--config", "run.json"], capfd, elsewhere)


@pytest.mark.parametrize("content", [b"sparsity: 0.5", b"", b"[1, 2]", b"7", b'"text"', b"\xff\xfe\x00", b'{"sparsity": 0.5'])
def test_a_config_file_that_holds_no_settings_is_refused(content, elsewhere, capfd):
    (elsewhere / "mine.json").write_bytes(content)
    assert "mine.json" in refusal(["prune", "--config", "mine.json"], capfd, elsewhere)


def test_a_config_file_that_is_not_there_is_refused(elsewhere, capfd):
    assert "nowhere.json" in refusal(["prune", "--config", "nowhere.json"], capfd, elsewhere)
    assert str(elsewhere) in refusal(["prune", "--config", str(elsewhere)], capfd, elsewhere)


def test_a_file_in_the_place_of_the_runs_is_one_sentence(llama, elsewhere, capfd):
    (elsewhere / "runs").write_text("mine")
    assert "'runs'" in refusal(prune(model=llama), capfd, elsewhere)


def test_what_fails_on_the_way_is_one_sentence_and_in_the_list_of_runs(llama, elsewhere, capfd, monkeypatch):
    monkeypatch.setattr("dpruner.domain.next_token_loss", lambda model, ids: model(input_ids=ids).logits.sum() * float("nan"))
    assert cli.main(prune(model=llama)) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("The loss of calibration batch 1 is nan: ")
    assert cli.main(["runs"]) == 0
    assert f": failed. {err}" in capfd.readouterr().out


def test_the_unexpected_is_one_line_too_and_a_traceback_only_where_asked_for(llama, elsewhere, capfd, monkeypatch):
    monkeypatch.setattr(pipeline, "make_masks", lambda *_, **__: {}["surprise"])
    assert cli.main(prune(model=llama)) == 1
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "KeyError" in err and "--traceback" in err
    with pytest.raises(KeyError):
        cli.main(prune("--traceback", model=llama))


def test_ctrl_c_while_loading_is_one_sentence(llama, elsewhere, capfd, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(pipeline, "load_model", stop)
    assert cli.main(prune(model=llama)) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err == "Stopped: nothing half-written is left; start it again when you like.\n"
    assert not any(elsewhere.iterdir())


def test_what_is_stopped_while_it_goes_on_says_how_it_goes_on_again(small, elsewhere, capfd, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt
    folder = elsewhere / "my runs" / "one"
    shutil.copytree(small.run.folder, folder)
    (folder / "stats.parquet").unlink()
    monkeypatch.setattr(pipeline, "prepare", stop)
    assert cli.main(["resume", "one", "--runs", "my runs"]) == 1
    assert capfd.readouterr().err == "Stopped: what it has finished is kept; `python -m dpruner resume 'my runs/one'` goes on from there.\n"
    monkeypatch.setattr(experiments, "conduct", stop)
    assert cli.main(["experiment", "formulas", "--model", str(small.config.model), *QUICK[:6], "--value", "balanced"]) == 1
    assert capfd.readouterr().err.endswith("Stopped: what it has finished is kept; the same command goes on from there.\n")


# ---- wrong arguments ----


@pytest.mark.parametrize(("arguments", "said"), [
    ([], "required: command; see python -m dpruner --help"), (["prun"], "'prun' (choose from "),
    (["prune", "--sparsty", "0.5"], "not known: --sparsty 0.5; see python -m dpruner prune --help"),
    (["prune", "--sparsity", "half"], "argument --sparsity: it takes a number, not 'half'; see python -m dpruner prune --help"),
    (["prune", "--nsamples", "4.5"], "argument --nsamples: it takes a whole number, not '4.5'; see"),
    (["evaluate", "last", "--limit", "many"], "argument --limit: it takes a whole number, not 'many'; see python -m dpruner evaluate --help"),
    (["prune", "--sparsity"], "argument --sparsity: it takes a value"), (["prune", "--memory", "-1GB"], "none that begins like an option; see"),
    (["prune", "stray"], "not known: stray"), (["export", "last", "--domain", "legal", "--to", "x"], "required: --method; see python -m dpruner export --help"),
    (["export", "--method", "dpruner", "--domain", "legal", "--to", "x"], "required: run"),
    (["runs", "a", "b"], "not known: b; see python -m dpruner runs --help"), (["prune", "--finetune", "yes"], "not known: yes"),
    (["prune", "--nsamples", "x" * 5000], "xx … xx"),
])
def test_wrong_arguments_are_one_sentence_and_exit_with_2(arguments, said, elsewhere, capfd):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    out, err = capfd.readouterr()
    assert stopped.value.code == 2 and out == "" and err.count("\n") == 1 and err.endswith(" --help.\n") and len(err) < 500
    assert err.startswith("The command cannot be followed: ") and said in err and not any(elsewhere.iterdir())


@pytest.mark.parametrize("command", [[], ["prune"], ["runs"], ["export"]])
def test_help_is_there_and_exits_with_0(command, capfd):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command, "--help"])
    out = capfd.readouterr().out
    assert stopped.value.code == 0 and "usage: python -m dpruner" in out
    if command == ["prune"]:
        for name in RunConfig().to_dict():
            assert f"--{ {'domains': 'domain', 'methods': 'method'}.get(name, name.replace('_', '-')) }" in out


def test_a_revision_of_the_starter_is_refused(elsewhere, capfd):
    assert "revision" in refusal(["prune", "--revision", "abc"], capfd, elsewhere)


def test_one_damaged_run_does_not_hide_the_others(small, elsewhere, capfd):
    for name in ("good", "bad"):
        shutil.copytree(small.run.folder, elsewhere / "runs" / name)
    (elsewhere / "runs" / "bad" / "status.json").write_text("{")
    assert cli.main(["runs"]) == 0
    lines = dict(line.split(": ", 1) for line in capfd.readouterr().out.splitlines())
    assert lines["good"] == "done" and lines["bad"].startswith("damaged. The file")


def test_a_figure_stands_under_the_text_it_is_of(small, capsys):
    """Held-out text of single tokens gives no figure: the open domain's must not slip into its place."""
    told = json.loads(json.dumps(small.summary))
    del told["dense"]["legal"]["legal"]
    for row in told["rows"]:
        row["perplexity"].pop("legal", None)
    tables.show_run(told, Console(highlight=False, width=100))
    printed = re.search(r"legal +dense +(\S+) +(\S+)", capsys.readouterr().out)
    assert printed[1] == "–" and printed[2] == f"{told['dense']['legal']['general']['value']:.1f}"


@pytest.mark.parametrize(("error", "said"), [
    (MemoryError(), "The command needs more memory than there is: out of memory; free some memory and start it again"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "The command needs more memory than there is: DefaultCPUAllocator"),
    (OSError(errno.ENOSPC, "No space left on device"), "The command could not write: the disk is full; free some space and start it again."),
    (PermissionError(errno.EROFS, "Read-only file system", "there/x"), "The command could not write 'there/x': read-only file system; mend it")])
def test_what_any_command_lacks_is_said_with_advice(error, said, small, capfd, monkeypatch):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(evaluations, "evaluate", fails)
    assert cli.main(["evaluate", str(small.run.folder)]) == 1
    _, err = capfd.readouterr()
    assert err.startswith(said) and err.count("\n") == 1


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: you tried"), OSError("Cannot allocate memory (os error 12)")])
def test_a_model_for_which_there_is_no_memory_is_not_called_damaged(error, llama, monkeypatch):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", fails)
    with pytest.raises(InputError, match="could not be loaded: there is too little memory for it; free some memory"):
        loading.load_model(str(llama))
