"""Indexed matmul: multiply each part of a batch by its own matrix, chosen from a few.

Gathering would copy a whole matrix for every part. Accelerators have spare arithmetic, so there one large product
multiplies all parts by all matrices and a mask keeps the chosen ones; parts stay on their device. CPUs have none to spare, so
there the parts are sorted by choice and multiplied in blocks that share a matrix. This costs one product, however many
matrices there are.
"""

import functools

import jax
import jax.numpy as jnp

# The fewest rows of x in a block: with fewer, a CPU spends its time reading the matrix instead of multiplying.
_ROWS = 256


@jax.custom_vjp
def indexed_matmul(x, matrices, choice):
    """Multiply each part by its chosen matrix: y[b, r, p, n] = matrices[choice[b, p]] x[b, r, p, n].

    Products, and those of the gradients, are in x's type with float32 sums (see `_einsum`).

    Args:
      x: float32 or bfloat16 [B, R, P, N, C].
      matrices: float32 [K, D, C].
      choice: int32 [B, P], in 0..K-1.

    Returns:
      float32 [B, R, P, N, D].
    """
    return jax.lax.platform_dependent(x, matrices, choice, cpu=_by_blocks, default=_by_selection)


def _forward(x, matrices, choice):
    return indexed_matmul(x, matrices, choice), (x, matrices, choice)


def _backward(residuals, gradient):
    forms = dict(cpu=_by_blocks_vjp, default=_by_selection_vjp)
    d_x, d_matrices = jax.lax.platform_dependent(*residuals, gradient, **forms)
    return d_x.astype(residuals[0].dtype), d_matrices, None


indexed_matmul.defvjp(_forward, _backward)


def _einsum(subscripts, x, y, dtype):
    """Return the einsum of x and y in `dtype` (float32 at full precision, or bfloat16), summed in float32."""
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    x, y = x.astype(dtype), y.astype(dtype)
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=jnp.float32)


def _by_selection(x, matrices, choice):
    products = _einsum("brpnc,kdc->brpnkd", x, matrices, x.dtype)
    return (products * _kept(choice, matrices)).sum(-2)


def _by_selection_vjp(x, matrices, choice, gradient):
    """Return the float32 gradients of `_by_selection` for (x, matrices), given the gradient of its output."""
    gradient = gradient[..., None, :] * _kept(choice, matrices)
    d_x = _einsum("brpnkd,kdc->brpnc", gradient, matrices, x.dtype)
    return d_x, _einsum("brpnkd,brpnc->kdc", gradient, x, x.dtype)


def _kept(choice, matrices):
    """Return float32 [B, 1, P, 1, K, 1]: 1 where a part chose a matrix, else 0."""
    return jax.nn.one_hot(choice, matrices.shape[0])[:, None, :, None, :, None]


def _by_blocks(x, matrices, choice):
    slots, position, owner = _sorted(choice.reshape(-1), matrices.shape[0], _size(x))

    def one(block):
        rows, k = block
        return _einsum("nc,dc->nd", rows, matrices[k], x.dtype)

    return _out_of_blocks(jax.lax.map(one, (_into_blocks(x, slots), owner)), position, x.shape)


def _by_blocks_vjp(x, matrices, choice, gradient):
    """Return the float32 gradients of `_by_blocks` for (x, matrices), given the gradient of its output."""
    slots, position, owner = _sorted(choice.reshape(-1), matrices.shape[0], _size(x))

    def add(total, block):
        rows, gradient, k = block
        total = total.at[k].add(_einsum("nd,nc->dc", gradient, rows, x.dtype))
        return total, _einsum("nd,dc->nc", gradient, matrices[k], x.dtype)

    blocks = (_into_blocks(x, slots), _into_blocks(gradient, slots), owner)
    d_matrices, d_x = jax.lax.scan(add, jnp.zeros_like(matrices), blocks)
    return _out_of_blocks(d_x, position, x.shape), d_matrices


def _size(x):
    """Return the number of parts in a block."""
    batch, others, parts, cells, _ = x.shape
    return min(batch * parts, -(-_ROWS // (others * cells)))


def _into_blocks(x, slots):
    """Sort the parts of x [B, R, P, N, C] into `slots` -> [blocks, size * R * N, C], with zeros in empty slots."""
    parts = x.swapaxes(1, 2).reshape(-1, *x.shape[1:2], *x.shape[3:])
    return jnp.take(parts, slots, axis=0, mode="fill", fill_value=0).reshape(slots.shape[0], -1, x.shape[-1])


def _out_of_blocks(y, position, shape):
    """Invert `_into_blocks`: y [blocks, size * R * N, D], for x of `shape` -> [B, R, P, N, D]."""
    batch, others, parts, cells, _ = shape
    y = y.reshape(-1, others, cells, y.shape[-1])[position]
    return y.reshape(batch, parts, *y.shape[1:]).swapaxes(1, 2)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _sorted(choice, count, size):
    """Assign parts to blocks that share one choice.

    Args:
      choice: int32 [U], in 0..count-1.
      count: static number of matrices.
      size: static number of parts in a block.

    Returns:
      int32 (slots [blocks, size], position [U], owner [blocks]). `slots` holds the part in each slot, U where it is empty.
      `position` is the slot of each part, `owner` the choice that a block's parts share.
    """
    parts = choice.shape[0]
    blocks = parts // size + count  # the most that can be needed
    members = jnp.bincount(choice, length=count)
    needed = -(-members // size)
    ends = jnp.cumsum(needed)
    order = jnp.argsort(choice, stable=True)
    chosen = choice[order]
    rank = jnp.arange(parts) - (jnp.cumsum(members) - members)[chosen]
    slot = (ends - needed)[chosen] * size + rank
    position = jnp.zeros(parts, jnp.int32).at[order].set(slot)
    slots = jnp.full(blocks * size, parts, jnp.int32).at[slot].set(order).reshape(blocks, size)
    owner = jnp.minimum(jnp.searchsorted(ends, jnp.arange(blocks), side="right"), count - 1)
    return slots, position, owner
