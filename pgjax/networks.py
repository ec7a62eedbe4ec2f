"""Actor and critic networks, and the bundle of pure functions that algorithms use.

An algorithm sees only :class:`Networks`; anyone's own network is another ``Networks`` with the same three functions.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pgjax.distributions import Categorical, DiagGaussian, TanhGaussian
from pgjax.errors import RequestError, close_names
from pgjax.spaces import Box, Discrete, Space

ACTIVATIONS: dict[str, Callable] = {
    "tanh": nn.tanh,
    "relu": nn.relu,
    "swish": nn.swish,
    "silu": nn.silu,
    "elu": nn.elu,
    "gelu": nn.gelu,
    "leaky_relu": nn.leaky_relu,
}
KERNEL_INITS = ("orthogonal", "lecun_uniform", "lecun_normal", "glorot_uniform")
TORSOS = ("auto", "mlp", "cnn")
DISTRIBUTIONS = ("auto", "categorical", "gaussian", "gaussian_state", "tanh_gaussian", "tanh_gaussian_state")

_MIN_STD = 0.001  # of the state-dependent standard deviations, as in Brax
_CUT_NORMAL_STD = 0.8796256610342398  # of a standard normal variable cut off at 2


class ActorCritic(NamedTuple):
    """Parameters of both networks; each part has its own optimiser state. A shared torso belongs to ``actor``."""

    actor: Any
    critic: Any


class Networks(NamedTuple):
    """Networks as pure functions. ``...`` stands for any leading axes, also none.

    init: ``key -> ActorCritic``; consumes the key.
    policy: ``(params, obs [..., *O]) -> distribution`` with batch shape [...]. Reads ``params.actor`` only, so what
      acts can be stored as ``ActorCritic(actor, None)``.
    value: ``(params, obs [..., *O]) -> [...]``, in the unit of the value targets the critic was fitted to.
    """

    init: Callable[[jax.Array], ActorCritic]
    policy: Callable[[ActorCritic, jax.Array], Any]
    value: Callable[[ActorCritic, jax.Array], jax.Array]


class Conv3x3(nn.Module):
    """[..., H, W, C] -> [..., H - 2, W - 2, features], the convolution that ``nn.Conv`` computes without padding.

    As one matrix product over patches: with lanes in front the gradient of XLA's own convolution takes a CPU a hundred
    times as long as the rest of the network.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        height, width, channels = x.shape[-3:]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, channels, self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        shifted = [x[..., i : i + height - 2, j : j + width - 2, :] for i in range(3) for j in range(3)]
        return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, self.features) + bias.reshape((1,) * (x.ndim - 1) + (-1,))


class Torso(nn.Module):
    """obs [..., *O] -> features [..., F]: a 3x3 convolution if asked for, then dense layers, each with activation."""

    obs_rank: int
    hidden_sizes: tuple[int, ...]
    activation: Callable
    convolution: bool

    @nn.compact
    def __call__(self, obs: jax.Array) -> jax.Array:
        x = obs
        if self.convolution:
            x = self.activation(Conv3x3(16)(x))
        x = x.reshape(*obs.shape[: obs.ndim - self.obs_rank], math.prod(x.shape[obs.ndim - self.obs_rank :]))
        for size in self.hidden_sizes:
            x = self.activation(nn.Dense(size)(x))
        return x


class PolicyHead(nn.Module):
    """features [..., F] -> action distribution with batch shape [...]; ``size`` is num_actions or A."""

    size: int
    distribution: str

    @nn.compact
    def __call__(self, features: jax.Array) -> Categorical | DiagGaussian | TanhGaussian:
        state_dependent = self.distribution.endswith("_state")
        out = nn.Dense(2 * self.size if state_dependent else self.size)(features)
        if self.distribution == "categorical":
            return Categorical(out)
        if state_dependent:
            mean, raw = jnp.split(out, 2, axis=-1)
            log_std = jnp.log(nn.softplus(raw) + _MIN_STD)
        else:
            mean = out
            log_std = self.param("log_std", nn.initializers.zeros, (self.size,), jnp.float32)
            log_std = jnp.broadcast_to(log_std, mean.shape).astype(mean.dtype)
        return (TanhGaussian if self.distribution.startswith("tanh") else DiagGaussian)(mean, log_std)


def _orthonormal(matrices: list[jax.Array]) -> list[jax.Array]:
    """The orthonormal columns that Gram and Schmidt make of those of each matrix [m, n], m >= n.

    They are the Q of the QR decomposition whose R has a positive diagonal, which is uniformly distributed if the matrix is
    normal. Not LAPACK's: on a CPU a batched call of it waits on the thread pool that it runs on, so as many at once as
    there are threads, one for each kernel, wait for ever (jaxlib 0.10.2, seen in its stacks). All matrices go through one
    loop, filled up with zeros, for every loop more costs time to compile.
    """
    rows, columns = (max(matrix.shape[axis] for matrix in matrices) for axis in (0, 1))
    stack = jnp.stack([jnp.pad(x.T, ((0, columns - x.shape[1]), (0, rows - x.shape[0]))) for x in matrices])

    def column(j, q):
        v = stack[:, j]
        for _ in range(2):  # the second time takes away what rounding left of the first
            along = jnp.einsum("knm,km->kn", q, v)
            v = v - jnp.einsum("knm,kn->km", q, along)
        norm = jnp.linalg.norm(v, axis=1, keepdims=True)
        return q.at[:, j].set(v / jnp.where(norm > 0, norm, 1))

    with jax.default_matmul_precision("highest"):
        q = jax.lax.fori_loop(0, columns, column, jnp.zeros_like(stack))
    return [q[i, : x.shape[1], : x.shape[0]].T for i, x in enumerate(matrices)]


def draw_kernels(key: jax.Array, shapes: list[tuple[int, ...]], name: str) -> list[jax.Array]:
    """Kernels [..., F_in, F_out] of the given shapes; consumes ``key``.

    Orthogonal; of variance 1 / fan-in (LeCun); or of variance 2 / (fan-in + fan-out) (Glorot).

    All random numbers come from one draw. With one per kernel, as the initialisers of Flax take them, most of the time
    to compile an ``init`` went into compiling the same generator again and again.
    """

    def uniform(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, -math.sqrt(3), math.sqrt(3))

    draw = {
        "orthogonal": jax.random.normal,
        "lecun_uniform": uniform,
        "glorot_uniform": uniform,
        "lecun_normal": lambda key, shape, dtype: jax.random.truncated_normal(key, -2, 2, shape, dtype) / _CUT_NORMAL_STD,
    }[name]
    sizes = [math.prod(shape) for shape in shapes]
    pieces = jnp.split(draw(key, (sum(sizes),), jnp.float32), np.cumsum(sizes)[:-1])

    fans = [(math.prod(shape[:-1]), shape[-1]) for shape in shapes]
    if name != "orthogonal":
        widths = [sum(fan) / 2 if name == "glorot_uniform" else fan[0] for fan in fans]
        return [x.reshape(shape) / math.sqrt(width) for x, shape, width in zip(pieces, shapes, widths, strict=True)]
    # A wide kernel has orthonormal rows, made as the columns of a tall one.
    tall = _orthonormal([x.reshape(max(fan), min(fan)) for x, fan in zip(pieces, fans, strict=True)])
    return [(q if fan[0] >= fan[1] else q.T).reshape(shape) for q, fan, shape in zip(tall, fans, shapes, strict=True)]


def choose(field: str, value: str, known) -> None:
    """Raises RequestError unless ``value`` is one of ``known``."""
    if value not in known:
        raise RequestError(f"{field} = {value!r} is unknown; {close_names(str(value), known)}")


def layer_sizes(field: str, sizes) -> tuple[int, ...]:
    """``sizes`` as a tuple of widths. Raises RequestError unless all are positive integers."""
    sizes = tuple(sizes)
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise RequestError(f"{field} = {sizes} has a width that is not a positive integer; e.g. {field} = (64, 64)")
    return sizes


def _resolve_distribution(distribution: str, action_space: Space) -> tuple[str, int]:
    """The distribution's name without "auto", and the width of one parameter vector (num_actions or A)."""
    choose("distribution", distribution, DISTRIBUTIONS)
    if isinstance(action_space, Discrete):
        if distribution not in ("auto", "categorical"):
            raise RequestError(f"distribution = {distribution!r} does not fit discrete actions; use 'auto'")
        return "categorical", action_space.num
    if len(action_space.shape) != 1:
        raise RequestError(f"action_space.shape = {action_space.shape} is not of rank 1; flatten actions to (A,)")
    if distribution == "categorical":
        raise RequestError("distribution = 'categorical' does not fit continuous actions; use 'auto' or 'gaussian'")
    return ("gaussian" if distribution == "auto" else distribution), action_space.shape[0]


def resolve_torso(torso: str, obs_shape: tuple[int, ...]) -> str:
    """``mlp`` or ``cnn``, which ``auto`` is for observations [H, W, C]. Raises RequestError if it does not fit them."""
    choose("torso", torso, TORSOS)
    if torso == "auto":
        torso = "cnn" if len(obs_shape) == 3 else "mlp"
    if torso == "cnn" and (len(obs_shape) != 3 or min(obs_shape[:2]) < 3):
        raise RequestError(
            f"torso = 'cnn' needs observations [H, W, C] with H, W >= 3, not {obs_shape}; use 'mlp', it flattens them"
        )
    return torso


def make_networks(
    observation_space: Box,
    action_space: Space,
    *,
    hidden_sizes: tuple[int, ...] | None = None,
    critic_hidden_sizes: tuple[int, ...] | None = None,
    activation: str = "tanh",
    kernel_init: str = "orthogonal",
    policy_head_scale: float | None = 0.01,
    distribution: str = "auto",
    log_std_init: float = 0.0,
    torso: str = "auto",
    shared_torso: bool = False,
) -> Networks:
    """Builds actor and critic for a pair of spaces.

    Biases start at zero. With ``kernel_init="orthogonal"`` hidden layers are scaled by √2, the policy head by
    ``policy_head_scale``, the value head by 1. A LeCun or Glorot initialiser is used as it is, for the policy head times
    ``policy_head_scale`` unless that is None.

    Args:
      observation_space: Box of any rank; its shape is O.
      action_space: Discrete, or a Box of shape (A,).
      hidden_sizes: widths of the dense layers; () makes a linear network. None means (64, 64), or (128,) behind a
        convolution.
      critic_hidden_sizes: the same for the critic; None means ``hidden_sizes``.
      activation: a key of ``ACTIVATIONS``.
      kernel_init: one of ``KERNEL_INITS``.
      policy_head_scale: scale of the policy's last layer; None means the scale of a hidden layer.
      distribution: ``"auto"`` is Categorical for Discrete and ``"gaussian"`` for a Box. ``"gaussian"`` and
        ``"tanh_gaussian"`` have one log_std [A] for all states, a parameter; with the suffix ``"_state"`` the head
        gives σ = softplus(raw) + 0.001 for each state.
      log_std_init: first value of a state-independent log_std.
      torso: ``"mlp"`` flattens the observation; ``"cnn"`` applies one 3x3 convolution with 16 features to [H, W, C]
        first; ``"auto"`` is ``"cnn"`` for rank 3, else ``"mlp"``.
      shared_torso: actor and critic share the torso, which is kept with the actor; the critic is then a value head.

    Returns:
      Networks. ``policy`` and ``value`` are separate functions; under jit the compiler evaluates a shared torso once.

    Raises:
      RequestError: a field does not fit; the message names it, its value and the remedy.

    Sources: MLP and scales: Huang et al. 2022, "The 37 implementation details of PPO". LeCun with softplus: Brax and
    Lehmann 2024, arXiv 2401.13662. Convolution: Young and Tian 2019, arXiv 1903.03176, the DQN of MinAtar (16 filters
    3x3 with stride 1, then 128 units). paper: relu / authors' code: relu / here: ``activation``. PureJaxRL flattens
    MinAtar's observations instead: ``torso="mlp"``.
    """
    choose("activation", activation, ACTIVATIONS)
    choose("kernel_init", kernel_init, KERNEL_INITS)
    kind, size = _resolve_distribution(distribution, action_space)
    torso = resolve_torso(torso, observation_space.shape)
    if hidden_sizes is None:
        hidden_sizes = (128,) if torso == "cnn" else (64, 64)
    hidden_sizes = layer_sizes("hidden_sizes", hidden_sizes)
    if shared_torso and critic_hidden_sizes is not None:
        raise RequestError(f"critic_hidden_sizes = {critic_hidden_sizes} has no use with shared_torso; leave it None")
    critic_hidden_sizes = (
        hidden_sizes if critic_hidden_sizes is None else layer_sizes("critic_hidden_sizes", critic_hidden_sizes)
    )
    if policy_head_scale is not None and not 0 <= policy_head_scale < math.inf:
        raise RequestError(f"policy_head_scale = {policy_head_scale} is not a scale; give a number >= 0, or None")
    if kind.endswith("_state") and log_std_init != 0.0:
        raise RequestError(f"log_std_init = {log_std_init} has no use with distribution = {kind!r}; leave it 0")

    def make_torso(sizes):
        return Torso(len(observation_space.shape), sizes, ACTIVATIONS[activation], torso == "cnn")

    actor_torso, critic_torso = make_torso(hidden_sizes), make_torso(critic_hidden_sizes)
    policy_head, value_head = PolicyHead(size, kind), nn.Dense(1)
    hidden_scale = math.sqrt(2) if kernel_init == "orthogonal" else 1.0
    head_scale = {"actor": hidden_scale if policy_head_scale is None else policy_head_scale, "critic": 1.0}

    def shapes() -> ActorCritic:
        """What ``init`` returns, with Flax's own initial values."""
        key = jax.random.key(0)
        features, torso_params = actor_torso.init_with_output(key, jnp.zeros(observation_space.shape))
        actor = {"torso": torso_params, "head": policy_head.init(key, features)}
        features, torso_params = critic_torso.init_with_output(key, jnp.zeros(observation_space.shape))
        critic = {"torso": torso_params, "head": value_head.init(key, features)}
        return ActorCritic(actor, {"head": critic["head"]} if shared_torso else critic)

    def init(key: jax.Array) -> ActorCritic:
        leaves, structure = jax.tree_util.tree_flatten_with_path(jax.eval_shape(shapes))
        kernel_shapes = [leaf.shape for path, leaf in leaves if path[-1].key == "kernel"]
        kernels = iter(draw_kernels(key, kernel_shapes, kernel_init))

        def first_value(path, leaf):
            network, part, name = path[0].name, path[1].key, path[-1].key
            if name == "kernel":
                return next(kernels) * (head_scale[network] if part == "head" else hidden_scale)
            return jnp.full(leaf.shape, log_std_init if name == "log_std" else 0.0, leaf.dtype)

        return jax.tree.unflatten(structure, [first_value(path, leaf) for path, leaf in leaves])

    def policy(params: ActorCritic, obs: jax.Array):
        return policy_head.apply(params.actor["head"], actor_torso.apply(params.actor["torso"], obs))

    def value(params: ActorCritic, obs: jax.Array) -> jax.Array:
        torso_params = params.actor["torso"] if shared_torso else params.critic["torso"]
        value = value_head.apply(params.critic["head"], critic_torso.apply(torso_params, obs))
        return jnp.asarray(value)[..., 0]

    return Networks(init, policy, value)
