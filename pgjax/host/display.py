"""What a run shows while it goes on: a live line on a terminal, plain lines elsewhere."""

import sys
import time

import numpy as np

from pgjax.host.runner import Event, RunSpec
from pgjax.metrics import mean_over_lanes

# Seconds between two plain lines.
_EVERY = 5.0
# Share of samples outside of a learned objective's range from which on a run says so; its ends are quantiles, so that some
# samples always are.
_OUTSIDE = 0.02


class Display:
    """Prints events as they come. ``again`` is the command that continues the run."""

    def __init__(self, spec: RunSpec, again: str):
        self._spec, self._again = spec, again
        self._live = None
        self._printed_at = 0.0
        self._total = self._done = self._began_at = 0
        self._lanes = 1
        self._return = self._mode_return = float("nan")
        self._trained = 0.0
        self._outside: list[float] = []

    def __enter__(self):
        if sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(refresh_per_second=4, transient=True)
            self._live.__enter__()
        return self

    def __exit__(self, *error):
        if self._live is not None:
            self._live.__exit__(*error)

    def __call__(self, event: Event) -> None:
        getattr(self, f"_{event.kind}", lambda **data: None)(**event.data)

    def _print(self, text):
        if self._live is not None:
            self._live.console.print(text, highlight=False)
        else:
            print(text, flush=True)

    def _started(self, lanes, env_steps, done_env_steps, path):
        spec = self._spec
        self._lanes, self._total, self._began_at = lanes, env_steps, done_env_steps
        preset = f", preset {spec.preset}" if spec.preset else ""
        resumed = f", going on at {done_env_steps:,} env steps" if done_env_steps else ""
        what = f"{len(spec.configs)} configs x " if len(spec.configs) > 1 else ""
        seeds = f"{len(spec.seeds)} seed{'s' if len(spec.seeds) > 1 else ''}"
        self._print(f"{spec.algorithm} on {spec.env}: {what}{seeds}, {env_steps:,} env steps each{preset}{resumed} -> {path}")

    def _compiled(self, seconds, bytes, peak_bytes, devices, lanes):
        over = f"{lanes} lanes on {devices} device{'s' if devices > 1 else ''}"
        memory = f"{bytes / 2**20:,.0f} MiB of device memory"
        if peak_bytes is not None:
            memory = f"{peak_bytes / 2**20:,.0f} MiB of memory in all"
        self._print(f"compiled in {seconds:.1f} s for {over}; it will take about {memory}")

    def _rows(self, rows, env_steps, seconds):
        self._trained += seconds
        self._done = env_steps
        means = mean_over_lanes(rows)
        self._outside += [share for share in means.get("outside_range", ()) if np.isfinite(share)]
        returns = means["episode_return"]
        returns = returns[np.isfinite(returns)]
        self._return = returns[-1] if returns.size else self._return
        self._progress()

    def _evaluated(self, episodes, env_steps, seconds):
        self._mode_return = float(np.mean(episodes.mode_return))
        self._progress()

    def _progress(self):
        speed = (self._done - self._began_at) * self._lanes / max(self._trained, 1e-9)
        left = (self._total - self._done) * self._lanes / max(speed, 1e-9)
        text = (
            f"{self._done / self._total:4.0%}  {self._done:>11,} env steps  {speed:>11,.0f} /s  "
            f"training return {self._return:8.1f}  evaluation (mode) {self._mode_return:8.1f}  {left:5.0f} s left"
        )
        if self._live is not None:
            self._live.update(text)
        elif time.perf_counter() - self._printed_at > _EVERY:
            self._printed_at = time.perf_counter()
            self._print(text)

    def _note(self, text):
        self._print(f"note: {text}")

    def _finished(self, result):
        seconds = result.seconds
        where = ", ".join(f"{name} {seconds[name]:.1f} s" for name in ("compile", "train", "evaluate", "save"))
        self._print(f"{result.status} at {result.env_steps:,} env steps ({where})")
        if self._outside and np.mean(self._outside) > _OUTSIDE:
            self._print(
                f"note: {np.mean(self._outside):.1%} of the samples lay outside the log ratios and advantages that the "
                "objective was meta-trained on (metric outside_range): there it is a guess"
            )
        if result.status == "finished":
            self._print(f"return of the mode policy, mean over {self._lanes} lanes: {self._mode_return:.1f}")
            self._print(f"results in {result.path}; pgjax plot {result.path} draws them")
        elif result.status == "interrupted":
            self._print(f"continue with: {self._again}")
        elif result.nonfinite:
            lanes = ", ".join(f"config {config} seed {seed}" for config, seed in result.nonfinite)
            self._print(f"{len(result.nonfinite)} of {self._lanes} lanes went non-finite and are left out of means: {lanes}")
