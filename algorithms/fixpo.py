"""FixPO, Fixup Policy Optimization (Zentner et al. 2023, arXiv 2312.05405).

PPO-KL whose multiplier follows the largest KL of each minibatch, and after every epoch a fix-up phase of steps on the KL
alone, until no state of the batch is further than ``kl_limit`` from the policy that acted: a trust region that holds for
every state after every update.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from pgjax import on_policy
from pgjax.errors import RequestError
from pgjax.networks import ActorCritic
from pgjax.optimizers import clip_gradient, descend
from pgjax.solvers.duals import init_duals, step_duals
from pgjax.updates import minibatch_sgd, plug, scheduled_learning_rate

# Advantages in the rewards' own unit, for β is in it; the critic's scale is kept by value normalisation instead.
DEFINING = ("normalize_advantage", "normalize_value", "reward_scaling")


@dataclasses.dataclass(frozen=True)
class Setup(on_policy.Setup):
    """fixup: after every ``epoch``, only after the last one of an ``iteration``, or ``off``, which drops the guarantee.

    fixup_minibatches: parts of the batch that a pass of the fix-up goes through.
    fixup_max_iterations: bound on those passes; a fix-up that reaches it goes back to the last policy within the limit.
    kl_statistic: what the multiplier follows and the limit is on: the largest KL (``max``), or the ``mean``, an ablation.
    """

    num_envs: int = 64
    num_steps: int = 128
    num_epochs: int = 10
    num_minibatches: int = 16
    normalize_advantage: Literal["minibatch", "batch", "none"] = "none"
    normalize_value: bool = True
    value_loss: Literal["clipped", "squared"] = "clipped"
    log_std_init: float = -0.5
    fixup: Literal["epoch", "iteration", "off"] = "epoch"
    fixup_minibatches: int = 8
    fixup_max_iterations: int = 100
    kl_statistic: Literal["max", "mean"] = "max"


class Hypers(on_policy.Hypers):
    """kl_limit: of KL(old || new) at any state, nats.  kl_headroom: β steers the largest KL to kl_limit / kl_headroom.

    kl_coef: β at the start.  kl_coef_lr: of β's own Adam; 0 keeps β constant.
    value_coef: 0.2, for the paper's 0.1 multiplies a squared error without the factor 1/2.
    """

    learning_rate: jax.Array | float = 3e-4
    adam_eps: jax.Array | float = 1e-8
    value_coef: jax.Array | float = 0.2
    kl_limit: jax.Array | float = 0.5
    kl_headroom: jax.Array | float = 3.0
    kl_coef: jax.Array | float = 1.0
    kl_coef_lr: jax.Array | float = 0.01


def fixpo_surrogate(log_ratio: jax.Array, advantage: jax.Array, kl: jax.Array, kl_coef) -> jax.Array:
    """The objective of the primary phase per sample [N], to be maximised: ρ Â - β KL(old || new)."""
    return jnp.exp(log_ratio) * advantage - kl_coef * kl


def kl_coef_gradient(kl: jax.Array, hypers, statistic: str = "max") -> jax.Array:
    """Slope in β of its loss β (ε - C KL_max): negative, raising β, where the largest KL exceeds ε / C."""
    return hypers.kl_limit - hypers.kl_headroom * (kl.max() if statistic == "max" else kl.mean())


def make(env, setup: Setup = Setup(), hypers: Hypers = Hypers(), *, objective=None, networks=None):  # noqa: B008
    """FixPO on ``env``. ``objective`` replaces that of the primary phase; the fix-up phase stays."""
    _validate(setup)

    def penalised(sample, hypers, extra):
        return fixpo_surrogate(sample.log_ratio, sample.advantage, sample.dist_old.kl(sample.dist), extra["kl_coef"])

    def update_kl_coef(sample, hypers, extra):
        gradient = kl_coef_gradient(sample.dist_old.kl(sample.dist), hypers, setup.kl_statistic)
        return step_duals(extra, {"kl_coef": gradient}, hypers.kl_coef_lr)

    objective, hypers = plug(objective, penalised, hypers)
    one_epoch = minibatch_sgd(objective, update_extra=update_kl_coef)

    def update(core, key, learner, batch, hypers, progress):
        single = core._replace(setup=dataclasses.replace(setup, num_epochs=1))
        rate = scheduled_learning_rate(setup, hypers, progress)

        def epoch(carry, step):
            learner, feasible = carry
            number, key = step
            learner, metrics = one_epoch(single, key, learner, batch, hypers, progress)
            if setup.fixup != "off":
                due = True if setup.fixup == "epoch" else number == setup.num_epochs - 1
                learner, feasible, counts = fix_up(core, learner, feasible, batch, hypers, rate, due)
                metrics = {**metrics, **counts}
            return (learner, feasible), metrics

        steps = (jnp.arange(setup.num_epochs), jax.random.split(key, setup.num_epochs))
        (learner, _), metrics = jax.lax.scan(epoch, (learner, learner.params.actor), steps)
        out = {name: value.mean() for name, value in metrics.items()}
        if setup.fixup != "off":
            for name in ("fixup_steps", "fixup_passes"):
                out[name] = metrics[name].sum()
            out["fixup_bound_hit"] = metrics["fixup_bound_hit"].max()
            out["fixup_share"] = out["fixup_steps"] / (setup.num_epochs * setup.num_minibatches)
        return learner, {**out, **learner.extra.values}

    return on_policy.make(
        "fixpo",
        env,
        setup,
        hypers,
        update=update,
        init_extra=lambda core, hypers: init_duals(kl_coef=hypers.kl_coef),
        networks=networks,
    )


def fix_up(core, learner, feasible, batch, hypers, rate, due=True):
    """Steps on the KL alone until every state of the batch is within the limit.

    Each pass goes through the batch in fixed minibatches, those within the limit taking no step, and the loop ends when
    the whole batch is within it under one policy: the clean pass of the paper, by one forward evaluation. A KL that is
    not a number is never within the limit.

    Args: feasible: the actor's parameters [P] that were last seen within the limit.  rate: learning rate.
      due: whether the fix-up is to run at all, bool.
    Returns: ``(learner, feasible, counts)``; the critic and its optimiser are not touched.
    """
    setup = core.setup

    def spread(x):
        # Neighbouring environments go to different minibatches.
        x = x.reshape(-1, setup.fixup_minibatches, *x.shape[2:])
        return x.swapaxes(0, 1)

    parts = jax.tree.map(spread, (batch.obs, batch.dist_old))

    def kl_of(actor, obs, dist_old):
        return dist_old.kl(core.networks.policy(ActorCritic(actor, None), obs))

    def violated(kl, limit):
        statistic = kl.max() if setup.kl_statistic == "max" else kl.mean()
        return ~(statistic <= limit)

    def check(actor):
        return violated(kl_of(actor, batch.obs, batch.dist_old), hypers.kl_limit)

    def minibatch_step(carry, part):
        params, opt_state, extra, steps = carry

        def loss(actor):
            kl = kl_of(actor, *part)
            return extra["kl_coef"] * kl.mean(), kl

        gradient, kl = jax.grad(loss, has_aux=True)(params.actor)
        gradient = ActorCritic(gradient, jnp.zeros_like(params.critic))
        gradient, _ = clip_gradient(setup, hypers, gradient)
        new_params, new_opt_state = descend(setup, hypers, params, opt_state, gradient, rate)
        new_extra = step_duals(extra, {"kl_coef": kl_coef_gradient(kl, hypers, setup.kl_statistic)}, hypers.kl_coef_lr)
        # A little below: at the limit itself, minibatch and batch, differently rounded, could disagree for ever.
        step = violated(kl, (1 - 1e-5) * hypers.kl_limit)
        actor, actor_state, extra = jax.tree.map(
            lambda new, old: jnp.where(step, new, old),
            (new_params.actor, new_opt_state.actor, new_extra),
            (params.actor, opt_state.actor, extra),
        )
        return (params._replace(actor=actor), opt_state._replace(actor=actor_state), extra, steps + step), None

    def one_pass(carry):
        learned, passes, _ = carry
        learned, _ = jax.lax.scan(minibatch_step, learned, parts)
        return learned, passes + 1, check(learned[0].actor)

    start = (learner.params, learner.opt_state, learner.extra, jnp.zeros((), jnp.int32))
    (params, opt_state, extra, steps), passes, failed = jax.lax.while_loop(
        lambda carry: carry[2] & (carry[1] < setup.fixup_max_iterations),
        one_pass,
        (start, jnp.zeros((), jnp.int32), due & check(learner.params.actor)),
    )
    # paper: no bound on the passes / authors' code: none / here: a bound, and the last policy that kept the limit beyond it.
    actor = jnp.where(failed, feasible, params.actor)
    feasible = jnp.where(due, actor, feasible)
    learner = learner.replace(params=params._replace(actor=actor), opt_state=opt_state, extra=extra)
    counts = {"fixup_steps": steps, "fixup_passes": passes, "fixup_bound_hit": failed}
    return learner, feasible, {name: value.astype(jnp.float32) for name, value in counts.items()}


def _validate(setup: Setup) -> None:
    if setup.shared_torso:
        raise RequestError("setup.shared_torso = True would move the critic in the fix-up; use False")
    if setup.early_stop != "off":
        raise RequestError(f"setup.early_stop = {setup.early_stop!r} would only end single epochs; use 'off'")
    if setup.learning_rate_schedule == "adaptive_kl":
        raise RequestError("setup.learning_rate_schedule = 'adaptive_kl' works against kl_limit; use 'linear' or 'constant'")
    if setup.advantage_recompute == "epoch":
        raise RequestError("setup.advantage_recompute = 'epoch' is not to be had here; use 'rollout'")
