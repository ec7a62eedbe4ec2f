"""V-MPO, on-policy Maximum a Posteriori Policy Optimization (Song et al. 2019, arXiv 1909.12238).

The better half of the samples is weighted by softmax(Â / η), and the policy is fitted to them by weighted maximum
likelihood within a KL trust region around the policy that acted. The temperature η and the multipliers of the trust region
are learned. There is no importance ratio and no entropy bonus.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from pgjax import on_policy
from pgjax.distributions import Categorical
from pgjax.solvers.duals import init_duals, step_duals
from pgjax.spaces import Discrete
from pgjax.updates import masked_mean, minibatch_sgd, plug

# The temperature adapts to the advantages' own scale.
DEFINING = ("normalize_advantage",)


@dataclasses.dataclass(frozen=True)
class Setup(on_policy.Setup):
    """kl_form: ``exact``, or ``guide``, which reproduces Lehmann 2024's code: there the KL is taken between the current
    policy and itself, so nothing holds it back, and the multipliers drift at constant rates.
    """

    num_epochs: int = 4
    num_minibatches: int = 4
    normalize_advantage: Literal["minibatch", "batch", "none"] = "none"
    kl_form: Literal["exact", "guide"] = "exact"


class Hypers(on_policy.Hypers):
    """top_fraction: share of a minibatch's samples, the best ones, that is learned from.

    temperature, temperature_eps: η at the start, and how far from uniform it may weigh them, nats of KL.
    alpha, alpha_eps: multiplier at the start and bound of the KL(old || new), for discrete actions, nats.
    alpha_mean, alpha_mean_eps, alpha_cov, alpha_cov_eps: the same for the two parts of a Gaussian's KL.
    dual_learning_rate: of temperature and multipliers.
    """

    learning_rate: jax.Array | float = 3e-4
    value_coef: jax.Array | float = 1.0
    top_fraction: jax.Array | float = 0.5
    temperature: jax.Array | float = 1.0
    temperature_eps: jax.Array | float = 0.01
    alpha: jax.Array | float = 5.0
    alpha_eps: jax.Array | float = 0.01
    alpha_mean: jax.Array | float = 1.0
    alpha_mean_eps: jax.Array | float = 0.01
    alpha_cov: jax.Array | float = 1.0
    alpha_cov_eps: jax.Array | float = 5e-5
    dual_learning_rate: jax.Array | float = 1e-3


_MINIMUM = 1e-8  # of temperature and multipliers


def top_mask(advantage: jax.Array, top_fraction, weight: jax.Array | None = None) -> jax.Array:
    """Which samples [N] belong to the best floor(top_fraction * count); ties with the last of them too. At least one does."""
    counted = jnp.ones(advantage.shape, bool) if weight is None else weight > 0
    rank = jnp.where(counted, advantage, -jnp.inf)
    count = jnp.maximum(jnp.floor(top_fraction * counted.sum()), 1).astype(jnp.int32)
    threshold = -jnp.sort(-rank)[count - 1]
    return counted & (rank >= threshold)


def e_step_weights(advantage: jax.Array, temperature: jax.Array, mask: jax.Array) -> jax.Array:
    """ψ [N]: softmax of advantage / temperature over the samples in ``mask``, 0 elsewhere; sums to 1 (eq. 6)."""
    z = advantage / temperature
    z = jnp.where(mask, z - jnp.max(z, where=mask, initial=-jnp.inf), 0)
    weight = jnp.where(mask, jnp.exp(z), 0)
    return weight / weight.sum()


def temperature_loss(temperature: jax.Array, advantage: jax.Array, mask: jax.Array, temperature_eps) -> jax.Array:
    """The dual of the temperature: η ε + η log mean exp(Â / η) over the samples in ``mask`` (eq. 9).

    Its slope in η is ε - KL(ψ || uniform).
    """
    log_sum = jax.nn.logsumexp(jnp.where(mask, advantage, 0) / temperature, b=mask)
    return temperature * (temperature_eps + log_sum - jnp.log(mask.sum()))


def trust_region_kls(dist_old, dist) -> dict[str, jax.Array]:
    """The KL(old || new) per sample [N] that each multiplier holds: whole if categorical, else of mean and covariance."""
    if isinstance(dist, Categorical):
        return {"alpha": dist_old.kl(dist)}
    return {"alpha_mean": dist_old.kl_mean(dist), "alpha_cov": dist_old.kl_cov(dist)}


def _guide_kls(dist_old, dist) -> dict[str, jax.Array]:
    # authors' code: KLs of a policy with itself, of which that of the covariance, without square and logarithm, comes out
    # as 1/2; no gradient reaches the policy.
    return {name: jnp.full_like(kl, 0.5 * (name == "alpha_cov")) for name, kl in trust_region_kls(dist_old, dist).items()}


def make(env, setup: Setup = Setup(), hypers: Hypers = Hypers(), *, objective=None, networks=None):  # noqa: B008
    """V-MPO on ``env``. ``objective`` replaces weighted likelihood and trust region; the duals then move without effect."""
    multipliers = ("alpha",) if isinstance(env.action_space, Discrete) else ("alpha_mean", "alpha_cov")
    kls_of = trust_region_kls if setup.kl_form == "exact" else _guide_kls

    def weighted_likelihood(sample, hypers, duals):
        mask = top_mask(sample.advantage, hypers.top_fraction, sample.weight)
        psi = e_step_weights(sample.advantage, duals["temperature"], mask)
        # The update averages over the counted samples and ψ is made for a sum. log ρ has the gradient of log π.
        count = psi.size if sample.weight is None else sample.weight.sum()
        penalty = sum(duals[name] * kl for name, kl in kls_of(sample.dist_old, sample.dist).items())
        return count * psi * sample.log_ratio - penalty

    def update_duals(sample, hypers, duals):
        mask = top_mask(sample.advantage, hypers.top_fraction, sample.weight)
        gradient = {
            "temperature": jax.grad(temperature_loss)(duals["temperature"], sample.advantage, mask, hypers.temperature_eps)
        }
        for name, kl in kls_of(sample.dist_old, sample.dist).items():
            gradient[name] = getattr(hypers, name + "_eps") - masked_mean(kl, sample.weight)
        return step_duals(duals, gradient, hypers.dual_learning_rate, _MINIMUM)

    objective, hypers = plug(objective, weighted_likelihood, hypers)
    descend = minibatch_sgd(objective, update_extra=update_duals)

    def update(core, key, learner, batch, hypers, progress):
        learner, metrics = descend(core, key, learner, batch, hypers, progress)
        advantage, weight = batch.advantage.reshape(-1), None if batch.weight is None else batch.weight.reshape(-1)
        psi = e_step_weights(advantage, learner.extra["temperature"], top_mask(advantage, hypers.top_fraction, weight))
        # How many samples carry the weight: 1 / Σ ψ² of N.
        metrics["psi_ess"] = 1 / ((psi**2).sum() * psi.size)
        return learner, {**metrics, **learner.extra.values}

    return on_policy.make(
        "vmpo",
        env,
        setup,
        hypers,
        update=update,
        init_extra=lambda core, hypers: init_duals(**{name: getattr(hypers, name) for name in ("temperature", *multipliers)}),
        networks=networks,
    )
