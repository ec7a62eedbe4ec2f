"""Observations that are pictures themselves: MinAtar's boards, and any other grid of cells."""

from collections.abc import Sequence

import numpy as np

from pgjax.experiments.render.canvas import FAINT, HEIGHT, INK, WIDTH, Canvas

_DARK = (24, 26, 34)
_MARGIN, _LEGEND = 10, 108
# Channels of gymnax's MinAtar games in order, each with its colour; those without a name are where another one is too.
_WHITE, _YELLOW, _BLUE, _RED, _GREEN, _TAN = (
    *((240, 240, 240), (240, 228, 66), (86, 180, 233), (230, 90, 40), (0, 190, 130), (230, 159, 0)),
)
_TRAIL, _PINK = (95, 100, 115), (220, 140, 190)
CHANNELS: dict[str, Sequence[tuple[str, tuple[int, int, int]]]] = {
    "MinAsterix": (("player", _BLUE), ("enemy", _RED), ("trail", _TRAIL), ("gold", _YELLOW)),
    "MinBreakout": (("paddle", _BLUE), ("ball", _WHITE), ("trail", _TRAIL), ("brick", _RED)),
    "MinFreeway": (
        ("chicken", _YELLOW),
        ("car", _RED),
        *((f"speed {i}", (55 + 22 * i, 55 + 22 * i, 55 + 22 * i)) for i in range(1, 6)),
    ),
    "MinSpaceInvaders": (
        *(("cannon", _BLUE), ("alien", _RED), ("", _TRAIL), ("", _TRAIL)),  # which way the aliens move
        *(("own shot", _YELLOW), ("alien shot", _PINK)),
    ),
    "MinSeaquest": (
        *(("submarine", _BLUE), ("its tail", (50, 110, 150)), ("own shot", _YELLOW), ("trail", _TRAIL)),
        *(("enemy shot", _PINK), ("fish", _RED), ("enemy sub", _TAN), ("oxygen", _WHITE), ("rescued", _GREEN)),
        ("diver", (120, 220, 160)),
    ),
}
# Marks of direction, which nothing may hide behind.
_BELOW = ("trail", "speed")
# Lines that the legend has room for.
_LINES = 16
_HUES = (_BLUE, _RED, _GREEN, _YELLOW, _PINK, _TAN, _WHITE, _TRAIL)


def board(obs: np.ndarray, channels: Sequence[tuple[str, tuple[int, int, int]]] | None = None) -> Canvas:
    """Cells in the colour of the channel that is on in them, with a legend.

    Args: obs: [H, W, C], a channel is on where it is above zero.  channels: name and colour of each; numbered if None.
    """
    rows, columns, count = obs.shape
    named = channels or [(f"channel {i}", _HUES[i % len(_HUES)]) for i in range(count)]
    canvas, corner, cell = _grid(rows, columns, _LEGEND)
    shown = [channel for channel in range(count) if named[channel][0]]
    # A ball may be where a wall is: what there is little of is drawn last.
    order = sorted(shown, key=lambda i: (not named[i][0].startswith(_BELOW), -np.count_nonzero(obs[..., i] > 0)))
    for channel in order:
        for row, column in zip(*np.nonzero(obs[..., channel] > 0), strict=True):
            _fill(canvas, corner, cell, row, column, named[channel][1])
    for place, channel in enumerate(shown[:_LINES]):
        y = HEIGHT - 22 - 17 * place
        name, color = named[channel]
        canvas.rectangle((WIDTH - _LEGEND + 2, y - 5), (WIDTH - _LEGEND + 12, y + 5), color, INK)
        canvas.text((WIDTH - _LEGEND + 18, y), name, anchor="lm")
    return canvas


def heights(obs: np.ndarray) -> Canvas:
    """Cells [H, W] from dark, the least, to light, the largest value; of one kind they are dark."""
    rows, columns = obs.shape
    canvas, corner, cell = _grid(rows, columns, 0)
    low, high = float(obs.min()), float(obs.max())
    for row in range(rows):
        for column in range(columns):
            share = (obs[row, column] - low) / (high - low) if high > low else 0.0
            if share > 0:
                _fill(canvas, corner, cell, row, column, tuple(int(d + share * (240 - d)) for d in _DARK))
    return canvas


def cell_center(shape: Sequence[int], row: int, column: int, legend: bool = True) -> tuple[float, float]:
    """Where a cell is in the picture, in pixels from the upper left corner."""
    canvas, (x, y), cell = _grid(shape[0], shape[1], _LEGEND if legend else 0)
    return canvas.pixel((x + (column + 0.5) * cell, y - (row + 0.5) * cell))


def _grid(rows: int, columns: int, legend: int):
    """A canvas in pixels, the upper left corner of the grid and the size of a cell."""
    canvas = Canvas((WIDTH / 2, HEIGHT / 2), 1)
    cell = min((HEIGHT - 2 * _MARGIN) / rows, (WIDTH - legend - 2 * _MARGIN) / columns)
    x = _MARGIN + (WIDTH - legend - 2 * _MARGIN - cell * columns) / 2
    y = HEIGHT - _MARGIN - (HEIGHT - 2 * _MARGIN - cell * rows) / 2
    canvas.rectangle((x, y - cell * rows), (x + cell * columns, y), _DARK, FAINT)
    return canvas, (x, y), cell


def _fill(canvas: Canvas, corner, cell: float, row: int, column: int, color) -> None:
    x, y = corner[0] + column * cell, corner[1] - row * cell
    gap = 0.5 if cell > 6 else 0
    canvas.rectangle((x + gap, y - cell + gap), (x + cell - gap, y - gap), color)
