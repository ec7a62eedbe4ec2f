"""MDPO, Mirror Descent Policy Optimization, on-policy (Tomar et al. 2020, arXiv 2005.09814).

Every iteration approximates one step of mirror descent by several gradient steps on the whole batch: the surrogate less
KL(new || old) / t, with a step size t that falls to zero over the run. The critic is fitted afterwards.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from pgjax import on_policy
from pgjax.distributions import Categorical
from pgjax.errors import RequestError
from pgjax.updates import fit_value, minibatch_sgd, plug

# Several steps, each on the whole batch, with advantages normalised over it.
DEFINING = ("num_epochs", "num_minibatches", "normalize_advantage")


@dataclasses.dataclass(frozen=True)
class Setup(on_policy.Setup):
    """num_epochs: gradient steps of the policy on the whole batch; 1 is a plain policy gradient.

    step_size_schedule: ``linear`` from step_size to zero over the run, or ``constant``.
    tsallis_index: of the divergence, 1 is the KL.  value_epochs, value_minibatches: passes of the critic, and their parts.
    """

    num_envs: int = 8
    num_steps: int = 256
    num_epochs: int = 10
    normalize_advantage: Literal["minibatch", "batch", "none"] = "batch"
    value_loss: Literal["clipped", "squared"] = "clipped"
    learning_rate_schedule: Literal["linear", "constant", "adaptive_kl"] = "constant"
    step_size_schedule: Literal["linear", "constant"] = "linear"
    tsallis_index: float = 1.0
    value_epochs: int = 5
    value_minibatches: int = 16


class Hypers(on_policy.Hypers):
    """step_size: t at the start; the divergence costs 1/t.  value_coef: 2 makes the critic's loss the squared error."""

    learning_rate: jax.Array | float = 3e-4
    value_coef: jax.Array | float = 2.0
    step_size: jax.Array | float = 1.0


def mdpo_surrogate(log_ratio: jax.Array, advantage: jax.Array, divergence: jax.Array, step_size) -> jax.Array:
    """MDPO's objective per sample [N], to be maximised: ρ Â - D(new || old) / t (eq. 5). ``divergence`` [N] in nats."""
    return jnp.exp(log_ratio) * advantage - divergence / step_size


def mirror_step_size(step_size, progress: jax.Array, schedule: str) -> jax.Array:
    """t of an iteration that starts at ``progress``: falling from step_size to step_size / iterations, or constant.

    paper: from 1 to 0 / authors' code: from 1 + 1/K to 1/K over K iterations / here: from 1 to 1/K.
    """
    step_size = jnp.asarray(step_size)
    # A finished run that goes on stays at a step so small that the policy keeps its place.
    return step_size * jnp.maximum(1 - progress, 1e-6) if schedule == "linear" else step_size


def tsallis_divergence(dist, dist_old, index: float) -> jax.Array:
    """The Bregman divergence of the negative Tsallis entropy, B(new, old) [N], at index q; the KL(new || old) at q = 1.

    E_new[log_q new - q log_q old] + (q - 1) E_old[log_q old] with log_q x = (x^(q-1) - 1) / (q - 1); at q = 2 the squared
    distance of the two densities. Exact: a sum over actions, or the Gaussian integrals.
    paper: no on-policy form / authors' code: log_q new - log_q old at the old policy's samples, which is no divergence /
    here: the divergence. As in the authors' off-policy code, action dimensions are treated one by one and summed.
    """
    if index == 1:
        return dist.kl(dist_old)
    a = index - 1
    if isinstance(dist, Categorical):
        new, old = (jax.nn.softmax(d.logits) for d in (dist, dist_old))
        new_new, new_old, old_old = ((p * q**a).sum(-1) for p, q in ((new, new), (new, old), (old, old)))
        return (new_new - 1) / a - index * (new_old - 1) / a + (old_old - 1)

    def overlap(p, q):
        """∫ p q^a of the Gaussians' densities, for each dimension."""
        var_p, var_q = jnp.exp(2 * p.log_std), jnp.exp(2 * q.log_std)
        wide = var_q + a * var_p
        return (2 * jnp.pi * var_q) ** (-a / 2) * jnp.sqrt(var_q / wide) * jnp.exp(-a * (p.mean - q.mean) ** 2 / (2 * wide))

    # Of a tanh-Gaussian, between the Gaussians inside.
    return ((overlap(dist, dist) - 1) / a - index * (overlap(dist, dist_old) - 1) / a + overlap(dist_old, dist_old) - 1).sum(-1)


def make(env, setup: Setup = Setup(), hypers: Hypers = Hypers(), *, objective=None, networks=None):  # noqa: B008
    """MDPO on ``env``. ``objective`` replaces the surrogate and its divergence, as elsewhere."""
    _validate(setup)

    def proximal(sample, hypers, extra):
        divergence = tsallis_divergence(sample.dist, sample.dist_old, setup.tsallis_index)
        t = mirror_step_size(hypers.step_size, sample.progress, setup.step_size_schedule)
        return mdpo_surrogate(sample.log_ratio, sample.advantage, divergence, t)

    objective, hypers = plug(objective, proximal, hypers)
    policy_phase = minibatch_sgd(objective)

    def update(core, key, learner, batch, hypers, progress):
        key_policy, key_value = jax.random.split(key)
        learner, metrics = policy_phase(core, key_policy, learner, batch.replace(value_target=None), hypers, progress)
        # paper: joint or separate not said / authors' code: no clipping of the critic's gradient / here: none.
        fit = {"num_epochs": setup.value_epochs, "num_minibatches": setup.value_minibatches, "clip": False}
        learner, fitted = fit_value(core, key_value, learner, batch, hypers, progress, **fit)
        kl_reverse = core.networks.policy(learner.params, batch.obs).kl(batch.dist_old).mean()
        t = mirror_step_size(hypers.step_size, progress, setup.step_size_schedule)
        return learner, {**metrics, **fitted, "kl_reverse": kl_reverse, "step_size": t}

    return on_policy.make("mdpo", env, setup, hypers, update=update, networks=networks)


def _validate(setup: Setup) -> None:
    if setup.shared_torso:
        raise RequestError("setup.shared_torso = True would move the policy when the critic is fitted; use False")
    if setup.advantage_recompute != "rollout":
        raise RequestError(
            f"setup.advantage_recompute = {setup.advantage_recompute!r} has no use, the critic is fitted after the policy; "
            "use 'rollout'"
        )
    if not 1 <= setup.tsallis_index <= 2:
        raise RequestError(f"setup.tsallis_index = {setup.tsallis_index} is outside of [1, 2]; 1 is the KL")
