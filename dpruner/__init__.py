"""D-Pruner: domain-specific pruning of language models. The public names."""

from dpruner.calibration import load_calibration, load_tasks, load_texts
from dpruner.config import RunConfig
from dpruner.domain import FineTune, domain_importance
from dpruner.errors import InputError
from dpruner.evaluate import perplexity
from dpruner.evaluations import evaluate
from dpruner.export import export
from dpruner.general import general_importance
from dpruner.masks import make_masks, pruned
from dpruner.loading import load_model
from dpruner.pipeline import run
from dpruner.store import Run, open_run

__all__ = ["FineTune", "InputError", "Run", "RunConfig", "domain_importance", "evaluate", "export", "general_importance", "load_calibration",
           "load_model", "load_tasks", "load_texts", "make_masks", "open_run", "perplexity", "pruned", "run"]
