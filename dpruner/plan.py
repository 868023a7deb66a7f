"""What the work of a run consists of, known before it begins: its stages, their cost, and what belongs to them."""

from typing import NamedTuple

from dpruner.compensate import fisher_batches
from dpruner.config import RunConfig
from dpruner.memory import Plan
from dpruner.texts import Texts
from dpruner.variants import DENSE

HALVED = ("dpruner", "domain")   # methods whose masks two halves of a calibration set can disagree on


def wants_sides(config: RunConfig) -> bool:
    """Whether the two sides of the dual score are kept; where masks come from that score, they are there anyhow."""
    return "dpruner" in config.methods and (config.sides or config.compensate != "walk")


def wants_halves(config: RunConfig) -> bool:
    """Whether ceilings are asked for and there is something to halve; the masks of a dual walk do not come from scores."""
    return config.halves and config.nsamples > 1 and config.compensate != "walk" and bool(set(HALVED) & set(config.methods))


def wants_fishers(config: RunConfig) -> bool:
    """Whether the dual score is taken inside the walk, from Fishers in place of a domain pass."""
    return "dpruner" in config.methods and config.compensate == "walk"


class Planned(NamedTuple):
    """One stage of a run: its cost in token passes through the model, and the piece of the run it belongs to."""

    stage: str
    cost: float
    piece: str


def planned_work(config: RunConfig, texts: Texts, memory: Plan) -> list[Planned]:
    """Stages in the order they come, for the share done and the time left.

    Args:
        memory: how the run keeps to its memory: passes over the calibration, and blocks that are computed a second time for backward, take time.
    """
    tokens = config.nsamples * config.seqlen
    walk, backward = 3 * tokens, (4 if memory.checkpointing or memory.offload else 3) * tokens
    gradients = backward * (1 if config.finetune else memory.passes)
    fisher = memory.passes * backward * len(fisher_batches(range(config.nsamples))) / config.nsamples
    # overlapping windows pass two or three tokens for each new one, and a token is about four characters
    held = {label: sum(len(t) for t in documents) / 2 for label, documents in texts.heldout.items()}
    domain_pass = 2 * gradients * config.epochs if config.finetune else gradients
    plan = [Planned("general importance", walk, "general")]
    if wants_fishers(config) and config.fisher == "both":
        plan.append(Planned("general fisher", fisher, "fisher"))
    plan += [Planned("evaluation", cost, DENSE) for cost in held.values()]
    for label in texts.labels:
        if wants_sides(config) or {"domain", "general"} & set(config.methods):
            plan.append(Planned("domain importance", domain_pass, f"sides@{label}"))
        for method in config.methods:
            stages = []
            if method == "wanda":
                stages.append(("wanda", walk))
            if method == "sparsegpt":
                stages.append(("sparsegpt", walk))
            elif method == "dpruner" and wants_fishers(config):
                stages += [("domain fisher", fisher), ("compensation", 2 * walk)]
            elif config.compensate == "after":
                stages.append(("compensation", 2 * walk))
            stages += [("evaluation", held[name]) for name in texts.judged(label)]
            plan += [Planned(*stage, f"{method}@{label}") for stage in stages]
        if wants_halves(config):
            plan += 2 * [Planned("domain importance", domain_pass / 2, f"halves@{label}")]
    return plan
