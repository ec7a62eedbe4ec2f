"""The on-policy loop and its gradient steps, against NumPy derivations in float64 that share no code with them.

The first half compares the updates that the algorithms ship, on random batches with linear networks, whose gradients
are written out here. The second half runs whole iterations on a small environment and replays them.
"""

import dataclasses
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.flatten_util import ravel_pytree

from pgjax import on_policy, updates
from pgjax.algorithms import a2c, ppo, reinforce
from pgjax.distributions import DiagGaussian
from pgjax.errors import RequestError
from pgjax.networks import ActorCritic
from pgjax.optimizers import init_opt_state
from pgjax.spaces import Box
from pgjax.types import TimeStep

T, B, O, A = 4, 4, 3, 2
OBSERVATIONS, ACTIONS = Box((O,)), Box((A,), -0.5, 0.5)


def shipped(module, env, setup):
    """``(core, update, estimate)`` that the algorithm of ``module`` hands to the loop."""
    taken, make = {}, on_policy.make

    def take(*args, update, estimate=on_policy.gae_estimate, **kwargs):
        taken.update(update=update, estimate=estimate)
        return make(*args, update=update, estimate=estimate, **kwargs)

    with mock.patch.object(on_policy, "make", take):
        algorithm = module.make(env, setup)
    return algorithm.core, taken["update"], taken["estimate"]


# ---- The update, by hand -------------------------------------------------------------------------------------------


SPACES = SimpleNamespace(observation_space=OBSERVATIONS, action_space=ACTIONS)
HYPERS = dict(
    learning_rate=0.03,
    critic_lr_scale=2.0,
    gamma=0.9,
    gae_lambda=0.8,
    value_coef=0.7,
    value_clip_eps=0.3,
    entropy_coef=0.05,
    max_grad_norm=0.4,
    adam_eps=1e-3,
    adam_b1=0.8,
    adam_b2=0.95,
    rmsprop_decay=0.9,
    rmsprop_eps=1e-2,
    target_kl=0.5,
    desired_kl=0.05,
)


def numbers(module, **changes):
    return jax.tree.map(np.float64, module.Hypers(**{**HYPERS, **changes}))


def random_params(rng):
    """Linear actor and critic as the networks' trees."""
    actor = {"Dense_0": {"kernel": rng.normal(size=(O, A)), "bias": rng.normal(size=A)}}
    actor["log_std"] = rng.normal(size=A) / 4
    critic = {"kernel": rng.normal(size=(O, 1)), "bias": rng.normal(size=1)}
    return ActorCritic({"torso": {}, "head": {"params": actor}}, {"torso": {}, "head": {"params": critic}})


def flat(params):
    """The six numbers-carrying arrays of linear networks, under short names."""
    actor, critic = params.actor["head"]["params"], params.critic["head"]["params"]
    arrays = dict(W=actor["Dense_0"]["kernel"], b=actor["Dense_0"]["bias"], s=actor["log_std"])
    arrays.update(w=critic["kernel"], c=critic["bias"])
    return {name: np.array(x, np.float64) for name, x in arrays.items()}


CRITIC = ("w", "c")


def normal_log_prob(mean, log_std, action):
    z = (action - mean) / np.exp(log_std)
    return (-0.5 * z**2 - log_std - 0.5 * np.log(2 * np.pi)).sum(-1)


def values(p, obs):
    return (obs @ p["w"])[..., 0] + p["c"][0]


def random_batch(rng, params):
    """A batch whose acting policy lies some way from ``params``, so that ratios leave the clip range at once."""
    p = flat(params)
    obs, final_obs = rng.normal(size=(2, T, B, O))
    mean = obs @ p["W"] + p["b"] + rng.normal(size=(T, B, A)) / 4
    log_std = np.broadcast_to(p["s"] + rng.normal(size=A) / 8, mean.shape).copy()
    action = mean + np.exp(log_std) * rng.normal(size=mean.shape)
    terminated = rng.random((T, B)) < 0.25
    truncated = (rng.random((T, B)) < 0.3) & ~terminated
    return on_policy.Batch(
        obs=obs,
        final_obs=final_obs,
        action=action,
        reward=rng.normal(size=(T, B)),
        terminated=terminated,
        truncated=truncated,
        dist_old=DiagGaussian(mean, log_std),
        log_prob_old=normal_log_prob(mean, log_std, action),
        value=values(p, obs) + rng.normal(size=(T, B)) / 2,
        next_value=values(p, final_obs),
    )


def plain_gae(h, boundary, reward, value, next_value, terminated, truncated):
    """Advantages [T, ...] by the recursion, and the weight of each step in the losses."""
    if boundary == "terminate":
        terminated, truncated = terminated | truncated, truncated & False
    advantage, later = np.zeros_like(reward), np.zeros_like(reward[0])
    for t in reversed(range(len(reward))):
        delta = reward[t] + h.gamma * (1 - terminated[t]) * next_value[t] - value[t]
        if boundary == "mask":
            delta = delta * (1 - truncated[t])
        later = delta + h.gamma * h.gae_lambda * (1 - terminated[t]) * (1 - truncated[t]) * later
        advantage[t] = later
    return advantage, 1.0 - truncated if boundary == "mask" else np.ones_like(reward)


def standardised(advantage, weight):
    n = weight.sum()
    mean = (advantage * weight).sum() / n
    std = np.sqrt((weight * (advantage - mean) ** 2).sum() / n)
    return (advantage - mean) / (std + 1e-8) * weight


def descend_by_hand(setup, h, p, moments, gradient, rate, step):
    """One optimiser step, written out; changes ``p`` and ``moments`` in place. ``step`` counts from one."""
    squares = [0.0, 0.0]
    for name, g in gradient.items():
        squares[name in CRITIC] += (g**2).sum()
    joint, norms = np.sqrt(sum(squares)), np.sqrt(squares)
    for name, g in gradient.items():
        if setup.gradient_clip == "elementwise":
            g = np.clip(g, -h.max_grad_norm, h.max_grad_norm)
        elif setup.gradient_clip != "none":
            norm = joint if setup.gradient_clip == "joint" else norms[int(name in CRITIC)]
            g = g * min(1, h.max_grad_norm / norm)
        if setup.optimizer == "adam":
            first, second = moments.setdefault(name, [0 * g, 0 * g])
            first[...] = h.adam_b1 * first + (1 - h.adam_b1) * g
            second[...] = h.adam_b2 * second + (1 - h.adam_b2) * g**2
            mean, square = first / (1 - h.adam_b1**step), second / (1 - h.adam_b2**step)
            move = mean / (np.sqrt(square) + h.adam_eps)
        else:
            start = 1.0 if setup.optimizer == "rmsprop" else 0.0
            (second,) = moments.setdefault(name, [start + 0 * g])
            second[...] = h.rmsprop_decay * second + (1 - h.rmsprop_decay) * g**2
            inside = setup.optimizer == "rmsprop"
            move = g / np.sqrt(second + h.rmsprop_eps) if inside else g / (np.sqrt(second) + h.rmsprop_eps)
        p[name] = p[name] - rate * (h.critic_lr_scale if name in CRITIC else 1.0) * move
    return joint


def value_gradient(setup, h, p, mb):
    """Loss of the critic, and its gradient in the value of each sample."""
    value = values(p, mb.obs)
    error, share = value - mb.target, mb.weight / mb.weight.sum()
    loss, slope = error**2, error
    if setup.value_loss == "clipped":
        near = mb.value + np.clip(value - mb.value, -h.value_clip_eps, h.value_clip_eps)
        pessimistic = (near - mb.target) ** 2 > loss
        # Where the clipped error is the larger one, the clip is at work, and a clipped value has no slope.
        loss, slope = np.maximum(loss, (near - mb.target) ** 2), np.where(pessimistic, 0.0, slope)
    return (share * loss).sum() / 2, h.value_coef * share * slope


def loss_gradient(setup, h, p, mb, clip_eps):
    """Gradient of the whole loss of a minibatch of N samples, with everything that is reported on the way."""
    log_std = p["s"]
    mean = mb.obs @ p["W"] + p["b"]
    z = (mb.action - mean) / np.exp(log_std)
    log_ratio = normal_log_prob(mean, log_std, mb.action) - mb.log_prob_old
    ratio = np.exp(log_ratio)
    share = mb.weight / mb.weight.sum()
    if clip_eps is None:
        objective, slope = log_ratio * mb.advantage, mb.advantage
    else:
        cut = ((mb.advantage > 0) & (ratio > 1 + clip_eps)) | ((mb.advantage < 0) & (ratio < 1 - clip_eps))
        bound = np.where(mb.advantage > 0, 1 + clip_eps, 1 - clip_eps)
        objective = np.where(cut, bound, ratio) * mb.advantage
        slope = np.where(cut, 0, ratio * mb.advantage)
    slope = -share * slope
    # d log N / d mean = z / sigma;  d log N / d log sigma = z^2 - 1;  entropy = sum of log sigma + const.
    to_mean = slope[:, None] * z / np.exp(log_std)
    gradient = {
        "W": mb.obs.T @ to_mean,
        "b": to_mean.sum(0),
        "s": (slope[:, None] * (z**2 - 1)).sum(0) - h.entropy_coef * share.sum(),
    }
    loss_value, to_value = value_gradient(setup, h, p, mb)
    gradient.update(w=(mb.obs.T @ to_value)[:, None], c=to_value.sum(keepdims=True))
    variance, variance_old = np.exp(2 * log_std), np.exp(2 * mb.log_std_old)
    kl = (log_std - mb.log_std_old + (variance_old + (mb.mean_old - mean) ** 2) / (2 * variance) - 0.5).sum(-1)
    report = dict(
        loss_policy=-(share * objective).sum(),
        loss_value=loss_value,
        kl_sampled=(share * (ratio - 1 - log_ratio)).sum(),
    )
    return gradient, report, kl.mean()


def update_by_hand(setup, h, params, batch, indices, progress, clip_eps):
    """All gradient steps of one iteration. Returns parameters, reports, factor on the rate, share of steps."""
    p, moments, lr_scale, active, reports = flat(params), {}, 1.0, True, []
    rate = h.learning_rate * (1 - progress) if setup.learning_rate_schedule == "linear" else h.learning_rate
    arrays = dict(
        obs=batch.obs,
        final_obs=batch.final_obs,
        action=batch.action,
        log_prob_old=batch.log_prob_old,
        mean_old=batch.dist_old.mean,
        log_std_old=batch.dist_old.log_std,
        reward=batch.reward,
        terminated=batch.terminated,
        truncated=batch.truncated,
        value=batch.value,
    )

    def estimate(data, value, next_value):
        flags = data["terminated"], data["truncated"]
        advantage, weight = plain_gae(h, setup.boundary, data["reward"], value, next_value, *flags)
        return {**data, "advantage": advantage, "target": advantage + value, "weight": weight}

    def again(data):
        return estimate(data, values(p, data["obs"]), values(p, data["final_obs"]))

    data = estimate(arrays, batch.value, batch.next_value)
    for number, index in enumerate(indices):
        position = number % setup.num_minibatches
        if setup.advantage_recompute == "epoch" and position == 0:
            data = again(arrays)
        if setup.minibatch_by == "unroll":
            mb = {name: x[:, index] for name, x in data.items()}
        else:
            mb = {name: np.stack([x[i // B, i % B] for i in index]) for name, x in data.items()}
        if setup.advantage_recompute == "minibatch":
            mb = again(mb)
        if setup.normalize_advantage == "minibatch":
            mb["advantage"] = standardised(mb["advantage"], mb["weight"])
        if setup.normalize_advantage == "batch":
            whole = standardised(data["advantage"], data["weight"])
            mb["advantage"] = whole[:, index] if setup.minibatch_by == "unroll" else whole.ravel()[index]
        if setup.minibatch_by == "unroll":
            mb = {name: x.reshape(-1, *x.shape[2:]) for name, x in mb.items()}
        gradient, report, kl = loss_gradient(setup, h, p, SimpleNamespace(**mb), clip_eps)
        if setup.early_stop == "minibatch" and report["kl_sampled"] > h.target_kl:
            active = False
        if not active:
            continue
        if setup.learning_rate_schedule == "adaptive_kl":
            # As in Brax, the rate moves before the step on the minibatch whose KL was measured.
            factor = 1 / 1.5 if kl > 2 * h.desired_kl else 1.5 if 0 < kl < h.desired_kl / 2 else 1
            lr_scale = np.clip(rate * lr_scale * factor, 1e-5, 1e-2) / rate
        report["grad_norm"] = descend_by_hand(setup, h, p, moments, gradient, rate * lr_scale, len(reports) + 1)
        reports.append(report)
        if setup.early_stop == "epoch" and position == setup.num_minibatches - 1 and report["kl_sampled"] > h.target_kl:
            active = False
    means = {name: np.mean([report[name] for report in reports]) for name in reports[0]}
    return p, means, lr_scale, len(reports) / len(indices)


CASES = {
    "joint clip, minibatch normalisation, clipped value": (ppo, {}, {}),
    "separate clip, whole batch, stop after an epoch": (
        ppo,
        dict(gradient_clip="separate", normalize_advantage="batch", early_stop="epoch"),
        dict(target_kl=0.05),
    ),
    "element-wise clip, rmsprop, stop within an epoch": (
        ppo,
        dict(gradient_clip="elementwise", optimizer="rmsprop", early_stop="minibatch", num_epochs=4),
        dict(target_kl=0.1, max_grad_norm=0.1, learning_rate=0.3),
    ),
    "no clip, rmsprop as in torch, learning rate by KL": (
        ppo,
        dict(
            gradient_clip="none",
            optimizer="rmsprop_torch",
            normalize_advantage="none",
            learning_rate_schedule="adaptive_kl",
            value_loss="squared",
        ),
        dict(learning_rate=2e-3, desired_kl=0.06),
    ),
    "unrolls, advantages again at each minibatch, masked boundary": (
        ppo,
        dict(minibatch_by="unroll", advantage_recompute="minibatch", boundary="mask"),
        {},
    ),
    "advantages again at each epoch, truncation as termination": (
        ppo,
        dict(advantage_recompute="epoch", boundary="terminate", normalize_advantage="batch"),
        {},
    ),
    "actor-critic": (a2c, dict(num_minibatches=2, learning_rate_schedule="constant"), {}),
}


def build(module, setup_changes, hypers_changes=(), seed=0):
    setup = module.Setup(**{**dict(num_envs=B, num_steps=T, num_epochs=2, num_minibatches=2, hidden_sizes=()), **setup_changes})
    hypers = numbers(module, **dict(hypers_changes))
    rng = np.random.default_rng(seed)
    params = random_params(rng)
    batch = random_batch(rng, params)
    core, update, estimate = shipped(module, SPACES, setup)
    vectors = ActorCritic(*(ravel_pytree(part)[0] for part in params))
    learner = on_policy.Learner(vectors, init_opt_state(setup, hypers, vectors), jnp.ones(()), None, None, None, None)

    @jax.jit
    def run(key, learner, batch, hypers, progress):
        return update(core, key, learner, estimate(core, hypers, learner, batch), hypers, progress)

    return SimpleNamespace(
        run=run, setup=setup, hypers=hypers, params=params, batch=batch, learner=learner, core=core, estimate=estimate
    )


@pytest.mark.parametrize("case", CASES)
def test_all_gradient_steps_equal_the_derivation_by_hand(float64, case):
    module, setup_changes, hypers_changes = CASES[case]
    it = build(module, setup_changes, hypers_changes)
    key, progress = jax.random.key(3), 0.25
    learner, metrics = it.run(key, it.learner, it.batch, it.hypers, progress)
    # Only the order of the samples is taken from the library.
    indices = np.asarray(updates.shuffled(it.setup, jax.random.split(key)[0], it.setup.num_epochs))
    clip_eps = 0.2 if module is ppo else None
    p, means, lr_scale, taken = update_by_hand(it.setup, it.hypers, it.params, it.batch, indices, progress, clip_eps)
    for name, value in flat(it.core.unravel(learner.params)).items():
        np.testing.assert_allclose(value, p[name], rtol=1e-8, atol=1e-9, err_msg=name)
        assert np.abs(value - flat(it.params)[name]).max() > 1e-4, name
    for name, value in means.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(learner.lr_scale, lr_scale, rtol=1e-9)
    rate = it.hypers.learning_rate * (0.75 if it.setup.learning_rate_schedule == "linear" else 1)
    np.testing.assert_allclose(metrics["learning_rate"], rate * lr_scale, rtol=1e-6)
    if it.setup.early_stop != "off":
        assert 0 < taken < 1, "the case should stop in the middle"
        np.testing.assert_allclose(metrics["steps_taken"], taken)
    if it.setup.learning_rate_schedule == "adaptive_kl":
        assert lr_scale != 1


def test_policy_step_does_not_depend_on_the_unit_of_rewards(float64):
    it = build(ppo, dict(gradient_clip="separate", normalize_advantage="minibatch", num_epochs=1))
    scale = 1000.0
    batch = it.batch.replace(
        reward=scale * it.batch.reward, value=scale * it.batch.value, next_value=scale * it.batch.next_value
    )
    args = jax.random.key(0), it.learner, it.batch, it.hypers, 0.0
    plain = flat(it.core.unravel(it.run(*args)[0].params))
    learner, _ = it.run(args[0], it.learner, batch, it.hypers, 0.0)
    scaled = flat(it.core.unravel(learner.params))
    for name in ("W", "b", "s"):  # as far as the 1e-8 beside the standard deviation lets them
        np.testing.assert_allclose(scaled[name], plain[name], rtol=1e-6)
    assert np.abs(scaled["w"] - plain["w"]).max() > 1e-3


@pytest.mark.parametrize("by, size", [("transition", T * B), ("unroll", B)])
def test_every_epoch_visits_every_sample_once_in_its_own_order(by, size):
    setup = ppo.Setup(num_envs=B, num_steps=T, num_epochs=3, num_minibatches=2, minibatch_by=by)
    indices = np.asarray(updates.shuffled(setup, jax.random.key(0), 5)).reshape(5, size)
    np.testing.assert_array_equal(np.sort(indices, axis=1), np.tile(np.arange(size), (5, 1)))
    assert len({tuple(row) for row in indices}) > (4 if size > 4 else 2)


def test_minibatches_of_unrolls_keep_time_together():
    setup = ppo.Setup(num_envs=B, num_steps=T, num_minibatches=2, minibatch_by="unroll")
    time, env = np.meshgrid(np.arange(T), np.arange(B), indexing="ij")
    picked = updates.pick(setup, updates.samples_of(setup, {"time": time, "env": env}), np.array([3, 1]))
    np.testing.assert_array_equal(picked["time"], np.tile(np.arange(T)[:, None], (1, 2)))
    np.testing.assert_array_equal(picked["env"], np.tile([3, 1], (T, 1)))


def test_normalised_advantages_have_mean_0_and_deviation_1_over_the_counted_samples(float64):
    rng = np.random.default_rng(0)
    advantage, weight = 3 + 5 * rng.normal(size=50), (rng.random(50) < 0.6).astype(float)
    batch = SimpleNamespace(advantage=jnp.asarray(advantage), replace=lambda **fields: fields["advantage"])
    batch.weight = None
    everyone = np.asarray(updates.normalize_advantage(on_policy.Setup(), batch))
    assert abs(everyone.mean()) < 1e-12 and abs(everyone.std() - 1) < 1e-7
    batch.weight = jnp.asarray(weight)
    some = np.asarray(updates.normalize_advantage(on_policy.Setup(), batch))
    assert abs(some[weight > 0].mean()) < 1e-12 and abs(some[weight > 0].std() - 1) < 1e-7
    assert (some[weight == 0] == 0).all()
    batch.weight = jnp.zeros(50)
    assert np.isfinite(updates.normalize_advantage(on_policy.Setup(), batch)).all()


# ---- REINFORCE ------------------------------------------------------------------------------------------------------


def returns_by_hand(batch, gamma, boundary, baseline, tail):
    """Monte-Carlo returns and their weights, walking forward from every step."""
    returns, weight = np.zeros((T, B)), np.zeros((T, B))
    for t, b in np.ndindex(T, B):
        discount = 1.0
        for k in range(t, T):
            returns[t, b] += discount * batch.reward[k, b]
            discount *= gamma
            if batch.terminated[k, b] or batch.truncated[k, b]:
                if batch.truncated[k, b] and baseline == "value" and boundary == "bootstrap":
                    returns[t, b] += discount * batch.next_value[k, b]
                weight[t, b] = 1
                break
        else:
            if tail == "bootstrap":
                returns[t, b] += discount * batch.next_value[T - 1, b]
                weight[t, b] = 1
    return returns, weight


@pytest.mark.parametrize(
    "baseline, tail, boundary",
    [
        ("value", "mask", "bootstrap"),
        ("value", "mask", "terminate"),
        ("value", "bootstrap", "bootstrap"),
        ("value", "bootstrap", "terminate"),
        ("batch_mean", "mask", "bootstrap"),
        ("none", "mask", "bootstrap"),
    ],
)
def test_reinforce_returns_and_baselines(float64, baseline, tail, boundary):
    setup_changes = dict(num_epochs=1, num_minibatches=1, baseline=baseline, tail=tail, boundary=boundary)
    it = build(reinforce, setup_changes, seed=1)
    assert it.batch.truncated[-1].any() and not (it.batch.truncated | it.batch.terminated)[-1].all()
    estimated = jax.jit(lambda batch: it.estimate(it.core, it.hypers, it.learner, batch))(it.batch)
    returns, weight = returns_by_hand(it.batch, it.hypers.gamma, boundary, baseline, tail)
    assert 0 < weight.mean() and (weight.mean() < 1) == (tail == "mask")
    if tail == "mask":
        np.testing.assert_array_equal(estimated.weight, weight)
    else:
        assert estimated.weight is None
    used = weight > 0
    subtracted = {"value": it.batch.value, "none": 0 * returns, "batch_mean": 0 * returns + returns[used].mean()}
    expected = returns - subtracted[baseline]
    np.testing.assert_allclose(np.asarray(estimated.advantage)[used], expected[used], rtol=1e-9, atol=1e-12)
    if baseline == "value":
        np.testing.assert_allclose(np.asarray(estimated.value_target)[used], returns[used], rtol=1e-9)
    else:
        assert estimated.value_target is None


@pytest.fixture(scope="module")
def reinforce_value():
    with jax.enable_x64(True):
        changes = dict(num_epochs=1, num_minibatches=1, value_steps=3, normalize_advantage="batch")
        return build(reinforce, changes, seed=1)


def test_reinforce_step_and_further_steps_of_the_critic(float64, reinforce_value):
    it = reinforce_value
    learner, metrics = it.run(jax.random.key(0), it.learner, it.batch, it.hypers, 0.5)
    returns, weight = returns_by_hand(it.batch, it.hypers.gamma, "bootstrap", "value", "mask")
    mb = dict(
        obs=it.batch.obs,
        action=it.batch.action,
        log_prob_old=it.batch.log_prob_old,
        mean_old=it.batch.dist_old.mean,
        log_std_old=it.batch.dist_old.log_std,
        value=it.batch.value,
        target=returns,
        advantage=standardised(returns - it.batch.value, weight),
        weight=weight,
    )
    mb = SimpleNamespace(**{name: x.reshape(-1, *x.shape[2:]) for name, x in mb.items()})
    p, moments, rate = flat(it.params), {}, it.hypers.learning_rate / 2
    gradient, report, _ = loss_gradient(it.setup, it.hypers, p, mb, None)
    norm = descend_by_hand(it.setup, it.hypers, p, moments, gradient, rate, 1)
    for step in (2, 3):
        _, to_value = value_gradient(it.setup, it.hypers, p, mb)
        gradient = dict(w=(mb.obs.T @ to_value)[:, None], c=to_value.sum(keepdims=True))
        descend_by_hand(it.setup, it.hypers, p, moments, gradient, rate, step)
    for name, value in flat(it.core.unravel(learner.params)).items():
        np.testing.assert_allclose(value, p[name], rtol=1e-8, atol=1e-9, err_msg=name)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss_value"], report["loss_value"], rtol=1e-6)


def test_what_follows_the_last_end_of_an_episode_is_not_learned_from(float64, reinforce_value):
    it = reinforce_value
    _, weight = returns_by_hand(it.batch, 1.0, "bootstrap", "value", "mask")
    after, key = weight == 0, jax.random.key(0)
    assert after.any()
    other = it.batch.replace(
        obs=np.where(after[..., None], 7.0, it.batch.obs),
        reward=np.where(after, 100.0, it.batch.reward),
        action=np.where(after[..., None], -1.0, it.batch.action),
        value=np.where(after, -50.0, it.batch.value),
    )
    one = it.run(key, it.learner, it.batch, it.hypers, 0.0)
    two = it.run(key, it.learner, other, it.hypers, 0.0)
    jax.tree.map(np.testing.assert_array_equal, one[0], two[0])
    for name in ("loss_policy", "loss_value", "grad_norm"):
        np.testing.assert_array_equal(one[1][name], two[1][name])


# ---- Whole iterations -----------------------------------------------------------------------------------------------


@struct.dataclass
class DriftState:
    x: jax.Array
    steps: jax.Array


@dataclasses.dataclass(frozen=True)
class Drift:
    """x' = 0.8 x + action from a random start; ends where x'[0] > 0.7, is cut after 3 steps.

    The reward is ``params`` (x'[0] - x'[1]²); the observation shows x in units far apart.
    """

    name = "drift"
    observation_space = Box((2,))
    action_space = Box((2,), -0.5, 0.5)
    max_episode_steps = 3
    default_params = np.float32(1)
    host_callback = False

    @staticmethod
    def show(x):
        return x * jnp.array([1.0, 20.0]) + jnp.array([0.0, 100.0])

    def reset(self, key, params):
        x = jax.vmap(lambda key: jax.random.uniform(key, (2,), minval=-1, maxval=1))(key)
        return DriftState(x, jnp.zeros(len(x), jnp.int32)), self.show(x)

    def step(self, key, env_state, action, params):
        x, steps = 0.8 * env_state.x + action, env_state.steps + 1
        terminated = x[:, 0] > 0.7
        truncated = ~terminated & (steps >= 3)
        fresh, obs = self.reset(key, params)
        ended = terminated | truncated
        start, obs = (jnp.where(ended[:, None], new, old) for new, old in ((fresh.x, x), (obs, self.show(x))))
        reward = params * (x[:, 0] - x[:, 1] ** 2)
        timestep = TimeStep(obs, reward, terminated, truncated, self.show(x), {})
        return DriftState(start, jnp.where(ended, 0, steps)), timestep

    def refresh(self, key, env_state, params):
        return env_state


ITERATIONS = 3
LOOP = dict(num_envs=4, num_steps=5, num_epochs=2, num_minibatches=2, hidden_sizes=(4,), normalize_obs=True)


@pytest.fixture(scope="module")
def loop():
    """PPO with all normalisers on, which also reports the batch that its update saw; three iterations of it."""
    make = on_policy.make
    shown = ("obs", "final_obs", "action", "reward", "terminated", "truncated", "value", "next_value", "advantage")

    def make_talkative(*args, update, **kwargs):
        def talkative(core, key, learner, batch, hypers, progress):
            dist = core.networks.policy(learner.params, batch.obs)
            new, metrics = update(core, key, learner, batch, hypers, progress)
            batch = batch.replace(terminated=batch.terminated * 1.0, truncated=batch.truncated * 1.0)
            seen = {f"seen_{name}": getattr(batch, name) for name in shown}
            seen.update(seen_log_ratio=dist.log_prob(batch.action) - batch.log_prob_old, seen_target=batch.value_target)
            change = core.networks.policy(new.params, batch.obs)
            seen["seen_log_ratio_after"] = change.log_prob(batch.action) - batch.log_prob_old
            seen.update(seen_mean_old=batch.dist_old.mean, seen_mean=change.mean)
            seen.update(seen_log_std_old=batch.dist_old.log_std, seen_log_std=change.log_std)
            return new, metrics | seen

        return make(*args, update=talkative, **kwargs)

    env = Drift()
    hypers = ppo.Hypers(learning_rate=0.02, anneal_env_steps=20.0 * ITERATIONS, gamma=0.9, obs_clip=1e4)
    with mock.patch.object(on_policy, "make", make_talkative):
        algorithm = ppo.make(env, ppo.Setup(**LOOP, reward_scaling="batch", normalize_value=True), hypers)
    step = jax.jit(algorithm.step)
    states = [jax.jit(algorithm.init)(jax.random.key(0), algorithm.hypers, np.float32(1))]
    rows = []
    for _ in range(ITERATIONS):
        state, metrics = step(states[-1], algorithm.hypers)
        states.append(state)
        rows.append(jax.tree.map(lambda x: np.asarray(x), metrics))
    return SimpleNamespace(algorithm=algorithm, step=step, states=states, rows=rows, env=env)


def test_the_ratio_is_one_at_the_first_minibatch_with_observations_normalised(loop):
    for row in loop.rows:
        assert np.abs(np.exp(row["seen_log_ratio"]) - 1).max() < 1e-5
        assert np.abs(row["seen_log_ratio_after"]).max() > 1e-3


def replayed(loop, i):
    """Iteration i in the environment's own units, and checked against its rules: raw obs, reward, both flags."""
    row, before, after = loop.rows[i], loop.states[i], loop.states[i + 1]
    moments = before.learner.obs_moments
    mean, scale = np.asarray(moments.mean, np.float64), np.sqrt(np.asarray(moments.var, np.float64) + 1e-8)
    obs, final_obs = row["seen_obs"] * scale + mean, row["seen_final_obs"] * scale + mean
    np.testing.assert_allclose(obs[0], before.obs, rtol=1e-5, atol=1e-4)
    unit, offset = np.array([1.0, 20.0]), np.array([0.0, 100.0])
    x = 0.8 * (obs - offset) / unit + np.clip(row["seen_action"], -0.5, 0.5)
    np.testing.assert_allclose(final_obs, x * unit + offset, rtol=1e-5, atol=1e-3)
    terminated, truncated = row["seen_terminated"] > 0, row["seen_truncated"] > 0
    np.testing.assert_array_equal(terminated, x[..., 0] > 0.7)
    steps = np.asarray(before.env_state.steps)
    for t in range(LOOP["num_steps"]):
        steps = steps + 1
        np.testing.assert_array_equal(truncated[t], ~terminated[t] & (steps == 3))
        steps = np.where(terminated[t] | truncated[t], 0, steps)
    goes_on = ~(terminated | truncated)
    following = np.concatenate([obs[1:], np.asarray(after.obs)[None]])
    np.testing.assert_allclose(following[goes_on], final_obs[goes_on], rtol=1e-5, atol=1e-3)
    assert (np.abs(following - final_obs)[~goes_on].max(-1) > 1e-2).all()
    return obs, x[..., 0] - x[..., 1] ** 2, terminated, truncated


def test_batches_hold_what_happened_and_episodes_are_counted_across_them(loop):
    ends = set()
    return_, length = np.zeros(4), np.zeros(4)
    for i, row in enumerate(loop.rows):
        _, reward, terminated, truncated = replayed(loop, i)
        returns, lengths = [], []
        for t, b in np.ndindex(reward.shape):
            return_[b] += reward[t, b]
            length[b] += 1
            if terminated[t, b] or truncated[t, b]:
                ends.add("terminated" if terminated[t, b] else "truncated")
                returns.append(return_[b])
                lengths.append(length[b])
                return_[b] = length[b] = 0
        assert row["episodes"] == len(returns) > 0
        np.testing.assert_allclose(row["episode_return"], np.mean(returns), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(row["episode_length"], np.mean(lengths), rtol=1e-6)
        assert row["env_steps"] == (i + 1) * 20
        np.testing.assert_allclose(loop.states[i + 1].episode_return, return_, rtol=1e-3, atol=1e-4)
    assert ends == {"terminated", "truncated"}


def test_observation_statistics_move_once_per_iteration_and_hold_all_raw_observations(loop):
    seen = []
    for i in range(ITERATIONS):
        seen.extend(replayed(loop, i)[0].reshape(-1, 2))
        moments = loop.states[i + 1].learner.obs_moments
        np.testing.assert_allclose(moments.mean, np.mean(seen, 0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(moments.var, np.var(seen, 0), rtol=1e-3)
        assert moments.count == len(seen)


def test_rewards_values_and_advantages_in_their_own_units(loop):
    hypers = loop.algorithm.hypers
    returns, targets, running = [], [], np.zeros(4)
    for i, row in enumerate(loop.rows):
        _, reward, terminated, truncated = replayed(loop, i)
        for t in range(LOOP["num_steps"]):
            running = reward[t] + hypers.gamma * running
            returns.extend(running)
            running = np.where(terminated[t] | truncated[t], 0, running)
        # The running variance starts from 1, weighing 1e-4 of a sample.
        share = len(returns) + 1e-4
        variance = (np.square(returns).sum() + 1e-4) / share - (np.sum(returns) / share) ** 2
        scaled = np.clip(reward / np.sqrt(variance + 1e-8), -10, 10)
        np.testing.assert_allclose(row["seen_reward"], scaled, rtol=1e-3, atol=1e-4)

        moments = loop.states[i].learner.value_moments
        spread = np.sqrt(moments.var + 1e-8)
        value, next_value = (row[f"seen_{name}"] * spread + moments.mean for name in ("value", "next_value"))
        advantage, _ = plain_gae(hypers, "bootstrap", scaled, value, next_value, terminated, truncated)
        np.testing.assert_allclose(row["seen_advantage"], advantage, rtol=1e-3, atol=1e-3)
        target = (advantage + value - moments.mean) / spread
        np.testing.assert_allclose(row["seen_target"], target, rtol=1e-3, atol=1e-3)
        targets.extend((advantage + value).ravel())
        moments = loop.states[i + 1].learner.value_moments
        np.testing.assert_allclose(moments.mean, np.mean(targets), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(moments.var, np.var(targets), rtol=1e-3)


def test_reported_change_of_the_policy(loop):
    for row in loop.rows:
        ratio = np.exp(np.float64(row["seen_log_ratio_after"]))
        log_std, log_std_old = (np.float64(row[name]) for name in ("seen_log_std", "seen_log_std_old"))
        moved = np.float64(row["seen_mean"]) - row["seen_mean_old"]
        kl = log_std - log_std_old + (np.exp(2 * log_std_old) + moved**2) / (2 * np.exp(2 * log_std)) - 0.5
        kl = kl.sum(-1)
        expected = dict(
            kl=kl.mean(),
            kl_max=kl.max(),
            ratio_min=ratio.min(),
            ratio_max=ratio.max(),
            ratio_deviation=np.abs(ratio - 1).mean(),
            clip_fraction=(np.abs(ratio - 1) > 0.2).mean(),
            ess=ratio.sum() ** 2 / (ratio.size * (ratio**2).sum()),
            entropy=(log_std + 0.5 * np.log(2 * np.pi * np.e)).sum(-1).mean(),
            explained_variance=1 - np.var(row["seen_target"] - row["seen_value"]) / np.var(row["seen_target"]),
        )
        for name, value in expected.items():
            np.testing.assert_allclose(row[name], value, rtol=2e-3, atol=1e-5, err_msg=name)
        assert row["nonfinite"] == 0


def test_the_learning_rate_falls_linearly_and_never_to_zero(loop):
    np.testing.assert_allclose([row["learning_rate"] for row in loop.rows], 0.02 * np.array([3, 2, 1]) / 3, rtol=1e-6)


def test_observations_are_clipped_in_training_and_in_acting(loop):
    algorithm, state = loop.algorithm, loop.states[-1]
    state, metrics = loop.step(state, algorithm.hypers.replace(obs_clip=np.float32(0.5)))
    np.testing.assert_allclose(np.abs(metrics["seen_obs"]).max(), 0.5)
    far, farther = (loop.env.show(jnp.full((1, 2), size)) for size in (50.0, 99.0))
    policy = algorithm.policy(state)
    np.testing.assert_array_equal(algorithm.act(policy, far, None), algorithm.act(policy, farther, None))


def learner_equal(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


def same_key(one, two):
    return (jax.random.key_data(one.key) == jax.random.key_data(two.key)).all()


@pytest.mark.parametrize("poison", ["learning_rate", "reward"])
def test_a_non_finite_update_is_refused_for_good_while_the_environment_goes_on(loop, poison):
    good, hypers = loop.states[2], loop.algorithm.hypers
    bad, bad_hypers = good, hypers
    if poison == "reward":
        bad = good.replace(env_params=np.float32(np.nan))
    else:
        bad_hypers = hypers.replace(learning_rate=np.float32(np.nan))
    state, metrics = loop.step(bad, bad_hypers)
    assert metrics["nonfinite"] == 1 and state.nonfinite
    learner_equal(state.learner, good.learner)
    for name, value in metrics.items():
        assert name.startswith(("episode_", "seen_")) or not np.isnan(value), name
    # What is not learned goes on as if nothing had happened.
    usual = loop.states[3]
    assert state.env_steps == usual.env_steps and same_key(state, usual)
    jax.tree.map(np.testing.assert_array_equal, state.env_state, usual.env_state)
    np.testing.assert_array_equal(state.obs, usual.obs)

    again, metrics = loop.step(state.replace(env_params=np.float32(1)), hypers)
    assert metrics["nonfinite"] == 1 and again.nonfinite
    learner_equal(again.learner, good.learner)
    assert again.env_steps == state.env_steps + 20 and not same_key(again, state)
    assert (np.asarray(again.obs) != np.asarray(state.obs)).any()


def test_unusable_settings_are_refused_in_one_line():
    for changes, words in [
        (dict(advantage_recompute="minibatch"), ("advantage_recompute", "minibatch_by = 'unroll'")),
        (dict(brax_exact=True), ("brax_exact", "boundary = 'mask'")),
        (
            dict(advantage_recompute="minibatch", minibatch_by="unroll", normalize_advantage="batch"),
            ("normalize_advantage = 'batch'", "advantage_recompute = 'minibatch'"),
        ),
        (
            dict(minibatch_by="unroll", num_envs=4, num_minibatches=3),
            ("num_minibatches = 3", "num_envs = 4", "1, 2, 4"),
        ),
    ]:
        with pytest.raises(RequestError) as error:
            ppo.make(Drift(), ppo.Setup(**changes))
        assert "\n" not in str(error.value)
        for word in words:
            assert word in str(error.value)
    for changes in (dict(tail="bootstrap", baseline="none"), dict(boundary="mask"), dict(value_steps=0)):
        with pytest.raises(RequestError, match=f"setup.{next(iter(changes))} = "):
            reinforce.make(Drift(), reinforce.Setup(**changes))
