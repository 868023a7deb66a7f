"""Memory of a run at its worst moment, counted from the shapes of its model: on the device, outside it, and of the host. No weights are loaded."""

import dataclasses
from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn

from dpruner import distributed
from dpruner.config import RunConfig
from dpruner.domain import SMALLEST_PART
from dpruner.formulas import FORMULAS
from dpruner.loading import DTYPES
from dpruner.masks import as_rows
from dpruner.memory import Plan, parse_size
from dpruner.model import count_weights, decoder_blocks, hidden_size, prunable_linears, stored_transposed, usual_window
from dpruner.plan import wants_fishers, wants_halves, wants_sides
from dpruner.walk import TOKENS_PER_PASS

PROGRAM = {"cpu": 380e6, "cuda": 700e6}   # bytes of Python, torch and the text before there is a model; on an accelerator of its context
SPARE = 1.15            # what allocators keep beyond what is in use
LOGITS = 12             # bytes for each word of the vocabulary and token: as they come, in a row, as log-probabilities; shorter ones in float32 too
OUTSIDE = ("weights that wait", "general importance", "domain scores", "copy of the weights", "masks and weights", "Fishers", "scores of another method",
           "texts inside the model", "ranks", "masks and weights put aside")   # what lives outside the device's memory where a plan says so
PASSES = (1, 2, 4, 8, 16, 32)   # over the calibration
SCORES = {"balanced": 4, "taylor": 12, "release": 8, "fisher": 4}   # bytes per prunable weight that a pass with gradients adds to


def precision(config: RunConfig, model: nn.Module, device: str) -> torch.dtype:
    """What the weights will be kept in, as `load_model` decides it; of a stored precision what the model's config says."""
    return DTYPES.get(config.dtype) or (torch.float32 if torch.device(device).type == "cpu" else stored(model))


def stored(model: nn.Module) -> torch.dtype:
    return getattr(model.config.get_text_config(), "dtype", None) or torch.float32


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
    """Bytes that live outside the device's memory at the worst moment of a run, by what they are for: in files of the cache folder or on the host.

    Args:
        model, device, plan: as `peak_memory` takes them.
    """
    if not plan.outside:
        return {}
    stages = _stages(config, model, precision(config, model, device).itemsize, plan, torch.device(device).type)
    return {what: round(size) for what, size in _worst([{what: parts.get(what, 0) for what in OUTSIDE} for parts in stages]).items()}


def host_memory(config: RunConfig, model: nn.Module, device: str, plan: Plan) -> dict[str, int]:
    """Bytes that a run on an accelerator takes of the host's own memory, beside what lives outside; none on a CPU, which `peak_memory` is about.

    Args:
        model, device, plan: as `peak_memory` takes them.
    """
    if torch.device(device).type == "cpu":
        return {}
    total, item = count_weights(model)[1], precision(config, model, device).itemsize
    converted = stored(model).itemsize != item and not plan.offload
    passing = {"a tensor on its way": 4 * max(p.numel() for p in model.parameters()), "weights as they are read": total * item * converted,
               "copy of the weights": total * item * config.finetune * (not plan.outside)}
    most = max(passing, key=passing.get)
    return {"program": round(PROGRAM["cpu"]), most: passing[most]}


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
    passes = [_domain_pass(config, model, item, plan, kind)] if _is_scored(config) else []
    passes += [_fisher_pass(config, model, item, plan, kind)] if wants_fishers(config) else []
    if kind == "cpu" and _weights_as_read(config) and stored(model).itemsize == item:
        passes = [found | {"weights": 0} for found in passes]   # they are still pages of their file
    largest = max(m.weight.numel() for m in prunable_linears(model).values())
    scored = {"domain scores": 8 * prunable} if _is_scored(config) else {}
    ranking = {"ranks": prunable, "ranking of one matrix": 32 * largest}
    return [always | parts for parts in (*_walks(config, model, item, plan, kind), *passes, scored | ranking, scored | _judging(config, model, item))]


def _weights_as_read(config: RunConfig) -> bool:
    """Whether nothing has changed the weights when gradients are taken."""
    first_of_all = len(config.domains) == 1 and not wants_halves(config) and (len(config.methods) == 1 or wants_sides(config))
    return first_of_all and config.general_mode == "static" and not config.finetune


def _is_scored(config: RunConfig) -> bool:
    """Whether there is a domain pass whose scores are kept while the domain's models are made."""
    return wants_sides(config) or bool({"domain", "general"} & set(config.methods))


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
        text_inside = tokens * sum(n for n, _ in groups) * item + 2 * tokens / config.seqlen * _attention(model, config.seqlen, item)   # gone before the first sweep, but not for an allocator that keeps it
        at_work = at_work + text_inside if kind == "cpu" and not plan.outside else max(at_work, text_inside)
        return {"one block": (0 if static or plan.offload else item * block) + at_work, "Hessians": sets * sum(8 * n * n for n, _ in groups),
                "texts inside the model": sets * text}

    found = [walk(1, False, config.general_mode == "static")]
    if config.compensate or "sparsegpt" in config.methods:
        mixed = config.hessian if config.compensate else config.baseline_calibration
        walked = wants_fishers(config)
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
    """(width, outputs) of the linears of a block that may share an input: those of one module with one width, save for the one that it ends with."""
    modules: dict[str, list[tuple[int, int]]] = {}
    for name, m in linears.items():
        modules.setdefault(name.rsplit(".", 2)[0], []).append(tuple(as_rows(m.weight, stored_transposed(m)).shape))
    groups = []
    for shapes in modules.values():
        ends = [shapes.pop()] if len(shapes) > 1 and len({width for _, width in shapes}) == 1 else []   # it reads what the others have made
        found: Counter[int] = Counter()
        for out, width in shapes:
            found[width] += out
        groups += [*found.items(), *((width, out) for out, width in ends)]
    return groups


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
    return found | {"gradients and activations": _passing(config, model, item, plan.checkpointing or plan.offload, config.finetune)}


def _fisher_pass(config: RunConfig, model: nn.Module, item: int, plan: Plan, kind: str) -> dict[str, float]:
    """The domain's Fisher, beside the open domain's where both count."""
    prunable, _ = count_weights(model)
    found = {"Fishers": prunable * SCORES["fisher"] * (2 if config.fisher == "both" else 1)}
    if plan.outside and kind != "cpu":
        in_pass = prunable / plan.passes
        found |= {"Fishers of a part": SCORES["fisher"] * in_pass, "weights of a part": item * in_pass * plan.offload}
    return found | {"gradients and activations": _passing(config, model, item, plan.checkpointing or plan.offload)}


def _passing(config: RunConfig, model: nn.Module, item: int, twice: bool, tuned: bool = False) -> float:
    """What a forward and a backward pass need beside weights and scores: at the loss, or when the gradients of the head or of a block are there.

    Args:
        twice: blocks keep their input only, and are computed a second time.
        tuned: every parameter has a gradient, and several sequences pass together.
    """
    shapes, blocks = [tuple(m.weight.shape) for m in prunable_linears(model).values()], len(decoder_blocks(model)[1])
    embedding, head = model.get_input_embeddings().weight, getattr(model.get_output_embeddings(), "weight", None)
    vocabulary, hidden = embedding.shape
    length, sequences, words = config.seqlen, 1, 0
    gradient = max(a * b for a, b in shapes)
    gradient = gradient * item + 12 * min(gradient, max(gradient // 16, SMALLEST_PART))   # and what is computed on a part of it
    if tuned:
        length, sequences, words = min(config.seqlen, 1024), min(8, config.nsamples), vocabulary * hidden * item
    tokens = sequences * length
    attention = sequences * _attention(model, length, item)
    of_linears = tokens * int(1.2 * (sum(map(sum, shapes)) * item + hidden * 4 * blocks))   # in- and outputs
    kept, block = (tokens * hidden * item * blocks, of_linears / blocks + attention) if twice else (of_linears + attention * blocks, 0)
    block += 2 * attention   # gradients of its weights, before and after the softmax
    held = words if head is embedding else 0   # until the embedding's own gradient joins it
    return kept + max(tokens * LOGITS * vocabulary, tokens * 8 * vocabulary + words, block + gradient + held, words + held)


def _attention(model: nn.Module, length: int, item: int) -> float:
    """Bytes that backward needs of a block's attention weights for a sequence; none where attention is fused, which computes them again."""
    config = model.config.get_text_config()
    if getattr(config, "_attn_implementation", None) != "eager":
        return 0
    return config.num_attention_heads * length ** 2 * (4 + (item if item < 4 else 0))   # the softmax is float32


def _judging(config: RunConfig, model: nn.Module, item: int) -> dict[str, float]:
    """A pruned model, and its perplexity."""
    prunable, _ = count_weights(model)
    aside = 2 * item if config.compensate or "sparsegpt" in config.methods else config.sparsity * item   # moved weights, and the original ones
    found = {"masks and weights put aside": (2 + aside) * prunable}
    if not config.evaluate:
        return found
    widest = max(max(m.weight.shape) for m in prunable_linears(model).values())
    window = config.eval_seqlen or usual_window(model)
    tokens = max(window, TOKENS_PER_PASS)
    return found | {"evaluation": tokens * (LOGITS * model.get_input_embeddings().weight.shape[0] + 4 * widest * item)
                    + 2 * tokens / window * _attention(model, window, item)}


def choose(config: RunConfig, model: nn.Module, device: str, allowance: int) -> Plan:
    """The plan that changes least of those that keep to so many bytes; where none does, the most sparing one."""
    if distributed.several():
        return Plan()   # what they do together is laid out in another way
    accelerator = torch.device(device).type != "cpu"
    outside = [Plan(outside=True, passes=passes) for passes in (PASSES if accelerator else (1,))]
    plans = [Plan(), *outside, *(dataclasses.replace(plan, checkpointing=True) for plan in outside)]
    plans += [dataclasses.replace(plan, offload=True) for plan in outside if accelerator]   # which computes blocks twice by itself
    return next((p for p in plans if sum(peak_memory(config, model, device, p).values()) <= allowance), plans[-1])
