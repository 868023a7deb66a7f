"""The claim itself, on real texts of two domains where they lie beside the repository."""

from pathlib import Path

import pytest

from dpruner import domain_importance, general_importance, load_calibration, load_texts, make_masks, perplexity, pruned
from dpruner.baselines import random

CORPORA = Path(__file__).parents[2] / "shared" / "corpora"
DOMAINS = ("healthcare", "legal")
pytestmark = pytest.mark.skipif(not CORPORA.is_dir(), reason="the real texts are not here")


def source(domain):
    return CORPORA / domain / "heldout.jsonl.gz"


@pytest.fixture(scope="module")
def judged(starter):
    """Perplexity on each domain's held-out text: {(text, mask): Estimate}, mask a domain of D-Pruner's, "random" or "dense"."""
    model, tokenizer = starter

    def calibration(domain):
        return load_calibration(source(domain), tokenizer, nsamples=48, seqlen=128, column="text")

    G = general_importance(model, calibration("general"), mode="static")
    masks = {d: make_masks(domain_importance(model, calibration(d), G).dual, 0.5) for d in DOMAINS}
    masks |= {"random": make_masks(random(model, 0), 0.5), "dense": {}}
    texts = {d: [text[:1500] for text in load_texts(source(d), "heldout", column="text", limit=16)] for d in DOMAINS}
    found = {}
    for name, mask in masks.items():
        with pruned(model, mask):
            for text in DOMAINS:
                found[text, name] = perplexity(model, tokenizer, texts[text], 256, 256)
    return found


@pytest.mark.parametrize("domain", DOMAINS)
def test_dpruner_beats_random_by_far(judged, domain):
    assert judged[domain, domain] * 10 < judged[domain, "random"]


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_domains_own_mask_serves_it_better_than_another_domains(judged, domain):
    other = next(d for d in DOMAINS if d != domain)
    assert judged[domain, domain] < judged[domain, other]


@pytest.mark.parametrize("domain", DOMAINS)
def test_half_the_weights_hold_most_of_what_the_model_knew(judged, domain):
    assert judged[domain, domain] < 1.2 * judged[domain, "dense"]
