"""The straightforward general importance: SparseGPT's order of work as its paper prints it. What the benchmarks compare with.

One sequence at a time, one Hessian, one factorisation and one column loop per linear, in float32. `oracle` is slower still and checks the
numbers; this is what a careful person would write first.
"""

import torch

from dpruner.model import as_rows, decoder_blocks, linears_of, prunable_linears, stored_transposed


class _Caught(Exception):
    pass


@torch.no_grad()
def general_importance(model, batches, sparsity=0.52, blocksize=128, damping=0.01, decisions=None):
    """G of every prunable weight, {name: float32 as stored}, sequential mode; the weights come back at the end.

    `decisions`, a dict, is filled with {name: BoolTensor (out, in), True = removed in the walk}.
    """
    _, blocks = decoder_blocks(model)
    linears = prunable_linears(model)
    originals = {n: m.weight.detach().clone() for n, m in linears.items()}
    hidden, calls = [], []

    def catch(_module, args, kwargs):
        hidden.append(args[0])
        calls.append((args[1:], kwargs))
        raise _Caught

    handle = blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
    for ids in batches:
        try:
            model(input_ids=ids, use_cache=False)
        except _Caught:
            pass
    handle.remove()

    G = {}
    for block in blocks:
        inside = linears_of(model, block)
        H = {n: torch.zeros(as_rows(m.weight, stored_transposed(m)).shape[1], device=m.weight.device).diag() for n, m in inside.items()}
        tokens = dict.fromkeys(inside, 0)

        def accumulate(name):
            def hook(_module, args):
                x = args[0].reshape(-1, args[0].shape[-1]).float()
                H[name] += x.t() @ x
                tokens[name] += len(x)
            return hook

        handles = [m.register_forward_pre_hook(accumulate(n)) for n, m in inside.items()]
        for x, (args, kwargs) in zip(hidden, calls, strict=True):
            block(x, *args, **kwargs)
        for handle in handles:
            handle.remove()
        for name, module in inside.items():
            W = as_rows(module.weight.data, stored_transposed(module)).float().clone()
            scores, W, removed = _prune(W, H[name] * (2 / tokens[name]), sparsity, blocksize, damping)
            if decisions is not None:
                decisions[name] = removed
            G[name] = as_rows(scores, stored_transposed(module)).contiguous()
            as_rows(module.weight.data, stored_transposed(module)).copy_(W)
        for j, (x, (args, kwargs)) in enumerate(zip(hidden, calls, strict=True)):
            out = block(x, *args, **kwargs)
            hidden[j] = out[0] if isinstance(out, tuple) else out
    for name, module in linears.items():
        module.weight.data.copy_(originals[name])
    return G


def _prune(W, H, sparsity, blocksize, damping):
    dead = H.diagonal() == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    H.diagonal().add_(damping * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H.double())), upper=True).float()
    scores, removed = torch.zeros_like(W), torch.zeros_like(W, dtype=torch.bool)
    for start in range(0, W.shape[1], blocksize):
        stop = min(start + blocksize, W.shape[1])
        W1, U1, errors = W[:, start:stop].clone(), U[start:stop, start:stop], torch.zeros_like(W[:, start:stop])
        scores[:, start:stop] = W1**2 / U1.diagonal()**2
        threshold = scores[:, start:stop].flatten().sort()[0][int(W1.numel() * sparsity)]
        gone = scores[:, start:stop] <= threshold
        for i in range(stop - start):
            w = W1[:, i].clone()
            q = w.masked_fill(gone[:, i], 0)
            errors[:, i] = (w - q) / U1[i, i]
            W1[:, i:] -= errors[:, i:i + 1] * U1[i:i + 1, i:]
            W1[:, i] = q
        removed[:, start:stop] = gone
        W[:, start:stop] = W1
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return scores, W, removed
