"""LPO and TA-LPO: the drift by hand and in NumPy, its conditions for any weights, and its plug into PPO."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probe_envs import Probe

import pgjax
from pgjax import cli
from pgjax.algorithms import lpo, ppo
from pgjax.checks.mirror_learning import check_drift
from pgjax.errors import RequestError
from pgjax.learned import evolution
from pgjax.learned import files as learned_files
from pgjax.learned.files import Learned

RATIO, ADVANTAGE = (x.ravel() for x in np.meshgrid(np.exp(np.linspace(-2, 2, 41)), np.linspace(-8, 8, 33)))
LOG_RATIO = np.log(RATIO)
CONVENTIONS = {
    "ppo": lpo.Convention(),
    "scratch": lpo.Convention(form="scratch"),
    "temporal": lpo.Convention(temporal=True),
    "temporal scratch": lpo.Convention(form="scratch", temporal=True),
    "clipped features": lpo.Convention(feature_clip=2.0),
    "ratio first": lpo.Convention(features="ratio_first"),
}


def random_params(seed, convention, hidden=16, dtype=np.float64):
    rng = np.random.default_rng(seed)
    shapes = {"hidden": (convention.num_features, hidden), "out": (hidden, 1)}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def numpy_drift(params, log_ratio, advantage, progress, convention):
    """Section 3 of the paper in NumPy, one feature after the other."""
    r, l, a = np.exp(log_ratio), log_ratio, advantage
    if convention.features == "authors":
        x = [l, l**2, 1 - r, (1 - r) ** 2, a * l, a * l**2, a * (1 - r), a * (1 - r) ** 2]
    else:
        x = [r - 1, (r - 1) ** 2, l, l**2, a * (r - 1), a * (r - 1) ** 2, a * l, a * l**2]
    if convention.temporal:
        x = x + [progress * feature for feature in x]
    x = np.stack(x, 1)
    if convention.feature_clip:
        x = np.minimum(np.maximum(x, -convention.feature_clip), convention.feature_clip)
    g = (np.tanh(x @ params["hidden"]) @ params["out"])[:, 0]
    ppo_drift = 0.0
    if convention.form == "ppo":
        ppo_drift = np.maximum((r - np.clip(r, 0.8, 1.2)) * a, 0)
    return np.maximum(ppo_drift + g - 1e-4, 0)


@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_drift_and_objective_equal_numpy(name, progress, float64):
    convention = CONVENTIONS[name]
    params = random_params(0, convention)
    expected = numpy_drift(params, LOG_RATIO, ADVANTAGE, progress, convention)
    f = lpo.drift(params, LOG_RATIO, ADVANTAGE, progress, convention)
    assert f.shape == ADVANTAGE.shape and (expected > 0.01).any() and (expected == 0).any()
    np.testing.assert_allclose(f, expected, rtol=1e-9, atol=1e-12)
    gain = lpo.surrogate(params, LOG_RATIO, ADVANTAGE, progress, convention)
    np.testing.assert_allclose(gain, RATIO * ADVANTAGE - expected, rtol=1e-9, atol=1e-11)


def test_a_drift_worked_out_by_hand(float64):
    """Two hidden units that see log ρ and Â (1 - ρ): with ρ = e, Â = 2 the features are 1 and 2 (1 - e)."""
    hidden = np.zeros((8, 2))
    hidden[0, 0], hidden[6, 1] = 0.5, -0.25
    params = {"hidden": hidden, "out": np.array([[3.0], [2.0]])}
    # g = 3 tanh 0.5 + 2 tanh(0.5 (e - 1)) = 1.386351 + 1.391630; PPO's drift (e - 1.2) 2 = 3.036564
    g = 3 * 0.46211716 + 2 * 0.69581479
    f = lpo.drift(params, jnp.array([1.0]), jnp.array([2.0]))
    np.testing.assert_allclose(f, [3.03656366 + g - 1e-4], rtol=1e-6)
    f = lpo.drift(params, jnp.array([1.0]), jnp.array([2.0]), convention=lpo.Convention(form="scratch"))
    np.testing.assert_allclose(f, [g - 1e-4], rtol=1e-6)


@pytest.mark.parametrize("name", CONVENTIONS)
def test_any_weights_at_any_time_make_a_mirror_learning_step(name):
    convention = CONVENTIONS[name]
    times = (0.0, 0.37, 1.0) if convention.temporal else (0.0,)
    for seed, progress in enumerate(times):
        params = random_params(seed, convention)
        # With either sign: what is wrongly left of the network at the old policy is below ξ with one of them.
        for out in (params["out"], -params["out"]):
            report = check_drift(lpo.objective({**params, "out": out}, convention), progress=progress)
            assert report.valid, report


def test_a_bias_would_not_be_one():
    """What the check above guards against: a feature that is not zero at the old policy, such as progress alone."""
    params = random_params(0, CONVENTIONS["scratch"])

    def biased(sample, params):
        x = lpo.features(sample.log_ratio, sample.advantage) + 0.3
        return jnp.exp(sample.log_ratio) * sample.advantage - jax.nn.relu(lpo.network(params, x))

    assert not check_drift(pgjax.Objective(biased, params)).valid


def test_without_weights_it_is_ppo_within_xi(float64):
    params = jax.tree.map(jnp.zeros_like, random_params(0, CONVENTIONS["ppo"]))
    clipped = np.minimum(RATIO * ADVANTAGE, np.clip(RATIO, 0.8, 1.2) * ADVANTAGE)
    penalty = np.maximum((RATIO - np.clip(RATIO, 0.8, 1.2)) * ADVANTAGE, 0)
    gain = lpo.surrogate(params, LOG_RATIO, ADVANTAGE)
    np.testing.assert_allclose(gain, clipped + np.minimum(penalty, 1e-4), atol=1e-12)
    assert np.abs(gain - clipped).max() <= 1e-4 + 1e-12
    np.testing.assert_array_equal(lpo.drift(params, LOG_RATIO, ADVANTAGE, convention=CONVENTIONS["scratch"]), 0)


def test_the_shipped_start_is_ppo_and_can_be_left():
    """With both kernels zero, members m + noise and m - noise are the same drift, so equal fitness and no direction."""
    template = lpo.init_params(jax.random.key(0))
    assert template["hidden"].shape == (8, 128) and template["out"].shape == (128, 1)
    assert sum(x.size for x in template.values()) == 1152
    np.testing.assert_allclose(template["hidden"].std(), 8**-0.5, rtol=0.1)
    l, a = (jnp.asarray(x, jnp.float32) for x in (LOG_RATIO, ADVANTAGE))

    def moves(start):
        es = evolution.open_es(template, 8, 0.04)
        population, state = es.ask(es.init(jax.random.key(0), start), jax.random.key(1))
        # One member at a time: batched, rounding would differ, and Adam makes whole steps of crumbs.
        drifts = jax.lax.map(lambda params: lpo.drift(params, l, a), population)
        # Any fitness that depends on the drift alone, and pairs share their keys.
        fitness = -((drifts - 0.3) ** 2).mean(1)
        gap = np.abs(drifts[0::2] - drifts[1::2]).max()
        moved = es.mean(es.tell(state, population, fitness, jax.random.key(2)))
        return gap, max(float(np.abs(moved[name] - start[name]).max()) for name in start)

    assert moves(jax.tree.map(jnp.zeros_like, template)) == (0, 0), "zero should be a point that cannot be left"
    gap, moved = moves(template)
    assert gap > 0.05 and moved > 1e-3
    x = lpo.features(l, a)
    params = random_params(0, CONVENTIONS["ppo"], dtype=np.float32)
    minus = jax.tree.map(lambda p: -p, params)
    np.testing.assert_array_equal(lpo.network(params, x), lpo.network(minus, x))


def test_time_varies_the_first_layer(float64):
    """W = W1 + progress W2: LPO itself with W2 = 0, and at the start whatever W2; affine in between."""
    convention = CONVENTIONS["temporal"]
    params = random_params(1, convention)
    first, second = params["hidden"][:8], params["hidden"][8:]

    def static(kernel):
        return lpo.surrogate({"hidden": kernel, "out": params["out"]}, LOG_RATIO, ADVANTAGE, 0.9)

    def at(progress, hidden=params["hidden"]):
        return lpo.surrogate({"hidden": hidden, "out": params["out"]}, LOG_RATIO, ADVANTAGE, progress, convention)

    without = np.concatenate([first, 0 * second])
    for progress in (0.0, 0.4, 1.0):
        np.testing.assert_allclose(at(progress), static(first + progress * second), rtol=1e-9, atol=1e-11)
        np.testing.assert_array_equal(at(progress, without), at(0.0, without))
    np.testing.assert_allclose(at(0.7, without), static(first), rtol=1e-12, atol=1e-13)
    assert np.abs(at(0.0) - at(1.0)).max() > 0.1
    # Before the hidden layer's tanh, which one unit and an output of 1 leave to be undone.
    unit = {"hidden": 1e-3 * params["hidden"][:, :1], "out": np.ones((1, 1))}
    x = [np.arctanh(lpo.network(unit, lpo.features(LOG_RATIO, ADVANTAGE), p)) for p in (0.0, 0.5, 1.0)]
    assert np.abs(x[2] - x[0]).max() > 1e-3
    np.testing.assert_allclose(x[1], (x[0] + x[2]) / 2, rtol=1e-12, atol=1e-13)


def test_time_that_has_no_weights_changes_no_bit():
    """In float32 and compiled, as runs have it."""
    convention = CONVENTIONS["temporal"]
    params = jax.tree.map(jnp.float32, random_params(1, convention))
    first, second = params["hidden"][:8], params["hidden"][8:]
    l, a = (jnp.asarray(x, jnp.float32) for x in (LOG_RATIO, ADVANTAGE))

    @jax.jit
    def at(progress, first, second):
        hidden = {"hidden": jnp.concatenate([first, second]), "out": params["out"]}
        return jax.value_and_grad(lambda l: lpo.surrogate(hidden, l, a, progress, convention).sum())(l)

    @jax.jit
    def static(kernel):
        hidden = {"hidden": kernel, "out": params["out"]}
        return jax.value_and_grad(lambda l: lpo.surrogate(hidden, l, a).sum())(l)

    def same(one, other):
        for x, y in zip(one, other, strict=True):
            np.testing.assert_array_equal(x, y)

    for progress in (0.0, 0.37, 1.0):
        same(at(progress, first, 0 * second), static(first))
    same(at(0.0, first, second), static(first))
    same(at(1.0, first, second), static(first + second))
    assert np.abs(at(1.0, first, second)[1] - static(first)[1]).max() > 0.1


@pytest.mark.parametrize("temporal", [False, True])
def test_the_other_order_of_features_is_the_same_drift(temporal, float64):
    authors = lpo.Convention(temporal=temporal)
    params = random_params(2, authors)
    other_params, other = lpo.convert(params, authors, "ratio_first")
    assert other.features == "ratio_first" and np.abs(other_params["hidden"] - params["hidden"]).max() > 0.1
    expected = numpy_drift(params, LOG_RATIO, ADVANTAGE, 0.3, authors)
    np.testing.assert_allclose(lpo.drift(other_params, LOG_RATIO, ADVANTAGE, 0.3, other), expected, rtol=1e-9, atol=1e-12)
    # Read in the wrong convention they are another drift.
    assert np.abs(lpo.drift(params, LOG_RATIO, ADVANTAGE, 0.3, other) - expected).max() > 0.1
    back, again = lpo.convert(other_params, other, "authors")
    assert again == authors
    np.testing.assert_array_equal(back["hidden"], params["hidden"])


def test_vectors_of_the_authors_trainer():
    params = lpo.unflatten(np.arange(1152))
    assert params["hidden"].shape == (8, 128) and params["out"].shape == (128, 1)
    assert params["hidden"][1, 0] == 128 and params["out"][0, 0] == 1024
    assert lpo.unflatten(np.zeros(17 * 4), temporal=True)["hidden"].shape == (16, 4)
    with pytest.raises(RequestError, match="no drift network"):
        lpo.unflatten(np.zeros(1153))


@pytest.mark.parametrize("name", ["ppo", "scratch", "temporal"])
def test_far_from_the_old_policy_nothing_overflows(name):
    convention = CONVENTIONS[name]
    params = random_params(0, convention, dtype=np.float32)
    log_ratio, advantage = (x.ravel() for x in np.meshgrid(np.linspace(-30, 30, 61), np.linspace(-8, 8, 17)))
    log_ratio, advantage = log_ratio.astype(np.float32), advantage.astype(np.float32)

    def total(log_ratio):
        return lpo.surrogate(params, log_ratio, advantage, 0.5, convention).sum()

    assert np.isfinite(lpo.surrogate(params, log_ratio, advantage, 0.5, convention)).all()
    slope = np.asarray(jax.grad(total)(log_ratio))
    assert np.isfinite(slope).all()
    if name != "scratch":
        # Far out PPO's clip holds, the network being saturated.
        far = (np.abs(log_ratio) > 10) & ((log_ratio > 0) == (advantage > 0)) & (advantage != 0)
        assert np.abs(slope[far]).max() < 1e-3


@pytest.mark.parametrize("name", CONVENTIONS)
def test_at_the_old_policy_the_slope_is_the_advantage(float64, name):
    """Whatever the weights are: the gradient there is that of the policy gradient."""
    params, advantage = random_params(3, CONVENTIONS[name]), jnp.linspace(-3.0, 3.0, 25)

    def total(log_ratio):
        return lpo.surrogate(params, log_ratio, advantage, 0.4, CONVENTIONS[name]).sum()

    np.testing.assert_array_equal(jax.grad(total)(jnp.zeros(25)), advantage)


def test_the_upper_clip_of_ppo_itself_and_its_schedule():
    convention = lpo.Convention(temporal=True)
    params = jax.tree.map(jnp.zeros_like, lpo.init_params(jax.random.key(0), temporal=True))
    np.testing.assert_allclose(lpo.upper_clip(params, convention, jnp.array([0.0, 0.5, 1.0])), 1.2, atol=0.01)
    # A unit that sees progress times Â (ρ - 1) and grows with it shuts the door earlier and earlier.
    hidden, out = np.zeros((16, 1), np.float32), np.full((1, 1), 2.0, np.float32)
    hidden[14, 0] = -1.0
    clips = lpo.upper_clip({"hidden": jnp.asarray(hidden), "out": jnp.asarray(out)}, convention, jnp.linspace(0, 1, 5))
    assert clips[0] == pytest.approx(1.2, abs=0.01) and clips[-1] < 1.01 and (np.diff(clips) <= 0).all()
    # A drift that rises to a plateau: dJ/dρ is 1 - 5 sech²(5 (ρ - 1)), which is 1 again far out, and falls below 0.1 at once.
    hidden[:, 0] = 0
    hidden[6, 0] = -5.0
    bump = {"hidden": jnp.asarray(hidden), "out": jnp.ones((1, 1), jnp.float32)}
    scratch = lpo.Convention(temporal=True, form="scratch")
    assert lpo.upper_clip(bump, scratch, 0.0) < 1.01
    slope = jax.grad(lambda l: lpo.surrogate(bump, l, jnp.ones(1), 0.0, scratch).sum())(jnp.log(jnp.array([3.0]))) / 3.0
    np.testing.assert_allclose(slope, 1.0, atol=1e-3)


def test_plugged_into_ppo_its_gradient_is_that_of_the_formula():
    """One step from the old policy's batch, against PPO with the same drift written out as a bare function."""
    convention = lpo.Convention(temporal=True)
    params = random_params(3, convention, dtype=np.float32)
    env, setup = Probe("responding", continuous=True), ppo.Setup(num_envs=4, num_steps=8, hidden_sizes=(4,), num_epochs=3)
    ends = []
    for plug in (
        lpo.objective(params, convention),
        lambda l, a: jnp.exp(l) * a - jnp.maximum(_written_out(params, l, a, 0.25), 0),
        None,
    ):
        algorithm = lpo.make(env, setup, ppo.Hypers(learning_rate=0.05, anneal_env_steps=128.0), objective=plug)
        state = algorithm.init(jax.random.key(0), algorithm.hypers).replace(env_steps=jnp.int32(32))
        state, _ = jax.jit(algorithm.step)(state, algorithm.hypers)
        ends.append(state.learner.params.actor)
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-3, atol=1e-5)
    assert np.abs(ends[0] - ends[2]).max() > 1e-3, "the drift made no difference"


def _written_out(params, l, a, progress):
    r = jnp.exp(l)
    x = [l, l**2, 1 - r, (1 - r) ** 2, a * l, a * l**2, a * (1 - r), a * (1 - r) ** 2]
    x = jnp.stack([*x, *(progress * feature for feature in x)], -1)
    clip = jax.nn.relu((r - jnp.clip(r, 0.8, 1.2)) * a)
    return clip + (jnp.tanh(x @ params["hidden"]) @ params["out"])[:, 0] - 1e-4


def test_members_of_a_population_train_side_by_side():
    convention = lpo.Convention()
    members = [random_params(seed, convention, dtype=np.float32) for seed in range(3)]
    env, setup = Probe("responding", continuous=True), ppo.Setup(num_envs=4, num_steps=8, hidden_sizes=(4,))
    algorithm = ppo.make(env, setup, ppo.Hypers(learning_rate=0.05), objective=lpo.objective(members[0], convention))
    step = jax.jit(lambda params: algorithm.step(state, algorithm.hypers.replace(objective=params))[0].learner.params.actor)
    state = algorithm.init(jax.random.key(0), algorithm.hypers)
    together = jax.vmap(step)(jax.tree.map(lambda *x: jnp.stack(x), *members))
    for params, actor in zip(members, together, strict=True):
        np.testing.assert_allclose(step(params), actor, rtol=1e-4, atol=1e-6)
    assert np.abs(together[0] - together[1]).max() > 1e-3


def test_leaving_the_range_of_meta_training_is_reported():
    convention = lpo.Convention()
    params = random_params(0, convention, dtype=np.float32)
    env, setup = Probe("responding", continuous=True), ppo.Setup(num_envs=4, num_steps=8, hidden_sizes=(4,), num_minibatches=1)

    def share(seen):
        provenance = {"range": seen} if seen else {}
        learned = Learned("lpo", params, dataclasses.asdict(convention), provenance)
        algorithm = ppo.make(env, setup, ppo.Hypers(learning_rate=0.0), objective=lpo.objective(learned))
        state = algorithm.init(jax.random.key(0), algorithm.hypers)
        return jax.jit(algorithm.step)(state, algorithm.hypers)[1].get("outside_range")

    assert share(None) is None
    assert share({"log_ratio": [-1, 1], "advantage": [-100, 100]}) == 0
    assert share({"log_ratio": [0.5, 1], "advantage": [-100, 100]}) == 1
    # Standardised advantages: some are negative, some are not, in every minibatch.
    half = share({"log_ratio": [-1, 1], "advantage": [0, 100]})
    assert 0 < half < 1


@pytest.mark.parametrize(
    ("learned", "convention", "words"),
    [
        (Learned("lpg", {}, {}, {}), None, ["'lpg'", "'lpo'"]),
        (Learned("lpo", {}, {"for": 1}, {}), None, ["convention.for", "form"]),
        (Learned("lpo", {}, {"form": "ppos"}, {}), None, ["'ppos'", "scratch"]),
        (Learned("lpo", {}, {"xi": 0.0}, {}), None, ["xi = 0.0"]),
        ({"hidden": np.zeros((8, 4)), "out": np.zeros((4, 1))}, lpo.Convention(temporal=True), ["(8, 4)", "[16, H]"]),
        ({"hidden": np.zeros((8, 4)), "out": np.zeros((5, 1))}, None, ["(5, 1)"]),
        ({"kernel": np.zeros((8, 4))}, None, ["kernel"]),
    ],
)
def test_weights_that_do_not_fit_are_refused(learned, convention, words):
    with pytest.raises(RequestError) as raised:
        lpo.objective(learned, convention)
    for word in words:
        assert word in str(raised.value)


def test_a_file_brings_its_own_convention(tmp_path):
    convention = lpo.Convention(form="scratch", temporal=True, xi=1e-3)
    params = random_params(4, convention, dtype=np.float32)
    path = learned_files.save(tmp_path / "ta.npz", Learned("lpo", params, dataclasses.asdict(convention), {}))
    plug = lpo.objective(learned_files.load(path, "lpo"))
    from pgjax.types import Sample

    sample = Sample(jnp.asarray(LOG_RATIO), jnp.asarray(ADVANTAGE), None, None, jnp.float32(0.6))
    expected = RATIO * ADVANTAGE - np.maximum(numpy_drift(params, LOG_RATIO, ADVANTAGE, 0.6, convention) + 1e-4 - 1e-3, 0)
    np.testing.assert_allclose(plug.fn(sample, plug.params), expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("name", sorted(learned_files.shipped("lpo")))
def test_a_shipped_drift_is_a_mirror_learning_step_that_evolution_moved(name):
    learned = learned_files.load(f"lpo:{name}", "lpo")
    objective, said = lpo.objective(learned), learned.provenance
    assert all(check_drift(objective, progress=progress).valid for progress in (0.0, 0.5, 1.0))
    assert said["sessions"][0]["command"].startswith("pgjax meta-train lpo ")
    assert said["steps_done"] == said["request"]["steps"] == len(said["curve"]["value"])
    convention = lpo.Convention.from_dict(learned.convention)
    assert convention.temporal == (name == "ta") == (len(set(said["upper_clip"]["ratio"])) > 1)
    # It says something else than PPO on samples as they come in meta-training.
    low, high = said["range"]["log_ratio"]
    log_ratio, advantage = (jnp.asarray(x.ravel()) for x in np.meshgrid(np.linspace(low, high, 40), np.linspace(-3, 3, 40)))
    ours = lpo.surrogate(objective.params, log_ratio, advantage, 0.0, convention)
    assert jnp.abs(ours - ppo.clip_surrogate(log_ratio, advantage, 0.2)).max() > 0.01


def test_a_drift_with_a_schedule_of_its_own_beside_a_falling_rate_is_noticed(tmp_path, capsys):
    run = ["train", "ppo", "--env", "gymnax/CartPole-v1", "--total-env-steps", "64", "--num-evals", "0"]
    run += ["--setup.num-envs", "2", "--setup.num-steps", "16", "--setup.hidden-sizes", "4"]

    def said(out, *more):
        assert cli._main([*run, "--out", str(tmp_path / out), *more]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: lpo:")]

    (line,) = said("falls", "--objective", "lpo:ta")
    assert "lpo:ta" in line and "--setup.learning-rate-schedule constant" in line
    assert not said("constant", "--objective", "lpo:ta", "--setup.learning-rate-schedule", "constant")
    assert not said("static", "--objective", "lpo:default")
