"""Matmuls, convolutions, dynamic ReLU, attention and pooling in the fastest form for each backend, gradients included.

XLA:CPU runs some of lax's operations, and more of their gradients, many times slower than equivalent forms. On CUDA some have
a faster form too, and some abort the compiler. The form is chosen at lowering, so a program traced for a TPU gets the TPU's.
Layouts are NHWC.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp


def matmul_2d(x, kernel, dimension_numbers, precision=None, preferred_element_type=None):
    """Return x [..., C] times kernel [C, F] -> [..., F] as one matmul; the `dot_general` of `Dense`.

    This halves the time of the gradient on XLA:CPU and changes nothing elsewhere.
    """
    del dimension_numbers  # always the last axis of x and the first of the kernel
    rows = x.reshape(-1, x.shape[-1])
    rows = jnp.matmul(rows, kernel, precision=precision, preferred_element_type=preferred_element_type)
    return rows.reshape(*x.shape[:-1], kernel.shape[-1])


def pads(size, kernel, stride, padding):
    """Return the zero padding ((top, bottom), (left, right)) of a map of `size` = (H, W) for an odd kernel.

    Args:
      padding: "symmetric", kernel // 2 on every side as in PyTorch, or "same", the least for ceil(n / stride) outputs with the
        odd one after, as in TensorFlow (at stride 2 on an even size a 3x3 gets (0, 1), a 5x5 (1, 2)). Both give as many
        outputs.

    Raises:
      ValueError: another padding.
    """
    if padding == "symmetric":
        return ((kernel // 2, kernel // 2),) * 2
    if padding != "same":
        raise ValueError(f"padding is {padding!r}; a convolution's is 'symmetric' or 'same'")
    return tuple(jax.lax.padtype_to_pads(size, (kernel, kernel), (stride, stride), "SAME"))


def _padded(x, pad, fill=0.0):
    """Return x [B, H, W, C] padded by `pad`, as in `pads`, with `fill`."""
    return jnp.pad(x, ((0, 0), *pad, (0, 0)), constant_values=fill)


def strided(x, stride):
    """Return every stride-th row and column of x [B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), C].

    XLA:GPU aborts when it fuses a matmul with a strided slice and the slice's operand (a failed check of
    `triton_tiling_propagation`, openxla/xla issue 47381). A barrier prevents that fusion on CUDA.
    """
    if stride == 1:
        return x

    def cells(x):
        return x[:, ::stride, ::stride]

    return jax.lax.platform_dependent(x, cuda=lambda x: jax.lax.optimization_barrier(cells(x)), default=cells)


# --- Convolution of images ------------------------------------------------------------------------------------------


def conv(x, kernel, stride=1, padding="symmetric", groups=1):
    """Convolve x [B, H, W, C] with kernel [k, k, C / groups, F], k odd -> [B, ceil(H / stride), ceil(W / stride), F].

    `padding`: as in `pads`. Without groups the CPU uses `_cpu_conv` and `_kernel_gradient`.
    """
    pad = pads(x.shape[1:3], kernel.shape[0], stride, padding)
    return _plain(x, kernel, stride, pad, groups) if groups > 1 else _conv(x, kernel, stride, pad)


def _plain(x, kernel, stride, pad, groups=1):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), pad, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


def _plain_vjp(x, kernel, gradient, stride, pad, groups=1):
    """Return the gradients of `_plain` with respect to (x, kernel), given that of its output."""
    of_kernel = jax.linear_transpose(lambda kernel: _plain(x, kernel, stride, pad, groups), kernel)
    return _plain_input_gradient(x, kernel, gradient, stride, pad, groups), *of_kernel(gradient)


def _plain_input_gradient(x, kernel, gradient, stride, pad, groups=1):
    return jax.linear_transpose(lambda x: _plain(x, kernel, stride, pad, groups), x)(gradient)[0]


def _cpu_conv(x, kernel, stride, pad):
    """`_plain` in faster forms for XLA:CPU.

    A 3 x 3 of stride 2 over images runs over cells of 2 x 2 pixels, in half the time. At stride 1 one extra row makes XLA
    choose Eigen's convolution over its own, which is a tenth slower, and half as fast with 64 channels.
    """
    if _of_images(x):
        size = x.shape[1:3]
        even = kernel.shape[0] == 3 and stride == 2 and size[0] % 2 == size[1] % 2 == 0
        return _by_cells(x, kernel, pad) if even else _plain(x, kernel, stride, pad)
    if stride > 1:
        return _plain(x, kernel, stride, pad)
    (top, bottom), columns = pad
    return _plain(x, kernel, 1, ((top, bottom + 1), columns))[:, :-1]


def _of_images(x):
    """Return whether x [B, H, W, C] has as few channels as an image."""
    return x.shape[-1] <= 4


def _by_cells(x, kernel, pad):
    """`_plain` of stride 2 as stride 1 over cells of 2 x 2 pixels, whose pixels become channels, as do the kernel's."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).swapaxes(2, 3)
    x = x.reshape(batch, height // 2, width // 2, 4 * channels)
    # Output o reads the rows from 2 o - before, of which cell o - (before + 1) // 2 has the first: the kernel gets rows of
    # zeros, so that it begins and ends where cells do.
    k, odd = kernel.shape[0], [before % 2 for before, _ in pad]
    cells = [-(-(k + o) // 2) for o in odd]
    kernel = jnp.pad(kernel, (*((o, 2 * n - k - o) for o, n in zip(odd, cells)), (0, 0), (0, 0)))
    kernel = kernel.reshape(cells[0], 2, cells[1], 2, channels, -1).swapaxes(1, 2).reshape(*cells, 4 * channels, -1)
    before = [(first + 1) // 2 for first, _ in pad]
    return _plain(x, kernel, 1, [(b, n - 1 - b) for b, n in zip(before, cells)])


def _cpu_conv_vjp(x, kernel, gradient, stride, pad):
    if stride > 1 or _of_images(x):
        d_x = _plain_input_gradient(x, kernel, gradient, stride, pad)
    else:
        # Convolution with the filters turned by 180 degrees, and the padding with them.
        k = kernel.shape[0]
        turned = tuple((k - 1 - before, k - 1 - after) for before, after in pad)
        d_x = _cpu_conv(gradient, kernel[::-1, ::-1].swapaxes(2, 3), 1, turned)
    return d_x, _kernel_gradient(x, gradient, kernel, stride, pad)


def _kernel_gradient(x, gradient, kernel, stride, pad):
    """The kernel's gradient as one matmul for each kernel row, its columns concatenated: half XLA:CPU's time.

    For images, with their few channels, all rows are concatenated too.
    """
    k, (height, width) = kernel.shape[0], gradient.shape[1:3]
    padded = _padded(x, pad)
    columns = [padded[:, :, j : j + stride * (width - 1) + 1 : stride] for j in range(k)]
    columns, gradient = jnp.concatenate(columns, -1), gradient.reshape(-1, gradient.shape[-1])
    rows = [columns[:, i : i + stride * (height - 1) + 1 : stride] for i in range(k)]
    if _of_images(x):
        rows = [jnp.concatenate(rows, -1)]
    rows = [
        jnp.matmul(row.reshape(-1, row.shape[-1]).T, gradient, preferred_element_type=jnp.float32).astype(kernel.dtype)
        for row in rows
    ]
    return jnp.stack(rows).reshape(kernel.shape)


def _conv_forward(x, kernel, stride, pad):
    return jax.lax.platform_dependent(
        x, kernel, cpu=lambda x, w: _cpu_conv(x, w, stride, pad), default=lambda x, w: _plain(x, w, stride, pad)
    )


def _conv_backward(stride, pad, residuals, gradient):
    return jax.lax.platform_dependent(
        *residuals,
        gradient,
        cpu=lambda x, w, g: _cpu_conv_vjp(x, w, g, stride, pad),
        default=lambda x, w, g: _plain_vjp(x, w, g, stride, pad),
    )


_conv = jax.custom_vjp(_conv_forward, nondiff_argnums=(2, 3))
_conv.defvjp(lambda x, w, stride, pad: (_conv_forward(x, w, stride, pad), (x, w)), _conv_backward)


# --- Depthwise convolution -------------------------------------------------------------------------------------------


def depthwise_conv(x, kernel, stride=1, padding="symmetric"):
    """Convolve each input channel with its own filters.

    XLA:CPU's grouped convolution and its gradient are 30 to 100 times slower than k * k shifted multiply-adds. cuDNN's is slow
    for m > 1, and XLA does not split its kernel gradient over devices, so CUDA uses shifted multiply-adds there too.

    Args:
      x: [B, H, W, C].
      kernel: [k, k, 1, C * m], k odd, the m outputs of one input channel adjacent.
      padding: as in `pads`.

    Returns:
      [B, ceil(H / stride), ceil(W / stride), C * m].
    """
    return _depthwise(x, kernel.astype(x.dtype), stride, pads(x.shape[1:3], kernel.shape[0], stride, padding))


def _grouped(x, kernel, stride, pad):
    return _plain(x, kernel, stride, pad, x.shape[-1])


def _unpadded(padded, pad):
    """Undo `_padded`."""
    rows, columns = (slice(before, size - after) for (before, after), size in zip(pad, padded.shape[1:3]))
    return padded[:, rows, columns]


def _windows(padded, k, stride):
    """Yield the k * k shifted and strided views of a padded map as ((i, j), view [B, Ho, Wo, C])."""
    height, width = padded.shape[1] - k + 1, padded.shape[2] - k + 1
    for i in range(k):
        for j in range(k):
            yield (i, j), padded[:, i : i + height : stride, j : j + width : stride]


def _shifted(padded, kernel, stride):
    """Repeat channels view by view within the sum, so that no map of all repeats is written and read."""
    times = kernel.shape[-1] // padded.shape[-1]
    views = _windows(padded, kernel.shape[0], stride)
    return sum(jnp.repeat(view, times, -1) * kernel[i, j, 0] for (i, j), view in views)


def _shifted_vjp(padded, kernel, gradient, stride, pad, kernel_gradient):
    """Return the gradients of `_shifted` with respect to (x, kernel). `kernel_gradient` is one of the functions below."""
    d_kernel = kernel_gradient(padded, gradient, kernel.shape[0], stride)
    d_x = _shifted_input_gradient(_unpadded(padded, pad).shape, kernel, gradient, stride, pad)
    return d_x, d_kernel.astype(kernel.dtype)


def _shifted_input_gradient(shape, kernel, gradient, stride, pad):
    """Return the input gradient [B, H, W, C] of `shape`, one place of all stride x stride cells after the other.

    This way no zeros lie between the outputs.

    Row `place` of cell n is read by row i of the kernel for output n + ahead, where stride * ahead = place + before - i;
    `before` is the padding's. Repeats are summed as strided slices, which fuse with all the rest.
    """
    k, times = kernel.shape[0], kernel.shape[-1] // shape[-1]
    edges = [((k - 1 - before) // stride, (stride - 1 + before) // stride) for before, _ in pad]
    around = _padded(gradient, edges)

    def readers(axis, place):
        """(row or column of the kernel, slice of `around`) pairs."""
        size, edge = gradient.shape[1 + axis], edges[axis][0]
        ahead = ((i, *divmod(place + pad[axis][0] - i, stride)) for i in range(k))
        return [(i, slice(edge + n, edge + n + size)) for i, n, left in ahead if left == 0]

    def part(row, column):
        rows, columns = readers(0, row), readers(1, column)
        products = (around[:, r, c] * kernel[i, j, 0] for i, r in rows for j, c in columns)
        y = sum(
            products, jnp.zeros_like(gradient)
        )  # nothing reads some places where the kernel is smaller than the stride
        return sum(y[..., n::times] for n in range(times))

    return _from_cells(part, stride, shape)


def _from_cells(part, stride, shape):
    """Return the map of `shape` [B, H, W, C] with part(row, column) at (row, column) of each stride x stride cell.

    part returns [B, ceil(H / stride), ceil(W / stride), C].
    """
    whole = jnp.stack([jnp.stack([part(row, column) for column in range(stride)], 3) for row in range(stride)], 2)
    height, width = (-(-n // stride) * stride for n in shape[1:3])
    return whole.reshape(shape[0], height, width, shape[3])[:, : shape[1], : shape[2]]


def _shifted_kernel_gradient(padded, gradient, k, stride):
    """Sum each shifted view times the gradient over batch and positions -> float32 [k, k, 1, C * m].

    The loop over the batch sums element by element, which XLA:CPU vectorises. It does not vectorise a reduction fused with
    shifted views, which is ten times slower.
    """

    times = gradient.shape[-1] // padded.shape[-1]

    def add(sums, example):
        padded, gradient = example
        views = (jnp.repeat(view[0], times, -1) for _, view in _windows(padded[None], k, stride))
        return tuple(s + (view * gradient).astype(jnp.float32) for s, view in zip(sums, views)), None

    zeros = jnp.zeros(gradient.shape[1:], jnp.float32)
    sums, _ = jax.lax.scan(add, (zeros,) * (k * k), (padded, gradient))
    return jnp.stack([s.sum((0, 1)) for s in sums]).reshape(k, k, 1, -1)


def _shifted_kernel_gradient_at_once(padded, gradient, k, stride):
    """The same with one reduction for each sum. XLA:GPU fuses several into one pass, and devices add their shares.

    The barrier keeps XLA from writing the gradient in float32 between passes.
    """
    times = gradient.shape[-1] // padded.shape[-1]
    gradient = jax.lax.optimization_barrier(gradient).astype(jnp.float32)
    views = (jnp.repeat(view.astype(jnp.float32), times, -1) for _, view in _windows(padded, k, stride))
    return jnp.stack([(view * gradient).sum((0, 1, 2)) for view in views]).reshape(k, k, 1, -1)


def _depthwise_forward(x, kernel, stride, pad):
    """Return (y, residuals). The residual is the padded map, which the CPU's forms read, and no second copy of x.

    Accelerators unpad it; XLA elides padding and unpadding.
    """
    padded = _padded(x, pad)

    def shifted(x, padded, kernel):
        return _shifted(padded, kernel, stride)

    def grouped(x, padded, kernel):
        return _grouped(x, kernel, stride, pad)

    forms = {"cpu": shifted, "cuda": shifted if _repeats(x, kernel) else grouped}
    y = jax.lax.platform_dependent(x, padded, kernel, **forms, default=grouped)
    return y, (padded, kernel)


def _repeats(x, kernel):
    """Return whether a depthwise convolution has more than one output for each input channel."""
    return kernel.shape[-1] > x.shape[-1]


def _depthwise_backward(stride, pad, residuals, gradient):
    padded, kernel = residuals
    forms = {"cpu": lambda padded, w, g: _shifted_vjp(padded, w, g, stride, pad, _shifted_kernel_gradient)}
    if _repeats(padded, kernel):
        forms["cuda"] = lambda padded, w, g: _shifted_vjp(padded, w, g, stride, pad, _shifted_kernel_gradient_at_once)
    return jax.lax.platform_dependent(
        padded,
        kernel,
        gradient,
        **forms,
        default=lambda padded, w, g: _plain_vjp(_unpadded(padded, pad), w, g, stride, pad, padded.shape[-1]),
    )


_depthwise = jax.custom_vjp(lambda *inputs: _depthwise_forward(*inputs)[0], nondiff_argnums=(2, 3))
_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


# --- Dynamic ReLU ----------------------------------------------------------------------------------------------------


@jax.custom_vjp
def dynamic_relu(x, a1, a2):
    """Return max(a1 * x, a2 * x): x [B, H, W, C], finite slopes a1 and a2 [B, C] -> [B, H, W, C]."""
    return jax.lax.platform_dependent(x, a1, a2, cpu=_sloped, default=_larger)


def _larger(x, a1, a2):
    return jnp.maximum(a1[:, None, None] * x, a2[:, None, None] * x)


def _larger_vjp(x, a1, a2, gradient):
    return jax.vjp(_larger, x, a1, a2)[1](gradient)


def _sloped(x, a1, a2):
    """`_larger` in a faster form for XLA:CPU."""
    return x * _slope(x, a1, a2)


def _slope(x, a1, a2):
    """Return the larger slope where x is positive and the smaller elsewhere, [B, H, W, C]."""
    above, below = (_fusion_barrier(a)[:, None, None] for a in (jnp.maximum(a1, a2), jnp.minimum(a1, a2)))
    return jnp.where(x > 0, above, below)


def _fusion_barrier(x):
    """Return finite x [..., C] multiplied by the identity.

    XLA:CPU fuses elementwise producers and recomputes them per cell; a matmul blocks the fusion.
    """
    size = math.gcd(x.shape[-1], 16)
    return jnp.matmul(x.reshape(-1, size), jnp.eye(size, dtype=x.dtype)).reshape(x.shape)


def _sloped_vjp(x, a1, a2, gradient):
    """Sum one map-sized product twice, where the gradient of a maximum writes a map for each side."""
    products = (gradient * x).astype(jnp.float32)
    above, whole = (y.sum((1, 2)) for y in (jnp.where(x > 0, products, 0.0), products))
    below, first = whole - above, a1 > a2
    slopes = jnp.where(first, above, below), jnp.where(first, below, above)
    return gradient * _slope(x, a1, a2), *(d.astype(a1.dtype) for d in slopes)


def _dynamic_relu_backward(residuals, gradient):
    return jax.lax.platform_dependent(*residuals, gradient, cpu=_sloped_vjp, default=_larger_vjp)


dynamic_relu.defvjp(lambda *inputs: (dynamic_relu(*inputs), inputs), _dynamic_relu_backward)


# --- Attention -------------------------------------------------------------------------------------------------------


def attention(query, key, value, bias=None):
    """Return softmax attention of every head, scale D ** -0.5, with float32 logits.

    XLA:CPU takes two to three times as long for matmuls with the heads behind the cells. On CUDA cuDNN's fused attention,
    where `_cudnn_takes` the inputs, never writes the logits.

    Args:
      query: [B, N, heads, D].
      key, value: [B, M, heads, D].
      bias: of the logits, [B, heads, N, M], or None.

    Returns:
      [B, N, heads, D].
    """
    forms = {"cpu": _heads_first, "default": jax.nn.dot_product_attention}
    if bias is None and _cudnn_takes(query):
        forms["cuda"] = _fused_attention
    return jax.lax.platform_dependent(query, key, value, bias, **forms)


def _fused_attention(query, key, value, bias):
    """cuDNN's attention. Its gradient needs even numbers of cells, so an odd number is padded and masked by length."""
    del bias  # None
    counts = query.shape[1], key.shape[1]

    def even(x):
        return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))

    lengths = {}
    if any(n % 2 for n in counts):
        names = ("query_seq_lengths", "key_value_seq_lengths")
        # Made from the query, so that vmap maps over them too: cuDNN takes no unbatched lengths.
        none = 0 * query[:, 0, 0, 0].astype(jnp.int32)
        lengths = {name: n + none for name, n in zip(names, counts)}
        query, key, value = map(even, (query, key, value))
    y = jax.nn.dot_product_attention(query, key, value, implementation="cudnn", **lengths)
    return y[:, : counts[0]]


def _cudnn_takes(query):
    """Return whether cuDNN fuses attention of query [B, N, heads, D]: 16-bit floats, D a multiple of 8 up to 128."""
    return (
        query.dtype in (jnp.bfloat16, jnp.float16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 128
        and _has_cudnn()
    )


@functools.cache
def _has_cudnn():
    """Return whether this process has cuDNN 9 or newer and no GPU older than Ampere, which lacks the kernels."""
    try:
        from jax._src.lib import cuda_versions  # jax.nn has no other way to ask, and raises where there is none

        if cuda_versions is None or cuda_versions.cudnn_get_version() < 90000:
            return False
    except (ImportError, RuntimeError):
        return False
    here = jax.devices() if jax.default_backend() == "gpu" else ()
    return all(float(device.compute_capability) >= 8.0 for device in here)


def _logits_and_values(query, key, value, bias):
    """Return (logits [B, heads, N, M] of at least float32, values [B, heads, M, D])."""
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    kind = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum("bhnd,bhmd->bhnm", query, key, preferred_element_type=kind) * query.shape[-1] ** -0.5
    return logits if bias is None else logits + bias, value


@jax.custom_vjp
def _heads_first(query, key, value, bias):
    """Normalise after the weights are applied, on D numbers instead of M: one pass over the weights less."""
    logits, value = _logits_and_values(query, key, value, bias)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    y = jnp.einsum("bhnm,bhmd->bhnd", weights.astype(value.dtype), value, preferred_element_type=weights.dtype)
    return (y / weights.sum(-1, keepdims=True)).astype(value.dtype).swapaxes(1, 2)


def _heads_first_plain(query, key, value, bias):
    """The same with normalised weights, as the gradient needs them."""
    logits, value = _logits_and_values(query, key, value, bias)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bhnm,bhmd->bhnd", weights, value).swapaxes(1, 2)


_heads_first.defvjp(lambda *inputs: jax.vjp(_heads_first_plain, *inputs), lambda vjp, gradient: vjp(gradient))


# --- Max-pooling -----------------------------------------------------------------------------------------------------


@jax.custom_vjp
def max_pool(x):
    """Max-pool x [B, H, W, C], 3 x 3, stride 2, padding 1 -> [B, ceil(H / 2), ceil(W / 2), C].

    The gradient goes to the first maximum of a window. The CPU has its own form of it, many times faster than XLA:CPU's.
    """
    # XLA folds the padding into the pooling; jax2onnx loses padding that is the pooling's own.
    x = _padded(x, ((1, 1), (1, 1)), -jnp.inf)
    return nn.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding="VALID")


def _max_pool_forward(x):
    y = max_pool(x)
    return y, (x, y)


def _max_pool_backward(residuals, gradient):
    x, y = residuals

    def scattered(x, y, gradient):
        return jax.vjp(lambda x: nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))), x)[1](gradient)[0]

    return (jax.lax.platform_dependent(x, y, gradient, cpu=_max_pool_gradient, default=scattered),)


def _max_pool_gradient(x, y, gradient):
    """Split each output's gradient by the place of its maximum in the window, then sum the shares that reach each cell."""
    taken, shares = jnp.zeros(y.shape, bool), {}
    for place, view in _windows(_padded(x, ((1, 1), (1, 1)), -jnp.inf), 3, 2):
        first = (view == y) & ~taken
        taken |= first
        shares[place] = _padded(jnp.where(first, gradient, 0.0), ((0, 1), (0, 1)))
    height, width = y.shape[1:3]

    def along(index, size):
        """Return the (offset in the window, outputs) pairs that reach the even (0) or odd (1) cells of an axis."""
        return ([(1, slice(0, size))], [(0, slice(1, size + 1)), (2, slice(0, size))])[index]

    def part(row, column):
        return sum(
            shares[i, j][:, rows, columns] for i, rows in along(row, height) for j, columns in along(column, width)
        )

    return _from_cells(part, 2, x.shape)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)
