"""Pretrain a small Llama from scratch on your own texts: the recipe of the starter model.

    python -m dpruner.starter.train --corpus general=general.jsonl.gz --corpus legal=statutes/ --out my-starter --minutes 75

`pretrain` tells the story: read the texts, train a tokenizer on them, draw windows from a weighted mixture of the corpora, follow a cosine
schedule until the time or the steps are spent, measure perplexity on held-out texts, leave a folder that loads anywhere.
"""

import argparse
import json
import math
import os
import platform
import random
import shutil
import sys
import time
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpruner.calibration import load_texts
from dpruner.errors import InputError
from dpruner.loading import pick_device

SPECIAL = ["<unk>", "<s>", "</s>"]
SMALLEST_VOCABULARY = len(SPECIAL) + 256   # the special tokens and every byte
HELDOUT_WINDOWS = 64
REPORT_SECONDS = 15


# ---- the mathematics: numbers and tensors in, numbers and tensors out


def learning_rate(done, peak, warmup=0.05):
    """Linear warm-up, then a cosine from `peak` down to 2 % of it; `done` is the share of the training behind us, 0 to 1."""
    return peak * min(1.0, done / warmup) * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))


def mixture(sizes, repeats):
    """Probability (corpora,) of drawing from each corpus: its tokens times how often they count, over the sum."""
    weights = torch.tensor([size * repeat for size, repeat in zip(sizes, repeats, strict=True)], dtype=torch.float64)
    return weights / weights.sum()


def windows(streams, shares, batch_size, seqlen, generator):
    """Draw batches for ever, LongTensor (batch_size, seqlen): each row a random window of a random corpus.

    Args:
        streams: an IntTensor (tokens,) per corpus, each of at least `seqlen` tokens.
        shares: probabilities (corpora,).
        generator: the only source of randomness.
    """
    while True:
        rows = []
        for corpus in torch.multinomial(shares, batch_size, replacement=True, generator=generator).tolist():
            start = int(torch.randint(len(streams[corpus]) - seqlen + 1, (), generator=generator))
            rows.append(streams[corpus][start:start + seqlen])
        yield torch.stack(rows).long()


def capped(texts, characters):
    """The leading texts, up to and including the one that passes `characters`."""
    before = accumulate(map(len, texts), initial=0)
    return [text for text, size in zip(texts, before, strict=False) if size <= characters]


@torch.no_grad()
def perplexity(model, stream, seqlen):
    """Exp of the mean loss over the first 64 disjoint windows of a stream (tokens,), each predicted from its own start."""
    count = min(len(stream) // seqlen, HELDOUT_WINDOWS)
    batches = stream[:count * seqlen].view(count, seqlen).long().to(model.device).split(16)
    return math.exp(sum(model(input_ids=x, labels=x).loss.item() * len(x) for x in batches) / count)


# ---- the parts: tokenizer, model, schedule, training


def train_tokenizer(texts, vocab_size, max_length):
    """A byte-level BPE of `vocab_size` tokens, fewer where the texts do not hold as many pairs; it opens each text with <s>."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    opening = [("<s>", SPECIAL.index("<s>"))]
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=opening)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>",
                                   model_max_length=max_length)


def encode(texts, tokenizer):
    """The texts as one stream of tokens, IntTensor (tokens,), each text closed by the end token."""
    pieces = [torch.empty(0, dtype=torch.int32)]
    for first in range(0, len(texts), 64):   # in slices: an encoding is far larger than its tokens
        for ids in tokenizer(texts[first:first + 64], return_attention_mask=False, verbose=False)["input_ids"]:
            pieces.append(torch.tensor([*ids, tokenizer.eos_token_id], dtype=torch.int32))
    return torch.cat(pieces)


def new_model(tokenizer, seqlen, hidden_size, blocks, heads, intermediate_size):
    """An untrained Llama with tied embeddings and room for twice the training length."""
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=hidden_size, num_hidden_layers=blocks, intermediate_size=intermediate_size,
        num_attention_heads=heads, num_key_value_heads=heads, vocab_size=len(tokenizer), max_position_embeddings=2 * seqlen, trained_length=seqlen,
        tie_word_embeddings=True, rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))


def new_optimizer(model):
    """AdamW that decays matrices and leaves the gains of the norms alone."""
    matrices, gains = ([p for p in model.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=model.device.type in ("cpu", "cuda"))


def bfloat16_is_fast(device):
    """Whether the device multiplies bfloat16 in hardware; elsewhere autocast would cost time, not save it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))


def schedule(steps, minutes):
    """Yield, once a step, the share of the training done, 0 to 1, until the steps or else the minutes are spent."""
    if steps:
        yield from (step / steps for step in range(1, steps + 1))
        return
    yield 0.0   # the clock starts after the first step, which also compiles and warms up
    start = time.monotonic()
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        yield done


def training(model, batches, plan, peak, compiled=False):
    """Train in place, a step for each item of `plan`; yields (share done, loss as a scalar tensor) after each."""
    optimizer, device = new_optimizer(model), model.device
    forward = torch.compile(model) if compiled else model
    for done, x in zip(plan, batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done, peak)
        x = x.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16_is_fast(device)):
            loss = forward(input_ids=x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield done, loss.detach()


# ---- the edges: arguments, files, the screen


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence instead of printing the usage."""

    def error(self, message):
        raise InputError("The arguments cannot be used", message, "run it with --help to see what it takes")


def positive(kind):
    """An argument type: a finite number of that kind above 0."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number above 0")
        return value
    return parse


def named(kind):
    """An argument type: NAME=value, as the pair (name, value)."""
    def parse(text):
        name, _, value = text.partition("=")
        if not name or not value:
            raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=value")
        return name, kind(value)
    return parse


def parse_arguments(argv):
    """Command line -> checked Namespace, with the NAME=value options as dicts."""
    parser = Parser(prog="python -m dpruner.starter.train", description="Pretrain a small model from scratch on your own texts.")
    add, each = parser.add_argument, {"action": "append", "default": []}
    add("--corpus", type=named(str), action="append", required=True, metavar="NAME=PATH", help="texts, a file or folder; once per corpus")
    add("--heldout", type=named(str), **each, metavar="NAME=PATH", help="texts to measure on; else a fifth of the corpus is set aside")
    add("--column", type=named(str), **each, metavar="NAME=COLUMN", help="where a table keeps its texts")
    add("--repeat", type=named(positive(float)), **each, metavar="NAME=TIMES", help="how often a corpus counts in the mixture (1)")
    add("--cap", type=named(positive(int)), **each, metavar="NAME=CHARACTERS", help="train on no more of a corpus than this (all)")
    add("--out", type=Path, required=True, help="the folder to make")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=positive(float), default=75.0, help="how long to train (75)")
    budget.add_argument("--steps", type=positive(int), help="how many steps to train; the same steps and seed give the same model")
    add("--seed", type=int, default=0)
    add("--batch-size", type=positive(int), default=32)
    add("--seqlen", type=positive(int), default=256)
    add("--learning-rate", type=positive(float), default=3e-3, help="its peak (0.003)")
    add("--tokenizer", type=Path, help="folder of a tokenizer to use; else one is trained on the texts")
    add("--vocab-size", type=positive(int), default=8192, help="of the tokenizer that is trained (8192)")
    add("--hidden-size", type=positive(int), default=320)
    add("--blocks", type=positive(int), default=8)
    add("--heads", type=positive(int), help="(hidden size / 64)")
    add("--intermediate-size", type=positive(int), help="(2.7 times the hidden size)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (auto)")
    add("--compile", action="store_true", help="torch.compile: slow to start, faster after")
    args = parser.parse_args(argv)

    for option in ("corpus", "heldout", "column", "repeat", "cap"):
        pairs = getattr(args, option)
        setattr(args, option, dict(pairs))
        if len(getattr(args, option)) < len(pairs):
            parser.error(f"--{option} gives a corpus twice")
        if unknown := getattr(args, option).keys() - args.corpus.keys():
            parser.error(f"--{option} names {min(unknown)!r}, which no --corpus gives")
    args.minutes = None if args.steps else args.minutes
    args.heads = args.heads or max(1, args.hidden_size // 64)
    args.intermediate_size = args.intermediate_size or round(2.7 * args.hidden_size)
    if args.hidden_size % (2 * args.heads):
        parser.error(f"a hidden size of {args.hidden_size} does not split into {args.heads} heads of an even size")
    if args.vocab_size < SMALLEST_VOCABULARY:
        parser.error(f"--vocab-size {args.vocab_size} is less than the {SMALLEST_VOCABULARY} that bytes and special tokens take")
    return args


def load_tokenizer(folder):
    """The tokenizer in a folder, which must have an end token to close texts with."""
    what = f"The tokenizer {str(folder)!r} cannot be used"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError):
        raise InputError(what, "none loads from there", "give a folder with a tokenizer.json") from None
    if tokenizer.eos_token_id is None:
        raise InputError(what, "it has no end token to close texts with", "give another or leave it out")
    return tokenizer


def read_corpora(args):
    """Two dicts, corpus -> texts: to train on (shuffled, capped) and held out (in their order)."""
    def read(path, name, *splits):
        return [text for split in splits for text in load_texts(path, split=split, column=args.column.get(name))]

    train, held = {}, {}
    for name, path in args.corpus.items():
        if name in args.heldout:
            texts = read(path, name, "calibration", "heldout")
            held[name] = read(args.heldout[name], name, "calibration", "heldout")
        else:
            texts, held[name] = read(path, name, "calibration"), read(path, name, "heldout")
        random.Random(args.seed).shuffle(texts)
        train[name] = capped(texts, args.cap.get(name, math.inf))
    return train, held


def encode_corpora(corpora, tokenizer, seqlen, kind):
    """Corpus -> stream of tokens, each of one window at least."""
    streams = {name: encode(texts, tokenizer) for name, texts in corpora.items()}
    for name, stream in streams.items():
        if len(stream) < seqlen:
            raise InputError(f"The corpus {name!r} is too small",
                             f"its {kind} texts hold {len(stream)} tokens and one window takes {seqlen}",
                             "give more text or a smaller --seqlen")
    return streams


@contextmanager
def new_folder(out):
    """Yield a temporary folder beside `out` that takes its name if all goes well and vanishes if not.

    It is made before the long work, so that a place that cannot be written to is found out at once.
    """
    def refuse(why):
        raise InputError(f"The output {str(out)!r} cannot be written", why, "give --out another name") from None

    if out.is_file() or out.is_dir() and any(out.iterdir()):
        refuse("it exists and is not an empty folder")
    partial = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        refuse(error.strerror)
    try:
        yield partial
        if out.is_dir():
            out.rmdir()   # empty; a folder is not renamed over another everywhere
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def follow(steps, tokens_a_step):
    """Run the training to its end, with a line of progress now and then; returns (losses, seconds)."""
    losses, start = [], time.monotonic()
    shown = start
    for done, loss in steps:
        losses.append(loss)
        if (now := time.monotonic()) - shown >= REPORT_SECONDS:
            tokens, shown = len(losses) * tokens_a_step, now
            pace = f"{tokens:,} tokens, {tokens / (now - start):,.0f} a second"
            print(f"{done:4.0%}  step {len(losses):,}  loss {loss.item():.3f}  {pace}", flush=True)
    losses = torch.stack(losses).tolist()
    if not math.isfinite(losses[-1]):
        raise InputError("The training has failed", "its loss is no longer a number", "lower --learning-rate")
    return losses, time.monotonic() - start


def save(model, tokenizer, folder):
    """Write both in the Hugging Face layout; the model is in bfloat16 after it."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # safetensors makes files that only their owner can read; give them the permissions of the others
    for weights in folder.glob("*.safetensors"):
        weights.chmod((folder / "config.json").stat().st_mode)


def file_names(arguments):
    """The arguments as JSON takes them, with file names for paths: what was used, not where it lay."""
    def plain(value):
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        return Path(value).name if isinstance(value, (str, Path)) else value
    return plain(arguments)


def training_record(args, model, corpora, losses, seconds, measured):
    """What training.json says: enough to repeat the training and to judge it."""
    return {
        "arguments": file_names(vars(args)), "corpora": corpora, "parameters": model.num_parameters(),
        "steps": len(losses), "tokens_seen": len(losses) * args.batch_size * args.seqlen, "seconds": round(seconds, 1),
        "loss": {"first": losses[0], "last": losses[-1]}, "heldout_perplexity": measured,
        "device": model.device.type, "autocast": "bfloat16" if bfloat16_is_fast(model.device) else None, "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {m.__name__: m.__version__ for m in (torch, transformers, tokenizers)},
    }


def be_deterministic(device):
    """Have CUDA add in a fixed order; processors do so anyway."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def pretrain(args):
    """The whole recipe, from arguments to the folder `args.out`."""
    device = pick_device(args.device)
    be_deterministic(device)
    with new_folder(args.out) as folder:
        texts, heldout = read_corpora(args)
        every_text = (text for corpus in texts.values() for text in corpus)
        tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else train_tokenizer(every_text, args.vocab_size, 2 * args.seqlen)
        data = encode_corpora(texts, tokenizer, args.seqlen, "training")
        held = encode_corpora(heldout, tokenizer, args.seqlen, "held-out")
        shares = mixture([len(stream) for stream in data.values()], [args.repeat.get(name, 1.0) for name in data])
        corpora = {name: {"texts": len(texts[name]), "tokens": len(data[name]), "share": share}
                   for name, share in zip(data, shares.tolist(), strict=True)}
        for name, facts in corpora.items():
            print(f"{name}: {facts['texts']:,} texts, {facts['tokens']:,} tokens, {facts['share']:.0%} of the mixture")

        torch.manual_seed(args.seed)
        model = new_model(tokenizer, args.seqlen, args.hidden_size, args.blocks, args.heads, args.intermediate_size).to(device)
        print(f"{model.num_parameters():,} parameters on {device}, in {'bfloat16' if bfloat16_is_fast(device) else 'float32'}", flush=True)
        batches = windows(list(data.values()), shares, args.batch_size, args.seqlen, torch.Generator().manual_seed(args.seed))
        steps = training(model, batches, schedule(args.steps, args.minutes), args.learning_rate, args.compile)
        losses, seconds = follow(steps, args.batch_size * args.seqlen)

        save(model, tokenizer, folder)
        model.float()   # measure the weights as they were saved, rounded
        measured = {name: perplexity(model, stream, args.seqlen) for name, stream in held.items()}
        record = training_record(args, model, corpora, losses, seconds, measured)
        (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print("held-out perplexity: " + ", ".join(f"{name} {value:.1f}" for name, value in measured.items()))
    print(f"saved in {args.out}")


def main(argv=None):
    """Command line -> exit code: 0, or 1 after one sentence that says why."""
    try:
        pretrain(parse_arguments(argv))
    except (InputError, KeyboardInterrupt) as stopped:
        print(str(stopped) or "Stopped by hand: nothing was saved.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
