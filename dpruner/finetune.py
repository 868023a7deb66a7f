"""Tuning of a pruned model's kept weights, its mask held: what is zero stays zero."""

import importlib.util
from collections.abc import Mapping

import torch
from torch import nn

from dpruner import store
from dpruner.calibration import load_calibration
from dpruner.config import RunConfig, split_domain
from dpruner.domain import next_token_loss
from dpruner.errors import InputError
from dpruner.masks import pruned
from dpruner.model import prunable_linears
from dpruner.store import Run
from dpruner.variants import load_original
from dpruner.walk import Progress, quiet, stack

WAYS = ("full", "lora")
RATE = {"full": 3e-4, "lora": 3e-3}   # at the start; it falls to 0 in a straight line
ROOM = {"full": 7.0, "lora": 3.0}   # times the weights: copies, masks, gradients and moments beside them; where that is not free, blocks wait on the host
EPOCHS, BATCH, RANK = 2, 8, 8


def require_way(way: str | None) -> None:
    """Refuse a tuning that is not known; None is no tuning.

    Raises:
        InputError: says so.
    """
    if way not in (None, *WAYS):
        raise InputError(f"The tuning {way!r} is not known", "a pruned model is tuned in one of two ways", f"choose one of {', '.join(WAYS)}")


def require_library(way: str | None) -> None:
    """Refuse a tuning whose library is not installed.

    Raises:
        InputError: says how to install it.
    """
    if way == "lora" and importlib.util.find_spec("peft") is None:
        raise InputError("The tuning 'lora' cannot be done", "it needs the library peft, which is not installed",
                         'install it with pip install "dpruner[finetune]", or tune in the way "full"')


def finetuned(run: Run, way: str = "full", *, epochs: int = EPOCHS, rate: float | None = None, progress: Progress = quiet) -> None:
    """Tune every pruned model of a run on calibration text of its domain and of the open domain; its weights file then holds the tuned ones.

    Evaluation, generation and export take them from there. What was tuned before stays as it is: the file says so in its metadata.

    Args:
        run: a finished run.
        way: "full" tunes the kept weights of the prunable linears (AdamW); "lora" adapters beside them (needs peft), which are merged and masked.
        epochs: passes over the text.
        rate: learning rate at the start; default 3e-4, for "lora" 3e-3.

    Raises:
        InputError: the way is not known, or peft is not installed.
    """
    require_way(way)
    config = RunConfig.from_dict(run.config)
    model, tokenizer = load_original(run, room=ROOM[way])
    sources = dict(split_domain(d) for d in config.domains)

    def text(source: str, column: str | None = None) -> list[torch.Tensor]:
        return load_calibration(source, tokenizer, config.nsamples, config.seqlen, config.seed, column=column)

    general = text(split_domain(config.general)[1])
    for method, domain in run.pairs():
        path = run.path("weights", method, domain)
        if path.is_file():
            with store.opened(path) as file:
                if (file.metadata() or {}).get("tuned") == way:
                    continue
        masks = run.masks(method, domain)
        with pruned(model, masks, run.weights(method, domain)):
            batches = [b for pair in zip(text(sources[domain], config.column), general, strict=True) for b in pair]
            tune = tune_lora if way == "lora" else tune_kept
            weights = tune(model, batches, masks, epochs=epochs, rate=rate or RATE[way], progress=progress)
        store.write_tensors(path, weights, {"tuned": way})


def tune_kept(model: nn.Module, batches: list[torch.Tensor], masks: Mapping[str, torch.Tensor], *, epochs: int = EPOCHS, rate: float = RATE["full"],
              progress: Progress = quiet) -> dict[str, torch.Tensor]:
    """AdamW on the kept weights of the prunable linears, everything else fixed.

    Args:
        model: pruned; it comes back with its weights as they were.
        batches: LongTensors (1, seqlen), each seen `epochs` times, 8 a step.
        masks: {name: BoolTensor as stored, True = kept}.

    Returns:
        {name: tuned weight, exactly 0 where removed}.
    """
    linears = prunable_linears(model)
    parameters = {n: linears[n].weight for n in masks}
    before = {n: p.detach().clone() for n, p in parameters.items()}
    kept = {n: m.to(parameters[n].device) for n, m in masks.items()}

    def held() -> None:   # moments of a removed weight are zero, but its decay and rounding need not be
        for n, p in parameters.items():
            p.data.mul_(kept[n])

    try:
        _descend(model, parameters.values(), batches, epochs, rate, progress, held,
                 mask_gradients=lambda: [p.grad.mul_(kept[n]) for n, p in parameters.items()])
        return {n: p.detach().clone() for n, p in parameters.items()}
    finally:
        for n, p in parameters.items():
            p.data.copy_(before[n])


def tune_lora(model: nn.Module, batches: list[torch.Tensor], masks: Mapping[str, torch.Tensor], *, epochs: int = EPOCHS, rate: float = RATE["lora"],
              progress: Progress = quiet) -> dict[str, torch.Tensor]:
    """Low-rank adapters on the prunable linears (peft), merged into the pruned weights and masked. Arguments and return as `tune_kept`.

    Raises:
        InputError: peft is not installed.
    """
    require_library("lora")
    from peft import LoraConfig, get_peft_model   # an extra
    torch.manual_seed(0)   # of the adapters' first values
    names = {n: n.removesuffix(".weight") for n in masks}
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(names.values())))
    try:
        trained = [p for p in adapted.parameters() if p.requires_grad]
        _descend(adapted, trained, batches, epochs, rate, progress)
        layers = dict(adapted.base_model.model.named_modules())
        return {n: merged(layers[of].get_base_layer().weight, layers[of].get_delta_weight("default"), masks[n]) for n, of in names.items()}
    finally:
        adapted.unload()


@torch.no_grad()
def merged(weight: torch.Tensor, delta: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A pruned weight and its adapter's product as one, with exact zeros where the mask removes: an adapter alone would fill them.

    Args:
        weight, delta, mask: of one shape; mask True = kept.
    """
    return ((weight + delta.to(weight)) * mask.to(weight.device)).to(weight.dtype)


def _descend(model, parameters, batches, epochs, rate, progress, held=lambda: None, mask_gradients=lambda: None) -> None:
    """AdamW without decay on some parameters, the rate falling to 0 in a straight line, gradients clipped to norm 1."""
    parameters = list(parameters)
    asked = [(p, p.requires_grad) for p in model.parameters()]
    steps = stack(batches, BATCH) * epochs
    try:
        chosen = {id(p) for p in parameters}
        for p, _ in asked:
            p.requires_grad_(id(p) in chosen)
        optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        for number, ids in enumerate(steps):
            progress("tuning", number, len(steps))
            for group in optimiser.param_groups:
                group["lr"] = rate * (1 - number / len(steps))
            next_token_loss(model, ids.to(model.device)).backward()
            mask_gradients()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            held()
        progress("tuning", len(steps), len(steps))
    finally:
        for p, wanted in asked:
            p.requires_grad_(wanted)
            p.grad = None
