"""Second-order tools over ravelled parameters: Fisher-vector products, conjugate gradient, backtracking line search.

All loops have a fixed length and are masked, so under vmap no lane waits for another. Matrix products run at the highest
precision: with the reduced one of GPUs and TPUs the residual of conjugate gradient stalls.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


def fisher_operator(
    dist_of: Callable[[jax.Array], Any], params: jax.Array, form: str = "gauss_newton"
) -> Callable[[jax.Array], jax.Array]:
    """``v -> F v`` with F the mean Fisher information of a policy over a batch of states, the Hessian of its mean KL.

    Args:
      dist_of: ``params [P] -> distribution`` with any batch shape, the policy on the batch.
      params: [P], where F is taken.
      form: ``gauss_newton`` is (1/N) Σ Jᵀ M J v with J the Jacobian of the distribution's parameters and M their Fisher
        information, one forward and one backward product for each v; ``double_backprop`` differentiates the gradient of
        the mean KL. They are the same matrix at ``params``, where the gradient of the KL vanishes.

    Source: Schulman et al. 2015, arXiv 1502.05477, appendix C.
    """
    return {"gauss_newton": _gauss_newton, "double_backprop": _double_backprop}[form](dist_of, params)


def _gauss_newton(dist_of, params):
    # The precision of a product is settled where it is traced: that of J here, that of its transpose below.
    with jax.default_matmul_precision("highest"):
        dist, push = jax.linearize(dist_of, params)
    pull = jax.linear_transpose(push, params)
    num = jax.eval_shape(lambda dist: dist.kl(dist), dist).size

    def product(v):
        with jax.default_matmul_precision("highest"):
            (product,) = pull(dist.fisher_product(push(v)))
            return product / num

    return product


def _double_backprop(dist_of, params):
    with jax.default_matmul_precision("highest"):
        dist_old = jax.lax.stop_gradient(dist_of(params))
    gradient = jax.grad(lambda params: dist_old.kl(dist_of(params)).mean())

    def product(v):
        with jax.default_matmul_precision("highest"):
            return jax.jvp(gradient, (params,), (v,))[1]

    return product


def conjugate_gradient(
    product: Callable[[jax.Array], jax.Array], b: jax.Array, num_iterations: int, tolerance: float = 1e-10
) -> jax.Array:
    """An approximate solution x [P] of A x = b for a symmetric positive definite A, from x = 0.

    Args: product: ``v -> A v``.  tolerance: of the squared norm of the residual, relative to that of b; below it x stays as
      it is, as it does once a direction has no positive curvature, which only rounding can bring about.
    Source: Hestenes and Stiefel 1952. paper: none / authors' code: absolute, so that small gradients take no step / here:
    relative, so that the scale of the advantages does not matter.
    """

    def iteration(carry, _):
        x, residual, direction, square = carry
        along = product(direction)
        curvature = direction @ along
        active = (square > tolerance * start) & (curvature > 0)
        size = jnp.where(active, square / jnp.where(active, curvature, 1), 0)
        x = x + size * direction
        residual = residual - size * along
        new_square = jnp.where(active, residual @ residual, square)
        direction = jnp.where(active, residual + new_square / jnp.where(active, square, 1) * direction, direction)
        return (x, residual, direction, new_square), None

    with jax.default_matmul_precision("highest"):
        start = b @ b
        (x, *_), _ = jax.lax.scan(iteration, (jnp.zeros_like(b), b, b, start), length=num_iterations)
    return x


class LineSearch(NamedTuple):
    """params: [P], the accepted point, or the start.  accepted: bool.  trials: how many were refused before, int32."""

    params: jax.Array
    accepted: jax.Array
    trials: jax.Array


def line_search(
    accept: Callable[[jax.Array, jax.Array], jax.Array],
    start: jax.Array,
    step: jax.Array,
    backtrack: jax.Array,
    num_trials: int,
    keep_last: bool = False,
) -> LineSearch:
    """The first of ``start + backtrack**j * step``, j = 0 … num_trials - 1, that ``accept(params, backtrack**j)`` takes.

    If none is, the start, bit for bit; with ``keep_last`` the last trial, a known defect of public code.
    """

    def trial(carry, _):
        found, fraction, params, trials = carry
        candidate = start + fraction * step
        take = ~found & accept(candidate, fraction)
        params = jnp.where(take | (keep_last & ~found), candidate, params)
        found = found | take
        return (found, fraction * backtrack, params, trials + ~found), None

    carry = (jnp.zeros((), bool), jnp.ones((), start.dtype), start, jnp.zeros((), jnp.int32))
    (found, _, params, trials), _ = jax.lax.scan(trial, carry, length=num_trials)
    return LineSearch(params, found, trials)
