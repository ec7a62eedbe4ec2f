"""Networks against a forward pass in NumPy; initial values, heads, gradients, errors."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import signal

from pgjax import networks
from pgjax.distributions import Categorical, DiagGaussian, TanhGaussian
from pgjax.errors import RequestError
from pgjax.networks import ACTIVATIONS, ActorCritic, Networks, make_networks
from pgjax.spaces import Box, Discrete

pytestmark = pytest.mark.usefixtures("strict")

OBS, IMAGE = Box((4,)), Box((10, 10, 4), 0, 1)
FEW, BOX = Discrete(3), Box((2,), -1.0, 1.0)


def make(observation_space=OBS, action_space=FEW, **kwargs):
    """The networks, their functions compiled."""
    return Networks(*map(jax.jit, make_networks(observation_space, action_space, **kwargs)))


def start(*spaces, seed=0, **kwargs):
    """The initial parameters."""
    return make(*spaces, **kwargs).init(jax.random.key(seed))


def make_with_params(*spaces, **kwargs):
    """Networks with random numbers for all parameters, so that zero biases and equal log_std hide nothing."""
    networks, rng = make(*spaces, **kwargs), np.random.default_rng(1)
    shapes = jax.eval_shape(networks.init, jax.random.key(0))
    return networks, jax.tree.map(lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), jnp.float32), shapes)


def layers(network, part):
    """The parameter dicts of ``part`` in the order of evaluation."""
    params = network[part].get("params", {})
    return [params] if "kernel" in params else [params[name] for name in sorted(params) if name != "log_std"]


def kernels(network):
    return [np.asarray(layer["kernel"], np.float64) for part in ("torso", "head") for layer in layers(network, part)]


def forward(network, x, activation=np.tanh):
    """A multilayer perceptron in NumPy float64; no activation after the head."""
    for part in ("torso", "head"):
        for layer in layers(network, part):
            x = x @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"], np.float64)
            x = activation(x) if part == "torso" else x
    return x


def test_orthogonal_scales():
    """WᵀW, or WWᵀ for a wide layer, is the squared scale times the identity: √2 hidden, 0.01 policy, 1 value."""
    params = start(hidden_sizes=(64, 32))
    for network, head_scale in ((params.actor, 0.01), (params.critic, 1.0)):
        *hidden, head = kernels(network)
        for kernel, scale in [(kernel, np.sqrt(2)) for kernel in hidden] + [(head, head_scale)]:
            gram = kernel @ kernel.T if kernel.shape[0] < kernel.shape[1] else kernel.T @ kernel
            np.testing.assert_allclose(gram / scale**2, np.eye(len(gram)), atol=1e-5)
        assert [kernel.shape for kernel in hidden] == [(4, 64), (64, 32)]
    for layer in layers(params.actor, "torso") + layers(params.critic, "head"):
        assert (np.asarray(layer["bias"]) == 0).all()


def test_orthogonal_convolution_and_head_scale_none():
    params = start(Box((4, 5, 2), 0, 1), policy_head_scale=None, hidden_sizes=(8,))
    convolution, dense, head = kernels(params.actor)
    assert convolution.shape == (3, 3, 2, 16) and dense.shape == (2 * 3 * 16, 8)
    flat = convolution.reshape(-1, 16)
    np.testing.assert_allclose(flat.T @ flat, 2 * np.eye(16), atol=1e-5)
    np.testing.assert_allclose(dense.T @ dense, 2 * np.eye(8), atol=1e-5)
    np.testing.assert_allclose(head.T @ head, 2 * np.eye(3), atol=1e-5)


def test_orthonormal_columns_are_those_of_the_qr_decomposition_with_positive_diagonal():
    rng = np.random.default_rng(0)
    matrices = [rng.normal(size=shape).astype(np.float32) for shape in ((64, 64), (100, 7), (3, 1), (9, 9))]
    # Nearly dependent columns, which one pass of Gram and Schmidt leaves far from orthogonal.
    matrices[3][:, 8] = matrices[3][:, 0] + 1e-4 * rng.normal(size=9)
    for q, matrix in zip(networks._orthonormal([jnp.asarray(x) for x in matrices]), matrices, strict=True):
        expected, upper = np.linalg.qr(matrix.astype(np.float64))
        np.testing.assert_allclose(q.T @ q, np.eye(matrix.shape[1]), atol=2e-6)
        np.testing.assert_allclose(q, expected * np.sign(np.diag(upper)), atol=2e-3 if len(matrix) == 9 else 1e-5)


def test_init_calls_nothing_that_waits_on_the_thread_pool():
    """Several batched LAPACK calls at once wait for ever on a CPU with two cores."""
    shipped = make_networks(Box((10, 10, 4)), Discrete(3), hidden_sizes=(64,))
    program = jax.jit(jax.vmap(shipped.init)).lower(jax.random.split(jax.random.key(0), 128)).as_text()
    assert "custom_call" not in program, "an orthogonal initialiser of LAPACK's"


@pytest.mark.parametrize("name", ["lecun_uniform", "lecun_normal"])
def test_lecun_has_variance_one_over_fan_in_everywhere(name):
    kwargs = {"kernel_init": name, "hidden_sizes": (256, 256), "distribution": "tanh_gaussian_state"}
    wide = Box((64,)), Box((32,), -1.0, 1.0)
    params = start(*wide, policy_head_scale=None, **kwargs)
    for kernel in kernels(params.actor) + kernels(params.critic):
        variance = 1 / kernel.shape[0]
        assert abs(kernel.var() / variance - 1) < 6 / np.sqrt(kernel.size)
        if name == "lecun_uniform":
            assert 0.9 < np.abs(kernel).max() / np.sqrt(3 * variance) <= 1.000001
        else:
            assert np.abs(kernel).max() > np.sqrt(3 * variance)
    scaled = start(*wide, policy_head_scale=0.01, **kwargs)
    for kernel, original in zip(kernels(scaled.actor), kernels(params.actor), strict=True):
        factor = 0.01 if kernel.shape[1] == 64 else 1.0
        np.testing.assert_allclose(kernel, factor * original, rtol=1e-5)


def test_nothing_is_drawn_twice():
    params = start(hidden_sizes=(16, 16), kernel_init="lecun_normal")
    other = start(hidden_sizes=(16, 16), kernel_init="lecun_normal", seed=1)
    everything = [k for p in (params, other) for network in p for k in kernels(network)]
    for i, a in enumerate(everything):
        for b in everything[i + 1 :]:
            assert a.shape != b.shape or not np.allclose(a, b)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_equals_numpy(activation):
    formula = {
        "tanh": np.tanh,
        "relu": lambda x: np.maximum(x, 0),
        "swish": lambda x: x / (1 + np.exp(-x)),
        "silu": lambda x: x / (1 + np.exp(-x)),
        "elu": lambda x: np.where(x > 0, x, np.exp(np.minimum(x, 0)) - 1),
        "gelu": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
        "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    }[activation]
    networks, params = make_with_params(hidden_sizes=(8, 6), critic_hidden_sizes=(5,), activation=activation)
    obs = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    dist = networks.policy(params, obs)
    assert isinstance(dist, Categorical)
    np.testing.assert_allclose(dist.logits, forward(params.actor, obs, formula), atol=1e-5)
    np.testing.assert_allclose(networks.value(params, obs), forward(params.critic, obs, formula)[:, 0], atol=1e-5)
    assert [k.shape[1] for k in kernels(params.critic)] == [5, 1]


@pytest.mark.parametrize(
    "distribution, kind",
    [
        ("auto", DiagGaussian),
        ("gaussian", DiagGaussian),
        ("gaussian_state", DiagGaussian),
        ("tanh_gaussian", TanhGaussian),
        ("tanh_gaussian_state", TanhGaussian),
    ],
)
def test_gaussian_heads(distribution, kind):
    networks, params = make_with_params(OBS, BOX, distribution=distribution, hidden_sizes=(8,))
    obs = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    state_dependent = distribution.endswith("state")
    dist = networks.policy(params, obs)
    assert type(dist) is kind
    out = forward(params.actor, obs)
    np.testing.assert_allclose(dist.mean, out[:, :2], atol=1e-5)
    if state_dependent:
        assert out.shape == (7, 4)
        np.testing.assert_allclose(np.exp(dist.log_std), np.log1p(np.exp(out[:, 2:])) + 0.001, rtol=1e-5)
    else:
        log_std = params.actor["head"]["params"]["log_std"]
        np.testing.assert_array_equal(dist.log_std, np.broadcast_to(log_std, (7, 2)))


def test_log_std_init():
    kwargs = {"hidden_sizes": (), "kernel_init": "lecun_uniform"}
    params = start(OBS, BOX, distribution="tanh_gaussian", log_std_init=-0.7, **kwargs)
    np.testing.assert_allclose(params.actor["head"]["params"]["log_std"], [-0.7, -0.7])
    params = start(OBS, BOX, **kwargs)
    np.testing.assert_array_equal(params.actor["head"]["params"]["log_std"], [0.0, 0.0])


def test_state_dependent_std_stays_positive_and_differentiable():
    networks, params = make_with_params(OBS, BOX, distribution="gaussian_state", hidden_sizes=())

    @jax.jit
    @jax.value_and_grad
    def entropy(obs):
        return networks.policy(params, obs).entropy()

    for size in (1e4, -1e4):
        value, gradient = entropy(jnp.full(4, size))
        assert np.isfinite(value) and np.isfinite(gradient).all()
        assert (np.exp(networks.policy(params, jnp.full(4, size)).log_std) >= 0.000999).all()


def test_convolution_equals_scipy():
    networks, params = make_with_params(IMAGE, activation="relu", hidden_sizes=(8,))
    obs = np.random.default_rng(0).random((2, 10, 10, 4)).astype(np.float32)
    convolution, dense = layers(params.actor, "torso")
    kernel = np.asarray(convolution["kernel"])
    planes = np.zeros((2, 8, 8, 16))
    for n in range(2):
        for f in range(16):
            planes[n, :, :, f] = sum(signal.correlate2d(obs[n, :, :, c], kernel[:, :, c, f], mode="valid") for c in range(4))
    x = np.maximum(planes + np.asarray(convolution["bias"]), 0).reshape(2, -1)
    x = np.maximum(x @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"]), 0)
    head = layers(params.actor, "head")[0]
    want = x @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    np.testing.assert_allclose(networks.policy(params, obs).logits, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("observation_space", [OBS, IMAGE, Box(()), Box((2, 3))], ids=lambda space: str(space.shape))
def test_any_leading_axes(observation_space):
    networks, params = make_with_params(observation_space, hidden_sizes=(8,))
    obs = np.random.default_rng(0).normal(size=(3, 2, *observation_space.shape)).astype(np.float32)
    logits, value = networks.policy(params, obs).logits, networks.value(params, obs)
    assert logits.shape == (3, 2, 3) and value.shape == (3, 2)
    one = networks.policy(params, obs[2, 1]).logits, networks.value(params, obs[2, 1])
    assert one[0].shape == (3,) and one[1].shape == ()
    np.testing.assert_allclose(one[0], logits[2, 1], atol=1e-6)
    np.testing.assert_allclose(one[1], value[2, 1], atol=1e-5)


def test_mlp_flattens_images_and_takes_bool_observations():
    networks, params = make_with_params(IMAGE, torso="mlp")
    assert [k.shape for k in kernels(params.actor)] == [(400, 64), (64, 64), (64, 3)]
    obs = np.random.default_rng(0).random((5, 10, 10, 4)) < 0.5
    want = networks.value(params, obs.astype(np.float32))
    np.testing.assert_allclose(networks.value(params, obs), want, rtol=1e-6)
    np.testing.assert_allclose(want, forward(params.critic, obs.reshape(5, 400))[:, 0], atol=1e-4)


def test_linear_networks():
    networks, params = make_with_params(hidden_sizes=())
    obs = np.arange(4, dtype=np.float32)
    np.testing.assert_allclose(networks.policy(params, obs).logits, forward(params.actor, obs), rtol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_where_gradients_flow(shared):
    """Apart: each loss moves its own network. Shared: both move the torso, and each its own head."""
    networks, params = make_with_params(hidden_sizes=(8,), shared_torso=shared)
    obs = jnp.ones((5, 4))
    assert set(params.critic) == ({"head"} if shared else {"torso", "head"})

    def moved(loss):
        gradient = jax.jit(jax.grad(loss))(params)
        return {
            (name, part): any((np.asarray(leaf) != 0).any() for leaf in jax.tree.leaves(network[part]))
            for name, network in gradient._asdict().items()
            for part in network
        }

    by_value = moved(lambda p: networks.value(p, obs).sum())
    by_policy = moved(lambda p: networks.policy(p, obs).log_prob(jnp.zeros(5, jnp.int32)).sum())
    assert by_value["actor", "torso"] == shared and not by_value["actor", "head"] and by_value["critic", "head"]
    assert by_policy["actor", "torso"] and by_policy["actor", "head"] and not by_policy["critic", "head"]
    if not shared:
        assert by_value["critic", "torso"] and not by_policy["critic", "torso"]


def test_shared_torso_is_evaluated_once_under_jit():
    networks, params = make_with_params(hidden_sizes=(64, 64), shared_torso=True)
    obs = jnp.ones((50, 4))

    def flops(fn):
        return jax.jit(fn).lower(params, obs).compile().cost_analysis()["flops"]

    def both(params, obs):
        return networks.policy(params, obs).logits, networks.value(params, obs)

    one_torso = flops(lambda params, obs: networks.policy(params, obs).logits)
    assert flops(both) < 1.2 * one_torso


def test_the_policy_needs_no_critic():
    networks, params = make_with_params(shared_torso=True)
    got = networks.policy(ActorCritic(params.actor, None), jnp.ones(4)).logits
    np.testing.assert_array_equal(got, networks.policy(params, jnp.ones(4)).logits)


def test_lanes_equal_single_networks():
    networks = make(OBS, BOX, hidden_sizes=(8,), kernel_init="lecun_uniform")
    lanes = jax.jit(jax.vmap(networks.init))(jax.random.split(jax.random.key(3), 2))
    obs = jnp.ones((2, 5, 4))
    together = jax.jit(jax.vmap(networks.policy))(lanes, obs).mean
    for i in range(2):
        single = networks.init(jax.random.split(jax.random.key(3), 2)[i])
        for a, b in zip(jax.tree.leaves(single), jax.tree.leaves(lanes), strict=True):
            np.testing.assert_allclose(a, b[i], atol=1e-5)
        np.testing.assert_allclose(networks.policy(single, obs[i]).mean, together[i], atol=1e-5)


def test_initial_parameters_keep_their_values_under_float64():
    """The drawn type is float32 whatever JAX's default is, so a switch of precision starts from the same network."""
    kwargs = {"hidden_sizes": (8,), "kernel_init": "lecun_uniform"}
    want = start(OBS, BOX, **kwargs)
    with jax.enable_x64(True):
        got = start(OBS, BOX, **kwargs)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype == jnp.float32
        np.testing.assert_array_equal(a, b)


def test_float64(float64):
    networks, params = make_with_params(OBS, BOX)
    params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
    dist = networks.policy(params, jnp.ones((3, 4)))
    assert dist.mean.dtype == dist.log_std.dtype == networks.value(params, jnp.ones((3, 4))).dtype == jnp.float64


@pytest.mark.parametrize(
    "spaces, kwargs, match",
    [
        ((OBS, FEW), {"activation": "Tanh"}, "activation = 'Tanh'.*did you mean tanh"),
        ((OBS, FEW), {"kernel_init": "ortho"}, "kernel_init = 'ortho'.*orthogonal"),
        ((OBS, FEW), {"torso": "resnet"}, "torso = 'resnet'.*auto, cnn, mlp"),
        ((OBS, FEW), {"torso": "cnn"}, r"torso = 'cnn'.*\(4,\).*'mlp'"),
        ((Box((2, 10, 3)), FEW), {}, r"torso = 'cnn'.*\(2, 10, 3\).*'mlp'"),
        ((OBS, FEW), {"hidden_sizes": (64, 0)}, r"hidden_sizes = \(64, 0\)"),
        ((OBS, FEW), {"critic_hidden_sizes": (6.5,)}, r"critic_hidden_sizes = \(6.5,\)"),
        ((OBS, FEW), {"critic_hidden_sizes": (8,), "shared_torso": True}, r"critic_hidden_sizes = \(8,\).*None"),
        ((OBS, FEW), {"policy_head_scale": -1.0}, "policy_head_scale = -1.0"),
        ((OBS, FEW), {"policy_head_scale": float("nan")}, "policy_head_scale = nan"),
        ((OBS, FEW), {"distribution": "gaussian"}, "distribution = 'gaussian'.*'auto'"),
        ((OBS, BOX), {"distribution": "categorical"}, "distribution = 'categorical'.*'gaussian'"),
        ((OBS, BOX), {"distribution": "beta"}, "distribution = 'beta'.*known"),
        ((OBS, BOX), {"distribution": "gaussian_state", "log_std_init": 1.0}, "log_std_init = 1.0.*gaussian_state"),
        ((OBS, Box((2, 3))), {}, r"action_space.shape = \(2, 3\).*flatten"),
        ((OBS, Box(())), {}, r"action_space.shape = \(\)"),
    ],
)
def test_errors_name_field_value_and_remedy_in_one_line(spaces, kwargs, match):
    with pytest.raises(RequestError, match=match) as caught:
        make_networks(*spaces, **kwargs)
    assert "\n" not in str(caught.value)


def test_every_setting_is_documented():
    for name in inspect.signature(make_networks).parameters:
        assert f"\n      {name}: " in make_networks.__doc__
