"""Whether a policy objective is a mirror-learning step: the surrogate ρ Â less a drift that starts at zero.

Mirror Learning (Kuba et al., ICML 2022) takes every objective apart into ρ Â - f. If the drift f is never
negative, and zero with zero slope where the policy has not moved, then improving the objective improves the policy, and the
first gradient is the policy gradient whatever f is. PPO, SPO, DPO and penalties on a divergence are of this kind; objectives
in which the ratio does not stand, such as Â log π, are not.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pgjax.distributions import Categorical, DiagGaussian
from pgjax.errors import RequestError
from pgjax.types import Objective, Sample


class DriftReport(NamedTuple):
    """What ``check_drift`` measured; ``f`` is the drift per sample, in units of the advantage.

    lowest: the lowest f; negative where the objective exceeds ρ Â.
    at_old: the largest abs(f) where the policies agree.
    slope: the largest slope of f, in any parameter of the distribution, where the policies agree.
    where: the sample of the lowest f, as text.
    finite: whether every f and every slope was a finite number.
    tolerance: what still counts as zero.
    """

    lowest: float
    at_old: float
    slope: float
    where: str
    finite: bool
    tolerance: float

    @property
    def valid(self) -> bool:
        """Whether all three conditions hold."""
        return self.finite and self.lowest >= -self.tolerance and max(self.at_old, self.slope) <= self.tolerance

    def __str__(self) -> str:
        lines = [
            f"drift never negative     {_verdict(self.lowest >= -self.tolerance)}   lowest {self.lowest:.3g} at {self.where}",
            f"drift zero at ratio 1    {_verdict(self.at_old <= self.tolerance)}   largest {self.at_old:.3g}",
            f"slope zero at ratio 1    {_verdict(self.slope <= self.tolerance)}   largest {self.slope:.3g}",
        ]
        return "\n".join(lines if self.finite else [*lines, "not every value was finite"])


def _verdict(holds: bool) -> str:
    return "yes" if holds else "NO "


def check_drift(objective: Objective | Callable, *, progress: float = 0.0, tolerance: float = 1e-6) -> DriftReport:
    """Measures the drift f = ρ Â - J of an objective J on a grid of ratios and advantages, and on random policies, in float64.

    Args:
      objective: ``f(log_ratio, advantage) -> [N]``, or a ``pgjax.Objective`` whose ``fn(sample, params)`` may use the
        distributions too.
      progress: what ``sample.progress`` is to be.
      tolerance: what counts as zero, in units of the advantage.
    Returns: DriftReport; ``report.valid`` says whether the conditions hold, ``print(report)`` tells the rest.
    """
    with jax.enable_x64(True):
        params = None
        if isinstance(objective, Objective):
            params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), objective.params)

        def evaluate(sample):
            if isinstance(objective, Objective):
                return objective.fn(sample, params)
            return objective(sample.log_ratio, sample.advantage)

        reports = [
            _measure(evaluate, dist_old, dist, action, advantage, progress, tolerance)
            for dist_old, dist, action, advantage in _pairs()
        ]
    worst = min(reports, key=lambda report: report.lowest)
    return worst._replace(
        at_old=max(report.at_old for report in reports),
        slope=max(report.slope for report in reports),
        finite=all(report.finite for report in reports),
    )


def _pairs():
    """``(old, new, action, advantage)``: two actions with every ratio of a grid, then random policies of either kind."""
    ratio, advantage = (x.ravel() for x in np.meshgrid(np.exp(np.linspace(-2, 2, 41)), np.linspace(-8, 8, 33)))
    # The first action's probability is such that it remains one at any of the ratios.
    prob_old = np.minimum(0.5, 0.5 / ratio)
    old, new = (Categorical(jnp.log(np.stack([p, 1 - p], -1))) for p in (prob_old, ratio * prob_old))
    yield old, new, jnp.zeros(ratio.shape, int), jnp.asarray(advantage)
    rng = np.random.default_rng(0)
    num = 2000
    advantage = jnp.asarray(rng.normal(size=num))
    logits = rng.normal(size=(2, num, 4))
    yield Categorical(jnp.asarray(logits[0])), Categorical(jnp.asarray(logits.sum(0))), rng.integers(4, size=num), advantage
    mean, log_std, move, widen, noise = 0.5 * rng.normal(size=(5, num, 2))
    old, new = DiagGaussian(mean, log_std), DiagGaussian(mean + move, log_std + widen)
    yield jax.tree.map(jnp.asarray, old), jax.tree.map(jnp.asarray, new), mean + 2 * np.exp(log_std) * noise, advantage


def _measure(evaluate, dist_old, dist, action, advantage, progress, tolerance) -> DriftReport:
    def drift(dist):
        log_ratio = dist.log_prob(action) - dist_old.log_prob(action)
        value = evaluate(Sample(log_ratio, advantage, dist, dist_old, progress))
        if jnp.shape(value) != advantage.shape:
            wanted, given = advantage.shape, jnp.shape(value)
            raise RequestError(f"the objective gave an array of shape {given} for samples of shape {wanted}; give one each")
        return jnp.exp(log_ratio) * advantage - value

    f, at_old = drift(dist), drift(dist_old)
    # Each sample has parameters of its own, so the gradient of the sum is every sample's slope.
    slopes = jnp.concatenate([x.ravel() for x in jax.tree.leaves(jax.grad(lambda dist: drift(dist).sum())(dist_old))])
    finite = bool(jnp.isfinite(f).all() & jnp.isfinite(slopes).all())
    index = int(jnp.argmin(f))
    ratio = jnp.exp(dist.log_prob(action) - dist_old.log_prob(action))[index]
    where = f"ratio {ratio:.3g}, advantage {advantage[index]:.3g}"
    return DriftReport(float(f.min()), float(jnp.abs(at_old).max()), float(jnp.abs(slopes).max()), where, finite, tolerance)
