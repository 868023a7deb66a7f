"""The page Results: what pruning costs in quality, what it saves in size and time, and the checkpoint to take away."""

import dataclasses
import re

import pandas as pd
import streamlit as st
import torch

from analysis import comparisons, results, weights
from analysis.chart import listed, number, percent, signed
from app import data, experiments, resident, state, widgets
from dpruner import export, generate, metrics
from dpruner.errors import InputError
from dpruner.loading import stored_precision

FEW = 10   # windows of text; intervals from fewer come out too narrow
ROUNDS, TOKENS, WARM = 6, 24, 8   # of the measurement of speed; tokens before each that do not count
PROMPT = "The history of the Roman Empire"
VERDICTS = {metrics.NOISE: "**inside the noise**, so this held-out text cannot tell them apart", metrics.WORSE: "**worse**, beyond the noise",
            metrics.BETTER: "**better**, beyond the noise"}

st.title("Results")
selected = state.selection()
if selected is None:
    st.stop()
run, method, domain = selected.run, selected.method, selected.domain
mine = f"{method} for {domain}"
if not data.own_masks(run, selected.sparsity):
    st.caption(f"What was measured belongs to the run's own masks, at {percent(data.own_sparsity(run), 0)} sparsity; "
               "the slider at the left changes nothing here.")


def kinds(table: pd.DataFrame) -> dict[str, str]:
    """{text: what it is to the domain, in words}."""
    return {text: f"{text} (its domain)" if text == domain else f"{text} (open domain)" for text in dict.fromkeys(table.text)}


def entitled(made, title: str):
    """A chart under another title."""
    return made and dataclasses.replace(made, title=title)


def take_csv(label: str, text: str, name: str, key: str) -> None:
    st.download_button(label, text.encode(), name, "text/csv", key=key, on_click="ignore")


# ---- quality


def quality() -> None:
    """Every method beside the dense model, in the domain and outside it."""
    table = results.against_dense(data.metrics(run), domain)
    if table.empty:
        st.info("This run has not been evaluated, so there is no quality to show. Start it again with *Measure perplexity* switched on.")
        return
    figures, words = data.metrics(run), kinds(table)
    rows = figures[(figures.metric == results.PERPLEXITY) & (figures.domain == domain)]
    made = comparisons.quality(rows.assign(text=rows.text.map(words)))
    widgets.chart(entitled(made, f"Perplexity of every method, pruned for {domain}"), "results-quality")
    gaps = data.against(run, method, domain)
    for r in table[table.method == method].itertuples():
        gap = gaps[resident.DENSE][r.text]
        st.markdown(f"- **{mine}** on {words[r.text]}: {number(r.value)} ({number(r.low)} to {number(r.high)}), dense {number(r.dense)} "
                    f"({number(r.dense_low)} to {number(r.dense_high)}). On the same {gap.n} windows that is **{signed(100 * gap)} %** (95\u00a0%: "
                    f"{signed(100 * gap.low)} to {signed(100 * gap.high)}) against dense: {VERDICTS[metrics.verdict(metrics.PERPLEXITY, gap)]}.")
    beside(gaps, words)
    if min(gap.n for found in gaps.values() for gap in found.values()) < FEW:
        st.caption(f"**Fewer than {FEW} windows** are few: take such a verdict as a hint. A run with more held-out documents says more.")
    st.caption("Perplexity on held-out text, which pruning has not seen: lower is better. Intervals say how far other texts of the same kind might "
               "have moved each figure. Differences are taken on the same windows of text, so what makes a window hard for both does not blur "
               "them; more held-out documents make all intervals narrower.")


def beside(gaps: dict[str, dict], words: dict[str, str]) -> None:
    """The selected method against every other one, window by window."""
    rows = [{"on": words[text], "against": other, "perplexity differs by": f"{signed(100 * gap)} %", "95 % interval": f"{signed(100 * gap.low)} to {signed(100 * gap.high)} %",
             "windows": gap.n, f"{mine} is": metrics.verdict(metrics.PERPLEXITY, gap)} for other, found in gaps.items() for text, gap in found.items()
            if other != resident.DENSE and text in words]
    if rows:
        st.markdown(f"**{mine} against the other methods**, on the same windows")
        st.dataframe(pd.DataFrame(rows), hide_index=True, key="results-against")


def over_sparsity() -> None:
    """Runs of the same model at several sparsities."""
    st.subheader("Quality against sparsity")
    texts = list(kinds(results.against_dense(data.metrics(run), domain)))
    if not texts:
        st.caption("Nothing was evaluated.")
        return
    text = texts[0] if len(texts) == 1 else st.segmented_control("Held-out text", texts, default=texts[0], key="results-text",
                                                                 bind="query-params", required=True)
    others = data.same_model(run, state.finished_runs())
    table, left_out = results.over_sparsity({r.id: (r.config, data.metrics(r)) for r in [run, *others]}, domain, text)
    if left_out:
        st.caption(f"Left out, because they were judged on other held-out windows: {listed(left_out, 4)}.")
    if table[table.method != results.DENSE].sparsity.nunique() < 2:
        st.info(f"All finished runs of this model for {domain} have one sparsity. Start a run at another one, "
                "judged on as many held-out documents, on the page **Run**: they meet here. The experiment *How much can go, and by which method?* at "
                "the foot of this page shows such figures of the starter model, and can be started for this run.")
        return
    made = comparisons.quality(table.assign(method=table.series), x="sparsity", series="method")
    widgets.chart(entitled(made, f"Perplexity on {text} text against sparsity, pruned for {domain}"), "results-sparsity")


# ---- runs beside each other


def compare() -> None:
    """Settings in which runs differ, and their figures."""
    st.subheader("Compare runs")
    runs = {r.id: r for r in state.finished_runs()}
    others = [name for name in runs if name != run.id]
    if not others:
        st.caption("This is the only finished run. Once there is another, they stand beside each other here.")
        return
    st.session_state["results-runs"] = [n for n in st.session_state.get("results-runs", others[:1]) if n in others]
    chosen = [run.id, *st.multiselect(f"Beside {run.id}", others, key="results-runs", bind="query-params")]
    if len(chosen) < 2:
        st.caption("Choose a run to stand beside it.")
        return
    table = results.differing({name: runs[name].config for name in chosen})
    if table.empty:
        st.markdown("These runs have **the same settings**.")
    else:
        st.markdown("**Settings that differ**")
        st.dataframe(table, hide_index=True)
    figures = results.side_by_side({name: data.metrics(runs[name]) for name in chosen})
    st.markdown("**Perplexity** (95 % interval; n windows of held-out text: where n differs, so does the text, and the figures do not compare)")
    st.dataframe(figures, hide_index=True)
    take_csv("Both tables (CSV)", table.to_csv(index=False) + "\n" + figures.to_csv(index=False), "runs.csv", "results-compare-csv")


# ---- size and speed


def size_and_speed() -> None:
    """Parameters, bytes and speed: three different things."""
    st.subheader("Size and speed")
    st.caption("Three different things. Zeros that lie anywhere in a matrix (unstructured) make neither the file nor the memory smaller and "
               "nothing faster by themselves: they are multiplied like any other number. Packing, compression or special kernels use them.")
    record = run.record
    total, prunable = record["model"]["weights"], record["model"]["prunable_weights"]
    shares = data.metrics(run)
    share = shares[(shares.metric == results.SPARSITY) & (shares.method == method) & (shares.domain == domain)].value.item()
    removed = round(share * prunable)
    places = st.columns(4)
    places[0].metric("Parameters", f"{total:,}")
    quiet = {"delta_color": "off", "delta_arrow": "off"}
    places[1].metric("Prunable", f"{prunable:,}", f"{percent(prunable / total)} of all", **quiet)
    places[2].metric("Removed (zero)", f"{removed:,}", f"{percent(share)} of prunable, {percent(removed / total)} of all", **quiet)
    held = record["device"]["precision"]
    in_memory = total * getattr(torch, held).itemsize
    places[3].metric("In memory", bytes_of(in_memory), f"{held}, dense or pruned", **quiet,
                     help="Weights times bytes of each, in the precision that the run used.")
    measured = st.session_state.get("results-measured", {}).get(about())
    if st.button("Measure compression and speed on this machine", key="results-measure", icon=":material/speed:",
                 help=f"zlib of the dense and of the zeroed weights, then {ROUNDS} rounds of {TOKENS} tokens, dense and pruned in turn."):
        place = st.empty()
        with widgets.guarded():
            measured = measure(place)
            st.session_state.setdefault("results-measured", {})[about()] = measured
        place.empty()
    with widgets.guarded():
        sizes(removed, measured)
    if measured:
        speed(measured)


def about() -> tuple:
    """What a measurement is of: the run's own mask of one method and domain."""
    return (*data.stamp(run), method, domain)


def measure(place) -> dict:
    """Compression and speed, dense and pruned in turn, so that whatever else the machine does meets both alike."""
    found = {"shares": [], "dense": [], "pruned": []}
    own = data.own_sparsity(run)
    precision = stored_precision(run.config["model"], run.record["model"]["commit"] or run.config["revision"])
    with resident.taken(run, resident.waits(place)) as model:
        variants = [("dense", resident.DENSE), ("pruned", method)]
        place.progress(0.0, "Measuring compression …")
        for _, variant in variants:
            with resident.variant(model, run, variant, domain, own):
                share, found["sampled"] = results.compressed_share(model.model.parameters(), precision)
                found["shares"].append(share)
        for at in range(ROUNDS):
            place.progress((at + 1) / (ROUNDS + 1), f"Measuring speed, round {at + 1} of {ROUNDS} …")
            for name, variant in variants[::1 if at % 2 else -1]:   # the order changes, lest one always comes first
                with resident.variant(model, run, variant, domain, own):
                    generate.tokens_per_second(model.model, model.tokenizer, PROMPT, WARM)
                    found[name].append(generate.tokens_per_second(model.model, model.tokenizer, PROMPT, TOKENS))
    return found


def sizes(removed: int, measured: dict | None) -> None:
    """Bytes on disk, as they are and as they could be."""
    record = run.record
    folder = weights.model_folder(record)
    dense = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    precision = stored_precision(record["config"]["model"], record["model"]["commit"] or record["config"]["revision"])
    mask = run.path("masks", method, domain)
    if not mask.is_file():
        raise InputError(f"The file {mask} was not found", "it was deleted since the run", "resume the run on the page Run, which makes it anew")
    table = results.size_table(dense, removed, precision.itemsize, mask.stat().st_size, measured and tuple(measured["shares"]))
    made = comparisons.bytes_bars(table)
    widgets.chart(entitled(made, f"Bytes on disk, {mine} ({str(precision).removeprefix('torch.')})"), "results-bytes")
    st.caption("“As it is stored” and the mask are the files themselves; “kept weights + packed mask” is counted: what a format needs that leaves "
               "out the zeros and spends one bit on every prunable weight. "
               + (f"Compression was measured with zlib on {percent(measured['sampled'], 0)} of the weights." if measured else
                  "Compression is measured with the button above."))


def speed(measured: dict) -> None:
    """Tokens per second, and whether the difference is more than noise."""
    ratio, low, high = results.speed_ratio(measured["dense"], measured["pruned"])
    table = pd.DataFrame({"round": range(1, ROUNDS + 1), "dense": measured["dense"], mine: measured["pruned"]})
    st.markdown("##### Speed")
    left, right, words = st.columns([1, 1, 3])
    left.metric("Dense", f"{table.dense.median():.1f}", "tokens per second, median", delta_color="off", delta_arrow="off")
    right.metric("Pruned", f"{table[mine].median():.1f}", "tokens per second, median", delta_color="off", delta_arrow="off")
    same = low <= 1 <= high
    words.markdown(f"**{mine}** writes **{ratio:.2f} times** as fast as dense on this machine (mean of pruned ÷ dense in the same round, which other work on the machine disturbs less than the medians; 95\u00a0%: {low:.2f} to {high:.2f}, "
                   f"{ROUNDS} rounds of {TOKENS} tokens, in turn). "
                   + ("**No difference beyond the noise**, as is to be expected: unstructured zeros buy no speed." if same else
                      "The interval leaves out 1, but both do the same multiplications: look for what else keeps this machine busy, and "
                      "measure again, before you credit the zeros."))
    with st.popover("Take it away", key="results-speed"):
        take_csv("Speeds (CSV)", table.to_csv(index=False), "speed.csv", "results-speed-csv")


def bytes_of(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


# ---- export


def checkpoint() -> None:
    """The selected mask as a folder that every loader takes."""
    st.subheader("Export the checkpoint")
    exports = state.RUNS.absolute().parent / "exports"
    st.markdown(f"The model with the mask of **{mine}** as a folder for `AutoModelForCausalLM.from_pretrained`: dense safetensors with zeros, "
                "tokenizer, the mask, and a model card with what was measured.")
    if method == "dpruner" and run.config["compensate"] != "walk":
        st.caption("This run " + ("left the kept weights as they are" if not run.config["compensate"] else
                                  "moved the kept weights after the mask was chosen") + ". For a model to be used, start one with *a model to use* on the page Run: it keeps more of what the model knew.")
    default = f"{run.id}-{method}-{domain}"
    name = st.text_input("Folder name", default, key=f"results-folder-{default}", max_chars=120, help=f"It is made in {exports}.")
    if st.button("Export", key="results-export", icon=":material/save:"):
        with widgets.guarded(), st.spinner("Writing, and counting the zeros in what was written …"):
            if not re.fullmatch(r"[A-Za-z0-9_@~+-][A-Za-z0-9_.@~+-]*", name):
                raise InputError(f"The folder name {name!r} cannot be used",
                                 "it may hold letters, digits and . _ @ ~ + - and does not begin with a dot", "choose another name")
            place = st.empty()
            with resident.turn(resident.waits(place)):
                place.empty()
                resident.clear()   # the export loads a copy of its own
                folder = export(run, method, domain, exports / name)
            summary(folder)
    elif (exports / name).is_dir() and re.fullmatch(r"[\w.@~+-]+", name):
        st.caption("There is a folder of that name already:")
        summary(exports / name)


def summary(folder) -> None:
    """What an export holds and what was verified in it."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8").split("---\n", 2)[-1] if card.is_file() else ""
    verified = next((line for line in text.splitlines() if "prunable weights are zero" in line), "")
    files = sorted(p for p in folder.iterdir() if p.is_file())
    size = bytes_of(sum(p.stat().st_size for p in files))
    st.success(f"**{folder}** · {size} in {len(files)} files. {verified}", icon=":material/verified:")
    st.code(f'from transformers import AutoModelForCausalLM, AutoTokenizer\nmodel = AutoModelForCausalLM.from_pretrained("{folder}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{folder}")', language="python")
    with st.expander("Model card and files"):
        st.dataframe(pd.DataFrame({"file": [p.name for p in files], "bytes": [p.stat().st_size for p in files]}), hide_index=True)
        st.markdown(re.sub(r"^#", "####", text, flags=re.MULTILINE))


# ---- everything as a table


def table() -> None:
    """metrics.parquet as it is."""
    st.subheader("All figures of this run")
    figures = data.metrics(run)
    st.dataframe(figures, hide_index=True, height=320, placeholder="")
    take_csv("metrics.csv", figures.to_csv(index=False), f"{run.id}-metrics.csv", "results-metrics-csv")
    st.caption("One row for each figure: for which mask (method, domain), on which text, its value with a 95 % interval where it is estimated, "
               "and n, how many windows of text or weights it rests on.")


def asked() -> None:
    """Experiments with this run's settings."""
    experiments.section(run)


for part in (quality, over_sparsity, compare, size_and_speed, checkpoint, table, asked):   # experiments, which are long, after all that is of this run
    with widgets.guarded():
        part()
