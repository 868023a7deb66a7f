"""The card beside the form: can this run be done, what will it take, and the button that starts it."""

import streamlit as st

from analysis.chart import listed, percent
from app import data, state, uploads, widgets
from dpruner import RunConfig, estimate, worker
from dpruner.model import count_weights, decoder_blocks, max_length, skipped_weights
from dpruner.units import duration, size


def card(settings: dict, refused: list[str]) -> None:
    """What a run of these settings would take, and the button.

    Args:
        settings: as RunConfig takes them.
        refused: names of chosen files that cannot be used.
    """
    st.markdown("#### Before it starts")
    config, ready = RunConfig(**settings), False
    if refused:
        st.info(f"Take {listed(refused)} out of *Your files* first: {'it' if len(refused) == 1 else 'they'} cannot be used as "
                f"{'it is' if len(refused) == 1 else 'they are'}.")
    else:
        with widgets.guarded(), uploads.named(state.RUNS):
            ready = examine(config)
    start(config, ready)


def examine(config: RunConfig) -> bool:
    """Say whether a run can be done, and what it will take.

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
    told = estimate.told(config, state.RUNS, state.CACHE, model, data.speed(config), data.texts)
    a, b = st.columns(2)
    a.metric("Time, about", duration(told["seconds"]),
             help="The planned work at the speed just measured on this device, if it has nothing else to do; without downloads.")
    b.metric("Memory, about", size(sum(told["memory"].values())),
             help="At the worst moment:  \n" + "  \n".join(f"{what}: {size(part)}" for what, part in told["memory"].items()))
    st.caption(f"On {told['device']} in {told['precision']}; {size(told['free'])} of memory are free now. "
               f"Run folder and cache will take about {size(told['disk'])} of disk.")
    if waiting := sum(told["outside"].values()):
        st.caption(f":material/swap_horiz: It would take {size(told['usual'])}: so weights, scores and masks of about {size(waiting)} wait "
                   f"{'in files of the cache folder' if told['plan']['files'] else 'in the memory of the host'}. The result is the same, later.")
    if told["download"]:
        st.caption(f"Its weights are not on this machine yet: about {size(told['download'])} to download first.")
    for caution in told["cautions"]:
        st.warning(caution, icon=":material/warning:")
    st.caption("The result is zeros among the weights. By themselves they make the model **neither smaller nor faster**: they show which "
               "weights a domain needs. The page Results tells sizes and measured speed.")
    return told["disk"] <= told["room"]


def show_model(config: RunConfig, model) -> None:
    """What a model is, as far as pruning goes."""
    prunable, total = count_weights(model)
    blocks = len(decoder_blocks(model)[1])
    st.markdown(f":material/check_circle: **{type(model).__name__}** can be pruned: {blocks} blocks, {prunable:,} of {total:,} weights "
                f"({percent(prunable / total, 0)}).")
    if left := skipped_weights(model):
        st.caption(f"Left alone: {sum(left.values()):,} weights in the blocks that are no plain linear layers, such as "
                   f"`{next(iter(left))}`.")


def start(config: RunConfig, ready: bool) -> None:
    """The button, and what it sets going."""
    if st.button("Start", type="primary", icon=":material/play_arrow:", disabled=not ready, key="run-start", width="stretch"):
        with widgets.guarded():
            run = worker.submit(config, state.RUNS, state.CACHE)
            st.session_state["_run-started"] = run.id   # the page goes to its top, where the run is seen
            st.rerun()
    st.caption("A run is a process of its own: the browser may be closed meanwhile. A device works on one run at a time; others wait.")
