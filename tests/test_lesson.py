"""The lesson's numbers: against the engine's own, against plain loops, and the claims of its words on the starter."""

import json
import re
import time

import numpy as np
import oracle
import pandas as pd
import pytest
import torch

from analysis import similarity
from analysis.lesson import arithmetic, figures, numbers, prepare
from dpruner import InputError, baselines, load_calibration, pipeline, store
from dpruner.calibration import load_texts
from dpruner.domain import domain_importance
from dpruner.evaluate import perplexity
from dpruner.formulas import DEFAULT_LAM, FORMULAS
from dpruner.generate import generate
from dpruner.general import general_importance
from dpruner.loading import load_model
from dpruner.masks import make_masks, pruned
from dpruner.model import prunable_linears


@pytest.fixture(scope="module")
def tiny(lesson):
    """(model, tokenizer, open-domain batches, domain batches, G, S) of the tiny lesson, by the engine alone."""
    model, tokenizer = load_model(lesson.config.model)
    general, domain = (load_calibration(name, tokenizer, lesson.config.nsamples, lesson.config.seqlen) for name in ("general", prepare.DOMAIN))
    G = general_importance(model, general)
    return model, tokenizer, general, domain, G, domain_importance(model, domain, G)


def part(lesson, name: str):
    return store.read_json(lesson.run.folder / name)


# ---- one linear


def test_the_first_linear_is_scored_as_the_engine_scores_it(tiny, lesson):
    model, _, general, _, G, S = tiny
    found = numbers.first_layer(model, general)
    name, module = next(iter(prunable_linears(model).items()))
    assert found.name == name and torch.equal(found.W, module.weight.detach())
    torch.testing.assert_close(found.G, G[name], rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(found.seen.square() / found.U.diagonal().square(), G[name], rtol=1e-4, atol=1e-9)
    slow = oracle.general_importance(model, model.model.layers, prunable_linears(model), general)
    torch.testing.assert_close(found.G.double(), slow[name], rtol=1e-3, atol=1e-7)
    kept = store.read_tensors(lesson.run.folder / "layer.safetensors")
    assert torch.equal(kept["G"], G[name]) and torch.equal(kept["dual"], S.dual[name]) and torch.equal(kept["domain"], S.domain[name])


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_compensation_is_optimal_for_every_row_and_step(sparsity):
    torch.manual_seed(0)
    X = torch.randn(200, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    H, W = (2 / 200 * X.T @ X), torch.randn(3, 6, dtype=torch.float64)
    found = numbers.compensation(W, H, sparsity)
    damp = oracle.dampened(H)
    assert found.removed.sum() == round(sparsity * W.numel()) and np.array_equal(found.weights[0], W.numpy())
    for row in range(3):
        expected = oracle.brute_force_columns(W[row], damp, torch.from_numpy(found.removed[row]))
        expected = expected[0] if isinstance(expected, tuple) else expected
        np.testing.assert_allclose(found.weights[-1][row], expected.numpy(), atol=1e-9)
    for done in range(7):
        so_far = found.removed & (np.arange(6) < done)
        assert (found.weights[done][so_far] == 0).all()
        change = torch.from_numpy(found.weights[done]) - W
        lost = (X @ change.T).square().sum(1).mean() / (X @ W.T).square().sum(1).mean()   # over tokens, without H
        plain = (X @ W.masked_fill(torch.from_numpy(so_far), 0).sub(W).T).square().sum(1).mean() / (X @ W.T).square().sum(1).mean()
        assert found.moved[done] == pytest.approx(float(lost)) and found.plain[done] == pytest.approx(float(plain))
    assert found.moved[-1] < found.plain[-1]


def test_related_inputs_are_those_that_correlate_most():
    X = torch.randn(500, 6, generator=torch.Generator().manual_seed(1))
    X[:, 4] = X[:, 1] + 0.1 * X[:, 4]
    X[:, 5] = 0   # dead
    H = 2 / 500 * X.T @ X
    assert numbers.related_inputs(H, 2).tolist() == [1, 4] and 5 not in numbers.related_inputs(H, 5).tolist()


# ---- one sentence


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("lam", [0.0, 1.0, 1e6])
def test_a_sentence_is_scored_as_the_engine_scores_a_batch(tiny, formula, lam):
    model, tokenizer, _, _, G, _ = tiny
    read = numbers.read_sentence(model, tokenizer, prepare.SENTENCE)
    ids = torch.tensor([tokenizer(prepare.SENTENCE).input_ids])
    S = domain_importance(model, [ids], G, formula, lam)
    assert read.loss == S.losses[0] and len(read.tokens) == ids.shape[1]
    for name, m in prunable_linears(model).items():
        dual, domain = numbers.scored(formula, lam, m.weight.detach(), read.gradients[name], G[name])
        assert torch.equal(dual, S.dual[name]) and torch.equal(domain, S.domain[name])
        assert torch.equal(numbers.by_lambda(formula, m.weight.detach(), read.gradients[name], G[name])(lam), S.dual[name])


@pytest.mark.parametrize("formula", FORMULAS)
def test_flips_are_counted_against_no_general_side_and_against_the_usual_one(tiny, lesson, formula):
    model, tokenizer, _, _, G, _ = tiny
    ids = [torch.tensor([tokenizer(prepare.SENTENCE).input_ids])]

    def masks(lam):
        return make_masks(domain_importance(model, ids, G, formula, lam).dual, prepare.SPARSITY)

    nothing, usual = masks(0.0), masks(DEFAULT_LAM[formula])
    rows = [row for row in part(lesson, "flips.json")["rows"] if row["formula"] == formula]
    assert [row["lam"] for row in rows] == list(numbers.LAMBDAS)
    for row in rows[::3]:
        here = masks(row["lam"])
        assert row["from_zero"] == sum(int((here[n] ^ nothing[n]).sum()) for n in here)
        assert row["from_usual"] == sum(int((here[n] ^ usual[n]).sum()) for n in here)
        assert row["weights"] == sum(m.numel() for m in here.values())


@pytest.mark.parametrize("text, said", [("", "no sentence"), ("   ", "no sentence"), ("🙂 🙂!", "no word"), ("a", "too short"),
                                        ("words " * 10_000, "too long: it has .* tokens, and the model reads 128 at most")])
def test_what_cannot_be_read_is_said(tiny, text, said):
    model, tokenizer, *_ = tiny
    with pytest.raises(InputError, match=said):
        numbers.read_sentence(model, tokenizer, text)


def test_whoever_stops_reading_stops_the_counting(tiny, monkeypatch):
    model, tokenizer, _, _, G, _ = tiny
    weights = {n: m.weight.detach() for n, m in prunable_linears(model).items()}
    gradients, begun = numbers.read_sentence(model, tokenizer, prepare.SENTENCE).gradients, []
    monkeypatch.setattr(numbers.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(numbers, "changed", lambda formula, w, *rest: (begun.append(w), time.sleep(0.05)))
    found = numbers.changed_by_matrix("balanced", weights, gradients, G, 0.5)
    next(found)
    found.close()
    before = len(begun)
    time.sleep(0.2)
    assert len(begun) <= 3 < len(weights) and len(begun) - before <= 1


# ---- single weights written out


def values_of(latex: str) -> list[float]:
    """The numbers of a line of LaTeX that stand behind its equality signs."""
    return [float(m[1]) * 10 ** int(m[2] or 0) for m in re.finditer(r"(?<![\w^{,])(-?\d+(?:\.\d+)?(?:e-?\d+)?)(?:\\cdot 10\^\{(-?\d+)\})?", latex)]


@pytest.mark.parametrize("value, shown", [(0, "0"), (0.5, "0.5"), (-0.011843, "-0.01184"), (1.23456e-7, r"1.235\cdot 10^{-7}"), (4e6, r"4.000\cdot 10^{6}")])
def test_numbers_in_latex(value, shown):
    assert arithmetic.tex(value) == shown


def test_the_arithmetic_of_general_importance_ends_in_the_score():
    line = arithmetic.general(3, 7, -0.02, 0.5, 0.0016)
    assert line.endswith("= 0.0016") and "(-0.02)^2" in line and "0.5^2" in line and 0.02**2 / 0.5**2 == pytest.approx(0.0016)


@pytest.mark.parametrize("formula", FORMULAS)
def test_what_is_written_out_is_what_the_engine_computes(tiny, formula):
    """The last number but one is computed by the writer from its own parts, the last is the engine's."""
    model, tokenizer, _, _, G, _ = tiny
    read = numbers.read_sentence(model, tokenizer, prepare.SENTENCE)
    name, m = next(iter(prunable_linears(model).items()))
    w, g, G = m.weight.detach(), read.gradients[name], G[name]
    lam = 1e5 if formula != "balanced" else 1.0
    S, _ = numbers.scored(formula, lam, w, g, G)
    for row, column in ((0, 0), (5, 30), (35, 35)):
        last = float(S[row, column])
        lines = arithmetic.score(formula, lam, w, g, G, S, row, column)
        assert lines[-1].endswith(f"= {arithmetic.tex(last)}")
        before = values_of(lines[-1].split("=")[-2])
        total = before[0] + before[1] if formula == "balanced" else abs(before[0] - before[1]) if formula == "taylor" else abs(sum(before))
        assert total == pytest.approx(last, rel=5e-3)


# ---- the parts of the lesson


def test_every_part_is_there_and_nothing_is_left_over(lesson):
    assert lesson.run.status["state"] == "done"
    there = {p.name for p in lesson.run.folder.iterdir()}
    assert set(prepare.PARTS) <= there and not any(".tmp" in name for name in there) and not there & {"partial", prepare.BASE}


def test_texts_and_perplexities_are_the_engines(tiny, lesson):
    model, tokenizer, *_, S = tiny
    found, falling = part(lesson, "words.json"), part(lesson, "fall.json")
    heldout = {name: load_texts(name, "heldout", limit=lesson.config.eval_documents)[:prepare.DOCUMENTS] for name in ("general", prepare.DOMAIN)}

    def now(masks):
        with pruned(model, masks):
            text = "".join(t.text for t in generate(model, tokenizer, prepare.PROMPTS[0], max_new_tokens=prepare.NEW_TOKENS))
            return text, {n: float(perplexity(model, tokenizer, t)) for n, t in heldout.items()}

    for name, scores in (("dense", None), ("general", S.general), ("dpruner", S.dual)):
        text, quality = now({} if scores is None else make_masks(scores, prepare.STRONG))
        assert next(row["text"] for row in found["texts"] if row["model"] == name and row["prompt"] == prepare.PROMPTS[0]) == text
        assert {row["text"]: row["value"] for row in found["quality"] if row["method"] == name} == pytest.approx(quality)
    for sparsity in (0.0, 0.3, 0.9):
        text, quality = now(make_masks(S.dual, sparsity))
        rows = [row for row in falling["rows"] if row["sparsity"] == sparsity]
        assert {row["text"]: row["value"] for row in rows} == pytest.approx(quality) and {row["continuation"] for row in rows} == {text}
    assert sorted({row["sparsity"] for row in falling["rows"]}) == list(prepare.STEPS)


def test_one_threshold_for_the_model_is_the_engines(tiny, lesson):
    model, _, _, domain, G, _ = tiny
    masks = make_masks(domain_importance(model, domain, G, means="model").dual, prepare.SPARSITY, "global")
    assert {row["matrix"]: row["kept"] for row in part(lesson, "modules.json")["rows"]} == {n: int(m.sum()) for n, m in masks.items()}


def counts(lesson, at: int):
    with store.opened(lesson.run.folder / "alike.safetensors") as file:
        told = file.metadata()
        return similarity.Counts(tuple(json.loads(told["labels"])), tuple(json.loads(told["names"])), file.get_tensor("weights").numpy(),
                                 file.get_tensor("both")[at].numpy())


def test_similarities_are_those_of_the_engines_masks(tiny, lesson):
    """256 · 0.5 is whole, so masks cut from ranks are the engine's own."""
    model, tokenizer, general, _, G, _ = tiny
    found = counts(lesson, 4)
    batches = {d: load_calibration(d, tokenizer, lesson.config.nsamples, lesson.config.seqlen) for d in lesson.config.domains}
    scores = {d: domain_importance(model, b, G) for d, b in batches.items()}
    masks = {d: make_masks(S.dual, 0.5) for d, S in scores.items()} | {f"{d} alone": make_masks(S.domain, 0.5) for d, S in scores.items()}
    for n, half in enumerate((batches["legal"][:2], batches["legal"][2:]), 1):
        S = domain_importance(model, half, G)
        masks |= {f"legal~{n}": make_masks(S.dual, 0.5), f"legal alone~{n}": make_masks(S.domain, 0.5)}
    for n, d in enumerate(lesson.config.domains[:2], 1):
        masks[f"random {n}"] = make_masks(baselines.random(model, lesson.config.seed, d), 0.5)
    expected = similarity.count_dense(masks)
    mine = found.only(list(masks))
    at = [mine.names.index(name) for name in expected.names]
    slack = 2 * len(expected.names)   # an odd matrix has a weight in the middle, which ranks round the other way
    assert np.abs(mine.both[at] - expected.both).max() <= slack


def test_a_finished_run_of_the_same_settings_is_used_and_no_other(small, lesson):
    model, _ = load_model(small.config.model)
    prepared = pipeline.prepare(small.config)
    job = pipeline.Job(lesson.run, small.config, prepared, None, None)
    assert prepare.base_run(job, small.runs).id == small.run.id
    assert prepare.base_run(job._replace(config=lesson.config), small.runs) is None
    assert prepare.base_run(job._replace(prepared=prepared._replace(fingerprint="another")), small.runs) is None


def test_a_lesson_that_was_cut_short_goes_on_with_what_it_has(lesson, tmp_path, monkeypatch):
    folder = tmp_path / "lesson"
    for name in ("run.json", "status.json", *prepare.PARTS[:-1]):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((lesson.run.folder / name).read_bytes())
    before = (folder / "words.json").stat().st_mtime_ns
    prepare.prepare(folder, tmp_path / "runs", lesson.cache)
    assert (folder / prepare.PARTS[-1]).is_file() and (folder / "words.json").stat().st_mtime_ns == before


def test_sizes_and_speeds_are_measured(lesson):
    found = part(lesson, "cost.json")
    sizes = {(row["name"], row["kind"]): row["bytes"] for row in found["sizes"]}
    assert sizes["dense", "as it is stored"] == sizes["pruned", "as it is stored"] > sizes["pruned", "kept weights + packed mask"]
    assert sizes["pruned", "compressed (zlib)"] < sizes["dense", "compressed (zlib)"]
    assert all(len(speeds) == prepare.ROUNDS and min(speeds) > 0 for speeds in found["speeds"].values())


# ---- figures


def test_a_tile_outlines_flips_and_carries_row_and_column():
    shown = np.abs(np.random.default_rng(0).normal(size=(32, 32))) + 0.01
    flipped = np.zeros((32, 32), dtype=bool)
    flipped[3, 4] = flipped[10, 20] = True
    made = figures.tile(shown, (64, 96), {"S": shown}, "%{customdata[2]}", title="t", quantity="S", how="h", flipped=flipped, chosen=(70, 100))
    outlined = next(t for t in made.figure.select_traces({"type": "scatter"}) if t.marker.symbol == "square-open")
    assert list(zip(outlined.y, outlined.x, strict=True)) == [(67, 100), (74, 116)]
    targets = made.figure.data[-1].customdata
    assert targets[0].tolist() == [64, 96, shown[0, 0]] and targets[-1].tolist() == [95, 127, shown[31, 31]] and len(made.table) == 1024
    assert "2 cells are outlined" in made.alt and len(made.figure.to_json()) < 500_000


def test_the_animation_has_a_frame_for_every_column_and_ends_as_it_begins():
    torch.manual_seed(0)
    X = torch.randn(100, 12) @ torch.randn(12, 12)
    found = numbers.compensation(torch.randn(8, 12), 2 / 100 * X.T @ X)
    made = figures.compensation(found, list(range(12)))
    assert [f.name for f in made.figure.frames] == [str(i) for i in range(13)]
    np.testing.assert_array_equal(made.figure.data[0].z, found.weights[-1].astype(np.float32))   # complete before a click
    for done, frame in enumerate(made.figure.frames):
        assert list(frame.data[2].y) == [found.plain[done], found.moved[done]]
        assert len([x for x in frame.data[1].x if x is not None]) == found.removed[:, :done].sum()
    assert made.figure.layout.updatemenus[0].buttons[0].label.endswith("Play") and len(made.figure.layout.sliders[0].steps) == 13


def test_lambda_curves_mark_every_formulas_own_lambda():
    rows = pd.DataFrame([{"formula": f, "lam": lam, "from_zero": int(lam > 10) * 5, "weights": 100} for f in FORMULAS for lam in numbers.LAMBDAS])
    made = figures.lambda_curves(rows, "release", 10.0)
    rings = {t.x[0] for t in made.figure.data if t.marker.symbol == "circle-open"}
    assert rings == set(DEFAULT_LAM.values()) and "release 0" in made.alt


# ---- what the lesson says of the starter


def test_lambda_decides_much_when_balanced_and_nothing_as_released(starter):
    """On a third of the matrices, with the cheap general importance: what the page and docs/TEACHING.md say of λ."""
    model, tokenizer = starter
    G = general_importance(model, load_calibration("general", tokenizer, 8, 128), mode="static")
    read = numbers.read_sentence(model, tokenizer, prepare.SENTENCE)
    weights = dict(list((n, m.weight.detach()) for n, m in prunable_linears(model).items())[::3])
    share = {}
    for formula in FORMULAS:
        masks = [numbers.changed(formula, w, read.gradients[n], G[n], prepare.SPARSITY, (DEFAULT_LAM[formula], 1e7))[0] for n, w in weights.items()]
        share[formula] = np.sum(masks, axis=0) / sum(w.numel() for w in weights.values())
    assert share["balanced"][0] > 0.1 and share["release"][0] < 1e-5 and share["taylor"][0] < 1e-5
    assert share["release"][1] > 0.01   # far away it does decide
