"""What a run is asked to do: one frozen dataclass, checked before anything is loaded."""

import dataclasses
import types
import typing
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from dpruner.calibration import domain_label
from dpruner.compensate import ALLOTMENTS, HESSIANS
from dpruner.errors import InputError
from dpruner.evaluate import require_seed
from dpruner.formulas import FORMULAS, require_lam
from dpruner.general import SPARSITY
from dpruner.masks import parse_granularity, require_sparsity
from dpruner.loading import DTYPES, STARTER
from dpruner.memory import parse_size

MOST = 1_000_000   # of anything that is counted
KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", types.NoneType: "nothing"}   # in words
REPEATED = {"domains": "domain", "methods": "method"}   # settings that take several values, named once for each on the command line
METHODS = ("dpruner", "domain", "general", "magnitude", "wanda", "sparsegpt", "random")


def setting(default, explained: str):
    """A field with the one sentence that command line and app show beside it."""
    return dataclasses.field(default=default, metadata={"help": explained})


@dataclass(frozen=True)
class RunConfig:
    """Settings of a run. `RunConfig(**run.config)` repeats a run bit for bit on the same machine."""

    model: str = setting(STARTER, "'starter', a local folder, or a hub id")
    revision: str | None = setting(None, "commit of a hub id")
    domains: tuple[str, ...] = setting(("healthcare", "legal"), "built-in or hub name, path, or label=path")
    methods: tuple[str, ...] = setting(("dpruner",), f"one of {', '.join(METHODS)}")
    sparsity: float = setting(0.5, "fraction of the weights to remove, 0 to 1")
    sparsity_of: str = setting("prunable", "what it is a fraction of: the 'prunable' weights or the whole 'model'")
    granularity: str = setting("matrix", "where one threshold holds: matrix, block, row, global, or n:m")
    formula: str = setting("balanced", "score of dpruner: balanced, taylor, release")
    lam: float | None = setting(None, "λ, the weight of the general side; each formula has its own default")
    compensate: str | None = setting(None, "move the kept weights: 'after' the mask is chosen, or choose it in the 'walk'")
    hessian: str = setting("mix", "whose inputs compensation follows: general, domain, mix")
    fisher: str = setting("both", "whose gradients compensate='walk' regards: domain, both")
    allot: str = setting("loss", "sparsity of the matrices in compensate='walk': less where the 'loss' needs more, or 'even'")
    refine: int = setting(10, "least-squares steps of the kept weights after each matrix of compensate='walk'; 0 for none")
    general: str = setting("general", "the open domain, named like a domain")
    general_sparsity: float = setting(SPARSITY, "sparsity at which the walk prunes while it scores general importance")
    general_mode: str = setting("sequential", "how general importance is taken: sequential, static")
    nsamples: int = setting(64, "calibration sequences per domain")
    seqlen: int = setting(128, "tokens per calibration sequence")
    column: str | None = setting(None, "column that holds the text of a user's file")
    baseline_calibration: str = setting("general", "text that wanda and sparsegpt calibrate on: general, domain, mix")
    finetune: bool = setting(False, "tune on the domain while scoring, as the paper does")
    epochs: int = setting(5, "epochs of that tuning")
    sides: bool = setting(True, "also keep what the walk does not need: the ranks of the two sides that dpruner weighs")
    halves: bool = setting(True, "also score two halves of each domain's text: what they share is the ceiling of similarity")
    evaluate: bool = setting(True, "measure perplexity on held-out text")
    eval_seqlen: int | None = setting(None, "tokens per window of perplexity; default 2,048, or fewer where the model takes or was trained on fewer")
    eval_documents: int = setting(100, "held-out documents per domain, at most")
    seed: int = setting(0, "of everything that is drawn")
    device: str | None = setting(None, "cpu, cuda, cuda:1, mps; default the best there is")
    memory: str | None = setting(None, "most to use on the device, such as 16GB; default what is free there; changes no result")
    dtype: str | None = setting(None, "float32, bfloat16, float16; default float32 on the CPU, as stored elsewhere")

    def __post_init__(self):
        for name in ("domains", "methods"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value)

    def check(self) -> None:
        """Refuse settings that cannot work.

        Raises:
            InputError: one sentence on the first that is wrong.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            _check_type(field.name, value, field.type)
            for text in value if isinstance(value, tuple) else (value,):
                _check_text(field.name, text)
        for name, allowed in {"sparsity_of": ("prunable", "model"), "formula": tuple(FORMULAS), "compensate": (None, "after", "walk"),
                              "hessian": HESSIANS, "fisher": ("domain", "both"), "allot": ALLOTMENTS, "general_mode": ("sequential", "static"),
                              "baseline_calibration": HESSIANS, "dtype": (None, *DTYPES)}.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} = {getattr(self, name)!r} is not known", "it has a few fixed values",
                                 ("leave it out, or " if None in allowed else "") + f"choose one of {', '.join(filter(None, allowed))}")
        if self.revision and self.model == STARTER:
            raise InputError(f"The revision {self.revision!r} cannot be used", "the starter comes with this version of the program and has no other",
                             "leave it out, or name a model on the hub")
        for method in self.methods:
            if method not in METHODS:
                raise InputError(f"The method {method!r} is not known", f"the methods are {', '.join(METHODS)}", "choose one of these")
        labels = [split_domain(d)[0] for d in self.domains]
        for name, values in (("domain", labels), ("method", self.methods)):
            if not values:
                raise InputError(f"No {name} was given", f"a run needs at least one {name}", f"name one with --{name}")
            if len(set(values)) < len(values):
                twice = next(v for v in values if list(values).count(v) > 1)
                raise InputError(f"The {name} {twice!r} stands twice", "its files would overwrite each other",
                                 f"name each {name} once" + (", or tell paths apart as label=path" if name == "domain" else ""))
        open_label, open_source = split_domain(self.general)
        if any(label == open_label and source != open_source for label, source in map(split_domain, self.domains)):
            raise InputError(f"The open domain and a domain are both called {open_label!r}", "their texts differ, but tables tell them apart by name",
                             "give one of them another name, as label=path")
        require_sparsity(self.sparsity)
        require_sparsity(self.general_sparsity)
        n_of_m = parse_granularity(self.granularity)
        if n_of_m and abs(self.sparsity - (1 - n_of_m[0] / n_of_m[1])) > 1e-9:
            raise InputError(f"The sparsity {self.sparsity} and the granularity {self.granularity} contradict each other",
                             f"{self.granularity} removes {1 - n_of_m[0] / n_of_m[1]:.4g} of the weights", "make them agree")
        if n_of_m and self.sparsity_of == "model":
            raise InputError(f"The granularity {self.granularity} cannot be a share of the whole model",
                             f"it removes {1 - n_of_m[0] / n_of_m[1]:.4g} of the prunable weights, no more and no less", "use sparsity_of='prunable'")
        if self.granularity != "matrix" and ("sparsegpt" in self.methods or self.compensate == "walk"):
            raise InputError(f"The granularity {self.granularity!r} cannot be combined with a walk that prunes",
                             "sparsegpt and compensate='walk' take a threshold for each 128 columns of a matrix as they go",
                             "use granularity='matrix', or compensate='after'")
        for name, least in (("nsamples", 1), ("seqlen", 2), ("epochs", 1), ("eval_documents", 1), ("eval_seqlen", 2), ("seed", 0), ("refine", 0)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise InputError(f"{name} = {getattr(self, name)} cannot be used", f"it is a count of {least} or more", "give a larger number")
            if name != "seed" and (getattr(self, name) or 0) > MOST:
                raise InputError(f"{name} = {getattr(self, name)} cannot be used", f"no run takes more than {MOST:,}", "give a smaller number")
        require_seed(self.seed)
        if self.memory is not None:
            parse_size(self.memory)
        if self.lam is not None:
            require_lam(self.lam)

    @property
    def title(self) -> str:
        """What the run is about, for its folder's name."""
        return "-".join([Path(self.model).name, *(split_domain(d)[0] for d in self.domains)])

    @classmethod
    def from_dict(cls, settings: dict) -> "RunConfig":
        """A config from JSON.

        Raises:
            InputError: a setting is not known.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        for name in settings:
            if name not in known:
                raise InputError(f"The setting {name!r} is not known", f"a run has {', '.join(sorted(known))}", "correct or remove it")
        return cls(**settings)

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


def options(config: RunConfig, usual: RunConfig, always: Collection[str]) -> list[str]:
    """The options of the command line that make these settings of the usual ones.

    Args:
        always: settings that are told also where they are the usual ones.
    """
    words = []
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), f"--{REPEATED.get(field.name, field.name).replace('_', '-')}"
        if value == getattr(usual, field.name) and field.name not in always:
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [word for one in (value if isinstance(value, tuple) else (value,)) for word in (flag, str(one))]
    return words


def _check_type(name: str, value, annotation) -> None:
    """JSON and notebooks give what they like; a setting of the wrong type is refused before it travels."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    for option in options:
        if typing.get_origin(option) is tuple:
            if isinstance(value, tuple) and all(isinstance(v, str) for v in value):
                if "" in value:
                    raise InputError(f"{name} = {value!r} cannot be used", "one of its names is empty", "name it, or take it out")
                return
        elif isinstance(value, bool) or option is bool:
            if isinstance(value, bool) and option is bool:
                return
        elif isinstance(value, (int, float) if option is float else option):
            return
    expected = " or ".join(KINDS.get(option, "a list of names") for option in options) + " from 0 to 1" * name.endswith("sparsity")
    raise InputError(f"{name} = {value!r} cannot be used", f"it takes {expected}", "correct its value")


def _check_text(name: str, value) -> None:
    """Names travel through files, processes and addresses: control characters and halves of characters do not survive that."""
    if isinstance(value, str) and any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
        raise InputError(f"{name} = {value!r} cannot be used", "it holds characters that cannot be written", "correct its value, or rename the file")


def split_domain(domain: str) -> tuple[str, str]:
    """(label, source) of a domain as a user names it: a built-in or hub name, a path, or "label=path"."""
    label, equals, source = domain.partition("=")
    if equals and label and source and "/" not in label:
        return domain_label(label), source
    return domain_label(domain), domain
