"""The page Generate: one prompt, continued by the dense model and by pruned variants of it, beside each other."""

import contextlib
import html
import time

import pandas as pd
import streamlit as st

from analysis import comparisons, generation
from analysis.chart import counted, listed, percent
from app import data, resident, state, widgets
from app.resident import DENSE
from dpruner import generate
from dpruner.errors import InputError
from dpruner.store import Run

PROMPTS = {
    "general": ("The history of the Roman Empire", "In the morning she walked down to the river and",
                "The first people who lived in the valley"),
    "healthcare": ("The treatment of asthma includes", "What are the symptoms of diabetes?", "The bacteria that cause this infection are"),
    "legal": ("The Mayor shall have the authority to", "The court held that the defendant", "A license issued under this chapter shall"),
    "finance": ("If the price of a good rises,", "The demand curve for labor", "When the central bank lowers the interest rate,"),
    "science": ("The cells of a plant differ from those of an animal because", "The experiment showed that the temperature of the water"),
    "code": ("def mean(values):\n    ", "The function returns the number of"),
}
MOST_BITS = 8.0   # of surprisal: where the colour is full, one chance in 256
END, EMPTY = "■", "∅"
MARK = "border-bottom:3px solid #4a9fd8"

st.title("Generate")
selected = state.selection()
if selected is None:
    st.stop()
run = selected.run


def name_of(method: str, domain: str) -> str:
    return f"{method} for {domain}"


def take_prompt() -> None:
    """The chosen beginning becomes the prompt."""
    if st.session_state["generate-start"]:
        st.session_state["generate-prompt"] = st.session_state["generate-start"].split(": ", 1)[1]


def asked() -> dict:
    """The fields of the page, as what is to be generated."""
    known = [selected.domain, *dict.fromkeys(d for _, d in data.pairs(run)), *PROMPTS]
    starts = [f"{d}: {text}" for d in dict.fromkeys(known) for text in PROMPTS.get(d, ())]
    st.session_state.setdefault("generate-prompt", starts[0].split(": ", 1)[1])
    st.selectbox("Start from", starts, index=None, placeholder="A prompt for one of the built-in domains", key="generate-start",
                 on_change=take_prompt)
    prompt = st.text_area("Prompt", key="generate-prompt", bind="query-params", height=90,
                          help="The model continues it. Few small models follow instructions: give them the beginning of a text.")
    mine = name_of(selected.method, selected.domain)
    others = [name_of(*pair) for pair in data.pairs(run) if name_of(*pair) != mine]
    first = [o for o in others if o.startswith(f"{selected.method} for ")][:1]
    st.session_state["generate-beside"] = [o for o in st.session_state.get("generate-beside", first) if o in others]
    beside = st.multiselect(f"Beside dense and {mine}", others, key="generate-beside", bind="query-params",
                            help="The one of the sidebar is always shown; its sparsity holds for all.")
    how, length, *more = st.columns([2, 2, 1, 1, 1])
    sampling = how.segmented_control(
        "Choice of tokens", ["Greedy", "Sampling"], default="Greedy", key="generate-how", bind="query-params", required=True,
        help="Greedy takes the most probable token each time. Sampling draws; models that agree draw the same.") == "Sampling"
    count = length.slider("New tokens, at most", 8, 256, 48, 8, key="generate-tokens", bind="query-params")
    settings = {"max_new_tokens": count}
    if sampling:
        settings |= {
            "temperature": more[0].number_input("Temperature", value=0.8, step=0.1, key="generate-temperature", bind="query-params",
                                                help="Below 1 keeps to what is probable, above 1 dares more."),
            "top_p": more[1].number_input("Top-p", value=0.95, step=0.05, key="generate-top-p", bind="query-params",
                                          help="Draw only from the most probable tokens that together have this probability."),
            "seed": more[2].number_input("Seed", value=0, key="generate-seed", bind="query-params", help="The same for all variants.")}
    return {"run": str(run.folder), "prompt": prompt, "variants": [DENSE, mine, *beside], "sparsity": selected.sparsity,
            "settings": settings}


# ---- the work


def write(found, wanted: dict, name: str, others: list[dict], show) -> dict:
    """One text by the model as it is now, and what it makes of the others' texts."""
    text = {"name": name, "prompt": wanted["prompt"], "ids": [], "tokens": [], "log_probs": {name: []}, "ended": False, "prompt_ids":
            generate.prompt_ids(found.model, found.tokenizer, wanted["prompt"])}
    began = shown = time.perf_counter()
    for token in generate.generate(found.model, found.tokenizer, wanted["prompt"], **wanted["settings"]):
        text["ids"].append(token.id)
        text["tokens"].append(token.text or (END if token.end else ""))
        text["log_probs"][name].append(token.log_prob)
        text["ended"] = token.end
        if time.perf_counter() - shown > 0.1:   # each time the whole text travels
            show(text)
            shown = time.perf_counter()
    text["seconds"] = time.perf_counter() - began
    for other in others:
        read(found, name, other)
    return text


def read(found, name: str, text: dict) -> None:
    """What the model as it is now makes of a text that another wrote."""
    text["log_probs"][name] = generate.read(found.model, text["prompt_ids"], text["ids"])


def produce(wanted: dict) -> tuple[list[dict], list[str]]:
    """All texts, column by column, then what each model makes of the texts that came after its own; and what went wrong, in sentences."""
    texts, problems = [], []
    for name, place in zip(wanted["variants"], columns(len(wanted["variants"])), strict=True):
        with place:
            head(name)
            area = st.empty()
        area.caption("Loading the model …")
        try:
            with using(wanted, name, area) as found:
                texts.append(write(found, wanted, name, texts, lambda text, area=area: area.html(coloured(text, text["name"], texts))))
            area.html(coloured(texts[-1], name, texts))
        except InputError as error:
            problems.append(f"{name}: {error}")
            area.error(str(error), icon=":material/error:")
            if name == DENSE:   # nothing else will work either
                break
    for at, earlier in enumerate(texts[:-1]):
        try:
            with using(wanted, earlier["name"], st.empty()) as found:
                for text in texts[at + 1:]:
                    read(found, earlier["name"], text)
        except InputError as error:
            problems.append(f"{earlier['name']}: {error}")
    return texts, problems


@contextlib.contextmanager
def using(wanted: dict, name: str, area):
    """The resident model as one variant, for this session alone; `area` says so while another session has it."""
    with resident.taken(run, resident.waits(area)) as found:
        area.caption("Reading the prompt …")
        with resident.variant(found, run, *split(name), wanted["sparsity"]):
            yield found
        area.empty()


def split(name: str) -> tuple[str, str]:
    method, _, domain = name.partition(" for ")
    return method, domain


# ---- what is shown


def head(name: str) -> None:
    st.markdown(f"##### {'Dense' if name == DENSE else name}")


def coloured(text: dict, reader: str, texts: list[dict]) -> str:
    """A text as HTML: surprisal as the ground of every token, what is not in the dense text underlined, exact values on hover."""
    bits = generation.surprisal(text["log_probs"].get(reader, text["log_probs"][text["name"]]))
    same = alignment(text, texts)
    prompt = text["prompt"] if len(text["prompt"]) <= 80 else f"…{text['prompt'][-80:]}"
    pieces = [f'<span title="the prompt" style="opacity:0.6">{html.escape(prompt)}</span>']
    for at, (token, b) in enumerate(zip(text["tokens"], bits, strict=True)):
        differs = same is not None and not same.equal_b[at]
        shown = html.escape(token).replace("\n", "⏎\n") or EMPTY
        told = f"token {at + 1}: “{token}”, {b:.2f} bits (p = {2 ** -b:.3g}) to {reader}" + (", not in the dense text" if differs else "")
        pieces.append(f'<span title="{html.escape(told)}" style="{ground(b)};{MARK if differs else ""}">{shown}</span>')
    return f'<div style="white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.75;font-size:0.95rem">{"".join(pieces)}</div>'


def ground(bits: float) -> str:
    """The colour behind a token: one hue, so that it reads the same to all eyes, as strong as the surprisal."""
    return f"background:rgba(213,94,0,{0.72 * min(bits, MOST_BITS) / MOST_BITS:.2f})"


def alignment(text: dict, texts: list[dict]) -> generation.Alignment | None:
    """The text beside the dense one; None for that itself, and where there is none."""
    dense = next((t for t in texts if t["name"] == DENSE), None)
    return None if dense is None or text["name"] == DENSE else generation.align(dense["ids"], text["ids"])


def legend(reader: str) -> None:
    steps = "".join(f'<span style="{ground(b)};padding:2px 9px">{b:.0f}{"+" if b == MOST_BITS else ""}</span>'
                    for b in (0, 1, 2, 3, 4, 6, MOST_BITS))
    st.html(f'<div style="font-size:0.85rem">Surprisal of each token to {html.escape(reader)}, in bits: {steps} &emsp; '
            f'<span style="{MARK}">underlined</span>: not in the dense text &emsp; ⏎ new line &ensp; {END} end of the text &ensp; {EMPTY} a token without a sign of its own</div>')
    st.caption("**How to read this:** the stronger the colour, the less that model expected the token: n bits are a chance of one in 2ⁿ. "
               "Exact values stand under the pointer, and in the table below.")


def show(texts: list[dict]) -> None:
    """Texts beside each other, what they share, and what each model makes of them."""
    told_identical(texts)
    reader = "its own model"
    if len(texts) > 1 and all(DENSE in t["log_probs"] for t in texts):
        reader = st.segmented_control("Colour: surprisal to", ["its own model", "the dense model"], default="its own model",
                                      key="generate-colour", bind="query-params", required=True,
                                      help="To its own model: how sure it was of what it wrote. To the dense model: what pruning made "
                                           "it say that the dense model would hardly have said.")
    for text, place in zip(texts, columns(len(texts)), strict=True):
        with place:
            head(text["name"])
            st.html(coloured(text, DENSE if reader == "the dense model" else text["name"], texts))
            st.caption(words(text, texts))
    legend(reader)
    if len(texts) > 1:
        readings(texts)
    names = [t["name"] for t in texts]
    with st.expander("Token by token, as a figure to take away", on_change="rerun", key="generate-open", expanded=False) as box:
        if box.open:
            if st.session_state.get("generate-strip") not in names:
                st.session_state.pop("generate-strip", None)
            chosen = texts[names.index(st.selectbox("Text of", names, key="generate-strip"))]
            same = alignment(chosen, texts)
            by = DENSE if reader == "the dense model" else chosen["name"]
            table = generation.token_table(chosen["tokens"], chosen["log_probs"][by], None if same is None else same.equal_b)
            widgets.chart(comparisons.token_strip(table, f"{chosen['name']} as read by {by}", MOST_BITS), "generate-strip-chart")
            st.dataframe(table, hide_index=True, height=240)


def told_identical(texts: list[dict]) -> None:
    """In words, where texts are the same token by token."""
    same = [t["name"] for t in texts if (found := alignment(t, texts)) is not None and found.identical]
    if same:
        verb = "writes" if len(same) == 1 else "write"
        st.success(f"**Identical:** {listed(same)} {verb} the very same tokens as dense.", icon=":material/equal:")


def words(text: dict, texts: list[dict]) -> str:
    """What stands under a text: its length, its perplexity, where it leaves the dense one."""
    own = text["log_probs"][text["name"]]
    told = (f"{counted(len(own), 'token')} in {text['seconds']:.1f} s, {'ended by itself' if text['ended'] else 'cut at the limit'}. "
            f"Perplexity **{generation.perplexity(own):.2f}** under its own model.")
    same = alignment(text, texts)
    if same is None:
        return told
    if same.identical:
        return f"{told} **Identical to dense.**"
    differ = int((~same.equal_b).sum())
    return f"{told} Parts from dense at token **{same.parts_at + 1}**; {differ} of its tokens are not in the dense text."


def readings(texts: list[dict]) -> None:
    """Perplexity of every text under every model."""
    st.markdown("##### Perplexity of every text under every model")
    names = [t["name"] for t in texts]
    table = pd.DataFrame([{"text written by": t["name"], **{f"read by {n}": generation.perplexity(t["log_probs"].get(n, []))
                                                            for n in names}} for t in texts])
    st.dataframe(table, hide_index=True, column_config={c: st.column_config.NumberColumn(format="%.2f") for c in table.columns[1:]})
    st.caption("**How to read this:** a row is one text, read by each model; 1 would be a text the model was sure of. Every model finds its own "
               "text easier than another's, so look along a row: a pruned model that reads the dense text with a much higher perplexity has lost what "
               "makes it expect such text. One text is one sample: **Results** has held-out text with intervals.")
    tokens = pd.concat([generation.token_table(t["tokens"], t["log_probs"][n]).assign(text=t["name"], reader=n)
                        for t in texts for n in names if n in t["log_probs"]], ignore_index=True).drop(columns="differs")
    st.download_button("All tokens (CSV)", tokens.to_csv(index=False).encode(), "tokens.csv", "text/csv", key="generate-csv",
                       on_click="ignore")


def columns(count: int) -> list:
    """Places beside each other; rows of three where there are many, of two where that leaves none alone."""
    wide = count if count <= 3 else 2 if count == 4 else 3
    return [place for start in range(0, count, wide) for place in st.columns(wide)[:count - start]]


def about(wanted: dict, of: Run) -> str:
    at, own = percent(wanted['sparsity'], 0), data.own_masks(of, wanted["sparsity"])
    moved = [name for name in wanted["variants"] if name != DENSE and of.path("weights", *split(name)).is_file()]
    of_moved = f"the kept weights that {listed(moved)} moved"
    return (f"At **{at}** sparsity: " + ("the run's own masks" if own else "masks cut from the run's ranks, one threshold for each matrix")
            + (f", {'with' if own else 'without'} {of_moved}{'' if own else ' at its own sparsity'}." if moved else "."))


st.caption("The dense model and pruned copies of it continue the same text, with the same seed.")
wanted = asked()
pressed = st.button("Generate", type="primary", key="generate-go", icon=":material/play_arrow:")
st.caption(about(wanted, run))
if pressed:
    texts, problems = produce(wanted)
    st.session_state["generate-result"] = {**wanted, "texts": texts, "problems": problems}
    st.rerun()   # the same texts once more, with all that is only known at the end
result = st.session_state.get("generate-result")
if result is None:
    st.info("Press **Generate**: the texts appear here, column by column, each token coloured by how little its model expected it.")
else:
    if {key: result[key] for key in wanted} != wanted:
        st.info(f"These texts are from earlier settings: {listed(result['variants'])} at {percent(result['sparsity'], 0)}, "
                f"“{result['prompt'][:60]}”. Press **Generate** for the present ones.", icon=":material/history:")
    for problem in result["problems"]:
        st.error(problem, icon=":material/error:")
    if result["texts"]:
        show(result["texts"])
