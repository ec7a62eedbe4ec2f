"""Minibatch gradient descent on a policy objective with value loss and entropy bonus: most methods' ``update``.

``loss = -mean(objective) + value_coef * value_loss - entropy_coef * entropy``, with the objective per sample, to be maximised.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from pgjax.errors import RequestError
from pgjax.on_policy import Batch, Core, Hypers, Learner, gae_estimate, with_values
from pgjax.optimizers import clip_gradient, descend
from pgjax.types import Objective, PyTree, Sample

# ``(sample, hypers, extra) -> [N]``, to be maximised; ``extra`` is ``Learner.extra``.
PolicyObjective = Callable[[Sample, Hypers, PyTree], jax.Array]


# ``(sample, hypers, extra) -> extra``: what a method learns besides, after a minibatch and from its forward pass.
ExtraUpdate = Callable[[Sample, Hypers, PyTree], PyTree]


_AnyHypers = TypeVar("_AnyHypers", bound=Hypers)


def plug(objective, default: PolicyObjective, hypers: _AnyHypers) -> tuple[PolicyObjective, _AnyHypers]:
    """What a method maximises: ``default``, or the user's own objective in its place.

    Args: objective: None, an ``Objective``, or a bare ``f(log_ratio, advantage) -> [N]``.
    Returns: the objective as the update calls it, and ``hypers`` with its parameters, unless they hold some already.
    """
    if objective is None:
        return default, hypers
    if isinstance(objective, Objective):
        if hypers.objective is None:
            hypers = hypers.replace(objective=objective.params)

        def plugged(sample, hypers, extra):
            return objective.fn(sample, hypers.objective)

        plugged.limits = objective.limits  # pyright: ignore[reportFunctionMemberAccess]
        return plugged, hypers
    return lambda sample, hypers, extra: objective(sample.log_ratio, sample.advantage), hypers


def masked_mean(x: jax.Array, weight: jax.Array | None) -> jax.Array:
    """Mean over the samples whose weight is one; over all if ``weight`` is None; 0 if there are none."""
    if weight is None:
        return x.mean()
    return jnp.where(weight > 0, x, 0.0).sum() / jnp.maximum(weight.sum(), 1)


def normalize_advantage(setup, batch: Batch) -> Batch:
    """Advantages with mean 0 and standard deviation 1 over the counted samples; the others become 0."""
    advantage, weight = batch.advantage, batch.weight
    centred = advantage - masked_mean(advantage, weight)
    variance = masked_mean(centred**2, weight)
    if setup.advantage_std == "sample":
        count = advantage.size if weight is None else weight.sum()
        variance = variance * count / jnp.maximum(count - 1, 1)
    normalized = centred / (jnp.sqrt(variance) + 1e-8)
    return batch.replace(advantage=normalized if weight is None else jnp.where(weight > 0, normalized, 0.0))


def value_loss(setup, hypers: Hypers, value, value_old, value_target) -> jax.Array:
    """Half the squared error [N], or PPO's pessimistic clipped form of it (openai/baselines ppo2)."""
    error = (value - value_target) ** 2
    if setup.value_loss == "clipped":
        clipped = value_old + jnp.clip(value - value_old, -hypers.value_clip_eps, hypers.value_clip_eps)
        error = jnp.maximum(error, (clipped - value_target) ** 2)
    return 0.5 * error


def surrogate_loss(core: Core, objective: PolicyObjective, key, params, minibatch: Batch, extra, hypers, progress):
    """The loss of one minibatch, to be minimised, what it was made of, and the sample that the objective saw.

    ``key`` is for the sampled entropy of distributions that have no closed form.
    """
    sample = sample_of(core, params, minibatch, progress)
    log_ratio, weight = sample.log_ratio, sample.weight
    value = objective(sample, hypers, extra)
    if jnp.shape(value) != sample.advantage.shape:
        # [N, 1] beside [N] would broadcast to a mean that looks right.
        wanted, given = sample.advantage.shape, jnp.shape(value)
        raise RequestError(f"the objective gave an array of shape {given} for samples of shape {wanted}; give one number each")
    loss_policy = -masked_mean(value, weight)
    loss = loss_policy - hypers.entropy_coef * masked_mean(sample.dist.entropy(key), weight)
    # E[ratio - 1 - log ratio], never negative: the sampled KL(old || new) with the least variance.
    parts = {"loss_policy": loss_policy, "kl_sampled": masked_mean(jnp.expm1(log_ratio) - log_ratio, weight)}
    if limits := getattr(objective, "limits", None):
        pairs = zip((log_ratio, sample.advantage), limits, strict=True)
        outside = [(x < lowest) | (x > highest) for x, (lowest, highest) in pairs]
        parts["outside_range"] = masked_mean((outside[0] | outside[1]).astype(log_ratio.dtype), weight)
    if minibatch.value_target is not None:
        parts["loss_value"] = value_fit(core, params, minibatch, hypers)
        loss = loss + hypers.value_coef * parts["loss_value"]
    return loss, (parts, sample)


def sample_of(core: Core, params, minibatch: Batch, progress) -> Sample:
    """What an objective sees of a minibatch [N] under the policy of ``params``."""
    dist = core.networks.policy(params, minibatch.obs)
    log_ratio = dist.log_prob(minibatch.action) - minibatch.log_prob_old
    return Sample(log_ratio, minibatch.advantage, dist, minibatch.dist_old, progress, minibatch.weight)


def value_fit(core: Core, params, minibatch: Batch, hypers) -> jax.Array:
    """The critic's mean loss on a minibatch."""
    value = core.networks.value(params, minibatch.obs)
    error = value_loss(core.setup, hypers, value, minibatch.value, minibatch.value_target)
    return masked_mean(error, minibatch.weight)


def samples_of(setup, batch: Batch) -> Batch:
    """The batch with what is shuffled in front: samples [T * B] by transition, environments [B, T] by unroll."""
    if setup.minibatch_by == "transition":
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
    return jax.tree.map(lambda x: x.swapaxes(0, 1), batch)


def shuffled(setup, key: jax.Array, num_epochs: int, present: jax.Array | None = None) -> jax.Array | None:
    """Indices [num_epochs * num_minibatches, size]: every epoch has every sample once, in an order of its own.

    Those that are not ``present`` [num] come last. None if the only minibatch is the whole batch, whose order makes no
    difference.
    """
    if setup.num_minibatches == 1:
        return None
    num = setup.num_envs * (setup.num_steps if setup.minibatch_by == "transition" else 1)
    # All epochs in one draw and one sort: every further one costs compile time, and this is on the way of every start.
    # Sorting by random words is a uniform permutation but for ties, so large batches get two words for each sample. The
    # sample's number takes the lowest bits of the last word: a CPU sorts single words five times faster than pairs.
    words = jax.random.bits(key, (1 if num <= 1 << 10 else 2, num_epochs, num), jnp.uint32)
    if present is not None:
        words = words.at[0].set((words[0] >> 1) | ((~present).astype(jnp.uint32) << 31))
    mask = jnp.uint32((1 << (num - 1).bit_length()) - 1)
    # Numbers are crossed with random bits, one pattern for each epoch, which makes the order of tied samples random too.
    pattern = words[-1, :, :1] & mask
    last = (words[-1] & ~mask) | (jnp.arange(num, dtype=jnp.uint32)[None] ^ pattern)
    *_, last = jax.lax.sort((*words[:-1], last), dimension=1, num_keys=len(words), is_stable=False)
    order = ((last & mask) ^ pattern).astype(jnp.int32)
    return order.reshape(num_epochs * setup.num_minibatches, -1)


def pick(setup, samples: Batch, index: jax.Array | None) -> Batch:
    """The minibatch of these indices, None for all of them: [N] by transition, [T, B'] by unroll."""
    minibatch = samples if index is None else jax.tree.map(lambda x: x[index], samples)
    if setup.minibatch_by == "unroll":
        minibatch = jax.tree.map(lambda x: x.swapaxes(0, 1), minibatch)
    return minibatch


def flat(setup, minibatch: Batch) -> Batch:
    """The minibatch with one sample axis [N], however it was picked."""
    if setup.minibatch_by == "transition":
        return minibatch
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), minibatch)


def minibatch_sgd(
    objective: PolicyObjective, estimate: Callable = gae_estimate, *, update_extra: ExtraUpdate | None = None
) -> Callable:
    """Makes an ``update``: ``num_epochs`` passes over shuffled minibatches, one optimiser step each.

    Without ``batch.value_target`` the critic is left as it is, its optimiser's momentum too.

    Args: objective: see ``PolicyObjective``. estimate: the method's advantage estimator, for recomputation.
      update_extra: see ``ExtraUpdate``.
    """

    def update(core: Core, key, learner: Learner, batch: Batch, hypers: Hypers, progress):
        setup = core.setup
        params = learner.params
        learning_rate = scheduled_learning_rate(setup, hypers, progress)

        def reestimate(params, batch):
            again = estimate(core, hypers, learner, with_values(core, params, batch))
            # The clipped value loss stays around the value at the rollout.
            return jax.lax.stop_gradient(again.replace(value=batch.value))

        reported = ["loss_policy", "kl_sampled", "grad_norm", *(["loss_value"] if batch.value_target is not None else [])]
        reported += ["outside_range"] if getattr(objective, "limits", None) else []

        def minibatch_step(carry, step):
            number, minibatch = step
            params, opt_state, extra, lr_scale, active = carry
            if setup.advantage_recompute == "minibatch":
                minibatch = reestimate(params, minibatch)
            minibatch = flat(setup, minibatch)
            if setup.normalize_advantage == "minibatch":
                minibatch = normalize_advantage(setup, minibatch)

            def loss(params):
                # Folded in here, where it disappears from the program if the entropy has a closed form.
                key = jax.random.fold_in(key_entropy, number)
                return surrogate_loss(core, objective, key, params, minibatch, extra, hypers, progress)

            gradient, (parts, sample) = jax.grad(loss, has_aux=True)(params)
            kl = parts["kl_sampled"]
            if setup.early_stop == "minibatch":
                active = active & ~(kl > hypers.target_kl)
            # Of a buffer that is not full yet the last minibatches are empty.
            takes_step = active if minibatch.present is None else active & minibatch.present.any()
            gradient, norm = clip_gradient(setup, hypers, gradient)
            if setup.learning_rate_schedule == "adaptive_kl":
                # paper: none / authors' code: brax's PPO after RSL-RL, per minibatch and before its step / here: the same.
                exact_kl = masked_mean(minibatch.dist_old.kl(sample.dist), minibatch.present)
                factor = jnp.where(exact_kl > 2 * hypers.desired_kl, 1 / 1.5, 1.0)
                factor = jnp.where((exact_kl > 0) & (exact_kl < hypers.desired_kl / 2), 1.5, factor)
                # The floor under the divisor lets a learning rate of zero stay zero.
                scaled = jnp.clip(learning_rate * lr_scale * factor, 1e-5, 1e-2) / jnp.maximum(learning_rate, 1e-30)
                lr_scale = jnp.where(takes_step, scaled, lr_scale)
            stepped = descend(setup, hypers, params, opt_state, gradient, learning_rate * lr_scale)
            if batch.value_target is None:
                stepped = tuple(new._replace(critic=old.critic) for new, old in zip(stepped, (params, opt_state), strict=True))
            stepped = (*stepped, update_extra(sample, hypers, extra) if update_extra else extra)
            if setup.early_stop != "off" or minibatch.present is not None:
                # A masked step of fixed length: under vmap a loop that ends early would wait for the slowest lane.
                stepped = jax.tree.map(lambda new, old: jnp.where(takes_step, new, old), stepped, (params, opt_state, extra))
            parts["grad_norm"] = norm
            # One array for all: storing each number is a kernel of its own.
            out = jnp.stack([parts[name] for name in reported]), takes_step
            if setup.early_stop == "epoch":
                last = (number + 1) % setup.num_minibatches == 0
                active = active & ~(last & (kl > hypers.target_kl))
            return (*stepped, lr_scale, active), out

        def prepare(params):
            data = batch
            if setup.advantage_recompute == "epoch":
                data = reestimate(params, batch)
            if setup.normalize_advantage == "batch":
                data = normalize_advantage(setup, data)
            return samples_of(setup, data)

        def epoch(carry, steps):
            numbers, index = steps
            samples = prepare(carry[0]) if prepared is None else prepared
            # All minibatches of an epoch are picked at once: a gather in every step would cost a kernel for each array.
            if index is None:
                minibatches = jax.tree.map(lambda x: x[None], pick(setup, samples, None))
            else:
                minibatches = jax.vmap(lambda index: pick(setup, samples, index))(index)
            return jax.lax.scan(minibatch_step, carry, (numbers, minibatches))

        prepared = None if setup.advantage_recompute == "epoch" else prepare(params)
        key_permute, key_entropy = jax.random.split(key)
        present = None if batch.present is None else batch.present.ravel()
        order = shuffled(setup, key_permute, setup.num_epochs, present)
        steps = (jnp.arange(setup.num_epochs * setup.num_minibatches), order)
        steps = jax.tree.map(lambda x: x.reshape(setup.num_epochs, setup.num_minibatches, *x.shape[1:]), steps)
        carry = (params, learner.opt_state, learner.extra, learner.lr_scale, jnp.ones((), bool))
        carry, (out, taken) = jax.lax.scan(epoch, carry, steps)
        params, opt_state, extra, lr_scale, _ = carry
        learner = learner.replace(params=params, opt_state=opt_state, extra=extra, lr_scale=lr_scale)
        taken = taken.astype(jnp.float32)[..., None]
        out = (out * taken).sum((0, 1)) / jnp.maximum(taken.sum(), 1)
        out = {name: out[i] for i, name in enumerate(reported)}
        out["learning_rate"] = learning_rate * lr_scale
        if setup.early_stop != "off":
            out["steps_taken"] = taken.mean()
        return learner, out

    return update


def fit_value(
    core: Core,
    key,
    learner: Learner,
    batch: Batch,
    hypers: Hypers,
    progress,
    *,
    num_epochs: int,
    num_minibatches: int,
    clip: bool = True,
) -> tuple[Learner, dict[str, jax.Array]]:
    """Gradient steps on the critic alone: ``num_epochs`` passes over shuffled minibatches of the batch.

    ``clip``: whether the gradient is clipped as ``setup`` says, or not at all.
    Returns: the learner, and the mean ``loss_value`` over the steps.
    """
    setup = dataclasses.replace(core.setup, num_minibatches=num_minibatches)
    rate = scheduled_learning_rate(setup, hypers, progress) * learner.lr_scale

    def minibatch_step(carry, index):
        params, opt_state = carry
        minibatch = flat(setup, pick(setup, samples, index))
        loss, gradient = jax.value_and_grad(lambda params: value_fit(core, params, minibatch, hypers))(params)
        gradient = jax.tree.map(lambda g: hypers.value_coef * g, gradient)
        if clip:
            gradient, _ = clip_gradient(setup, hypers, gradient)
        new_params, new_opt_state = descend(setup, hypers, params, opt_state, gradient, rate)
        # The actor's gradient is zero here, yet Adam would still move it by its momentum.
        return (params._replace(critic=new_params.critic), opt_state._replace(critic=new_opt_state.critic)), loss

    samples = samples_of(setup, batch)
    indices = shuffled(setup, key, num_epochs)
    start = (learner.params, learner.opt_state)
    (params, opt_state), loss = jax.lax.scan(minibatch_step, start, indices, length=num_epochs * num_minibatches)
    return learner.replace(params=params, opt_state=opt_state), {"loss_value": loss.mean()}


def scheduled_learning_rate(setup, hypers: Hypers, progress) -> jax.Array:
    """The base rate of this iteration: falling linearly to zero over the run, or constant."""
    if setup.learning_rate_schedule == "linear":
        return hypers.learning_rate * (1 - progress)
    return jnp.asarray(hypers.learning_rate)
