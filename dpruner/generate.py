"""Generation: one token after the other from any decoder, each with the log-probability the model gave it."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dpruner.errors import InputError
from dpruner.evaluate import require_seed
from dpruner.model import max_length

UNFINISHED = "\N{REPLACEMENT CHARACTER}"   # what decoders write for the beginning of a character whose other bytes are in the next token


@dataclass(frozen=True)
class Token:
    """One generated token.

    Attributes:
        id: in the vocabulary.
        text: what it adds to the text; empty for an end token, and where a character only ends with a later token.
        log_prob: natural logarithm of its probability under the model itself, whatever temperature and nucleus it was drawn with.
        end: whether the model ends its text with it.
    """

    id: int
    text: str
    log_prob: float
    end: bool = False


def generate(model: nn.Module, tokenizer, prompt: str, *, max_new_tokens: int = 64, temperature: float = 0.0, top_p: float = 1.0,
             seed: int = 0, stop: bool = True) -> Iterator[Token]:
    """Continue a prompt, token by token, with the cache of keys and values.

    Sampling adds Gumbel noise to the log-probabilities and takes the highest (the Gumbel-max trick), with noise from the seed alone: models
    that agree draw the same token, so two texts of one seed part only where the models do.

    Args:
        model: as `load_model` gives it, pruned or not.
        prompt: text; an empty one begins with the token that opens a text, where the tokenizer has one.
        max_new_tokens: at most so many, and never more than the model has positions for.
        temperature: 0 takes the most probable token (greedy); above, tokens are drawn from the probabilities to the power 1/temperature.
        top_p: draw only from the most probable tokens that together have this probability, 0 to 1 (the nucleus).
        seed: of the drawing.
        stop: end with the model's end token; False goes on to `max_new_tokens`, for measuring speed.

    Yields:
        Token, the end token included.

    Raises:
        InputError: at once, before the first token: a setting out of range, a prompt of no tokens, or of more than the model takes.
    """
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise InputError(f"{max_new_tokens!r} new tokens cannot be generated", "it is a count of 1 or more", "give a number such as 64")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"The temperature {temperature} cannot be used", "it is 0 or more; 0 is greedy", "give a number such as 0.8")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p = {top_p} cannot be used", "it is a share of probability, above 0 and up to 1", "give a number such as 0.9")
    require_seed(seed)
    ids = prompt_ids(model, tokenizer, prompt)
    room = (max_length(model) or len(ids) + max_new_tokens) - len(ids)
    ends = end_tokens(model, tokenizer) if stop else frozenset()
    return _generate(model, tokenizer, ids, min(max_new_tokens, room), temperature, top_p, seed, ends)


def _generate(model, tokenizer, ids: list[int], count: int, temperature: float, top_p: float, seed: int, ends: frozenset[int]):
    noise = torch.Generator().manual_seed(seed)
    reader = _Reader(tokenizer, ids)
    fed, past = torch.tensor([ids], device=model.device), None
    for at in range(count):
        with torch.inference_mode():   # not around the whole: the caller's own code runs between two tokens
            out = model(input_ids=fed, past_key_values=past, use_cache=True)
            past = out.past_key_values
            log_probs = out.logits[0, -1].cpu().double().log_softmax(0)   # on the CPU: a seed draws the same on every device
            chosen = int(_drawn(log_probs, temperature, top_p, noise))
            fed = torch.tensor([[chosen]], device=model.device)
        end = chosen in ends
        yield Token(chosen, "" if end else reader.add(chosen, last=at == count - 1), float(log_probs[chosen]), end)
        if end:
            return


def _drawn(log_probs: torch.Tensor, temperature: float, top_p: float, noise: torch.Generator) -> torch.Tensor:
    """The next token by float64 (vocabulary,) log-probabilities; noise is drawn for all of the vocabulary, whatever the nucleus."""
    if temperature == 0:
        return log_probs.argmax()
    scaled = (log_probs / temperature).log_softmax(0)
    if top_p < 1:
        ordered, order = scaled.sort(descending=True, stable=True)
        outside = ordered.exp().cumsum(0) - ordered.exp() >= top_p   # what comes before it is already enough; the first always stays
        scaled = scaled.index_fill(0, order[outside], -torch.inf)
    uniform = torch.rand(len(scaled), generator=noise, dtype=torch.float64)
    return (scaled - (-uniform.log()).log()).argmax()


class _Reader:
    """Turns ids into the text each adds: spaces and characters that span tokens come out as in the decoded whole."""

    def __init__(self, tokenizer, ids: Sequence[int], context: int = 4):
        self.tokenizer, self.ids = tokenizer, list(ids[-context:])
        self.shown = self._decode(self.ids)

    def _decode(self, ids) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def add(self, token: int, last: bool) -> str:
        self.ids.append(token)
        text = self._decode(self.ids)
        if text.endswith(UNFINISHED) and not last and len(self.ids) < 32:   # bytes that never become a character are shown in the end
            return ""
        new, self.ids = text[len(self.shown):], self.ids[-4:]
        self.shown = self._decode(self.ids)
        return new


def prompt_ids(model: nn.Module, tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt, with whatever opens a text and without what closes it.

    Raises:
        InputError: there is no token, or not one position left after them.
    """
    ids = tokenizer(prompt, verbose=False).input_ids
    while ids and ids[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id:   # some tokenizers close every text
        ids = ids[:-1]
    ids = ids or [tokenizer.bos_token_id] * (tokenizer.bos_token_id is not None)
    if not ids:
        raise InputError("The prompt is empty", "this model has no token that opens a text", "write at least one word")
    limit = max_length(model)
    if limit and len(ids) >= limit:
        raise InputError(f"The prompt of {len(ids)} tokens is too long", f"the model takes {limit} tokens, prompt and continuation together",
                         "shorten it")
    return list(ids)


def end_tokens(model: nn.Module, tokenizer) -> frozenset[int]:
    """Ids with which the model ends a text: the tokenizer's, and those of its generation settings."""
    told = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    told = told if isinstance(told, list | tuple) else [told]
    return frozenset(i for i in (*told, tokenizer.eos_token_id) if i is not None)


@torch.inference_mode()
def read(model: nn.Module, ids: Sequence[int], continuation: Sequence[int]) -> list[float]:
    """Log-probabilities, in nats, that a model gives to a text it need not have written, each token after all before it.

    Args:
        ids: of what comes before, at least one.
        continuation: ids of the text.
    """
    if not len(continuation):
        return []
    fed = torch.tensor([[*ids, *continuation[:-1]]], device=model.device)
    logits = model(input_ids=fed, use_cache=False).logits[0, len(ids) - 1:]
    return [float(row.cpu().double().log_softmax(0)[token]) for row, token in zip(logits, continuation, strict=True)]


def tokens_per_second(model: nn.Module, tokenizer, prompt: str, count: int = 32) -> float:
    """Measured speed of greedy generation, the reading of the prompt included."""
    start = time.perf_counter()
    made = sum(1 for _ in generate(model, tokenizer, prompt, max_new_tokens=count, stop=False))
    return made / (time.perf_counter() - start)
