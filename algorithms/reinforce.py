"""REINFORCE (Williams 1992), with no baseline, the batch's mean return, or a learned value as baseline.

One gradient step per batch along (G - b) ∇log π with Monte-Carlo returns G. The factor γ^t in front of ∇log π is left out,
as in all public code.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from pgjax import estimators, normalizers, on_policy
from pgjax.algorithms.a2c import policy_gradient
from pgjax.errors import RequestError
from pgjax.updates import fit_value, masked_mean, minibatch_sgd, plug

# One gradient step per batch, which has to hold whole episodes.
DEFINING = ("num_epochs", "num_minibatches", "num_steps")


@dataclasses.dataclass(frozen=True)
class Setup(on_policy.Setup):
    """baseline: what is subtracted from the return: a learned ``value``, the ``batch_mean``, or ``none``.

    tail: what becomes of steps whose episode outlasts the batch: ``mask`` leaves them out (unbiased, and wasteful unless
        num_steps exceeds an episode's length), ``bootstrap`` ends their return with the critic (value baseline only).
    value_steps: passes over the batch for the critic per iteration, the first of them jointly with the policy's.
    """

    num_steps: int = 500
    normalize_advantage: Literal["minibatch", "batch", "none"] = "none"
    baseline: Literal["value", "batch_mean", "none"] = "value"
    tail: Literal["mask", "bootstrap"] = "mask"
    value_steps: int = 1


class Hypers(on_policy.Hypers):
    learning_rate: jax.Array | float = 1e-3
    entropy_coef: jax.Array | float = 0.01


def returns_estimate(core, hypers, learner, batch):
    """Fills in the return minus baseline as advantage, and the return as the critic's target.

    A truncated episode's return ends with the critic's value of its last observation when there is a critic and
    ``boundary`` is ``bootstrap``; otherwise truncation counts as the end.
    """
    setup = core.setup
    learned = setup.baseline == "value"
    moments = learner.value_moments
    value, next_value = batch.value, batch.next_value
    if moments is not None:
        value, next_value = (normalizers.denormalize(moments, v) for v in (value, next_value))
    bootstrap = next_value if learned and setup.boundary == "bootstrap" else jnp.zeros_like(next_value)
    truncated, weight = batch.truncated, None
    if setup.tail == "bootstrap":
        # The end of the batch is a cut like a time limit, and the critic stands for the rest, whatever ``boundary`` says.
        bootstrap = bootstrap.at[-1].set(jnp.where(batch.truncated[-1], bootstrap[-1], next_value[-1]))
        truncated = truncated.at[-1].set(~batch.terminated[-1])
    else:
        weight = estimators.complete_returns_mask(batch.terminated, batch.truncated).astype(jnp.float32)
    return_ = estimators.reward_to_go(batch.reward, batch.terminated, truncated, hypers.gamma, bootstrap)
    if not learned:
        baseline = masked_mean(return_, weight) if setup.baseline == "batch_mean" else 0.0
        return batch.replace(advantage=return_ - baseline, value_target=None, weight=weight)
    target = return_ if moments is None else normalizers.normalize(moments, return_)
    advantage = jax.lax.stop_gradient(return_ - value)
    return batch.replace(advantage=advantage, value_target=target, weight=weight)


def make(env, setup: Setup = Setup(), hypers: Hypers = Hypers(), *, objective=None, networks=None):  # noqa: B008
    """REINFORCE on ``env``. ``objective`` replaces the policy gradient, as elsewhere."""
    _validate(setup)

    def gradient(sample, hypers, extra):
        return policy_gradient(sample.log_ratio, sample.advantage)

    objective, hypers = plug(objective, gradient, hypers)
    policy_step = minibatch_sgd(objective, returns_estimate)

    def update(core, key, learner, batch, hypers, progress):
        key, key_value = jax.random.split(key)
        before = learner
        learner, metrics = policy_step(core, key, learner, batch, hypers, progress)
        if setup.baseline == "value" and setup.value_steps > 1:
            learner, _ = fit_value(
                *(core, key_value, learner, batch, hypers, progress),
                num_epochs=setup.value_steps - 1,
                num_minibatches=setup.num_minibatches,
            )
        if batch.weight is not None:
            # Without a complete episode there is no gradient, and the optimiser's momentum alone must not move anything.
            learned = batch.weight.sum() > 0
            learner = jax.tree.map(lambda new, old: jnp.where(learned, new, old), learner, before)
        return learner, metrics

    return on_policy.make(
        "reinforce",
        env,
        setup,
        hypers,
        update=update,
        estimate=returns_estimate,
        networks=networks,
    )


def _validate(setup: Setup) -> None:
    if setup.tail == "bootstrap" and setup.baseline != "value":
        raise RequestError(f"setup.tail = 'bootstrap' needs a critic; use baseline = 'value' instead of {setup.baseline!r}")
    if setup.boundary == "mask":
        raise RequestError("setup.boundary = 'mask' is not defined for returns; use 'bootstrap' or 'terminate'")
    if setup.normalize_value and setup.baseline != "value":
        raise RequestError(f"setup.normalize_value = True needs a critic; use baseline = 'value', not {setup.baseline!r}")
    if setup.normalize_value and setup.tail == "mask":
        raise RequestError(
            "setup.normalize_value = True would learn from the incomplete returns of tail = 'mask'; use tail = 'bootstrap'"
        )
    if setup.value_steps < 1:
        raise RequestError(f"setup.value_steps = {setup.value_steps} must be a whole number >= 1")
