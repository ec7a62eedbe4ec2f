"""Whole runs: schedules, rows, chunks, evaluation, and the reduction of what is reported."""

import dataclasses
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from probe_envs import Probe

from pgjax import metrics, training
from pgjax.algorithms import a2c
from pgjax.errors import RequestError
from pgjax.evaluation import evaluate
from pgjax.spaces import Box, Discrete
from pgjax.training import make_schedule, make_train, run_rows
from pgjax.types import TimeStep

# ---- Schedules ------------------------------------------------------------------------------------------------------


def costing(env_steps):
    return SimpleNamespace(env_steps_per_iteration=env_steps)


def test_a_budget_is_rounded_up_to_whole_iterations():
    for budget, iterations in [(1, 1), (100, 1), (101, 2), (1000, 10)]:
        schedule = make_schedule(costing(100), budget, log_every=1, num_evals=0)
        assert schedule.num_iterations == iterations and schedule.env_steps == 100 * iterations
        assert schedule.iterations == (1,) * iterations and schedule.eval_rows == ()


def test_rows_hold_log_every_iterations_and_the_last_one_the_rest():
    schedule = make_schedule(costing(10), 110, log_every=4, num_evals=0)
    assert schedule.iterations == (4, 4, 3) and schedule.env_steps == 110


@pytest.mark.parametrize("iterations", [1, 7, 199, 200, 399, 400, 1000, 12345])
def test_about_two_hundred_rows_by_default(iterations):
    schedule = make_schedule(costing(8), 8 * iterations)
    assert sum(schedule.iterations) == iterations
    assert len(schedule.iterations) == iterations if iterations < 400 else 200 <= len(schedule.iterations) < 400
    assert len(set(schedule.iterations[:-1])) <= 1


@pytest.mark.parametrize("num_evals", [1, 3, 10, 300])
@pytest.mark.parametrize("iterations", [1, 5, 200, 1234])
def test_evaluations_are_evenly_spaced_and_the_last_is_at_the_end(iterations, num_evals):
    schedule = make_schedule(costing(1), iterations, num_evals=num_evals)
    rows, evals = len(schedule.iterations), np.array(schedule.eval_rows)
    assert len(evals) == min(num_evals, iterations) and evals[-1] == rows and evals[0] >= 1
    gaps = np.diff([0, *evals])
    assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


def test_impossible_budgets_are_refused_in_one_line():
    for changes, words in [
        (dict(total_env_steps=0), ["total_env_steps = 0", "100"]),
        (dict(total_env_steps=2**31), [f"total_env_steps = {2**31}", "int32"]),
        (dict(log_every=0), ["log_every = 0", "at least 1"]),
        (dict(num_evals=-1), ["num_evals = -1", "0 or more"]),
    ]:
        with pytest.raises(RequestError) as error:
            make_schedule(costing(100), **{"total_env_steps": 1000, **changes})
        assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)
    assert make_schedule(costing(1), 2**31 - 1).env_steps == 2**31 - 1


# ---- Rows -----------------------------------------------------------------------------------------------------------

# Episodes of five steps, batches of three: iterations 0, 2 and 5 see no end of an episode.
ALGORITHM = a2c.make(Probe("endless"), a2c.Setup(num_envs=2, num_steps=3, hidden_sizes=(3,)), a2c.Hypers(learning_rate=0.01))
ENDS = [0, 2, 0, 2, 2, 0]
R = 6


@pytest.fixture(scope="module")
def program():
    """The compiled chunk program for up to six rows, a starting state, and six steps taken by hand."""
    hypers = training.with_horizon(ALGORITHM.hypers, R * 6)
    state = start = jax.jit(ALGORITHM.init)(jax.random.key(0), hypers)
    step, manual = jax.jit(ALGORITHM.step), []
    for _ in range(R):
        state, row = step(state, hypers)
        manual.append({name: np.asarray(value) for name, value in row.items()})
    compiled = jax.jit(lambda state, iterations: run_rows(ALGORITHM, state, hypers, iterations))

    def run(state, *iterations):
        counts = np.zeros(R, np.int32)
        counts[: len(iterations)] = iterations
        state, rows = compiled(state, counts)
        return state, {name: np.asarray(value)[: len(iterations)] for name, value in rows.items()}

    return SimpleNamespace(run=run, start=start, end=state, manual=manual, hypers=hypers)


def same_bits(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


def test_chunks_of_any_length_give_the_same_bits(program):
    state, rows = program.run(program.start, 1, 1, 1, 2)
    middle, first = program.run(program.start, 1, 1)
    end, second = program.run(middle, 1, 2)
    same_bits(end, state)
    for name, value in rows.items():
        np.testing.assert_array_equal(np.concatenate([first[name], second[name]]), value, err_msg=name)
    same_bits(program.run(end)[0], end)


def test_rows_of_one_iteration_are_the_metrics_of_the_steps(program):
    state, rows = program.run(program.start, *[1] * R)
    assert set(rows) == set(program.manual[0])
    for name, value in rows.items():
        np.testing.assert_allclose(value, [row[name] for row in program.manual], rtol=1e-5, atol=1e-6, err_msg=name)
        assert value.dtype == program.manual[0][name].dtype
    np.testing.assert_array_equal(rows["episodes"], ENDS)
    np.testing.assert_array_equal(np.isnan(rows["episode_return"]), np.array(ENDS) == 0)
    np.testing.assert_allclose(rows["episode_return"][1], 5)
    for name, value in rows.items():
        assert name.startswith("episode_") or np.isfinite(value).all(), name
    np.testing.assert_allclose(state.learner.params.actor, program.end.learner.params.actor, rtol=1e-5)


def test_rows_of_several_iterations_reduce_them_by_name(program):
    _, rows = program.run(program.start, 1, 3, 2)
    for row, part in enumerate([slice(0, 1), slice(1, 4), slice(4, 6)]):
        steps = {name: np.array([step[name] for step in program.manual[part]]) for name in rows}
        for name, values in steps.items():
            if name == "env_steps":
                expected = values[-1]
            elif name == "episodes":
                expected = values.sum()
            elif name.startswith("episode_"):
                ended = steps["episodes"] > 0
                expected = np.average(values[ended], weights=steps["episodes"][ended]) if ended.any() else np.nan
            elif name in ("kl_max", "ratio_max", "nonfinite"):
                expected = values.max()
            elif name == "ratio_min":
                expected = values.min()
            else:
                expected = values.mean()
            np.testing.assert_allclose(rows[name][row], expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_reduction_of_made_up_metrics():
    steps = [
        dict(env_steps=4, episodes=1.0, episode_return=10.0, gap_max=3.0, gap_min=-1.0, loss=1.0, nonfinite=0.0),
        dict(env_steps=8, episodes=0.0, episode_return=np.nan, gap_max=5.0, gap_min=2.0, loss=2.0, nonfinite=1.0),
        dict(env_steps=12, episodes=3.0, episode_return=2.0, gap_max=-4.0, gap_min=0.0, loss=6.0, nonfinite=0.0),
    ]
    steps = [{**{k: np.float32(v) for k, v in step.items()}, "env_steps": np.int32(step["env_steps"])} for step in steps]
    row = metrics.start_row(steps[0])
    for step in steps:
        row = metrics.add_to_row(row, step)
    row = metrics.columns(metrics.finish_row(row, jnp.int32(3)), steps[0])
    expected = dict(env_steps=12, episodes=4, episode_return=4.0, gap_max=5, gap_min=-1, loss=3, nonfinite=1)
    assert {name: float(value) for name, value in row.items()} == expected


def test_lanes_are_averaged_without_the_non_finite_ones():
    nan = np.nan
    rows = {
        "env_steps": np.array([[10, 20], [10, 20], [10, 20]]),
        "nonfinite": np.array([[0, 0], [0, 1], [0, 0]]),
        "episodes": np.array([[1.0, 2.0], [3.0, 9.0], [0.0, 2.0]]),
        "episode_return": np.array([[8.0, 1.0], [4.0, 1e9], [nan, 3.0]]),
        "episode_none": np.array([[nan, nan], [nan, 7.0], [nan, nan]]),
        "loss": np.array([[1.0, 2.0], [2.0, np.inf], [6.0, 4.0]]),
        "kl_max": np.array([[1.0, 2.0], [9.0, 99.0], [6.0, 4.0]]),
        "ratio_min": np.array([[1.0, 2.0], [0.5, -99.0], [6.0, 4.0]]),
    }
    reduced = metrics.mean_over_lanes(rows)
    expected = {
        "env_steps": [10, 20],
        "nonfinite": [0, 1],
        "episodes": [4, 4],
        "episode_return": [(8 + 3 * 4) / 4, 2],
        "episode_none": [nan, nan],
        "loss": [3, 3],
        "kl_max": [9, 4],
        "ratio_min": [0.5, 2],
    }
    assert set(reduced) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(reduced[name], value, err_msg=name)


def test_where_every_lane_is_non_finite_the_average_is_nan():
    nan = np.nan
    rows = {
        "env_steps": np.array([[10, 20], [10, 20]]),
        "nonfinite": np.array([[0, 1], [0, 1]]),
        "episodes": np.array([[1.0, 2.0], [3.0, 4.0]]),
        "episode_return": np.array([[8.0, 1.0], [4.0, 5.0]]),
        "loss": np.array([[1.0, np.inf], [3.0, 2.0]]),
        "kl_max": np.array([[1.0, np.inf], [3.0, 2.0]]),
        "ratio_min": np.array([[1.0, -np.inf], [3.0, 2.0]]),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reduced = metrics.mean_over_lanes(rows)
    expected = {
        "env_steps": [10, 20],
        "nonfinite": [0, 1],
        "episodes": [4, 0],
        "episode_return": [5, nan],
        "loss": [2, nan],
        "kl_max": [3, nan],
        "ratio_min": [1, nan],
    }
    assert set(reduced) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(reduced[name], value, err_msg=name)


# ---- make_train -----------------------------------------------------------------------------------------------------

KEY = jax.random.key(7)
EVALUATED = dict(log_every=2, num_evals=2, eval_episodes=3)


@pytest.fixture(scope="module")
def evaluated():
    return jax.jit(make_train(ALGORITHM, R * 6 - 1, **EVALUATED))(KEY, ALGORITHM.hypers)


def test_a_run_is_its_steps(evaluated, program):
    """The learning rate falls over the budget that was rounded up; the key is the lane's training stream."""
    state, rows = evaluated
    step = jax.jit(ALGORITHM.step)
    manual = ALGORITHM.init(training.lane_keys(KEY)[0], program.hypers)
    rates, losses = [], []
    for _ in range(R):
        manual, row = step(manual, program.hypers)
        rates.append(row["learning_rate"])
        losses.append(row["loss_value"])
    np.testing.assert_allclose(rates, 0.01 * np.arange(R, 0, -1) / R, rtol=1e-6)
    np.testing.assert_allclose(rows["learning_rate"], np.reshape(rates, (3, 2)).mean(1), rtol=1e-6)
    np.testing.assert_allclose(rows["loss_value"], np.reshape(losses, (3, 2)).mean(1), rtol=1e-5)
    np.testing.assert_array_equal(rows["env_steps"], [12, 24, 36])
    np.testing.assert_array_equal(rows["episodes"], np.reshape(ENDS, (3, 2)).sum(1))
    for one, other in zip(state.learner.params, manual.learner.params, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
    assert (jax.random.key_data(state.key) == jax.random.key_data(manual.key)).all()
    np.testing.assert_array_equal(rows["evaluation_env_steps"], [24, 36])
    assert rows["evaluations"].mode_return.shape == (2, 3)
    for name in ("mode", "sample"):
        assert (getattr(rows["evaluations"], f"{name}_length") == 5).all()
        assert (getattr(rows["evaluations"], f"{name}_return") == 5).all()


def test_evaluation_changes_nothing_and_lanes_are_single_runs(evaluated):
    train = make_train(ALGORITHM, R * 6 - 1, log_every=2)
    states, rows = jax.jit(jax.vmap(train, (0, None)))(jnp.stack([KEY, jax.random.key(8)]), ALGORITHM.hypers)
    state, rows_evaluated = evaluated
    assert set(rows) == set(rows_evaluated) - {"evaluations", "evaluation_env_steps"}
    for name, value in rows.items():
        np.testing.assert_allclose(value[0], rows_evaluated[name], rtol=1e-5, atol=1e-6, err_msg=name)
    for one, other in zip(states.learner.params, state.learner.params, strict=True):
        np.testing.assert_allclose(one[0], other, rtol=1e-5, atol=1e-7)
        assert (np.asarray(one[0]) != np.asarray(one[1])).any()


def test_evaluation_on_or_off_gives_the_same_bits(evaluated):
    alone = jax.jit(make_train(ALGORITHM, R * 6 - 1, log_every=2, num_evals=0))(KEY, ALGORITHM.hypers)
    same_bits(alone[0], evaluated[0])
    for name, value in alone[1].items():
        np.testing.assert_array_equal(value, evaluated[1][name], err_msg=name)


def test_training_and_evaluation_draw_from_streams_of_their_own():
    keys = [KEY, *training.lane_keys(KEY), *training.lane_keys(jax.random.key(8))]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 5


def test_a_horizon_that_was_given_stays():
    hypers = ALGORITHM.hypers
    assert training.with_horizon(hypers, 500).anneal_env_steps == 500
    given = hypers.replace(anneal_env_steps=np.float32(900))
    assert training.with_horizon(given, 500).anneal_env_steps == 900


# ---- Evaluation -----------------------------------------------------------------------------------------------------


@struct.dataclass
class CountState:
    left: jax.Array
    start: jax.Array
    later: jax.Array


@dataclasses.dataclass(frozen=True)
class Countdown:
    """Episodes of 1 to 5 steps, as drawn; odd ones terminate, even ones are cut. The reward is the action.

    Every episode but the first of an environment pays NaN, so that whoever counts it shows it.
    """

    name = "countdown"
    observation_space = Box((1,))
    action_space = Discrete(2)
    max_episode_steps = 5
    default_params = np.float32(1)
    host_callback = False

    def reset(self, key, params):
        start = jax.vmap(lambda key: jax.random.randint(key, (), 1, 6))(key)
        return CountState(start, start, start < 0), start[:, None].astype(jnp.float32)

    def step(self, key, env_state, action, params):
        left = env_state.left - 1
        ended, odd = left == 0, env_state.start % 2 == 1
        fresh, _ = self.reset(key, params)
        reward = jnp.where(env_state.later, jnp.nan, params * action)
        start = jnp.where(ended, fresh.start, env_state.start)
        after = CountState(jnp.where(ended, fresh.start, left), start, env_state.later | ended)
        obs = after.left[:, None].astype(jnp.float32)
        return after, TimeStep(obs, reward, ended & odd, ended & ~odd, left[:, None].astype(jnp.float32), {})

    def refresh(self, key, env_state, params):
        raise AssertionError("evaluation starts from reset")


def test_evaluation_plays_one_episode_per_environment_with_the_mode_and_with_samples():
    env, episodes = Countdown(), 400

    def act(policy, obs, key):
        # The most likely action is 1, but it is drawn with probability ``policy`` only.
        if key is None:
            return jnp.ones(len(obs), jnp.int32)
        return jax.random.bernoulli(key, policy, (len(obs),)).astype(jnp.int32)

    run = jax.jit(lambda policy, key, params: evaluate(SimpleNamespace(env=env, act=act), policy, key, episodes, params))
    result = jax.tree.map(np.asarray, run(0.7, jax.random.key(0), np.float32(1)))
    lengths = result.mode_length
    assert set(lengths) == {1, 2, 3, 4, 5} and lengths.dtype == np.int32
    # Drawn evenly: each length within four standard deviations of a fifth.
    counts = np.bincount(lengths)[1:]
    assert (np.abs(counts - episodes / 5) < 4 * np.sqrt(episodes * 0.2 * 0.8)).all()
    np.testing.assert_array_equal(result.sample_length, lengths)
    np.testing.assert_array_equal(result.mode_return, lengths)
    assert (result.sample_return <= lengths).all() and (result.sample_return < lengths).any()
    steps = lengths.sum()
    assert abs(result.sample_return.sum() - 0.7 * steps) < 4 * np.sqrt(steps * 0.21)

    same_bits(result, run(0.7, jax.random.key(0), np.float32(1)))
    other = run(0.7, jax.random.key(1), np.float32(1))
    assert (other.mode_length != lengths).any()
    np.testing.assert_array_equal(run(0.7, jax.random.key(0), np.float32(3)).mode_return, 3 * lengths)
