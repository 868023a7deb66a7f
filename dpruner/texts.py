"""The texts of a run: what it calibrates on, and what its masks are judged on."""

import torch

from dpruner.calibration import load_calibration, load_texts
from dpruner.compensate import compensation_sets
from dpruner.config import RunConfig, split_domain


class Texts:
    """The calibration batches and held-out texts of a run, all loaded before the work begins.

    Attributes:
        general: open-domain calibration, LongTensors (1, seqlen).
        domains: {label: calibration batches}.
        heldout: {label: held-out documents}, "general" among them; empty where nothing is evaluated.
    """

    def __init__(self, config: RunConfig, tokenizer):
        def batches(source):
            return load_calibration(source, tokenizer, config.nsamples, config.seqlen, config.seed, column=config.column)

        sources = dict(split_domain(d) for d in config.domains)
        self.labels = list(sources)
        self.open_label = split_domain(config.general)[0]
        self.general = load_calibration(split_domain(config.general)[1], tokenizer, config.nsamples, config.seqlen, config.seed)
        self.domains = {label: batches(source) for label, source in sources.items()}
        self.heldout = {}
        if config.evaluate:
            for label, source in {self.open_label: split_domain(config.general)[1], **sources}.items():
                self.heldout[label] = load_texts(source, "heldout", column=config.column if label in sources else None, limit=config.eval_documents)

    def judged(self, label: str) -> list[str]:
        """The held-out texts a mask of this domain is judged on: the domain's and the open domain's; none where nothing is evaluated."""
        return [name for name in dict.fromkeys((label, self.open_label)) if name in self.heldout]

    def sets(self, label: str, kind: str) -> list[list[torch.Tensor]]:
        """Calibration sets of one domain: open domain, domain, or both."""
        return compensation_sets(self.general, self.domains[label], kind)
