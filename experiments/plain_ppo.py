"""A plain PPO for CartPole, the yardstick of ``pgjax bench``.

Written the obvious way, in the structure of the public single-file JAX implementations: keys are split in every step, the
environment resets inside every step, the optimiser walks over every array, one epoch after the other shuffles. Same
setting and same mathematics as the suite's; time limits count as terminations, as they do there.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import pgjax

NUM_ENVS, NUM_STEPS, NUM_EPOCHS, NUM_MINIBATCHES = 4, 128, 4, 4
GAMMA, GAE_LAMBDA, CLIP_EPS, LEARNING_RATE = 0.99, 0.95, 0.2, 2.5e-4


class _Network(nn.Module):
    num_actions: int

    @nn.compact
    def __call__(self, obs):
        def mlp(out, scale):
            x = obs
            for _ in range(2):
                x = nn.tanh(nn.Dense(64, kernel_init=nn.initializers.orthogonal(2**0.5))(x))
            return nn.Dense(out, kernel_init=nn.initializers.orthogonal(scale))(x)

        return nn.log_softmax(mlp(self.num_actions, 0.01)), mlp(1, 1.0)[..., 0]


def plain_ppo():
    """``(init, step)``: ``init(key) -> state`` and ``step(state) -> (state, metrics)``, one iteration."""
    pgjax.make_env("gymnax/CartPole-v1")  # imports gymnax without its plotting libraries
    import gymnax

    env, env_params = gymnax.make("CartPole-v1")
    network = _Network(env.num_actions)
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(LEARNING_RATE, eps=1e-5))

    def init(key):
        key, key_network, key_reset = jax.random.split(key, 3)
        params = network.init(key_network, jnp.zeros(4))
        obs, env_state = jax.vmap(env.reset, (0, None))(jax.random.split(key_reset, NUM_ENVS), env_params)
        return params, optimizer.init(params), env_state, obs, jnp.zeros(NUM_ENVS), key

    def env_step(carry, _):
        params, env_state, obs, episode_return, key = carry
        key, key_action, key_env = jax.random.split(key, 3)
        log_probs, value = network.apply(params, obs)
        action = jax.random.categorical(key_action, log_probs)
        log_prob = jnp.take_along_axis(log_probs, action[:, None], 1)[:, 0]
        next_obs, env_state, reward, terminated, truncated, _ = jax.vmap(env.step, (0, 0, 0, None))(
            jax.random.split(key_env, NUM_ENVS), env_state, action, env_params
        )
        done = terminated | truncated
        episode_return = episode_return + reward
        out = (obs, action, log_prob, value, reward, done, episode_return)
        return (params, env_state, next_obs, jnp.where(done, 0.0, episode_return), key), out

    def loss(params, minibatch):
        obs, action, log_prob_old, value_old, advantage, target = minibatch
        log_probs, value = network.apply(params, obs)
        log_prob = jnp.take_along_axis(log_probs, action[:, None], 1)[:, 0]
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        ratio = jnp.exp(log_prob - log_prob_old)
        objective = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - CLIP_EPS, 1 + CLIP_EPS) * advantage)
        clipped = value_old + jnp.clip(value - value_old, -CLIP_EPS, CLIP_EPS)
        loss_value = 0.5 * jnp.maximum((value - target) ** 2, (clipped - target) ** 2).mean()
        entropy = -(jnp.exp(log_probs) * log_probs).sum(-1).mean()
        return -objective.mean() + 0.5 * loss_value - 0.01 * entropy

    def step(state):
        params, opt_state, env_state, obs, episode_return, key = state
        carry, batch = jax.lax.scan(env_step, (params, env_state, obs, episode_return, key), None, length=NUM_STEPS)
        _, env_state, obs, episode_return, key = carry
        all_obs, action, log_prob, value, reward, done, returns = batch
        last_value = network.apply(params, obs)[1]

        def backward(carry, x):
            advantage, next_value = carry
            value, reward, done = x
            delta = reward + GAMMA * next_value * (1 - done) - value
            advantage = delta + GAMMA * GAE_LAMBDA * (1 - done) * advantage
            return (advantage, value), advantage

        _, advantage = jax.lax.scan(backward, (jnp.zeros(NUM_ENVS), last_value), (value, reward, done), reverse=True)
        samples = (all_obs, action, log_prob, value, advantage, advantage + value)
        samples = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), samples)

        def epoch(carry, key):
            order = jax.random.permutation(key, NUM_ENVS * NUM_STEPS)
            parts = jax.tree.map(lambda x: x[order].reshape(NUM_MINIBATCHES, -1, *x.shape[1:]), samples)

            def descend(carry, minibatch):
                params, opt_state = carry
                value, gradient = jax.value_and_grad(loss)(params, minibatch)
                updates, opt_state = optimizer.update(gradient, opt_state)
                return (optax.apply_updates(params, updates), opt_state), value

            return jax.lax.scan(descend, carry, parts)

        key, key_epochs = jax.random.split(key)
        (params, opt_state), losses = jax.lax.scan(epoch, (params, opt_state), jax.random.split(key_epochs, NUM_EPOCHS))
        state = (params, opt_state, env_state, obs, episode_return, key)
        return state, (losses.mean(), (returns * done).sum() / done.sum())

    return init, step
