"""The page Similarity: how alike masks are, between chance and sameness."""

import numpy as np
import pandas as pd
import streamlit as st

from analysis import alike, figures, matrices, similarity
from analysis.chart import listed, percent
from analysis.sparsity import told
from app import data, state, widgets
from app.halves import Mask, halves, mean_pair, where_they_part
from dpruner.errors import InputError
from dpruner.store import Run

MOST = 24   # masks in one picture
SETS = {"domains": "Domains of the method", "methods": "Methods for the domain", "all": "All methods and domains"}
MEASURES = {"jaccard": "Jaccard", "cosine": "Cosine", "corrected": "Chance-corrected", "overlap": "Overlap coefficient"}
VIEWS = {"model": "Whole model", "module": "Modules", "layer": "Layers", "matrix": "Layers × modules", "open": "Beside the open domain"}
MEASURE_HELP = """How much of what two masks keep is the same.
- **Jaccard**: weights both keep as a share of those either keeps. Two random masks of 50 % share 1/3.
- **Cosine**: weights both keep, divided by the geometric mean of what each keeps.
- **Chance-corrected**: Jaccard moved so that random masks show 0 and equal ones 1.
- **Overlap coefficient**: weights both keep as a share of the smaller mask."""
SAME_HELP = "The ceiling: what the masks from the two halves of one domain's text share, the mean over the domains."
OTHER_HELP = ("What two masks share that come from half of one domain's text and half of another's. Less text makes a mask noisier, so this, and not "
              "the mean of all pairs, compares with the same domain's halves. Pairs of one method.")


def chosen_masks(runs: list[Run], which: str, method: str, domain: str) -> list[Mask]:
    """The masks of a set, of all runs; where there are several, a letter says which run."""
    found = []
    for i, run in enumerate(runs):
        for m, d in data.pairs(run):
            name = {"domains": d if m == method else None, "methods": m if d == domain else None, "all": f"{m}, {d}"}[which]
            if name is not None:
                found.append(Mask(name if len(runs) == 1 else f"{name} ({letter(i)})", run, m, d))
    return found


def letter(i: int) -> str:
    """A, B, .. Z, 27, 28 .."""
    return chr(ord("A") + i) if i < 26 else str(i + 1)


def count(masks: list[Mask], sparsity: float | None) -> tuple[similarity.Counts, list[Mask]]:
    """Counts of the masks that can be had at this sparsity (None: the runs' own), and those that cannot."""
    stamps = {mask: data.mask_stamp(mask.run, mask.method, mask.domain, sparsity is None) for mask in masks}
    there = tuple((mask.label, stamp) for mask, stamp in stamps.items() if stamp is not None)
    if len(there) < 2:
        raise InputError("There is nothing to compare", f"{len(there)} of these masks {'is' if len(there) == 1 else 'are'} there at this sparsity",
                         "compare other masks, add a run of the same model, or move the slider to the run's own sparsity")
    return data.counts(there, sparsity), [mask for mask, stamp in stamps.items() if stamp is None]


def verdict(matrix: np.ndarray, floor: np.ndarray, cut: similarity.Halves | None) -> None:
    """The mean pair between chance and sameness, in a few numbers."""
    mean, base, *of_halves = (mean_pair(each) for each in (matrix, floor, *(cut or ())[:2]))
    cells = st.columns([1, 1, 1, 1, 1] if cut else [1, 1, 3])
    cells[0].metric("Mean of all pairs", f"{mean:.3f}", help="The mean similarity of every two different masks shown here, each from all its text.")
    cells[1].metric("Two random masks", f"{base:.3f}", help="The floor: what masks drawn at random would share if they kept as many weights of every matrix.")
    if not cut:
        cells[2].metric("Same domain", "unknown", help=SAME_HELP + " These masks have none: their methods look at no text, or the run took no halves.")
        return
    same, other = of_halves
    cells[2].metric("½ text: 2 domains", f"{other:.3f}", help=OTHER_HELP)
    cells[3].metric("½ text: 1 domain", f"{same:.3f}", help=SAME_HELP)
    cells[4].metric("Floor to ceiling", percent(similarity.of_the_way(other, base, same)),
                    help="Where two domains lie between the floor (0 %) and the ceiling (100 %), from half the text each. At 100 %, they differ no more "
                         "than two samples of one domain's text would make them.")


def enlarged(counts: similarity.Counts, by: str, group, masks: list[Mask], sparsity: float | None, measure: str, where: str, key: str) -> None:
    """One similarity matrix in full, and every pair between floor and ceiling."""
    matrix, floor = (f(counts, measure, by)[group] for f in (similarity.similarity, similarity.floor))
    cut = halves(masks, sparsity, measure, by).get(group)
    verdict(matrix, floor, cut)
    drawn = alike.similarity_heatmap(matrix, counts.labels, floor, cut, measure, where)
    if drawn is None:
        st.info(f"These masks are the same, weight by weight, in {where}: there is nothing to draw. A method that looks at no text of the domain, "
                "such as magnitude, prunes alike for every domain.")
        return
    widgets.chart(drawn, f"{key}-heatmap")
    members = matrices.groups(counts.names, by)[group]
    pairs = similarity.pairs(counts.within(members))
    if cut is not None:
        pairs["ceiling"], pairs["halves"] = (each[np.triu_indices(len(each), 1)] for each in cut[:2])
        conclusion(cut)
    widgets.chart(alike.pair_dots(pairs, measure, mean_pair(floor)), f"{key}-dots")


def conclusion(cut: similarity.Halves) -> None:
    """What masks of half the text say about domains."""
    same, other, least, most = (each[np.triu_indices(len(each), 1)] for each in cut)
    known = np.isfinite(same)
    n, clear, gap = int(known.sum()), int((least > most)[known].sum()), float((same - other)[known].mean())
    st.markdown(f"On equal terms, from half the text each, two domains share **{abs(gap):.3f} {'less' if gap > 0 else 'more'}** than the two halves of "
                f"one, on average. {in_pairs(clear, n)}"
                + (" That is to be expected where the subject of the text shows in the masks; by chance alone it would happen in one pair of 15." if clear else
                   " On these texts no difference between domains shows. More calibration text, or a higher sparsity, may tell them apart."))


def in_pairs(clear: int, n: int) -> str:
    """In how many pairs of domains even the less alike halves of one domain are more alike than any two of different domains."""
    if n == 1:
        return ("The two masks of each domain **are** more alike" if clear else "Not all masks of one domain are more alike") + " than any two of different domains."
    return f"In **{clear} of {n} pairs** of domains the two masks of each are more alike than any two of different ones."


def the_map(counts: similarity.Counts, measure: str, masks: list[Mask], which: str) -> None:
    """The masks as points in the plane."""
    if len(counts.labels) < 3:   # how alike two are is a number
        return
    points, shown = similarity.domain_points(similarity.similarity(counts, measure)["model"], counts.labels)
    if which == "all":
        method = {mask.label: mask.method for mask in masks}
        points = points.assign(group=[method[label] for label in points["label"]])
    widgets.chart(alike.domain_map(points, shown), "similarity-map")


def small_multiples(counts: similarity.Counts, masks: list[Mask], sparsity: float | None, measure: str, view: str) -> None:
    """A small matrix for every module or layer, where in the model the masks differ, and one of them enlarged."""
    by = "block" if view == "layer" else "module"
    found, floors = similarity.similarity(counts, measure, by), similarity.mean_of_pairs(similarity.floor(counts, measure, by))
    cut = halves(masks, sparsity, measure, by)
    widgets.chart(alike.similarity_profile(found, counts.labels, view, floors, cut, measure),
                  "similarity-profile")

    def click() -> None:
        if found := state.clicked("similarity-grid"):
            st.session_state[f"similarity-{view}"] = found[0]

    widgets.chart(alike.similarity_grid(found, counts.labels, view, measure), "similarity-grid", on_select=click, selection_mode="points")
    options, key = list(found), f"similarity-{view}"
    if st.session_state.get(key, options[0]) not in options:
        st.session_state[key] = options[0]
    group = st.selectbox(f"Enlarge a {view}", options, key=key, bind="query-params", help="Or click a square above.")
    enlarged(counts, by, group, masks, sparsity, measure, f"{view} {group}", "similarity-one")


def every_matrix(counts: similarity.Counts, masks: list[Mask], sparsity: float | None, measure: str, selected: state.Selection) -> None:
    """The mean pair in every matrix of the model, and the selected matrix enlarged."""
    mean = similarity.mean_of_pairs(similarity.similarity(counts, measure, "matrix"))
    base = np.mean(list(similarity.mean_of_pairs(similarity.floor(counts, measure, "matrix")).values()))
    cut = list(halves(masks, sparsity, measure, "matrix").values())
    key = "similarity-matrices"
    widgets.chart(figures.layer_heatmap(
        data.places(selected.run).assign(similarity=lambda t: t.matrix.map(mean)), "similarity", title="Similarity of the masks in every matrix",
        quantity=f"{alike.MEASURE_NAMES[measure]}, mean of all pairs",
        how=f"One cell for each matrix; brighter is more alike. In the mean over the matrices, two random masks would show {base:.3f}"
            + (f". From half the text each, the same domain shows {np.mean([mean_pair(c.same) for c in cut]):.3f}, two domains "
               f"{np.mean([mean_pair(c.other) for c in cut]):.3f}." if cut else ".") + " A click chooses the matrix shown below.",
        chosen=(selected.block, selected.module)), key, on_select=lambda: state.choose_matrix(key), selection_mode="points")
    enlarged(counts, "matrix", selected.matrix, masks, sparsity, measure, f"layer {selected.block}, {selected.module}", "similarity-one")


def beside_open_domain(runs: list[Run], sparsity: float, measure: str) -> None:
    """The importances before they are joined, and the masks after: G with each domain's own importance, beside the domain masks."""
    alone, joined, general = [], [], {}
    for i, run in enumerate(runs):
        tag = "" if len(runs) == 1 else f" ({letter(i)})"
        domains = [d for m, d in data.pairs(run) if m == "dpruner"]
        if domains:   # one run has one open domain: its importance is the same beside every domain
            general[i] = Mask(f"open domain{tag}", run, "general", domains[0])
        alone += [Mask(f"{d}{tag}", run, "domain", d) for d in domains]
        joined += [Mask(f"{d}{tag}", run, "dpruner", d) for d in domains]
    if not general:
        st.info("This needs a run with the method dpruner: only that weighs an open-domain importance against each domain's.")
        return
    general = list(general.values())
    st.markdown("**Left**: what the open-domain importance and each domain's own importance would keep, each for itself. **Right**: what the domain masks "
                f"keep, for which D-Pruner joins the two in one score. All are cut from ranks at {told(sparsity)}.")
    before, missing = count(general + alone, sparsity)
    after, gone = count(general + joined, sparsity)
    told_missing(missing + gone)
    if before.labels == after.labels:
        sides = {name: similarity.similarity(counts, measure)["model"] for name, counts in (("Importances alone", before), ("Domain masks", after))}
        floor = similarity.mean_of_pairs(similarity.floor(after, measure))["model"]
        widgets.chart(alike.similarity_sides(sides, after.labels, floor, measure), "similarity-sides")
    rows = {"Open domain and each domain's own importance": (cross(before, measure, general, alone), None),
            "Domains' own importances with each other": (among(before, measure, alone), [m for m in alone if m.label in before.labels]),
            "Open domain and each domain mask": (cross(after, measure, general, joined), None),
            "Domain masks with each other": (among(after, measure, joined), [m for m in joined if m.label in after.labels])}
    found = []
    for which, (mean, masks) in rows.items():
        cut = halves(masks, sparsity, measure, "model").get("model") if masks else None
        found.append({"which pairs": which, f"{alike.MEASURE_NAMES[measure]}, mean": mean, "½ text: 2 domains": mean_pair(cut.other) if cut else None,
                      "½ text: 1 domain": mean_pair(cut.same) if cut else None})
    st.dataframe(pd.DataFrame(found), hide_index=True, placeholder="",
                 column_config={name: st.column_config.NumberColumn(format="%.4f") for name in list(found[0])[1:]})
    st.caption(f"½ text: from half the text each, where masks of two domains compare with those of one. {SAME_HELP}")


def among(counts: similarity.Counts, measure: str, masks: list[Mask]) -> float:
    """Mean similarity of every two of some masks."""
    labels = [m.label for m in masks if m.label in counts.labels]
    return similarity.mean_of_pairs(similarity.similarity(counts.only(labels), measure))["model"]


def cross(counts: similarity.Counts, measure: str, some: list[Mask], others: list[Mask]) -> float:
    """Mean similarity of some masks with others."""
    at = [[counts.labels.index(m.label) for m in masks if m.label in counts.labels] for masks in (some, others)]
    return float(similarity.similarity(counts, measure)["model"][np.ix_(*at)].mean())


def told_missing(missing: list[Mask]) -> None:
    """One line on masks that cannot be had at this sparsity."""
    if missing:
        st.caption(f"Left out, as this run keeps no ranks of them and they exist at its own sparsity only: {listed(m.label for m in missing)}.")


def page() -> None:
    """Widgets, then one of the views."""
    st.title("Similarity")
    st.markdown("Do two domains need the same weights? A similarity says nothing by itself. Its **floor** is what two random masks share. Its "
                "**ceiling** is what masks from two halves of the *same* domain's text share; as less text makes a mask noisier, that compares with "
                "masks from half the text of two domains, and not with those from all of it.")
    selected = state.selection()
    if selected is None:
        return
    with widgets.guarded():
        view = st.segmented_control("Show", list(VIEWS), format_func=VIEWS.get, default="model", required=True, key="similarity-view",
                                    bind="query-params")
        left, middle, right = st.columns([2, 1.4, 2.6])
        which = left.selectbox("Compare", list(SETS), format_func=SETS.get, key="similarity-set", bind="query-params", disabled=view == "open",
                               help="The method and the domain are those chosen at the left.")
        measure = middle.selectbox("Measure", list(MEASURES), format_func=MEASURES.get, key="similarity-measure", bind="query-params", help=MEASURE_HELP)
        others = {run.id: run for run in data.same_model(selected.run, state.finished_runs())}
        if "similarity-runs" in st.session_state:   # of another model's run, or gone
            st.session_state["similarity-runs"] = [r for r in st.session_state["similarity-runs"] if r in others]
        further = right.multiselect("With further runs of this model", list(others), key="similarity-runs", bind="query-params",
                                    disabled=not others, placeholder="choose runs" if others else "no other finished run of this model",
                                    help="Finished runs whose model has the same fingerprint: its weights are equal bit for bit.")
        runs = [selected.run, *(others[i] for i in further)]
        if len(runs) > 1:
            st.caption("Runs: " + "; ".join(f"**({letter(i)})** {run.id}" for i, run in enumerate(runs)))
        if selected.sparsity in (0, 1):
            st.info(f"At {percent(selected.sparsity, 0)} sparsity every mask {'keeps everything' if selected.sparsity == 0 else 'is empty'}, so all are the "
                    "same. Choose a sparsity in between at the left.")
            return
        if view == "open":
            beside_open_domain(runs, selected.sparsity, measure)
            return
        own = all(data.own_masks(run, selected.sparsity) for run in runs)
        sparsity = None if own else selected.sparsity
        masks = chosen_masks(runs, which, selected.method, selected.domain)
        if len(masks) > MOST:
            st.warning(f"{len(masks)} masks are too many for one picture: the first {MOST} are shown. Compare a smaller set, or fewer runs.")
            masks = masks[:MOST]
        counts, missing = count(masks, sparsity)
        told_missing(missing)
        masks = [mask for mask in masks if mask not in missing]
        st.caption(f"Shown: the masks as the run{'s' if len(runs) > 1 else ''} made them." if own else
                   f"Shown: masks cut from the ranks at {told(selected.sparsity)} of every matrix. Move the slider to the run's own sparsity for its "
                   "very masks.")
        if view == "model":
            enlarged(counts, "model", "model", masks, sparsity, measure, "the whole model", "similarity-all")
            where_they_part(masks, sparsity, data.places(selected.run), (selected.block, selected.module))
            the_map(counts, measure, masks, which)
        elif view == "matrix":
            every_matrix(counts, masks, sparsity, measure, selected)
        else:
            small_multiples(counts, masks, sparsity, measure, view)


page()
