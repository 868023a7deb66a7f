"""The form of a new run: model, domains and their text, settings, presets."""

import dataclasses
from pathlib import Path

import streamlit as st
import torch

from app import data, state, uploads, widgets
from dpruner import RunConfig
from dpruner.calibration import CATALOGUE, builtin_domains
from dpruner.compensate import HESSIANS
from dpruner.config import METHODS, split_domain
from dpruner.errors import InputError
from dpruner.files import USUAL_COLUMNS
from dpruner.formulas import DEFAULT_LAM, FORMULAS
from dpruner.loading import DTYPES, STARTER, pick_device
from dpruner.masks import GRANULARITIES

HELP = {f.name: f.metadata["help"][0].upper() + f.metadata["help"][1:] + "." for f in dataclasses.fields(RunConfig)}
DEFAULT = RunConfig()
QUICK = {"nsamples": 32, "seqlen": 128, "formula": "balanced", "finetune": False, "granularity": "matrix", "eval_documents": 3,
         "halves": True, "compensate": "none"}
PAPER = {"nsamples": 128, "seqlen": 2048, "formula": "release", "finetune": True, "epochs": 5, "granularity": "matrix", "sparsity": 50,
         "sparsity_of": "prunable", "eval_documents": 100, "halves": True, "compensate": "none", "general_mode": "sequential", "lam": None}
SOURCES = {STARTER: "Starter model", "folder": "A folder on this machine", "hub": "Hugging Face hub"}
SHOWN_CHARACTERS = 600
PURPOSES = {"none": "masks to look at and compare: the kept weights stay as they are", "walk": "a model to use: the best that 50 % and more leave",
            "after": "masks as above, with the kept weights moved afterwards"}


def fields() -> tuple[dict, list[str]]:
    """All fields: what they say, as RunConfig takes it, and the names of chosen files that cannot be used."""
    model = choose_model()
    domains, refused = choose_domains()
    return {**model, "domains": tuple(domains), **choose_settings()}, refused


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


def choose_domains() -> tuple[list[str], list[str]]:
    """Fields of the domains, and a look at their text: each domain as RunConfig takes it, and the names of files that cannot be used."""
    st.markdown("**Domains**")
    built_in = [d for d in builtin_domains() if d != DEFAULT.general]
    chosen = list(st.multiselect("Built in", built_in, [d for d in DEFAULT.domains if d in built_in], key="run-domains",
                                 bind="query-params", help="Texts that come with this program. Two domains or more can be compared."))
    hub, own = st.columns(2)
    chosen += hub.multiselect("From the hub", list(CATALOGUE), key="run-catalogue", bind="query-params",
                              placeholder="Data sets to download",
                              help="Data sets of the Hugging Face hub; they are downloaded when the run starts.")
    bring_files(own)
    found, refused = choose_files()
    chosen += [f"{label}={source}" for label, source in found.items()]
    for name in (d for d in chosen if d in CATALOGUE):
        entry = CATALOGUE[name]
        st.caption(f"**{name}**: licence {entry.licence}" + (f"; {entry.note}" if entry.note else ""))
    preview(chosen)
    return chosen, refused


def bring_files(place) -> None:
    """Keep the files that the user brings, and choose them."""
    for file in place.file_uploader("Your own files", uploads.TYPES, accept_multiple_files=True, key="run-upload",
                                    help="txt, md, csv, jsonl, json or parquet, up to 50 MB each; every fifth document is held out to "
                                         "judge the result on."):
        if file.file_id in st.session_state.setdefault("run-seen", set()):   # taken out of the choice, or deleted, it stays out
            continue
        with widgets.guarded():
            path = str(uploads.save(file.name, file.getvalue(), state.RUNS).relative_to(uploads.folder(state.RUNS)))
            st.session_state["run-seen"].add(file.file_id)
            chosen = st.session_state.get("run-files", [])
            st.session_state["run-files"] = [*chosen, *({path} - set(chosen))]


def delete_files(there: dict[str, Path]) -> None:
    """A button for each file that was brought."""
    with st.popover("Delete files", icon=":material/delete:"):
        st.markdown("Delete a file from the machine that this program runs on? This cannot be undone. Runs that have read it keep what they found; "
                    "they can no longer go on or be repeated.")
        for name, path in there.items():
            st.button(f"Delete {path.name}", key=f"run-file-delete-{name}", on_click=delete_file, args=(path,))
    if problem := st.session_state.pop("run-file-problem", None):
        st.error(problem, icon=":material/error:")


def delete_file(path: Path) -> None:
    """For `on_click`: the list is then drawn without it."""
    try:
        uploads.delete(path, state.RUNS)
    except InputError as error:
        st.session_state["run-file-problem"] = str(error)


def choose_files() -> tuple[dict[str, Path], list[str]]:
    """Files of the user, brought now or before: {label: path of the text}, and the names of those that cannot be used."""
    there = {str(p.relative_to(uploads.folder(state.RUNS))): p.absolute() for p in uploads.saved(state.RUNS)}
    if not there:
        return {}, []
    st.session_state["run-files"] = [name for name in st.session_state.get("run-files", []) if name in there]
    found, refused = {}, []
    chosen = st.multiselect("Your files", list(there), format_func=lambda n: Path(n).name, key="run-files", help="Files brought now or earlier.")
    delete_files(there)
    for name in chosen:
        path, label = there[name], Path(name).name.split(".")[0]
        refused.append(path.name)
        with widgets.guarded(), uploads.named(state.RUNS):
            columns = uploads.text_columns(path)
            column = columns[0] if len(columns) == 1 else None
            if len(columns) > 1:
                column = st.selectbox(f"Column of {path.name} that holds the text", columns, key=f"run-column-{name}",
                                      index=next((i for i, c in enumerate(columns) if c.lower() in USUAL_COLUMNS), 0))
            text = uploads.as_text(path, column) if column else path
            data.texts(str(text), "calibration")
            taken = {*found, *builtin_domains(), *CATALOGUE}
            found[next(n for n in (label, *(f"{label}-{i}" for i in range(2, 1000))) if n not in taken)] = text
            refused.remove(path.name)
    return found, refused


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


def choose_settings() -> dict:
    """Fields of all other settings, as RunConfig takes them."""
    st.markdown("**Pruning**")
    values = {"methods": tuple(st.multiselect("Methods", METHODS, [*DEFAULT.methods, "magnitude"], **field("methods") | {
        "help": "dpruner is the method of the paper, domain and general are its two sides; the others are baselines."}))}
    a, b = st.columns(2)
    values["sparsity"] = a.slider("Sparsity (% removed)", 0, 100, **usual("sparsity", round(100 * DEFAULT.sparsity))) / 100
    values["sparsity_of"] = b.selectbox("Per cent of", ["prunable", "model"], **field("sparsity_of"),
                                        format_func={"prunable": "the prunable weights", "model": "the whole model"}.get)
    a, b, c = st.columns(3)
    values["granularity"] = a.selectbox("Granularity", [*GRANULARITIES, "2:4", "4:8"], **field("granularity"))
    values["formula"] = b.selectbox("Formula", list(FORMULAS), **field("formula"))
    values["lam"] = c.number_input("λ", value=None, step=0.1, placeholder=str(DEFAULT_LAM[values["formula"]]), **field("lam"))
    purpose = st.selectbox("What is D-Pruner's result for?", list(PURPOSES), format_func=PURPOSES.get, **field("compensate"))
    values["compensate"] = None if purpose == "none" else purpose
    if values["compensate"] == "walk":
        st.caption("The walk goes through the model layer by layer. It scores each weight by what the layer's output and what the loss would lose, in "
                   "the domain and outside it; lets matrices that the loss needs more lose less; and moves the kept weights to make up for the "
                   "removed ones. docs/RESULTS.md has what that is worth. Masks of such runs also tell of those moves: compare domains without them.")
    st.markdown("**Calibration**")
    a, b = st.columns(2)
    values["nsamples"] = a.number_input("Sequences per domain", step=8, **usual("nsamples", DEFAULT.nsamples))
    values["seqlen"] = b.number_input("Tokens per sequence", step=64, **usual("seqlen", DEFAULT.seqlen))
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
    return {"key": f"run-{name}", "help": f"{HELP[name]} Its name as a setting: `{name}`.", "bind": bind}


def usual(name: str, value) -> dict:
    """`field` (its bounds are RunConfig's, which has words for what lies outside: the browser has none), with a value to begin with, and to come back to when the browser goes back to an address without one."""
    return field(name) | {"value": value}


def more_settings() -> dict:
    """Settings that are rarely changed."""
    a, b = st.columns(2)
    return {
        "finetune": a.toggle("Fine-tune while scoring", **usual("finetune", DEFAULT.finetune)),
        "epochs": b.number_input("Epochs of it", **usual("epochs", DEFAULT.epochs)),
        "halves": a.toggle("Ceiling of similarity", **usual("halves", DEFAULT.halves)),
        "general_mode": b.selectbox("General importance", ["sequential", "static"], **field("general_mode")),
        "evaluate": a.toggle("Measure perplexity", **usual("evaluate", DEFAULT.evaluate)),
        "eval_documents": b.number_input("Held-out documents", **usual("eval_documents", 10)),
        "baseline_calibration": a.selectbox("wanda, sparsegpt calibrate on", HESSIANS, **field("baseline_calibration")),
        "seed": b.number_input("Seed", **usual("seed", DEFAULT.seed)),
        "memory": a.text_input("Memory limit", placeholder="what is free, or such as 16GB", max_chars=20, **field("memory") | {
            "help": "The most that the run may use on the device; empty: what is free there. With less, more waits outside it: the result "
                    "is the same, later. Its name as a setting: `memory`."}).strip() or None,
    }


def devices() -> list[str]:
    """Devices of this machine."""
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), *(["mps"] if torch.backends.mps.is_available() else [])]
