"""What can be shown of any environment: its observation as bars, and the return so far."""

import numpy as np

from pgjax.experiments.render.canvas import BLUE, FAINT, GREY, HEIGHT, INK, ORANGE, PALE, RED, WIDTH, Canvas

# Above this many numbers they become a strip of cells.
_MANY = 40
_LEFT, _RIGHT = 34, WIDTH - 12
_SPLIT = 118


class Bars:
    """An episode as bars of its observation, scaled to the largest magnitude each number has in it, and a curve.

    Args: obs: [T + 1, *O].  returns: [T + 1], so far.
    """

    def __init__(self, obs: np.ndarray, returns: np.ndarray):
        self.obs = np.nan_to_num(obs.reshape(len(obs), -1).astype(np.float64))
        self.returns = np.nan_to_num(returns)
        self.most = np.maximum(np.abs(self.obs).max(0), 1e-12)

    def paint(self, t: int, action=None) -> Canvas:
        """The picture of time t, from 0 to T."""
        canvas = Canvas((WIDTH / 2, HEIGHT / 2), 1)
        shares = self.obs[t] / self.most
        (self._cells if len(shares) > _MANY else self._bars)(canvas, shares)
        self._curve(canvas, t)
        if action is not None:
            said = np.array2string(np.asarray(action), precision=2, suppress_small=True, separator=" ", threshold=8)
            canvas.text((_RIGHT, HEIGHT - 10), f"action {said}", GREY, 10, "rm")
        canvas.text((8, HEIGHT - 10), "observation, each to its own scale", GREY, 10, "lm")
        return canvas

    def _bars(self, canvas: Canvas, shares: np.ndarray) -> None:
        low, high = _SPLIT + 20, HEIGHT - 24
        middle, half = (low + high) / 2, (high - low) / 2 - 6
        width = (_RIGHT - _LEFT) / len(shares)
        canvas.line([(_LEFT, middle), (_RIGHT, middle)], GREY, 1)
        for i, share in enumerate(shares):
            x = _LEFT + (i + 0.5) * width
            canvas.rectangle((x - 0.42 * width, middle - half), (x + 0.42 * width, middle + half), PALE)
            ends = sorted((middle, middle + share * half))
            if ends[1] - ends[0] >= 0.5:
                canvas.rectangle((x - 0.36 * width, ends[0]), (x + 0.36 * width, ends[1]), BLUE if share > 0 else RED)
            if width > 14:
                canvas.text((x, low - 2), str(i), GREY, 9)

    def _cells(self, canvas: Canvas, shares: np.ndarray) -> None:
        low, high = _SPLIT + 12, HEIGHT - 24
        columns = int(np.ceil(np.sqrt(len(shares) * (_RIGHT - 12) / (high - low))))
        size = min((_RIGHT - 12) / columns, (high - low) / np.ceil(len(shares) / columns))
        for i, share in enumerate(shares):
            x, y = 12 + i % columns * size, high - i // columns * size
            toward = (0, 114, 178) if share > 0 else (213, 94, 0)
            color = tuple(int(238 + abs(share) * (c - 238)) for c in toward)
            canvas.rectangle((x, y - size), (x + size, y), color)

    def _curve(self, canvas: Canvas, t: int) -> None:
        bottom, top = 22, _SPLIT - 18
        low, high = min(0.0, self.returns.min()), max(0.0, self.returns.max())
        high = high if high > low else low + 1.0
        last = max(1, len(self.returns) - 1)

        def place(step: int) -> tuple[float, float]:
            share = (self.returns[step] - low) / (high - low)
            return _LEFT + step / last * (_RIGHT - _LEFT), bottom + share * (top - bottom)

        canvas.line([(_LEFT, bottom), (_RIGHT, bottom)], FAINT, 1)
        canvas.line([(_LEFT, bottom), (_LEFT, top)], FAINT, 1)
        for value, y in ((low, bottom), (high, top)):
            canvas.text((_LEFT - 4, y), f"{value:.3g}", GREY, 9, "rm")
        canvas.text((8, _SPLIT - 4), "return so far", GREY, 10, "lm")
        points = [place(step) for step in np.unique(np.linspace(0, t, min(t + 1, 200)).astype(int))]
        if len(points) > 1:
            canvas.line(points, ORANGE, 2)
        canvas.dot(points[-1], 4, INK)
