"""The slow, obvious twin of every formula: plain loops, written from the method text alone.

Nothing here is discovered, shared, streamed or fused. A function is given the `model`, its `blocks` (an `nn.ModuleList`) and its prunable
`linears` (`{full parameter name: module}`), and does one sequence, one Hessian, one factorisation and one column at a time. Sections in the
docstrings are those of the method text; SparseGPT is Frantar and Alistarh (arXiv 2301.00774), D-Pruner is Zhang et al. (arXiv 2405.06275).

Conventions:
- a matrix W is (out, in). transformers' `Conv1D` stores (in, out): `as_matrix` and `as_stored` are the only two places that know;
- dictionaries are keyed by full parameter name and hold tensors shaped as the model STORES them;
- Hessians are accumulated in `dtype` (float32 as the method says; float64 for sharp comparisons), everything after them is float64;
- `removed` is True where a weight is removed, `kept` is its complement: names say which;
- a mean that is zero (all scores zero) divides nothing: the scores stay zero.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

DEAD_DIAGONAL = 1.0  # section 2, step 2
LOSS_SCALE = 2.0**16  # section 4, `release`


class Walk(NamedTuple):
    """What a walk over the blocks leaves, all `{full parameter name: tensor as stored}`."""

    scores: dict  # float64; of each weight when its block of columns was judged
    removed: dict  # bool, True where removed
    weights: dict  # in the model's dtype: what the walk has left in the model


class Scores(NamedTuple):
    """Final scores of section 4, both `{full parameter name: float64 tensor as stored}`."""

    dual: dict
    domain: dict  # the same formula without its G term


# --------------------------------------------------------------------------------------------------------------- orientation


def as_matrix(tensor, module):
    """A tensor shaped like the module's stored weight, as (out, in)."""
    return tensor.t() if isinstance(module, Conv1D) else tensor


def as_stored(matrix, module):
    """An (out, in) matrix, shaped as the module stores its weight. Always a fresh contiguous tensor."""
    return (matrix.t() if isinstance(module, Conv1D) else matrix).clone(memory_format=torch.contiguous_format)


def _divided_by_mean(scores, mean=None):
    mean = scores.mean() if mean is None else mean
    return scores / mean if mean > 0 else torch.zeros_like(scores)


# ------------------------------------------------------------------------------------------------- section 2, steps 1 to 3: H and U


def hessian(inputs, dtype=torch.float32):
    """H = (2/n) sum x x^T (section 2, step 1), undampened, dead inputs not yet treated.

    Args:
        inputs: non-empty list with one tensor (..., in) per sequence; n is the number of tokens in all of them.
        dtype: to accumulate in.

    Returns:
        (in, in) in `dtype`. Zeros if there is no token at all.
    """
    width = inputs[0].shape[-1]
    total = torch.zeros(width, width, dtype=dtype)
    tokens = 0
    for sequence in inputs:
        x = sequence.detach().reshape(-1, width).to(dtype)
        total += x.t() @ x
        tokens += x.shape[0]
    return total * (2 / tokens) if tokens else total


def mixed_hessian(general, domain):
    """Sum of two Hessians, each divided by its mean diagonal (section 4, "mix"), before dampening and dead inputs.

    Args:
        general: (in, in).
        domain: (in, in).

    Returns:
        (in, in).
    """
    mixed = torch.zeros_like(general)
    for one in (general, domain):
        mean = one.diagonal().mean()
        if mean > 0:
            mixed = mixed + one / mean
    return mixed


def dead_inputs(H):
    """Inputs that are always zero: H_jj == 0 (section 2, step 2). Bool (in,)."""
    return H.diagonal() == 0


def dampened(H, damp=0.01):
    """H_jj = 1 for dead inputs, then H_jj += damp * mean(diag H) (section 2, step 2).

    Args:
        H: (in, in), raw; not changed.
        damp: fraction of the mean diagonal, taken AFTER the dead inputs were set to 1.

    Returns:
        (in, in).
    """
    H = H.clone()
    for j in range(H.shape[0]):
        if H[j, j] == 0:
            H[j, j] = DEAD_DIAGONAL
    addition = damp * H.diagonal().mean()
    for j in range(H.shape[0]):
        H[j, j] += addition
    return H


def upper_factor(H):
    """U, upper triangular with positive diagonal, with H^-1 = U^T U (section 2, step 3).

    Args:
        H: (in, in), symmetric positive definite, i.e. already dampened.

    Returns:
        (in, in) in float64.
    """
    inverse = torch.linalg.inv(H.double())
    inverse = (inverse + inverse.t()) / 2
    return torch.linalg.cholesky(inverse, upper=True)


# ------------------------------------------------------------------------------------------------- section 2, step 4: the column loop


def prune_columns(weight, U, remove, blocksize=128, update=True):
    """The column loop with the optimal-brain-surgeon update (section 2, step 4).

    Left to right in blocks of columns. A block's mask is decided when the loop reaches the block, from the weights as compensation so far
    has left them. Then, column by column: error = (w - q) / U_ii with q the column after removal, and every column from i to the LAST of
    the matrix moves by -error x U[i, i:], which is the same as first updating the block and then carrying its error to the right.

    Args:
        weight: (out, in), dead columns already zero; not changed.
        U: (in, in) of `upper_factor`.
        remove: function (weights of the block (out, width), diag U of the block (width,), first column)
            -> (scores (out, width) or None, removed (out, width)).
        blocksize: columns judged together.
        update: False to only remove (no weight moves).

    Returns:
        (weight (out, in), scores (out, in) or None, removed (out, in)), float64 and bool.
    """
    W = weight.double().clone()
    columns = W.shape[1]
    scores = torch.zeros_like(W)
    removed = torch.zeros(W.shape, dtype=torch.bool)
    for start in range(0, columns, blocksize):
        stop = min(start + blocksize, columns)
        block_scores, block_removed = remove(W[:, start:stop].clone(), U.diagonal()[start:stop], start)
        removed[:, start:stop] = block_removed
        scores = None if block_scores is None else scores
        if scores is not None:
            scores[:, start:stop] = block_scores
        for i in range(start, stop):
            w = W[:, i].clone()
            q = w.clone()
            q[removed[:, i]] = 0
            if update:
                error = (w - q) / U[i, i]
                W[:, i:] -= error[:, None] * U[i, i:][None, :]
            W[:, i] = q
    return W, scores, removed


def _released_threshold(sparsity):
    """Section 2, step 4: score W^2 / diag(U)^2; all scores <= the floor(s * numel)-th of the sorted scores (from zero) are pruned."""

    def remove(W, d, start):
        scores = W**2 / d[None, :] ** 2
        if sparsity == 0:
            return scores, torch.zeros(W.shape, dtype=torch.bool)
        ordered = sorted(scores.flatten().tolist())
        threshold = ordered[min(int(sparsity * len(ordered)), len(ordered) - 1)]
        return scores, scores <= threshold

    return remove


def _given(kept):
    """The mask is given, (out, in), True = kept; nothing is scored."""

    def remove(W, d, start):
        return None, ~kept[:, start : start + W.shape[1]]

    return remove


def _dual(fisher_matrix, sparsity, lam):
    """Section 4, compensate="walk": S = [w^2/d^2]/mean + lam * [f w^2]/mean over the block; exactly round(s * out * width) removed."""

    def remove(W, d, start):
        width = W.shape[1]
        open_domain = _divided_by_mean(W**2 / d[None, :] ** 2)
        loss = _divided_by_mean(fisher_matrix[:, start : start + width] * W**2)
        scores = open_domain + lam * loss
        return scores, ~mask(scores, sparsity, "matrix")

    return remove


# ------------------------------------------------------------------------------------------------------ walking the blocks of a model


def record_call(model, block, tokens):
    """A block's OWN args and kwargs for one sequence, by a full forward under the weights the model has now (section 2).

    Args:
        model: the causal language model.
        block: one of its decoder blocks.
        tokens: LongTensor (1, seqlen).

    Returns:
        (args, kwargs) of the block's call.
    """
    calls = []
    handle = block.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args, dict(kwargs))), with_kwargs=True)
    try:
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
    finally:
        handle.remove()
    (call,) = calls
    return call


def block_output(block, args, kwargs):
    """Hidden states (1, seqlen, hidden) that a block returns, as a tensor or as the first of a tuple."""
    with torch.no_grad():
        output = block(*args, **kwargs)
    return output if torch.is_tensor(output) else output[0]


def linear_inputs(model, block, linears, batches):
    """What flows into each linear of ONE block, sequence by sequence, under the weights the model has now (section 2).

    Args:
        model: the causal language model.
        block: the decoder block.
        linears: `{full parameter name: module}`, of this block.
        batches: list of LongTensor (batch, seqlen).

    Returns:
        `{name: [X (tokens, in), one per call]}`; of a linear that is never called one X without tokens.
    """
    inputs = {}
    for name, module in linears.items():
        inputs[name] = [torch.zeros(0, as_matrix(module.weight, module).shape[1])]
    for batch in batches:
        for row in batch:
            args, kwargs = record_call(model, block, row[None])
            handles = []
            for name, module in linears.items():

                def keep(module, args, name=name):
                    inputs[name].append(args[0].detach().reshape(-1, args[0].shape[-1]).clone())

                handles.append(module.register_forward_pre_hook(keep))
            try:
                block_output(block, args, kwargs)
            finally:
                for handle in handles:
                    handle.remove()
    return inputs


def linears_of(block, linears):
    """Those of the linears that live in a block, in the order of `linears`."""
    inside = list(block.modules())
    return {name: module for name, module in linears.items() if any(module is other for other in inside)}


def _walk(model, blocks, linears, calibrations, combine, remover, update, edit, blocksize, damp, dtype):
    """Sections 2 and 4: for each block H of all its linears, dense; then prune each; then the pruned block feeds the next.

    Args:
        calibrations: list of calibration sets, each a list of batches; one raw Hessian for each.
        combine: function (list of raw Hessians) -> raw Hessian.
        remover: function (name, module) -> `remove` of `prune_columns`.
        update: whether kept weights move.
        edit: whether pruned weights go into the model, to make the next block's inputs; False for `mode="static"`.

    Returns:
        Walk. The model's weights come back bit for bit.
    """
    original = {name: module.weight.detach().clone() for name, module in linears.items()}
    scores, removed, weights = {}, {}, {}
    try:
        for block in blocks:
            inside = linears_of(block, linears)
            recorded = [linear_inputs(model, block, inside, batches) for batches in calibrations]
            hessians = {}
            for name in inside:
                hessians[name] = combine([hessian(inputs[name], dtype) for inputs in recorded])
            for name, module in inside.items():
                W = as_matrix(original[name], module).double().clone()
                W[:, dead_inputs(hessians[name])] = 0
                U = upper_factor(dampened(hessians[name], damp))
                W, matrix_scores, matrix_removed = prune_columns(W, U, remover(name, module), blocksize, update)
                if matrix_scores is not None:
                    scores[name] = as_stored(matrix_scores, module)
                removed[name] = as_stored(matrix_removed, module)
                weights[name] = as_stored(W, module).to(module.weight.dtype)
                if edit:
                    module.weight.data.copy_(weights[name])
    finally:
        for name, module in linears.items():
            module.weight.data.copy_(original[name])
    return Walk(scores, removed, weights)


def general_importance(
    model, blocks, linears, batches, sparsity=0.52, mode="sequential", blocksize=128, damp=0.01, dtype=torch.float32, details=False
):
    """General importance G of every weight (section 2); with `details` also the SparseGPT baseline (section 6).

    "sequential": G = W^2 / diag(U)^2, block of columns by block, from the weights as compensation has left them; H from the block's dense
    weights on what the already pruned earlier blocks produce. "static": the same score from the original weights, one pass of the dense
    model. In both, step 2 sets the columns of dead inputs to 0 first, so their G is 0.

    Args:
        model: the causal language model.
        blocks: nn.ModuleList of its decoder blocks.
        linears: `{full parameter name: module}`.
        batches: list of LongTensor (batch, seqlen) of the open domain.
        sparsity: fraction removed while walking; 0 removes nothing. Irrelevant for G if static.
        mode: "sequential" or "static".
        blocksize: columns judged together.
        damp: section 2, step 2.
        dtype: of the Hessians.
        details: return everything.

    Returns:
        `{name: G as stored, float64}`, or with `details` a Walk: `scores` is G, `removed` and `weights` are SparseGPT's mask and updated
        weights (static: the same threshold on the static scores, weights removed and not updated).
    """
    if mode not in ("sequential", "static"):
        raise ValueError(mode)
    sequential = mode == "sequential"
    walk = _walk(
        model,
        blocks,
        linears,
        calibrations=[batches],
        combine=lambda hessians: hessians[0],
        remover=lambda name, module: _released_threshold(sparsity),
        update=sequential,
        edit=sequential,
        blocksize=blocksize,
        damp=damp,
        dtype=dtype,
    )
    return walk if details else walk.scores


def _calibrations(general_batches, domain_batches, which):
    if which == "general":
        return [general_batches], lambda hessians: hessians[0]
    if which == "domain":
        return [domain_batches], lambda hessians: hessians[0]
    if which == "mix":
        return [general_batches, domain_batches], lambda hessians: mixed_hessian(*hessians)
    raise ValueError(which)


def dual_walk(
    model,
    blocks,
    linears,
    general_batches,
    domain_batches,
    fisher_scores,
    sparsity,
    lam=1.0,
    which="mix",
    blocksize=128,
    damp=0.01,
    dtype=torch.float32,
):
    """compensate="walk" (section 4): the dual score is taken inside the walk.

    S = [w^2/d^2]/mean + lam * [f w^2]/mean with w as compensation has left it, d = diag(U) of the mixed Hessian and both means over the
    block of columns; exactly round(sparsity * out * width) weights of lowest S are removed per block, ties by index in (out, width).
    Both calibration sets are carried through the pruned blocks. Dead inputs are judged on the mixed Hessian.

    Args:
        general_batches, domain_batches: lists of LongTensor (batch, seqlen); the one that `which` leaves out is not used.
        fisher_scores: f, `{name: tensor as stored}`: `fisher(...)` of the domain, or `fisher_both(...)`.
        sparsity: fraction removed.
        lam: weight of the second term.
        which: Hessian of the "general" domain, of the "domain" or "mix".
        model, blocks, linears, blocksize, damp, dtype: as in `general_importance`.

    Returns:
        Walk; the model's weights come back bit for bit.
    """
    calibrations, combine = _calibrations(general_batches, domain_batches, which)
    return _walk(
        model,
        blocks,
        linears,
        calibrations,
        combine,
        remover=lambda name, module: _dual(as_matrix(fisher_scores[name], module).double(), sparsity, lam),
        update=True,
        edit=True,
        blocksize=blocksize,
        damp=damp,
        dtype=dtype,
    )


def compensate_after(
    model, blocks, linears, kept, general_batches, domain_batches, which="mix", blocksize=128, damp=0.01, dtype=torch.float32
):
    """compensate="after" (section 4): the walk of section 2 with given masks, which only moves the kept weights.

    As in section 2 the columns of dead inputs are set to 0, kept or not.

    Args:
        kept: `{name: bool as stored}`, True = kept.
        others: as in `dual_walk`.

    Returns:
        Walk without scores; the model's weights come back bit for bit.
    """
    calibrations, combine = _calibrations(general_batches, domain_batches, which)
    return _walk(
        model,
        blocks,
        linears,
        calibrations,
        combine,
        remover=lambda name, module: _given(as_matrix(kept[name], module)),
        update=True,
        edit=True,
        blocksize=blocksize,
        damp=damp,
        dtype=dtype,
    )


# ------------------------------------------------------------------------------------------------------ sections 3 and 4: gradients


def gradients(model, linears, batch):
    """g: gradient of the mean next-token loss of one batch (section 1).

    Args:
        batch: LongTensor (batch, seqlen); every position but the first of each sequence is predicted, all count the same.

    Returns:
        `{name: float64 tensor as stored}`.
    """
    parameters = [module.weight for module in linears.values()]
    wanted = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            logits = model(input_ids=batch, use_cache=False).logits
            loss = nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1))
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
    finally:
        for parameter, before in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(before)
    result = {}
    for name, parameter, g in zip(linears, parameters, found, strict=True):
        result[name] = torch.zeros(parameter.shape, dtype=torch.float64) if g is None else g.double()
    return result


def domain_scores(model, linears, batches, G, formula="balanced", lam=1.0, alpha=0.03, means="matrix"):
    """The scores of section 4 by name, without fine-tuning.

    With u_j = g'_j * w:
    - "balanced": F/mean(F) + lam * G/mean(G), F = mean_j u_j^2, g' = g;
    - "taylor":   mean_j |u_j - u_j^2 / 2|, g' = g + 2 lam alpha^2 G g h, h the mean of g^2 over the batches so far, this one included;
    - "release":  sum_j |u_j + u_j^2 / 2000 + w^3|, g' = g + lam 2 alpha^2 G g^2 / 1000, g multiplied by 2^16 beforehand.

    Args:
        model: the causal language model, at its original weights.
        linears: `{full parameter name: module}`.
        batches: list of LongTensor (batch, seqlen) of the domain; one gradient each.
        G: `{name: tensor as stored}`.
        formula: "balanced", "taylor" or "release".
        lam: weight of the general importance.
        alpha: learning rate of the single gradient step of section 3.
        means: of "balanced": "matrix", or "model" for means over all weights of all linears (granularity "global").

    Returns:
        Scores: `dual` with, `domain` without the G term (balanced: F/mean(F); others: g' = g).
    """
    scores = Scores({}, {})
    all_gradients = [gradients(model, linears, batch) for batch in batches]
    if formula == "balanced":
        F = {}
        for name, module in linears.items():
            w = module.weight.detach().double()
            F[name] = sum((g[name] * w) ** 2 for g in all_gradients) / len(batches)
        mean_F = {name: F[name].mean() for name in linears}
        mean_G = {name: G[name].double().mean() for name in linears}
        if means == "model":
            count = sum(F[name].numel() for name in linears)
            mean_F = dict.fromkeys(linears, sum(F[name].sum() for name in linears) / count)
            mean_G = dict.fromkeys(linears, sum(G[name].double().sum() for name in linears) / count)
        for name in linears:
            scores.domain[name] = _divided_by_mean(F[name], mean_F[name])
            scores.dual[name] = scores.domain[name] + lam * _divided_by_mean(G[name].double(), mean_G[name])
        return scores
    for name, module in linears.items():
        w = module.weight.detach().double()
        for which, strength in ((scores.dual, lam), (scores.domain, 0.0)):
            total = torch.zeros_like(w)
            squares = torch.zeros_like(w)
            for j, of_batch in enumerate(all_gradients, start=1):
                g = of_batch[name]
                if formula == "taylor":
                    squares += g**2
                    h = squares / j
                    u = (g + 2 * strength * alpha**2 * G[name].double() * g * h) * w
                    total += (u - u**2 / 2).abs() / len(batches)
                elif formula == "release":
                    g = g * LOSS_SCALE
                    u = (g + strength * 2 * alpha**2 * G[name].double() * g**2 / 1000) * w
                    total += (u + u**2 / 2000 + w**3).abs()
                else:
                    raise ValueError(formula)
            which[name] = total
    return scores


def fisher(model, linears, batches):
    """f = mean_j g_j^2, the diagonal empirical Fisher (section 4). `{name: float64 tensor as stored}`."""
    total = {name: torch.zeros(module.weight.shape, dtype=torch.float64) for name, module in linears.items()}
    for batch in batches:
        g = gradients(model, linears, batch)
        for name in linears:
            total[name] += g[name] ** 2 / len(batches)
    return total


def fisher_both(domain, general):
    """fisher="both" (section 4): f of the domain and of the open domain, each divided by its mean over the matrix, summed."""
    return {name: _divided_by_mean(domain[name]) + _divided_by_mean(general[name]) for name in domain}


# ------------------------------------------------------------------------------------------------------------- section 5: masks


def _lowest(scores, count):
    """Indices of the `count` lowest of a list of numbers, ties: lower index first."""
    ordered = sorted((score, index) for index, score in enumerate(scores))
    return [index for _, index in ordered[:count]]


def mask(scores, sparsity, granularity="matrix", groups=None):
    """The mask of one matrix (section 5): exactly round(sparsity * group size) of each group removed, lowest first, ties by index.

    Ties are broken by the position within the group, counted row by row of the (out, in) matrix.

    Args:
        scores: (out, in).
        sparsity: fraction removed. Ignored for n:m, where n and m say it.
        granularity: "matrix"; "row" (per output); "block" (per group of input columns); or "n:m" such as "2:4": of every m consecutive
            inputs of a row the n highest are kept.
        groups: for "block": list of lists (or ranges) of column indices.

    Returns:
        Bool (out, in), True = kept.

    Raises:
        ValueError: n:m where m does not divide the inputs; unknown granularity.
    """
    rows, columns = scores.shape
    everything = range(columns)
    if granularity == "matrix":
        cells = [[(r, c) for r in range(rows) for c in everything]]
    elif granularity == "row":
        cells = [[(r, c) for c in everything] for r in range(rows)]
    elif granularity == "block":
        cells = [[(r, c) for r in range(rows) for c in group] for group in groups]
    elif ":" in granularity:
        n, m = (int(part) for part in granularity.split(":"))
        if columns % m:
            raise ValueError(f"{columns} inputs are not divisible by {m}")
        cells = [[(r, c) for c in range(start, start + m)] for r in range(rows) for start in range(0, columns, m)]
    else:
        raise ValueError(granularity)
    kept = torch.ones(rows, columns, dtype=torch.bool)
    numbers = scores.tolist()
    for group in cells:
        count = m - n if ":" in granularity else round(sparsity * len(group))
        for index in _lowest([numbers[r][c] for r, c in group], count):
            kept[group[index]] = False
    return kept


def global_masks(scores, sparsity):
    """Masks with one threshold for the whole model (section 5): exactly round(sparsity * all weights) removed.

    Ties are broken by the order of the dictionary, then row by row of each matrix as given.

    Args:
        scores: `{name: (out, in)}`.
        sparsity: fraction removed.

    Returns:
        `{name: bool (out, in), True = kept}`.
    """
    cells, numbers = [], []
    for name, matrix in scores.items():
        for r, row in enumerate(matrix.tolist()):
            for c, number in enumerate(row):
                cells.append((name, r, c))
                numbers.append(number)
    kept = {name: torch.ones(matrix.shape, dtype=torch.bool) for name, matrix in scores.items()}
    for index in _lowest(numbers, round(sparsity * len(numbers))):
        name, r, c = cells[index]
        kept[name][r, c] = False
    return kept


# ------------------------------------------------------------------------------------------------------------- section 6: baselines


def magnitude(weight):
    """|w| (section 6). (out, in) float64."""
    return weight.detach().double().abs()


def wanda(weight, inputs):
    """|w| * ||x||_2 over all calibration tokens (section 6; Sun et al., arXiv 2306.11695).

    Args:
        weight: (out, in).
        inputs: list of (..., in), one per sequence.

    Returns:
        (out, in) float64.
    """
    squares = torch.zeros(weight.shape[1], dtype=torch.float64)
    for sequence in inputs:
        for x in sequence.detach().double().reshape(-1, weight.shape[1]):
            squares += x**2
    return weight.detach().double().abs() * squares.sqrt()[None, :]


def wanda_walk(model, blocks, linears, calibrations, sparsity, granularity="row", dtype=torch.float64):
    """Wanda as its paper orders it (arXiv 2306.11695, section 3): "after pruning a preceding layer, the subsequent layer receives updated
    input activations, based on which its pruning metric will be computed"; a layer is a decoder block, as in the released code.

    Args:
        calibrations: list of calibration sets, each a list of batches; the norms go over the tokens of all of them.
        sparsity, granularity: as in `mask`.
        dtype: ignored, everything is float64; for a signature like `sparsegpt_walk`.

    Returns:
        Walk: scores, what was removed, and the weights with zeros there. The model's weights come back bit for bit.
    """
    original = {name: module.weight.detach().clone() for name, module in linears.items()}
    scores, removed, weights = {}, {}, {}
    for block in blocks:
        inside = linears_of(block, linears)
        inputs = linear_inputs(model, block, inside, [batch for batches in calibrations for batch in batches])
        for name, module in inside.items():
            W = as_matrix(original[name], module)
            matrix_scores = wanda(W, inputs[name])
            kept = mask(matrix_scores, sparsity, granularity)
            scores[name], removed[name] = as_stored(matrix_scores, module), as_stored(~kept, module)
            weights[name] = as_stored(W * kept, module)
        for name, module in inside.items():
            module.weight.data.copy_(weights[name])
    for name, module in linears.items():
        module.weight.data.copy_(original[name])
    return Walk(scores, removed, weights)


def sparsegpt_matrix(weight, H, sparsity, blocksize=128):
    """SparseGPT of one matrix as its paper derives it (arXiv 2301.00774, section 3.2), with inverses instead of a Cholesky factor.

    The columns are passed from left to right. When column j is reached, B = (H_jj.., the part of H from j on)^-1; it follows from the one
    before by a step of Gaussian elimination (eq. 5). A weight w in column j costs w^2 / B_00 (eq. 3); removing it moves the row by
    -w / B_00 * B_0 (eq. 2). Masks are chosen for `blocksize` columns at once, when their first is reached (section 3.3, algorithm 1), at the
    threshold of section 2 of the method text.

    Args:
        weight: (out, in), dead columns already zero.
        H: (in, in), dampened.
        sparsity: fraction removed.

    Returns:
        (weight (out, in), removed (out, in)), float64 and bool.
    """
    W = weight.double().clone()
    columns = W.shape[1]
    inverses = [torch.linalg.inv(H.double())]
    for _ in range(columns - 1):
        B = inverses[-1]
        inverses.append((B - torch.outer(B[:, 0], B[0, :]) / B[0, 0])[1:, 1:])
    removed = torch.zeros(W.shape, dtype=torch.bool)
    for start in range(0, columns, blocksize):
        block = range(start, min(start + blocksize, columns))
        costs = torch.stack([W[:, j] ** 2 / inverses[j][0, 0] for j in block], dim=1)
        threshold = sorted(costs.flatten().tolist())[int(sparsity * costs.numel())]
        removed[:, start : start + blocksize] = costs <= threshold
        for j in block:
            B = inverses[j]
            W[:, j:] -= torch.outer(W[:, j] * removed[:, j] / B[0, 0], B[0, :])
            W[removed[:, j], j] = 0
    return W, removed


def sparsegpt_walk(model, blocks, linears, calibrations, sparsity, blocksize=128, damp=0.01, dtype=torch.float64):
    """SparseGPT over the blocks of a model, each fed by the pruned ones before it (section 6).

    Args:
        calibrations: one calibration set or two, each a list of batches; of two the Hessians are mixed (section 4, "mix").

    Returns:
        Walk without scores. The model's weights come back bit for bit.
    """
    original = {name: module.weight.detach().clone() for name, module in linears.items()}
    removed, weights = {}, {}
    for block in blocks:
        inside = linears_of(block, linears)
        recorded = [linear_inputs(model, block, inside, batches) for batches in calibrations]
        for name, module in inside.items():
            hessians = [hessian(inputs[name], dtype) for inputs in recorded]
            H = hessians[0] if len(hessians) == 1 else mixed_hessian(*hessians)
            W = as_matrix(original[name], module).double().clone()
            W[:, dead_inputs(H)] = 0
            W, gone = sparsegpt_matrix(W, dampened(H, damp), sparsity, blocksize)
            removed[name], weights[name] = as_stored(gone, module), as_stored(W, module)
        for name, module in inside.items():
            module.weight.data.copy_(weights[name])
    for name, module in linears.items():
        module.weight.data.copy_(original[name])
    return Walk({}, removed, weights)


# -------------------------------------------------------------------------------------------- what the column loop equals, by brute force


def brute_force_obs(w_row, H, removed, frozen=()):
    """The exact optimum for one row: min (w' - w) H (w' - w)^T with w' = 0 on `removed` and w' = w on `frozen`, all others free.

    With delta = w' - w, fixed on the set A = removed + frozen (-w and 0), stationarity over the free set K reads
    H_KK delta_K = -H_KA delta_A, solved by `torch.linalg.solve`.

    Args:
        w_row: (in,).
        H: (in, in), dampened.
        removed: indices, or bool (in,).
        frozen: indices that may not move; an index in both counts as removed.

    Returns:
        (in,) float64.
    """
    w, H = w_row.double(), H.double()
    removed = _indices(removed)
    target = w.clone()
    target[removed] = 0
    return _least_squares(w, H, target, set(removed) | set(_indices(frozen)))


def brute_force_columns(w_row, H, removed):
    """Exactly what the column-by-column method computes for one row, by a full least-squares solve at every step.

    Left to right over the columns i in `removed`:

        minimise (w' - w)^T H (w' - w) over w'   subject to   w'_i = 0,   w'_j = (its value so far) for all j < i,   w'_j free for j > i,

    where w is the ORIGINAL row. A column to the left stays where the earlier steps left it, kept or removed: kept columns stop moving once
    the loop has passed them. It makes no difference whether the step is measured from the original row (as here) or from the current one
    (as the update error x U[i, i:] does): by induction the current row satisfies H_{i:,:} (w_current - w) = 0, so the linear term vanishes.

    Hence
    - the total error (w' - w) H (w' - w)^T is the sum over removed i of w_i^2 / U_ii^2, with w_i as it is when the loop reaches it: the
      score of section 2 is exactly the error that removing one weight, the next, would add;
    - the result is the global optimum `brute_force_obs(w, H, removed)` if no kept column lies left of a removed one (removed is a prefix);
      otherwise its error is at least that, and for a mask chosen without regard to the scores it can even exceed that of plain zeroing;
    - one removed column i alone gives `brute_force_obs(w, H, [i], frozen=range(i))`;
    - with the mask given, the result does not depend on blocks of columns; they only decide when scores are taken.

    Args:
        w_row: (in,).
        H: (in, in), dampened: the H whose `upper_factor` the loop uses.
        removed: indices, or bool (in,).

    Returns:
        (in,) float64.
    """
    w, H = w_row.double(), H.double()
    current = w.clone()
    for i in sorted(_indices(removed)):
        target = current.clone()
        target[i] = 0
        current = _least_squares(w, H, target, set(range(i + 1)))
    return current


def _indices(selection):
    if torch.is_tensor(selection) and selection.dtype == torch.bool:
        return selection.nonzero().flatten().tolist()
    return [int(i) for i in selection]


def _least_squares(w, H, target, fixed):
    """w' = target on `fixed`; elsewhere the minimiser of (w' - w) H (w' - w)^T."""
    fixed = sorted(fixed)
    free = [j for j in range(len(w)) if j not in fixed]
    result = target.clone()
    if free:
        delta = (target - w)[fixed]
        result[free] = w[free] - torch.linalg.solve(H[free][:, free], H[free][:, fixed] @ delta)
    return result


# ------------------------------------------------------------------------------------------------------ the walk carried further


def least_squares(target, H, kept):
    """The weights of a mask whose output is closest to the target's: for each row `w_K = (H_KK)⁻¹ (H t)_K`, zero elsewhere.

    Args:
        target: (out, in), float64.
        H: (in, in), dampened.
        kept: bool (out, in).

    Returns:
        (out, in).
    """
    W = torch.zeros_like(target)
    for i in range(len(target)):
        k = kept[i].nonzero().squeeze(1)
        if len(k):
            W[i, k] = torch.linalg.solve(H[k][:, k], (H @ target[i])[k])
    return W


def allotted(weights, fishers, sparsity, strength, most=0.97):
    """Sparsity of each matrix: between even and the share that one threshold for f·w² (each side divided by its total) would remove.

    Args:
        weights: `{name: tensor}`.
        fishers: list of `{name: tensor}`.

    Returns:
        `{name: float}`; their mean over all weights is `sparsity`. Only where none of them meets a limit, which this does not mend.
    """
    losses = {name: torch.zeros_like(w, dtype=torch.float64) for name, w in weights.items()}
    for fisher in fishers:
        products = {name: fisher[name].double() * w.double() ** 2 for name, w in weights.items()}
        total = sum(float(p.sum()) for p in products.values())
        for name in losses:
            losses[name] += products[name] / total
    everything = torch.cat([loss.flatten() for loss in losses.values()]).sort().values
    threshold = everything[round(sparsity * len(everything)) - 1]
    shares = {name: float((loss <= threshold).double().mean()) for name, loss in losses.items()}
    found = {name: sparsity + strength * (share - sparsity) for name, share in shares.items()}
    assert all(0 < s < most for s in found.values())
    return found
