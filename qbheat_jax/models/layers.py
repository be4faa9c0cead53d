"""Layers shared by encoders: convolutions, norms, attention, drop path, dynamic ReLU, position codes.

Layouts are NHWC. Parameters, norm statistics and softmax are float32; other arithmetic is in `dtype` (float32 or bfloat16).
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qbheat_jax.errors import UserError
from qbheat_jax.models.kernels import attention, conv, depthwise_conv, dynamic_relu, matmul_2d, strided


def conv_init(key, shape, dtype=jnp.float32):
    """Draw a kernel (kh, kw, in, out) from normal(0, sqrt(2 / (kh * kw * out))), as MobileNet and Mobile-Former do."""
    return jax.random.normal(key, shape, dtype) * np.sqrt(2.0 / (shape[0] * shape[1] * shape[3])).astype(dtype)


def torch_uniform(fan_in):
    """Return PyTorch's default initialiser of convolutions and linear layers, for weights and biases alike.

    It draws from U(-a, a) with a = 1 / sqrt(fan_in), where `fan_in` is the number of inputs of one output.
    """
    bound = 1.0 / np.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def check_size(images, stride):
    """Raise ValueError unless H and W of images [B, H, W, C] are multiples of an encoder's stride."""
    height, width = images.shape[1:3]
    if height % stride or width % stride:
        raise ValueError(
            f"images of {height} x {width} pixels do not divide into cells of {stride}; height and width must be "
            f"multiples of {stride}"
        )


def hard_sigmoid(x):
    """Return the piecewise linear sigmoid clip(x + 3, 0, 6) / 6."""
    return jax.nn.relu6(x + 3.0) / 6.0


def hard_swish(x):
    """Return x * hard_sigmoid(x)."""
    return x * hard_sigmoid(x)


def gelu(x):
    """Return the exact GELU of x, by erf as in PyTorch.

    jax.nn.gelu uses erfc, which costs twice the arithmetic for accuracy far to the left, where the product vanishes. bfloat16
    needs that accuracy.
    """
    if x.dtype == jnp.float32:
        return _gelu(x)
    plain = functools.partial(jax.nn.gelu, approximate=False)
    return jax.lax.platform_dependent(x, cuda=_gelu_of_input, default=plain)


def _gelu(x):
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


@jax.custom_vjp
def _gelu_of_input(x):
    """The same in float32, with x as the only residual: a GPU recomputes faster than it reads memory."""
    return _gelu(x.astype(jnp.float32)).astype(x.dtype)


def _gelu_gradient(x, gradient):
    wide = x.astype(jnp.float32)
    slope = 0.5 * (1.0 + jax.lax.erf(wide * 0.5**0.5)) + wide * jnp.exp(-0.5 * wide * wide) * (2.0 * np.pi) ** -0.5
    return ((gradient.astype(jnp.float32) * slope).astype(x.dtype),)


_gelu_of_input.defvjp(lambda x: (_gelu_of_input(x), x), _gelu_gradient)


def residual(x, branch):
    """Return x + branch.

    On CUDA a barrier separates the sum from the matmul of the branch, because cuBLAS would add x in place to a copy of it.
    """

    def apart(x, branch):
        return x + _held(branch)

    return jax.lax.platform_dependent(x, branch, cuda=apart, default=jnp.add)


@jax.custom_vjp
def _held(x):
    """Return x behind a barrier against fusion with its producer. The gradient has no barrier."""
    return jax.lax.optimization_barrier(x)


_held.defvjp(lambda x: (_held(x), None), lambda _, gradient: (gradient,))


def channel_shuffle(x, groups):
    """Shuffle the channels of x [..., C] as ShuffleNet: view as (groups, C / groups), transpose, flatten."""
    *lead, channels = x.shape
    return x.reshape(*lead, groups, channels // groups).swapaxes(-1, -2).reshape(*lead, channels)


class Dense(nn.Dense):
    """A linear layer over the last axis of a map or of tokens, see `matmul_2d`."""

    dot_general: Any = matmul_2d


class Conv(nn.Module):
    """A convolution, zero-padded by `pads`: by default symmetrically, also at stride 2.

    x [B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), features]. `groups` divides both channel counts;
    groups == C is a depthwise convolution with features / C filters for every input channel.
    Parameters, float32: kernel [kernel, kernel, C / groups, features]; with `use_bias` bias [features].

    Attributes:
      torch_init: whether kernel and bias are drawn by `torch_uniform`, instead of `kernel_init` and zeros.
    """

    features: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    dtype: Any = jnp.float32
    padding: str = "symmetric"
    use_bias: bool = False
    torch_init: bool = False
    kernel_init: Any = conv_init

    @nn.compact
    def __call__(self, x):
        shape = (self.kernel, self.kernel, x.shape[-1] // self.groups, self.features)
        uniform = torch_uniform(math.prod(shape[:3]))
        kernel = self.param("kernel", uniform if self.torch_init else self.kernel_init, shape, jnp.float32)
        y = self._convolve(x.astype(self.dtype), kernel.astype(self.dtype))
        if self.use_bias:
            bias_init = uniform if self.torch_init else nn.initializers.zeros
            y = y + self.param("bias", bias_init, (self.features,), jnp.float32).astype(self.dtype)
        return y

    def _convolve(self, x, kernel):
        channels = x.shape[-1]
        if self.groups == channels and self.groups > 1:
            return depthwise_conv(x, kernel, self.stride, self.padding)
        if self.kernel == 1:
            # A matmul is fastest on every backend, with a stride too: XLA:CPU takes 15 times as long for the kernel gradient of
            # a strided convolution.
            x = strided(x, self.stride)
            if self.groups == 1:
                return matmul_2d(x, kernel[0, 0], None)
            x = x.reshape(*x.shape[:-1], self.groups, channels // self.groups)
            kernel = kernel.reshape(channels // self.groups, self.groups, -1)
            return jnp.einsum("bhwgi,igo->bhwgo", x, kernel).reshape(*x.shape[:3], self.features)
        return conv(x, kernel, self.stride, self.padding, self.groups)


class BatchNorm(nn.Module):
    """Batch norm over all axes but the last, x [..., C] -> [..., C] of `dtype`, over the global batch under `jax.jit`.

    Fields, names and values are those of flax.linen.BatchNorm. Its gradient keeps x alone, where flax's keeps x - mean too.
    Running averages keep `momentum` (0.9 is PyTorch's 0.1) and take the rest from the mean and variance of the batch. That
    variance is biased, or, if `unbiased`, PyTorch's unbiased one; the batch itself is normalised by the biased one.
    Parameters: scale, bias [C]; batch_stats: mean, var [C]; all float32.
    """

    use_running_average: bool = False
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    use_scale: bool = True
    use_bias: bool = True
    scale_init: Any = nn.initializers.ones
    unbiased: bool = False

    @nn.compact
    def __call__(self, x):
        shape, x = (x.shape[-1],), x.astype(jnp.float32)
        averages = [
            self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32),
            self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32),
        ]
        mean, var = (average.value for average in averages)
        if not self.use_running_average:
            axes = tuple(range(x.ndim - 1))
            mean = x.mean(axes)
            var = jnp.maximum((x * x).mean(axes) - mean * mean, 0.0)
            if not self.is_initializing():
                count = x.size // x.shape[-1]
                kept = var * (count / max(1, count - 1)) if self.unbiased else var
                for average, value in zip(averages, (mean, kept)):
                    average.value = self.momentum * average.value + (1.0 - self.momentum) * value
        gain = jax.lax.rsqrt(var + self.epsilon)
        if self.use_scale:
            gain = gain * self.param("scale", self.scale_init, shape, jnp.float32)
        shift = -mean * gain
        if self.use_bias:
            shift = shift + self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        return (x * gain + shift).astype(self.dtype)


class LayerNorm(nn.Module):
    """Layer norm over the last axis: x [..., C] -> [..., C] of `dtype`, computed in float32.

    Values, fields and names are those of flax.linen.LayerNorm. On CUDA its gradient is one pass over rows.
    Parameters: scale, bias [C], float32.
    """

    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        dtype = jnp.dtype(self.dtype)

        def by_rows(x, scale, bias):  # otherwise XLA:GPU transposes few tokens behind their channels
            rows = x.reshape(-1, x.shape[-1])
            return _layer_norm_of_rows(rows, scale, bias, self.epsilon, dtype).reshape(x.shape)

        def plain(x, scale, bias):
            return _layer_norm(x, scale, bias, self.epsilon)[0].astype(dtype)

        return jax.lax.platform_dependent(x, scale, bias, cuda=by_rows, default=plain)


def _layer_norm(x, scale, bias, epsilon):
    """Return (y float32, (mean, mean square) of every row, which the gradient needs)."""
    x = x.astype(jnp.float32)
    mean, square = x.mean(-1, keepdims=True), (x * x).mean(-1, keepdims=True)
    return (x - mean) * (_gain(mean, square, epsilon) * scale) + bias, (mean, square)


def _gain(mean, square, epsilon):
    return jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0.0) + epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _layer_norm_of_rows(x, scale, bias, epsilon, dtype):
    return _layer_norm_forward(x, scale, bias, epsilon, dtype)[0]


def _layer_norm_forward(x, scale, bias, epsilon, dtype):
    y, statistics = _layer_norm(x, scale, bias, epsilon)
    return y.astype(dtype), (x, scale, *statistics)


def _layer_norm_backward(epsilon, dtype, kept, gradient):
    x, scale, mean, square = kept
    gradient = gradient.astype(jnp.float32)
    gain = _gain(mean, square, epsilon)
    standardised = (x.astype(jnp.float32) - mean) * gain
    d_scale, d_bias = (gradient * standardised).sum(0), gradient.sum(0)
    gradient = gradient * scale
    along = (gradient * standardised).mean(-1, keepdims=True)
    d_x = (gradient - gradient.mean(-1, keepdims=True) - standardised * along) * gain
    return d_x.astype(x.dtype), d_scale, d_bias


_layer_norm_of_rows.defvjp(_layer_norm_forward, _layer_norm_backward)


class ConvBN(nn.Module):
    """`Conv`, then batch norm. Children: conv, bn."""

    features: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    dtype: Any = jnp.float32
    padding: str = "symmetric"
    momentum: float = BatchNorm.momentum
    epsilon: float = BatchNorm.epsilon

    @nn.compact
    def __call__(self, x, train):
        x = Conv(self.features, self.kernel, self.stride, self.groups, self.dtype, self.padding, name="conv")(x)
        return BatchNorm(
            use_running_average=not train, momentum=self.momentum, epsilon=self.epsilon, dtype=self.dtype, name="bn"
        )(x)


def remat(block, policy, inputs=1):
    """Return the module class of a block, called with (*inputs, train), that rematerialises by `policy`.

    policy "none" keeps every residual; otherwise it is a name of `jax.checkpoint_policies` ("nothing_saveable" keeps the inputs
    alone). Parameters, their names and random draws are the same.
    """
    if policy == "none":
        return block
    return nn.remat(block, policy=getattr(jax.checkpoint_policies, policy), static_argnums=(inputs + 1,))


class DropPath(nn.Module):
    """Drop the branch of an example with probability `rate` and scale the others up (arXiv 1603.09382)."""

    rate: float = 0.0

    @nn.compact
    def __call__(self, x, train):
        dims = tuple(range(1, x.ndim))
        return nn.Dropout(self.rate, broadcast_dims=dims, rng_collection="drop_path")(x, deterministic=not train)


def drop_path_rates(rate, depths):
    """Return the drop path rate of each block, a list a stage; they grow linearly from 0 at the first to `rate` at the last.

    >>> drop_path_rates(0.2, (1, 2))
    [[0.0], [0.1, 0.2]]
    """
    last = max(1, sum(depths) - 1)
    return [[rate * (sum(depths[:n]) + j) / last for j in range(depth)] for n, depth in enumerate(depths)]


def attend(query, key, value, heads, bias=None):
    """Return softmax attention with the channels split into `heads` contiguous parts, scale (C / heads) ** -0.5.

    In a train step on TPUs, without a bias, examples are processed in parts whose logits stay on the core, and their weights
    are recomputed for the gradient. Logits of whole batches cost more traffic than the rest of a transformer block. Values are
    the same.

    Args:
      query: [B, N, C].
      key, value: [B, M, C].
      heads: int.
      bias: of the logits, [B, heads, N, M], or None.

    Returns:
      [B, N, C].
    """
    parts = 1 if bias is not None else _parts(*query.shape[:2], key.shape[1], heads)
    if parts == 1:
        return _attend(query, key, value, heads, bias)

    def split(x):
        # Every parts-th example, so that each device holds its share of every part.
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    one = jax.checkpoint(lambda part: _attend(*part, heads))
    return jax.lax.map(one, (split(query), split(key), split(value))).swapaxes(0, 1).reshape(query.shape)


def _attend(query, key, value, heads, bias=None):
    def split(x):
        return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)

    return attention(split(query), split(key), split(value), bias).reshape(query.shape)


# Bytes of float32 logits on a device at a time. With the gradient's other residuals they fit every TPU's VMEM.
_LOGITS = 8 * 2**20


def _parts(batch, queries, keys, heads):
    """Return in how many equal parts `attend` processes a batch: 1 except on TPUs under the mesh of `state.train_step`."""
    mesh = jax.sharding.get_abstract_mesh()
    # The caller of an encoder may have set a mesh with other axes.
    if (
        not {"data", "fsdp", "model"} <= set(mesh.axis_names)
        or getattr(mesh.abstract_device, "platform", None) != "tpu"
    ):
        return 1
    own, left = divmod(batch, mesh.shape["data"] * mesh.shape["fsdp"])
    if left:
        return 1
    room = _LOGITS // (4 * queries * keys * max(1, heads // mesh.shape["model"]))
    return next(own // n for n in range(max(1, min(own, room)), 0, -1) if own % n == 0)


class Projections(nn.Module):
    """Project x [B, N, C] to query, key and value, each [B, N, C]. Parameters: kernel [C, 3 C], bias [3 C].

    Without `key_bias` the bias of the keys is masked: it has no effect and no gradient.

    The values are those of one Dense layer with 3 C outputs, which CUDA runs. Elsewhere the weights are split first: splitting
    the outputs and joining their gradients costs a TPU more traffic than reading x three times. Where heads are split over
    devices (sharding.RULES), weights then move between devices instead of activations.
    """

    dtype: Any = jnp.float32
    key_bias: bool = True

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), (channels, 3 * channels), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (3 * channels,), jnp.float32)
        if not self.key_bias:
            bias = bias * np.repeat(np.float32([1.0, 0.0, 1.0]), channels)
        inputs = (x.astype(self.dtype), kernel.astype(self.dtype), bias.astype(self.dtype))
        forms = {} if _splits_heads() else {"cuda": self._together}
        return jax.lax.platform_dependent(*inputs, **forms, default=self._apart)

    @staticmethod
    def _together(x, kernel, bias):
        return jnp.split(matmul_2d(x, kernel, None) + bias, 3, axis=-1)

    @staticmethod
    def _apart(x, kernel, bias):
        kernel, bias = (p.reshape(*p.shape[:-1], 3, x.shape[-1]) for p in (kernel, bias))
        return [matmul_2d(x, kernel[:, n], None) + bias[n] for n in range(3)]


def _splits_heads():
    """Return whether the mesh of `state.train_step` splits heads over devices."""
    return dict(jax.sharding.get_abstract_mesh().shape).get("model", 1) > 1


def rotary_2d(height, width, channels, theta):
    """Return the angles of axial rotary position codes, float32 [height, width, channels / 2], channels a multiple of 4.

    A cell's place is that of its centre, from -1 to 1 along each side of the map. The first half of the angles are of its row
    and the others of its column, 2 pi times the place over theta ** (i / (channels / 4)). Source: DINOv3, arXiv 2508.10104.

    Raises:
      UserError: no such code exists for these channels or this theta.
    """
    if channels % 4 or theta <= 0:
        raise UserError(
            f"rope_theta is {theta} and a head has {channels} channels; a rotary position code needs a positive theta and a "
            "multiple of 4 channels a head"
        )
    frequencies = 2.0 * np.pi * theta ** (-np.arange(channels // 4) / (channels // 4))
    rows, columns = ((2 * np.arange(n) + 1) / n - 1 for n in (height, width))
    shape = (height, width, channels // 4)
    rows = np.broadcast_to(rows[:, None, None] * frequencies, shape)
    columns = np.broadcast_to(columns[None, :, None] * frequencies, shape)
    return np.concatenate([rows, columns], -1).astype(np.float32)


def rotate(x, heads, angles):
    """Rotate channel i of each head with channel i + D / 2 by an angle, D the channels of a head, computed in float32.

    x [B, N, C], angles float32 [N, D / 2] or [B, N, D / 2] -> [B, N, C], the type of x.
    """
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], heads, 2, angles.shape[-1])
    first, second = halves[..., 0, :], halves[..., 1, :]
    cos, sin = (function(angles)[..., None, :] for function in (jnp.cos, jnp.sin))
    halves = jnp.stack([first * cos - second * sin, second * cos + first * sin], -2)
    return halves.reshape(x.shape).astype(x.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one biased projection for query, key, value. x [B, N, C] -> [B, N, C].

    `angles`, as of `rotate`, rotate queries and keys. `key_bias`: see `Projections`.
    """

    heads: int
    dtype: Any = jnp.float32
    key_bias: bool = True

    @nn.compact
    def __call__(self, x, angles=None):
        query, key, value = Projections(self.dtype, self.key_bias, name="qkv")(x)
        if angles is not None:
            query, key = (rotate(y, self.heads, angles) for y in (query, key))
        y = attend(query, key, value, self.heads)
        return Dense(x.shape[-1], dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform(), name="proj")(y)


# What lies between the two linear layers of a transformer block's MLP.
MLPS = ("gelu", "quick_gelu", "swiglu")


class TransformerBlock(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + MLP(norm(x)). x [B, N, C] -> [B, N, C].

    Source: ViT, arXiv 2010.11929 equations 2 and 3; layer norm eps 1e-6 as in the ViT and MAE releases.

    `angles`, as of `rotate`, rotate queries and keys.

    Attributes:
      mlp: one of MLPS: linear, exact GELU, linear; with CLIP's x * sigmoid(1.702 x) in the place of GELU; or w3(silu(a) * b)
        with (a, b) the halves of w12 (arXiv 2002.05202). The gated one has two thirds of the hidden channels, rounded up to a
        multiple of 8.
      layer_scale: initial gain of each channel of a branch, learnt (arXiv 2103.17239); 0 for none.
      epsilon: of the layer norms.
      key_bias: see `Projections`.
    """

    heads: int
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    drop_path: float = 0.0
    dtype: Any = jnp.float32
    mlp: str = "gelu"
    layer_scale: float = 0.0
    epsilon: float = 1e-6
    key_bias: bool = True

    @nn.compact
    def __call__(self, x, train, angles=None):
        norm = dict(epsilon=self.epsilon, dtype=self.dtype)

        def drop(branch, number):
            if self.layer_scale:
                init = nn.initializers.constant(self.layer_scale)
                gain = self.param(f"gamma{number}", init, (x.shape[-1],), jnp.float32)
                branch = branch * gain.astype(self.dtype)
            branch = nn.Dropout(self.dropout)(branch, deterministic=not train)
            return DropPath(self.drop_path, name=f"drop_path{number}")(branch, train)

        attention = SelfAttention(self.heads, self.dtype, self.key_bias, name="attn")
        x = residual(x, drop(attention(LayerNorm(**norm, name="norm1")(x), angles), 1))
        return residual(x, drop(self._mlp(LayerNorm(**norm, name="norm2")(x)), 2))

    def _mlp(self, x):
        width = x.shape[-1]
        hidden = int(width * self.mlp_ratio)

        def linear(features, name):
            return Dense(features, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform(), name=name)

        if self.mlp == "swiglu":
            gate, y = jnp.split(linear(2 * gated_width(hidden), "w12")(x), 2, -1)
            return linear(width, "w3")(jax.nn.silu(gate) * y)
        y = linear(hidden, "fc1")(x)
        return linear(width, "fc2")(y * jax.nn.sigmoid(1.702 * y) if self.mlp == "quick_gelu" else gelu(y))


def gated_width(hidden):
    """Return the hidden channels of a gated MLP in the place of a plain one with `hidden`.

    >>> gated_width(4 * 1536)
    4096
    """
    return (int(hidden * 2 / 3) + 7) // 8 * 8


def sincos_2d(height, width, channels):
    """Return the fixed 2-D sine-cosine position code, float32 [height, width, channels], channels a multiple of 4.

    Half the channels encode the column and half the row, at wavelengths 2 pi ... 10000 * 2 pi (MAE, arXiv 2111.06377).
    """
    if channels % 4:
        raise ValueError(f"a 2-D sine-cosine position code needs a multiple of 4 channels, not {channels}")
    omega = 10000.0 ** (-np.arange(channels // 4) / (channels // 4))

    def code(n):
        angles = np.arange(n)[:, None] * omega
        return np.concatenate([np.sin(angles), np.cos(angles)], -1)

    columns = np.broadcast_to(code(width)[None], (height, width, channels // 2))
    rows = np.broadcast_to(code(height)[:, None], (height, width, channels // 2))
    return np.concatenate([columns, rows], -1).astype(np.float32)


class DyReLU(nn.Module):
    """Dynamic ReLU (arXiv 2003.10027, its spatially shared form): max(a1 * x, a2 * x), a1 and a2 from a token.

    x [B, H, W, C], token [B, D] -> [B, H, W, C]. Children: fc0 (D -> D / 4), fc2 (D / 4 -> 2C); at initialisation
    a1 = 1, a2 = 0 on average, a plain ReLU.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, token):
        hidden = jax.nn.relu(dense(token.shape[-1] // 4, self.dtype, "fc0")(token))
        a1, a2 = jnp.split(hard_sigmoid(dense(2 * x.shape[-1], self.dtype, "fc2")(hidden)), 2, axis=-1)
        return dynamic_relu(x, 2.0 * (a1 - 0.5) + 1.0, 2.0 * (a2 - 0.5))


def dense(features, dtype, name):
    """Return Mobile-Former's Dense layer: kernel normal(0, 0.01), bias 0."""
    return Dense(features, dtype=dtype, kernel_init=nn.initializers.normal(0.01), name=name)
