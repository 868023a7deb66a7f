"""The page Generate, and the one model in memory that it shares with other sessions."""

import shutil
import threading
from pathlib import Path

import pytest
import torch
from families import tiny
from streamlit.testing.v1 import AppTest

from analysis import generation
from app import resident, state
from dpruner import InputError, load_model, store
from dpruner.generate import generate, read
from dpruner.masks import pruned
from dpruner.model import fingerprint
from dpruner.store import Run

MAIN = str(Path(__file__).parents[1] / "app" / "main.py")
PROMPT = "The law of the land"


@pytest.fixture(autouse=True)
def runs(small, tmp_path, monkeypatch) -> Path:
    """A folder with a copy of the small finished run."""
    shutil.copytree(small.runs, tmp_path / "runs")
    monkeypatch.setattr(state, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(state, "CACHE", tmp_path / "cache")
    resident.clear()
    yield tmp_path / "runs"
    resident.clear()


@pytest.fixture
def run(runs, small) -> Run:
    return Run(runs / small.run.id)


def opened(**values) -> AppTest:
    """The page, first drawn with these widget values."""
    at = AppTest.from_file(MAIN, default_timeout=60)
    at.switch_page("views/generate.py")
    for key, value in {"domain": "legal", "method": "dpruner", "generate-prompt": PROMPT, "generate-tokens": 16, **values}.items():
        at.session_state[key.replace("_", "-")] = value
    return calm(at.run())


def calm(at: AppTest) -> AppTest:
    assert not at.exception, at.exception
    return at


def go(at: AppTest) -> AppTest:
    return calm(at.button(key="generate-go").click().run())


def words(at: AppTest) -> str:
    return "\n".join(str(e.value) for kind in (at.markdown, at.caption, at.error, at.warning, at.info, at.success) for e in kind)


def shown(at: AppTest) -> list[str]:
    """The coloured texts, as HTML, and the legend."""
    return [e.proto.body for e in at.get("html")]


def expected(run, method=None, domain=None, count=16, **settings):
    """Tokens of one variant, by the plain road: a fresh model, the run's masks."""
    model, tokenizer = load_model(run.config["model"], device="cpu")
    masks = run.masks(method, domain) if method else {}
    with pruned(model, masks):
        return list(generate(model, tokenizer, PROMPT, max_new_tokens=count, **settings))


def test_texts_perplexities_and_differences_are_those_of_the_models(run):
    at = go(opened(**{"generate-beside": ["random for legal"]}))
    dense, legal = expected(run), expected(run, "dpruner", "legal")
    aligned = generation.align([t.id for t in dense], [t.id for t in legal])
    said = words(at)
    assert f"Perplexity **{generation.perplexity([t.log_prob for t in dense]):.2f}** under its own model." in said
    assert f"Perplexity **{generation.perplexity([t.log_prob for t in legal]):.2f}** under its own model. Parts from dense at token " \
           f"**{aligned.parts_at + 1}**; {int((~aligned.equal_b).sum())} of its tokens are not in the dense text." in said
    heads = [m.value for m in at.markdown if m.value.startswith("##### ")]
    assert heads[:3] == ["##### Dense", "##### dpruner for legal", "##### random for legal"]
    html = shown(at)[1]
    assert html.count("title=") == 1 + 16 and html.count("border-bottom") == int((~aligned.equal_b).sum())
    bits = generation.surprisal([legal[0].log_prob])[0]
    assert f"{bits:.2f} bits (p = {2 ** -bits:.3g}) to dpruner for legal" in html


def test_every_text_is_read_by_every_model(run):
    table = go(opened(**{"generate-beside": ["random for legal"]})).dataframe[0].value
    assert table.shape == (3, 4) and table["text written by"].tolist() == ["dense", "dpruner for legal", "random for legal"]
    model, tokenizer = load_model(run.config["model"], device="cpu")
    ids = tokenizer(PROMPT).input_ids
    for written, row in zip((None, ("dpruner", "legal"), ("random", "legal")), table.itertuples(index=False), strict=True):
        text = [t.id for t in expected(run, *(written or ()))]
        for reader, value in zip((None, ("dpruner", "legal"), ("random", "legal")), row[1:], strict=True):
            with pruned(model, run.masks(*reader) if reader else {}):
                assert value == pytest.approx(generation.perplexity(read(model, ids, text)), rel=1e-4)


def test_identical_is_said_in_words(run):
    at = go(opened(**{"sparsity": 0, "generate-beside": []}))   # nothing is removed: the same model
    assert at.success[0].value == "**Identical:** dpruner for legal writes the very same tokens as dense."
    assert "**Identical to dense.**" in words(at) and "masks cut from the run's ranks" in words(at)
    assert not go(opened(**{"generate-beside": []})).success


def test_other_sparsities_come_from_the_ranks(run):
    at = go(opened(**{"sparsity": 75, "generate-beside": []}))
    model, tokenizer = load_model(run.config["model"], device="cpu")
    with pruned(model, {n: r >= 192 for n, r in run.ranks("dpruner", "legal").items()}):
        made = list(generate(model, tokenizer, PROMPT, max_new_tokens=16))
    assert f"Perplexity **{generation.perplexity([t.log_prob for t in made]):.2f}** under its own model. Parts" in words(at)


def test_sampling_uses_one_seed_for_all(run):
    at = go(opened(**{"sparsity": 0, "generate-how": "Sampling", "generate-seed": 7, "generate-temperature": 1.5, "generate-beside": []}))
    made = expected(run, temperature=1.5, top_p=0.95, seed=7)
    assert f"Perplexity **{generation.perplexity([t.log_prob for t in made]):.2f}**" in words(at)
    assert at.success[0].value.startswith("**Identical:**")


def test_earlier_texts_stay_and_say_what_they_are_from(run):
    at = go(opened(**{"generate-beside": []}))
    at.session_state["generate-prompt"] = "Another"
    assert "These texts are from earlier settings: dense and dpruner for legal at 50 %, “The law of the land”." in words(calm(at.run()))
    assert "Perplexity **" in words(at)


def test_a_prompt_to_start_from_is_taken(run):
    at = opened()
    box = at.selectbox(key="generate-start")
    assert box.options[0] == "legal: The Mayor shall have the authority to" and {o.split(":")[0] for o in box.options} == {
        "general", "healthcare", "legal", "finance", "science", "code"}
    calm(box.set_value("finance: If the price of a good rises,").run())
    assert at.text_area(key="generate-prompt").value == "If the price of a good rises,"


def test_the_figure_to_take_away_has_exact_values(run):
    at = opened(**{"generate-beside": []})
    at.session_state["generate-open"] = True
    table = go(at).dataframe[-1].value
    dense = expected(run)
    assert table["token"].tolist() == [t.text for t in dense]
    assert table["surprisal"].tolist() == pytest.approx(generation.surprisal([t.log_prob for t in dense]).tolist())


def test_what_cannot_be_generated_is_one_sentence_and_the_rest_goes_on(run):
    at = go(opened(**{"generate-prompt": "x" * 200}))
    assert "dense: The prompt of 200 tokens is too long: the model takes 128 tokens" in at.error[0].value
    assert at.title[0].value == "Generate"
    run.path("ranks", "random", "legal").unlink()
    at = go(opened(**{"sparsity": 30, "generate-beside": ["random for legal"]}))
    assert [e.value for e in at.error] == ["random for legal: random can be shown at its own sparsity only: its scores exist only while it prunes, "
                                           "so the run keeps no ranks; set the sparsity to 50 %, or choose another method."]
    assert "Parts from dense" in words(at)
    run.path("masks", "random", "legal").write_bytes(b"no tensors")
    at = go(opened(**{"generate-beside": ["random for legal"]}))
    assert len(at.error) == 1 and "cannot be read" in at.error[0].value


def test_a_model_that_changed_since_the_run_is_refused(run, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(run.config["model"], folder)
    tiny("llama", seed=1).save_pretrained(folder)
    store.write_json(run.folder / "run.json", {**run.record, "config": {**run.config, "model": str(folder)}})
    assert "is not the one that was pruned: its weights have changed since the run" in go(opened()).error[0].value
    shutil.rmtree(folder)
    assert "was not found" in go(opened()).error[0].value


def test_without_a_run_the_page_says_what_to_do(runs, monkeypatch):
    monkeypatch.setattr("app.demo.ensure", lambda: None)
    shutil.rmtree(runs)
    at = AppTest.from_file(MAIN, default_timeout=60).switch_page("views/generate.py")
    assert "There is no finished run yet." in calm(at.run()).info[0].value and not at.button


# The one model in memory


def test_the_model_is_dense_again_whatever_happens(run):
    class Closed(BaseException):
        """As Streamlit ends a script."""

    with resident.taken(run) as found:
        before = fingerprint(found.model)
        with pytest.raises(Closed), resident.variant(found, run, "dpruner", "legal", 0.5) as model:
            assert fingerprint(model) != before
            raise Closed
        assert fingerprint(found.model) == before == run.record["model"]["fingerprint"]


def test_one_session_at_a_time_and_the_other_says_it_waits(run):
    held, release, waits, done = threading.Event(), threading.Event(), threading.Event(), threading.Event()

    def first():
        with resident.taken(run) as found, resident.variant(found, run, "random", "legal", 0.5):
            held.set()
            release.wait(20)

    def second():
        with resident.taken(run, waits.set) as found:
            assert fingerprint(found.model) == run.record["model"]["fingerprint"]   # what the other pruned is whole again
            done.set()

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert held.wait(20)
    threads[1].start()
    assert waits.wait(20) and not done.is_set()
    release.set()
    for thread in threads:
        thread.join(20)
    assert done.is_set()


def test_a_turn_that_fails_is_given_back(run):
    with pytest.raises(InputError), resident.taken(run):
        raise InputError("a", "b", "c")
    with resident.taken(run):
        pass


def test_only_one_model_is_resident_and_the_old_one_goes_first(run, tmp_path, monkeypatch):
    import gc
    import weakref
    alive, real = [], resident.load_model

    def counting(*args, **kwargs):
        gc.collect()
        assert [ref for ref in alive if ref() is not None] == []   # when a model is loaded, no other is left
        found = real(*args, **kwargs)
        alive.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(resident, "load_model", counting)
    other = Run(shutil.copytree(run.folder, run.folder.parent / "20300101-other"))
    store.write_json(other.folder / "run.json", {**run.record, "device": {**run.record["device"], "precision": "float64"}})
    monkeypatch.setattr(resident, "fingerprint", lambda model: run.record["model"]["fingerprint"])
    monkeypatch.setattr("dpruner.loading.DTYPES", {"float32": torch.float32, "float64": torch.float64})
    for wanted, loads in ((run, 1), (run, 1), (other, 2), (run, 3)):
        with resident.taken(wanted):
            pass
        assert len(alive) == loads
