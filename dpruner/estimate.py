"""What a run will take, told before it starts: whether the model can be pruned, memory, disk and time. No weights are loaded."""

import contextlib
import dataclasses
import functools
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dpruner import pipeline
from dpruner.calibration import CATALOGUE, load_texts
from dpruner.config import RunConfig, split_domain
from dpruner.errors import InputError
from dpruner.loading import blank_model, is_here, pick_device
from dpruner.masks import ranked
from dpruner.memory import Plan, available_memory, parse_size
from dpruner.model import count_weights, hidden_size, prunable_linears, require_length
from dpruner.peak import choose, host_memory, outside, peak_memory, precision, stored
from dpruner.units import size

START = 5.0             # seconds until a process has imported everything
LOADING = 0.4e9         # bytes a second: read, checked for NaN and fingerprinted
EFFICIENCY = 0.38       # share of a bare matrix product's speed that passes through a model reach
HUB_CHARACTERS = 2000   # of a document nobody has downloaded yet


def require_fitting(config: RunConfig, model: nn.Module) -> None:
    """Refuse what the model has no positions or not enough prunable weights for.

    Raises:
        InputError: says which.
    """
    require_length(model, config.seqlen)
    require_length(model, config.eval_seqlen or 0, "eval_seqlen")
    pipeline.prunable_sparsity(config, model)
    require_memory(config, model, str(pick_device(config.device)))


def cautions(config: RunConfig, model: nn.Module, device: str, plan: Plan) -> list[str]:
    """What to know before a run starts that may find too little memory, in sentences; none where all is well.

    Args:
        model, device, plan: as `peak_memory` takes them.
    """
    return _crowded(config, model, device, plan) + _crowded_host(config, model, device, plan)


def _crowded(config: RunConfig, model: nn.Module, device: str, plan: Plan) -> list[str]:
    needed, free = sum(peak_memory(config, model, device, plan).values()), available_memory(device)
    if needed <= free:
        return []
    helpful = [r.words for r in remedies(dataclasses.replace(config, memory=None), model, device, free)]   # a lower limit may be one
    return [f"The run will probably not fit into memory: it takes about {size(needed)} and {size(free)} are free on {device}; "
            + ("; or ".join(helpful) if helpful else "no setting changes that: choose a smaller model, another device, or free some memory") + "."]


def _crowded_host(config: RunConfig, model: nn.Module, device: str, plan: Plan) -> list[str]:
    free, waiting = available_memory("cpu"), sum(outside(config, model, device, plan).values())
    needed = sum(host_memory(config, model, device, plan).values())
    if needed > free:
        return [f"The run will probably not fit into the memory of the host: it takes about {size(needed)} there and {size(free)} are free; "
                "use a machine with more, or keep to a limit on the device (such as --memory 16GB), which needs less on the host."]
    if needed + waiting > free:
        return [f"About {size(waiting)} of weights, scores and masks wait in files of the cache folder, and {size(free)} of memory are free to "
                "hold them: the rest is read from the disk whenever it is needed, which takes longer; free some memory, use the precision bfloat16, or put "
                "the cache folder on a fast disk."]
    return []


def cautions_of(config: RunConfig, runs: Path | None = None) -> list[str]:
    """`cautions` of a run that would start now, and whether the disk has room for a new one.

    Args:
        runs: where its folder will be made; None for one that goes on.

    Raises:
        InputError: its model or its limit cannot be.
    """
    model = blank_model(config.model, config.revision)
    return [*cautions(config, model, str(pick_device(config.device)), plan_of(config, model)), *(_crowded_disk(config, model, runs) if runs else [])]


def _crowded_disk(config: RunConfig, model: nn.Module, runs: Path) -> list[str]:
    needed, free = disk(config, model), room(runs)
    if needed <= free:
        return []
    return [f"The disk has no room for the run: it takes about {size(needed)} and {size(free)} are free in the folder {str(runs)!r}; delete runs that are no "
            "longer needed, choose fewer domains or methods, or name a folder on another disk."]


def plan_with_room(config: RunConfig, folder: Path, model: nn.Module | None = None) -> Plan:
    """`plan_of` a run whose files have room on the disk.

    Args:
        folder: the cache folder; it need not exist.
        model: as `plan_of` takes it.

    Raises:
        InputError: they have not, or there is no plan.
    """
    plan = plan_of(config, model)
    if not (plan.outside and plan.files):
        return plan
    device, model = str(pick_device(config.device)), model or blank_model(config.model, config.revision)
    needed = sum(outside(config, model, device, plan).values())
    free = room(folder)
    if needed > free:
        raise InputError(f"The disk has no room for what the run keeps outside {'memory' if device == 'cpu' else 'the device'}",
                         f"about {size(needed)} of weights, scores and masks wait in files of the folder {str(folder)!r}, and {size(free)} are "
                         "free there", "free some, name a cache folder on another disk with --cache, or allow the run more memory")
    return plan


def room(folder: Path) -> int:
    """Bytes free on the disk of a folder that need not exist yet."""
    return shutil.disk_usage(next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())).free


def told(config: RunConfig, runs: Path, cache: Path, model: nn.Module | None = None, speed: "Speed | None" = None,
         read: Callable[..., list[str]] = load_texts) -> dict:
    """All that is known of a run before it starts, as plain values: bytes by what they are for, seconds, and sentences on what may go wrong.

    Args:
        runs, cache: the folders; they need not exist.
        model, speed: as `blank_model` and `measure_speed` give them, where they are at hand.
        read: in place of `load_texts`, such as one that remembers.

    Raises:
        InputError: it cannot be done.
    """
    config.check()
    model, device = model or blank_model(config.model, config.revision), str(pick_device(config.device))
    require_fitting(config, model)
    for source, column in {split_domain(config.general)[1]: None, **{split_domain(d)[1]: config.column for d in config.domains}}.items():
        if source not in CATALOGUE:   # which would be downloaded
            read(source, "calibration", column=column, limit=1)
    plan, dtype = plan_with_room(config, cache, model), precision(config, model, device)
    took = seconds(config, model, Outline(config, read), speed or measure_speed(model, device, dtype), device, plan)
    return {"device": device, "precision": str(dtype).removeprefix("torch."), "seconds": round(took), "disk": disk(config, model), "room": room(runs),
            "download": to_download(config.model, config.revision, model), "plan": dataclasses.asdict(plan),
            "memory": peak_memory(config, model, device, plan), "free": available_memory(device),
            "outside": outside(config, model, device, plan), "host": host_memory(config, model, device, plan),
            "usual": sum(peak_memory(config, model, device, Plan()).values()), "cautions": cautions(config, model, device, plan) + _crowded_disk(config, model, runs)}


def require_memory(config: RunConfig, model: nn.Module, device: str) -> None:
    """Refuse a limit that no plan keeps to.

    Raises:
        InputError: says what most of the memory would be for, and what would help.
    """
    if config.memory is None:
        return
    parts = peak_memory(config, model, device)
    needed, most = sum(parts.values()), max(parts, key=parts.get)
    if needed > parse_size(config.memory):
        helpful = remedies(config, model, device, parse_size(config.memory))
        raise InputError(f"The run does not fit into {config.memory} of memory",
                         f"at its most sparing it takes {needed / 1e9:.3f} GB, most of it for {most} ({parts[most] / 1e9:.3f} GB)",
                         "; or ".join([f"allow it {math.ceil(needed / 1e7) / 100:.2f}GB", *(r.words for r in helpful)]))


def plan_of(config: RunConfig, model: nn.Module | None = None) -> Plan:
    """How a run keeps to the memory it may use, or else to what is free on its device.

    Args:
        model: of `blank_model`, where it is there already.

    Raises:
        InputError: it cannot.
    """
    device = str(pick_device(config.device))
    if config.memory is None:
        with contextlib.suppress(InputError):   # of a model that cannot be loaded: said when it is
            model = model or blank_model(config.model, config.revision)
            return placed(choose(config, model, device, available_memory(device)), config, model, device)
        return Plan()
    model = model or blank_model(config.model, config.revision)
    require_memory(config, model, device)
    return placed(choose(config, model, device, parse_size(config.memory)), config, model, device)


def placed(plan: Plan, config: RunConfig, model: nn.Module, device: str) -> Plan:
    """A plan under which what lives outside an accelerator lies in the memory of its host, where that has room: files that are written to wait for a disk."""
    needed = sum(outside(config, model, device, plan).values()) + sum(host_memory(config, model, device, plan).values())
    apart = torch.device(device).type not in ("cpu", "mps")   # from the host's memory
    return dataclasses.replace(plan, files=plan.outside and not (apart and needed <= available_memory("cpu")))


def advice(config: RunConfig, model: nn.Module) -> str:
    """What to do when a run has found too little memory."""
    device = str(pick_device(config.device))
    helpful = remedies(config, model, device, int(0.9 * sum(peak_memory(config, model, device).values())))
    return "; or ".join(r.words for r in helpful) or "choose a smaller model or another device"


def disk(config: RunConfig, model: nn.Module) -> int:
    """Bytes of the run folder, and of general importance and Fisher in the cache."""
    prunable, _ = count_weights(model)
    masks, ranks = _files(config)
    moving = {"sparsegpt", *{"after": config.methods, "walk": ("dpruner",)}.get(config.compensate, ())}   # methods that write weights
    moved = len(config.domains) * len(moving & set(config.methods)) * precision(config, model, str(pick_device(config.device))).itemsize
    shared = 4 * (1 + (pipeline.wants_fishers(config) and config.fisher == "both"))
    return round(prunable * (masks / 8 + ranks + moved + shared))


def _files(config: RunConfig) -> tuple[int, int]:
    """How many mask files and rank files a run writes."""
    halves = 2 * len(set(pipeline.HALVED) & set(config.methods)) if pipeline.wants_halves(config) else 0
    masks = len(config.methods) + halves
    sides = len({"domain", "general"} - set(config.methods)) if pipeline.wants_sides(config) else 0
    own = 2 * (config.sides and halves == 2 and "dpruner" in config.methods)   # of the domain's own importance, from the halves
    ranks = masks + sides + own - ("sparsegpt" in config.methods) - (config.compensate == "walk" and "dpruner" in config.methods)
    return masks * len(config.domains), ranks * len(config.domains)


@dataclass(frozen=True)
class Speed:
    """How fast a device is, measured on a few products and one sort.

    Attributes:
        flops: floating-point operations a second in a matrix product, of the model's kind.
        sorted: numbers a second that are put in order.
    """

    flops: float
    sorted: float


def measure_speed(model: nn.Module, device: str, dtype: torch.dtype, least: float = 0.1) -> Speed:
    """Time a matrix product and a sort on the device, each for about `least` seconds.

    On a CPU one thread is timed and counted as often as torch has threads: several would wait for each other wherever something else runs.
    """
    width, inner = hidden_size(model), max(max(m.weight.shape) for m in prunable_linears(model).values())
    tokens, W = torch.ones(256, width, device=device, dtype=dtype), torch.ones(width, inner, device=device, dtype=dtype)
    numbers = torch.rand(2**19, device=device)
    threads = torch.get_num_threads() if torch.device(device).type == "cpu" else 1
    with _one_thread():
        return Speed(threads * 2 * tokens.shape[0] * W.numel() / _seconds_each(lambda: tokens @ W, least, device),
                     threads * numbers.numel() / _seconds_each(lambda: ranked(numbers), least, device))


@contextlib.contextmanager
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _seconds_each(work: Callable, least: float, device: str) -> float:
    apart = torch.device(device).type != "cpu" and torch.accelerator.is_available()   # it answers before it has computed
    wait = functools.partial(torch.accelerator.synchronize, device) if apart else lambda: None
    clock = time.perf_counter if apart else time.thread_time   # what else the processors do at this moment is no property of them
    wait()
    times, began = [], time.perf_counter()
    while len(times) < 5 or time.perf_counter() - began < least:
        start = clock()
        work()
        wait()
        times.append(clock() - start)
    return min(times)


class Outline:
    """What `pipeline.planned_work` asks of the texts of a run: their labels and lengths, without a tokenizer.

    Hub data sets are not downloaded for it; their documents count as 2,000 characters each.

    Args:
        config: of the run.
        read: in place of `load_texts`, such as one that remembers.
    """

    judged = pipeline.Texts.judged

    def __init__(self, config: RunConfig, read: Callable[..., list[str]] = load_texts):
        self.open_label, open_source = split_domain(config.general)
        sources = dict(split_domain(d) for d in config.domains)
        self.labels = list(sources)
        self.heldout: Mapping[str, list[str]] = {
            label: ["·" * HUB_CHARACTERS] * config.eval_documents if source in CATALOGUE else
            read(source, "heldout", column=config.column if label in sources else None, limit=config.eval_documents)
            for label, source in {self.open_label: open_source, **sources}.items()} if config.evaluate else {}


def seconds(config: RunConfig, model: nn.Module, texts: Outline, speed: Speed, device: str, plan: Plan = Plan()) -> float:
    """How long a run takes on a device that has nothing else to do, without downloads: its planned work at the measured speed."""
    prunable, total = count_weights(model)
    passes = sum(planned.cost for planned in pipeline.planned_work(config, texts, plan))
    masks, ranks = _files(config)
    handled = (ranks + masks / 2) * prunable / speed.sorted
    loading = START + total * precision(config, model, device).itemsize / LOADING
    return loading + passes * pass_seconds(model, speed) + handled


def pass_seconds(model: nn.Module, speed: Speed) -> float:
    """Seconds that one token's forward pass takes: two operations for each prunable weight and each of the head."""
    prunable, _ = count_weights(model)
    vocabulary, hidden = model.get_input_embeddings().weight.shape
    return 2 * (prunable + vocabulary * hidden) / (EFFICIENCY * speed.flops)


@dataclass(frozen=True)
class Remedy:
    """A change of settings that saves memory: what to say, what to set, and the peak it leaves."""

    words: str
    changes: dict
    bytes: int


def remedies(config: RunConfig, model: nn.Module, device: str, available: int) -> list[Remedy]:
    """Changes each of which makes a run fit, the least harmful first; without a limit of its own it is thought to keep to what is available.

    Returns:
        Empty where nothing helps: a smaller model or more memory it is.
    """
    steps = [("use the precision bfloat16", {"dtype": "bfloat16"}),
             ("use the formula balanced", {"formula": "balanced"}),
             ("take shorter sequences (seqlen 128)", {"seqlen": min(config.seqlen, 128)}),
             ("do not tune while scoring", {"finetune": False}),
             ("prune for one domain at a time", {"domains": config.domains[:1]})]

    def remedy(words, changes):
        return Remedy(words, changes, sum(peak_memory(dataclasses.replace(config, **changes), model, device).values()))

    helpful = [r for r in (remedy(*step) for step in steps) if r.bytes <= available]
    if config.memory is None:
        limit = {"memory": f"{max(available // 1000, 1)}KB"}
        limited = remedy(f"keep to a limit (memory {available / 1e9:.3g}GB; a run does so by itself where too little is free): slower, with the same "
                         "result", limit)
        return [limited, *helpful] if limited.bytes <= available else remedies(dataclasses.replace(config, **limit), model, device, available)
    return helpful


def to_download(name: str, revision: str | None, model: nn.Module) -> int:
    """Bytes of weights that are not on this machine yet, from their count and the precision that the config tells; 0 where they are."""
    if is_here(name, revision):
        return 0
    return count_weights(model)[1] * stored(model).itemsize
