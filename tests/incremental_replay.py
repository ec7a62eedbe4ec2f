"""The incremental methods once more, in NumPy and float64: forward passes by hand, gradients by central differences.

Nothing here is taken from the package but initial parameters and random numbers. ``Track`` is an environment in which every
end of an episode can be placed, and whose first observations look like no other.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from pgjax.spaces import Box
from pgjax.types import TimeStep

O, A = 3, 2
DECAY = np.array([0.5, -0.4, 0.3])
PUSH = np.array([[1.0, 0.2], [0.0, -0.7], [0.4, 0.4]])
GOAL = np.array([0.3, -0.2])


@struct.dataclass
class Place:
    """obs: [B, O].  steps: [B] int32."""

    obs: jax.Array
    steps: jax.Array


@dataclasses.dataclass(frozen=True)
class Track:
    """x' = decay x + push a, r = x'[0] - |a - goal|².

    Episodes end after ``params["terminate_at"]`` steps, or are cut after ``params["truncate_at"]``. They begin near 10.
    """

    name = "test/track"
    observation_space = Box((O,))
    action_space = Box((A,), -0.8, 0.8)
    max_episode_steps = 1000
    default_params = {"terminate_at": np.int32(5), "truncate_at": np.int32(1000)}  # noqa: RUF012
    host_callback = False

    def reset(self, key, params):
        obs = 10 + jax.vmap(lambda key: jax.random.uniform(key, (O,)))(key)
        return Place(obs, jnp.zeros(key.shape[0], jnp.int32)), obs

    def step(self, key, env_state, action, params):
        decay, push, goal = (jnp.asarray(x, action.dtype) for x in (DECAY, PUSH, GOAL))
        final_obs = env_state.obs * decay + action @ push.T
        reward = final_obs[:, 0] - ((action - goal) ** 2).sum(-1)
        steps = env_state.steps + 1
        terminated = steps == params["terminate_at"]
        truncated = (steps == params["truncate_at"]) & ~terminated
        fresh, fresh_obs = self.reset(key, params)
        ended = terminated | truncated
        obs = jnp.where(ended[:, None], fresh_obs.astype(final_obs.dtype), final_obs)
        timestep = TimeStep(obs, reward, terminated, truncated, final_obs, {})
        return Place(obs, jnp.where(ended, fresh.steps, steps)), timestep

    def refresh(self, key, env_state, params):
        return env_state


def ends(terminate_at=1000, truncate_at=1000):
    return {"terminate_at": np.int32(terminate_at), "truncate_at": np.int32(truncate_at)}


def to_float64(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


# ---- Networks -------------------------------------------------------------------------------------------------------


def features(setup, hidden, x):
    for layer in hidden:
        z = x @ layer["kernel"] + layer["bias"]
        x = np.where(z > 0, z, 0.01 * z)
    return x / np.sqrt((x**2).sum()) if setup.penultimate_norm else x


def head(network, name, x):
    return x @ network[name]["kernel"] + network[name]["bias"]


def gaussian(setup, actor, s):
    """Mean and log σ of the action before tanh."""
    x = features(setup, actor["hidden"], s)
    h = np.clip(head(actor, "spread", x), -20, 2)
    return head(actor, "mean", x), h / 2 if setup.std_param == "exp_half" else h


def log_density(mean, log_std, u):
    """log π(tanh u): that of u less log(1 - tanh²)."""
    gauss = -0.5 * ((u - mean) / np.exp(log_std)) ** 2 - log_std - 0.5 * np.log(2 * np.pi)
    return (gauss - np.log1p(-(np.tanh(u) ** 2))).sum()


def gaussian_entropy(log_std):
    return (0.5 * (1 + np.log(2 * np.pi)) + log_std).sum()


def value(setup, critic, s, action=()):
    return head(critic, "value", features(setup, critic["hidden"], np.concatenate([s, action])))[0]


# ---- Optimisation ---------------------------------------------------------------------------------------------------


def leaves_of(tree):
    return jax.tree.leaves(tree)


def gradient(loss, tree, width=4e-7):
    """Central differences of ``loss(tree)`` for every number of the tree."""
    tree = jax.tree.map(np.array, tree)
    slopes = jax.tree.map(np.zeros_like, tree)
    for x, slope in zip(leaves_of(tree), leaves_of(slopes), strict=True):
        for index in np.ndindex(x.shape):
            kept = x[index]
            x[index] = kept + width
            up = loss(tree)
            x[index] = kept - width
            slope[index] = (up - loss(tree)) / (2 * width)
            x[index] = kept
    return slopes


class Adam:
    def __init__(self, tree, b1, b2, eps):
        self.m, self.v = (jax.tree.map(np.zeros_like, tree) for _ in range(2))
        self.b1, self.b2, self.eps, self.t = b1, b2, eps, 0

    def step(self, tree, slopes, rate):
        self.t += 1
        self.m = jax.tree.map(lambda m, g: self.b1 * m + (1 - self.b1) * g, self.m, slopes)
        self.v = jax.tree.map(lambda v, g: self.b2 * v + (1 - self.b2) * g**2, self.v, slopes)
        m_hat, v_hat = 1 - self.b1**self.t, 1 - self.b2**self.t
        return jax.tree.map(lambda p, m, v: p - rate * (m / m_hat) / (np.sqrt(v / v_hat) + self.eps), tree, self.m, self.v)


def norm(tree):
    return np.sqrt(sum((x**2).sum() for x in leaves_of(tree)))


# ---- Running statistics ---------------------------------------------------------------------------------------------


class Observations:
    """Gymnasium's NormalizeObservation, from its prior of 1e-4 samples of mean 0 and variance 1."""

    def __init__(self, size):
        self.mean, self.var, self.count = np.zeros(size), np.ones(size), 1e-4

    def __call__(self, x):
        delta, total = x - self.mean, self.count + 1
        self.var = (self.var * self.count + delta**2 * self.count / total) / total
        self.mean = self.mean + delta / total
        self.count = total
        return self.again(x)

    def again(self, x):
        return (x - self.mean) / np.sqrt(self.var + 1e-8)


class Scale:
    """Return-based scaling from lists of everything seen."""

    def __init__(self, form):
        self.form = form
        self.rewards, self.discounts, self.squares, self.episode = [], [], [], []

    def __call__(self, reward, gamma, terminated, truncated, backwards=False):
        self.rewards.append(reward)
        self.episode.append(reward)
        end = terminated or (truncated and self.form == "paper")
        self.discounts.append(0 if end else gamma)
        if end:
            k = np.arange(len(self.episode))
            weight = gamma**k if self.form == "paper" else gamma ** k[::-1] if backwards else np.ones(len(k))
            self.squares.append((weight * self.episode).sum() ** 2)
            self.episode = []
        mean_square = np.mean(self.squares) if self.squares else 0
        v = max(np.var(self.rewards) + np.var(self.discounts) * mean_square, 1e-4)
        if self.form == "paper":
            return np.sqrt(v) if len(self.squares) >= 2 else 1.0
        return np.sqrt(v) if self.squares or v > 0.01 else 1.0


# ---- The methods ----------------------------------------------------------------------------------------------------


class Replay:
    """Plays and learns as an algorithm on ``Track`` does, from its first state on.

    After ``run``, ``actor``, ``critics``, ``target`` (a pair, or only critics) and ``log_temperature`` are what it learned,
    ``rows`` what it would report of each step.
    """

    def __init__(self, name, algorithm, state, hypers, env_params):
        self.name, self.setup, self.h, self.ends = name, algorithm.setup, jax.tree.map(float, hypers), env_params
        self.key, self.num_noise = state.key, {"avg": 2, "iac": 1, "sac1": 3, "td3_1": 2}[name]
        learner = jax.tree.map(np.asarray, state.learner.replace(extra=None))
        self.actor, self.critics = learner.params
        self.x = np.asarray(state.env_state.obs[0], np.float64)
        self.steps = 0
        self.observations = Observations(O)
        self.scale = None if self.setup.scaler == "none" else Scale(self.setup.scaler)
        betas = (self.h.adam_b1, self.h.adam_b2, self.h.adam_eps)
        self.adam_actor, self.adam_critics = Adam(self.actor, *betas), Adam(self.critics, *betas)
        self.target = (self.actor, self.critics) if name == "td3_1" else self.critics
        if name == "sac1":
            self.log_temperature = np.log(self.h.temperature)
            self.adam_temperature = Adam(np.float64(0), 0.5, 0.999, 1e-8)
        self.s = self.see(self.x)
        self.rows = []

    def see(self, x):
        return self.observations(x) if self.setup.normalize_obs else x

    def run(self, num_steps):
        for number in range(num_steps):
            key_noise, key_env = jax.random.split(jax.random.fold_in(self.key, number))
            noise = np.asarray(jax.random.normal(key_noise, (self.num_noise, A), jnp.float64))
            fresh = 10 + np.asarray(jax.random.uniform(key_env, (O,)), np.float64)
            self.step(number, noise, fresh)
        return self

    def step(self, number, noise, fresh):
        u = self.explore(noise[0])
        action = np.clip(u, -1, 1) * 0.8 if self.name == "td3_1" else np.clip(np.tanh(u), -0.8, 0.8)
        x = self.x * DECAY + PUSH @ action
        reward = x[0] - ((action - GOAL) ** 2).sum()
        self.steps += 1
        terminated = self.steps == self.ends["terminate_at"]
        truncated = not terminated and self.steps == self.ends["truncate_at"]
        over = terminated or truncated
        if self.setup.boundary == "terminate":
            terminated, truncated = over, False
        following = self.see(x)
        self.row = {"reward": reward, "ended": over}
        getattr(self, f"learn_{self.name}")(number, noise, u, reward, terminated, truncated, following)
        self.rows.append(self.row)
        if over:
            self.x, self.s, self.steps = fresh, self.see(fresh), 0
        else:
            self.x, self.s = x, following

    def explore(self, noise):
        if self.name == "td3_1":
            return self.mode(self.actor, self.s) + self.h.exploration_noise * noise
        mean, log_std = gaussian(self.setup, self.actor, self.s)
        return mean + np.exp(log_std) * noise

    def mode(self, actor, s):
        return np.tanh(head(actor, "mean", features(self.setup, actor["hidden"], s)))

    def sigma(self, reward, terminated, truncated, backwards=False):
        return 1.0 if self.scale is None else self.scale(reward, self.h.gamma, terminated, truncated, backwards)

    def q(self, critic, s, u):
        return value(self.setup, critic, s, np.tanh(u))

    def report(self, critic_slopes, actor_slopes, delta, sigma, **more):
        self.row.update(
            delta=delta,
            td_scale=sigma,
            td_error=abs(delta) / sigma,
            grad_norm_actor=norm(actor_slopes),
            grad_norm_critic=norm(critic_slopes),
            grad_norm=np.hypot(norm(actor_slopes), norm(critic_slopes)),
            **more,
        )

    def learn_avg(self, number, noise, u, reward, terminated, truncated, following):
        setup, h, alpha = self.setup, self.h, self.h.alpha
        log_prob = log_density(*gaussian(setup, self.actor, self.s), u)
        sigma = self.sigma(reward - alpha * log_prob, terminated, truncated)
        mean, log_std = gaussian(setup, self.actor, following)
        v = mean + np.exp(log_std) * noise[1]
        bootstrap = self.q(self.critics[0], following, v) - alpha * log_density(mean, log_std, v)
        target = reward + (0 if terminated else h.gamma * bootstrap)
        delta = target - self.q(self.critics[0], self.s, u)

        def critic_loss(critics):
            return ((target - self.q(critics[0], self.s, u)) / sigma) ** 2

        def actor_loss(actor):
            mean, log_std = gaussian(setup, actor, self.s)
            again = mean + np.exp(log_std) * noise[0]
            return alpha * log_density(mean, log_std, again) - self.q(self.critics[0], self.s, again)

        slopes, actor_slopes = gradient(critic_loss, self.critics), gradient(actor_loss, self.actor)
        self.report(
            *(slopes, actor_slopes, delta, sigma),
            loss_value=(delta / sigma) ** 2,
            loss_policy=actor_loss(self.actor),
            entropy=-log_prob,
            entropy_gaussian=gaussian_entropy(gaussian(setup, self.actor, self.s)[1]),
            action_size=np.abs(np.tanh(u)).mean(),
            critic_head_norm=np.linalg.norm(self.critics[0]["value"]["kernel"]),
        )
        self.critics = self.adam_critics.step(self.critics, slopes, h.critic_lr)
        self.actor = self.adam_actor.step(self.actor, actor_slopes, h.learning_rate)

    def learn_iac(self, number, noise, u, reward, terminated, truncated, following):
        setup, h = self.setup, self.h
        log_prob = log_density(*gaussian(setup, self.actor, self.s), u)
        sigma = self.sigma(reward, terminated, truncated, backwards=True)
        if setup.entropy_bonus in ("sample", "both"):
            reward = reward - h.alpha * log_prob
        target = reward + (0 if terminated else h.gamma * value(setup, self.critics[0], following))
        delta = target - value(setup, self.critics[0], self.s)
        bonus = h.alpha if setup.entropy_bonus in ("distribution", "both") else 0

        def critic_loss(critics):
            return ((target - value(setup, critics[0], self.s)) / sigma) ** 2

        def actor_loss(actor):
            mean, log_std = gaussian(setup, actor, self.s)
            return -(delta / sigma * log_density(mean, log_std, u) + bonus * gaussian_entropy(log_std))

        slopes, actor_slopes = gradient(critic_loss, self.critics), gradient(actor_loss, self.actor)
        self.report(slopes, actor_slopes, delta, sigma, loss_policy=actor_loss(self.actor), entropy=-log_prob)
        self.critics = self.adam_critics.step(self.critics, slopes, h.critic_lr)
        self.actor = self.adam_actor.step(self.actor, actor_slopes, h.learning_rate)

    def learn_sac1(self, number, noise, u, reward, terminated, truncated, following):
        setup, h, alpha = self.setup, self.h, np.exp(self.log_temperature)
        sigma = self.sigma(reward - alpha * log_density(*gaussian(setup, self.actor, self.s), u), terminated, truncated)
        mean, log_std = gaussian(setup, self.actor, following)
        v = mean + np.exp(log_std) * noise[1]
        bootstrap = min(self.q(c, following, v) for c in self.target) - alpha * log_density(mean, log_std, v)
        target = reward + (0 if terminated else h.gamma * bootstrap)
        delta = target - self.q(self.critics[0], self.s, u)

        def critic_loss(critics):
            return sum(((target - self.q(critic, self.s, u)) / sigma) ** 2 for critic in critics)

        slopes = gradient(critic_loss, self.critics)
        self.critics = self.adam_critics.step(self.critics, slopes, h.critic_lr)

        def sampled(actor):
            mean, log_std = gaussian(setup, actor, self.s)
            again = mean + np.exp(log_std) * noise[2]
            return again, log_density(mean, log_std, again)

        def actor_loss(actor):
            again, log_prob = sampled(actor)
            return alpha * log_prob - min(self.q(critic, self.s, again) for critic in self.critics)

        actor_slopes = gradient(actor_loss, self.actor)
        self.report(slopes, actor_slopes, delta, sigma, loss_policy=actor_loss(self.actor))
        # d/d(log α) of α (-log π + dim A)
        slope = alpha * (-sampled(self.actor)[1] + A)
        self.actor = self.adam_actor.step(self.actor, actor_slopes, h.learning_rate)
        self.log_temperature = self.adam_temperature.step(self.log_temperature, slope, h.temperature_lr)
        self.target = mixed(self.target, self.critics, h.tau)

    def learn_td3_1(self, number, noise, u, reward, terminated, truncated, following):
        setup, h = self.setup, self.h
        sigma = self.sigma(reward, terminated, truncated)
        target_actor, target_critics = self.target
        smoothing = np.clip(h.target_noise * noise[1], -h.target_noise_clip, h.target_noise_clip)
        smoothed = np.clip(self.mode(target_actor, following) + smoothing, -1, 1)
        bootstrap = min(value(setup, critic, following, smoothed) for critic in target_critics)
        target = reward + (0 if terminated else h.gamma * bootstrap)
        taken = np.clip(u, -1, 1)
        delta = target - value(setup, self.critics[0], self.s, taken)

        def critic_loss(critics):
            return sum(((target - value(setup, critic, self.s, taken)) / sigma) ** 2 for critic in critics)

        slopes = gradient(critic_loss, self.critics)
        self.critics = self.adam_critics.step(self.critics, slopes, h.critic_lr)

        def actor_loss(actor):
            return -value(setup, self.critics[0], self.s, self.mode(actor, self.s))

        actor_slopes = gradient(actor_loss, self.actor)
        self.report(slopes, actor_slopes, delta, sigma, loss_policy=actor_loss(self.actor))
        if number % setup.policy_delay == setup.policy_delay - 1:
            self.actor = self.adam_actor.step(self.actor, actor_slopes, h.learning_rate)
            self.target = mixed(self.target, (self.actor, self.critics), h.tau)


def mixed(old, new, tau):
    return jax.tree.map(lambda old, new: old + tau * (new - old), old, new)
