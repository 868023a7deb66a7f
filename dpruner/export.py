"""A pruned checkpoint that every loader takes, its mask file and its model card."""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM

from dpruner.config import RunConfig, split_domain
from dpruner.errors import InputError
from dpruner.masks import pruned
from dpruner.loading import stored_precision
from dpruner.model import count_weights
from dpruner.store import Run, open_run, write_masks
from dpruner.variants import load_original, require_variant

MASK_FILE = "dpruner_mask.safetensors"


def export(run: Run | str | Path, method: str, domain: str, to: str | Path) -> Path:
    """Write a pruned model as a folder for `AutoModelForCausalLM.from_pretrained`: dense safetensors with zeros, tokenizer, mask, model card.

    The sparsity is counted again from the written files before the folder appears under its name.

    Args:
        run: a run, its folder or its id.
        method, domain: whose mask (the domain by its label).
        to: folder to make; it must not hold anything yet.

    Returns:
        The folder.

    Raises:
        InputError: no such run or mask, the folder is not empty, the model has changed since the run, or the written file does not hold the mask.
    """
    run = run if isinstance(run, Run) else open_run(run)
    to = Path(to)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InputError(f"The folder {str(to)!r} cannot be written", "it exists and is not empty", "give the name of a new folder")
    require_variant(run, method, domain)
    model, tokenizer = load_original(run, device="cpu")
    config = RunConfig.from_dict(run.config)
    masks, weights = run.masks(method, domain), run.weights(method, domain)
    stored = stored_precision(config.model, run.record["model"]["commit"] or config.revision)
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{to.name}.", dir=to.parent) as scratch:
            folder = Path(scratch) / "model"
            with pruned(model, masks, weights):
                model.to(stored).save_pretrained(folder)   # in the precision it came in: no larger, and kept weights bit for bit
            tokenizer.save_pretrained(folder)
            write_masks(folder / MASK_FILE, masks)
            zeros = verify(folder, masks)
            prunable, total = count_weights(model)
            (folder / "README.md").write_text(model_card(run, config, method, domain, zeros, prunable, total), encoding="utf-8")
            if to.is_dir():
                to.rmdir()
            shutil.move(folder, to)
    except (OSError, SafetensorError) as error:   # safetensors wraps what the system said
        raise InputError(f"The export could not be written to {str(to)!r}", (getattr(error, "strerror", None) or str(error)).lower(),
                         "free some space, or name another folder") from error
    return to


def verify(folder: Path, masks) -> int:
    """Count the zeros of the masked weights in the written files.

    Returns:
        How many weights the masks remove, each found to be zero.

    Raises:
        InputError: a weight that the mask removes is not zero in the file, or is missing.
    """
    left = dict(masks)
    for path in sorted(folder.glob("*.safetensors")):
        if path.name == MASK_FILE:
            continue
        with safe_open(path, framework="pt") as file:
            for name in set(file.keys()) & set(left):
                _require_zeros(name, file.get_tensor(name), left.pop(name))
    if left:   # some families store weights under other names, or several as one: then as a loader finds them
        for name, weight in _loaded(folder).items():
            if name in left:
                _require_zeros(name, weight, left.pop(name))
    if left:
        raise InputError("The export is incomplete", f"{next(iter(left))} is not in the written files", "report it with its settings")
    return sum(int((~m).sum()) for m in masks.values())


def _loaded(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint by the names that the model has for them; none where a file is missing."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True, trust_remote_code=False,
                                                           output_loading_info=True)
    except OSError:
        return {}
    return {name: p.detach() for name, p in model.named_parameters() if name not in info["missing_keys"]}


def _require_zeros(name: str, weight: torch.Tensor, mask: torch.Tensor) -> None:
    if weight[~mask].count_nonzero():
        raise InputError("The export is not as sparse as its mask", f"{name} has weights that should be zero",
                         "report it with its settings")


def calibrated_on(config: RunConfig, method: str, domain: str) -> str:
    """What text a method has looked at, in a sentence."""
    sides = {"general": {"general"}, "domain": {"domain"}, "mix": {"general", "domain"}}
    seen = {"dpruner": sides["mix"], "domain": sides["domain"], "general": sides["general"], "magnitude": set(), "random": set()}.get(
        method, sides[config.baseline_calibration])
    if config.compensate == "after" and method != "sparsegpt":
        seen = seen | sides[config.hessian]
    names = {"domain": Path(dict(map(split_domain, config.domains))[domain]).name,
             "general": f"the open domain ({Path(config.general).name})"}
    texts = " and as many of ".join(name for side, name in names.items() if side in seen)
    return f"Calibrated on {config.nsamples} sequences of {config.seqlen} tokens from {texts}, seed {config.seed}." if texts else \
        f"No text was looked at; seed {config.seed}."


def model_card(run: Run, config: RunConfig, method: str, domain: str, zeros: int, prunable: int, total: int) -> str:
    """README.md of an export: what was done, measured how, and what the zeros do not buy."""
    metrics = run.metrics()
    quality = metrics[(metrics.metric == "perplexity") & metrics.method.isin(["dense", method]) & (metrics.domain == domain)]
    lines = [f"| {r.method} | {r.text} | {r.value:.2f} | {r.low:.2f} to {r.high:.2f} | {r.n} |" for r in quality.itertuples()]
    table = ["| model | held-out text | perplexity | 95 % interval | windows |", "|---|---|---|---|---|", *lines] if lines else ["Not evaluated."]
    return "\n".join([
        "---", f"base_model: {config.model if not Path(config.model).exists() else Path(config.model).name}", "tags: [pruning, sparse, d-pruner]", "---", "",
        f"# {Path(config.model).name}, pruned for {domain} with {method}", "",
        f"{zeros:,} of {prunable:,} prunable weights are zero ({zeros / prunable:.2%}; {zeros / total:.2%} of the whole model), counted in these files.",
        calibrated_on(config, method, domain), "",
        "## Quality", "", *table, "",
        "## Use", "", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'model = AutoModelForCausalLM.from_pretrained("this folder")', 'tokenizer = AutoTokenizer.from_pretrained("this folder")', "```", "",
        f"`{MASK_FILE}` holds the mask as bits (numpy.packbits along the last axis, little-endian; shapes in its metadata).",
        "The checkpoint is dense: zeros are stored like any number, so it is as large and as fast as the original unless a sparse format or kernel is used.",
        "", "## Settings", "", "```json", json.dumps(config.to_dict(), indent=1), "```", ""])
