"""Step 2: one real linear, and what the removal of each of its weights costs."""

import streamlit as st

from analysis.chart import percent
from analysis.lesson import arithmetic, figures
from app import widgets
from app.lesson import job
from app.lesson.step import Step, cell, formula, take_click, window, written_out
from dpruner.hessian import dampen
from dpruner.store import Run

WEIGHTS, INPUTS, OWN, COST = VIEWS = ("a: weights W", "b: inputs H", "c: an input's own", "d: cost G")


def linear(run: Run) -> None:
    """A tile of W, of H, the diagonal of U, and G; the chosen weight is written out."""
    found, told = job.tensors(run, "layer.safetensors")
    W, H, U, seen, G = (found[name].numpy() for name in ("W", "H", "U", "seen", "G"))
    st.markdown(f"This is `{told['name'].removesuffix('.weight')}`, the first linear of the model: {W.shape[0]} outputs, {W.shape[1]} "
                f"inputs, {W.size:,} weights. A tile of 32 × 32 of them is shown, in four pictures, a to d: go through them in this order.")
    st.markdown("When one weight goes to zero, its output misses that weight times its input. The other weights of the row can make up for a part "
                "of it, as far as their inputs move together with that one. What no other can make up for is the cost of the weight.")
    view = st.segmented_control("Picture", VIEWS, default=WEIGHTS, key="learn-view", bind="query-params", required=True)
    left, right = st.columns([4, 3], gap="medium")
    with right:
        row, column, origin = cell(W.shape)
    rows, columns = window(origin)
    clicked = {"on_select": lambda: take_click("learn-tile"), "selection_mode": "points"}
    with left:
        if view == WEIGHTS:
            widgets.chart(figures.tile(
                W[rows, columns], origin, {"w": W[rows, columns]}, "row %{customdata[0]}, column %{customdata[1]}<br>w = "
                                                                   "%{customdata[2]:.4g}",
                title="A tile of W", quantity="weight", around_zero=True, chosen=(row, column),
                how="Every cell is one weight: how strongly one input (column) goes into one output (row). Orange and violet are the two "
                    "signs, pale is near zero."), "learn-tile", **clicked)
        elif view == INPUTS:
            square = slice(columns.start, columns.stop)
            widgets.chart(figures.tile(
                H[square, square], (origin[1], origin[1]), {"H": H[square, square]},
                "inputs %{customdata[0]} and %{customdata[1]}<br>H = %{customdata[2]:.4g}", title="What flows in: the matrix H of the "
                                                                                                  "inputs",
                quantity="H", around_zero=True, chosen=(column, column), axes=("input", "input"),
                how="The diagonal says how strong an input is on open-domain text; off it stands how much two inputs move together, or "
                    "against each other."),
                "learn-tile-inputs")
        elif view == OWN:
            widgets.chart(figures.own_share(dampen(found["H"]).diagonal().numpy()[columns], 1 / U.diagonal()[columns] ** 2, columns.start,
                                            column),
                          "learn-own")
        else:
            values = {"w_as_scored": seen[rows, columns], "U": U.diagonal()[None, columns].repeat(rows.stop - rows.start, 0),
                      "G": G[rows, columns]}
            widgets.chart(figures.tile(
                G[rows, columns], origin, values, "row %{customdata[0]}, column %{customdata[1]}<br>G = w² / U² = (%{customdata[2]:.4g})² "
                                                  "/ "
                "(%{customdata[3]:.4g})² = %{customdata[4]:.4g}", title="General importance of the same tile", quantity="G",
                chosen=(row, column),
                how="The brighter, the more the layer's output on open-domain text loses without the weight. It goes with the square of "
                    "the weight, and with what is its input's own."), "learn-tile", **clicked)
    at_column, rank = float(U[column, column]), float((G < G[row, column]).mean())
    with right:
        written_out(row, column, [
            rf"W_{{{row},{column}}} = {arithmetic.tex(float(W[row, column]))}",
            arithmetic.hessian_entry(float(H[column, column]), column, column),
            rf"\frac1{{U_{{{column},{column}}}^2}} = {arithmetic.tex(1 / at_column**2)}",
            arithmetic.general(row, column, float(seen[row, column]), at_column, float(G[row, column]))],
            f"Pictures a to d, one below the other. **{percent(rank)}** of the matrix's weights cost less than this one: at 50 % sparsity by G "
            f"alone it would **{'stay' if rank >= 0.5 else 'go'}**.")
    formula(r"H = \frac2n\sum_t x_t x_t^{\mathsf T}, \qquad H^{-1} = U^{\mathsf T}U, \qquad G_{ij} = \frac{\hat w_{ij}^2}{U_{jj}^2}", {
        "x_t": "what enters the layer at the t-th of n calibration tokens: the open-domain text on which the model is watched",
        "H": "picture b: on the diagonal how strong an input is, beside it how far two move together. It is the second derivative of the "
             "layer's squared output error by the weights of a row, hence H for Hessian. A hundredth of its mean is added to the diagonal, "
             "so that it can be inverted",
        "U": "upper triangular: its row j speaks of input j and of those to its right, because columns are worked on from left to right, "
             "and those at the left can help no more",
        "1/U_{jj}^2": "picture c: what is left of input j once the inputs to its right have explained what they can",
        r"\hat w_{ij}": "the weight of picture a, as compensation has left it when its column is judged (next step). Columns are judged in "
                        "blocks of 128, and before the first nothing has moved: there it is the weight itself",
        "G_{ij}": "picture d: general importance, the output error its removal costs although the others make up for it"})


LINEAR = Step(
    "Linear", "What does the removal of one weight cost?", ("layer.safetensors",), linear,
    "In picture c find an input of which little is its own, and one of which much is. Choose both columns in one row and compare the third "
    "line of the arithmetic: w² is multiplied by it. By what do the two costs differ?",
    "Two weights of a row have the same size, and one costs three times the other. What differs?",
    "Their inputs. G is the square of the weight times what is its input's own, 1/U²: an input that is weak, or that other inputs can "
    "stand in for, makes its weights cheap. Magnitude pruning looks at W alone and cannot see this.",
    {"explore": "Single weights of my model", "layers": "What is kept where in my run"})
