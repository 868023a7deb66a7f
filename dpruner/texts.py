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
        self.open_label, open_source = split_domain(config.general)
        domains = dict(split_domain(d) for d in config.domains)
        sources = {self.open_label: open_source, **domains}
        columns = {label: config.column if label in domains else None for label in sources}   # the open domain may be one of them

        def batches(label):
            return load_calibration(sources[label], tokenizer, config.nsamples, config.seqlen, config.seed, column=columns[label])

        self.labels = list(domains)
        self.general = batches(self.open_label)
        self.domains = {label: batches(label) for label in domains}
        self.heldout = {}
        if config.evaluate:
            self.heldout = {label: load_texts(source, "heldout", column=columns[label], limit=config.eval_documents)
                            for label, source in sources.items()}

    def judged(self, label: str) -> list[str]:
        """The held-out texts a mask of this domain is judged on: the domain's and the open domain's; none where nothing is evaluated."""
        return [name for name in dict.fromkeys((label, self.open_label)) if name in self.heldout]

    def sets(self, label: str, kind: str) -> list[list[torch.Tensor]]:
        """Calibration sets of one domain: open domain, domain, or both."""
        return compensation_sets(self.general, self.domains[label], kind)
