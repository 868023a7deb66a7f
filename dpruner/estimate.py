"""What a run will take, told before it starts: whether the model can be pruned, memory, disk and time. No weights are loaded."""

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dpruner import distributed, pipeline
from dpruner.calibration import CATALOGUE, load_texts
from dpruner.config import RunConfig, split_domain
from dpruner.domain import SMALLEST_PART
from dpruner.errors import InputError
from dpruner.formulas import FORMULAS
from dpruner.loading import DTYPES, blank_model, is_here, pick_device
from dpruner.masks import as_rows, ranked
from dpruner.memory import Plan, available_memory, parse_size
from dpruner.model import (count_weights, decoder_blocks, hidden_size, prunable_linears, require_length, stored_transposed,
                           usual_window)
from dpruner.walk import TOKENS_PER_PASS

PROGRAM = {"cpu": 380e6, "cuda": 700e6}   # bytes of Python, torch and the text before there is a model; on an accelerator of its context
SPARE = 1.15            # what allocators keep beyond what is in use
START = 5.0             # seconds until a process has imported everything
LOADING = 0.4e9         # bytes a second: read, checked for NaN and fingerprinted
EFFICIENCY = 0.38       # share of a bare matrix product's speed that passes through a model reach
HUB_CHARACTERS = 2000   # of a document nobody has downloaded yet
LOGITS = 12             # bytes for each word of the vocabulary and token: as they come, in a row, as log-probabilities; shorter ones in float32 too
PASSES = (1, 2, 4, 8, 16, 32)   # over the calibration
OUTSIDE = ("weights that wait", "general importance", "domain scores", "copy of the weights", "masks and weights", "Fishers", "scores of another method",
           "texts inside the model", "ranks", "masks and weights put aside")   # what lives outside the device's memory where a plan says so
SCORES = {"balanced": 4, "taylor": 12, "release": 8}   # bytes per prunable weight that a domain pass adds to


def precision(config: RunConfig, model: nn.Module, device: str) -> torch.dtype:
    """What the weights will be kept in, as `load_model` decides it; of a stored precision what the model's config says."""
    return DTYPES.get(config.dtype) or (torch.float32 if torch.device(device).type == "cpu" else _stored(model))


def _stored(model: nn.Module) -> torch.dtype:
    return getattr(model.config.get_text_config(), "dtype", None) or torch.float32


def require_fitting(config: RunConfig, model: nn.Module) -> None:
    """Refuse what the model has no positions or not enough prunable weights for.

    Raises:
        InputError: says which.
    """
    require_length(model, config.seqlen)
    require_length(model, config.eval_seqlen or 0, "eval_seqlen")
    pipeline.prunable_sparsity(config, model)
    require_memory(config, model, str(pick_device(config.device)))


def peak_memory(config: RunConfig, model: nn.Module, device: str, plan: Plan | None = None) -> dict[str, int]:
    """Bytes in use on the device at the worst moment of a run, by what they are for; counted, not measured.

    On a CPU it is memory that belongs to the process alone: pages of files, which the system can drop at any time, are not counted.

    Args:
        model: of `loading.blank_model`, or a loaded one.
        device: such as "cpu" or "cuda:0".
        plan: how it keeps to its limit; default what the config's limit asks for.
    """
    plan = plan or (choose(config, model, device, parse_size(config.memory)) if config.memory else Plan())
    kind = torch.device(device).type
    stages = _stages(config, model, precision(config, model, device).itemsize, plan, kind)
    worst = _worst([{what: size for what, size in parts.items() if not plan.outside or what not in OUTSIDE} for parts in stages])
    spare = 1 if plan.outside and kind == "cpu" else SPARE   # `memory.following` lets none be kept there
    return {"program": round(PROGRAM.get(kind, 0)), **{what: round(spare * size) for what, size in worst.items()}}


def outside(config: RunConfig, model: nn.Module, device: str, plan: Plan) -> dict[str, int]:
    """Bytes that live outside the device's memory at the worst moment of a run, by what they are for: in files of the cache folder.

    The system keeps them in the host's memory as long as that has room.

    Args:
        model, device, plan: as `peak_memory` takes them.
    """
    if not plan.outside:
        return {}
    stages = _stages(config, model, precision(config, model, device).itemsize, plan, torch.device(device).type)
    return {what: round(size) for what, size in _worst([{what: parts.get(what, 0) for what in OUTSIDE} for parts in stages]).items()}


def _worst(stages: list[dict[str, float]]) -> dict[str, float]:
    worst = max(stages, key=lambda parts: sum(parts.values()))
    return {what: size for what, size in worst.items() if size}


def _stages(config: RunConfig, model: nn.Module, item: int, plan: Plan, kind: str) -> list[dict[str, float]]:
    """Bytes in every stage of a run, on the device and, where the plan says so and OUTSIDE names them, outside it."""
    prunable, total = count_weights(model)
    blocks = [sum(p.numel() for p in block.parameters()) for block in decoder_blocks(model)[1]]
    always = {"weights": total * item, "general importance": 4 * prunable}
    if plan.outside and kind == "cpu":
        always |= {"weights": 0, "weights that wait": total * item}
    elif plan.offload:   # a block's visit
        always |= {"weights": (total - sum(blocks) + max(blocks)) * item, "weights that wait": sum(blocks) * item}
    scoring = _domain_pass(config, model, item, plan, kind)
    if kind == "cpu" and config.general_mode == "static" and not config.finetune and _stored(model).itemsize == item:
        scoring["weights"] = 0   # nothing has changed them yet: they are still pages of their file
    largest = max(m.weight.numel() for m in prunable_linears(model).values())
    scored = {"domain scores": 8 * prunable} if _is_scored(config) else {}
    ranking = {"ranks": prunable, "ranking of one matrix": 32 * largest}
    return [always | parts for parts in (*_walks(config, model, item, plan, kind), scoring, scored | ranking, scored | _judging(config, model, item))]


def _is_scored(config: RunConfig) -> bool:
    """Whether there is a domain pass whose scores are kept while the domain's models are made."""
    return pipeline.wants_sides(config) or bool({"domain", "general"} & set(config.methods))


def _walks(config: RunConfig, model: nn.Module, item: int, plan: Plan, kind: str) -> list[dict[str, float]]:
    """Of general importance, and of a compensation where there is one."""
    prunable, _ = count_weights(model)
    blocks = _linears_by_block(model)
    block = max(sum(m.weight.numel() for m in linears.values()) for linears in blocks)
    groups = max(map(_groups, blocks), key=lambda found: sum(n * n for n, _ in found))
    text = config.nsamples * config.seqlen * hidden_size(model) * item
    tokens = min(max(config.seqlen, TOKENS_PER_PASS), config.nsamples * config.seqlen)

    def walk(sets: int, refined: bool, static: bool = False) -> dict[str, float]:
        # of the linears that share an input: float32 copies, stacked ones, transposed ones; the factor of H in float64; then what `refine` steps with
        swept = 0 if static else 46 if refined else 18
        at_work = max(max((4 if static else 8) * n * out + 32 * n * n, swept * n * out + 16 * n * n) for n, out in groups)
        text_inside = tokens * sum(n for n, _ in groups) * item   # gone before the first sweep, but not for an allocator that keeps it
        at_work = at_work + text_inside if kind == "cpu" and not plan.outside else max(at_work, text_inside)
        return {"one block": (0 if static or plan.offload else item * block) + at_work, "Hessians": sets * sum(8 * n * n for n, _ in groups),
                "texts inside the model": sets * text}

    found = [walk(1, False, config.general_mode == "static")]
    if config.compensate or "sparsegpt" in config.methods:
        mixed = config.hessian if config.compensate else config.baseline_calibration
        walked = config.compensate == "walk" and "dpruner" in config.methods
        found.append(walk(2 if mixed == "mix" else 1, walked and config.refine > 0) | {
            "domain scores": prunable * (8 if _is_scored(config) else 0), "masks and weights": prunable * (1 + item),
            "Fishers": prunable * (8 if config.fisher == "both" else 4) if walked else 0,
            "scores of another method": prunable * 4 if config.compensate == "after" and {"wanda", "magnitude", "random"} & set(config.methods) else 0})
    return found


def _linears_by_block(model: nn.Module) -> list[dict[str, nn.Module]]:
    """The prunable linears of each block that has any."""
    prefix, _ = decoder_blocks(model)
    found: dict[str, dict[str, nn.Module]] = {}
    for name, m in prunable_linears(model).items():
        found.setdefault(name.removeprefix(f"{prefix}.").partition(".")[0], {})[name] = m
    return list(found.values())


def _groups(linears: Mapping[str, nn.Module]) -> list[tuple[int, int]]:
    """(width, outputs) of the linears of a block that may share an input: those of one module with one width."""
    found: Counter[tuple[str, int]] = Counter()
    for name, m in linears.items():
        out, width = as_rows(m.weight, stored_transposed(m)).shape
        found[name.rsplit(".", 2)[0], width] += out
    return [(width, outputs) for (_, width), outputs in found.items()]


def _domain_pass(config: RunConfig, model: nn.Module, item: int, plan: Plan, kind: str) -> dict[str, float]:
    """Scores, one gradient, and what backward needs of the text that passes through."""
    prunable, total = count_weights(model)
    here = not plan.outside or kind != "cpu" and not (plan.offload and config.finetune)   # a tuned model's are added to where its weights are
    in_pass = prunable / (1 if config.finetune else plan.passes)
    found = {"domain scores": SCORES[config.formula] * prunable}
    if plan.outside and here:
        found = {"domain scores": 8 * prunable, "scores of a part": SCORES[config.formula] * in_pass, "weights of a part": item * in_pass * plan.offload,
                 "general importance of a part": 4 * in_pass * FORMULAS[config.formula].regards_general}
    if config.finetune and (kind == "cpu" or plan.outside):
        found["copy of the weights"] = total * item
    return found | {"gradients and activations": _passing(config, model, item, plan.checkpointing or plan.offload)}


def _passing(config: RunConfig, model: nn.Module, item: int, twice: bool) -> float:
    """What a forward and a backward pass need beside weights and scores: at the loss, or when the gradients of the head or of a block are there.

    Args:
        twice: blocks keep their input only, and are computed a second time.
    """
    shapes, blocks = [tuple(m.weight.shape) for m in prunable_linears(model).values()], len(decoder_blocks(model)[1])
    embedding, head = model.get_input_embeddings().weight, getattr(model.get_output_embeddings(), "weight", None)
    vocabulary, hidden = embedding.shape
    tokens, words = config.seqlen, 0
    gradient = max(a * b for a, b in shapes)
    gradient = gradient * item + 12 * min(gradient, max(gradient // 16, SMALLEST_PART))   # and what is computed on a part of it
    if config.finetune:
        tokens, words = min(8, config.nsamples) * min(config.seqlen, 1024), vocabulary * hidden * item
    of_linears = int(1.2 * (sum(map(sum, shapes)) * item + hidden * 4 * blocks))   # in- and outputs
    kept, block = (hidden * item * blocks, of_linears / blocks) if twice else (of_linears, 0)
    held = words if head is embedding else 0   # until the embedding's own gradient joins it
    return tokens * kept + max(tokens * LOGITS * vocabulary, tokens * 8 * vocabulary + words, tokens * block + gradient + held, words + held)


def _judging(config: RunConfig, model: nn.Module, item: int) -> dict[str, float]:
    """A pruned model, and its perplexity."""
    prunable, _ = count_weights(model)
    aside = 2 * item if config.compensate or "sparsegpt" in config.methods else config.sparsity * item   # moved weights, and the original ones
    found = {"masks and weights put aside": (2 + aside) * prunable}
    if not config.evaluate:
        return found
    widest = max(max(m.weight.shape) for m in prunable_linears(model).values())
    tokens = max(config.eval_seqlen or usual_window(model), TOKENS_PER_PASS)
    return found | {"evaluation": tokens * (LOGITS * model.get_input_embeddings().weight.shape[0] + 4 * widest * item)}


def choose(config: RunConfig, model: nn.Module, device: str, allowance: int) -> Plan:
    """The plan that changes least of those that keep to so many bytes; where none does, the most sparing one."""
    if distributed.several():
        return Plan()   # what they do together is laid out in another way
    accelerator = torch.device(device).type != "cpu"
    outside = [Plan(outside=True, passes=passes) for passes in (PASSES if accelerator else (1,))]
    plans = [Plan(), *outside, *(dataclasses.replace(plan, checkpointing=True) for plan in outside)]
    plans += [dataclasses.replace(plan, offload=True) for plan in outside if accelerator]   # which computes blocks twice by itself
    return next((p for p in plans if sum(peak_memory(config, model, device, p).values()) <= allowance), plans[-1])


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
                         f"at its most sparing it takes {needed / 1e9:.2f} GB, most of it for {most} ({parts[most] / 1e9:.2f} GB)",
                         "; or ".join(r.words for r in helpful) or f"allow it {needed / 1e9 + 0.01:.2f}GB")


def plan_of(config: RunConfig) -> Plan:
    """How a run keeps to the memory it may use, or else to what is free on its device.

    Raises:
        InputError: it cannot.
    """
    device = str(pick_device(config.device))
    if config.memory is None:
        with contextlib.suppress(InputError):   # of a model that cannot be loaded: said when it is
            return choose(config, blank_model(config.model, config.revision), device, available_memory(device))
        return Plan()
    model = blank_model(config.model, config.revision)
    require_memory(config, model, device)
    return choose(config, model, device, parse_size(config.memory))


def advice(config: RunConfig, model: nn.Module) -> str:
    """What to do when a run has found too little memory."""
    device = str(pick_device(config.device))
    helpful = remedies(config, model, device, int(0.9 * sum(peak_memory(config, model, device).values())))
    return "; or ".join(r.words for r in helpful) or "choose a smaller model or another device"


def disk(config: RunConfig, model: nn.Module) -> int:
    """Bytes of the run folder and of the general importance in the cache."""
    prunable, _ = count_weights(model)
    masks, ranks = _files(config)
    moved = len(config.domains) * len(config.methods) if config.compensate else 0
    return round(prunable * (masks / 8 + ranks + 4 * moved + 4))


def _files(config: RunConfig) -> tuple[int, int]:
    """How many mask files and rank files a run writes."""
    halves = 2 * len(set(pipeline.HALVED) & set(config.methods)) if pipeline.wants_halves(config) else 0
    masks = len(config.methods) + halves
    sides = len({"domain", "general"} - set(config.methods)) if "dpruner" in config.methods else 0
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
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    times, began = [], time.perf_counter()
    while len(times) < 5 or time.perf_counter() - began < least:
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return min(times)   # what else the machine does at this moment is no property of the device


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


def seconds(config: RunConfig, model: nn.Module, texts: Outline, speed: Speed, device: str) -> float:
    """How long a run takes on a device that has nothing else to do, without downloads: its planned work at the measured speed."""
    prunable, total = count_weights(model)
    passes = sum(planned.cost for planned in pipeline.planned_work(config, texts))
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
    """Changes each of which makes a run fit, the least harmful first; where none does alone, all of them together if that fits.

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

    now = sum(peak_memory(config, model, device).values())
    helpful = [r for r in (remedy(*step) for step in steps) if r.bytes < now]
    limited = remedy(f"keep to a limit (memory {available / 1e9:.3g}GB; a run does so by itself where too little is free): slower, with the same "
                     "result", {"memory": f"{available // 1000}KB"})
    if config.memory is None and limited.bytes <= available:
        return [limited, *(r for r in helpful if r.bytes <= available)]
    if enough := [r for r in helpful if r.bytes <= available]:
        return enough
    together = remedy("; ".join(r.words for r in helpful), {k: v for r in helpful for k, v in r.changes.items()})
    return [together] if together.bytes <= available else []


def to_download(name: str, revision: str | None, model: nn.Module) -> int:
    """Bytes of weights that are not on this machine yet, from their count and the precision that the config tells; 0 where they are."""
    if is_here(name, revision):
        return 0
    return count_weights(model)[1] * _stored(model).itemsize
