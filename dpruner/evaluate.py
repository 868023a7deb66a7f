"""Quality of a model on text: perplexity, with its interval (METHOD section 7)."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dpruner.errors import InputError
from dpruner.model import max_length, usual_window
from dpruner.partial import NOTHING, Checkpoint
from dpruner.walk import TOKENS_PER_PASS, Progress, quiet

RESAMPLES = 2000
CELLS = 2**22   # picks held in memory at once


class Estimate(float):
    """A figure with its 95 % interval and sample size; a plain float everywhere else.

    Attributes:
        low, high: bounds of the bootstrap interval.
        n: how many independent pieces (windows of text, questions) it rests on.
        tokens: how many tokens were predicted, where that applies.
    """

    def __new__(cls, value: float, low: float, high: float, n: int, tokens: int = 0):
        self = super().__new__(cls, value)
        self.low, self.high, self.n, self.tokens = low, high, n, tokens
        return self

    def __repr__(self):
        return f"{float(self):.4g} [{self.low:.4g}, {self.high:.4g}] (n = {self.n})"

    def __reduce__(self):
        return Estimate, (float(self), self.low, self.high, self.n, self.tokens)


def require_seed(seed: int) -> None:
    """Refuse a seed that not every generator takes.

    Raises:
        InputError: says so.
    """
    if not 0 <= seed < 2**63:
        raise InputError(f"The seed {seed} cannot be used", "it is a whole number from 0, below 2⁶³", "give a number such as 0")


def picks(n: int, seed: int) -> Iterator[np.ndarray]:
    """Which of n pieces each of 2,000 draws with replacement takes; int (draws, n), some draws at a time."""
    generator = np.random.default_rng(seed)
    at_once = max(1, CELLS // n)
    for start in range(0, RESAMPLES, at_once):
        yield generator.integers(0, n, (min(at_once, RESAMPLES - start), n))


def bootstrap_ratio(sums: np.ndarray, counts: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of Σ sums / Σ counts over pieces drawn with replacement.

    Args:
        sums, counts: (pieces,).
    """
    ratios = np.concatenate([sums[some].sum(1) / counts[some].sum(1) for some in picks(len(sums), seed)])
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)


def windows(length: int, seqlen: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, stop, first new token) of each window over a text of `length` tokens; every token but the first is new exactly once."""
    spans, done = [], 1
    start = 0
    while done < length:
        stop = min(start + seqlen, length)
        spans.append((start, stop, done))
        done, start = stop, min(start + stride, stop - 1)   # a token is predicted from at least the one before it
    return spans


def perplexity(model: nn.Module, tokenizer, texts: list[str], seqlen: int | None = None, stride: int | None = None, *, batch_size: int | None = None,
               seed: int = 0, stage: str = "perplexity", progress: Progress = quiet, checkpoint: Checkpoint = NOTHING) -> Estimate:
    """Perplexity over texts, each its own context: windows of `seqlen` tokens every `stride`, of which only the new tokens count.

    Args:
        texts: documents; one of fewer than two tokens says nothing and is passed over.
        seqlen: tokens a window; default `usual_window`.
        stride: default half the window, at most 512.
        batch_size: windows a forward pass, default as many as make 1,024 tokens; changes the result by rounding only.
        seed: of the bootstrap, which resamples windows.
        checkpoint: where the sums are kept after a batch, and from which an earlier evaluation is continued.

    Returns:
        Estimate of exp(mean negative log-likelihood in nats); `n` counts windows.

    Raises:
        InputError: no text to predict, a window longer than the model allows, a stride outside 1..seqlen, or a negative seed.
    """
    require_seed(seed)
    _, sums, counts = window_losses(model, tokenizer, texts, seqlen, stride, batch_size=batch_size, stage=stage, progress=progress,
                                    checkpoint=checkpoint)
    return of_windows(sums, counts, seed)


def of_windows(sums: np.ndarray, counts: np.ndarray, seed: int = 0) -> Estimate:
    """Perplexity from the losses of windows, see `window_losses`.

    Args:
        sums, counts: (windows,).
        seed: of the bootstrap.

    Raises:
        InputError: there is no window.
    """
    if not len(sums):
        raise InputError("The perplexity cannot be computed", "the texts hold no two tokens in a row", "give at least one sentence of text")
    low, high = bootstrap_ratio(sums, counts, seed)
    return Estimate(*np.exp([sums.sum() / counts.sum(), low, high]).tolist(), n=len(sums), tokens=int(counts.sum()))


@torch.inference_mode()
def window_losses(model: nn.Module, tokenizer, texts: list[str], seqlen: int | None = None, stride: int | None = None, *,
                  batch_size: int | None = None, stage: str = "perplexity", progress: Progress = quiet,
                  checkpoint: Checkpoint = NOTHING) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What perplexity is made of: the loss of every window, in the order of the texts. Arguments as there.

    Returns:
        (index of the text each window is from, sum of the negative log-likelihoods of its new tokens in nats, their count), each (windows,).

    Raises:
        InputError: a window longer than the model allows, or a stride outside 1..seqlen.
    """
    limit = max_length(model)
    seqlen = usual_window(model) if seqlen is None else seqlen
    stride = max(1, min(512, seqlen // 2)) if stride is None else stride
    if not 2 <= seqlen <= (limit or seqlen) or not 1 <= stride <= seqlen:
        allowed = f"2 to {limit}" if limit else "2 or more"
        raise InputError(f"Windows of {seqlen} tokens every {stride} cannot be evaluated", f"the model takes {allowed} tokens and the stride fits into a window",
                         f"choose a seqlen of {allowed} and a stride from 1 to seqlen")
    pieces, origins = [], []
    for origin, text in enumerate(texts):
        ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
        pieces += [(ids[start:stop], new - start) for start, stop, new in windows(len(ids), seqlen, stride)]
        origins += [origin] * (len(pieces) - len(origins))
    order = sorted(range(len(pieces)), key=lambda i: -len(pieces[i][0]))   # like lengths together, so that little is padded
    start, saved = checkpoint.load()
    totals = saved["totals"] if start else torch.zeros(2, len(pieces), dtype=torch.float64)
    sums, counts = totals.numpy()   # views: what is written to them is in the totals
    batch_size = batch_size or max(1, TOKENS_PER_PASS // max((len(ids) for ids, _ in pieces), default=1))
    for at in range(start, len(order), batch_size):
        progress(stage, at, len(order))
        chosen = order[at:at + batch_size]
        for i, losses in zip(chosen, _losses(model, [pieces[i][0] for i in chosen]), strict=True):
            new = losses[pieces[i][1] - 1:]
            sums[i], counts[i] = new.sum(), len(new)
        checkpoint.offer(at + batch_size, lambda: {"totals": totals})
    progress(stage, len(order), len(order))
    return np.array(origins, dtype=np.int64), sums, counts


def _losses(model, sequences: list[torch.Tensor]) -> list[np.ndarray]:
    """Negative log-likelihood in nats of every token but the first of each sequence; padded on the right, which a causal model cannot see."""
    lengths = [len(s) for s in sequences]
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
    return [row[:length - 1].double().cpu().numpy() for row, length in zip(losses, lengths, strict=True)]
