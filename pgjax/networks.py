"""Actor and critic networks, and the bundle of pure functions that algorithms use.

An algorithm sees only :class:`Networks`; anyone's own network is another ``Networks`` with the same three functions.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

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
KERNEL_INITS = ("orthogonal", "lecun_uniform", "lecun_normal")
TORSOS = ("auto", "mlp", "cnn")
DISTRIBUTIONS = ("auto", "categorical", "gaussian", "gaussian_state", "tanh_gaussian", "tanh_gaussian_state")

_MIN_STD = 0.001  # of the state-dependent standard deviations, as in Brax


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


class Torso(nn.Module):
    """obs [..., *O] -> features [..., F]: a 3x3 convolution if asked for, then dense layers, each with activation."""

    obs_rank: int
    hidden_sizes: tuple[int, ...]
    activation: Callable
    kernel_init: Callable
    convolution: bool

    @nn.compact
    def __call__(self, obs: jax.Array) -> jax.Array:
        x = obs
        if self.convolution:
            x = self.activation(nn.Conv(16, (3, 3), padding="VALID", kernel_init=self.kernel_init)(x))
        x = x.reshape(*obs.shape[: obs.ndim - self.obs_rank], math.prod(x.shape[obs.ndim - self.obs_rank :]))
        for size in self.hidden_sizes:
            x = self.activation(nn.Dense(size, kernel_init=self.kernel_init)(x))
        return x


class PolicyHead(nn.Module):
    """features [..., F] -> action distribution with batch shape [...]; ``size`` is num_actions or A."""

    size: int
    distribution: str
    kernel_init: Callable
    log_std_init: float

    @nn.compact
    def __call__(self, features: jax.Array) -> Categorical | DiagGaussian | TanhGaussian:
        state_dependent = self.distribution.endswith("_state")
        out = nn.Dense(2 * self.size if state_dependent else self.size, kernel_init=self.kernel_init)(features)
        if self.distribution == "categorical":
            return Categorical(out)
        if state_dependent:
            mean, raw = jnp.split(out, 2, axis=-1)
            log_std = jnp.log(nn.softplus(raw) + _MIN_STD)
        else:
            mean = out
            log_std = self.param("log_std", nn.initializers.constant(self.log_std_init), (self.size,))
            log_std = jnp.broadcast_to(log_std, mean.shape).astype(mean.dtype)
        return (TanhGaussian if self.distribution.startswith("tanh") else DiagGaussian)(mean, log_std)


def _kernel_init(name: str, scale: float | None) -> Callable:
    """The initialiser times ``scale``; None means the scale of hidden layers: √2 if orthogonal, 1 if LeCun."""
    if name == "orthogonal":
        return nn.initializers.orthogonal(math.sqrt(2) if scale is None else scale)
    init = getattr(nn.initializers, name)()
    if scale is None:
        return init
    return lambda key, shape, dtype=jnp.float32: scale * init(key, shape, dtype)


def _choose(field: str, value: str, known) -> None:
    if value not in known:
        raise RequestError(f"{field} = {value!r} is unknown; {close_names(str(value), known)}")


def _sizes(field: str, sizes) -> tuple[int, ...]:
    sizes = tuple(sizes)
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise RequestError(f"{field} = {sizes} has a width that is not a positive integer; e.g. {field} = (64, 64)")
    return sizes


def _resolve_distribution(distribution: str, action_space: Space) -> tuple[str, int]:
    """The distribution's name without "auto", and the width of one parameter vector (num_actions or A)."""
    _choose("distribution", distribution, DISTRIBUTIONS)
    if isinstance(action_space, Discrete):
        if distribution not in ("auto", "categorical"):
            raise RequestError(f"distribution = {distribution!r} does not fit discrete actions; use 'auto'")
        return "categorical", action_space.num
    if len(action_space.shape) != 1:
        raise RequestError(f"action_space.shape = {action_space.shape} is not of rank 1; flatten actions to (A,)")
    if distribution == "categorical":
        raise RequestError("distribution = 'categorical' does not fit continuous actions; use 'auto' or 'gaussian'")
    return ("gaussian" if distribution == "auto" else distribution), action_space.shape[0]


def _resolve_torso(torso: str, obs_shape: tuple[int, ...]) -> str:
    _choose("torso", torso, TORSOS)
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
    ``policy_head_scale``, the value head by 1. A LeCun initialiser is used as it is, for the policy head times
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
    _choose("activation", activation, ACTIVATIONS)
    _choose("kernel_init", kernel_init, KERNEL_INITS)
    kind, size = _resolve_distribution(distribution, action_space)
    torso = _resolve_torso(torso, observation_space.shape)
    if hidden_sizes is None:
        hidden_sizes = (128,) if torso == "cnn" else (64, 64)
    hidden_sizes = _sizes("hidden_sizes", hidden_sizes)
    if shared_torso and critic_hidden_sizes is not None:
        raise RequestError(f"critic_hidden_sizes = {critic_hidden_sizes} has no use with shared_torso; leave it None")
    critic_hidden_sizes = (
        hidden_sizes if critic_hidden_sizes is None else _sizes("critic_hidden_sizes", critic_hidden_sizes)
    )
    if policy_head_scale is not None and not 0 <= policy_head_scale < math.inf:
        raise RequestError(f"policy_head_scale = {policy_head_scale} is not a scale; give a number >= 0, or None")
    if kind.endswith("_state") and log_std_init != 0.0:
        raise RequestError(f"log_std_init = {log_std_init} has no use with distribution = {kind!r}; leave it 0")

    def make_torso(sizes):
        rank = len(observation_space.shape)
        return Torso(rank, sizes, ACTIVATIONS[activation], _kernel_init(kernel_init, None), torso == "cnn")

    actor_torso, critic_torso = make_torso(hidden_sizes), make_torso(critic_hidden_sizes)
    policy_head = PolicyHead(size, kind, _kernel_init(kernel_init, policy_head_scale), log_std_init)
    value_head = nn.Dense(1, kernel_init=_kernel_init(kernel_init, 1.0))

    def init_network(key: jax.Array, torso_module: Torso, head: nn.Module) -> dict:
        key_torso, key_head = jax.random.split(key)
        features, torso_params = torso_module.init_with_output(key_torso, jnp.zeros(observation_space.shape))
        return {"torso": torso_params, "head": head.init(key_head, features)}

    def init(key: jax.Array) -> ActorCritic:
        key_actor, key_critic = jax.random.split(key)
        actor = init_network(key_actor, actor_torso, policy_head)
        critic = init_network(key_critic, critic_torso, value_head)
        return ActorCritic(actor, {"head": critic["head"]} if shared_torso else critic)

    def policy(params: ActorCritic, obs: jax.Array):
        return policy_head.apply(params.actor["head"], actor_torso.apply(params.actor["torso"], obs))

    def value(params: ActorCritic, obs: jax.Array) -> jax.Array:
        torso_params = params.actor["torso"] if shared_torso else params.critic["torso"]
        return value_head.apply(params.critic["head"], critic_torso.apply(torso_params, obs))[..., 0]

    return Networks(init, policy, value)
