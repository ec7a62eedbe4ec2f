"""Action and observation spaces: static, hashable descriptions without arrays."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Discrete:
    """The integers ``0 .. num - 1``, as int32 scalars."""

    num: int

    @property
    def shape(self) -> tuple[int, ...]:
        return ()

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.int32)


@dataclasses.dataclass(frozen=True)
class Box:
    """Float32 arrays of ``shape``, each entry between ``low`` and ``high``.

    ``low`` and ``high`` are one number for all entries, or a flat tuple with one number per entry (C order);
    they may be infinite.
    """

    shape: tuple[int, ...]
    low: float | tuple[float, ...] = -np.inf
    high: float | tuple[float, ...] = np.inf

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """``(low, high)`` as float32 arrays of ``shape``."""

        def fill(bound):
            bound = np.asarray(bound, np.float32)
            return np.broadcast_to(bound, self.shape) if bound.ndim == 0 else bound.reshape(self.shape)

        return fill(self.low), fill(self.high)


Space = Discrete | Box
