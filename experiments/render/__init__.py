"""``pgjax render``: what a trained policy does, as pictures.

    OUT/mode-best.gif ...   the best, the median and the worst episode by return, of the mode and of the sampled policy
    OUT/mode-best.html ...  the same to be looked at from any side, for simulations of rigid bodies
    OUT/index.html          all six side by side; needs no network and no other file
    OUT/episodes.csv        return and length of every episode that was played, and which of them are shown

How each environment is drawn is told in ``docs/rendering.md``.
"""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from pgjax.errors import RequestError
from pgjax.experiments.evaluate_run import acting, episode_keys
from pgjax.experiments.render.canvas import caption_sizes, with_caption
from pgjax.experiments.render.drawings import Drawing, drawing_of
from pgjax.experiments.render.episodes import POLICIES, Episode, pick, play
from pgjax.experiments.render.gif import Pace, encode
from pgjax.experiments.render.page import Shown, make_page
from pgjax.host.checkpoints import disk_errors, write_file

__all__ = ["Rendered", "render_run"]


class Rendered(NamedTuple):
    """page: the file to open.  episodes: all that were played.  shown: policy and pick -> its episode."""

    page: Path
    episodes: list[Episode]
    shown: dict[tuple[str, str], Episode]


def render_run(
    path: Path,
    out: Path | None = None,
    *,
    env: str | None = None,
    env_options: dict[str, Any] | None = None,
    num_episodes: int = 16,
    seed: int = 0,
    lane: int = 0,
    renderer: str = "plain",
    why: str = "",
    command: str = "pgjax render",
    say: Callable[[str], None] = print,
) -> Rendered:
    """Plays full episodes of one saved policy and draws the best, the median and the worst of them.

    They are the episodes that ``pgjax eval`` plays with the same seed and number.

    Args:
      path: folder of the run.  out: folder to write into, ``render`` in the run's folder if None.
      env, env_options: as of ``evaluate_run``.  num_episodes: of each policy.  seed: of the episodes.
      lane: which of the run's policies, from 0 on, in order of configuration and seed.
      renderer: of rigid bodies, ``plain`` or ``opengl``.  why: a sentence on that choice.
      command: for the record.  say: called with each line to show.
    Raises: RequestError for what the run does not have, an environment that does not fit, or ``out`` that cannot be written.
    """
    if num_episodes < 1:
        raise RequestError(f"--episodes {num_episodes} must be at least 1")
    algorithm, policies, columns = acting(path, env, env_options or {}, [lane])
    out = Path(out) if out else Path(path) / "render"
    if out.exists() and not out.is_dir():
        raise RequestError(f"--out {out} is a file; name a folder")
    drawing = drawing_of(algorithm.env, renderer)
    policy = jax.tree.map(lambda x: x[0], policies)
    which = f"config {columns['config'][0]}, seed {columns['seed'][0]}"
    say(f"{algorithm.name} on {algorithm.env.name}, lane {lane} ({which}): {drawing.about}" + (f" ({why})" if why else ""))
    episodes = play(algorithm, policy, episode_keys(seed, columns)[0], num_episodes, drawing.view)

    shown: dict[tuple[str, str], Episode] = {}
    pictures = []
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    for of_policy in POLICIES:
        own = [episode for episode in episodes if episode.policy == of_policy]
        for name, place in pick([episode.return_ for episode in own]).items():
            episode = shown[of_policy, name] = own[place]
            picture = _picture(algorithm, drawing, episode, name, num_episodes, which)
            with disk_errors(out):
                write_file(out / picture.name, picture.content)
                if drawing.viewer is not None:
                    title = (
                        f"{algorithm.name} on {algorithm.env.name}: {name} episode of the {of_policy} policy, {picture.told[0]}"
                    )
                    html = drawing.viewer(title, episode, getattr(algorithm.env, "step_seconds", None))
                    picture = picture._replace(viewer=str(Path(picture.name).with_suffix(".html")))
                    write_file(out / picture.viewer, html.encode())
            pictures.append(picture)
            say(f"{out / picture.name}: {', '.join(picture.told)}, {len(picture.content) / 1e6:.1f} MB")
    lead = [
        f"Folder {path}, lane {lane} ({which}); {num_episodes} episodes of each policy with seed {seed}. The mode policy takes "
        "its most likely action, the sampled one draws it as in training. Returns are undiscounted sums of raw rewards.",
        f"What is seen: {drawing.about}.",
    ]
    spread = {name: _spread([episode for episode in episodes if episode.policy == name]) for name in POLICIES}
    html = make_page(f"{algorithm.name} on {algorithm.env.name}", lead, pictures, spread, command)
    with disk_errors(out):
        write_file(out / "index.html", html.encode())
        write_file(out / "episodes.csv", _table(episodes, shown).encode())
    return Rendered(out / "index.html", episodes, shown)


def _picture(algorithm, drawing: Drawing, episode: Episode, name: str, num_episodes: int, which: str) -> Shown:
    paint, returns, env = drawing.painter(episode), episode.returns, algorithm.env
    head = f"{env.name}, {algorithm.name} ({which}), {episode.policy} policy"
    # Numbers that grow would push the text about.
    width = max(len(_number(value)) for value in (returns.min(), returns.max()))

    def caption(t: int, pace: Pace) -> list[str]:
        where = f"{name} of {num_episodes} · return {_number(returns[t]):>{width}} · step {t:>{len(str(episode.length))}}"
        return [head, f"{where} of {episode.length}" + (f" · {pace}" if str(pace) else "")]

    def frame(t: int, pace: Pace):
        # The last line is about as long as any, and type must not change its size from frame to frame.
        return with_caption(paint(t), caption(t, pace), caption_sizes(caption(episode.length, pace)))

    content, pace = encode(frame, episode.length, getattr(env, "step_seconds", None))
    told = [f"return {_number(episode.return_)}", f"{episode.length} steps", f"episode {episode.index}"]
    told.append("ended by the task" if episode.terminated else "ended by the time limit")
    return Shown(f"{episode.policy}-{name}.gif", episode.policy, name, content, [*told, *([str(pace)] if str(pace) else [])])


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 1e5 else f"{value:.4g}"


def _spread(episodes: Sequence[Episode]) -> str:
    returns = np.array([episode.return_ for episode in episodes])
    lengths = np.array([episode.length for episode in episodes])
    steps = f"{lengths.min()} to {lengths.max()}" if lengths.min() < lengths.max() else str(lengths[0])
    ended = sum(episode.terminated for episode in episodes)
    return (
        f"{len(episodes)} episodes: mean return {_number(returns.mean())}, from {_number(returns.min())} to "
        f"{_number(returns.max())}; {steps} steps; {ended} ended by the task, "
        f"{len(episodes) - ended} by the time limit."
    )


def _table(episodes: Sequence[Episode], shown: dict[tuple[str, str], Episode]) -> str:
    """CSV: policy, episode, return, length, terminated, shown_as (names of picks, or nothing)."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["policy", "episode", "return", "length", "terminated", "shown_as"])
    for episode in episodes:
        picks = [name for (_, name), one in shown.items() if one is episode]
        row = [episode.policy, episode.index, repr(episode.return_), episode.length, episode.terminated, " ".join(picks)]
        table.writerow(row)
    return text.getvalue()
