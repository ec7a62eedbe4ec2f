"""Meta-training of LPG: the meta-gradient against differences, the critic, lives and levels, and the buffer's promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from pgjax.algorithms import lpg, make
from pgjax.envs import grid_world, make_env
from pgjax.errors import RequestError
from pgjax.experiments.meta_train import agents, get, gradient, groove, held_out, levels, loop, picture, whole_lives
from pgjax.experiments.meta_train import lpg as meta
from pgjax.host import checkpoints
from pgjax.learned import evolution
from pgjax.learned import files as learned_files
from pgjax.learned.files import Learned
from pgjax.learned.rule import RuleInputs, RuleSpec, apply_rule, convention_of, init_rule
from tests.processes import run_python

T, B, S = 4, 3, 3
SPEC = RuleSpec(num_predictions=3, hidden_size=4, embedding_size=3)
OUTCOME = dict(policy_entropy=0.3, prediction_entropy=0.2, pi_hat_cost=0.4, y_hat_cost=0.5)
CURRICULUM = levels.Curriculum("alg_regret", buffer_size=40, p_replay=0.5, transform="rank", temperature=1.0, staleness=0.0)
TINY = dict(levels="debug", agents=4, parts=2, num_envs=4, num_steps=5, window=2, hidden_size=8, num_predictions=3)


def trainer_of(**options):
    return meta.build(meta.Args(**{**TINY, **options}))


def inner_of(window, spec=SPEC):
    options = dict(levels="debug", num_envs=B, num_steps=T, window=window, actor_lr=2.0, predictor_lr=1.5)
    return meta.inner_of(meta.Args(**options, **OUTCOME), spec)


def rollouts_of(num, reward=None, seed=0):
    """``num`` rollouts on three states, [num, ...]."""
    rng = np.random.default_rng(seed)
    number = rng.integers(0, S, (num, T + 1, B, 1))
    obs = np.concatenate([number, np.zeros_like(number)], -1).astype(float)
    reward = rng.normal(size=(num, T, B)) if reward is None else np.full((num, T, B), reward)
    end = rng.random((num, T, B)) < 0.3
    return lpg.Rollout(*map(jnp.asarray, (obs, rng.integers(0, 5, (num, T, B)), reward, end)))


def as64(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def softmax(x):
    x = jnp.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


class Reference:
    """Windows on fixed rollouts, gradients written out: linear agents, SGD, bounds, critic, advantages, regularisers."""

    def __init__(self, agent, rollouts, window):
        self.window, self.rates, self.limit = window, (2.0, 1.5), 0.5
        self.tables = [np.asarray(x)[:S] for x in (*agent.state.learner.params, agent.critic)]
        self.state = np.asarray(rollouts.obs[..., 0], int)
        self.action, self.reward, self.end = (np.asarray(x) for x in rollouts[1:])
        self.advantage = self.advantages()

    def step(self, table, gradient, rate):
        norm = jnp.sqrt((gradient**2).sum())
        return table - rate * gradient * jnp.minimum(1, self.limit / norm)

    def gae(self, critic, k):
        value, advantage, last = critic[self.state[k], 0], np.zeros((T, B)), np.zeros(B)
        for t in reversed(range(T)):
            goes_on = 1 - self.end[k, t]
            last = self.reward[k, t] + 0.99 * goes_on * value[t + 1] - value[t] + 0.99 * 0.95 * goes_on * last
            advantage[t] = last
        return value, advantage

    def advantages(self):
        """Of the last rollout, by a critic that took a step on each of those before it."""
        critic = self.tables[2]
        for k in range(self.window):
            _, advantage = self.gae(critic, k)
            gradient = np.zeros_like(critic)
            np.add.at(gradient[:, 0], self.state[k, :-1].ravel(), (-2 * advantage / (T * B)).ravel())
            critic = np.asarray(self.step(critic, gradient, 1.5))
        advantage = self.gae(critic, self.window)[1]
        return (advantage - advantage.mean()) / (advantage.std() + 1e-8)

    def loss(self, rule, base):
        """The meta-loss of ``rule``, where the rule is fed what agents of ``base`` would show it."""
        actor, predictor = self.tables[:2]
        frozen_actor, frozen_predictor = actor, predictor
        cost = 0.0
        for k in range(self.window):
            state, chosen = self.state[k], np.eye(5)[self.action[k]]

            def said(rule, actor, predictor, k=k, state=state, chosen=chosen):
                prob, y = (softmax(actor[state[:-1]]) * chosen).sum(-1), softmax(predictor[state])
                return apply_rule(SPEC, rule, RuleInputs(self.reward[k], jnp.asarray(self.end[k]), prob, y[:-1], y[1:]))

            def updated(actor, predictor, pi_hat, log_y_hat, state=state, chosen=chosen):
                pi, y = softmax(actor[state[:-1]]), softmax(predictor[state[:-1]])
                up = jnp.zeros_like(actor).at[state[:-1]].add(pi_hat[..., None] * (chosen - pi)) / (T * B)
                ratio = jnp.log(y) - log_y_hat
                towards = y * (ratio - (y * ratio).sum(-1, keepdims=True))
                towards = jnp.zeros_like(predictor).at[state[:-1]].add(towards) / (T * B)
                return self.step(actor, -up, 2.0), self.step(predictor, 0.5 * towards, 1.5)

            pi_hat, log_y_hat = said(rule, frozen_actor, frozen_predictor)
            actor, predictor = updated(actor, predictor, pi_hat, log_y_hat)
            frozen_actor, frozen_predictor = updated(
                frozen_actor, frozen_predictor, *said(base, frozen_actor, frozen_predictor)
            )
            pi, y = softmax(actor[state[:-1]]), softmax(predictor[state[:-1]])
            cost += 0.3 * (pi * jnp.log(pi)).sum(-1).mean() + 0.2 * (y * jnp.log(y)).sum(-1).mean()
            cost += 0.4 * (pi_hat**2).mean() + 0.5 * jnp.exp(2 * log_y_hat).sum(-1).mean()
        pi = softmax(actor[self.state[-1, :-1]])
        log_prob = jnp.log((pi * np.eye(5)[self.action[-1]]).sum(-1))
        return -(log_prob * self.advantage).mean() + cost / max(self.window, 1)


def agent_and_rule(inner):
    level = inner.env.default_params
    agent = agents.new_agent(inner, jax.random.key(0), level, 1000.0)

    def big(tree):
        return jax.tree.map(lambda x: 20 * x, tree)

    learner = agent.state.learner
    agent = agent.replace(
        state=agent.state.replace(learner=learner.replace(params=big(learner.params))), critic=big(agent.critic)
    )
    flat, back = ravel_pytree(init_rule(SPEC, jax.random.key(1)))
    return as64(agent), as64(back(2 * flat + 0.3 * jax.random.normal(jax.random.key(2), flat.shape)))


def from_these(rollouts, inner):
    """``collect`` that plays back: the one whose turn it is by the agent's age."""

    def collect(_, state, key):
        turn = state.env_steps // inner.algorithm.env_steps_per_iteration
        return state, jax.tree.map(lambda x: x[turn], rollouts)

    return collect


@pytest.mark.parametrize("window", [0, 1, 2])
def test_the_meta_gradient_is_that_of_finite_differences(float64, window):
    inner, rollouts = inner_of(window), rollouts_of(window + 1)
    agent, rule = agent_and_rule(inner)
    reference = Reference(agent, rollouts, window)
    collect = from_these(rollouts, inner)

    def loss(rule):
        return agents.live(inner, rule, agent, jax.random.key(0), collect)

    (value, (after, lived)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(rule)
    flat, back = ravel_pytree(rule)
    slow = jax.jit(lambda x: reference.loss(back(x), rule))
    np.testing.assert_allclose(value, slow(flat), rtol=1e-6)
    gradient = ravel_pytree(gradient)[0]
    if window == 0:
        assert (gradient == 0).all() and after.state.env_steps == 0
        return
    # Every parameter by itself, and none is out of reach.
    width = 1e-5
    steps = width * jnp.eye(len(flat))
    differences = jax.jit(jax.vmap(lambda e: (slow(flat + e) - slow(flat - e)) / (2 * width)))(steps)
    np.testing.assert_allclose(gradient, differences, rtol=1e-3, atol=1e-8)
    assert (np.abs(gradient) > 1e-9).mean() > 0.7
    for leaf in jax.tree.leaves(back(gradient)):
        assert np.abs(leaf).max() > 1e-7
    assert after.state.env_steps == window * T * B and lived.absolute > 0


def test_the_critic_learns_constant_rewards():
    """A reward of 1 in each of four states, one after the other: the values are sums of what is left of the episode."""
    inner = inner_of(1)
    agent = agents.new_agent(inner, jax.random.key(0), inner.env.default_params, 1000.0)
    number = np.broadcast_to(np.array([0, 1, 2, 3, 0])[:, None, None], (T + 1, B, 1))
    obs = jnp.asarray(np.concatenate([number, 0 * number], -1), jnp.float32)
    end = jnp.zeros((T, B), bool).at[-1].set(True)
    rollout = lpg.Rollout(obs, jnp.zeros((T, B), jnp.int32), jnp.ones((T, B)), end)

    def one(carry, _):
        *carry, loss = agents.fit_critic(inner, *carry, rollout)
        return tuple(carry), loss

    (critic, _), losses = jax.jit(lambda *start: jax.lax.scan(one, start, length=100))(agent.critic, agent.critic_opt)
    assert losses[-1] < 0.5 * losses[0]
    expected = [sum(0.99**i for i in range(n)) for n in (4, 3, 2, 1)]
    np.testing.assert_allclose(critic[:4, 0], expected, rtol=0.02)


def test_the_critic_learns_on_levels_that_pay_the_same_for_every_step():
    """Over a hundred windows of agents that play and are moved by the rule meanwhile.

    With a short horizon: else what is left of an episode, which no state tells, is most of the loss. With a step size that a
    table bears in a state where all environments are; the published 4 is too long for one with a quarter of them.
    """
    inner = meta.inner_of(meta.Args(levels="small", num_envs=16, window=2, gamma=0.5, predictor_lr=0.8), SPEC)

    def paid(inner, state, key):
        state, rollout = agents.collect(inner, state, key)
        return state, rollout._replace(reward=jnp.ones_like(rollout.reward))

    rule, num = init_rule(SPEC, jax.random.key(1)), 8
    newborn = jax.vmap(lambda key, level: agents.new_agent(inner, key, level, 1000.0))
    population = newborn(jax.random.split(jax.random.key(0), num), held_out.sample(inner.family, num))

    def window(population, key):
        live = jax.vmap(lambda agent, key: agents.live(inner, rule, agent, key, paid))
        _, (population, lived) = live(population, jax.random.split(key, num))
        return population, lived.loss_value

    scan = jax.jit(lambda population, keys: jax.lax.scan(window, population, keys))
    _, losses = scan(population, jax.random.split(jax.random.key(2), 100))
    first, last = losses[:3].mean(0), losses[-10:].mean(0)
    assert (last < 0.5 * first).all()


@pytest.mark.parametrize("window", [0, 2])
def test_the_critic_learns_from_the_rollout_it_judges_too(window):
    """Once from each of the window's rollouts, and from the one after, which it has judged before."""
    inner, rollouts = inner_of(window), rollouts_of(window + 1)
    agent = agents.new_agent(inner, jax.random.key(0), inner.env.default_params, 1000.0)
    rule = init_rule(SPEC, jax.random.key(1))
    live = jax.jit(lambda agent: agents.live(inner, rule, agent, jax.random.key(0), from_these(rollouts, inner)))
    _, (after, lived) = live(agent)
    # A table with plain steps, by hand.
    table, losses = np.asarray(agent.critic, np.float64), []
    for k in range(window + 1):
        state, reward, end = (np.asarray(x[k]) for x in (rollouts.obs[..., 0].astype(int), rollouts.reward, rollouts.end))
        value, advantage, last = table[state, 0], np.zeros((T, B)), 0.0
        if k == window:
            judged = value
        for t in reversed(range(T)):
            last = reward[t] + (1 - end[t]) * 0.99 * (value[t + 1] + 0.95 * last) - value[t]
            advantage[t] = last
        losses.append((advantage**2).mean())
        gradient = np.zeros_like(table)
        np.add.at(gradient, (state[:-1].ravel(), 0), (-2 * advantage / (T * B)).ravel())
        table = table - 1.5 * gradient * min(1, 0.5 / np.linalg.norm(gradient))
    np.testing.assert_allclose(after.critic, table, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(lived.loss_value, np.mean(losses), rtol=1e-4)
    np.testing.assert_allclose(lived.absolute, np.abs(advantage).mean(), rtol=1e-4)
    assert np.abs(judged - table[state, 0]).max() > 1e-3


def test_advantages_have_no_axis_too_many():
    """Of a level with one reward, where [T] against [T, 1] would give every step the same credit."""
    rollout = jax.tree.map(lambda x: x[0], rollouts_of(1))
    advantage, target = levels.advantages(jnp.zeros((T + 1, B)), rollout, 0.99, 0.95)
    assert advantage.shape == target.shape == (T, B)


# ---- The buffer -----------------------------------------------------------------------------------------------------


def numbered(key):
    """Levels that are a number, and a life of seven."""
    return jax.random.uniform(key), jnp.float32(7)


def test_the_buffer_keeps_its_promises():
    """Played by 5 agents that end at random, against flags kept by hand."""
    num, size = 5, 24
    buffer, slots = levels.init_buffer(numbered, jax.random.key(0), size, num)
    scored, rng, replays = np.zeros(size, bool), np.random.default_rng(0), 0

    @jax.jit
    def turn(buffer, slots, ended, score, key, now):
        keys = jax.random.split(key)
        renewed = levels.renew_lowest(buffer, numbered, keys[0], num)
        recorded = levels.record(renewed, slots, ended, score)
        return renewed, *levels.choose(recorded, keys[1], slots, ended, now, CURRICULUM._replace(p_replay=0.7))

    for now in range(1, 60):
        ended = rng.random(num) < 0.6
        score = rng.normal(size=num)
        renewed, after, choice = turn(buffer, slots, ended, score, jax.random.key(now), now)
        fresh = np.asarray(renewed.level != buffer.level)
        assert fresh.sum() == num and not fresh[np.asarray(slots)].any(), "those that are lived on stay"
        if (~scored).sum() - num >= num:
            assert not scored[fresh].any(), "first those that nobody has scored give way"
        scored &= ~fresh
        scored[np.asarray(slots)[ended]] = True
        np.testing.assert_array_equal(scored, ~np.asarray(after.new))
        np.testing.assert_allclose(np.asarray(after.score)[np.asarray(slots)[ended]], score[ended], rtol=1e-6)
        new_slots, replayed = np.asarray(choice.slots), np.asarray(choice.replayed)
        assert len(set(new_slots)) == num and set(new_slots) == set(np.flatnonzero(after.active))
        assert (new_slots[~ended] == np.asarray(slots)[~ended]).all() and not replayed[~ended].any()
        assert scored[new_slots[replayed]].all() and not scored[new_slots[ended & ~replayed]].any()
        replays += replayed.sum()
        buffer, slots = after, choice.slots
    assert replays > 20


def full(score, num=4):
    """A buffer of scored levels that nobody lives on, and behind them as many new ones and those of ``num`` agents."""
    size = len(score)
    rest = size + num
    flags = np.arange(size + rest)
    return levels.Buffer(
        level=jnp.arange(size + rest),
        lifetime=jnp.ones(size + rest),
        score=jnp.concatenate([jnp.asarray(score, jnp.float32), jnp.zeros(rest)]),
        active=jnp.asarray(flags >= 2 * size),
        new=jnp.asarray(flags >= size),
        played=jnp.zeros(size + rest, jnp.int32),
    ), jnp.arange(2 * size, 2 * size + num, dtype=jnp.int32)


SCORE = [0.3, -1.0, 2.0, 0.5, 1.1, 0.0]


def chosen(num_keys=1, **options):
    buffer, slots = full(SCORE)
    curriculum = CURRICULUM._replace(**options)
    pick = jax.jit(jax.vmap(lambda key: levels.choose(buffer, key, slots, jnp.ones(4, bool), 3, curriculum)[1]))
    return jax.tree.map(np.asarray, pick(jax.random.split(jax.random.key(0), num_keys)))


def test_how_often_levels_are_replayed():
    assert not chosen(100, p_replay=0.0).replayed.any() and chosen(100, p_replay=1.0).replayed.all()
    share = chosen(2500, p_replay=0.3).replayed.mean()
    assert abs(share - 0.3) < 4 * np.sqrt(0.21 / 10_000)
    # Never before there are as many scored levels as agents.
    buffer, slots = full(SCORE[:3])
    always = CURRICULUM._replace(p_replay=1.0)
    assert not levels.choose(buffer, jax.random.key(0), slots, jnp.ones(4, bool), 3, always)[1].replayed.any()


def test_what_is_replayed():
    order = np.argsort(SCORE)[::-1]
    np.testing.assert_array_equal(chosen(p_replay=1.0).slots[0], order[:4])
    cold = chosen(50, p_replay=1.0, transform="proportional", temperature=1e-3).slots
    np.testing.assert_array_equal(cold, np.tile(order[:4], (50, 1)))
    warm = chosen(6000, p_replay=1.0, transform="proportional", temperature=1e6).slots[:, 0]
    counts = np.bincount(warm, minlength=6)
    assert np.abs(counts - 1000).max() < 4 * np.sqrt(1000 * 5 / 6)
    # The first draw of "proportional" is a softmax of the scores.
    first = chosen(6000, p_replay=1.0, transform="proportional", temperature=1.0).slots[:, 0]
    share = np.asarray(jax.nn.softmax(jnp.array(SCORE)))
    assert (np.abs(np.bincount(first, minlength=6) / 6000 - share) < 4 * np.sqrt(share * (1 - share) / 6000)).all()


def test_levels_that_were_not_played_for_long():
    buffer, _ = full(SCORE)
    buffer = buffer.replace(played=buffer.played.at[:6].set(jnp.array([9, 9, 9, 9, 0, 9])))
    weight = jnp.exp(levels.replay_weight(buffer, 9, CURRICULUM._replace(staleness=1.0)))
    np.testing.assert_allclose(weight[:6], [0, 0, 0, 0, 1, 0], atol=1e-6)
    half = jnp.exp(levels.replay_weight(buffer, 9, CURRICULUM._replace(staleness=0.5)))
    ranks = 1 / np.array([4, 6, 1, 3, 2, 5])
    expected = 0.5 * ranks / ranks.sum() + 0.5 * np.array([0, 0, 0, 0, 1, 0])
    np.testing.assert_allclose(half[:6], expected, rtol=1e-5)
    assert (half[6:] == 0).all()


def apart(found, plain):
    """Two-sample Kolmogorov-Smirnov: whether both cannot be of one distribution, at a level of 0.001."""
    found, plain = np.sort(found), np.sort(plain)
    both = np.concatenate([found, plain])
    shares = [np.searchsorted(x, both, "right") / len(x) for x in (found, plain)]
    return np.abs(shares[0] - shares[1]).max() > 1.95 * np.sqrt(1 / len(found) + 1 / len(plain))


def test_without_replay_levels_are_those_of_plain_lpg():
    """Of the family that rules are trained on; levels score what their objects pay, so that any preference would show."""
    num, sample = 8, levels.sampler(grid_world.family("all"), 10, 250)
    buffer, slots = jax.jit(lambda key: levels.init_buffer(sample, key, 40, num))(jax.random.key(1))

    def turn(carry, key):
        buffer, slots = carry
        keys = jax.random.split(key, 3)
        ended = jax.random.bernoulli(keys[0], 0.5, (num,))
        buffer = levels.renew_lowest(buffer, sample, keys[1], num)
        buffer = levels.record(buffer, slots, ended, buffer.level.reward[slots].sum(1))
        buffer, choice = levels.choose(buffer, keys[2], slots, ended, 1, CURRICULUM._replace(p_replay=0.0))
        return (buffer, choice.slots), (*drawn(buffer, choice.slots), ended)

    def drawn(buffer, slots):
        level = jax.tree.map(lambda x: x[slots], buffer.level)
        return level.size, level.reward, level.max_steps_in_episode, buffer.lifetime[slots]

    _, (*found, ended) = jax.lax.scan(turn, (buffer, slots), jax.random.split(jax.random.key(2), 600))
    found = [np.asarray(x)[np.asarray(ended)] for x in found]
    level, lifetime = jax.jit(jax.vmap(sample))(jax.random.split(jax.random.key(3), len(found[0])))
    plain = [np.asarray(x) for x in (level.size, level.reward, level.max_steps_in_episode, lifetime)]
    assert len(found[0]) > 2000 and set(found[0]) == set(range(4, 11))
    sizes = [np.bincount(x, minlength=11)[4:] for x in (found[0], plain[0])]
    # Of seven sizes: chi-square of two samples as large as each other, six degrees of freedom.
    assert ((sizes[0] - sizes[1]) ** 2 / (sizes[0] + sizes[1])).sum() < 22.5
    for name, one, other in (("limit", *(x[2] for x in (found, plain))), ("life", *(x[3] for x in (found, plain)))):
        assert not apart(one, other), name
    for kind in range(5):
        assert not apart(found[1][:, kind], plain[1][:, kind]), f"reward of objects of type {kind}"
    assert not apart(found[1].sum(1), plain[1].sum(1)), "what is scored"
    assert apart(found[1].sum(1) + 0.3, plain[1].sum(1)), "the test has no power"


def test_only_those_that_need_it_are_computed():
    flags = jnp.array([0, 1, 0, 0, 1, 1, 0], bool)
    calls = []

    def square(x):
        jax.debug.callback(lambda x: calls.append(float(x)), x)
        return x**2

    out = jax.jit(lambda flags, x: levels.for_those(flags, square, x, 2))(flags, jnp.arange(7.0))
    jax.effects_barrier()
    np.testing.assert_array_equal(out, [0, 1, 0, 0, 16, 25, 0])
    assert len(calls) == 4 and {1.0, 4.0, 5.0} <= set(calls)
    none = jax.jit(lambda flags, x: levels.for_those(flags, jnp.square, x, 2))(jnp.zeros(7, bool), jnp.arange(7.0))
    assert (none == 0).all()


# ---- Regret ---------------------------------------------------------------------------------------------------------


def test_regret_of_an_agent_to_its_like_is_zero():
    inner = meta.inner_of(meta.Args(levels="debug", num_envs=8, num_steps=5), SPEC)
    num = 48
    sampled = held_out.sample(inner.family, num)

    def both(level, key):
        one, other = (agents.a2c_earns(inner, level, 20, k) for k in jax.random.split(key))

        def uniform(obs, key):
            return jax.random.randint(key, obs.shape[:1], 0, 5)

        return one, other, levels.episode_return(inner.env, uniform, level, key, 8)

    one, other, plain = (np.asarray(x) for x in jax.jit(jax.vmap(both))(sampled, jax.random.split(jax.random.key(0), num)))
    gap = one - other
    assert abs(gap.mean()) < 3 * gap.std() / np.sqrt(num)
    # The antagonist has learned something: it earns more than chance, beyond three standard errors.
    gain = one - plain
    assert gain.mean() > 3 * gain.std() / np.sqrt(num)


def test_regret_scales_with_rewards():
    """Four times the rewards are four times either regret, to the bit, of agents that are given."""
    inner = meta.inner_of(meta.Args(levels="debug", num_envs=8, num_steps=5), SPEC)
    numbers = levels.A2C(inner.outcome.gamma, inner.outcome.gae_lambda)

    def regrets(level, key):
        keys = jax.random.split(key, 4)
        learner = inner.algorithm.init(keys[0], inner.algorithm.hypers, level).learner
        policy, params = levels.train_a2c(inner.env, inner.setup, inner.algorithm.hypers, numbers, level, 20, keys[1])

        def on(level):
            opponent = levels.episode_return(
                inner.env, lambda obs, key: policy(params, obs).sample(key), level, keys[2], inner.setup.num_envs
            )
            own = agents.earns(inner, learner, level, keys[3])
            return opponent - own, grid_world.optimal_return(inner.family, level) - own

        return on(level), on(level._replace(reward=4 * level.reward))

    keys = jax.random.split(jax.random.key(0), 16)
    plain, dear = jax.jit(jax.vmap(regrets))(held_out.sample(inner.family, 16), keys)
    for one, other in zip(plain, dear, strict=True):
        np.testing.assert_array_equal(other, 4 * one)
        assert len(np.unique(one)) > 8
    assert plain[1].mean() > plain[0].mean(), "the optimum is hard to beat"


# ---- Whole meta-trainers --------------------------------------------------------------------------------------------


def test_groove_from_meta_update_to_meta_update():
    trainer = trainer_of(lifetime=(4, 8), score="alg_regret", buffer_size=14, p_replay=1.0, eval_levels=1)
    state, step = jax.jit(trainer.init)(jax.random.key(0)), jax.jit(trainer.step)
    ages = np.asarray(state.agents.state.env_steps) // 20
    assert (ages < state.agents.lifetime).all() and len(set(ages)) > 1, "not all are born at once"
    replayed = 0
    for _ in range(12):
        before = state
        state, metrics = step(state)
        assert all(np.isfinite(value) for value in metrics.values()) and metrics["refused"] == metrics["broken"] == 0
        ages, old = (np.asarray(s.agents.state.env_steps) // 20 for s in (state, before))
        ended = old + 2 >= np.asarray(before.agents.lifetime)
        np.testing.assert_array_equal(ages, np.where(ended, 0, old + 2))
        assert metrics["ended"] == ended.sum()
        slots = np.asarray(state.slots)
        assert set(slots) == set(np.flatnonzero(state.buffer.active)) and len(set(slots)) == 4
        np.testing.assert_array_equal(state.agents.state.env_params.start, state.buffer.level.start[slots])
        np.testing.assert_array_equal(state.agents.lifetime, state.buffer.lifetime[slots])
        replayed += metrics["replayed"]
    assert replayed > 0 and metrics["scored"] >= 4 and state.count == 12
    first, last = (ravel_pytree(s.rule)[0] for s in (jax.jit(trainer.init)(jax.random.key(0)), state))
    assert 0 < np.abs(first - last).max() <= 12 * 1.1e-4, "Adam's steps are no longer than its rate"
    assert trainer.env_steps_per_step == 4 * 3 * 4 * 5 and trainer.kind == "lpg"


def test_a_levels_score_is_what_its_own_agent_left_to_be_earned(monkeypatch):
    """Returns that tell levels and players apart; agents end at different times, those born old count for nothing."""

    def opponent(inner, level, lifetime, key):
        return 100.0 + level.start

    def player(inner, learner, level, key):
        return 0.5 * level.start

    monkeypatch.setattr(gradient, "a2c_earns", opponent)
    monkeypatch.setattr(gradient, "earns", player)
    trainer = trainer_of(lifetime=(4, 8), score="alg_regret", buffer_size=14, p_replay=0.0, eval_levels=1)
    state, step = jax.jit(trainer.init)(jax.random.key(0)), jax.jit(trainer.step)
    born = np.asarray(state.agents.state.env_steps) // 20
    scored = skipped = 0
    for _ in range(8):
        before, (state, _) = state, step(state)
        ended = np.asarray(before.agents.state.env_steps) // 20 + 2 >= np.asarray(before.agents.lifetime)
        slots = np.asarray(before.slots)
        for agent in np.flatnonzero(ended):
            # Levels that nobody lives on may have been renewed before it ended, but not its own.
            assert not state.buffer.active[slots[agent]] or slots[agent] in np.asarray(state.slots)
            if born[agent]:
                skipped += 1
                assert state.buffer.new[slots[agent]]
            elif not state.buffer.active[slots[agent]]:
                scored += 1
                assert not state.buffer.new[slots[agent]]
                left = 100 + 0.5 * before.agents.state.env_params.start[agent]
                np.testing.assert_allclose(state.buffer.score[slots[agent]], left)
        born = np.where(ended, 0, born)
    assert scored >= 3 and skipped >= 1


def test_scores_of_agents_that_broke_are_not_kept():
    buffer, slots = levels.init_buffer(levels.sampler(grid_world.family("small"), 2, 4), jax.random.key(0), 6, 3)
    ended, score = jnp.array([True, True, False]), jnp.array([jnp.nan, 2.0, 3.0])
    kept = levels.record(buffer, slots, ended, score, jnp.array([True, False, True]))
    assert kept.new.all() and (kept.score == 0).all()
    assert kept.active.tolist() == [False, False, True, False, False, False]
    kept = levels.record(buffer, slots, ended, score)
    assert kept.new.tolist() == [True, False, True, True, True, True] and kept.score[1] == 2


def test_a_rule_is_judged_with_the_step_sizes_it_was_made_with():
    trainer = trainer_of(actor_lr=7.0, predictor_lr=3.0, alpha_y=0.2, gamma=0.8, gamma_input=True, eval_levels=1)
    rule = Learned("lpg", trainer.learned(trainer.init(jax.random.key(0))), trainer.convention, {})
    inner, _ = meta.inner_of_rule(rule, "small")
    hypers = inner.algorithm.hypers
    assert [float(x) for x in (hypers.learning_rate, hypers.predictor_lr)] == [7, 3]
    np.testing.assert_allclose(hypers.alpha_y, 0.2)
    assert (inner.setup.num_envs, inner.setup.num_steps) == (4, 5) and inner.algorithm.core.spec.gamma_input
    # Small networks with Adam have their own.
    np.testing.assert_allclose(meta.inner_of_rule(rule, "rand_dense")[0].algorithm.hypers.learning_rate, 1e-3)
    # And in meta-training the rule is told the discount of the outcome.
    told = meta.inner_of(meta.Args(levels="debug", gamma=0.8), SPEC).algorithm.hypers.gamma
    np.testing.assert_allclose(told, 0.8)


def test_the_learning_rate_of_evolution_is_the_published_one_if_none_is_given():
    """Adam's first step is as long as its rate; that of meta-gradients is bounded in the test of GROOVE."""
    trainer = trainer_of(method="evolution", lifetime=(2, 2), eval_levels=1)
    state = jax.jit(trainer.init)(jax.random.key(0))
    after, _ = jax.jit(trainer.step)(state)
    first, last = (ravel_pytree(trainer.learned(s))[0] for s in (state, after))
    np.testing.assert_allclose(np.abs(first - last).max(), 1e-2, rtol=0.05)


def test_evolution_of_whole_lives():
    options = dict(temporal="relative", lifetime=(2, 5), method="evolution", lr=0.01, start="zero", eval_levels=1)
    trainer = trainer_of(**options)
    state = jax.jit(trainer.init)(jax.random.key(0))
    assert (ravel_pytree(trainer.learned(state))[0] == 0).all()
    state, metrics = jax.jit(trainer.step)(state)
    assert np.abs(ravel_pytree(trainer.learned(state))[0]).max() > 0 and metrics["failed"] == 0
    assert set(metrics) == {"fitness_mean", "fitness_best", "ties", "failed", "sigma", "rule_norm"}


def test_partners_begin_alike_and_short_lives_end_early():
    inner = inner_of(1, spec=RuleSpec(num_predictions=3, hidden_size=4, embedding_size=3, temporal="relative"))
    rule = init_rule(inner.algorithm.core.spec, jax.random.key(5))
    level, keys = inner.env.default_params, jax.random.split(jax.random.key(0), 3)
    grown = jax.jit(lambda life, key_life, longest: agents.raised(inner, rule, level, life, keys[0], key_life, longest))
    one, other = (grown(jnp.float32(3), key, 0) for key in keys[1:])
    for a, b in zip(
        jax.tree.leaves((one.learner, one.env_state)), jax.tree.leaves((other.learner, other.env_state)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    short, long = grown(jnp.float32(3), keys[1], 3), grown(jnp.float32(3), keys[1], 9)
    for a, b in zip(jax.tree.leaves(short.learner), jax.tree.leaves(long.learner), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (one.learner.params.actor != short.learner.params.actor).any() and long.env_steps == 9 * T * B


def test_agents_of_shorter_lives_are_judged_as_they_were_at_their_end():
    """Beside others that live 25 times as long, as by themselves."""
    spec = RuleSpec(num_predictions=3, hidden_size=4, embedding_size=3, temporal="relative")
    inner = meta.inner_of(meta.Args(levels="debug", num_envs=16, num_steps=10), spec)
    pair = jax.tree.map(lambda *x: jnp.stack(x), *(init_rule(spec, jax.random.key(i)) for i in (5, 6)))
    population = jax.tree.map(lambda x: jnp.concatenate([x, x]), jax.tree.map(lambda x: 5 * x, pair))
    level, key = held_out.sample(inner.family, 2), jax.random.key(3)

    def fitness(lifetime):
        lifetime = jnp.asarray(lifetime, jnp.float32)
        return whole_lives.fitness_of(inner, population, level, lifetime, key, 1, jax.devices()[:1]).reshape(2, 2)

    long, short, shorter = fitness([10, 250]), fitness([10, 10]), fitness([1, 10])
    np.testing.assert_array_equal(long[0], short[0])
    assert (long[1] != short[1]).any() and (shorter[0] != short[0]).any()


def test_the_rule_is_told_how_old_its_agent_is(monkeypatch):
    """n = 0 to N - 1 of N updates, whatever episodes end meanwhile."""
    inner = inner_of(1, spec=RuleSpec(num_predictions=3, hidden_size=4, embedding_size=3, temporal="relative"))
    told, ask = [], lpg.ask_rule

    def spy(core, rule, params, rollout, updates, lifetime, gamma):
        jax.debug.callback(lambda *x: told.append([float(each) for each in x]), updates, lifetime, rollout.end.sum())
        return ask(core, rule, params, rollout, updates, lifetime, gamma)

    monkeypatch.setattr(lpg, "ask_rule", spy)
    rule, level = init_rule(inner.algorithm.core.spec, jax.random.key(5)), inner.env.default_params
    agents.raised(inner, rule, level, jnp.float32(7), *jax.random.split(jax.random.key(0)))
    jax.effects_barrier()
    assert [row[:2] for row in sorted(told)] == [[n, 7] for n in range(7)]
    assert sum(row[2] for row in told) > 0, "episodes ended"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gradient", "evolution"])
def test_two_host_devices_give_what_one_gives(method, tmp_path):
    """To rounding, for means are of other groups; on the same devices a run cut short goes on bit for bit."""
    code = """
import sys
from pgjax.host import lanes
lanes.use_host_devices(2)
from pgjax.experiments.meta_train import loop, lpg
from tests.test_meta_lpg import trainer_of
out, method = sys.argv[1:]
for name in ("CHECKPOINT_SECONDS", "REPORT_SECONDS", "CHUNK_SECONDS"):
    setattr(loop, name, 0.0)
loop.CHECKPOINT_SHARE = 1e9
def end(text):
    if "step      2" in text:
        raise KeyboardInterrupt
for devices in (1, None):
    trainer = trainer_of(method=method, lifetime=(2, 5), lr=1e-3, devices=devices)._replace(report=None)
    assert len(trainer.devices) == (devices or 2)
    loop.meta_train(trainer, f"{out}/{devices}", 4)
try:
    loop.meta_train(trainer, f"{out}/cut", 4, say=end)
except KeyboardInterrupt:
    loop.meta_train(trainer, f"{out}/cut", 4, resume=True)
"""
    done = run_python(code, str(tmp_path), method, timeout=900)
    assert done.returncode == 0, done.stderr
    one, two, cut = (learned_files.load(tmp_path / name / "learned.npz", "lpg") for name in ("1", "None", "cut"))
    assert len(cut.provenance["sessions"]) == 2
    for a, b, c in zip(*(jax.tree.leaves(x.params) for x in (one, two, cut)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
        np.testing.assert_array_equal(b, c)
    logs = ([list(row.values())[:-1] for row in loop.read_log(tmp_path / name)] for name in ("1", "None", "cut"))
    one, two, cut = map(np.asarray, logs)
    np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(two, cut)


def test_partners_are_the_same_agent_in_the_same_place_at_birth(monkeypatch):
    """Judged by all numbers of agent and environment before the first update, which differ from pair to pair."""

    def born(inner, rule, level, lifetime, key_birth, *_):
        state = inner.algorithm.init(key_birth, inner.algorithm.hypers, level)
        return state.replace(learner=(state.learner.params, state.obs, level.reward))

    def weighed(inner, numbers, level, key):
        flat = ravel_pytree(numbers)[0]
        return flat @ jnp.sin(jnp.arange(len(flat)))

    monkeypatch.setattr(whole_lives, "raised", born)
    monkeypatch.setattr(whole_lives, "earns", weighed)
    inner, num = inner_of(1), 8
    keys = jax.random.split(jax.random.key(6), num)

    @jax.jit
    def play(key):
        level = jax.vmap(inner.family.sample)(keys)
        return whole_lives.fitness_of(inner, jnp.zeros(2 * num), level, jnp.ones(num), key, 2, jax.devices()[:1])

    first, second = np.asarray(play(jax.random.key(7))).reshape(num, 2).T
    np.testing.assert_array_equal(first, second)
    assert len(set(first)) == num


def test_between_equal_partners_it_is_a_fair_coin_who_wins():
    """One rule for all, as with a σ of zero: neither place in a pair is better, and ties are nobody's."""
    inner, num = inner_of(1), 384
    rule = init_rule(SPEC, jax.random.key(5))
    population = jax.tree.map(lambda x: jnp.broadcast_to(x, (2 * num, *x.shape)), rule)

    @jax.jit
    def play(key_tasks, key):
        tasks = jax.vmap(levels.sampler(inner.family, 1, 4))(jax.random.split(key_tasks, num))
        return whole_lives.fitness_of(inner, population, *tasks, key, 2, jax.devices()[:1])

    fitness = play(jax.random.key(6), jax.random.key(7))
    first, second = np.asarray(fitness).reshape(num, 2).T
    decided = first != second
    assert decided.sum() > num / 3, "partners have luck of their own"
    assert abs((first > second)[decided].mean() - 0.5) < 3 * 0.5 / np.sqrt(decided.sum())
    weights = np.asarray(evolution.pair_ranks(fitness)).reshape(num, 2)
    assert (weights[~decided] == 0.5).all() and (~decided).sum() > 20
    assert abs(weights[:, 0].mean() - 0.5) < 3 * 0.5 * np.sqrt(decided.sum()) / num


def test_requests_that_make_no_sense_are_refused():
    for changes, words in (
        ({"levels": "al"}, "levels = 'al' are unknown; did you mean"),
        ({"parts": 3}, "parts = 3 must divide agents = 4"),
        ({"lifetime": (9, 3)}, r"lifetime = \(9, 3\)"),
        ({"score": "regret"}, "score = 'regret'"),
        ({"score": "alg_regret", "buffer_size": 8}, "buffer_size = 8"),
        ({"score": "alg_regret", "p_replay": 1.5}, "p_replay = 1.5"),
        ({"score": "alg_regret", "method": "evolution"}, "method = 'evolution'"),
        ({"levels": "rand_small", "score": "optimal_regret"}, "optimal_regret"),
        ({"devices": 9}, "devices = 9"),
        ({"agents": 0}, "^agents = 0"),
        ({"method": "evolve"}, "^method = 'evolve' is not one of gradient, evolution"),
    ):
        with pytest.raises(RequestError, match=words):
            trainer_of(**changes)


def test_groove_is_lpg_with_a_curriculum():
    assert get("lpg") is meta and get("groove").Args().score == "alg_regret" and meta.Args().score == "random"
    assert groove.build is meta.build


@pytest.mark.slow
def test_the_picture_of_targets(tmp_path):
    spec = RuleSpec(num_predictions=3, hidden_size=4, embedding_size=3)
    convention = convention_of(spec, num_envs=8, num_steps=20)
    rule = Learned("lpg", init_rule(spec, jax.random.key(0)), convention, {})
    maps = picture.targets(rule, "sparse", updates=4)
    assert all(x.shape == (13, 13) for x in maps.values())
    seen = np.isfinite(maps["pi_hat"])
    assert seen[6, 6] and 10 < seen.sum() < 169 and (np.isfinite(maps["y_hat"]) == seen).all()
    # With half of 50 steps left the one object that pays is worth 1 from anywhere within 25 steps.
    np.testing.assert_allclose(maps["value"][6, 6], 1.0)
    assert picture.draw(maps, "sparse", tmp_path / "targets.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gradient", "evolution"])
def test_meta_training_through_the_loop_equals_its_steps_from_a_checkpoint(method, tmp_path):
    """Six meta-updates by the loop, and three, then three more from disk; two programs, so equal within rounding."""
    options = dict(lifetime=(2, 4), method=method, eval_levels=2, lr=1e-3)
    trainer = trainer_of(**options, **({"score": "alg_regret", "buffer_size": 14} if method == "gradient" else {}))
    loop.meta_train(trainer, tmp_path / "once", 6, say=lambda text: None)
    state = jax.jit(trainer.init)(jax.random.key(0))
    assert set(learned_files.load(tmp_path / "once" / "learned.npz", "lpg").provenance["held_out"]) >= {"normalized_rule"}
    step = jax.jit(trainer.step)
    for _ in range(3):
        state, _ = step(state)
    checkpoints.save_checkpoint(tmp_path, 3, state, {})
    state, _ = checkpoints.load_checkpoint(tmp_path, 3, jax.eval_shape(trainer.init, jax.random.key(0)))
    for _ in range(3):
        state, _ = step(state)
    learned = learned_files.load(tmp_path / "once" / "learned.npz", "lpg")
    for one, other in zip(jax.tree.leaves(learned.params), jax.tree.leaves(trainer.learned(state)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
    env = make_env("grid/debug", observation="index")
    algorithm = make("lpg", env, rule=tmp_path / "once" / "learned.npz", hidden_sizes=(), torso="table", optimizer="sgd")
    assert algorithm.hypers.rule["pi_hat"]["kernel"].shape == (8, 1)
