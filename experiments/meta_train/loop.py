"""Runs a meta-trainer on the host: chunks, checkpoints, progress, and the learned file at the end.

DIR/meta.json       the request, provenance, and at the end what came of it
DIR/log.jsonl       one line a generation
DIR/checkpoints/    the whole state
DIR/curve.png       what was earned over generations
DIR/learned.npz     what is learned so far, written whenever the loop ends
"""

import datetime
import json
import math
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from pgjax.errors import RequestError
from pgjax.experiments.meta_train import MetaTrainer
from pgjax.host import checkpoints
from pgjax.host.checkpoints import disk_errors, from_json, to_json, write_file
from pgjax.host.folders import hold_folder
from pgjax.host.machine import describe_machine
from pgjax.host.runner import Interrupt
from pgjax.learned import files as learned_files

FORMAT, VERSION = "pgjax-meta-training", 1
# Generations that one call of the chunk program can do, and seconds of work that one call should be.
CHUNK_STEPS, CHUNK_SECONDS = 64, 5.0
# Checkpoints are no closer than this, and take no more than this share of the time.
CHECKPOINT_SECONDS, CHECKPOINT_SHARE = 10.0, 0.05
# Seconds between two lines of progress.
REPORT_SECONDS = 10.0
_LOCK = ".meta.lock"


def read_request(out: Path) -> dict[str, Any]:
    """What ``meta.json`` says was asked for. Raises: RequestError if there is none."""
    return _read(Path(out))["request"]


def meta_train(
    trainer: MetaTrainer,
    out: Path,
    steps: int,
    *,
    seed: int = 0,
    request: dict[str, Any] | None = None,
    resume: bool = False,
    command: str = "",
    say: Callable[[str], None] = print,
) -> bool:
    """Meta-trains for ``steps`` steps into ``out``, or goes on there from the last checkpoint, bit for bit.

    Ctrl-C and SIGTERM end it at a checkpoint, with the learned file as far as it is.

    Args:
      request: JSON values that describe the trainer; with ``resume`` they must be those of before, but for ``devices``.
      command: for the record, and to say how to go on.
    Returns: whether all steps were done.
    Raises: RequestError if the folder holds something else; RunError if the disk is full.
    """
    out = Path(out)
    if steps < 1:
        raise RequestError(f"steps = {steps} must be at least 1")
    request = {**(request or {}), "steps": steps, "seed": seed}
    if not resume:
        _check_empty(out)
    out.mkdir(parents=True, exist_ok=True)
    with hold_folder(out, _LOCK):
        if resume:
            there = _read(out)
            _check_same(there["request"], request, out)
            # What came of the sessions before is measured anew at the end of this one.
            meta = {name: there[name] for name in ("request", "sessions", "kind", "convention")}
        else:
            # The devices are a fact of the machine, recorded with it, not of the request.
            meta = {"request": request, "sessions": [], "kind": trainer.kind, "convention": trainer.convention}
        meta["sessions"].append({"when": _now(), "command": command, "provenance": describe_machine()})
        with Interrupt() as interrupt:
            return _Loop(trainer, out, steps, seed, meta, interrupt, say).run()


def placement(trainer: MetaTrainer) -> jax.sharding.Sharding:
    """Where the state lives: every device has the whole of it; the inner runs are what is spread."""
    devices = trainer.devices or (jax.devices()[0],)
    if len(devices) == 1:
        return SingleDeviceSharding(devices[0])
    return NamedSharding(Mesh(np.asarray(devices), ("lanes",)), PartitionSpec())


class _Loop:
    def __init__(self, trainer: MetaTrainer, out: Path, steps, seed, meta, interrupt, say):
        self.trainer, self.out, self.steps, self.seed = trainer, out, steps, seed
        self.meta, self.interrupt, self.say = meta, interrupt, say
        self.place = placement(trainer)

    def run(self) -> bool:
        state, done, log_bytes = self._start()
        if done >= self.steps:
            self.say(f"{self.out} is finished already; nothing to do")
            return True
        self._write_meta(status="running", steps_done=done)
        started = time.perf_counter()
        program = jax.jit(self._chunk, out_shardings=self.place, donate_argnums=0).lower(state, jnp.int32(1)).compile()
        cost = self.trainer.env_steps_per_step
        self.say(
            f"{self.trainer.kind}: {self.steps - done} steps of {cost:,} inner env steps to do -> {self.out}; "
            f"compiled in {time.perf_counter() - started:.1f} s"
        )
        log = (self.out / "log.jsonl").open("r+b" if (self.out / "log.jsonl").exists() else "w+b")
        log.truncate(log_bytes)
        log.seek(log_bytes)
        count, first, worked = 1, done, 0.0
        saved_at, save_seconds, said_at = time.perf_counter(), 0.0, 0.0
        with log:
            while done < self.steps:
                count = max(1, min(count, self.steps - done, CHUNK_STEPS))
                started = time.perf_counter()
                state, rows = program(state, jax.device_put(jnp.int32(count), self.place))
                rows = {name: np.asarray(value)[:count] for name, value in rows.items()}
                seconds = time.perf_counter() - started
                worked += seconds
                for index in range(count):
                    line = {"step": done + index + 1, **{name: float(value[index]) for name, value in rows.items()}}
                    log.write(json.dumps(to_json({**line, "seconds": round(seconds / count, 4)})).encode() + b"\n")
                done += count
                if time.perf_counter() - said_at > REPORT_SECONDS or done == self.steps:
                    said_at = time.perf_counter()
                    self.say(self._progress(rows, done, (done - first) * cost / worked, worked / (done - first)))
                # Twice as many at most, since the first call is a warm-up.
                count = int(np.clip(CHUNK_SECONDS / (seconds / count), 1, 2 * count))
                now = time.perf_counter()
                due = now - saved_at > max(CHECKPOINT_SECONDS, save_seconds / CHECKPOINT_SHARE)
                if due or done == self.steps or self.interrupt.requested:
                    with disk_errors(self.out / "log.jsonl"):
                        log.flush()
                    record = {"done": done, "log_bytes": log.tell()}
                    checkpoints.save_checkpoint(self.out / "checkpoints", done, state, record)
                    saved_at = time.perf_counter()
                    save_seconds = saved_at - now
                if self.interrupt.requested and done < self.steps:
                    break
        self._finish(state, done, worked, (done - first) * cost / max(worked, 1e-9))
        return done == self.steps

    def _chunk(self, state, count):
        """``(state, rows)`` after ``count`` steps, one traced number: the same program whatever the chunks, so that a run
        that was cut short equals one that was not."""
        shapes = jax.eval_shape(self.trainer.step, state)[1]
        rows = {name: jnp.zeros(CHUNK_STEPS, x.dtype) for name, x in shapes.items()}

        def body(i, carry):
            state, rows = carry
            state, metrics = self.trainer.step(state)
            return state, {name: rows[name].at[i].set(metrics[name]) for name in rows}

        return jax.lax.fori_loop(0, count, body, (state, rows))

    def _start(self):
        """``(state, steps done, bytes of the log that belong to them)``."""
        key = jax.random.key(self.seed)
        found = checkpoints.latest_checkpoints(self.out / "checkpoints")
        for step in found:
            try:
                like = jax.eval_shape(self.trainer.init, key)
                state, record = checkpoints.load_checkpoint(self.out / "checkpoints", step, like)
            except checkpoints.CorruptCheckpoint as error:
                self.say(f"note: {error}; trying the one before")
                continue
            return jax.device_put(state, self.place), record["done"], record["log_bytes"]
        if found:
            raise RequestError(f"{self.out}: no checkpoint can be read; start anew with another --out")
        return jax.device_put(jax.jit(self.trainer.init)(key), self.place), 0, 0

    def _progress(self, rows, done, speed, seconds) -> str:
        name = self.trainer.curve
        value = f"  {name} {rows[name][-1]:9.3g}" if name in rows else ""
        left = (self.steps - done) * seconds
        where = f"{done / self.steps:4.0%}  step {done:>6} of {self.steps}"
        return f"{where}{value}  {speed:>11,.0f} inner env steps/s  {left:6.0f} s left"

    def _finish(self, state, done, seconds, speed) -> None:
        status = "finished" if done == self.steps else "interrupted"
        log = read_log(self.out)
        curve = {"step": [row["step"] for row in log], "metric": self.trainer.curve}
        curve["value"] = [row.get(self.trainer.curve, math.nan) for row in log]
        state = jax.device_put(state, SingleDeviceSharding(jax.devices()[0]))
        measured = self.trainer.report(state) if self.trainer.report else {}
        provenance = {
            **self.meta,
            **measured,
            "steps_done": done,
            "env_steps": done * self.trainer.env_steps_per_step,
            "curve": curve,
        }
        params = jax.tree.map(np.asarray, self.trainer.learned(state))
        file = learned_files.save(
            self.out / "learned.npz", learned_files.Learned(self.trainer.kind, params, self.trainer.convention, provenance)
        )
        self._write_meta(status=status, **{name: value for name, value in provenance.items() if name not in self.meta})
        draw_curve(self.out, self.trainer.curve)
        self.say(f"{status} after {done} steps, {seconds:.0f} s here, {speed:,.0f} inner env steps/s; learned so far: {file}")
        if status == "interrupted":
            words = shlex.split(self.meta["sessions"][0]["command"]) or ["pgjax", "meta-train", self.trainer.kind]
            self.say(f"continue with: {shlex.join([*words[:3], '--out', str(self.out), '--resume'])}")

    def _write_meta(self, **facts) -> None:
        content = {"format": FORMAT, "version": VERSION, **self.meta, **facts}
        path = self.out / "meta.json"
        aside = path.with_name(path.name + ".tmp")
        with disk_errors(path):
            write_file(aside, (json.dumps(to_json(content), indent=1) + "\n").encode())
            aside.replace(path)


def read_log(out: Path) -> list[dict[str, Any]]:
    """The lines of ``log.jsonl``, one a step, in order."""
    return [from_json(json.loads(line)) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def draw_curve(out: Path, metric: str) -> Path:
    """Draws ``metric`` over steps, and its mean over the last tenth of the steps so far, into ``curve.png``."""
    from pgjax.experiments.plots import pyplot, save

    log = [row for row in read_log(out) if metric in row]
    figure, axis = pyplot().subplots(figsize=(7, 3.6), layout="constrained", dpi=120)
    steps, values = (np.asarray([row[name] for row in log]) for name in ("step", metric))
    axis.plot(steps, values, lw=0.8, alpha=0.5)
    window = max(1, len(values) // 10)
    axis.plot(steps[window - 1 :], np.convolve(values, np.ones(window) / window, "valid"), lw=2)
    axis.set(xlabel="step of meta-training", ylabel=metric.replace("_", " "))
    axis.grid(alpha=0.25)
    save(figure, out / "curve.png")
    return out / "curve.png"


def _check_empty(out: Path) -> None:
    if (out / "meta.json").exists():
        raise RequestError(f"--out {out} holds a meta-training: continue it with --resume, or choose another --out")
    if out.exists() and not out.is_dir():
        raise RequestError(f"--out {out} is a file; choose another --out")
    if out.exists() and (held := sorted(path.name for path in out.iterdir())):
        raise RequestError(f"--out {out} is not empty (it holds {held[0]}); choose another --out")


def _check_same(there: dict[str, Any], here: dict[str, Any], out: Path) -> None:
    here = from_json(json.loads(json.dumps(to_json(here))))
    for name in {**there, **here}:
        if name != "devices" and there.get(name) != here.get(name):
            raise RequestError(
                f"--resume: {name} is {there.get(name)} in {out} and {here.get(name)} in this request; use the same value, or "
                "choose another --out"
            )


def _read(out: Path) -> dict[str, Any]:
    path = out / "meta.json"
    try:
        content = from_json(json.loads(path.read_text()))
        if content["format"] != FORMAT or content["version"] != VERSION:
            raise ValueError("another format")
    except (FileNotFoundError, NotADirectoryError):
        raise RequestError(f"there is no meta-training in {out} (no meta.json); start one without --resume") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{path} cannot be read: {error}; choose another --out") from error
    return {key: value for key, value in content.items() if key not in ("format", "version")}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
