"""Animated GIFs of a bounded size."""

import dataclasses
import io
import itertools
import math
from collections.abc import Callable

from PIL import Image

# Browsers slow down what is faster, and GIF counts in hundredths of a second.
_LEAST_SECONDS = 0.02
# Pictures of an episode that is thinned follow one another at least this fast, faster than in life if need be.
_SMOOTH_SECONDS = 0.1
_HOLD_SECONDS = 1.5
MAX_FRAMES = 250
MAX_BYTES = 3_000_000
_COLORS = 64
# How an environment without a clock is shown, in seconds per step.
DEFAULT_SECONDS = 1 / 15


@dataclasses.dataclass(frozen=True)
class Pace:
    """every: steps from one frame to the next.  step: seconds that a step is shown.  speed: in times real time, if known."""

    every: int
    step: float
    speed: float | None

    def frames(self, length: int) -> list[int]:
        """The times that are shown of an episode of ``length`` steps, its first and its last state always among them."""
        return sorted({*range(0, length + 1, self.every), length})

    def durations(self, length: int) -> list[int]:
        """How long each of these is shown, in milliseconds; the last one a while longer."""
        # Rounded such that the whole lasts as long as it should.
        ends = [round(100 * self.step * t) for t in self.frames(length)]
        least = round(100 * _LEAST_SECONDS)
        shown = [max(least, later - sooner) for sooner, later in itertools.pairwise(ends)]
        return [10 * hundredths for hundredths in (*shown, round(100 * _HOLD_SECONDS))]

    def __str__(self) -> str:
        """What has to be said of it in a caption; empty for every step at its own speed."""
        said = []
        if self.every > 1:
            nth = {2: "2nd", 3: "3rd"}.get(self.every, f"{self.every}th")
            said.append(f"every {nth} step")
        if self.speed is not None and abs(self.speed - 1) > 0.15:
            said.append(f"{self.speed:.2g}x speed")
        return ", ".join(said)


def pace_of(length: int, step_seconds: float | None, max_frames: int = MAX_FRAMES) -> Pace:
    """As few frames left out as fit: in real time where that is smooth, else faster."""
    seconds = step_seconds or DEFAULT_SECONDS
    every = max(1, math.ceil(length / max_frames), math.ceil(_LEAST_SECONDS / seconds - 1e-3))
    shown = every * seconds
    if every > 1:
        shown = min(shown, max(seconds, _SMOOTH_SECONDS))
    return Pace(every, shown / every, every * seconds / shown if step_seconds else None)


def encode(paint: Callable[[int, Pace], Image.Image], length: int, step_seconds: float | None) -> tuple[bytes, Pace]:
    """A GIF of at most ``MAX_BYTES`` of an episode, as long as few frames are small enough for that.

    Args: paint: the picture of a time and pace.  length: steps.  step_seconds: of a step, None without a clock.
    Returns: the file's content and the pace it was made at.
    """
    max_frames = MAX_FRAMES
    while True:
        pace = pace_of(length, step_seconds, max_frames)
        content = _gif([paint(t, pace) for t in pace.frames(length)], pace.durations(length))
        shown = len(pace.frames(length))
        if len(content) <= MAX_BYTES or shown <= 2:
            return content, pace
        max_frames = max(1, min(shown - 1, int(0.9 * shown * MAX_BYTES / len(content))))


def _gif(frames: list[Image.Image], durations: list[int]) -> bytes:
    # One palette for all, from a sheet of some of them, so that colours stay as they are from frame to frame.
    some = frames[:: max(1, len(frames) // 8)]
    sheet = Image.new("RGB", (some[0].width, some[0].height * len(some)))
    for i, frame in enumerate(some):
        sheet.paste(frame, (0, i * frame.height))
    palette = sheet.quantize(_COLORS, method=Image.Quantize.MEDIANCUT)
    flat = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    buffer = io.BytesIO()
    flat[0].save(buffer, "GIF", save_all=True, append_images=flat[1:], duration=durations, loop=0, optimize=False, disposal=1)
    return buffer.getvalue()
