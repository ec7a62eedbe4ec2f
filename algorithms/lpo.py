"""LPO, Learnt Policy Optimisation (Lu et al. 2022, arXiv 2210.05639), and TA-LPO (Jackson et al. 2024, arXiv 2402.05828).

PPO whose clip is replaced by a drift function with learned parameters, found by evolution over whole training runs. Nothing
is learned about it here: ``objective`` makes the plug of parameters that were, and any method that takes an objective runs
with it. TA-LPO's drift also depends on how much of the run is behind.
"""

import dataclasses
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np

from pgjax.algorithms import ppo
from pgjax.algorithms.ppo import Hypers, Setup
from pgjax.errors import RequestError, close_names
from pgjax.learned import files as learned_files
from pgjax.types import Objective, PyTree

__all__ = ["DEFINING", "Convention", "Hypers", "Setup", "drift", "features", "init_params", "make", "objective", "surrogate"]

# The drift is learned on advantages of unit variance.
DEFINING = ("normalize_advantage",)
KIND = "lpo"
# Row i of the other order is row ORDER[i] of the authors', times SIGN[i]; of the second eight likewise.
_ORDER = np.array([2, 3, 0, 1, 6, 7, 4, 5])
_SIGN = np.array([-1.0, 1, 1, 1, -1, 1, 1, 1])
# Log ratios beyond this count as this much: the squares of what lies further do not fit float32. paper: no bound.
_FAR = 40.0


@dataclasses.dataclass(frozen=True)
class Convention:
    """Everything without which the weights mean nothing; it is stored with them.

    form: ``ppo``: f = relu(relu((ρ - clip(ρ, 1-ε, 1+ε)) Â) + g - ξ);  ``scratch``: f = relu(g - ξ).
    features: ``authors``: log ρ, (log ρ)², 1 - ρ, (1 - ρ)², then each times Â;  ``ratio_first``: ρ - 1, (ρ - 1)², log ρ,
      (log ρ)², then each times Â, as third-party code has it.
    temporal: whether the features times progress follow (TA-LPO): 16 in place of 8.
    ppo_eps, xi: ε and ξ above.  feature_clip: bound of the absolute value of each of the eight features, None for none.
    """

    form: Literal["ppo", "scratch"] = "ppo"
    features: Literal["authors", "ratio_first"] = "authors"
    temporal: bool = False
    ppo_eps: float = 0.2
    xi: float = 1e-4
    feature_clip: float | None = None

    @property
    def num_features(self) -> int:
        return 16 if self.temporal else 8

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Convention":
        """The way back from ``dataclasses.asdict``. Raises: RequestError for a field or value that is not known here."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise RequestError(f"convention.{name} is not a field of LPO's; {close_names(name, known)}")
        convention = cls(**fields)
        for name, choices in (("form", ("ppo", "scratch")), ("features", ("authors", "ratio_first"))):
            if getattr(convention, name) not in choices:
                raise RequestError(f"convention.{name} = {getattr(convention, name)!r} is not one of {', '.join(choices)}")
        if not convention.xi > 0 or not 0 < convention.ppo_eps < 1:
            raise RequestError(
                f"convention: xi = {convention.xi}, ppo_eps = {convention.ppo_eps}; give xi > 0, which keeps the drift flat "
                "around the old policy, and ppo_eps in (0, 1)"
            )
        return convention


def init_params(key: jax.Array, temporal: bool = False, hidden: int = 128) -> dict[str, jax.Array]:
    """A start for the search: ``{"hidden": [F, H], "out": [H, 1]}``, the first LeCun normal, the second zero.

    The drift is then exactly PPO's, or none at all, and the search still has a direction: with both kernels zero the network
    is an even function of its parameters, so that antithetic members are equals and no evolution strategy can leave.
    authors' code: both zero / here: the hidden kernel drawn.
    """
    num_features = Convention(temporal=temporal).num_features
    hidden_kernel = jax.nn.initializers.lecun_normal()(key, (num_features, hidden), jnp.float32)
    return {"hidden": hidden_kernel, "out": jnp.zeros((hidden, 1))}


def features(log_ratio: jax.Array, advantage: jax.Array, convention: Convention = Convention()) -> jax.Array:
    """What the drift network sees, [N, 8]; all zero where the policy is the old one."""
    log_ratio = jnp.clip(log_ratio, -_FAR, _FAR)
    beyond = jnp.expm1(log_ratio)
    if convention.features == "authors":
        d = jnp.stack([log_ratio, log_ratio**2, -beyond, beyond**2], -1)
    else:
        d = jnp.stack([beyond, beyond**2, log_ratio, log_ratio**2], -1)
    x = jnp.concatenate([d, advantage[..., None] * d], -1)
    if convention.feature_clip is not None:
        x = jnp.clip(x, -convention.feature_clip, convention.feature_clip)
    return x


def network(params: PyTree, x: jax.Array, progress=0.0) -> jax.Array:
    """g [N] of features [N, 8]: a hidden layer of tanh units and no biases, so that g is 0 where the features are.

    A hidden kernel [16, H] is two: the second, times progress, is added to the first, which is the same as to give the network
    the features times progress as well. As an input of its own progress would not vanish at ratio 1, and the drift would not.
    """
    hidden, num = params["hidden"], x.shape[-1]
    if hidden.shape[0] > num:
        hidden = hidden[:num] + progress * hidden[num:]
    # Without the squeeze, [N, 1] beside [N] would become a plausible [N, N].
    return (jnp.tanh(x @ hidden) @ params["out"]).squeeze(-1)


def drift(
    params: PyTree,
    log_ratio: jax.Array,
    advantage: jax.Array,
    progress=0.0,
    convention: Convention = Convention(),
) -> jax.Array:
    """f [N], what is taken off ρ Â: never negative, and zero with its slope around ratio 1 for any parameters.

    Args: params as of ``init_params``; log_ratio [N], log ρ; advantage [N], standardised; progress scalar in [0, 1].
    Source: section 4 of Lu et al. 2022; eq. 10 of Jackson et al. 2024.
    """
    g = network(params, features(log_ratio, advantage, convention), progress)
    chex.assert_equal_shape([g, log_ratio, advantage])
    return jax.nn.relu(_ppo_drift(log_ratio, advantage, convention) + g - convention.xi)


def surrogate(
    params: PyTree,
    log_ratio: jax.Array,
    advantage: jax.Array,
    progress=0.0,
    convention: Convention = Convention(),
) -> jax.Array:
    """LPO's objective per sample [N], to be maximised: ρ Â - f. Arguments as of ``drift``.

    With p PPO's drift, ρ Â - relu(p + g - ξ) = (ρ Â - p) + min(p, ξ - g), whose first part is PPO's clipped surrogate: far
    from the old policy nothing large is taken off something large.
    """
    g = network(params, features(log_ratio, advantage, convention), progress)
    chex.assert_equal_shape([g, log_ratio, advantage])
    if convention.form == "scratch":
        return jnp.exp(log_ratio) * advantage - jax.nn.relu(g - convention.xi)
    penalty = _ppo_drift(log_ratio, advantage, convention)
    return ppo.clip_surrogate(log_ratio, advantage, convention.ppo_eps) + jnp.minimum(penalty, convention.xi - g)


def _ppo_drift(log_ratio, advantage, convention):
    if convention.form == "scratch":
        return jnp.zeros_like(log_ratio)
    # As in PPO's surrogate: not infinite, for its slope is taken off again.
    ratio = jnp.exp(jnp.where(advantage > 0, jnp.minimum(log_ratio, 80.0), log_ratio))
    return jax.nn.relu((ratio - jnp.clip(ratio, 1 - convention.ppo_eps, 1 + convention.ppo_eps)) * advantage)


def objective(learned: "learned_files.Learned | PyTree", convention: Convention | None = None) -> Objective:
    """The plug: ``ppo.make(env, setup, objective=lpo.objective(learned))``; ``hypers.objective`` then holds the network.

    Args:
      learned: what ``learned_files.load(name_or_file, "lpo")`` returns, or parameters as of ``init_params``.
      convention: of bare parameters; those of a file have their own.
    Raises: RequestError if parameters and convention do not fit.
    """
    limits = None
    if isinstance(learned, learned_files.Learned):
        if learned.kind != KIND:
            raise RequestError(f"learned.kind = {learned.kind!r} is no drift of LPO; give one of kind {KIND!r}")
        convention = Convention.from_dict(learned.convention)
        limits = learned_files.limits_of(learned)
        learned = learned.params
    convention = convention or Convention()
    _check_params(learned, convention)

    def fn(sample, params):
        return surrogate(params, sample.log_ratio, sample.advantage, sample.progress, convention)

    return Objective(fn, learned, limits)


def _check_params(params, convention: Convention) -> None:
    shapes = {name: np.shape(params[name]) for name in params} if isinstance(params, dict) else {}
    if set(shapes) != {"hidden", "out"} or shapes["hidden"][0] != convention.num_features:
        raise RequestError(
            f"params has {shapes or type(params).__name__}; with temporal = {convention.temporal}, LPO's network is "
            f"hidden [{convention.num_features}, H] and out [H, 1]"
        )
    if shapes["out"] != (shapes["hidden"][1], 1):
        raise RequestError(f"params: hidden is {shapes['hidden']} and out is {shapes['out']}; out must be [H, 1]")


def convert(params: PyTree, convention: Convention, to: Literal["authors", "ratio_first"]) -> tuple[PyTree, Convention]:
    """The same drift in the other order of features: rows of the hidden kernel change places, and two change sign."""
    if convention.features == to:
        return params, convention
    order, sign = _ORDER, _SIGN
    if to == "authors":
        order, sign = np.argsort(_ORDER), _SIGN[np.argsort(_ORDER)]
    blocks = range(convention.num_features // 8)
    rows = np.concatenate([order + 8 * block for block in blocks])
    sign = np.tile(sign, len(blocks)).astype(np.float32)
    hidden = jnp.asarray(params["hidden"])[rows] * sign[:, None]
    return {**params, "hidden": hidden}, dataclasses.replace(convention, features=to)


def unflatten(vector: np.ndarray, temporal: bool = False) -> dict[str, np.ndarray]:
    """Parameters of a flat vector as the authors' trainer saves them: the hidden kernel row by row, then the output."""
    vector = np.asarray(vector, np.float32)
    num_features = Convention(temporal=temporal).num_features
    hidden, rest = divmod(vector.size, num_features + 1)
    if vector.ndim != 1 or rest or not hidden:
        raise RequestError(f"a vector of shape {vector.shape} is no drift network with {num_features} features")
    cut = num_features * hidden
    return {"hidden": vector[:cut].reshape(num_features, hidden), "out": vector[cut:].reshape(hidden, 1)}


def upper_clip(params: PyTree, convention: Convention, progress, share: float = 0.1, largest: float = 8.0) -> jax.Array:
    """Up to which ratio a sample with Â = 1 pushes: dJ/dρ above ``share`` of Â from 1 to there; on a grid up to ``largest``.

    What a network says again further out, where samples seldom come, does not count.

    Args: progress: any shape [...].  Returns: [...]; ``largest`` if it pushes that far, 1 if nowhere beyond the old policy.
    """
    ratio = jnp.linspace(1.0, largest, 2001)
    advantage = jnp.ones_like(ratio)

    def one(progress):
        slope = jax.grad(lambda l: surrogate(params, l, advantage, progress, convention).sum())(jnp.log(ratio)) / ratio
        return jnp.where(jnp.cumprod(slope > share), ratio, 1.0).max()

    progress = jnp.asarray(progress, jnp.float32)
    return jax.vmap(one)(progress.ravel()).reshape(progress.shape)


def make(env, setup: Setup = Setup(), hypers: Hypers = Hypers(), *, objective, networks=None):  # noqa: B008
    """PPO with a learned ``objective``, one of ``objective(...)``; the same as ``ppo.make`` with it."""
    return ppo.make(env, setup, hypers, objective=objective, networks=networks)
