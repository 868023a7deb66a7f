"""A finished run as a small table of its figures, for people and for programs."""

import itertools
from collections.abc import Iterator, Sequence
from statistics import fmean

from dpruner.errors import InputError
from dpruner.masks import jaccard, jaccard_floor
from dpruner.store import LazyMasks, Run


def summary(run: Run) -> dict:
    """What a run found, in plain values.

    Returns:
        {"id", "folder", "state", "rows": one per method and domain with its perplexities as {text: {value, low, high, n}} and both sparsities,
        "dense": {domain: perplexities}, "similarity": one per method and pair of domains with its floor and ceiling, "lambda": {domain: {changed, of}}}.
    """
    table = run.metrics()
    rows, dense = [], {}
    for (method, domain), group in table.groupby(["method", "domain"], sort=False):
        perplexities = {r.text: {"value": r.value, "low": r.low, "high": r.high, "n": r.n}
                        for r in group[group.metric == "perplexity"].itertuples()}
        if method == "dense":
            dense[domain] = perplexities
            continue
        exact = group.set_index("metric").value
        rows.append({"method": method, "domain": domain, "perplexity": perplexities,
                     "sparsity of prunable weights": exact["sparsity of prunable weights"],
                     "sparsity of the whole model": exact["sparsity of the whole model"]})
    changed = {r.domain: {"changed": int(r.value), "of": int(r.n)} for r in table[table.metric == "decisions changed by λ"].itertuples()}
    return {"id": run.id, "folder": str(run.folder), "state": run.status["state"], "rows": rows, "dense": dense,
            "similarity": similarity(run) if (table.metric == "jaccard").any() else [], "lambda": changed}


def similarity(run: Run, methods: Sequence[str] | None = None, domains: Sequence[str] | None = None, matrices: bool = False) -> list[dict]:
    """How alike the masks of every two domains of a run are.

    Args:
        methods: of the run; default all.
        domains: of the run: one beside each of the others, or several among each other; default all.
        matrices: for each matrix by itself, counted from the masks; else for the whole model, from the run's table.

    Returns:
        One dict for each method and pair of domains: "method", "domains", "jaccard", "floor" (what random masks share), "halves" and "ceiling"
        (masks from half the text each: what those of the two domains share, and those of one, the mean of both; None where the run took no
        halves), and "matrix".

    Raises:
        InputError: the run has no such method or domain, or no two domains.
    """
    table = run.metrics()
    told = table[table.metric == "jaccard"]
    for what, asked, held in (("method", methods, set(table.method)), ("domain", domains, set(table.domain))):
        for name in asked or ():
            if name not in held:
                raise InputError(f"The run {run.id} has no {what} {name!r}", f"it has {', '.join(sorted(held - {'dense'}))}", "choose one of these")
    if told.empty:
        raise InputError(f"The run {run.id} has no similarities", "it was pruned for one domain only", "choose a run of two domains or more")
    if domains:
        told = told[told[["domain", "text"]].isin(domains).sum(axis=1) >= min(2, len(set(domains)))]
    told = told[told.method.isin(methods or set(told.method))]
    if matrices:
        return [row for r in told.itertuples() for row in _by_matrix(run, r.method, r.domain, r.text)]
    floors = table[table.metric == "jaccard floor"].set_index(["method", "domain", "text"]).value
    halves = table[table.metric == "jaccard halves"].set_index(["method", "domain", "text"]).value
    ceilings = table[table.metric == "jaccard ceiling"].set_index(["method", "domain"]).value
    return [{"method": r.method, "domains": [r.domain, r.text], "jaccard": r.value, "floor": floors[r.method, r.domain, r.text],
             "halves": halves.get((r.method, r.domain, r.text)),
             "ceiling": float(ceilings.reindex([(r.method, r.domain), (r.method, r.text)]).mean()) if r.method in ceilings else None}
            for r in told.itertuples()]


def _by_matrix(run: Run, method: str, a: str, b: str) -> Iterator[dict]:
    one, other = (LazyMasks(run.path("masks", method, domain)) for domain in (a, b))
    paths = [[run.path("masks", method, f"{domain}~{half}") for half in (1, 2)] for domain in (a, b)]
    halves = [[LazyMasks(path) for path in of] for of in paths] if all(path.is_file() for of in paths for path in of) else []
    for name in one:
        pair = {name: one[name]}, {name: other[name]}
        cut = [[{name: half[name]} for half in of] for of in halves]
        yield {"method": method, "domains": [a, b], "matrix": name, "jaccard": jaccard(*pair), "floor": jaccard_floor(*pair),
               "halves": fmean(jaccard(*two) for two in itertools.product(*cut)) if cut else None,
               "ceiling": fmean(jaccard(*of) for of in cut) if cut else None}
