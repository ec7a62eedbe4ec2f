"""FixPO: the limit on every state, the multiplier, the fix-up phase, and the whole update replayed in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic
from probe_envs import Probe
from synthetic import A, B, N, O, T

from pgjax import updates
from pgjax.algorithms import fixpo, ppo, ppo_kl
from pgjax.distributions import DiagGaussian
from pgjax.errors import RequestError
from pgjax.solvers.duals import init_duals, step_duals

PARTS = 3
POLICY = synthetic.random_policy()
BATCH = synthetic.random_batch(POLICY)
OLD = synthetic.samples(BATCH)[-1]
# Norms of actor and critic apart, so that the actor can be followed alone.
ALONE = dict(num_epochs=2, num_minibatches=2, fixup_minibatches=PARTS, gradient_clip="separate")
ALONE.update(learning_rate_schedule="constant", normalize_value=False)


def duals64(value=1.0):
    with jax.enable_x64(True):
        duals = jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, init_duals(kl_coef=0))
        return duals.replace(values={"kl_coef": jnp.float64(value)})


@pytest.fixture(scope="module")
def cases():
    """Updates by variant, each compiled when first asked for."""
    made = {}
    variants = {
        "epoch": {},
        "iteration": dict(fixup="iteration"),
        "off": dict(fixup="off"),
        "mean": dict(kl_statistic="mean"),
        "short": dict(fixup_max_iterations=2),
        "whole": dict(num_minibatches=1, gradient_clip="none"),
        "one step": dict(num_epochs=1, num_minibatches=1, gradient_clip="none", fixup="off"),
    }

    def get(name):
        if name not in made:
            setup = {**ALONE, **variants[name]}
            made[name] = synthetic.shipped(fixpo, dict(learning_rate=0.05, kl_limit=0.2), **setup)
        return made[name]

    return get


def stepped(case, hypers, beta=1.0, batch=BATCH):
    return case.run(synthetic.make_learner(case, POLICY, duals64(beta)), batch, hypers)


def kls(case, learner, batch=BATCH):
    """KL(old || new) of every sample, in NumPy."""
    return synthetic.kl(synthetic.samples(batch)[-1], synthetic.policy_of(case, learner), batch.obs.reshape(N, O))


def equal(one, two):
    """Bitwise."""
    jax.tree.map(np.testing.assert_array_equal, one, two)


# ---- The multiplier -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest, slope", [(0.0, 0.5), (0.1, 0.2), (1 / 6, 0.0), (0.3, -0.4), (0.6, -1.3)])
def test_the_slope_of_the_multiplier_is_the_limit_less_the_largest_kl_times_the_headroom(float64, largest, slope):
    kl = np.array([0.0, largest, largest / 3])
    hypers = fixpo.Hypers(kl_limit=0.5, kl_headroom=3.0)
    np.testing.assert_allclose(fixpo.kl_coef_gradient(kl, hypers), slope, atol=1e-12)
    np.testing.assert_allclose(fixpo.kl_coef_gradient(kl, hypers, "mean"), 0.5 - 3 * kl.mean(), atol=1e-12)
    # From a fresh state Adam moves by the learning rate, whatever the size: down while the KL is small.
    moved = step_duals(duals64(), {"kl_coef": slope}, 0.01)["kl_coef"] - 1
    np.testing.assert_allclose(moved, -0.01 * np.sign(slope), atol=1e-8)


def test_multipliers_follow_adam_and_never_become_negative(float64):
    rng = np.random.default_rng(0)
    adam, value, duals, lowest = synthetic.Adam(1), 0.02, duals64(0.02), np.inf
    for slope in rng.normal(size=40) + 0.3:
        duals = step_duals(duals, {"kl_coef": slope}, 0.01)
        value = max(value - 0.01 * adam.direction(slope)[0], 0)
        np.testing.assert_allclose(duals["kl_coef"], value, atol=1e-12)
        lowest = min(lowest, value)
    assert lowest == 0


# ---- The update by hand ---------------------------------------------------------------------------------------------


class Replay:
    """One iteration, followed in NumPy."""

    def __init__(self, case, hypers, beta, batch=BATCH):
        self.setup, self.h = case.core.setup, hypers
        self.arrays = synthetic.samples(batch)
        self.policy, self.beta = POLICY, beta
        self.adam = synthetic.Adam(len(synthetic.vector(POLICY)), eps=float(hypers.adam_eps))
        self.adam_beta = synthetic.Adam(1)
        self.steps = self.passes = self.bound_hit = 0
        self.betas = []

    def kl(self, index=slice(None)):
        obs, *_, dist_old = synthetic.part(self.arrays, index)
        kl = synthetic.kl(dist_old, self.policy, obs)
        return kl.max() if self.setup.kl_statistic == "max" else kl.mean()

    def step(self, index, with_advantage):
        obs, action, advantage, log_prob_old, dist_old = synthetic.part(self.arrays, index)
        kl = self.kl(index)
        gradient = self.beta * synthetic.kl_gradient(self.policy, dist_old, obs)
        if with_advantage:
            gradient = gradient - synthetic.surrogate_gradient(self.policy, obs, action, advantage, log_prob_old)
        norm = np.linalg.norm(gradient)
        gradient = gradient * min(1, self.h.max_grad_norm / max(norm, 1e-12))
        self.policy = synthetic.moved(self.policy, -self.h.learning_rate * self.adam.direction(gradient))
        slope = self.h.kl_limit - self.h.kl_headroom * kl
        self.beta = max(0, self.beta - self.h.kl_coef_lr * self.adam_beta.direction(slope)[0])
        self.betas.append(self.beta)

    def run(self):
        feasible = self.policy
        for number, key in enumerate(jax.random.split(jax.random.key(7), self.setup.num_epochs)):
            key_permute, _ = jax.random.split(key)
            for index in np.asarray(updates.shuffled(self.setup, key_permute, 1)):
                self.step(index, True)
            if self.setup.fixup == "off" or (self.setup.fixup == "iteration" and number < self.setup.num_epochs - 1):
                continue
            passes = 0
            while not self.kl() <= self.h.kl_limit and passes < self.setup.fixup_max_iterations:
                for index in (np.arange(first, N, PARTS) for first in range(PARTS)):
                    if not self.kl(index) <= self.h.kl_limit:
                        self.step(index, False)
                        self.steps += 1
                passes += 1
            self.passes += passes
            if not self.kl() <= self.h.kl_limit:
                self.policy, self.bound_hit = feasible, 1
            feasible = self.policy
        return self


BY_HAND = [
    ("epoch", dict(kl_limit=0.02), 1.0),
    ("epoch", dict(kl_limit=0.05, learning_rate=0.1), 3.0),
    # The multiplier starts at its bound of zero and has to come up.
    ("epoch", dict(kl_limit=0.02, kl_coef_lr=0.05), 0.0),
    ("epoch", dict(kl_limit=0.02, max_grad_norm=1e-3, kl_headroom=1.0), 1.0),
    ("iteration", dict(kl_limit=0.05), 1.0),
    ("off", dict(kl_limit=0.02), 1.0),
    ("mean", dict(kl_limit=0.005), 1.0),
    ("short", dict(kl_limit=0.001, learning_rate=0.1), 1.0),
]


@pytest.mark.parametrize("variant, changes, beta", BY_HAND)
def test_an_iteration_is_the_one_worked_out_by_hand(float64, cases, variant, changes, beta):
    case = cases(variant)
    hypers = case.with_(**changes)
    learner, metrics = stepped(case, hypers, beta)
    replay = Replay(case, hypers, beta).run()
    found = synthetic.policy_of(case, learner)
    np.testing.assert_allclose(synthetic.vector(found), synthetic.vector(replay.policy), rtol=0, atol=1e-9)
    np.testing.assert_allclose(learner.extra["kl_coef"], replay.beta, atol=1e-10)
    np.testing.assert_allclose(metrics["kl_coef"], replay.beta, atol=1e-10)
    if variant == "off":
        assert kls(case, learner).max() > hypers.kl_limit and not any(name.startswith("fixup") for name in metrics)
        return
    counts = replay.steps, replay.passes, replay.bound_hit
    assert tuple(metrics[f"fixup_{name}"] for name in ("steps", "passes", "bound_hit")) == counts
    np.testing.assert_allclose(metrics["fixup_share"], replay.steps / 4)
    assert replay.steps > 0 and replay.bound_hit == (variant == "short")
    if variant != "mean":
        assert kls(case, learner).max() <= hypers.kl_limit + 1e-12


# ---- Guarantees -----------------------------------------------------------------------------------------------------


def trained(continuous, num_iterations, setup=(), **hypers):
    """Largest KL of any state after each iteration, recomputed in NumPy, and the metrics of each."""
    small = dict(num_envs=4, num_steps=8, num_epochs=2, num_minibatches=4, hidden_sizes=(4,), fixup_minibatches=2)
    setup = {**small, **dict(setup)}
    algorithm = fixpo.make(Probe("responding", continuous), fixpo.Setup(**setup), fixpo.Hypers(gamma=0.9, **hypers))
    state = jax.jit(algorithm.init)(jax.random.key(0), algorithm.hypers)
    step, largest, rows = synthetic.step_and_batch(algorithm), [], []
    for _ in range(num_iterations):
        state, metrics, batch = step(state, algorithm.hypers)
        _, kl = synthetic.judge(algorithm.core, state.learner.params.actor, batch)
        largest.append(kl.max())
        rows.append(metrics)
        assert metrics["nonfinite"] == 0 and metrics["kl_coef"] >= 0
        np.testing.assert_allclose(metrics["kl_max"], kl.max(), rtol=1e-3, atol=1e-6)
    return np.array(largest), {name: np.array([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("continuous", [False, True])
def test_in_training_no_state_of_the_batch_is_ever_further_than_the_limit(continuous):
    largest, rows = trained(continuous, 25, learning_rate=0.03, kl_limit=0.02, kl_coef_lr=0.1)
    assert (largest <= 0.02 + 1e-6).all()
    assert rows["fixup_steps"].sum() > 0 and not rows["fixup_bound_hit"].any() and largest.max() > 0.01


def test_in_training_the_limit_holds_even_where_the_fix_up_gives_up():
    largest, rows = trained(True, 15, dict(fixup_max_iterations=1), learning_rate=0.1, kl_limit=0.002)
    assert (largest <= 0.002 + 1e-6).all() and rows["fixup_bound_hit"].any()
    # Without the phase nothing holds it.
    largest, _ = trained(True, 3, dict(fixup="off"), learning_rate=0.1, kl_limit=0.002)
    assert largest.max() > 0.002


def test_a_limit_that_cannot_be_reached_in_time_leads_back_to_the_last_policy_within_it(float64, cases):
    """In the first epoch that is the policy that acted; the multiplier and the critic keep what they have learned."""
    case = cases("short")
    hypers = case.with_(kl_limit=1e-9, learning_rate=0.1)
    start = synthetic.make_learner(case, POLICY, duals64())
    learner, metrics = stepped(case, hypers)
    np.testing.assert_array_equal(learner.params.actor, start.params.actor)
    assert metrics["fixup_bound_hit"] == 1 and metrics["fixup_passes"] == 4
    assert (learner.params.critic != start.params.critic).any() and learner.extra["kl_coef"] > 1


# ---- The fix-up phase by itself -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fix_up(cases):
    """``(learner, feasible, hypers, batch, due) -> (learner, feasible, counts)``, compiled."""
    core = cases("epoch").core

    @jax.jit
    def run(learner, feasible, hypers, batch=BATCH, due=True):
        return fixpo.fix_up(core, learner, feasible, batch, hypers, hypers.learning_rate, due)

    return run


def far_learner(case, policy, beta=1.0):
    """A learner at ``policy`` with momentum in both optimisers."""
    learner = synthetic.make_learner(case, policy, duals64(beta))
    rng = np.random.default_rng(3)
    opt_state = jax.tree.map(lambda x: jnp.asarray(rng.uniform(1, 2, x.shape) * 1e-3) if x.ndim else x + 3, learner.opt_state)
    return learner.replace(opt_state=opt_state)


FAR = synthetic.moved(POLICY, np.random.default_rng(4).normal(size=O * A + 2 * A) / 2)


def test_within_the_limit_the_fix_up_does_nothing(float64, cases, fix_up):
    case = cases("epoch")
    learner = far_learner(case, FAR)
    after, feasible, counts = fix_up(learner, 0 * learner.params.actor, case.with_(kl_limit=1e9))
    equal(after, learner)
    # And what it saw within the limit is what it would come back to.
    np.testing.assert_array_equal(feasible, learner.params.actor)
    assert counts["fixup_steps"] == counts["fixup_passes"] == counts["fixup_bound_hit"] == 0


def test_a_fix_up_that_is_not_due_does_nothing(float64, cases, fix_up):
    case = cases("epoch")
    learner = far_learner(case, FAR)
    start = synthetic.make_learner(case, POLICY).params.actor
    after, feasible, counts = fix_up(learner, start, case.with_(kl_limit=0.01), BATCH, False)
    equal(after, learner)
    np.testing.assert_array_equal(feasible, start)
    assert not any(counts.values())


def test_from_far_off_the_fix_up_ends_within_the_limit_and_leaves_the_critic_alone(float64, cases, fix_up):
    case = cases("epoch")
    learner = far_learner(case, FAR)
    hypers = case.with_(kl_limit=0.1, learning_rate=0.02, kl_coef_lr=0.1)
    after, feasible, counts = fix_up(learner, learner.params.actor, hypers)
    assert kls(case, after).max() <= 0.1 < kls(case, learner).max()
    assert counts["fixup_steps"] > 0 and counts["fixup_passes"] > 0 and counts["fixup_bound_hit"] == 0
    assert counts["fixup_steps"] <= PARTS * counts["fixup_passes"]
    np.testing.assert_array_equal(feasible, after.params.actor)
    equal((after.params.critic, after.opt_state.critic), (learner.params.critic, learner.opt_state.critic))
    assert (after.opt_state.actor.mu != learner.opt_state.actor.mu).any()


def test_a_violation_in_the_last_minibatch_alone_is_found_and_followed_until_a_pass_is_clean(float64, cases, fix_up):
    case = cases("epoch")
    # Only where the first observation is large does a change of its weights tell, and those states are all in one part.
    obs = BATCH.obs.reshape(N, O).copy()
    last = np.arange(N) % PARTS == PARTS - 1
    obs[:, 0] = np.where(last, 3.0, 0.0)
    mean, log_std = synthetic.distribution(POLICY, obs)
    shape = (T, B, A)
    batch = BATCH.replace(
        obs=obs.reshape(T, B, O), dist_old=DiagGaussian(mean.reshape(shape), np.array(log_std).reshape(shape))
    )
    weights = POLICY["W"].copy()
    weights[0] += 0.5
    learner = synthetic.make_learner(case, {**POLICY, "W": weights}, duals64())
    before = kls(case, learner, batch)
    assert before[~last].max() < 1e-12 and before[last].min() > 0.1
    after, _, counts = fix_up(learner, learner.params.actor, case.with_(kl_limit=0.1, learning_rate=0.02), batch)
    assert kls(case, after, batch).max() <= 0.1 and counts["fixup_passes"] > 1
    # With a policy that cannot move every pass finds the same: a step in the last part, none in the others.
    _, _, counts = fix_up(learner, learner.params.actor, case.with_(kl_limit=0.1, learning_rate=0.0), batch)
    assert counts["fixup_steps"] == counts["fixup_passes"] == 100 and counts["fixup_bound_hit"] == 1


# KL(N(0, 1) || N(0.3, 0.5)) is 0.9868528; the other way round it would be 0.3631472.
@pytest.mark.parametrize("limit, violated", [(0.98685, True), (0.98686, False), (0.3632, True)])
def test_the_limit_is_on_the_kl_from_the_old_policy_to_the_new(float64, cases, fix_up, limit, violated):
    case = cases("epoch")
    old = {"W": np.zeros((O, A)), "b": np.zeros(A), "s": np.zeros(A)}
    new = {**old, "b": np.array([0.3, 0.0]), "s": np.array([np.log(0.5), 0.0])}
    batch = BATCH.replace(dist_old=DiagGaussian(np.zeros((T, B, A)), np.zeros((T, B, A))))
    learner = synthetic.make_learner(case, new, duals64())
    _, _, counts = fix_up(learner, learner.params.actor, case.with_(kl_limit=limit), batch)
    assert (counts["fixup_steps"] > 0) == violated


@pytest.mark.parametrize("where", ["policy", "state"])
def test_a_kl_that_is_not_a_number_is_never_within_the_limit(float64, cases, fix_up, where):
    case = cases("epoch")
    start = synthetic.make_learner(case, POLICY, duals64())
    batch, learner = BATCH, start
    if where == "policy":
        learner = start.replace(params=start.params._replace(actor=start.params.actor.at[0].set(np.nan)))
    else:
        mean = BATCH.dist_old.mean.copy()
        mean[3, 2, 0] = np.nan
        batch = BATCH.replace(dist_old=DiagGaussian(mean, BATCH.dist_old.log_std))
    after, feasible, counts = fix_up(learner, start.params.actor, case.with_(kl_limit=1e9), batch)
    assert counts["fixup_bound_hit"] == 1 and counts["fixup_passes"] == 100
    np.testing.assert_array_equal(after.params.actor, start.params.actor)
    np.testing.assert_array_equal(feasible, start.params.actor)


def test_with_a_multiplier_of_zero_the_fix_up_moves_by_momentum_until_it_has_risen(float64, cases, fix_up):
    """No floor under the multiplier: the first steps have no gradient, but each raises it."""
    case = cases("epoch")
    learner = synthetic.make_learner(case, FAR, duals64(0.0))
    after, _, counts = fix_up(learner, learner.params.actor, case.with_(kl_limit=0.1, learning_rate=0.02))
    assert kls(case, after).max() <= 0.1 and counts["fixup_steps"] > 1 and after.extra["kl_coef"] > 0


def test_lanes_end_at_passes_of_their_own_and_equal_single_runs(float64, cases):
    case = cases("epoch")
    hypers = [case.with_(kl_limit=limit, learning_rate=0.1) for limit in (1e9, 0.1, 0.01)]
    learner = synthetic.make_learner(case, POLICY, duals64())
    stacked = jax.tree.map(lambda *x: np.stack(x), *hypers)
    lanes, metrics = jax.jit(jax.vmap(case.run, (None, None, 0)))(learner, BATCH, stacked)
    assert len(set(np.asarray(metrics["fixup_passes"]).tolist())) == 3
    for i, one in enumerate(hypers):
        single, single_metrics = case.run(learner, BATCH, one)
        jax.tree.map(lambda x, y, i=i: np.testing.assert_allclose(x[i], y, rtol=1e-9, atol=1e-12), lanes, single)
        for name in ("steps", "passes", "bound_hit"):
            assert metrics[f"fixup_{name}"][i] == single_metrics[f"fixup_{name}"]


# ---- Where it becomes another method --------------------------------------------------------------------------------


def test_the_first_gradient_is_the_policy_gradient_with_raw_advantages_and_lowers_the_multiplier(float64, cases):
    """Where the policies agree the penalty has no slope, whatever its coefficient."""
    case = cases("one step")
    gradient = -synthetic.surrogate_gradient(POLICY, *synthetic.samples(BATCH)[:4])
    for beta, scale in ((1.0, 1.0), (50.0, 1.0), (1.0, 7.0)):
        learner, _ = stepped(case, case.hypers, beta, BATCH.replace(advantage=scale * BATCH.advantage))
        # Adam's first moment after one step is a tenth of the gradient.
        momentum = learner.params._replace(actor=10 * learner.opt_state.actor.mu)
        found = synthetic.vector(synthetic.policy_of(case, learner.replace(params=momentum)))
        np.testing.assert_allclose(found, scale * gradient, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(learner.extra["kl_coef"], beta - 0.01, rtol=1e-9)
    assert stepped(case, case.hypers, 0.0)[0].extra["kl_coef"] == 0


def shared(module, **setup):
    """Another method with everything that the two have in common."""
    setup = {**ALONE, **dict(num_minibatches=1, gradient_clip="none", normalize_advantage="none"), **setup}
    del setup["fixup_minibatches"]
    return synthetic.shipped(module, dict(learning_rate=0.05, adam_eps=1e-8, value_coef=0.2), value_loss="clipped", **setup)


def test_without_a_limit_and_with_a_constant_multiplier_it_is_ppo_with_a_fixed_penalty(float64, cases):
    case, other = cases("whole"), shared(ppo_kl, kl_rule="fixed")
    one, metrics = stepped(case, case.with_(kl_limit=1e9, kl_coef_lr=0.0), 0.7)
    two, _ = other.run(synthetic.make_learner(other, POLICY, {"kl_coef": np.float64(0.7)}), BATCH, other.hypers)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12), one.params, two.params)
    assert metrics["fixup_passes"] == 0 and one.extra["kl_coef"] == 0.7


def test_without_a_limit_and_without_a_multiplier_it_is_ppo_without_a_clip(float64, cases):
    case, other = cases("whole"), shared(ppo)
    one, _ = stepped(case, case.with_(kl_limit=1e9, kl_coef_lr=0.0), 0.0)
    two, _ = other.run(synthetic.make_learner(other, POLICY), BATCH, other.with_(clip_eps=1e9))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12), one.params, two.params)


def test_more_headroom_means_fewer_steps_of_fix_up():
    steps = [
        trained(True, 25, learning_rate=0.01, kl_limit=0.02, kl_coef_lr=0.1, kl_headroom=headroom)[1]["fixup_steps"].mean()
        for headroom in (1.0, 10.0)
    ]
    assert steps[0] > steps[1]


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(early_stop="epoch"), ["early_stop = 'epoch'"]),
        (dict(learning_rate_schedule="adaptive_kl"), ["adaptive_kl"]),
        (dict(advantage_recompute="epoch"), ["advantage_recompute = 'epoch'"]),
        (dict(fixup_minibatches=7), ["fixup_minibatches = 7", "num_steps"]),
        (dict(fixup_max_iterations=0), ["fixup_max_iterations = 0"]),
        (dict(kl_statistic="median"), ["kl_statistic = 'median'"]),
    ],
)
def test_setups_that_have_no_meaning_here_are_refused_in_one_line(fields, words):
    with pytest.raises(RequestError) as error:
        fixpo.make(synthetic.SPACES, fixpo.Setup(**fields))
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
