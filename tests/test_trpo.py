"""TRPO's update against one derived in NumPy, its guarantees in short trainings, and what it becomes at its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic
from probe_envs import Probe
from synthetic import A, B, N, O, T

import pgjax
from pgjax import on_policy
from pgjax.algorithms import trpo
from pgjax.distributions import DiagGaussian
from pgjax.errors import RequestError
from pgjax.networks import ActorCritic, Networks

P = O * A + A + A
TINY = dict(value_epochs=1, value_minibatches=2)
RATE = dict(learning_rate=0.01)


def ship(plugs=(), **setup):
    return synthetic.shipped(trpo, RATE, plugs=plugs, **TINY, **setup)


@pytest.fixture(scope="module")
def cases():
    """Updates by variant, each compiled when first asked for."""
    made = {}
    variants = {
        "usual": {},
        "raw": dict(normalize_advantage="none"),
        "full step": dict(normalize_advantage="none", line_search=False),
        "double": dict(normalize_advantage="none", fisher_form="double_backprop"),
        "strided": dict(normalize_advantage="none", fisher_stride=5),
        "mean": dict(normalize_advantage="none", kl_over_actions="mean"),
        "two parts": dict(num_minibatches=2, normalize_advantage="minibatch"),
        "short": dict(normalize_advantage="none", line_search_iterations=3),
        "short, keeps last": dict(normalize_advantage="none", line_search_iterations=3, on_failure="accept_last"),
        "plugged": dict(plugs=dict(objective=pgjax.Objective(plugged, PLUG)), normalize_advantage="none"),
    }

    def get(name):
        if name not in made:
            made[name] = ship(**variants[name])
        return made[name]

    return get


PLUG = dict(ratio=0.0, linear=0.0, penalty=0.0, poison=0.0)


def plugged(sample, params):
    """A sum of: the surrogate; a function linear in the parameters; a cost of moving at all; what cannot be evaluated."""
    gain = params["ratio"] * jnp.exp(sample.log_ratio) * sample.advantage
    gain = gain + params["linear"] * (sample.dist.mean[..., 0] - 2 * sample.dist.mean[..., 1])
    gain = gain - params["penalty"] * jnp.sum((sample.dist.mean - sample.dist_old.mean) ** 2, -1)
    far = sample.dist.mean[..., 0] != sample.dist_old.mean[..., 0]
    return gain + jnp.where(far & (params["poison"] > 0), jnp.nan, 0.0)


POLICY = synthetic.random_policy()
BATCH = synthetic.random_batch(POLICY)


def stepped(case, batch=BATCH, policy=POLICY, hypers=None, learner=None):
    """``(policy after the step, learner after, metrics)``."""
    learner = learner or synthetic.make_learner(case, policy)
    new, metrics = case.run(learner, batch, hypers or case.hypers)
    return synthetic.policy_of(case, new), new, metrics


def change(case, **kwargs):
    return synthetic.vector(stepped(case, **kwargs)[0]) - synthetic.vector(kwargs.get("policy", POLICY))


def equal(one, two):
    """Bitwise."""
    jax.tree.map(np.testing.assert_array_equal, one, two)


# ---- The step by hand -----------------------------------------------------------------------------------------------


def by_hand(
    policy,
    obs,
    action,
    advantage,
    log_prob_old,
    dist_old,
    *,
    max_kl=0.01,
    damping=0.1,
    backtrack=0.8,
    trials=10,
    slack=1.0,
    min_improvement=0.0,
    stride=1,
    mean_over_actions=False,
    entropy_coef=0.0,
    search=True,
):
    """One step on samples [N]: ``(policy, accepted, trials refused, expected gain)``, with a dense solve."""
    units = A if mean_over_actions else 1
    start = synthetic.vector(policy)

    def surrogate(p):
        return (np.exp(synthetic.log_prob(p, obs, action) - log_prob_old) * advantage).mean()

    def kl(p):
        return synthetic.kl(dist_old, p, obs).mean() / units

    gradient = synthetic.surrogate_gradient(policy, obs, action, advantage, log_prob_old)
    # The entropy is the sum of the log standard deviations and a constant.
    gradient[-A:] += entropy_coef
    chosen = [k * stride + k % stride for k in range(len(obs) // stride)]
    matrix = synthetic.fisher(policy, obs[chosen]) / units + damping * np.eye(P)
    direction = np.linalg.solve(matrix, gradient)
    step = np.sqrt(2 * max_kl / (direction @ matrix @ direction)) * direction
    expected = gradient @ step
    assert start.shape == gradient.shape == (P,)
    if not search:
        return synthetic.moved(policy, step), True, 0, expected
    for j in range(trials):
        trial = synthetic.moved(policy, backtrack**j * step)
        gain = surrogate(trial) - surrogate(policy)
        if kl(trial) <= slack * max_kl and gain > 0 and gain >= min_improvement * backtrack**j * expected:
            return trial, True, j, expected
    return policy, False, trials, expected


def samples(batch, normalize=False):
    obs, action, advantage, *rest = synthetic.samples(batch)
    if normalize:
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    return obs, action, advantage, *rest


BY_HAND = [
    ("usual", {}, {}),
    # Too far at first: the line search has to come back.
    ("usual", dict(max_kl=1.0, damping=0.01), {}),
    ("raw", dict(max_kl=0.1, backtrack=0.5, damping=1.0), {}),
    ("raw", dict(max_kl=2.0, kl_slack=1.5, damping=0.01), {}),
    ("raw", dict(max_kl=2.0, min_improvement=0.9, backtrack=0.6, damping=0.01), {}),
    ("raw", dict(max_kl=0.05, entropy_coef=0.3), {}),
    ("double", dict(max_kl=0.5), {}),
    ("strided", dict(max_kl=0.5), dict(stride=5)),
    ("mean", dict(max_kl=0.5), dict(mean_over_actions=True)),
    ("full step", dict(max_kl=2.0), dict(search=False)),
]


@pytest.mark.parametrize("variant, changes, options", BY_HAND)
def test_the_step_is_the_one_worked_out_by_hand(float64, cases, variant, changes, options):
    case = cases(variant)
    found, _, metrics = stepped(case, hypers=case.with_(**changes))
    names = {"kl_slack": "slack"}
    options = {**options, **{names.get(name, name): value for name, value in changes.items()}}
    expected, accepted, trials, gain = by_hand(POLICY, *samples(BATCH, variant == "usual"), **options)
    np.testing.assert_allclose(synthetic.vector(found), synthetic.vector(expected), rtol=0, atol=1e-5)
    assert metrics["line_search_accepted"] == accepted and metrics["line_search_trials"] == trials
    np.testing.assert_allclose(metrics["expected_gain"], gain, rtol=1e-5)
    assert metrics["cg_residual"] < 1e-4


def test_those_cases_reach_every_branch():
    outcomes = []
    for variant, changes, options in BY_HAND:
        options = {**options, **{{"kl_slack": "slack"}.get(name, name): value for name, value in changes.items()}}
        outcomes.append(by_hand(POLICY, *samples(BATCH, variant == "usual"), **options)[1:3])
    assert any(accepted and trials > 0 for accepted, trials in outcomes)
    assert any(accepted and trials == 0 for accepted, trials in outcomes)


def test_several_parts_are_steps_one_after_the_other_each_from_where_the_last_one_ended(float64, cases):
    """The KL counts from the start of each part, the ratio from the policy that acted."""
    case = cases("two parts")
    found, _, _ = stepped(case, hypers=case.with_(max_kl=0.05))
    policy, arrays = POLICY, samples(BATCH)
    for index in np.split(np.arange(N), 2):
        obs, action, advantage, log_prob_old, _ = synthetic.part(arrays, index)
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        here = synthetic.distribution(policy, obs)
        policy, *_ = by_hand(policy, obs, action, advantage, log_prob_old, here, max_kl=0.05)
    np.testing.assert_allclose(synthetic.vector(found), synthetic.vector(policy), rtol=0, atol=1e-5)


def test_the_full_step_has_the_length_that_the_damped_quadratic_model_allows(float64, cases):
    case = cases("full step")
    for max_kl, damping in ((0.01, 0.1), (0.3, 0.5)):
        step = change(case, hypers=case.with_(max_kl=max_kl, damping=damping))
        matrix = synthetic.fisher(POLICY, BATCH.obs) + damping * np.eye(P)
        np.testing.assert_allclose(0.5 * step @ matrix @ step, max_kl, rtol=1e-4)


# ---- Guarantees -----------------------------------------------------------------------------------------------------


def judge(algorithm, actor, batch):
    """``(surrogate, mean KL(old || new))`` on the whole batch."""
    advantage = np.float64(batch.advantage)
    log_ratio, kl = synthetic.judge(algorithm.core, actor, batch)
    return (np.exp(log_ratio) * (advantage - advantage.mean()) / (advantage.std() + 1e-8)).mean(), kl.mean()


@pytest.mark.parametrize("continuous", [False, True])
def test_in_training_every_step_keeps_the_bound_and_improves_or_leaves_the_policy_as_it_was(continuous):
    setup = trpo.Setup(num_envs=4, num_steps=8, hidden_sizes=(4,), line_search_iterations=4, **TINY)
    algorithm = trpo.make(Probe("responding", continuous), setup, trpo.Hypers(gamma=0.9))
    step, outcomes = synthetic.step_and_batch(algorithm), []
    state = jax.jit(algorithm.init)(jax.random.key(0), algorithm.hypers)
    for i in range(40):
        # Every other time the step has to come back to about a quarter of the bound, which may take too many trials.
        slack, max_kl = np.float32([1, 0.26][i % 2]), np.float32([0.01, 0.3, 3.0][i % 3])
        old = state.learner.params
        state, metrics, batch = step(state, algorithm.hypers.replace(max_kl=max_kl, kl_slack=slack))
        new, max_kl = state.learner.params, slack * max_kl
        assert (new.critic != old.critic).any()
        outcomes.append(float(metrics["line_search_accepted"]))
        if not outcomes[-1]:
            np.testing.assert_array_equal(new.actor, old.actor)
            assert metrics["line_search_trials"] == 4
            continue
        (before, start), (after, kl) = (judge(algorithm, actor, batch) for actor in (old.actor, new.actor))
        # Recomputed in float64; what was accepted, was so in float32.
        assert abs(start) < 1e-6 and kl <= max_kl * (1 + 1e-5) + 2e-7
        assert metrics["kl"] <= max_kl * (1 + 1e-5) + 2e-7
        assert after >= before - 1e-6
        np.testing.assert_allclose(metrics["surrogate_gain"], after - before, rtol=1e-3, atol=1e-5)
    assert 0 < np.mean(outcomes) < 1, "both outcomes occur"


def test_at_the_old_policy_the_kl_and_its_slope_are_zero(float64, cases):
    case = cases("raw")
    learner = synthetic.make_learner(case, POLICY)

    def kl(actor):
        return BATCH.dist_old.kl(case.core.networks.policy(ActorCritic(actor, None), BATCH.obs)).mean()

    value, slope = jax.value_and_grad(kl)(learner.params.actor)
    assert abs(value) < 1e-15 and np.abs(slope).max() < 1e-14


def test_the_policy_step_does_not_touch_the_critic_nor_the_critics_fit_the_policy(float64, cases):
    case = cases("raw")
    start = synthetic.make_learner(case, POLICY)
    one, narrow = (stepped(case, hypers=case.with_(max_kl=max_kl))[1] for max_kl in (0.01, 0.001))
    fast = stepped(case, hypers=case.with_(learning_rate=0.1))[1]
    still = stepped(case, hypers=case.with_(learning_rate=0.0))[1]
    assert (one.params.actor != narrow.params.actor).any() and (one.params.critic != fast.params.critic).any()
    equal((one.params.critic, one.opt_state), (narrow.params.critic, narrow.opt_state))
    equal(one.params.actor, fast.params.actor)
    equal(still.params.critic, start.params.critic)
    equal(one.opt_state.actor, start.opt_state.actor)


# ---- Invariances and limits -----------------------------------------------------------------------------------------


def with_advantage(advantage):
    return BATCH.replace(advantage=advantage)


def test_the_scale_of_the_advantages_does_not_matter(float64, cases):
    one = change(cases("raw"))
    assert np.linalg.norm(one) > 0.05
    for factor in (0.1, 30.0):
        np.testing.assert_allclose(change(cases("raw"), batch=with_advantage(factor * BATCH.advantage)), one, atol=1e-5)


def test_a_constant_on_the_advantages_does_not_matter_once_they_are_normalised(float64, cases):
    shifted = change(cases("usual"), batch=with_advantage(3 * BATCH.advantage + 5))
    np.testing.assert_allclose(shifted, change(cases("usual")), atol=1e-6)
    assert np.abs(change(cases("raw"), batch=with_advantage(BATCH.advantage + 5)) - change(cases("raw"))).max() > 1e-2


@pytest.mark.parametrize("variant", ["usual", "raw", "full step", "short, keeps last"])
def test_without_advantages_the_policy_stays_bit_for_bit(float64, cases, variant):
    learner = synthetic.make_learner(cases(variant), POLICY)
    _, new, _ = stepped(cases(variant), batch=with_advantage(0 * BATCH.advantage))
    np.testing.assert_array_equal(new.params.actor, learner.params.actor)


def test_with_much_damping_the_step_is_along_the_gradient(float64, cases):
    """F is lost in c I: the step is sqrt(2 δ / c) g / ||g||."""
    case, gradient = cases("full step"), synthetic.surrogate_gradient(POLICY, *samples(BATCH)[:4])
    step = change(case, hypers=case.with_(damping=1e7))
    expected = np.sqrt(2 * 0.01 / 1e7) * gradient / np.linalg.norm(gradient)
    # The quadratic form is then near the floor under it, 1e-8.
    assert gradient @ gradient / 1e7 > 1e-8
    np.testing.assert_allclose(step, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


def test_the_length_of_the_step_goes_with_the_root_of_the_bound(float64, cases):
    case = cases("full step")
    one, small = (change(case, hypers=case.with_(max_kl=max_kl)) for max_kl in (1e-4, 1e-8))
    np.testing.assert_allclose(small, one / 100, rtol=1e-6)


def test_twice_the_inputs_and_half_the_weights_give_the_same_change_of_the_means(float64, cases):
    """Without damping the natural gradient does not depend on the parameters that describe a policy."""
    case = cases("full step")
    hypers = case.with_(damping=0.0)
    half = {**POLICY, "W": POLICY["W"] / 2}
    changes = []
    for policy, obs in ((POLICY, BATCH.obs), (half, 2 * BATCH.obs)):
        new, *_ = stepped(case, batch=BATCH.replace(obs=obs), policy=policy, hypers=hypers)
        changes.append(synthetic.distribution(new, obs)[0] - synthetic.distribution(policy, obs)[0])
    assert np.abs(changes[0]).max() > 0.02
    np.testing.assert_allclose(changes[1], changes[0], atol=2e-4 * np.abs(changes[0]).max())
    # The plain gradient does depend on it.
    damped = [
        stepped(case, batch=BATCH.replace(obs=obs), policy=policy, hypers=case.with_(damping=100.0))[0]
        for policy, obs in ((POLICY, BATCH.obs), (half, 2 * BATCH.obs))
    ]
    moves = [
        synthetic.distribution(new, obs)[0] - synthetic.distribution(policy, obs)[0]
        for new, policy, obs in zip(damped, (POLICY, half), (BATCH.obs, 2 * BATCH.obs), strict=True)
    ]
    assert np.abs(moves[1] - moves[0]).max() > 0.1 * np.abs(moves[0]).max()


def test_means_that_all_move_by_one_sigma_are_half_a_nat_apart_for_each_dimension(float64):
    for d in (1, 4):
        log_std = np.linspace(-1, 1, d)
        one, other = DiagGaussian(np.zeros(d), log_std), DiagGaussian(np.exp(log_std), log_std)
        np.testing.assert_allclose(one.kl(other), d / 2, rtol=1e-12)


def plug(case, **coefficients):
    return case.hypers.replace(
        damping=np.float64(0), objective={name: np.float64(coefficients.get(name, 0.0)) for name in PLUG}
    )


def test_an_objective_linear_in_the_means_takes_the_full_step_to_the_very_bound(float64, cases):
    """The log standard deviations have no gradient, and in the means the KL is quadratic, so the model is exact."""
    case = cases("plugged")
    for max_kl in (0.01, 5.0):
        hypers = plug(case, linear=1.0).replace(max_kl=np.float64(max_kl), kl_slack=np.float64(1 + 1e-9))
        found, _, metrics = stepped(case, hypers=hypers)
        assert metrics["line_search_accepted"] == 1 and metrics["line_search_trials"] == 0
        # Summed over the action dimensions, in nats.
        np.testing.assert_allclose(synthetic.kl(POLICY, found, BATCH.obs).mean(), max_kl, rtol=1e-6)
        np.testing.assert_allclose(found["s"], POLICY["s"], atol=1e-12)
        np.testing.assert_allclose(metrics["surrogate_gain"], metrics["expected_gain"], rtol=1e-6)


@pytest.mark.parametrize("poison", [dict(ratio=1.0, penalty=1e6), dict(ratio=1.0, poison=1.0)])
def test_an_objective_that_gets_worse_with_every_step_leaves_the_policy_bit_for_bit(float64, cases, poison):
    case = cases("plugged")
    start = synthetic.make_learner(case, POLICY)
    _, new, metrics = stepped(case, hypers=plug(case, **poison), learner=start)
    np.testing.assert_array_equal(new.params.actor, start.params.actor)
    assert metrics["line_search_accepted"] == 0 and metrics["line_search_trials"] == 10
    assert (new.params.critic != start.params.critic).any()
    # It is the poison: without it there is a step.
    _, new, metrics = stepped(case, hypers=plug(case, ratio=1.0), learner=start)
    assert metrics["line_search_accepted"] == 1 and (new.params.actor != start.params.actor).any()


def test_advantages_that_are_not_numbers_leave_the_policy_bit_for_bit(float64, cases):
    advantage = BATCH.advantage.copy()
    advantage[2, 1] = np.nan
    start = synthetic.make_learner(cases("raw"), POLICY)
    _, new, metrics = stepped(cases("raw"), batch=with_advantage(advantage), learner=start)
    np.testing.assert_array_equal(new.params.actor, start.params.actor)
    assert metrics["line_search_accepted"] == 0


def test_when_no_trial_is_accepted_the_policy_stays_or_by_a_known_defect_takes_the_last_one(float64, cases):
    changes = dict(max_kl=0.5, damping=0.01, kl_slack=1e-3)
    rolled, kept = (cases(name) for name in ("short", "short, keeps last"))
    _, new, metrics = stepped(rolled, hypers=rolled.with_(**changes))
    np.testing.assert_array_equal(new.params.actor, synthetic.make_learner(rolled, POLICY).params.actor)
    assert metrics["line_search_accepted"] == 0 and metrics["line_search_trials"] == 3
    found, _, metrics = stepped(kept, hypers=kept.with_(**changes))
    assert metrics["line_search_accepted"] == 0 and metrics["line_search_trials"] == 3
    full, *_ = by_hand(POLICY, *samples(BATCH), search=False, max_kl=0.5, damping=0.01)
    last = 0.8**2 * (synthetic.vector(full) - synthetic.vector(POLICY))
    np.testing.assert_allclose(synthetic.vector(found) - synthetic.vector(POLICY), last, atol=1e-5)
    # Both agree where a trial is accepted.
    one, other = (change(case, hypers=case.with_(max_kl=0.01)) for case in (rolled, kept))
    np.testing.assert_array_equal(one, other)


def test_averaging_the_kl_over_actions_is_the_sum_with_a_larger_bound_and_more_damping(float64, cases):
    """The mean over d dimensions under δ is the sum under d δ: public code bounds that much less."""
    averaged, summed = cases("mean"), cases("raw")
    one = change(averaged, hypers=averaged.with_(max_kl=0.02, damping=0.1))
    other = change(summed, hypers=summed.with_(max_kl=0.02 * A, damping=0.1 * A))
    np.testing.assert_allclose(one, other, atol=1e-9)
    # Other than in the tests above the sum then exceeds the stated bound.
    policy = synthetic.moved(POLICY, one)
    assert 0.02 < synthetic.kl(POLICY, policy, BATCH.obs).mean() <= 0.02 * A


def test_with_unit_information_and_no_line_search_it_is_normalised_gradient_ascent(float64):
    """A policy whose only parameters are its means, at σ = 1, has F = I: the step is sqrt(2 δ) g / ||g||."""
    networks = Networks(
        init=lambda key: ActorCritic({"mean": jnp.zeros(A)}, {"height": jnp.zeros(1)}),
        policy=lambda params, obs: DiagGaussian(
            jnp.broadcast_to(params.actor["mean"], (*obs.shape[:-1], A)), jnp.zeros((*obs.shape[:-1], A))
        ),
        value=lambda params, obs: params.critic["height"][0] + 0 * obs[..., 0],
    )
    case = ship(plugs=dict(networks=networks), line_search=False, normalize_advantage="none")
    params = ActorCritic(jnp.array([0.3, -0.2]), jnp.zeros(1))
    learner = on_policy.Learner(
        params, on_policy.init_opt_state(case.core.setup, case.hypers, params), jnp.ones(()), None, None, None, None
    )
    mean = np.broadcast_to([0.3, -0.2], (T, B, A))
    z = np.random.default_rng(0).normal(size=(T, B, A))
    log_prob_old = (-0.5 * z**2 - 0.5 * np.log(2 * np.pi)).sum(-1)
    batch = BATCH.replace(action=mean + z, dist_old=DiagGaussian(mean.copy(), 0 * mean), log_prob_old=log_prob_old)
    new, _ = case.run(learner, batch, case.with_(damping=0.0))
    gradient = (batch.advantage[..., None] * z).mean((0, 1))
    expected = np.sqrt(2 * 0.01) * gradient / np.linalg.norm(gradient)
    np.testing.assert_allclose(new.params.actor - params.actor, expected, rtol=1e-9)


def test_lanes_equal_single_updates(float64, cases):
    case = cases("raw")
    learner = synthetic.make_learner(case, POLICY)
    hypers = [case.with_(max_kl=max_kl) for max_kl in (0.01, 2.0)] + [case.with_(kl_slack=0.0)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *hypers)
    lanes, metrics = jax.jit(jax.vmap(case.run, (None, None, 0)))(learner, BATCH, stacked)
    assert len(set(np.asarray(metrics["line_search_trials"]).tolist())) == 3, "each lane ends at another trial"
    for i, one in enumerate(hypers):
        single, _ = case.run(learner, BATCH, one)
        np.testing.assert_allclose(lanes.params.actor[i], single.params.actor, rtol=1e-9, atol=1e-12)


# ---- Requests that cannot work --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(shared_torso=True), ["shared_torso"]),
        (dict(num_epochs=2), ["num_epochs = 2"]),
        (dict(learning_rate_schedule="adaptive_kl"), ["adaptive_kl"]),
        (dict(early_stop="epoch"), ["early_stop = 'epoch'"]),
        (dict(advantage_recompute="epoch"), ["advantage_recompute = 'epoch'"]),
        (dict(normalize_advantage="minibatch"), ["normalize_advantage = 'minibatch'"]),
        (dict(fisher_stride=0), ["fisher_stride = 0"]),
        (dict(value_minibatches=5), ["value_minibatches = 5", "num_steps"]),
        (dict(line_search_iterations=0), ["line_search_iterations = 0"]),
    ],
)
def test_setups_that_have_no_meaning_here_are_refused_in_one_line(fields, words):
    with pytest.raises(RequestError) as error:
        trpo.make(synthetic.SPACES, trpo.Setup(**{**dict(num_envs=B, num_steps=T), **TINY, **fields}))
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
