"""Pictures with Pillow: shapes in the coordinates of the thing drawn, smooth edges, a caption."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 400, 300
_LINE = 17
CAPTION_HEIGHT = 2 * _LINE + 8
# Everything is drawn this many times larger and then averaged.
_FINER = 2
# The colours of the curves, and greys.
BLUE, RED, GREEN, PINK, SKY, ORANGE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
INK, GREY, FAINT, PALE = "#222222", "#888888", "#cccccc", "#eeeeee"

Color = str | tuple[int, ...]
Point = Sequence[float] | np.ndarray
Points = Sequence[Point] | np.ndarray


class Canvas:
    """A white picture in which one unit of the thing drawn is ``scale`` pixels, x to the right and y up.

    Args: center: what is in the middle of the picture.  scale: pixels per unit.
    """

    def __init__(self, center: Point, scale: float, width: int = WIDTH, height: int = HEIGHT):
        self.center, self.scale, self.width, self.height = center, scale, width, height
        self.image = Image.new("RGB", (width * _FINER, height * _FINER), "white")
        self._draw = ImageDraw.Draw(self.image)

    def pixel(self, point: Point) -> tuple[float, float]:
        """Where a point is in the finished picture, in pixels from its upper left corner."""
        x = self.width / 2 + (point[0] - self.center[0]) * self.scale
        y = self.height / 2 - (point[1] - self.center[1]) * self.scale
        return x, y

    def line(self, points: Points, color: Color, width: float) -> None:
        """A line through the points with round ends; width in pixels."""
        fine = [self._fine(point) for point in points]
        thick = max(1, round(width * _FINER))
        self._draw.line(fine, fill=color, width=thick, joint="curve")
        if thick > 3:
            for end in (fine[0], fine[-1]):
                self._dot(end, thick / 2, color)

    def polygon(self, points: Points, color: Color | None, outline: Color | None = None, width: float = 1) -> None:
        fine = [self._fine(point) for point in points]
        self._draw.polygon(fine, fill=color, outline=outline, width=max(1, round(width * _FINER)))

    def rectangle(self, low: Point, high: Point, color: Color | None, outline: Color | None = None) -> None:
        self.polygon([low, (high[0], low[1]), high, (low[0], high[1])], color, outline)

    def circle(self, center: Point, radius: float, color: Color | None, outline: Color | None = None, width: float = 1) -> None:
        """Radius in units of the thing drawn."""
        self._dot(self._fine(center), radius * self.scale * _FINER, color, outline, width)

    def dot(self, center: Point, pixels: float, color: Color) -> None:
        self._dot(self._fine(center), pixels * _FINER, color)

    def arrow(self, start: Point, end: Point, color: Color, width: float = 3) -> None:
        """A line with a head at its end; nothing where it has no length."""
        tail, tip = np.asarray(start, float), np.asarray(end, float)
        length = float(np.linalg.norm(tip - tail))
        if length * self.scale < 1:
            return
        along = (tip - tail) / length
        across = np.array([-along[1], along[0]])
        head = min(3.2 * width / self.scale, length)
        back = tip - head * along
        self.line([tail, back], color, width)
        self.polygon([tip, back + 0.6 * head * across, back - 0.6 * head * across], color)

    def text(self, place: Point, text: str, color: Color = INK, size: int = 11, anchor: str = "mm") -> None:
        """``anchor`` as Pillow has it: which point of the text is at the place."""
        self._draw.text(self._fine(place), text, fill=color, font=_font(size * _FINER), anchor=anchor)

    def finish(self) -> Image.Image:
        return self.image.resize((self.width, self.height), Image.Resampling.BOX)

    def _fine(self, point: Point) -> tuple[float, float]:
        x, y = self.pixel(point)
        return x * _FINER, y * _FINER

    def _dot(self, center, radius, color, outline=None, width: float = 1) -> None:
        (x, y), thick = center, max(1, round(width * _FINER)) if outline else 0
        self._draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color, outline=outline, width=thick)


def fitting(low: Point, high: Point, width: int = WIDTH, height: int = HEIGHT, margin: float = 0.06) -> Canvas:
    """A canvas that shows everything between two corners, with a margin as a share of the picture."""
    (x0, y0), (x1, y1) = low, high
    scale = (1 - 2 * margin) * min(width / (x1 - x0), height / (y1 - y0))
    return Canvas(((x0 + x1) / 2, (y0 + y1) / 2), scale, width, height)


def caption_sizes(lines: Sequence[str], width: int = WIDTH) -> list[int]:
    """The size of type in which each line of a caption fits below a picture, or nearly."""
    return [next((size for size in (12, 11, 10) if _font(size).getlength(line) <= width - 12), 9) for line in lines]


def with_caption(picture: Image.Image, lines: Sequence[str], sizes: Sequence[int]) -> Image.Image:
    """The picture with two lines of text below it, of these sizes of type; what does not fit is cut."""
    whole = Image.new("RGB", (picture.width, picture.height + CAPTION_HEIGHT), "white")
    whole.paste(picture, (0, 0))
    draw = ImageDraw.Draw(whole)
    draw.line([(0, picture.height), (whole.width, picture.height)], fill=FAINT)
    for number, (line, size) in enumerate(zip(lines, sizes, strict=True)):
        font = _font(size)
        while font.getlength(line) > whole.width - 12:
            line = line[:-2].rstrip(".") + "…"
        draw.text((6, picture.height + 6 + number * _LINE), line, fill=INK, font=font)
    return whole


@functools.cache
def _font(size: int):
    # Comes with Matplotlib, so that pictures look alike on every machine.
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
