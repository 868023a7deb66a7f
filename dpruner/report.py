"""A finished run as a small table of its figures, for people and for programs."""

from dpruner.store import Run


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
    floors = table[table.metric == "jaccard floor"].set_index(["method", "domain", "text"]).value
    ceilings = table[table.metric == "jaccard ceiling"].set_index(["method", "domain"]).value
    similarity = [{"method": r.method, "domains": [r.domain, r.text], "jaccard": r.value, "floor": floors[r.method, r.domain, r.text],
                   "ceiling": float(ceilings.reindex([(r.method, r.domain), (r.method, r.text)]).mean()) if r.method in ceilings else None}
                  for r in table[table.metric == "jaccard"].itertuples()]
    changed = {r.domain: {"changed": int(r.value), "of": int(r.n)} for r in table[table.metric == "decisions changed by λ"].itertuples()}
    return {"id": run.id, "folder": str(run.folder), "state": run.status["state"], "rows": rows, "dense": dense, "similarity": similarity,
            "lambda": changed}
