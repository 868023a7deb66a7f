"""What a model makes of the items of a task: likelihoods of candidates, greedy summaries, losses of texts. One row for each item.

Everything is batched, and padding hides what it adds: a batch of one gives the same figures but for rounding. Items go in fixed groups, so an
evaluation that was cut short goes on with the very batches it would have had.
"""

import inspect
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from torch import nn

from dpruner.errors import InputError
from dpruner.evaluate import window_losses
from dpruner.generate import end_tokens
from dpruner.model import max_length
from dpruner.tasks import Item, Task
from dpruner.walk import TOKENS_PER_PASS, Progress, quiet

GROUP = 32           # items between two saves
NEW_TOKENS = 128     # of a summary, at most; fewer where every reference is shorter
TOGETHER = 4 * TOKENS_PER_PASS   # tokens in the memory of a batch that generates: one new token at a time keeps no processor busy


def answered(model: nn.Module, tokenizer, task: Task, start: int = 0, *, batch_size: int | None = None, seqlen: int | None = None,
             progress: Progress = quiet) -> Iterator[tuple[int, pd.DataFrame]]:
    """Go through a task's items.

    Args:
        start: how many items are done already, as an earlier call has yielded it.
        batch_size: sequences a forward pass; default as many as make 1,024 tokens.
        seqlen: tokens a window, for perplexity; default as there.
        progress: called with (task's name, items done, items).

    Yields:
        (items done so far, rows of the latest group): always id, and
        for candidates answer, chosen, right, candidates (how many), scores (log-likelihood per token of each, nats), shortened;
        for summaries text, rouge1, rouge2, rougeL, shortened; for texts a row for each window: loss (nats), tokens.

    Raises:
        InputError: the model has no room for a summary, or gives a candidate no finite likelihood.
    """
    room = summary_tokens(tokenizer, task.items) if task.kind == "summary" else 0
    progress(task.name, start, len(task.items))
    for begin in range(start, len(task.items), GROUP):
        items = task.items[begin:begin + GROUP]
        if task.kind == "perplexity":
            rows = read(model, tokenizer, items, seqlen, batch_size)
        elif task.kind == "summary":
            rows = summarised(model, tokenizer, items, room, batch_size)
        else:
            rows = chosen(model, tokenizer, items, batch_size)
        progress(task.name, begin + len(items), len(task.items))
        yield begin + len(items), rows


def text_ids(tokenizer, text: str) -> list[int]:
    """Token ids of a text that goes on: with whatever opens a text and without what closes it."""
    ids = list(tokenizer(text, verbose=False).input_ids)
    while ids and ids[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id:
        ids.pop()
    return ids or [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None][:1]


# ---- candidates


def candidate_ids(model: nn.Module, tokenizer, item: Item) -> tuple[list[tuple[list[int], int]], bool]:
    """Prompt and candidate as tokens, for each candidate.

    What is too long for the model loses the end of its candidates beyond half of the model's positions, then the beginning of its prompt, as
    many tokens for every candidate.

    Returns:
        ([(ids of both, how many of them are the prompt's)], whether something was left out).
    """
    prompt, found = text_ids(tokenizer, item.prompt), []
    for candidate in item.candidates:
        ids = text_ids(tokenizer, item.prompt + candidate) if item.prompt else prompt + _bare(tokenizer, candidate)
        shared = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), min(len(prompt), len(ids)))
        found.append((ids, max(1, min(shared, len(ids) - 1))))
    limit = max_length(model)
    if not limit or max(len(ids) for ids, _ in found) - 1 <= limit:   # the last token is predicted, never read
        return found, False
    found = [(ids[:n + limit // 2], n) for ids, n in found]
    over = max(0, max(len(ids) for ids, _ in found) - 1 - limit)
    head = int(prompt[0] == tokenizer.bos_token_id)
    return [(ids[:head] + ids[head + over:], n - over) for ids, n in found], True


def _bare(tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, verbose=False, add_special_tokens=False).input_ids)


@torch.inference_mode()
def log_likelihoods(model: nn.Module, sequences: Sequence[tuple[list[int], int]], batch_size: int | None = None) -> list[float]:
    """Log-likelihood in nats of the end of each sequence, given its beginning.

    Args:
        sequences: (ids, how many of them are given).
    """
    # the last token is only predicted, so candidates of one token are all read off the same pass over their prompt
    wanted: dict[tuple[int, ...], list[int]] = {}
    for i, (ids, _) in enumerate(sequences):
        wanted.setdefault(tuple(ids[:-1]), []).append(i)
    found = [0.0] * len(sequences)
    for batch in batches(list(wanted), batch_size, TOKENS_PER_PASS):
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in batch], batch_first=True)   # on the right: a causal model sees none of it
        logits = model(input_ids=padded.to(model.device), use_cache=False).logits
        for row, fed in zip(logits, batch, strict=True):
            for i in wanted[fed]:
                ids, given = sequences[i]
                log_probs = row[given - 1:len(ids) - 1].double().log_softmax(-1)
                found[i] = float(log_probs.gather(1, torch.tensor(ids[given:], device=row.device)[:, None]).sum())
    return found


def batches(sequences: list, batch_size: int | None, tokens: int) -> Iterator[list]:
    """Sequences of like lengths together, the longest first, as many as make `tokens` with their padding."""
    left = sorted(sequences, key=len, reverse=True)
    while left:
        size = batch_size or max(1, tokens // len(left[0]))
        yield left[:size]
        left = left[size:]


def chosen(model: nn.Module, tokenizer, items: Sequence[Item], batch_size: int | None = None) -> pd.DataFrame:
    """Rows of items with candidates: the one of the highest log-likelihood per token is chosen, the first of several."""
    laid_out = [candidate_ids(model, tokenizer, item) for item in items]
    found = iter(log_likelihoods(model, [sequence for sequences, _ in laid_out for sequence in sequences], batch_size))
    rows = []
    for item, (sequences, shortened) in zip(items, laid_out, strict=True):
        scores = [next(found) / (len(ids) - given) for ids, given in sequences]
        if not np.isfinite(scores).all():
            raise InputError(f"The item {item.id} cannot be scored", "the model gives its candidates no finite likelihood",
                             "load the model in another precision, or prune it less")
        best = int(np.argmax(scores))
        rows.append({"id": item.id, "answer": item.answer, "chosen": best, "right": best == item.answer, "candidates": len(scores), "scores": scores,
                     "shortened": shortened})
    return pd.DataFrame(rows)


# ---- summaries


def summary_tokens(tokenizer, items: Sequence[Item]) -> int:
    """How many tokens a summary may have: as many as the longest reference, 128 at most."""
    return min(NEW_TOKENS, max(len(_bare(tokenizer, f" {item.reference}")) for item in items))


def summary_ids(model: nn.Module, tokenizer, item: Item, room: int) -> tuple[list[int], bool]:
    """The prompt of a summary as tokens; a document that is too long loses its end.

    Returns:
        (ids, whether it was shortened).

    Raises:
        InputError: not even the question fits.
    """
    ids, limit = text_ids(tokenizer, item.prompt), (max_length(model) or np.inf) - room
    if len(ids) <= limit:
        return ids, False
    context = _bare(tokenizer, item.context)
    keep = len(context)
    while len(ids) > limit and keep > 0:
        keep = max(0, keep - int(len(ids) - limit))
        ids = text_ids(tokenizer, tokenizer.decode(context[:keep]) + item.ask)
    if len(ids) > limit or not keep:
        raise InputError(f"The item {item.id} cannot be given to the model", f"it takes {max_length(model)} tokens, {room} of them for the summary",
                         "choose a model that takes longer texts")
    return ids, True


@torch.inference_mode()
def continued(model: nn.Module, prompts: Sequence[Sequence[int]], count: int, ends: frozenset[int] = frozenset()) -> list[list[int]]:
    """Greedy continuations of several prompts at once, padded on the left.

    Args:
        prompts: ids, at least one each.
        count: new tokens, at most.
        ends: tokens that end a text; they are not returned.
    """
    width = max(map(len, prompts))
    fed = torch.tensor([[*[0] * (width - len(p)), *p] for p in prompts], device=model.device)
    mask = torch.tensor([[*[0] * (width - len(p)), *[1] * len(p)] for p in prompts], device=model.device)
    counted = "position_ids" in inspect.signature(model.forward).parameters   # others find positions from the mask, or have none
    made, going, past = [[] for _ in prompts], set(range(len(prompts))), None
    for _ in range(count):
        positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -fed.shape[1]:]} if counted else {}
        out = model(input_ids=fed, attention_mask=mask, past_key_values=past, use_cache=True, **positions)
        past, fed = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(fed)], dim=1)
        for row in list(going):
            token = int(fed[row])
            if token in ends:
                going.remove(row)
            else:
                made[row].append(token)
        if not going:
            break
    return made


def summarised(model: nn.Module, tokenizer, items: Sequence[Item], room: int, batch_size: int | None = None) -> pd.DataFrame:
    """Rows of items with a reference: greedy text up to its first blank line, and its F1 of ROUGE-1, -2 and -L with stemming.

    Args:
        room: new tokens, at most.
    """
    from rouge_score.rouge_scorer import RougeScorer   # slow to import

    scorer, ends = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True), end_tokens(model, tokenizer)
    prompts = [summary_ids(model, tokenizer, item, room) for item in items]
    texts: dict[tuple[int, ...], str] = {}
    for batch in batches(list(dict.fromkeys(tuple(ids) for ids, _ in prompts)), batch_size, TOGETHER):
        for ids, made in zip(batch, continued(model, batch, room, ends), strict=True):
            texts[ids] = tokenizer.decode(made, skip_special_tokens=True).strip().partition("\n\n")[0]
    rows = []
    for item, (ids, shortened) in zip(items, prompts, strict=True):
        text = texts[tuple(ids)]
        scores = scorer.score(item.reference, text)
        rows.append({"id": item.id, "text": text, **{name: score.fmeasure for name, score in scores.items()}, "shortened": shortened})
    return pd.DataFrame(rows)


# ---- texts


def read(model: nn.Module, tokenizer, items: Sequence[Item], seqlen: int | None = None, batch_size: int | None = None) -> pd.DataFrame:
    """Rows of texts: a row for each window, see `evaluate.window_losses`."""
    texts, losses, tokens = window_losses(model, tokenizer, [item.context for item in items], seqlen, batch_size=batch_size)
    number = pd.Series(texts, dtype=np.int64).groupby(texts).cumcount() if len(texts) else []
    return pd.DataFrame({"id": [f"{items[t].id}:{k}" for t, k in zip(texts, number, strict=True)], "loss": losses, "tokens": tokens.astype(np.int64)})
