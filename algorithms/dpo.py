"""DPO, Discovered Policy Optimisation (Lu et al. 2022, arXiv 2210.05639).

PPO whose clip is replaced by the closed form that a meta-learned drift function was seen to have. It has nothing to do with
Direct Preference Optimisation, which goes by the same letters.
"""

import jax
import jax.numpy as jnp

from pgjax import on_policy
from pgjax.algorithms.ppo import Setup
from pgjax.updates import minibatch_sgd, plug

# The two constants are tuned to advantages of unit variance.
DEFINING = ("normalize_advantage",)


class Hypers(on_policy.Hypers):
    """alpha: where positive advantages saturate.  beta: where negative ones are rolled back."""

    learning_rate: jax.Array | float = 3e-4
    alpha: jax.Array | float = 2.0
    beta: jax.Array | float = 0.6


def dpo_surrogate(log_ratio: jax.Array, advantage: jax.Array, alpha=2.0, beta=0.6) -> jax.Array:
    """DPO's objective per sample, to be maximised: ρ Â less the drift f.

    Â >= 0: f = relu(u - α tanh(u/α)) with u = (ρ - 1) Â;  Â < 0: f = relu(w - β tanh(w/β)) with w = Â log ρ.
    Args: log_ratio [N], log ρ; advantage [N], standardised over the minibatch; alpha, beta scalars.
    Returns: [N], in units of the advantage.
    Source: luchris429/purejaxrl ``dpo_continuous_action.py``. Written without the cancellation of ρ Â - f, whose value is
    wrong by 1e-2 in float32 at large ratios.
    """
    positive, beyond = advantage >= 0, log_ratio > 0
    saturates = positive & beyond
    # Each branch sees only its own samples: an overflow in the other one would make the gradient NaN. Beyond a log ratio
    # of 40 the hyperbolic tangent is 1 whatever the advantage that float32 can tell from 0.
    gain = jnp.exp(jnp.where(saturates, 0, log_ratio)) * advantage
    u = jnp.expm1(jnp.where(saturates, jnp.minimum(log_ratio, 40), 0)) * advantage
    w = jnp.where(positive | beyond, 0, log_ratio) * advantage
    saturating = advantage + alpha * jnp.tanh(u / alpha)
    rolled_back = gain - (w - beta * jnp.tanh(w / beta))
    return jnp.where(saturates, saturating, rolled_back)


def make(env, setup: Setup = Setup(), hypers: Hypers = Hypers(), *, objective=None, networks=None):  # noqa: B008
    """DPO on ``env``. ``objective`` replaces its own: ``f(log_ratio, advantage)`` or a ``pgjax.Objective``."""

    def discovered(sample, hypers, extra):
        return dpo_surrogate(sample.log_ratio, sample.advantage, hypers.alpha, hypers.beta)

    objective, hypers = plug(objective, discovered, hypers)
    return on_policy.make("dpo", env, setup, hypers, update=minibatch_sgd(objective), networks=networks)
