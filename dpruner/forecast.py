"""How long an experiment will take, told before it starts: its runs as `estimate` tells them, and what their masks are then asked."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from dpruner import estimate, finetune
from dpruner.calibration import load_texts
from dpruner.config import RunConfig
from dpruner.hub import CATALOGUE
from dpruner.loading import blank_model, pick_device
from dpruner.model import count_weights
from dpruner.plan import planned_work
from dpruner.tasks import Item, Task, load_task
from dpruner.units import duration

SHARED = ("general importance", "general fisher")   # stages that runs of the same open domain do once
GRADIENTS = 3   # passes that a forward and a backward pass are worth, as in `planned_work`


class Seconds(NamedTuple):
    """What one point takes: its run, tuning it, and judging its masks."""

    pruning: float
    tuning: float
    judging: float


@dataclass(frozen=True)
class Forecast:
    """How long an experiment takes that has the device to itself, without downloads.

    Attributes:
        points: of every point, in their order.
        left: of those that are not done yet.
    """

    points: list[Seconds]
    left: list[Seconds]

    @property
    def words(self) -> str:
        """For people, before it starts; empty where nothing is left to do."""
        if not self.left:
            return ""
        done, count = len(self.points) - len(self.left), len(self.left)
        others = "the last takes" if count == 1 else f"the other {count} take"
        what = f"{done} of {len(self.points)} points are done; {others}" if done else f"{count} points take" if count > 1 else "1 point takes"
        return (f"{what} about {duration(sum(map(sum, self.left)))}: an estimate, from the planned work and the speed measured on this device, "
                "if it has nothing else to do.")


class Judged(NamedTuple):
    """One point, as far as its time goes.

    Attributes:
        config: of its run.
        tune: as `finetune.finetuned` takes it, or None.
        tasks: (domains, what their masks are given).
        done: whether it has been judged.
    """

    config: RunConfig
    tune: str | None
    tasks: Sequence[tuple[Sequence[str], Sequence[Task]]]
    done: bool


def forecast(points: Sequence[Judged], model: nn.Module | None = None, speed: estimate.Speed | None = None) -> Forecast:
    """The time of every point.

    Args:
        points: in their order; they share model and device.
        model: as `loading.blank_model` gives it, where it is at hand.
        speed: as `estimate.measure_speed` gives it, where it is known.

    Raises:
        InputError: the model cannot be used.
    """
    config = points[0].config
    model = model or blank_model(config.model, config.revision)
    device = str(pick_device(config.device))
    speed = speed or estimate.measure_speed(model, device, estimate.precision(config, model, device))
    found = list(_seconds(points, model, speed, device))
    return Forecast(found, [seconds for seconds, point in zip(found, points, strict=True) if not point.done])


def _seconds(points: Sequence[Judged], model: nn.Module, speed: estimate.Speed, device: str) -> Iterator[Seconds]:
    _, total = count_weights(model)
    token = estimate.pass_seconds(model, speed)
    loading = total * estimate.precision(points[0].config, model, device).itemsize / estimate.LOADING
    known, asked = set(), set()
    for point in points:
        config = point.config
        texts, plan = estimate.Outline(config), estimate.plan_of(config, model)
        pruning = estimate.seconds(config, model, texts, speed, device, plan) - estimate.START * bool(known)   # the process starts once
        side = (config.general, config.nsamples, config.seqlen, config.seed)
        for stage in SHARED:
            cost = sum(p.cost for p in planned_work(config, texts, plan) if p.stage == stage)
            pruning -= token * cost * ((stage, *side) in known)
            known |= {(stage, *side)} if cost else set()
        pairs = len(config.methods) * len(config.domains)
        tuning = pairs * 2 * finetune.EPOCHS * GRADIENTS * config.nsamples * config.seqlen * token + loading if point.tune else 0.0
        new = {task.name: passes(task) for _, tasks in point.tasks for task in tasks if task.name not in asked}   # the dense model is asked once
        asked |= set(new)
        judging = sum(new.values()) + len(config.methods) * sum(len(labels) * passes(task) for labels, tasks in point.tasks for task in tasks)
        yield Seconds(pruning, tuning, judging * token + loading)


def passes(task: Task) -> float:
    """Tokens that pass through a model which is given a task; a token is about four characters.

    Overlapping windows pass two tokens for each new one; a candidate is read after its prompt, and a summary is written a token at a time.
    """
    if task.kind == "perplexity":
        return sum(len(item.context) for item in task.items) / 2
    if task.kind == "summary":
        return sum(len(item.prompt) + len(item.reference) for item in task.items) / 4
    return sum(len(item.prompt) * len(item.candidates) + sum(map(len, item.candidates)) for item in task.items) / 4


def outlined_task(name: str, limit: int | None, seed: int) -> list[Task]:
    """As `load_task`, but for tasks of the hub, which are not downloaded for it: so many items of 2,000 characters."""
    if name not in CATALOGUE:
        return load_task(name, limit, seed)
    return [Task(name, "perplexity", tuple(Item(str(i), "·" * estimate.HUB_CHARACTERS) for i in range(limit or 0)))]


def outlined_texts(source: str, split: str, column: str | None = None, limit: int | None = None) -> list[str]:
    """As `load_texts`, with such stand-ins for texts of the hub."""
    return ["·" * estimate.HUB_CHARACTERS] * (limit or 0) if source in CATALOGUE else load_texts(source, split, column, limit)
