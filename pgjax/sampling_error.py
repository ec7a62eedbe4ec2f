"""Sampling error: how far the actions of a batch are from what the policy does on average, in nats.

SE(D, θ) = KL(π_D ‖ π_θ), with π_D the policy under which the batch D is most likely, estimated on the batch itself as the mean
of log π_D(a|s) - log π_θ(a|s). It is above zero for on-policy data too: with k free parameters and N independent samples it
is k / (2 N) on average (Wilks), so a number means something only beside that of on-policy data of the same size.

Source: Corrado and Hanna 2023, arXiv 2311.08290; Zhong et al. 2022, arXiv 2111.14552, of whom the frozen features are.
"""

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from pgjax.distributions import Categorical
from pgjax.networks import ActorCritic

LEARNING_RATE = 1e-3
# Of the authors' protocol: samples of a new batch in a minibatch, bound on the gradient's norm, bounds on log σ.
_MINIBATCH, _GRAD_NORM, _LOG_STD = 512, 1.0, (-3.0, 1.0)


def of_batch(core, key: jax.Array, params: ActorCritic, obs, action, present=None) -> dict[str, jax.Array]:
    """``{"sampling_error": []}`` of a batch from the policy of ``params``, by the protocol that ``core.setup`` names.

    ``last_layer``: everything but the last layer and log σ is frozen; full-batch Adam.  ``authors``: see ``by_authors``.

    Args: obs [T, B, *O], normalised; action [T, B, *A]; present [T, B] bool, None if every sample counts.
    """
    if core.setup.sampling_error == "authors":
        return {"sampling_error": by_authors(core, key, params, obs, action, present)}
    if core.networks.last_layer:
        weights, policy_of = core.networks.last_layer(params, obs)
    else:  # somebody's own networks, of which nothing is known: all of the actor is free
        weights, policy_of = params.actor, lambda actor: core.networks.policy(ActorCritic(actor, None), obs)

    def log_likelihood(weights):
        return policy_of(weights).log_prob(action).mean(where=present)

    return {"sampling_error": likelihood_gain(log_likelihood, weights, core.setup.sampling_error_epochs)}


def likelihood_gain(log_likelihood, weights, num_steps: int, learning_rate: float = LEARNING_RATE) -> jax.Array:
    """How much ``log_likelihood(weights)`` grows in ``num_steps`` of Adam from ``weights``, a pytree; never negative.

    paper: the maximum / authors' code: where the last step ends / here: the best of all steps, the start among them.
    """
    start, unravel = ravel_pytree(weights)
    optimizer = optax.adam(learning_rate)

    def value(flat):
        return log_likelihood(unravel(flat))

    def step(carry, _):
        flat, opt_state, best = carry
        found, gradient = jax.value_and_grad(value)(flat)
        update, opt_state = optimizer.update(-gradient, opt_state)
        return (optax.apply_updates(flat, update), opt_state, jnp.maximum(best, found)), None

    first = value(start)
    (flat, _, best), _ = jax.lax.scan(step, (start, optimizer.init(start), first), length=num_steps)
    return jnp.maximum(best, value(flat)) - first


def by_authors(core, key: jax.Array, params: ActorCritic, obs, action, present=None) -> jax.Array:
    """As the published numbers were measured: only the hidden layers' weight matrices are frozen, minibatches, clipped.

    Adam in minibatches of 512 samples for every batch that a buffer holds, gradients of a norm of at most 1, log σ between -3
    and 1 in both policies; the error is that after the last step and may be negative.
    Arguments as ``of_batch``.  Source: NicholasCorrado/PPOROS, without the weights of a later variant.
    """
    setup = core.setup
    num_parts = max(1, setup.num_envs * setup.num_steps // _MINIBATCH)
    samples = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (obs, action, jnp.ones(obs.shape[:2]) * _ones(present)))
    num = len(samples[0])
    free = _free_mask(core, params)
    optimizer = optax.chain(optax.clip_by_global_norm(_GRAD_NORM), optax.adam(LEARNING_RATE))

    def log_likelihood(actor, samples):
        obs, action, weight = samples
        dist = core.networks.policy(ActorCritic(actor, None), obs)
        if not isinstance(dist, Categorical):
            dist = type(dist)(dist.mean, jnp.clip(dist.log_std, *_LOG_STD))
        return (dist.log_prob(action) * weight).sum() / jnp.maximum(weight.sum(), 1)

    def epoch(carry, key):
        order = jnp.pad(jax.random.permutation(key, num), (0, -num % num_parts), constant_values=num)

        def step(carry, index):
            actor, opt_state = carry
            # What fills the last minibatch up is beyond the end, and weighs nothing.
            part = jax.tree.map(lambda x: x.at[index].get(mode="fill", fill_value=0), samples)
            gradient = -free * jax.grad(log_likelihood)(actor, part)
            update, opt_state = optimizer.update(gradient, opt_state)
            return (optax.apply_updates(actor, update), opt_state), None

        return jax.lax.scan(step, carry, order.reshape(num_parts, -1))[0], None

    start = (params.actor, optimizer.init(params.actor))
    (actor, _), _ = jax.lax.scan(epoch, start, jax.random.split(key, setup.sampling_error_epochs))
    return log_likelihood(actor, samples) - log_likelihood(params.actor, samples)


def tabular(state: jax.Array, action: jax.Array, prob: jax.Array, present: jax.Array | None = None) -> jax.Array:
    """The exact sampling error where states can be counted: Σ_s d_D(s) KL(π_D(·|s) ‖ π(·|s)), with the batch's frequencies.

    Args: state, action [...] int; prob [S, A] π(a|s), above zero; present [...] bool, None if every sample counts.
    """
    counts = jnp.zeros(prob.shape, prob.dtype).at[state, action].add(jnp.broadcast_to(_ones(present), state.shape))
    conditional = counts / jnp.maximum(counts.sum(-1, keepdims=True), 1)
    log_ratio = jnp.where(counts > 0, jnp.log(jnp.where(counts > 0, conditional, 1)) - jnp.log(prob), 0)
    return (counts * log_ratio).sum() / jnp.maximum(counts.sum(), 1)


def expected_on_policy(num_free: int, num_samples: int) -> float:
    """k / (2 N): what on-policy data have on average, for N independent samples and k free parameters, N far above k."""
    return num_free / (2 * num_samples)


def frequency_gap(dist, action: jax.Array, present: jax.Array | None = None) -> dict[str, jax.Array]:
    """``{"action_frequency_gap": []}``, the largest difference between an action's frequency and its mean probability.

    Of discrete actions; else empty.  Args: dist and action of batch shape [...]; present [...] bool or None.
    """
    if not isinstance(dist, Categorical):
        return {}
    num_actions = dist.logits.shape[-1]
    gap = jax.nn.one_hot(action, num_actions) - jax.nn.softmax(dist.logits)
    where = None if present is None else present[..., None]
    return {"action_frequency_gap": jnp.abs(gap.mean(range(action.ndim), where=where)).max()}


def _free_mask(core, params: ActorCritic) -> jax.Array:
    """[P], 0 for the entries of the hidden layers' weight matrices, else 1."""

    def free(path, leaf):
        names = [getattr(entry, "key", None) for entry in path]
        return jnp.full_like(leaf, not ("torso" in names and names[-1] == "kernel"))

    return ravel_pytree(jax.tree_util.tree_map_with_path(free, core.unravel(params).actor))[0]


def _ones(present):
    return 1.0 if present is None else present
