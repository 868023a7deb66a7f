"""The page Run: what is happening, what was found last, every run, and the form for a new one."""

import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import streamlit as st
import torch

from app import data, state, uploads, widgets
from dpruner import RunConfig, estimate, store, worker
from dpruner.calibration import CATALOGUE, builtin_domains
from dpruner.cli import REPEATED
from dpruner.config import METHODS, split_domain
from dpruner.errors import InputError
from dpruner.formulas import DEFAULT_LAM, FORMULAS
from dpruner.masks import GRANULARITIES
from dpruner.model import DTYPES, STARTER, count_weights, decoder_blocks, max_length, pick_device, skipped_weights
from dpruner.store import Run

HELP = {f.name: f.metadata["help"][0].upper() + f.metadata["help"][1:] + "." for f in dataclasses.fields(RunConfig)}
DEFAULT = RunConfig()
QUICK = {"nsamples": 32, "seqlen": 128, "formula": "balanced", "finetune": False, "granularity": "matrix", "eval_documents": 3,
         "halves": True, "compensate": None}
PAPER = {"nsamples": 128, "seqlen": 2048, "formula": "release", "finetune": True, "epochs": 5, "granularity": "matrix", "sparsity": 50,
         "sparsity_of": "prunable", "eval_documents": 100, "halves": True, "compensate": None, "general_mode": "sequential", "lam": None}
SOURCES = {STARTER: "Starter model", "folder": "A folder on this machine", "hub": "Hugging Face hub"}
PAGES = {"layers": "stacks", "overlap": "join_inner", "similarity": "grid_on", "explore": "zoom_in", "generate": "edit_note",
         "results": "monitoring"}
LOG_LINES = 40
SHOWN_CHARACTERS = 600


# What is happening


@st.fragment(run_every=1)
def happening() -> None:
    """Waiting, running and failed runs, looked at every second; when one ends the whole page is drawn anew, once."""
    known = statuses()
    active = [(run, status) for run, status in known if status["state"] in ("queued", "running")]
    before = st.session_state.get("run-active", set())
    st.session_state["run-active"] = {run.id for run, _ in active}
    if before - st.session_state["run-active"]:
        st.rerun()
    for run, status in sorted(active, key=lambda each: (each[1]["state"] != "running", each[0].id)):
        show_active(run, status)
    for run, status in known:   # newest first: what ended badly since the last good end
        if status["state"] == "done":
            break
        if status["state"] in ("failed", "damaged"):
            st.error(f"**{run.id}** {said(status)}", icon=":material/error:")
        elif status["state"] == "cancelled":
            st.info(f"**{run.id}** was cancelled. What it had finished is still in its folder.", icon=":material/cancel:")


def statuses() -> list[tuple[Run, dict]]:
    """Every run with its status as it is true now, newest first; a damaged folder's status says so in words."""
    found = []
    for run in store.find_runs(state.RUNS):
        try:
            found.append((run, worker.state(run)))
        except InputError as error:
            found.append((run, {"state": "damaged", "error": {"what": error.what, "why": error.why, "what to do": error.fix}}))
    return found


def said(status: dict) -> str:
    """A status as a sentence."""
    if error := status.get("error"):
        return f"{error['what']}: {error['why']}; {error['what to do']}."
    return {"queued": "waits", "running": f"is running ({status.get('progress', 0):.0%})", "done": "is finished",
            "cancelled": "was cancelled"}[status["state"]]


def show_active(run: Run, status: dict) -> None:
    """One run that waits or runs: stage, share done, time left, log, cancel."""
    with st.container(border=True):
        words, button = st.columns([5, 1], vertical_alignment="center")
        if status["state"] == "queued":
            ahead = status.get("ahead", 0)
            words.markdown(f"**{run.id}** waits: " + (
                f"{ahead} run{'s' * (ahead > 1)} before it on {status['device']}." if ahead else "it is just starting."))
        else:
            words.markdown(f"**{run.id}** is running.")
        if button.button("Cancel", key=f"run-cancel-{run.id}", icon=":material/cancel:",
                         help="End this run; what it has finished stays in its folder."):
            with st.spinner("Ending it …"):
                worker.cancel(run)
            st.rerun()
        if status["state"] == "running":
            at = f"{status['stage']} · {status['about']}".strip(" ·")
            left = f"about {duration(status['eta_seconds'])} left" if status["eta_seconds"] else "time left: known in a moment"
            st.progress(min(1.0, max(0.0, status["progress"])),
                        f"{at} · step {min(status['done'] + 1, status['total'])} of {status['total']} · {status['progress']:.0%} · {left}")
        if st.toggle("Log", key=f"run-log-{run.id}", help="What the process of this run has printed"):
            show_log(run)


def show_log(run: Run) -> None:
    """The end of a run's log."""
    try:
        lines = (run.folder / worker.LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    st.code("\n".join(lines[-LOG_LINES:]) or "Nothing has been printed: all goes well.", language=None)


def duration(seconds: float) -> str:
    """Seconds, rounded for people."""
    for length, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(1, round(seconds))} s"


def size(count: float) -> str:
    """Bytes, rounded for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(1, round(count / 1e6))} MB"


# What was found last


def latest(run: Run) -> None:
    """A finished run in a few figures, and where to see more of it."""
    found, settings = data.summary(run), run.config
    st.subheader("Latest result", anchor="latest")
    share = "whole model" if settings["sparsity_of"] == "model" else "prunable weights"
    st.markdown(f"**{settings['model']}**, {settings['sparsity']:.0%} of the {share} removed, for {', '.join(found['labels'])} · "
                f"`{run.id}`")
    st.markdown("**Perplexity on held-out text** (95 % interval)")
    if found["perplexity"].empty:
        st.caption("It was not measured in this run.")
    else:
        st.dataframe(found["perplexity"], hide_index=True, key="run-perplexity")
        st.caption("How badly the model predicts text it has not seen: lower is better. Where two intervals overlap much, these texts do "
                   "not tell which is better.")
    st.markdown("**Similarity of the domains' masks** (Jaccard)")
    if found["similarity"].empty:
        st.caption("There is nothing to compare: it takes two domains, and a method that regards them.")
    else:
        st.dataframe(found["similarity"], hide_index=True, key="run-similarity")
        st.caption("Weights that both masks keep, of those that either keeps. *Random*: what two random masks share. *Same domain*: what "
                   "masks from two halves of one domain's text share. Only the place between these two says something.")
    if found["lambda"]:
        st.markdown("λ, the weight of general importance, changed " + ", ".join(
            f"**{c['changed'] / c['of']:.2%}** of the mask decisions for {domain}" for domain, c in found["lambda"].items()) + ".")
    with st.container(horizontal=True):
        for page, icon in PAGES.items():
            st.page_link(f"views/{page}.py", label=page.capitalize(), icon=f":material/{icon}:", query_params={"run": run.id})


# Every run


def every_run(known: list[tuple[Run, dict]]) -> None:
    """One run of all to repeat, take along or delete."""
    st.subheader("All runs", anchor="runs")
    runs = {run.id: (run, status) for run, status in known}
    chosen = st.selectbox("Run to look at", list(runs), format_func=lambda i: f"{i} · {runs[i][1]['state']}", key="run-shown")
    run, status = runs[chosen]
    st.markdown(said(status) if status.get("error") else f"This run {said(status)}.")
    with widgets.guarded():
        config = RunConfig.from_dict(run.config)
        st.markdown("**Copy as command**: repeats this run, bit for bit on the same machine.")
        st.code(command(config), language="bash", wrap_lines=True)
    config_file, log, delete = st.columns([1, 1, 3])
    with config_file, widgets.guarded():
        st.download_button("Config file", json.dumps(run.record, indent=1, ensure_ascii=False).encode(), f"{run.id}.json",
                           "application/json", key="run-config", icon=":material/download:", on_click="ignore",
                           help="All settings, versions and fingerprints; `python -m dpruner prune --config FILE` repeats the run.")
    with delete.popover("Delete", icon=":material/delete:", disabled=status["state"] in ("queued", "running"),
                        help="A waiting or running run has to be cancelled first." if status["state"] in ("queued", "running") else None):
        st.markdown(f"Delete **{run.id}** and all its files? This cannot be undone.")
        st.button("Yes, delete it", key="run-delete", type="primary", on_click=delete_run, args=(run,))
    if log.toggle("Log", key="run-log-shown"):
        show_log(run)
    if problem := st.session_state.pop("run-delete-problem", None):
        st.error(problem, icon=":material/error:")


def delete_run(run: Run) -> None:
    """Remove a run's folder, never while it waits or runs."""
    try:
        over = worker.state(run)["state"] not in ("queued", "running")
    except InputError:   # damaged: there is nothing to keep
        over = True
    if not over:
        st.session_state["run-delete-problem"] = f"The run {run.id} is still going; cancel it first."
        return
    grave = state.RUNS / ".deleted" / run.id   # one folder deeper: gone at once for every reader
    try:
        grave.parent.mkdir(exist_ok=True)
        run.folder.rename(grave)
        shutil.rmtree(grave)
    except FileNotFoundError:   # somebody else deleted it
        pass
    except OSError as error:
        why = str(error.strerror).lower()
        st.session_state["run-delete-problem"] = f"The run {run.id} could not be deleted: {why}; check its permissions."


def command(config: RunConfig) -> str:
    """The command line that does what a config says: what the run is about, and every setting that is not the default."""
    words = ["python", "-m", "dpruner", "prune", "--model", config.model]
    for field in dataclasses.fields(RunConfig):
        value, flag = getattr(config, field.name), f"--{field.name.replace('_', '-')}"
        if field.name in REPEATED:
            words += [w for each in value for w in (f"--{REPEATED[field.name]}", each)]
        elif value != field.default and field.name != "model":
            words += [flag if value else f"--no-{flag[2:]}"] if isinstance(value, bool) else [flag, f"{value}"]
    for flag, folder, usual in (("--runs", state.RUNS, "runs"), ("--cache", state.CACHE, "cache")):
        words += [flag, str(folder)] if str(folder) != usual else []
    return shlex.join(words)


# A new run


def new_run() -> None:
    """The form, and beside it what the run would take."""
    st.subheader("New run", anchor="new")
    presets()
    form, card = st.columns([4, 3], gap="medium")
    with form:
        model = choose_model()
        domains = choose_domains()
        values = choose_settings(model)
    with card, st.container(border=True):
        st.markdown("#### Before it starts")
        ready = False
        with widgets.guarded():
            config = RunConfig(**model, domains=tuple(domains), **values)
            ready = before_start(config)
        start(config, ready)


def presets() -> None:
    """Buttons that set several fields at once."""
    quick, paper, _ = st.columns([1, 1, 3])
    quick.button("Quick look", icon=":material/bolt:", on_click=apply, args=(QUICK,), key="run-preset-quick",
                 help="Little calibration text and the scale-free formula: about half a minute for each domain on the starter model.")
    paper.button("Paper recipe", icon=":material/article:", on_click=apply, args=(PAPER,), key="run-preset-paper",
                 help="128 sequences of up to 2,048 tokens, fine-tuning while scoring (5 epochs), and what the authors' code adds up.")


def apply(preset: dict) -> None:
    """Put a preset into the fields; no sequence longer than the model was built for."""
    for name, value in preset.items():
        st.session_state[f"run-{name}"] = value
    limit = st.session_state.get("run-longest")
    if limit:
        st.session_state["run-seqlen"] = min(st.session_state["run-seqlen"], limit)


def choose_model() -> dict:
    """Fields of the model: its name and revision."""
    st.markdown("**Model**")
    source = st.segmented_control("Where it is", list(SOURCES), format_func=SOURCES.get, default=STARTER, required=True, key="run-source",
                                  bind="query-params", help="The starter model comes with this program: 12.5 million weights, no download.")
    if source == "folder":
        name = st.text_input("Folder", key="run-folder", placeholder="/home/me/models/my-llama", bind="query-params",
                             help="A folder written by save_pretrained: config.json, weights as safetensors, tokenizer.").strip()
        return {"model": str(Path(name).expanduser().absolute()) if name else "", "revision": None}
    if source == "hub":
        name, revision = st.columns([2, 1])
        name = name.text_input("Hub id", key="run-hub", placeholder="Qwen/Qwen2.5-0.5B", bind="query-params",
                               help="Owner and name, as on its page.").strip()
        revision = revision.text_input("Revision", key="run-revision", placeholder="main", bind="query-params",
                                       help=f"{HELP['revision']} Pin a commit to get the same model again.").strip()
        return {"model": name, "revision": revision or None}
    return {"model": STARTER, "revision": None}


def choose_domains() -> list[str]:
    """Fields of the domains, and a look at their text; each domain as RunConfig takes it."""
    st.markdown("**Domains**")
    built_in = [d for d in builtin_domains() if d != DEFAULT.general]
    chosen = list(st.multiselect("Built in", built_in, [d for d in DEFAULT.domains if d in built_in], key="run-domains",
                                 bind="query-params", help="Texts that come with this program. Two domains or more can be compared."))
    hub, own = st.columns(2)
    chosen += hub.multiselect("From the hub", list(CATALOGUE), key="run-catalogue", bind="query-params",
                              placeholder="Data sets to download",
                              help="Data sets of the Hugging Face hub; they are downloaded when the run starts.")
    files = choose_files(own)
    chosen += [f"{label}={source}" for label, source in files.items()]
    for name in (d for d in chosen if d in CATALOGUE):
        entry = CATALOGUE[name]
        st.caption(f"**{name}**: licence {entry.licence}" + (f"; {entry.note}" if entry.note else ""))
    preview(chosen)
    return chosen


def choose_files(place) -> dict[str, Path]:
    """Files of the user, brought now or before: {label: path of the text}."""
    with widgets.guarded():
        brought = place.file_uploader("Your own files", uploads.TYPES, accept_multiple_files=True, key="run-upload",
                                      help="txt, md, csv, jsonl, json or parquet, up to 50 MB each; every fifth document is held out to "
                                           "judge the result on.")
        for file in brought:
            path = str(uploads.save(file.name, file.getvalue(), state.RUNS).relative_to(uploads.folder(state.RUNS)))
            if path not in st.session_state.setdefault("run-seen", set()):   # chosen once; taken out of the choice it stays out
                st.session_state["run-seen"].add(path)
                st.session_state["run-files"] = [*st.session_state.get("run-files", []), path]
    there = {str(p.relative_to(uploads.folder(state.RUNS))): p for p in uploads.saved(state.RUNS)}
    if not there:
        return {}
    st.session_state["run-files"] = [name for name in st.session_state.get("run-files", []) if name in there]
    found: dict[str, Path] = {}
    for name in st.multiselect("Your files", list(there), format_func=lambda n: Path(n).name, key="run-files",
                               help="Files brought now or earlier."):
        with widgets.guarded():
            path, label = there[name].absolute(), Path(name).name.split(".")[0]
            columns = uploads.text_columns(path)
            if len(columns) > 1:
                column = st.selectbox(f"Column of {path.name} that holds the text", columns, key=f"run-column-{name}",
                                      index=next((i for i, c in enumerate(columns) if c.lower() in ("text", "content", "document")), 0))
                path = uploads.as_text(path, column)
            taken = {*found, *builtin_domains(), *CATALOGUE}
            found[next(n for n in (label, *(f"{label}-{i}" for i in range(2, 1000))) if n not in taken)] = path
    return found


def preview(domains: list[str]) -> None:
    """The first texts of one of the domains; only the one that is asked for is read."""
    if not domains:
        return
    label = st.selectbox("Look at the text of", [split_domain(d)[0] for d in domains], index=None, key="run-preview",
                         placeholder="choose a domain",
                         help="The first of its calibration texts. A data set of the hub is downloaded for it.")
    if label is None:
        return
    source = dict(map(split_domain, domains))[label]
    with widgets.guarded():
        texts = data.texts(source, "calibration", limit=3 if source in CATALOGUE else None)
        words = sum(len(t.split()) for t in texts)
        st.caption(f"The first {len(texts)} texts." if source in CATALOGUE else
                   f"{len(texts):,} texts to calibrate on, {words:,} words; others are held out to judge the result on.")
        for text in texts[:3]:
            with st.container(border=True):
                st.text(text[:SHOWN_CHARACTERS] + (" …" if len(text) > SHOWN_CHARACTERS else ""))


def choose_settings(model: dict) -> dict:
    """Fields of all other settings, as RunConfig takes them."""
    st.markdown("**Pruning**")
    values = {"methods": tuple(st.multiselect("Methods", METHODS, [*DEFAULT.methods, "magnitude"], **field("methods") | {
        "help": "dpruner is the method of the paper, domain and general are its two sides; the others are baselines."}))}
    a, b = st.columns(2)
    values["sparsity"] = a.slider("Sparsity (% removed)", 0, 100, round(100 * DEFAULT.sparsity), **field("sparsity")) / 100
    values["sparsity_of"] = b.selectbox("Per cent of", ["prunable", "model"], **field("sparsity_of"),
                                        format_func={"prunable": "the prunable weights", "model": "the whole model"}.get)
    a, b, c = st.columns(3)
    values["granularity"] = a.selectbox("Granularity", [*GRANULARITIES, "2:4", "4:8"], **field("granularity"))
    values["formula"] = b.selectbox("Formula", list(FORMULAS), **field("formula"))
    values["lam"] = c.number_input("λ", 0.0, value=None, step=0.1, placeholder=str(DEFAULT_LAM[values["formula"]]), **field("lam"))
    st.markdown("**Calibration**")
    a, b = st.columns(2)
    values["nsamples"] = a.number_input("Sequences per domain", 1, value=DEFAULT.nsamples, step=8, **field("nsamples"))
    values["seqlen"] = b.number_input("Tokens per sequence", 2, value=DEFAULT.seqlen, step=64, **field("seqlen"))
    st.markdown("**Where**")
    a, b = st.columns(2)
    values["device"] = a.selectbox("Device", [None, *devices()], format_func=lambda d: d or f"automatic ({pick_device()})",
                                   **field("device", None))
    values["dtype"] = b.selectbox("Precision", [None, *DTYPES], format_func=lambda d: d or "automatic", **field("dtype", None))
    with st.expander("More settings"):
        values |= more_settings()
    return values


def field(name: str, bind: str | None = "query-params") -> dict:
    """What the widget of a setting has in common with all others: key, help text, a place in the URL (not for those that may be empty)."""
    return {"key": f"run-{name}", "help": HELP[name], "bind": bind}


def more_settings() -> dict:
    """Settings that are rarely changed."""
    a, b = st.columns(2)
    return {
        "finetune": a.toggle("Fine-tune while scoring", DEFAULT.finetune, **field("finetune")),
        "epochs": b.number_input("Epochs of it", 1, value=DEFAULT.epochs, **field("epochs")),
        "halves": a.toggle("Ceiling of similarity", DEFAULT.halves, **field("halves")),
        "general_mode": b.selectbox("General importance", ["sequential", "static"], **field("general_mode")),
        "evaluate": a.toggle("Measure perplexity", DEFAULT.evaluate, **field("evaluate")),
        "eval_documents": b.number_input("Held-out documents", 1, value=10, **field("eval_documents")),
        "compensate": a.selectbox("Move the kept weights", [None, "after", "walk"], format_func=lambda c: c or "no, keep them as they are",
                                  **field("compensate", None)),
        "seed": b.number_input("Seed", 0, value=DEFAULT.seed, **field("seed")),
    }


def devices() -> list[str]:
    """Devices of this machine."""
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), *(["mps"] if torch.backends.mps.is_available() else [])]


def before_start(config: RunConfig) -> bool:
    """The card: can this run be done, and what will it take.

    Returns:
        Whether it may be started.

    Raises:
        InputError: it cannot be done.
    """
    if not config.model:
        st.info("Name the model first.")
        return False
    if not config.domains or not config.methods:
        st.info(f"Choose at least one {'method' if config.domains else 'domain'}.")
        return False
    config.check()
    model = data.blank_model(config.model, config.revision)
    st.session_state["run-longest"] = max_length(model)
    show_model(config, model)
    estimate.require_fitting(config, model)
    device = str(pick_device(config.device))
    dtype = str(estimate.precision(config, model, device)).removeprefix("torch.")
    texts = estimate.Outline(config, data.texts)
    seconds = estimate.seconds(config, model, texts, data.speed(config.model, config.revision, device, dtype), device)
    memory, free = estimate.peak_memory(config, model, device), estimate.available_memory(device)
    needed, room = estimate.disk(config, model), shutil.disk_usage(state.RUNS if state.RUNS.exists() else Path.cwd()).free
    a, b = st.columns(2)
    a.metric("Time, about", duration(seconds),
             help="The planned work at the speed just measured on this device, if it has nothing else to do; without downloads.")
    b.metric("Memory, about", size(sum(memory.values())),
             help="At the worst moment:  \n" + "  \n".join(f"{what}: {size(part)}" for what, part in memory.items()))
    st.caption(f"On {device} in {dtype}; {size(free)} of memory are free now. The run folder will take about {size(needed)} on disk.")
    if needed > room:
        st.error(f"The disk has only {size(room)} left; delete runs that are no longer needed, or choose fewer domains or methods.",
                 icon=":material/error:")
    if sum(memory.values()) > free:
        helpful = estimate.remedies(config, model, device, free)
        st.warning("This will probably **not fit into memory**. " + (
            "What would make it fit:\n" + "\n".join(f"- {r.words} (≈ {size(r.bytes)})" for r in helpful) if helpful else
            "No setting changes that: choose a smaller model, another device, or free some memory."), icon=":material/memory:")
    st.caption("The result is zeros among the weights. By themselves they make the model **neither smaller nor faster**: they show which "
               "weights a domain needs. The page Results tells sizes and measured speed.")
    return needed <= room


def show_model(config: RunConfig, model) -> None:
    """What a model is, as far as pruning goes."""
    prunable, total = count_weights(model)
    blocks = len(decoder_blocks(model)[1])
    st.markdown(f":material/check_circle: **{type(model).__name__}** can be pruned: {blocks} blocks, {prunable:,} of {total:,} weights "
                f"({prunable / total:.0%}).")
    if left := skipped_weights(model):
        st.caption(f"Left alone: {sum(left.values()):,} weights in the blocks that are no plain linear layers, such as "
                   f"`{next(iter(left))}`.")
    if download := estimate.to_download(config.model, config.revision, model):
        st.caption(f"Its weights are not on this machine yet: about {size(download)} to download first.")


def start(config: RunConfig, ready: bool) -> None:
    """The button, and what it sets going."""
    if st.button("Start", type="primary", icon=":material/play_arrow:", disabled=not ready, key="run-start", width="stretch"):
        with widgets.guarded():
            run = worker.submit(config, state.RUNS, state.CACHE)
            st.toast(f"{run.id} is queued.", icon=":material/play_circle:")
            st.rerun()
    st.caption("A run is a process of its own: the browser may be closed meanwhile. A device works on one run at a time; others wait.")


st.title("Run")
st.caption("Prune a model for your domains, and see which weights each of them needs.")
happening()
runs = statuses()
finished = [run for run, status in runs if status["state"] == "done"]
if finished:
    with widgets.guarded():
        latest(finished[0])
elif not runs:
    st.info("There is no run yet: fill in the form below and press Start.")
new_run()
if runs:
    every_run(runs)
