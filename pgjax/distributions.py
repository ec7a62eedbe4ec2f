"""Action distributions as plain data: categorical, diagonal Gaussian, tanh-squashed diagonal Gaussian.

Every distribution has *batch* axes in front. Probabilities, entropies and divergences are joint over the action
dimensions (summed, never averaged) and in nats; results have the batch shape. Being pytrees of arrays, distributions
can be stacked by scan, indexed with ``jax.tree.map`` and kept as the policy that acted.

Sampling is split into ``draw_noise``, which needs only shapes, and ``sample_with``, which needs the parameters. So a
rollout can draw the noise of all its steps before its loop: ``dist.draw_noise(key, (T,))``, then
``dist.sample_with(noise[t])``. ``draw_noise`` also works on the result of ``jax.eval_shape``.
"""

import dataclasses
import math
from typing import TypeVar, dataclass_transform

import chex
import jax
import jax.numpy as jnp

from pgjax.errors import RequestError

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)
_Class = TypeVar("_Class")


@dataclass_transform(frozen_default=True)
def _distribution(cls: type[_Class]) -> type[_Class]:
    """A frozen dataclass of arrays as a pytree whose structure is that of no other class.

    Not ``flax.struct.dataclass``: in jaxlib 0.10 the structures of any two such classes with as many fields compare equal
    and differ only in their hash, so that one jitted function called with both now and then runs the wrong program.
    """
    dataclasses.dataclass(frozen=True)(cls)
    names = [field.name for field in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
    keys = [jax.tree_util.GetAttrKey(name) for name in names]
    jax.tree_util.register_pytree_with_keys(
        cls,
        lambda dist: ([(key, getattr(dist, key.name)) for key in keys], None),
        lambda _, arrays: cls(*arrays),
        lambda dist: ([getattr(dist, name) for name in names], None),
    )
    return cls


def _weighted_sum(prob: jax.Array, x: jax.Array) -> jax.Array:
    """Σ_a p(a) x(a) over the last axis where 0 times an infinity is 0, also in the gradient."""
    return jnp.sum(prob * jnp.where(prob > 0, x, 0.0), axis=-1)


@_distribution
class Categorical:
    """Distribution over ``0 .. num_actions - 1``, p(a) ∝ exp(logits[a]).

    logits: [*batch, num_actions]; -inf or a very low number rules an action out.
    """

    logits: jax.Array

    def draw_noise(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Standard Gumbel noise [*sample_shape, *batch, num_actions]; consumes ``key``."""
        return jax.random.gumbel(key, (*sample_shape, *self.logits.shape), self.logits.dtype)

    def sample_with(self, noise: jax.Array) -> jax.Array:
        """The actions [*sample_shape, *batch], int32, that this noise selects: argmax of logits plus Gumbel noise."""
        return jnp.argmax(jnp.broadcast_to(self.logits, noise.shape) + noise, axis=-1).astype(jnp.int32)

    def sample(self, key: jax.Array) -> jax.Array:
        """One action per batch entry [*batch], int32; consumes ``key``."""
        return self.sample_with(self.draw_noise(key))

    def mode(self) -> jax.Array:
        """The most probable action [*batch], int32; the first one of several."""
        return jnp.argmax(self.logits, axis=-1).astype(jnp.int32)

    def log_prob(self, action: jax.Array) -> jax.Array:
        """log p(action), [*sample, *batch], of integers of that shape, which must be in range."""
        # Selected and summed, not gathered: the gradient of a gather is a scatter, which a CPU runs entry by entry.
        chosen = jax.nn.one_hot(action, self.logits.shape[-1], dtype=bool)
        log_prob = jnp.broadcast_to(jax.nn.log_softmax(self.logits), chosen.shape)
        return jnp.where(chosen, log_prob, 0.0).sum(-1)

    def entropy(self, key: jax.Array | None = None) -> jax.Array:
        """-Σ_a p(a) log p(a), [*batch]. Exact; ``key`` is not used."""
        log_prob = jax.nn.log_softmax(self.logits)
        return -_weighted_sum(jnp.exp(log_prob), log_prob)

    def kl(self, other: "Categorical") -> jax.Array:
        """KL(self ‖ other) = Σ_a p(a) (log p(a) - log q(a)), [*batch]."""
        log_prob, log_prob_other = jax.nn.log_softmax(self.logits), jax.nn.log_softmax(other.logits)
        prob = jnp.exp(log_prob)
        return _weighted_sum(prob, log_prob) - _weighted_sum(prob, log_prob_other)

    def fisher_product(self, tangent: "Categorical") -> "Categorical":
        """The Fisher information in the logits, diag(p) - p pᵀ, times a change of them; per batch entry."""
        prob = jax.nn.softmax(self.logits)
        product = prob * tangent.logits
        return Categorical(product - prob * product.sum(-1, keepdims=True))

    def to_distrax(self):
        """The equal distrax distribution; imports distrax."""
        import distrax

        return distrax.Categorical(logits=self.logits)


@_distribution
class DiagGaussian:
    """Independent normal action dimensions. mean, log_std: both [*batch, A]; log_std is log σ, not log σ²."""

    mean: jax.Array
    log_std: jax.Array

    def draw_noise(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Standard normal noise [*sample_shape, *batch, A]; consumes ``key``."""
        return jax.random.normal(key, (*sample_shape, *self.mean.shape), self.mean.dtype)

    def sample_with(self, noise: jax.Array) -> jax.Array:
        """mean + σ noise, [*sample_shape, *batch, A], differentiable in mean and log_std."""
        mean, log_std = self._broadcast(noise.shape)
        return mean + jnp.exp(log_std) * noise

    def sample(self, key: jax.Array) -> jax.Array:
        """One action per batch entry [*batch, A]; consumes ``key``."""
        return self.sample_with(self.draw_noise(key))

    def mode(self) -> jax.Array:
        """The mean, [*batch, A]."""
        return self.mean

    def log_prob(self, action: jax.Array) -> jax.Array:
        """log of the joint density at ``action`` [*sample, *batch, A]; returns [*sample, *batch]."""
        mean, log_std = self._broadcast(jnp.broadcast_shapes(action.shape, self.mean.shape))
        z = (action - mean) * jnp.exp(-log_std)
        return jnp.sum(-0.5 * jnp.square(z) - log_std - _HALF_LOG_TWO_PI, axis=-1)

    def entropy(self, key: jax.Array | None = None) -> jax.Array:
        """Σ_i (log σ_i + ½ log 2πe), [*batch]. Exact; ``key`` is not used."""
        _, log_std = self._broadcast(self.mean.shape)
        return jnp.sum(log_std + (0.5 + _HALF_LOG_TWO_PI), axis=-1)

    def kl(self, other: "DiagGaussian") -> jax.Array:
        """KL(self ‖ other), [*batch]: Σ_i log σ'_i - log σ_i + (σ_i² + (μ_i - μ'_i)²) / 2σ'_i² - ½."""
        z = (self.mean - other.mean) * jnp.exp(-other.log_std)
        return self.kl_cov(other) + 0.5 * jnp.sum(jnp.square(z), axis=-1)

    def fisher_product(self, tangent: "DiagGaussian") -> "DiagGaussian":
        """The Fisher information in (mean, log_std), diag(1/σ², 2), times a change of them; per batch entry."""
        return DiagGaussian(tangent.mean * jnp.exp(-2 * self.log_std), 2 * tangent.log_std)

    def kl_mean(self, other: "DiagGaussian") -> jax.Array:
        """KL(N(μ, Σ) ‖ N(μ', Σ)), [*batch]: the cost of moving the mean, at the covariance of self (V-MPO's D_μ)."""
        _, log_std = self._broadcast(self.mean.shape)
        return 0.5 * jnp.sum(jnp.square((self.mean - other.mean) * jnp.exp(-log_std)), axis=-1)

    def kl_cov(self, other: "DiagGaussian") -> jax.Array:
        """KL(N(μ, Σ) ‖ N(μ, Σ')), [*batch]: the cost of changing the covariance, at a fixed mean (V-MPO's D_Σ)."""
        _, log_std = self._broadcast(self.mean.shape)
        log_ratio = log_std - other.log_std
        return jnp.sum(0.5 * jnp.expm1(2 * log_ratio) - log_ratio, axis=-1)  # expm1: exact where the two are close

    def to_distrax(self):
        """The equal distrax distribution; imports distrax."""
        import distrax

        return distrax.MultivariateNormalDiag(self.mean, jnp.exp(self.log_std))

    def _broadcast(self, shape) -> tuple[jax.Array, jax.Array]:
        # Required, because a log_std [A] would give one entropy for the whole batch and could not be indexed with it.
        chex.assert_equal_shape([self.mean, self.log_std])
        return jnp.broadcast_to(self.mean, shape), jnp.broadcast_to(self.log_std, shape)


def _log_det_tanh(u: jax.Array) -> jax.Array:
    """Σ_i log(1 - tanh²(u_i)) over the last axis, finite for every finite u."""
    return jnp.sum(2 * (math.log(2) - u - jax.nn.softplus(-2 * u)), axis=-1)


@_distribution
class TanhGaussian:
    """tanh of a diagonal Gaussian, a density on (-1, 1)^A. mean, log_std: both [*batch, A], of the Gaussian inside.

    The action of this class is always the value u *before* tanh: ``sample`` and ``mode`` return it, ``log_prob`` takes
    it, and an action map applies tanh on the way to the environment. tanh(u) rounds to 1.0 long before u is extreme,
    and no u comes back from there.
    """

    mean: jax.Array
    log_std: jax.Array

    @property
    def base(self) -> DiagGaussian:
        """The Gaussian of u."""
        return DiagGaussian(self.mean, self.log_std)

    def draw_noise(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Standard normal noise [*sample_shape, *batch, A]; consumes ``key``."""
        return self.base.draw_noise(key, sample_shape)

    def sample_with(self, noise: jax.Array) -> jax.Array:
        """u = mean + σ noise, [*sample_shape, *batch, A]."""
        return self.base.sample_with(noise)

    def sample(self, key: jax.Array) -> jax.Array:
        """One u per batch entry [*batch, A]; consumes ``key``."""
        return self.base.sample(key)

    def mode(self) -> jax.Array:
        """The mean of u, [*batch, A]: the mode of the Gaussian inside, not of the squashed density."""
        return self.mean

    def log_prob(self, action: jax.Array) -> jax.Array:
        """log of the joint density *of tanh(u)* for u = ``action`` [*sample, *batch, A]; returns [*sample, *batch].

        log N(u) - Σ_i 2 (log 2 - u_i - softplus(-2 u_i))
        """
        return self.base.log_prob(action) - _log_det_tanh(action)

    def entropy(self, key: jax.Array | None = None) -> jax.Array:
        """H(u) + Σ_i log(1 - tanh²(u_i)) at one draw of u, [*batch]; consumes ``key``.

        There is no closed form; this estimate is unbiased, and its gradient flows through the draw.
        Raises RequestError without a key.
        """
        if key is None:
            raise RequestError("the entropy of a tanh-Gaussian is sampled: call entropy(key) with a random key")
        return self.base.entropy() + _log_det_tanh(self.base.sample(key))

    def kl(self, other: "TanhGaussian") -> jax.Array:
        """KL(self ‖ other), [*batch]; that of the Gaussians inside, because both are mapped by the same bijection."""
        return self.base.kl(other.base)

    def fisher_product(self, tangent: "TanhGaussian") -> "TanhGaussian":
        """As :meth:`DiagGaussian.fisher_product`: a bijection of the actions changes no information."""
        product = self.base.fisher_product(tangent.base)
        return TanhGaussian(product.mean, product.log_std)

    def kl_mean(self, other: "TanhGaussian") -> jax.Array:
        """As :meth:`DiagGaussian.kl_mean`, [*batch]."""
        return self.base.kl_mean(other.base)

    def kl_cov(self, other: "TanhGaussian") -> jax.Array:
        """As :meth:`DiagGaussian.kl_cov`, [*batch]."""
        return self.base.kl_cov(other.base)

    def to_distrax(self):
        """The equal distrax distribution, whose actions are *after* tanh; imports distrax."""
        import distrax

        return distrax.Transformed(self.base.to_distrax(), distrax.Block(distrax.Tanh(), 1))
