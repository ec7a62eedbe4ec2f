"""LPG: the rule against Flax's cells, the update against sums by hand, lifetimes, and the limits that make it REINFORCE."""

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from probe_envs import Probe

import pgjax
from pgjax import cli
from pgjax.algorithms import lpg, make
from pgjax.errors import RequestError
from pgjax.learned import files as learned_files
from pgjax.learned.files import Learned
from pgjax.learned.rule import LOWERS, RuleInputs, RuleSpec, apply_rule, convention_of, init_rule, read_convention
from pgjax.spaces import Box

T, B, M, O, A = 6, 3, 4, 5, 3
SPEC = RuleSpec(num_predictions=M, hidden_size=7, embedding_size=3)
TABULAR = lpg.Setup(num_envs=B, num_steps=T, optimizer="sgd", hidden_sizes=())
RATES = dict(learning_rate=2.0, predictor_lr=3.0, alpha_y=0.5, max_grad_norm=0.02)


def scaled(rule, seed=0):
    """A rule whose biases are not zero either."""
    flat, back = ravel_pytree(rule)
    return back(flat + 0.3 * jax.random.normal(jax.random.key(seed), flat.shape))


def some_rule(spec=SPEC, seed=0):
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.result_type(float)), scaled(init_rule(spec, jax.random.key(seed)), seed + 1)
    )


def some_inputs(seed=0, end=None, **more):
    rng = np.random.default_rng(seed)
    simplex = rng.dirichlet(np.ones(M), (2, T, B))
    end = rng.random((T, B)) < 0.3 if end is None else end
    numbers = RuleInputs(rng.normal(size=(T, B)), end, rng.random((T, B)), *simplex, **more)
    return jax.tree.map(jnp.asarray, numbers)


def of_env(inputs, b):
    """One environment's part."""
    return jax.tree.map(lambda x: x[:, b : b + 1] if jnp.ndim(x) else x, inputs)


def some_rollout(seed=0):
    rng = np.random.default_rng(seed)
    obs, reward = rng.normal(size=(T + 1, B, O)), rng.normal(size=(T, B))
    return lpg.Rollout(*map(jnp.asarray, (obs, rng.integers(0, A, (T, B)), reward, rng.random((T, B)) < 0.3)))


def core_of(setup=TABULAR, spec=SPEC, size=O):
    return lpg.Core(lpg.make_agent(Box((size,)), A, spec.num_predictions, setup), spec, setup)


def start_of(core, params, hypers=None):
    return lpg.Learner(params, lpg.init_opt_state(core.setup, hypers, params))


def updated(core, rollout, hypers, params):
    """One update, compiled: ``(params, said, metrics)`` after it."""
    update = jax.jit(lambda learner, rollout, hypers: lpg.inner_update(core, learner, rollout, hypers, 0, 9))
    learner, said, metrics = update(start_of(core, params, hypers), rollout, hypers)
    return learner.params, said, metrics


def some_params(core, seed=0):
    params = core.agent.init(jax.random.key(seed))
    return jax.tree.map(lambda x: jnp.asarray(5 * x, jnp.result_type(float)), params)


# ---- The rule -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [SPEC, dataclasses.replace(SPEC, cell="lstm", temporal="relative", gamma_input=True)])
def test_the_rule_is_the_cell_of_flax_run_backwards(float64, spec):
    rule, inputs = some_rule(spec), some_inputs(updates=30.0, lifetime=120.0, gamma=0.97)
    pi_hat, log_y_hat = jax.jit(lambda *x: apply_rule(spec, *x))(rule, inputs)
    assert pi_hat.shape == (T, B) and log_y_hat.shape == (T, B, M)
    np.testing.assert_allclose(np.exp(log_y_hat).sum(-1), 1, rtol=1e-12)
    assert (np.exp(log_y_hat) > 0).all()

    def embed(y):
        inner = np.maximum(y @ rule["embedding"]["hidden"]["kernel"] + rule["embedding"]["hidden"]["bias"], 0)
        return (inner @ rule["embedding"]["out"]["kernel"] + rule["embedding"]["out"]["bias"])[0]

    H, recurrent, x_kernel, x_bias = 7, rule["recurrent"], rule["inputs"]["kernel"], rule["inputs"]["bias"]
    if spec.cell == "gru":
        cell = nn.GRUCell(H, param_dtype=jnp.float64)
        gates = ("r", "z", "n")
    else:
        cell = nn.LSTMCell(H, param_dtype=jnp.float64)
        gates = ("i", "f", "g", "o")
    params = {}
    for k, gate in enumerate(gates):
        part = slice(k * H, (k + 1) * H)
        params[f"i{gate}"] = {"kernel": x_kernel[:, part]} | ({"bias": x_bias[part]} if spec.cell == "gru" else {})
        params[f"h{gate}"] = {"kernel": recurrent["kernel"][:, part]} | ({} if spec.cell == "gru" else {"bias": x_bias[part]})
    if spec.cell == "gru":
        params["hn"]["bias"] = recurrent["bias"]
    for b in range(B):
        zero = jnp.zeros(H)
        carry = zero if spec.cell == "gru" else (zero, zero)
        for t in reversed(range(T)):
            end = bool(inputs.end[t, b])
            if end:
                carry = jax.tree.map(jnp.zeros_like, carry)
            following = 0.0 if end else embed(inputs.next_prediction[t, b])
            x = [inputs.reward[t, b], float(end), inputs.prob[t, b], embed(inputs.prediction[t, b]), following]
            if spec.gamma_input:
                x = [*x[:2], 0.97, *x[2:], 30 / 120, np.log(120)]
            carry, out = cell.apply({"params": params}, carry, jnp.stack(x))
            z = np.maximum(out, 0)
            np.testing.assert_allclose(pi_hat[t, b], (z @ rule["pi_hat"]["kernel"] + rule["pi_hat"]["bias"])[0], rtol=1e-9)
            logits = np.asarray(z @ rule["y_hat"]["kernel"] + rule["y_hat"]["bias"])
            np.testing.assert_allclose(np.exp(log_y_hat[t, b]), np.exp(logits) / np.exp(logits).sum(), rtol=1e-9)


def test_what_is_said_of_a_step_depends_on_the_rest_of_its_episode_alone(float64):
    end = np.zeros((T, 1), bool)
    end[2] = True
    inputs = of_env(some_inputs(), 0)._replace(end=jnp.asarray(end))
    rule = some_rule()

    def said(reward, prob, prediction, following):
        x = inputs._replace(reward=reward, prob=prob, prediction=prediction, next_prediction=following)
        pi_hat, log_y_hat = apply_rule(SPEC, rule, x)
        return jnp.concatenate([pi_hat[..., None], log_y_hat], -1)[:, 0]  # [T, 1 + m]

    slopes = jax.jit(jax.jacobian(said, (0, 1, 2, 3)))(*inputs[:1], *inputs[2:5])
    for which, slope in enumerate(slopes):
        reaches = (np.abs(slope).reshape(T, 1 + M, T, -1) > 1e-12).any((1, 3))
        for s, t in itertools.product(range(T), range(T)):
            expected = s <= t and not end[s:t].any()
            if which == 3 and end[t]:
                expected = False  # behind the end is another episode
            assert reaches[s, t] == expected, (which, s, t)


def test_environments_do_not_see_each_other():
    inputs, rule = some_inputs(), some_rule()
    apply = jax.jit(lambda inputs: apply_rule(SPEC, rule, inputs))
    together = apply(inputs)
    for b in range(B):
        for one, all_ in zip(apply(of_env(inputs, b)), together, strict=True):
            np.testing.assert_allclose(one[:, 0], all_[:, b], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("temporal", "number"), [("none", 203_946), ("relative", 205_482)])
def test_number_of_parameters_at_the_published_size(temporal, number):
    rule = jax.eval_shape(lambda key: init_rule(RuleSpec(temporal=temporal), key), jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(rule)) == number


def test_a_temporal_rule_that_ignores_the_age_is_lpgs(float64):
    aged = dataclasses.replace(SPEC, temporal="relative")
    rule = some_rule(aged)
    rule["inputs"]["kernel"] = rule["inputs"]["kernel"].at[-2:].set(0)
    plain = {**rule, "inputs": {**rule["inputs"], "kernel": rule["inputs"]["kernel"][:-2]}}
    expected = apply_rule(SPEC, plain, some_inputs())
    for updates, lifetime in ((0.0, 10.0), (249.0, 250.0)):
        for one, other in zip(apply_rule(aged, rule, some_inputs(updates=updates, lifetime=lifetime)), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12)


def test_the_age_is_told_as_a_share_and_a_logarithm(float64):
    relative, raw = (dataclasses.replace(SPEC, temporal=temporal) for temporal in ("relative", "raw"))
    rule = some_rule(relative)
    ages = [(0.0, 7.0), (6.0, 7.0), (100.0, 250.0)]
    said = [apply_rule(relative, rule, some_inputs(updates=n, lifetime=N))[0] for n, N in ages]
    for (n, N), one in zip(ages, said, strict=True):
        # The same weights on the raw numbers n/N and log N.
        np.testing.assert_allclose(one, apply_rule(raw, rule, some_inputs(updates=n / N, lifetime=np.log(N)))[0], rtol=1e-12)
    assert all(np.abs(one - other).max() > 1e-3 for one, other in itertools.combinations(said, 2))


def test_a_rule_of_zeros_says_nothing():
    rule = jax.tree.map(jnp.zeros_like, some_rule())
    pi_hat, log_y_hat = apply_rule(SPEC, rule, some_inputs())
    assert (pi_hat == 0).all()
    np.testing.assert_allclose(np.exp(log_y_hat), 1 / M, rtol=1e-6)
    core = core_of()
    before = some_params(core)
    after, _, _ = updated(core, some_rollout(), lpg.Hypers(**RATES, rule=rule), before)
    np.testing.assert_array_equal(kernel(after.actor), kernel(before.actor))
    assert (kernel(after.critic) != kernel(before.critic)).any()


# ---- The agent's update ---------------------------------------------------------------------------------------------


def kernel(params):
    return np.asarray(params["params"]["Dense_0"]["kernel"], np.float64)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def test_the_update_by_hand(float64):
    """Everything of one update but the rule itself, in NumPy: what it is fed, the two gradients, their bounds, the steps."""
    core, rollout, rule = core_of(), some_rollout(), some_rule()
    params = some_params(core)
    after, said, metrics = updated(core, rollout, lpg.Hypers(**RATES, rule=rule), params)

    obs, action = np.asarray(rollout.obs), np.asarray(rollout.action)
    pi, y = softmax(obs @ kernel(params.actor)), softmax(obs @ kernel(params.critic))
    prob = np.take_along_axis(pi[:-1], action[..., None], -1)[..., 0]
    pi_hat, log_y_hat = apply_rule(SPEC, rule, RuleInputs(rollout.reward, rollout.end, prob, y[:-1], y[1:]))
    np.testing.assert_allclose(said.pi_hat, pi_hat, rtol=1e-9)
    np.testing.assert_allclose(said.log_y_hat, log_y_hat, rtol=1e-9)

    chosen = np.eye(A)[action]
    up = np.einsum("tbo,tba->oa", obs[:-1], np.asarray(pi_hat)[..., None] * (chosen - pi[:-1])) / (T * B)
    log_ratio = np.log(y[:-1]) - log_y_hat
    centred = log_ratio - (y[:-1] * log_ratio).sum(-1, keepdims=True)
    towards = np.einsum("tbo,tbm->om", obs[:-1], y[:-1] * centred) / (T * B)
    for gradient, rate, before, new in (
        (-up, 2.0, params.actor, after.actor),
        (0.5 * towards, 3.0, params.critic, after.critic),
    ):
        norm = np.linalg.norm(gradient)
        assert norm > 0.02, "the bound must bind"
        np.testing.assert_allclose(kernel(new), kernel(before) - rate * gradient * 0.02 / norm, rtol=1e-7)
    np.testing.assert_allclose(metrics["loss_prediction"], (y[:-1] * log_ratio).sum(-1).mean(), rtol=1e-9)
    np.testing.assert_allclose(metrics["loss_policy"], -(np.log(prob) * pi_hat).mean(), rtol=1e-9)
    np.testing.assert_allclose(metrics["y_hat_square"], (np.exp(log_y_hat) ** 2).sum(-1).mean(), rtol=1e-9)


@pytest.mark.parametrize("hidden_sizes", [(), (8,)])
def test_with_advantages_for_pi_hat_it_is_the_policy_gradient(float64, hidden_sizes):
    setup = dataclasses.replace(TABULAR, hidden_sizes=hidden_sizes)
    core, rollout = core_of(setup), some_rollout()
    params, advantage = some_params(core), jnp.asarray(np.random.default_rng(1).normal(size=(T, B)))
    said = lpg.Said(advantage, jnp.log(jnp.full((T, B, M), 1 / M)))
    gradient = jax.jit(jax.grad(lambda p: lpg.agent_loss(core.agent, p, rollout, said, 0.0)[0]))(params)

    def reinforce(params):
        logits = core.agent.policy(params, rollout.obs[:-1]).logits
        log_prob = jax.nn.log_softmax(logits)[np.arange(T)[:, None], np.arange(B)[None], rollout.action]
        return -(advantage * log_prob).mean()

    expected = jax.jit(jax.grad(reinforce))(params)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)
    assert (ravel_pytree(gradient.critic)[0] == 0).all() and (ravel_pytree(gradient.actor)[0] != 0).any()


def test_the_divergence_is_zero_where_the_target_is_met_and_never_moves_the_policy(float64):
    core, rollout = core_of(), some_rollout()
    params = some_params(core)

    def gradient(log_y_hat):
        said = lpg.Said(jnp.zeros((T, B)), log_y_hat)
        loss = jax.value_and_grad(lambda p: lpg.agent_loss(core.agent, p, rollout, said, 1.0), has_aux=True)
        return loss(params)

    met = core.agent.prediction(params, rollout.obs[:-1])
    (loss, _), g = gradient(met)
    np.testing.assert_allclose(loss, 0, atol=1e-14)
    np.testing.assert_allclose(kernel(g.critic), 0, atol=1e-14)
    for seed in range(5):
        missed = jax.nn.log_softmax(jax.random.normal(jax.random.key(seed), met.shape, jnp.float64))
        (loss, _), g = gradient(missed)
        assert loss > 0.01 and np.abs(kernel(g.critic)).max() > 1e-3 and (kernel(g.actor) == 0).all()


def test_what_the_rule_is_fed_is_a_constant_of_the_agents_gradient(float64):
    core, rollout, rule = core_of(), some_rollout(), some_rule()
    params = some_params(core)

    def loss(params, frozen):
        return lpg.agent_loss(core.agent, params, rollout, lpg.ask_rule(core, rule, frozen, rollout, 0, 9), 0.5)[0]

    through = jax.grad(lambda params: loss(params, params))(params)
    apart = jax.grad(lambda params: loss(params, some_params(core)))(params)
    for one, other in zip(jax.tree.leaves(through), jax.tree.leaves(apart), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_the_agent_that_looks_up_is_the_linear_one_on_one_hot_observations():
    rng = np.random.default_rng(0)
    number, clock = rng.integers(0, 9, (T + 1, B)), rng.random((T + 1, B, 1)).astype(np.float32)
    one_hot = np.concatenate([np.eye(9, dtype=np.float32)[number], clock], -1)
    indexed = np.concatenate([number[..., None], clock], -1).astype(np.float32)
    linear = core_of(size=10)
    table = lpg.Core(
        lpg.make_agent(Box((2,), 0.0, (8.0, 1.0)), A, M, dataclasses.replace(TABULAR, torso="table")), SPEC, TABULAR
    )
    params = some_params(table)
    assert kernel(some_params(linear).actor).shape == params.actor.shape == (10, A)
    ends = []
    for core, obs, p in (
        (table, indexed, params),
        (linear, one_hot, jax.tree.map(lambda x: {"params": {"Dense_0": {"kernel": x}}}, params)),
    ):
        rollout = some_rollout()._replace(obs=jnp.asarray(obs))
        after, said, _ = updated(core, rollout, lpg.Hypers(**RATES, rule=some_rule()), p)
        ends.append((*jax.tree.leaves(after), said.pi_hat))
    for one, other in zip(*ends, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert np.abs(ends[0][0] - params.actor).max() > 0.01


def test_lifetimes():
    """After N updates nothing moves, whatever the others do; each agent is told its own age."""
    spec = dataclasses.replace(SPEC, temporal="relative")
    setup = dataclasses.replace(TABULAR, optimizer="adam")
    core, rollout = core_of(setup, spec), some_rollout()
    hypers = lpg.Hypers(**{**RATES, "learning_rate": 0.1, "predictor_lr": 0.1}, rule=some_rule(spec))
    params = some_params(core)
    start = start_of(core, params, hypers)

    @jax.jit
    def live(lifetime):
        def one(learner, n):
            learner, said, _ = lpg.inner_update(core, learner, rollout, hypers, n, lifetime)
            return learner, (ravel_pytree(learner)[0], said.pi_hat)

        return jax.lax.scan(one, start, jnp.arange(6))[1]

    lifetimes = jnp.array([2, 4, 6])
    learners, said = jax.vmap(live)(lifetimes)
    for i, lifetime in enumerate(lifetimes.tolist()):
        alone, said_alone = live(lifetime)
        np.testing.assert_allclose(learners[i], alone, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(said[i], said_alone, rtol=1e-3, atol=1e-5)
        moved = (np.diff(alone, axis=0) != 0).any(1)
        np.testing.assert_array_equal(moved, np.arange(1, 6) < lifetime)
    assert np.abs(said[0, 0] - said[2, 0]).max() > 1e-4, "they are told different lifetimes"


def test_agents_of_different_ages_are_told_their_own():
    """Side by side, of one rollout, with all pairs of age and lifetime; as each by itself."""
    spec = dataclasses.replace(SPEC, temporal="relative")
    core, rollout = core_of(spec=spec), some_rollout()
    rule, params = some_rule(spec), some_params(core)
    ask = jax.jit(lambda n, life: lpg.ask_rule(core, rule, params, rollout, n, life))
    updates, lifetimes = jnp.array([0.0, 3.0, 8.0, 0.0, 3.0, 8.0]), jnp.array([9.0, 9.0, 9.0, 30.0, 30.0, 30.0])
    together = jax.jit(jax.vmap(ask))(updates, lifetimes)
    for i, numbers in enumerate(zip(updates, lifetimes, strict=True)):
        for one, all_ in zip(ask(*numbers), together, strict=True):
            np.testing.assert_allclose(all_[i], one, rtol=1e-4, atol=1e-6)
    for i, j in itertools.combinations(range(6), 2):
        assert np.abs(together.pi_hat[i] - together.pi_hat[j]).max() > 1e-4, (i, j)


# ---- The algorithm --------------------------------------------------------------------------------------------------


def reward_rule():
    """By hand: π̂ is the tanh of the reward. The update gate is shut, so the state is its candidate."""
    spec = RuleSpec(num_predictions=2, hidden_size=2, embedding_size=1)
    rule = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), init_rule(spec, jax.random.key(0)))
    rule["inputs"]["kernel"][0, 4:] = (1, -1)  # of the candidates: the reward, and its negative
    rule["inputs"]["bias"][2:4] = -50
    rule["pi_hat"]["kernel"][:, 0] = (1, -1)
    return Learned("lpg", rule, convention_of(spec), {})


def learned_by(rule):
    """Probabilities of the best actions after a life of 100 updates."""
    env = Probe("responding")
    algorithm = make("lpg", env, {"learning_rate": 0.02}, rule=rule, num_envs=16, num_steps=4, hidden_sizes=(8,))
    hypers = algorithm.hypers.replace(anneal_env_steps=np.float32(64 * 100))
    state = algorithm.init(jax.random.key(0), hypers)
    run = jax.jit(lambda state: jax.lax.fori_loop(0, 100, lambda _, state: algorithm.step(state, hypers)[0], state))
    state = run(state)
    prob = jax.nn.softmax(algorithm.core.agent.policy(state.learner.params, jnp.array([[-1.0], [1.0]])).logits)
    return prob[jnp.arange(2), env.optimal_action(jnp.array([[-1.0], [1.0]]))]


def test_a_rule_that_pushes_by_the_reward_learns_and_one_that_pushes_against_it_unlearns():
    rule = reward_rule()
    assert (learned_by(rule) > 0.9).all()
    # The same weights of the authors' convention mean the opposite.
    assert (learned_by(rule._replace(convention={**rule.convention, "positive_pi_hat": LOWERS})) < 0.1).all()


def test_a_run_ends_with_its_lifetime():
    algorithm = make("lpg", Probe("responding"), rule=reward_rule(), num_envs=4, num_steps=4, hidden_sizes=(4,))
    hypers = algorithm.hypers.replace(anneal_env_steps=np.float32(48))
    state, step, params = algorithm.init(jax.random.key(0), hypers), jax.jit(algorithm.step), []
    for _ in range(5):
        state, _ = step(state, hypers)
        params.append(ravel_pytree(state.learner.params)[0])
    moved = [bool((one != other).any()) for one, other in itertools.pairwise(params)]
    assert moved == [True, True, False, False] and state.env_steps == 80


def test_rules_in_lanes():
    """Two rules as two lanes of one program."""
    rules = [reward_rule().params, jax.tree.map(lambda x: -x, reward_rule().params)]
    algorithm = make("lpg", Probe("acting"), rule=reward_rule(), num_envs=4, num_steps=4, hidden_sizes=(4,), optimizer="sgd")
    hypers = algorithm.hypers.replace(rule=jax.tree.map(lambda *x: jnp.stack(x), *rules), learning_rate=np.float32(0.5))
    axes = jax.tree.map(lambda _: None, algorithm.hypers.replace(rule=None)).replace(rule=0)
    state = algorithm.init(jax.random.key(0), algorithm.hypers)
    lanes, _ = jax.jit(jax.vmap(algorithm.step, (None, axes)))(state, hypers)
    for i, rule in enumerate(rules):
        alone, _ = jax.jit(algorithm.step)(state, hypers.replace(rule=rule))
        for one, other in zip(jax.tree.leaves(lanes.learner.params), jax.tree.leaves(alone.learner.params), strict=True):
            np.testing.assert_allclose(one[i], other, rtol=1e-4, atol=1e-6)


def test_from_the_command_line(tmp_path, answer, capsys):
    """Two seeds by a rule from a file; the record names its weights, and whoever changes them is told."""
    file = learned_files.save(tmp_path / "rule.npz", reward_rule())
    run = str(tmp_path / "run")
    budget = ["--total-env-steps", "300", "--num-evals", "1", "--eval-episodes", "2", "--setup.num-envs", "4"]
    words = [
        "train",
        "lpg",
        "--env",
        "grid/debug",
        "--preset",
        "none",
        "--rule",
        str(file),
        "--seeds",
        "2",
        "--out",
        run,
        *budget,
    ]
    assert cli._main([*words, "--setup.hidden-sizes", "8"]) == 0
    loaded = pgjax.load(run)
    assert loaded.config["rule"] == f"{file}@{learned_files.digest(file)[:12]}" and set(loaded.metrics.seed) == {0, 1}
    assert loaded.metrics.env_steps.max() == 320 and not loaded.metrics.nonfinite.any()
    assert cli._main(["eval", run, "--episodes", "2"]) == 0
    learned_files.save(file, reward_rule()._replace(params=jax.tree.map(lambda x: 2 * x, reward_rule().params)))
    capsys.readouterr()
    code, said = answer(["eval", run, "--episodes", "2"])
    assert code == 2 and "the weights of" in said


def test_requests_that_make_no_sense_are_refused():
    discrete, rule = Probe("acting"), reward_rule()
    with pytest.raises(RequestError, match="continuous actions"):
        make("lpg", Probe("acting", continuous=True), rule=rule)
    with pytest.raises(RequestError, match="torso = 'table' needs observations"):
        make("lpg", discrete, rule=rule, torso="table", hidden_sizes=())
    with pytest.raises(RequestError, match="nothing-like-it"):
        make("lpg", discrete, rule="lpg:nothing-like-it")
    with pytest.raises(RequestError, match="takes no rule"):
        make("ppo", discrete, rule=rule)
    for change, words in (
        ({"positive_pi_hat": "up"}, "positive_pi_hat = 'up'"),
        ({"hidden_size": 3}, "shapes"),
        ({"cell": "rnn"}, "cell = 'rnn'"),
        ({"lifetime_unit": "env_steps"}, "lifetime_unit"),
    ):
        with pytest.raises(RequestError, match=words):
            read_convention(rule.params, {**rule.convention, **change})
    without = {name: value for name, value in rule.convention.items() if name != "cell"}
    with pytest.raises(RequestError, match="lacks cell"):
        read_convention(rule.params, without)
