"""The recurrent network that stands for an update rule in LPG: what it is fed, and what it says of every step.

It reads a short rollout backwards in time, from T - 1 to 0, and forgets at the end of an episode, so what it says of a step
depends on the rest of its episode alone. It sees no observation and not which action was taken, only how probable that was:
the same weights serve every environment.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_type_hints

import jax
import jax.numpy as jnp

from pgjax.errors import RequestError
from pgjax.networks import draw_kernels
from pgjax.on_policy import check_choices, check_counts
from pgjax.types import PyTree

# What a positive π̂ does to the probability of the action: the paper's convention, in which parameters are kept here.
RAISES, LOWERS = "raises", "lowers"


@dataclasses.dataclass(frozen=True)
class RuleSpec:
    """What fixes the shapes and the meaning of a rule's parameters.

    num_predictions: m, the length of the agent's prediction vector y.
    cell, hidden_size: of the recurrent network. paper: LSTM, 256 / authors' code of GROOVE: GRU, 256 / here: either.
    embedding_size: hidden units of the embedding e(y), which is one number.
    temporal: whether the rule is told the agent's age: ``none``; ``relative``, n/N and log N (TA-LPG); ``raw``, n and N, as in
        the authors' code of TA-LPG.  n: updates done before this one; N: all that there will be.
    gamma_input: whether the rule is told the discount, as in the paper.
    """

    num_predictions: int = 8
    hidden_size: int = 256
    cell: Literal["gru", "lstm"] = "gru"
    embedding_size: int = 16
    temporal: Literal["none", "relative", "raw"] = "none"
    gamma_input: bool = False

    @property
    def num_inputs(self) -> int:
        return 5 + self.gamma_input + 2 * (self.temporal != "none")


class RuleInputs(NamedTuple):
    """What a rule is fed: arrays [T, B, ...], or scalars, which are the same for all steps.

    reward: [T, B].  end: [T, B] bool, whether the episode ended with this step, for whatever reason.
    prob: [T, B], of the action that was taken.  prediction, next_prediction: [T, B, m], y of the observation acted on and of
    its successor, each summing to 1; the latter is not read where the episode ended.
    updates, lifetime: n and N.  gamma: the discount. Each is read only by rules that take it.
    """

    reward: jax.Array
    end: jax.Array
    prob: jax.Array
    prediction: jax.Array
    next_prediction: jax.Array
    updates: Any = 0.0
    lifetime: Any = 1.0
    gamma: Any = 1.0


def validate_spec(spec: RuleSpec) -> None:
    """Raises RequestError for a rule that cannot be."""
    check_counts(spec, ("num_predictions", "hidden_size", "embedding_size"))
    check_choices(spec)


def init_rule(spec: RuleSpec, key: jax.Array) -> dict[str, PyTree]:
    """Parameters of a rule, drawn as Flax draws those of dense layers and cells; consumes ``key``."""
    validate_spec(spec)
    key_dense, key_recurrent = jax.random.split(key)
    width, gates = spec.hidden_size, {"gru": 3, "lstm": 4}[spec.cell]
    shapes = [
        *((spec.num_predictions, spec.embedding_size), (spec.embedding_size, 1), (spec.num_inputs, gates * width)),
        *((width, 1), (width, spec.num_predictions)),
    ]
    hidden, embedding, inputs, pi_hat, y_hat = (
        {"kernel": kernel, "bias": jnp.zeros(kernel.shape[1])} for kernel in draw_kernels(key_dense, shapes, "lecun_normal")
    )
    recurrent = {"kernel": jnp.concatenate(draw_kernels(key_recurrent, [(width, width)] * gates, "orthogonal"), axis=1)}
    if spec.cell == "gru":
        recurrent["bias"] = jnp.zeros(width)
    heads = {"pi_hat": pi_hat, "y_hat": y_hat}
    return {"embedding": {"hidden": hidden, "out": embedding}, "inputs": inputs, "recurrent": recurrent, **heads}


def apply_rule(spec: RuleSpec, params: PyTree, inputs: RuleInputs) -> tuple[jax.Array, jax.Array]:
    """What the rule says of every step of a rollout.

    Returns: ``(π̂ [T, B], log ŷ [T, B, m])``: how hard to push the log-probability of the action, up where positive, and the
    logarithm of what the prediction of its observation should be.
    Source: Oh et al. 2020, arXiv 2007.08794, in the form of Jackson et al. 2023, arXiv 2310.02782.
    """
    x = jnp.einsum("tbi,io->tbo", _features(spec, params["embedding"], inputs), params["inputs"]["kernel"])
    x = x + params["inputs"]["bias"]
    zeros = jnp.zeros_like(x, shape=(x.shape[1], spec.hidden_size))
    cell = {"gru": _gru, "lstm": _lstm}[spec.cell]
    carry = {"gru": (zeros,), "lstm": (zeros, zeros)}[spec.cell]

    def back(carry, step):
        x, end = step
        # What came later belongs to another episode.
        carry = cell(params["recurrent"], jax.tree.map(lambda h: jnp.where(end[:, None], 0.0, h), carry), x)
        return carry, carry[0]

    _, hidden = jax.lax.scan(back, carry, (x, inputs.end), reverse=True)
    hidden = jax.nn.relu(hidden)
    return _dense(params["pi_hat"], hidden)[..., 0], jax.nn.log_softmax(_dense(params["y_hat"], hidden))


def _features(spec: RuleSpec, embedding: PyTree, inputs: RuleInputs) -> jax.Array:
    def embed(prediction):
        return _dense(embedding["out"], jax.nn.relu(_dense(embedding["hidden"], prediction)))[..., 0]

    goes_on = 1.0 - inputs.end
    gamma = (inputs.gamma,) if spec.gamma_input else ()
    age = {
        "none": lambda: (),
        "relative": lambda: (inputs.updates / inputs.lifetime, jnp.log(inputs.lifetime)),
        "raw": lambda: (inputs.updates, inputs.lifetime),
    }[spec.temporal]()
    # paper: the next embedding as it is / authors' code: zero behind an end / here: zero.
    following = goes_on * embed(inputs.next_prediction)
    features = (inputs.reward, 1.0 - goes_on, *gamma, inputs.prob, embed(inputs.prediction), following, *age)
    return jnp.stack([jnp.broadcast_to(jnp.asarray(x, inputs.prob.dtype), inputs.prob.shape) for x in features], -1)


def _dense(params: PyTree, x: jax.Array) -> jax.Array:
    return x @ params["kernel"] + params["bias"]


def _gru(params: PyTree, carry, x):
    (h,) = carry
    reset, update, candidate = jnp.split(h @ params["kernel"], 3, axis=-1)
    x_reset, x_update, x_candidate = jnp.split(x, 3, axis=-1)
    update = jax.nn.sigmoid(x_update + update)
    candidate = jnp.tanh(x_candidate + jax.nn.sigmoid(x_reset + reset) * (candidate + params["bias"]))
    return ((1 - update) * candidate + update * h,)


def _lstm(params: PyTree, carry, x):
    h, c = carry
    in_, forget, candidate, out = jnp.split(x + h @ params["kernel"], 4, axis=-1)
    c = jax.nn.sigmoid(forget) * c + jax.nn.sigmoid(in_) * jnp.tanh(candidate)
    return jax.nn.sigmoid(out) * jnp.tanh(c), c


def convention_of(spec: RuleSpec, **more) -> dict[str, Any]:
    """All without which a rule's parameters mean nothing, as JSON values; ``more`` is kept beside it."""
    return {
        **dataclasses.asdict(spec),
        "positive_pi_hat": RAISES,
        "next_embedding_at_end": "zero",
        "lifetime_unit": "updates",
        **more,
    }


def read_convention(params: PyTree, convention: Mapping[str, Any]) -> tuple[RuleSpec, PyTree]:
    """``(spec, params)`` of a rule that was kept with ``convention``, its sign turned to the paper's if it was the other one.

    Raises: RequestError for a convention that is not known here, and for parameters that do not fit it.
    """
    for name, known in (("next_embedding_at_end", ("zero",)), ("lifetime_unit", ("updates",))):
        if convention.get(name, known[0]) not in known:
            raise RequestError(f"rule: {name} = {convention[name]!r} is not one of {', '.join(known)}; it needs a newer pgjax")
    fields = get_type_hints(RuleSpec)
    missing = [name for name in fields if name not in convention]
    if missing:
        raise RequestError(f"rule: its convention lacks {', '.join(missing)}; meta-train it again or add them to the file")
    spec = RuleSpec(**{name: convention[name] for name in fields})
    validate_spec(spec)
    wanted = jax.eval_shape(lambda key: init_rule(spec, key), jax.random.key(0))
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (params, wanted)]
    if shapes[0] != shapes[1]:
        raise RequestError("rule: its parameters do not have the shapes that its convention tells; the file is damaged")
    sign = convention.get("positive_pi_hat")
    if sign not in (RAISES, LOWERS):
        raise RequestError(f"rule: positive_pi_hat = {sign!r} is not one of {RAISES}, {LOWERS}")
    if sign == LOWERS:
        # authors' code: a positive π̂ lowers the probability / here: turned around.
        params = {**params, "pi_hat": jax.tree.map(lambda x: -x, params["pi_hat"])}
    return spec, params
