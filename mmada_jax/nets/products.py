"""Products of hidden states with weights, in the form that each platform computes fastest.

Shape letters are those of `transformer`, and M the columns of a weight that is laid out as a matrix.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mmada_jax.devices import sharding


def products(h_BLD: jax.Array, *weights: tuple[str, jax.Array], join: bool = True) -> list[jax.Array]:
    """jnp.einsum of hidden states [B, L, D] with weights [D, ...], each given behind its letters.

    On CPUs the tokens of all rows are the rows of one matrix, in both passes. XLA would transpose copies
    of the operands instead, which takes as long as a third of the product. Weights that lie whole on each
    device are joined to one matrix, since a wide product is faster than several narrow ones. For few
    tokens to `join` takes longer than it saves: it copies the weights.
    """
    if sharding.platform() != "cpu":
        return [jnp.einsum(letters, h_BLD, w) for letters, w in weights]
    (B, L, D), shapes = h_BLD.shape, [w.shape[1:] for _, w in weights]
    h_ND, weights_DM = h_BLD.reshape(B * L, D), [w.reshape(D, -1) for _, w in weights]
    if join and sharding.parts("heads") == sharding.parts("mlp") == 1:
        made = _of_rows(h_ND, weights_DM)
    else:
        made = [_of_rows(h_ND, [w_DM])[0] for w_DM in weights_DM]
    out = []
    for (letters, _), wide, out_NM in zip(weights, shapes, made, strict=True):
        _, of_w, of_out = letters.replace("->", ",").split(",")
        out.append(jnp.einsum(f"BL{of_w[1:]}->{of_out}", out_NM.reshape(B, L, *wide)))
    return out


@jax.custom_vjp
def _of_rows(h_ND, weights_DM):
    out_NM = jnp.einsum("ND,DM->NM", h_ND, jnp.concatenate(weights_DM, axis=1))
    return jnp.split(out_NM, _ends(weights_DM), axis=1)


def _of_rows_fwd(h_ND, weights_DM):
    return _of_rows(h_ND, weights_DM), (h_ND, weights_DM)


def _of_rows_bwd(saved, grads_NM):
    h_ND, weights_DM = saved
    grad_NM, w_DM = jnp.concatenate(grads_NM, axis=1), jnp.concatenate(weights_DM, axis=1)
    dw_DM = jnp.einsum("ND,NM->DM", h_ND, grad_NM)
    return jnp.einsum("NM,DM->ND", grad_NM, w_DM), jnp.split(dw_DM, _ends(weights_DM), axis=1)


_of_rows.defvjp(_of_rows_fwd, _of_rows_bwd)


def _ends(weights_DM):
    """The columns at which the next weight begins."""
    return np.cumsum([w_DM.shape[1] for w_DM in weights_DM])[:-1]


@jax.custom_vjp
def widen(h_BLD, w_DF):
    """A product with a large weight; features first spares TPUs a pass over memory, and costs CPUs one.

    The gradient is formed in quarters: the sum of one over the devices is hidden behind the next, and
    nothing hides the last sums of a layer."""
    return jnp.einsum("BLD,DF->FBL", h_BLD, w_DF)


def _widen_fwd(h_BLD, w_DF):
    return widen(h_BLD, w_DF), (h_BLD, w_DF)


def _widen_bwd(saved, grad_FBL):
    h_BLD, w_DF = saved
    n = math.gcd(4, len(w_DF)) if sharding.parts("batch") > 1 else 1
    quarters = [jnp.einsum("BLD,FBL->DF", h, grad_FBL) for h in jnp.split(h_BLD, n, axis=2)]
    return jnp.einsum("FBL,DF->BLD", grad_FBL, w_DF), jnp.concatenate(quarters)


widen.defvjp(_widen_fwd, _widen_bwd)
