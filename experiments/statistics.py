"""Numbers with intervals: plain functions on arrays of one value per seed."""

import numpy as np
from scipy import stats


def iqm(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Interquartile mean along ``axis``: the mean of the middle half (Agarwal et al. 2021, arXiv 2108.13264)."""
    return stats.trim_mean(values, 0.25, axis=axis)


def iqm_interval(values: np.ndarray, num_resamples: int = 2000, seed: int = 0, level: float = 0.95) -> tuple:
    """Percentile-bootstrap interval of the interquartile mean over seeds.

    Args: values [S] or [S, ...], seeds in front; every further entry is resampled by the same seeds.
    Returns: ``(low, high)``, scalars or [...]; with one seed both are its value, for there is no spread to resample.
    """
    values = np.asarray(values, np.float64)
    picks = np.random.default_rng(seed).integers(len(values), size=(num_resamples, len(values)))
    resampled = iqm(values[picks], axis=1)
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail], axis=0)
    return low, high
