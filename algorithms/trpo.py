"""TRPO, Trust Region Policy Optimization (Schulman et al. 2015, arXiv 1502.05477).

Each batch takes one step: along the natural gradient, found by conjugate gradient, as far as the quadratic model allows a
mean KL(old || new) of ``max_kl``, then back until the true KL keeps the bound and the surrogate improves; else not at all.
The critic is fitted afterwards, by minibatch descent.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from pgjax import on_policy
from pgjax.errors import RequestError
from pgjax.networks import ActorCritic
from pgjax.solvers import second_order
from pgjax.updates import fit_value, flat, masked_mean, normalize_advantage, plug, sample_of, samples_of

# The step is taken once, on the whole batch; the learning rate is the critic's.
DEFINING = ("num_epochs", "num_minibatches", "normalize_advantage")


@dataclasses.dataclass(frozen=True)
class Setup(on_policy.Setup):
    """num_minibatches: 1 is the paper's; more take that many steps one after the other, each on its part of the batch.

    cg_iterations: of conjugate gradient.  fisher_stride: one of so many samples enters the Fisher information.
    fisher_form: see ``pgjax.solvers.second_order.fisher_operator``.
    line_search_iterations: trials; with ``line_search`` False the full step is taken, which is the natural policy gradient.
    on_failure: what stays when no trial is accepted: the old policy, or (public code) the last trial.
    kl_over_actions: ``sum`` over action dimensions, or (public code) their ``mean``, which bounds less.
    value_epochs, value_minibatches: passes of the critic over the batch, and the parts each is cut into.
    """

    num_envs: int = 8
    num_steps: int = 256
    normalize_advantage: Literal["minibatch", "batch", "none"] = "batch"
    learning_rate_schedule: Literal["linear", "constant", "adaptive_kl"] = "constant"
    cg_iterations: int = 10
    fisher_stride: int = 1
    fisher_form: Literal["gauss_newton", "double_backprop"] = "gauss_newton"
    line_search: bool = True
    line_search_iterations: int = 10
    on_failure: Literal["rollback", "accept_last"] = "rollback"
    kl_over_actions: Literal["sum", "mean"] = "sum"
    value_epochs: int = 10
    value_minibatches: int = 32


class Hypers(on_policy.Hypers):
    """max_kl: bound of the mean KL(old || new), nats.  damping: what is added to the Fisher information's diagonal.

    backtrack: factor from one trial of the line search to the next.  kl_slack: trials may reach kl_slack * max_kl.
    min_improvement: share of the expected improvement that a trial has to bring; 0 takes any improvement.
    learning_rate: of the critic.
    """

    learning_rate: jax.Array | float = 1e-3
    value_coef: jax.Array | float = 1.0
    max_kl: jax.Array | float = 0.01
    damping: jax.Array | float = 0.1
    backtrack: jax.Array | float = 0.8
    kl_slack: jax.Array | float = 1.0
    min_improvement: jax.Array | float = 0.0


def trpo_surrogate(log_ratio: jax.Array, advantage: jax.Array) -> jax.Array:
    """The importance-weighted advantage ρ Â per sample [N], to be maximised (eq. 14)."""
    return jnp.exp(log_ratio) * advantage


def step_size(quadratic: jax.Array, max_kl: jax.Array) -> jax.Array:
    """β with ½ (β x)ᵀ A (β x) = max_kl, for quadratic = xᵀ A x (appendix C)."""
    return jnp.sqrt(2 * max_kl / jnp.maximum(quadratic, 1e-8))


def make(env, setup: Setup = Setup(), hypers: Hypers = Hypers(), *, objective=None, networks=None):  # noqa: B008
    """TRPO on ``env``. ``objective`` replaces the surrogate: ``f(log_ratio, advantage)`` or a ``pgjax.Objective``."""
    _validate(setup)

    def surrogate(sample, hypers, extra):
        return trpo_surrogate(sample.log_ratio, sample.advantage)

    objective, hypers = plug(objective, surrogate, hypers)

    def policy_step(core, key, actor, minibatch, hypers, progress):
        """One trust-region step [P] -> [P] on a minibatch [N], and what there is to say about it."""
        units = core.env.action_space.shape[-1:] if setup.kl_over_actions == "mean" else ()
        units = units[0] if units else 1
        # The mean over A dimensions bounded by δ is the sum bounded by A δ, with the damping in the same units.
        max_kl, damping = units * hypers.max_kl, units * hypers.damping
        # The stored policy: recomputed with other statistics it would not be the one that acted.
        dist_old = minibatch.dist_old
        if setup.num_minibatches > 1:
            dist_old = jax.lax.stop_gradient(core.networks.policy(ActorCritic(actor, None), minibatch.obs))

        def evaluate(actor):
            sample = sample_of(core, ActorCritic(actor, None), minibatch, progress)
            return masked_mean(objective(sample, hypers, None), minibatch.weight), sample.dist

        def gain(actor):
            value, dist = evaluate(actor)
            return value + hypers.entropy_coef * masked_mean(dist.entropy(key), minibatch.weight), value

        gradient, surrogate_old = jax.grad(gain, has_aux=True)(actor)
        # One of every so many, the next one each time: a stride alone would keep to a few of the environments.
        chosen = np.arange(max(len(minibatch.obs) // setup.fisher_stride, 1))
        obs = minibatch.obs[chosen * setup.fisher_stride + chosen % setup.fisher_stride]
        fisher = second_order.fisher_operator(
            lambda actor: core.networks.policy(ActorCritic(actor, None), obs), actor, setup.fisher_form
        )

        def damped(v):
            return fisher(v) + damping * v

        direction = second_order.conjugate_gradient(damped, gradient, setup.cg_iterations)
        applied = damped(direction)
        step = step_size(direction @ applied, max_kl) * direction
        expected = gradient @ step

        def accept(actor, fraction):
            value, dist = evaluate(actor)
            improvement = value - surrogate_old
            close = dist_old.kl(dist).mean() <= hypers.kl_slack * max_kl
            enough = (improvement > 0) & (improvement >= hypers.min_improvement * fraction * expected)
            return close & enough & jnp.isfinite(value)

        if setup.line_search:
            last = setup.on_failure == "accept_last"
            found = second_order.line_search(
                accept, actor, step, hypers.backtrack, setup.line_search_iterations, keep_last=last
            )
        else:
            found = second_order.LineSearch(actor + step, jnp.ones((), bool), jnp.zeros((), jnp.int32))
        surrogate_new, _ = evaluate(found.params)
        norm = jnp.linalg.norm(gradient)
        return found.params, {
            "loss_policy": -surrogate_new,
            "surrogate_gain": surrogate_new - surrogate_old,
            "expected_gain": expected,
            "line_search_accepted": found.accepted.astype(jnp.float32),
            "line_search_trials": found.trials.astype(jnp.float32),
            # Relative to the gradient: what conjugate gradient left unsolved.
            "cg_residual": jnp.linalg.norm(applied - gradient) / jnp.maximum(norm, 1e-30),
            "grad_norm": norm,
        }

    def update(core, key, learner, batch, hypers, progress):
        key_entropy, key_value = jax.random.split(key)
        normalized = normalize_advantage(setup, batch) if setup.normalize_advantage == "batch" else batch
        with jax.default_matmul_precision("highest"):
            if setup.num_minibatches == 1:
                minibatch = flat(setup, samples_of(setup, normalized))
                actor, metrics = policy_step(core, key_entropy, learner.params.actor, minibatch, hypers, progress)
            else:
                parts = jax.tree.map(
                    lambda x: x.reshape(setup.num_minibatches, -1, *x.shape[1:]), samples_of(setup, normalized)
                )

                def one(actor, part):
                    minibatch = flat(setup, part)
                    if setup.normalize_advantage == "minibatch":
                        minibatch = normalize_advantage(setup, minibatch)
                    return policy_step(core, key_entropy, actor, minibatch, hypers, progress)

                actor, metrics = jax.lax.scan(one, learner.params.actor, parts)
                metrics = jax.tree.map(jnp.mean, metrics)
        # The critic comes second: fitted before, it would have biased the advantages of this step.
        learner = learner.replace(params=learner.params._replace(actor=actor))
        fit = {"num_epochs": setup.value_epochs, "num_minibatches": setup.value_minibatches, "clip": False}
        learner, fitted = fit_value(core, key_value, learner, batch, hypers, progress, **fit)
        return learner, {**metrics, **fitted}

    return on_policy.make("trpo", env, setup, hypers, update=update, networks=networks)


def _validate(setup: Setup) -> None:
    if setup.shared_torso:
        raise RequestError("setup.shared_torso = True would move the policy when the critic is fitted; use False")
    if setup.num_epochs != 1:
        raise RequestError(f"setup.num_epochs = {setup.num_epochs}: a trust-region step is taken once; use 1")
    if setup.learning_rate_schedule == "adaptive_kl":
        raise RequestError("setup.learning_rate_schedule = 'adaptive_kl' has no use, max_kl bounds the step; use 'constant'")
    if setup.early_stop != "off":
        raise RequestError(f"setup.early_stop = {setup.early_stop!r} has no use, max_kl bounds the step; use 'off'")
    if setup.advantage_recompute != "rollout":
        raise RequestError(f"setup.advantage_recompute = {setup.advantage_recompute!r} has no use with one step; use 'rollout'")
    if setup.num_minibatches == 1 and setup.normalize_advantage == "minibatch":
        raise RequestError("setup.normalize_advantage = 'minibatch' is 'batch' with one step on the whole batch; use 'batch'")
    if not isinstance(setup.fisher_stride, int) or setup.fisher_stride < 1:
        raise RequestError(f"setup.fisher_stride = {setup.fisher_stride!r} must be a whole number >= 1")
