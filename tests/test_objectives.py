"""Objectives and their gradients against what the papers say, derived in NumPy.

The gradients of the update that an algorithm ships are read off Adam's first moment: without decay it is the gradient.
"""

import itertools
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from probe_envs import Probe

import pgjax
from pgjax import on_policy, updates
from pgjax.algorithms import a2c, dpo, fixpo, list_algorithms, lpo, mdpo, ppo, ppo_kl, reinforce, spo, trpo
from pgjax.checks.mirror_learning import check_drift
from pgjax.distributions import Categorical
from pgjax.errors import RequestError
from pgjax.networks import ActorCritic
from pgjax.optimizers import init_opt_state
from pgjax.spaces import Box, Discrete
from pgjax.types import Objective, Sample

RATIOS = np.array([0.3, 0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 1.3, 3.0])


def test_clipped_surrogate_and_its_gradient_for_every_case(float64):
    ratio, advantage = (x.ravel() for x in np.meshgrid(RATIOS, [-2.0, -0.5, 0.5, 2.0]))
    log_ratio = np.log(ratio)
    value = ppo.clip_surrogate(log_ratio, advantage, 0.2)
    slope = jax.grad(lambda log_ratio: ppo.clip_surrogate(log_ratio, advantage, 0.2).sum())(log_ratio)
    for r, a, v, s in zip(ratio, advantage, value, slope, strict=True):
        # In units of the gradient of log pi, which is what the log ratio stands for.
        cut = (a > 0 and r > 1.2) or (a < 0 and r < 0.8)
        np.testing.assert_allclose(s, 0 if cut else r * a, rtol=1e-12)
        np.testing.assert_allclose(v, min(r * a, min(max(r, 0.8), 1.2) * a), rtol=1e-12)
        assert v <= r * a + 1e-12
        if 0.8 <= r <= 1.2:
            np.testing.assert_allclose(v, r * a, rtol=1e-12)
    unclipped = ppo.clip_surrogate(log_ratio, advantage, np.inf)
    np.testing.assert_allclose(unclipped, ratio * advantage, rtol=1e-12)


def test_policy_gradient_objective_has_the_advantage_as_its_slope_everywhere(float64):
    slope = jax.grad(lambda x: a2c.policy_gradient(x, jnp.array([2.0, -3.0])).sum())(jnp.array([0.7, -1.0]))
    np.testing.assert_array_equal(slope, [2.0, -3.0])


def test_clipped_value_loss_is_never_below_the_squared_one_and_equal_near_the_old_value(float64):
    rng = np.random.default_rng(0)
    value, target = rng.normal(size=(2, 1000))
    old = value + rng.normal(size=1000) / 2
    hypers = ppo.Hypers(value_clip_eps=0.3)
    squared, clipped = (
        np.asarray(updates.value_loss(SimpleNamespace(value_loss=kind), hypers, value, old, target))
        for kind in ("squared", "clipped")
    )
    np.testing.assert_allclose(squared, 0.5 * (value - target) ** 2, rtol=1e-12)
    assert (clipped >= squared).all() and (clipped > squared).any()
    near = np.abs(value - old) <= 0.3
    np.testing.assert_allclose(clipped[near], squared[near], rtol=1e-12)
    held = np.where(value > old, old + 0.3, old - 0.3)
    expected = np.maximum(squared, 0.5 * (held - target) ** 2)
    np.testing.assert_allclose(clipped[~near], expected[~near], rtol=1e-12)


# ---- At the old policy ----------------------------------------------------------------------------------------------


# id -> what the paper's file maximises per sample, of a Sample, built from its free functions with their defaults
OBJECTIVES = {
    "reinforce": lambda sample: a2c.policy_gradient(sample.log_ratio, sample.advantage),
    "a2c": lambda sample: a2c.policy_gradient(sample.log_ratio, sample.advantage),
    "ppo": lambda sample: ppo.clip_surrogate(sample.log_ratio, sample.advantage, 0.2),
    "ppo_kl": lambda sample: ppo_kl.kl_penalty_surrogate(
        sample.log_ratio, sample.advantage, sample.dist_old.kl(sample.dist), 2.0
    ),
    "trpo": lambda sample: trpo.trpo_surrogate(sample.log_ratio, sample.advantage),
    "mdpo": lambda sample: mdpo.mdpo_surrogate(sample.log_ratio, sample.advantage, sample.dist.kl(sample.dist_old), 0.5),
    "spo": lambda sample: spo.spo_surrogate(sample.log_ratio, sample.advantage, 0.2),
    "fixpo": lambda sample: fixpo.fixpo_surrogate(sample.log_ratio, sample.advantage, sample.dist_old.kl(sample.dist), 2.0),
    "dpo": lambda sample: dpo.dpo_surrogate(sample.log_ratio, sample.advantage),
    # The target policy's; that of the behaviour policy has no advantage in it.
    "props": lambda sample: ppo.clip_surrogate(sample.log_ratio, sample.advantage, 0.2),
    "ros": lambda sample: ppo.clip_surrogate(sample.log_ratio, sample.advantage, 0.2),
    "sac": None,  # climbs its critic, without ratio and advantage
    "mdpo_off": None,
    "avg": None,  # these climb their critic, or learn from one transition; without ratio and advantage
    "iac": None,
    "sac1": None,
    "td3_1": None,
    "lpg": None,  # its rule takes the place of an objective
    "vmpo": None,  # weighted maximum likelihood: its first step is not the policy gradient
}
# Without the importance ratio; their drift is not one.
NOT_MIRROR = ("reinforce", "a2c")


S, A, T = 3, 2, 3
SPACES = SimpleNamespace(observation_space=Box((S,)), action_space=Discrete(A))


def softmax(logits):
    weight = np.exp(logits - logits.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


def test_every_algorithm_has_a_row():
    assert set(OBJECTIVES) == set(list_algorithms())


@pytest.mark.parametrize("name", [name for name, objective in OBJECTIVES.items() if objective])
def test_at_the_old_policy_every_objective_has_the_policy_gradient(float64, name):
    rng = np.random.default_rng(0)
    logits, advantage = rng.normal(size=(10, 4)), rng.normal(size=10)
    action = rng.integers(4, size=10)

    def value(logits):
        dist, dist_old = Categorical(logits), Categorical(jax.lax.stop_gradient(logits))
        log_ratio = dist.log_prob(action) - dist_old.log_prob(action)
        return OBJECTIVES[name](Sample(log_ratio, advantage, dist, dist_old, 0.3)).mean()

    # d log softmax(z)[a] / d z = e_a - softmax(z)
    expected = advantage[:, None] * (np.eye(4)[action] - softmax(logits)) / 10
    np.testing.assert_allclose(jax.grad(value)(jnp.asarray(logits)), expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", [name for name, objective in OBJECTIVES.items() if objective])
def test_every_objective_with_a_ratio_is_a_mirror_learning_step(name):
    objective = OBJECTIVES[name]
    report = check_drift(Objective(lambda sample, params: objective(sample)))
    assert report.valid == (name not in NOT_MIRROR), report


@pytest.mark.parametrize(
    ("objective", "fails"),
    [
        (lambda log_ratio, advantage: jnp.exp(log_ratio) * advantage, None),
        (lambda log_ratio, advantage: jnp.exp(log_ratio) * advantage - 0.1 * log_ratio, "slope"),
        (lambda log_ratio, advantage: jnp.exp(log_ratio) * advantage - 0.1, "at_old"),
        (lambda log_ratio, advantage: jnp.exp(log_ratio) * advantage + 0.1 * log_ratio**2, "lowest"),
        (lambda log_ratio, advantage: jnp.exp(log_ratio) * advantage - jnp.log(log_ratio + 1), "finite"),
        # The sign of the clip's term turned round, a defect of public code.
        (lambda log_ratio, advantage: 2 * jnp.exp(log_ratio) * advantage - clip(log_ratio, advantage), "lowest"),
    ],
)
def test_the_drift_check_names_what_is_wrong(objective, fails):
    report = check_drift(objective)
    assert report.valid == (fails is None)
    text = str(report)
    match fails:
        case "slope":
            assert report.slope > 0.05 and "slope zero at ratio 1    NO" in text
        case "at_old":
            np.testing.assert_allclose(report.at_old, 0.1, rtol=1e-6)
            assert report.slope < 1e-9 and "drift zero at ratio 1    NO" in text
        case "lowest":
            assert report.lowest < -0.1 and report.slope < 1e-9 and "drift never negative     NO" in text
        case "finite":
            assert not report.finite and "finite" in text


def clip(log_ratio, advantage):
    return ppo.clip_surrogate(log_ratio, advantage, 0.2)


# ---- SPO and DPO ----------------------------------------------------------------------------------------------------


def test_spo_values_and_slopes_of_the_specification(float64):
    """In units of the ratio: f and df/dr at (r, A)."""
    table = "1.1 2 2.15 1; 1.2 2 2.2 0; 1.4 2 2 -2; .7 -1 -.925 .5; .8 -1 -.9 0; 1 -1 -1 -1"
    ratio, advantage, value, slope = np.array([row.split() for row in table.split(";")], float).T

    def f(ratio):
        return spo.spo_surrogate(jnp.log(ratio), advantage, 0.2)

    np.testing.assert_allclose(f(ratio), value, atol=1e-12)
    np.testing.assert_allclose(jax.grad(lambda ratio: f(ratio).sum())(ratio), slope, atol=1e-12)


def test_spo_is_a_parabola_in_the_ratio_with_its_peak_at_the_bound(float64):
    rng = np.random.default_rng(0)
    ratio, advantage, eps = np.exp(rng.normal(size=1000)), rng.normal(size=1000), rng.uniform(0.05, 0.5, 1000)
    sign = np.sign(advantage)
    square = advantage + abs(advantage) * eps / 2 - abs(advantage) / (2 * eps) * (ratio - 1 - sign * eps) ** 2
    value = spo.spo_surrogate(jnp.log(ratio), advantage, eps)
    np.testing.assert_allclose(value, square, rtol=1e-9, atol=1e-12)
    assert (value <= ratio * advantage + 1e-12).all()
    np.testing.assert_allclose(spo.spo_surrogate(jnp.log(ratio), advantage, np.inf), ratio * advantage, rtol=1e-12)
    grid = np.linspace(0.5, 1.5, 1001)
    for a in (-3.0, -0.1, 0.1, 3.0):
        best = grid[np.argmax(spo.spo_surrogate(jnp.log(grid), np.full(1001, a), 0.2))]
        np.testing.assert_allclose(best, 1 + 0.2 * np.sign(a), atol=1e-9)
    still = spo.spo_surrogate(jnp.log(grid), np.zeros(1001), 0.2)
    np.testing.assert_array_equal(still, 0)


def test_a_single_sample_is_driven_to_the_bound_by_spo_and_past_it_by_ppo(float64):
    def ends(objective):
        logits = old = jnp.array([0.3, 0.1, -0.4])
        for _ in range(400):
            slope = jax.grad(lambda z: objective(jax.nn.log_softmax(z)[1] - jax.nn.log_softmax(old)[1]))(logits)
            logits = logits + 0.1 * slope
        return float(jnp.exp(jax.nn.log_softmax(logits)[1] - jax.nn.log_softmax(old)[1]))

    np.testing.assert_allclose(ends(lambda l: spo.spo_surrogate(l, 1.0, 0.2)), 1.2, atol=1e-4)
    np.testing.assert_allclose(ends(lambda l: spo.spo_surrogate(l, -1.0, 0.2)), 0.8, atol=1e-4)
    # Overshooting, PPO has no slope left to come back with.
    start = jnp.log(1.4)
    assert jax.grad(lambda l: ppo.clip_surrogate(l, 1.0, 0.2))(start) == 0
    assert jax.grad(lambda l: spo.spo_surrogate(l, 1.0, 0.2))(start) < 0


def test_spo_stays_finite_where_the_squared_ratio_would_not():
    value, slope = jax.value_and_grad(lambda l: spo.spo_surrogate(l, jnp.float32(1), 0.2))(jnp.float32(60))
    assert np.isfinite(value) and np.isfinite(slope)


def dpo_drift(ratio, advantage, alpha=2.0, beta=0.6):
    return ratio * advantage - dpo.dpo_surrogate(jnp.log(ratio), advantage, alpha, beta)


def test_dpo_drift_and_slope_of_the_specification(float64):
    """(A, r, f, dJ/dr) of the table."""
    table = """1 1.2 .000664 .990066; 1 1.5 .010163 .940015; 1 2 .075766 .786448; 1 4 1.189704 .180707; 2 2 .476812 .839949;
        1 .5 0 1; -1 .8 .009749 -.841885; -1 .5 .201457 .343109; -1 .25 .797991 2.845566; -2 .5 .797991 1.845566;
        -.5 .5 .034012 -.228626; -1 2 0 -1"""
    advantage, ratio, drift, slope = np.array([row.split() for row in table.split(";")], float).T
    np.testing.assert_allclose(dpo_drift(ratio, advantage), drift, atol=1e-6)
    found = jax.grad(lambda ratio: dpo.dpo_surrogate(jnp.log(ratio), advantage).sum())(ratio)
    np.testing.assert_allclose(found, slope, atol=1e-6)


def test_dpo_rolls_back_below_a_threshold_and_never_for_positive_advantages(float64):
    slope = jax.vmap(jax.grad(lambda ratio, advantage: dpo.dpo_surrogate(jnp.log(ratio), advantage)), (0, None))
    grid = jnp.linspace(1e-3, 1, 20001)[:-1]
    thresholds = {-0.25: 0.259551, -0.5: 0.405335, -1: 0.559380, -1.5: 0.643034, -2: 0.696889, -3: 0.763539}
    for advantage, threshold in thresholds.items():
        below = np.asarray(slope(grid, advantage)) > 0
        assert (np.diff(below.astype(int)) != 0).sum() == 1
        np.testing.assert_allclose(grid[below].max(), threshold, atol=1e-4)
    for advantage in (0.1, 1.0, 5.0):
        rising = np.asarray(slope(jnp.linspace(0.01, 8, 500), advantage))
        assert (rising >= 0).all() and (rising <= advantage + 1e-12).all()


def test_dpo_at_its_limits(float64):
    ratio, advantage = (x.ravel() for x in np.meshgrid(RATIOS, [-2.0, -0.5, 0.0, 0.5, 2.0]))
    np.testing.assert_allclose(dpo_drift(ratio, advantage, 1e6, 1e6), 0, atol=1e-9)
    value = dpo.dpo_surrogate(jnp.log(ratio), advantage, 1e-6, 0.6)
    held = (advantage >= 0) & (ratio > 1)
    np.testing.assert_allclose(value[held], advantage[held], atol=2e-6)
    np.testing.assert_array_equal(dpo_drift(ratio, 0 * ratio), 0)


def test_dpo_is_finite_and_exact_in_float32_at_extreme_ratios():
    log_ratio, advantage = (x.ravel().astype(np.float32) for x in np.meshgrid(np.linspace(-30, 30, 61), np.linspace(-8, 8, 41)))
    value, slope = jax.value_and_grad(lambda l: dpo.dpo_surrogate(l, advantage).sum())(jnp.asarray(log_ratio))
    assert np.isfinite(value) and np.isfinite(slope).all()
    np.testing.assert_allclose(slope[(advantage > 0.09) & (log_ratio >= 10)], 0, atol=1e-3)
    edge = jax.grad(lambda l: dpo.dpo_surrogate(l, jnp.float32([8, -8])).sum())(jnp.float32([-30, -30]))
    assert abs(edge[0]) < 1e-11
    np.testing.assert_allclose(edge[1], 8, rtol=1e-5)
    assert np.isfinite(jax.grad(lambda l: dpo.dpo_surrogate(l, jnp.float32(1)))(jnp.float32(200)))
    # Against float64: ρ Â - f, in float32, is off by 1e-2 here.
    log_ratio, advantage = (x.ravel() for x in np.meshgrid(np.linspace(0, 10, 51), np.linspace(0.01, 8, 50)))
    exact = advantage + 2 * np.tanh(np.expm1(log_ratio) * advantage / 2)
    found = dpo.dpo_surrogate(jnp.float32(log_ratio), jnp.float32(advantage))
    np.testing.assert_allclose(found, exact, atol=5e-6)


@pytest.mark.parametrize(
    "surrogate",
    [
        lambda l, a: ppo.clip_surrogate(l, a, 0.2),
        lambda l, a: lpo.surrogate(lpo.init_params(jax.random.key(0)), l, a),
    ],
    ids=["ppo", "lpo"],
)
def test_a_ratio_beyond_float32_has_no_slope_where_it_is_clipped(surrogate):
    log_ratio, advantage = jnp.float32([200.0, 100.0, 0.1, -200.0]), jnp.float32([1.0, 3.0, 2.0, -1.0])
    value, slope = jax.vmap(jax.value_and_grad(lambda l, a: surrogate(l[None], a[None])[0]))(log_ratio, advantage)
    np.testing.assert_allclose(value, [1.2, 3.6, 2 * np.exp(0.1), -0.8], rtol=1e-3)
    np.testing.assert_allclose(slope, [0, 0, 2 * np.exp(0.1), 0], rtol=1e-3)


@pytest.mark.parametrize("wrong", [lambda l, a: (l * a)[:, None], lambda l, a: (l * a).mean()])
def test_an_objective_that_gives_no_number_for_each_sample_is_refused(wrong):
    env = Probe("responding")
    algorithm = pgjax.make("ppo", env, objective=wrong, num_envs=2, num_steps=4, num_minibatches=2, hidden_sizes=())
    with pytest.raises(RequestError, match=r"for samples of shape \(4,\); give one number each"):
        algorithm.step(algorithm.init(jax.random.key(0), algorithm.hypers), algorithm.hypers)


# ---- The shipped update on a chain of three states, over all of its trajectories ------------------------------------

# Action 1 moves right, action 0 left; an episode is three steps long and starts in state 1.
REWARD = np.random.default_rng(5).normal(size=(S, A))
GAMMA, START = 0.8, 1
LOGITS = np.array([[0.3, -0.2], [0.1, 0.8], [-0.5, 0.4]])
PROB = softmax(LOGITS)


def move(state, action):
    return min(state + 1, S - 1) if action else max(state - 1, 0)


def trajectories():
    """All sequences of actions [8, T], the states acted on [8, T], and the probability of each [8]."""
    actions = np.array(list(itertools.product(range(A), repeat=T)))
    states = np.zeros_like(actions)
    probability = np.ones(len(actions))
    for i, sequence in enumerate(actions):
        state = START
        for t, action in enumerate(sequence):
            states[i, t] = state
            probability[i] *= PROB[state, action]
            state = move(state, action)
    return actions, states, probability


ACTIONS, STATES, PROBABILITY = trajectories()


def exact_policy_gradient():
    """Σ_t E[∇ log π(a_t|s_t) Q_t(s_t, a_t)] / T in the logits [S, A], by dynamic programming over the tree of steps."""
    q = np.zeros((T, S, A))
    for t in reversed(range(T)):
        for state, action in np.ndindex(S, A):
            q[t, state, action] = REWARD[state, action]
            if t + 1 < T:
                after = move(state, action)
                q[t, state, action] += GAMMA * PROB[after] @ q[t + 1, after]
    visits = np.zeros((T, S))
    visits[0, START] = 1
    for t in range(T - 1):
        for state, action in np.ndindex(S, A):
            visits[t + 1, move(state, action)] += visits[t, state] * PROB[state, action]
    gradient = np.zeros((S, A))
    for t, state in np.ndindex(T, S):
        centred = q[t, state] - PROB[state] @ q[t, state]
        gradient[state] += visits[t, state] * PROB[state] * centred
    return gradient / T, (PROB * q).sum(-1)


class Chain:
    """The gradient that an algorithm's update takes on each of the trajectories, as one compiled function."""

    def __init__(self, module, **setup):
        taken, make = {}, on_policy.make

        def take(*args, update, estimate=on_policy.gae_estimate, **kwargs):
            taken.update(update=update, estimate=estimate)
            return make(*args, update=update, estimate=estimate, **kwargs)

        shared = dict(num_envs=1, num_steps=T, hidden_sizes=(), gradient_clip="none", normalize_advantage="none")
        shared.update(num_epochs=1, num_minibatches=1)
        with mock.patch.object(on_policy, "make", take):
            algorithm = module.make(SPACES, module.Setup(**{**shared, **setup}))
        core = algorithm.core
        hypers = module.Hypers(gamma=GAMMA, gae_lambda=1.0, entropy_coef=0.0, adam_b1=0.0, learning_rate=0.01)
        self.hypers = jax.tree.map(np.float64, hypers)

        def gradient(hypers, logits, values, reward, state, action):
            # Linear networks without biases on one-hot states are tables.
            zero = jnp.zeros((), jnp.float64)
            tree = jax.eval_shape(lambda key: core.unravel(core.networks.init(key)), jax.random.key(0))
            tree = jax.tree.map(lambda x: jnp.full(x.shape, zero), tree)
            tree.actor["head"]["params"]["Dense_0"]["kernel"] = logits
            tree.critic["head"]["params"]["kernel"] = values[:, None]
            params = ActorCritic(*(ravel_pytree(part)[0] for part in tree))
            learner = on_policy.Learner(
                params, init_opt_state(core.setup, hypers, params), jnp.ones(()), None, None, None, None
            )
            obs = jax.nn.one_hot(state, S)[:, None]
            dist = core.networks.policy(params, obs)
            end = (jnp.arange(T) == T - 1)[:, None]
            batch = on_policy.Batch(
                obs=obs,
                final_obs=jnp.roll(obs, -1, axis=0),
                action=action[:, None],
                reward=reward[:, None],
                terminated=end,
                truncated=end & False,
                dist_old=dist,
                log_prob_old=dist.log_prob(action[:, None]),
                value=None,
                next_value=None,
            )
            batch = on_policy.with_values(core, params, batch)
            batch = taken["estimate"](core, hypers, learner, batch)
            new, _ = taken["update"](core, jax.random.key(0), learner, batch, hypers, 0.0)
            actor = core.unravel(new.opt_state._replace(actor=new.opt_state.actor.mu, critic=None)).actor
            return actor["head"]["params"]["Dense_0"]["kernel"], core.unravel(new.params).actor

        self._run = jax.jit(jax.vmap(gradient, (None, None, None, 0, 0, 0)))

    def ascent(self, values=(0.0, 0.0, 0.0), scale=1.0, logits=LOGITS, **hypers):
        """Direction of ascent on each trajectory [8, S, A], in the logits, and the actor after the step."""
        hypers = self.hypers.replace(**{name: np.float64(value) for name, value in hypers.items()})
        reward = scale * REWARD[STATES, ACTIONS]
        gradient, actor = self._run(hypers, jnp.asarray(logits), jnp.asarray(values), reward, STATES, ACTIONS)
        return -np.asarray(gradient), actor


def expected(per_trajectory):
    return np.einsum("i,isa->sa", PROBABILITY, per_trajectory)


VALUES = (5.0, -3.0, 0.7)


@pytest.fixture(scope="module")
def chains():
    with jax.enable_x64(True):
        yield {
            "none": Chain(reinforce, baseline="none"),
            "value": Chain(reinforce, baseline="value"),
            "a2c": Chain(a2c),
            "ppo": Chain(ppo),
        }


def test_reinforce_is_the_exact_policy_gradient_on_average(float64, chains):
    exact, _ = exact_policy_gradient()
    assert np.abs(exact).min() > 1e-3
    np.testing.assert_allclose(expected(chains["none"].ascent()[0]), exact, rtol=1e-9)


def test_a_baseline_changes_the_spread_and_not_the_mean(float64, chains):
    exact, value = exact_policy_gradient()
    spreads = {}
    for kind, baseline in (("wild", VALUES), ("good", value.mean(0))):
        each = chains["value"].ascent(baseline)[0]
        np.testing.assert_allclose(expected(each), exact, rtol=1e-8, atol=1e-12)
        spreads[kind] = (PROBABILITY @ ((each - exact) ** 2).sum((1, 2))).item()
    each = chains["none"].ascent()[0]
    spreads["none"] = (PROBABILITY @ ((each - exact) ** 2).sum((1, 2))).item()
    assert spreads["good"] < spreads["none"] < spreads["wild"]


def test_a2c_with_lambda_1_is_reinforce_with_a_value_baseline(float64, chains):
    one, other = (chains[name].ascent(VALUES)[0] for name in ("value", "a2c"))
    np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-14)
    # And with a lambda below 1 it is not.
    assert np.abs(chains["a2c"].ascent(VALUES, gae_lambda=0.5)[0] - one).max() > 1e-2


def test_ppo_at_the_old_policy_is_a2c(float64, chains):
    one, other = (chains[name].ascent(VALUES, gae_lambda=0.9)[0] for name in ("ppo", "a2c"))
    np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-14)


def test_scaled_rewards_scale_the_gradient_without_a_baseline(float64, chains):
    one, scaled = (chains["none"].ascent(scale=scale)[0] for scale in (1.0, 7.0))
    np.testing.assert_allclose(scaled, 7 * one, rtol=1e-9, atol=1e-14)


def test_the_entropy_bonus_alone_raises_the_entropy(float64, chains):
    logits, entropies = 3 * LOGITS, []
    for _ in range(5):
        prob = softmax(logits)[np.unique(STATES[0])]
        entropies.append(-(prob * np.log(prob)).sum())
        _, actor = chains["none"].ascent(scale=0.0, logits=logits, entropy_coef=1.0, learning_rate=0.05)
        # Of the trajectory that goes left; the states it does not visit stay as they are.
        logits = np.asarray(actor["head"]["params"]["Dense_0"]["kernel"])[0]
    assert (np.diff(entropies) > 1e-3).all()


def test_sampled_kl_is_never_negative_and_right_on_average(float64):
    rng = np.random.default_rng(0)
    moved, scale = 0.3, 1.2
    action = rng.normal(size=200_000)
    log_ratio = -0.5 * ((action - moved) / scale) ** 2 - np.log(scale) + 0.5 * action**2
    estimate = np.expm1(log_ratio) - log_ratio
    exact = np.log(scale) + (1 + moved**2) / (2 * scale**2) - 0.5
    assert (estimate >= 0).all()
    assert abs(estimate.mean() - exact) < 4 * estimate.std() / np.sqrt(len(estimate))
    core = SimpleNamespace(networks=SimpleNamespace(policy=lambda params, obs: FixedRatio(jnp.asarray(log_ratio))), setup=None)
    batch = SimpleNamespace(obs=None, action=None, log_prob_old=0.0, advantage=jnp.zeros(1), dist_old=None, weight=None)
    batch.value_target = None
    hypers = SimpleNamespace(entropy_coef=0.0)
    _, (parts, _) = updates.surrogate_loss(core, lambda *args: jnp.zeros(1), None, None, batch, None, hypers, 0.0)
    np.testing.assert_allclose(parts["kl_sampled"], estimate.mean(), rtol=1e-9)


class FixedRatio:
    def __init__(self, log_ratio):
        self._log_ratio = log_ratio

    def log_prob(self, action):
        return self._log_ratio

    def entropy(self, key):
        return jnp.zeros(1)
