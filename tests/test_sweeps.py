"""Sweeps as they run: what is trained once and kept, what an interruption or a damaged file costs, and two drivers."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from small_sweeps import contents, events, run, statuses_of, write

import pgjax
from pgjax.experiments.results import Result, results_of
from pgjax.experiments.sweeps import driver, engines, work
from pgjax.experiments.sweeps.folder import SweepFolder, cell_of
from pgjax.experiments.sweeps.plan import cells_of
from pgjax.experiments.sweeps.sweep_file import read_sweep

ROOT = Path(__file__).resolve().parent.parent


class Inline:
    """An engine without processes."""

    def __init__(self, say=print, **options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def run(self, tasks):
        for task in tasks:
            yield task, work.work(task)


@pytest.fixture
def inline(monkeypatch):
    monkeypatch.setitem(engines.ENGINES, "local", Inline)


# --- what is run


def test_every_cell_is_a_run_like_the_one_made_alone(tmp_path, inline):
    file = write(tmp_path / "sweep.toml", algorithms=("ppo",))
    assert run(file, tmp_path / "out")
    cells = cells_of(read_sweep(file).specs)
    assert {path.name for path in (tmp_path / "out" / "cells").iterdir()} == {cell.name for cell in cells}
    assert not list((tmp_path / "out" / "groups").iterdir())
    cell = cells[1]
    folder = tmp_path / "out" / "cells" / cell.name
    algorithm = cell.spec.build()
    with pgjax.RunStore.create(tmp_path / "alone", cell.spec.config()) as store:
        pgjax.run(cell.spec, store, algorithm=algorithm)
    alone, here = pgjax.load(tmp_path / "alone"), pgjax.load(folder)
    assert here.config == alone.config and here.status == "finished"
    key = ["seed", "iteration"]
    tables = [run.metrics.sort_values(key, ignore_index=True) for run in (here, alone)]
    pd.testing.assert_frame_equal(*tables, rtol=1e-3, atol=1e-4)
    from pgjax.host.runner import policies_of

    _, lanes = policies_of(folder, algorithm)
    assert lanes["seed"].tolist() == [0, 1] and lanes["config"].tolist() == [0, 0]
    # What the report reads is what the run holds.
    (result,) = results_of(here)
    assert Result.parse((folder / "result.json").read_text()).dump() == result.dump()
    assert result.final().shape == (2,)
    # Lines of the log are those of a run of these lanes alone.
    logs = [[json.loads(line) for line in (path / "log.jsonl").open()] for path in (folder, tmp_path / "alone")]
    assert [list(entry) for entry in logs[0]] == [list(entry) for entry in logs[1]]
    for here_, alone_ in zip(*logs, strict=True):
        assert here_.pop("kind") == alone_.pop("kind") and here_ == pytest.approx(alone_, rel=1e-3, abs=1e-4)


def test_one_program_a_group_and_nothing_is_run_twice(tmp_path, inline):
    said = []
    file = write(tmp_path / "sweep.toml")
    assert run(file, tmp_path / "out", said.append)
    assert len(events(tmp_path / "out", "started")) == 2 and len(events(tmp_path / "out", "cell")) == 4
    before = contents(tmp_path / "out")
    assert run(file, tmp_path / "out", said.append)
    # One more learning rate and two more seeds: what is there stays as it is.
    write(tmp_path / "sweep.toml", algorithms=("ppo",), rates=(1e-3, 1e-2, 1e-1))
    assert run(file, tmp_path / "out", said.append)
    assert len(events(tmp_path / "out", "started")) == 3
    after = contents(tmp_path / "out")
    assert len(after) == 5 and all(after[name] == before[name] for name in before)
    assert len(json.loads((tmp_path / "out" / "sweep.json").read_text())["starts"]) == 2


def test_the_number_of_compilations_is_the_number_of_groups(tmp_path):
    file = write(tmp_path / "sweep.toml")
    sweep = read_sweep(file)
    folder = SweepFolder(tmp_path / "out")
    with folder.owned():
        outcomes = driver.run_cells(Inline(), folder, cells_of(sweep.specs), driver.Options(folder.path), say=lambda text: None)
    assert [outcome.programs for outcome in outcomes] == [1, 1]


def test_a_failed_cell_does_not_poison_the_rest(tmp_path, inline):
    """A learning rate that blows up freezes its own lanes; its neighbours in the program are what they are without it."""
    rates, said = (1e-3, 3e38), []
    file = write(tmp_path / "sweep.toml", algorithms=("ppo",), steps=32 * 12, rates=rates)
    assert not run(file, tmp_path / "out", said.append)
    statuses = {s.cell.spec.configs[0]["learning_rate"]: s for s in statuses_of(file, tmp_path / "out")}
    assert statuses[1e-3].status == "finished" and statuses[3e38].status == "failed"
    assert "seed 0 went non-finite" in statuses[3e38].note and "--retry failed" in said[-1]
    assert not run(file, tmp_path / "out"), "a failed cell stays failed"
    assert len(events(tmp_path / "out", "started")) == 1, "and is not run again unless asked"
    assert not run(file, tmp_path / "out", retry=("failed",))
    started = events(tmp_path / "out", "started")
    assert len(started) == 2 and len(started[1]["cells"]) == 1


def test_a_group_that_raises_is_recorded_and_the_others_run(tmp_path, inline, monkeypatch):
    file = write(tmp_path / "sweep.toml")
    real = pgjax.run

    def broken(spec, *args, **kwargs):
        if spec.algorithm == "ppo":
            raise OSError("the network folder is gone")
        return real(spec, *args, **kwargs)

    monkeypatch.setattr(pgjax, "run", broken)
    assert not run(file, tmp_path / "out")
    told = {(s.cell.spec.algorithm, s.status, s.note) for s in statuses_of(file, tmp_path / "out")}
    assert told == {("ppo", "failed", "OSError: the network folder is gone"), ("spo", "finished", "")}
    monkeypatch.undo()
    monkeypatch.setitem(engines.ENGINES, "local", Inline)
    assert run(file, tmp_path / "out", retry=("failed",))


def test_damaged_files_cost_only_what_they_held(tmp_path, inline):
    file, out = write(tmp_path / "sweep.toml", algorithms=("ppo",)), tmp_path / "out"
    assert run(file, out)
    before = contents(out)
    first, second = sorted((out / "cells").iterdir())
    text = (first / "result.json").read_text()
    (first / "result.json").write_text(text[: len(text) // 2])
    (out / "sweep.json").write_text("{")
    with (out / "journal.jsonl").open("a") as journal:
        journal.write('{"event": "fin')
    status = next(s for s in statuses_of(file, out) if s.cell.name == first.name)
    assert status.status == "unreadable" and "result.json" in status.note and "delete the folder" in status.note
    assert not run(file, out), "unreadable cells are reported"
    assert run(file, out, retry=("unreadable",))
    assert contents(out).keys() == before.keys()
    assert contents(out)[second.name] == before[second.name]


def test_a_group_whose_checkpoints_are_damaged_begins_anew_and_nothing_is_deleted(tmp_path, inline, monkeypatch):
    file, out = write(tmp_path / "sweep.toml", algorithms=("ppo",)), tmp_path / "out"
    _interrupt_after(monkeypatch, 1)
    assert not run(file, out)
    monkeypatch.undo()
    monkeypatch.setitem(engines.ENGINES, "local", Inline)
    (group,) = [path for path in (out / "groups").iterdir() if path.is_dir()]
    for record in (group / "checkpoints").rglob("record.json"):
        record.write_text("{")
    assert run(file, out)
    assert events(out, "damaged") and (out / "groups" / f"{group.name}.damaged-1" / "checkpoints").is_dir()


def _interrupt_after(monkeypatch, rows):
    """Every run is interrupted at its first checkpoint, ``rows`` rows of metrics into it."""
    from pgjax.host import runner

    monkeypatch.setattr(runner, "CHUNK_SECONDS", 1e-9)
    plain = runner._Run.report

    def report(self, kind, **data):
        plain(self, kind, **data)
        if kind == "rows" and self.record["row"] >= rows:
            self.interrupt.requested = True

    monkeypatch.setattr(runner._Run, "report", report)


def test_an_interrupted_sweep_goes_on_where_it_was(tmp_path, inline, monkeypatch):
    file = write(tmp_path / "sweep.toml", algorithms=("ppo",))
    assert run(file, tmp_path / "whole")
    said = []
    _interrupt_after(monkeypatch, 2)
    assert not run(file, tmp_path / "out", said.append)
    assert f"pgjax sweep run {file} --out {tmp_path / 'out'}" in said[-1]
    status, *_ = statuses_of(file, tmp_path / "out")
    assert status.status == "interrupted" and 0.2 < status.done < 0.9
    monkeypatch.undo()
    monkeypatch.setitem(engines.ENGINES, "local", Inline)
    assert run(file, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(events(tmp_path / "out", "resumed")) == 1


def test_a_newer_store_is_left_alone(tmp_path, inline):
    file, out = write(tmp_path / "sweep.toml", algorithms=("ppo",)), tmp_path / "out"
    assert run(file, out)
    content = json.loads((out / "sweep.json").read_text())
    (out / "sweep.json").write_text(json.dumps({**content, "version": 99}))
    for asking in (lambda: run(file, out), lambda: driver.sweep_status(file, out)):
        with pytest.raises(pgjax.RequestError, match="newer pgjax") as raised:
            asking()
        assert "update pgjax" in str(raised.value)


def test_clocks_that_disagree_change_nothing(tmp_path, inline, monkeypatch):
    """Times are for people: files from the future are as good as any."""
    file, out = write(tmp_path / "sweep.toml", algorithms=("ppo",)), tmp_path / "out"
    _interrupt_after(monkeypatch, 2)
    assert not run(file, out)
    monkeypatch.undo()
    monkeypatch.setitem(engines.ENGINES, "local", Inline)
    future = time.time() + 10 * 365 * 86400
    for path in out.rglob("*"):
        os.utime(path, (future, future))
    for path in out.rglob("run.json"):
        path.write_text(path.read_text().replace(time.strftime('"%Y'), '"2099'))
    assert run(file, out) and run(file, out)
    assert len(events(out, "started")) == 1 and len(events(out, "resumed")) == 1


@pytest.mark.slow
def test_ten_thousand_finished_cells(tmp_path):
    """Every cell has one small file that says it all; no table is opened."""
    rates = np.geomspace(1e-5, 1e-1, 10_000).tolist()
    file = write(tmp_path / "sweep.toml", algorithms=("ppo",), rates=rates)
    cells = cells_of(read_sweep(file).specs)
    assert len(cells) == 10_000
    out = tmp_path / "out"
    for cell in cells[:-1]:
        (out / "cells" / cell.name).mkdir(parents=True)
        result = Result(str(out), "finished", cell.spec.config(), seeds=(0, 1), env_steps=np.array([64, 128]))
        (out / "cells" / cell.name / "result.json").write_text(result.dump())
    text = driver.sweep_status(file, out)
    assert "9999" in text and "pending" in text
    results = driver.results_of_sweep(file, out)
    assert len(results) == 10_000 and results[-1].status == "pending"


# --- who may run it


def test_a_second_driver_is_refused_by_the_name_of_the_first(tmp_path, inline):
    file, out = write(tmp_path / "sweep.toml", algorithms=("ppo",)), tmp_path / "out"
    code = "import sys, time; from pgjax.experiments.sweeps.folder import SweepFolder\n"
    code += "with SweepFolder(sys.argv[1]).owned(): print('held', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code, str(out)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout.readline().strip() == "held"
            with pytest.raises(pgjax.RequestError) as raised:
                run(file, out)
            assert f"process {first.pid} on" in str(raised.value) and "since 20" in str(raised.value)
        finally:
            first.kill()
    assert run(file, out), "a driver that was killed blocks nobody"


def test_a_group_that_another_process_finishes_meanwhile_is_done(tmp_path, inline, monkeypatch):
    """As a job that outlived its driver does: who waits for the group then finds nothing left to do."""
    file, out = write(tmp_path / "sweep.toml", algorithms=("ppo",)), tmp_path / "out"
    _interrupt_after(monkeypatch, 2)
    assert not run(file, out)
    monkeypatch.undo()
    (record,) = (out / "groups").glob("*.json")
    task = work.Task(str(out), record.stem)

    def held(*args, **kwargs):
        raise work.InUse("somebody is at it")

    def meanwhile(seconds):
        monkeypatch.undo()
        assert work.work(task).status == "finished"

    monkeypatch.setattr(work.RunStore, "open", held)
    monkeypatch.setattr(work, "time", SimpleNamespace(monotonic=time.monotonic, sleep=meanwhile))
    assert work.work(task).status == "finished"
    assert len(events(out, "started")) == 1 and len(events(out, "cell")) == 2
    assert not list((out / "groups").iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], ["run,status,report"]),
        (["go", "x.toml"], ["'go'", "run"]),
        (["run"], ["name a sweep file"]),
        (["run", "nowhere.toml"], ["no file nowhere.toml"]),
        (["run", str(ROOT / "README.md")], ["not TOML"]),
        (["run", str(ROOT / "README.md"), "--engine", "cloud"], ["engine"]),
    ],
)
def test_wrong_requests(words, said, refuse, capsys):
    if not words:
        from pgjax import cli

        assert cli._main(["sweep"]) == 2 and "run,status,report" in capsys.readouterr().out
        return
    refuse(["sweep", *words], said)


@pytest.mark.parametrize(
    ("more", "options", "said"),
    [
        ("", {"workers": 0}, "workers = 0"),
        ("", {"engine": "slurm", "workers": 2}, "engine.workers: slurm has no such option"),
        ('[engine]\nname = "ray"\nworkers = 2\nadress = "auto"', {}, "engine.adress"),
        ('[engine]\nname = "slurm"', {}, "engine slurm"),
    ],
)
def test_options_an_engine_does_not_have(tmp_path, more, options, said):
    file = write(tmp_path / "sweep.toml", algorithms=("ppo",), more=more)
    with pytest.raises(pgjax.RequestError, match=said):
        run(file, tmp_path / "out", **options)


def test_numbers_that_cannot_work_are_refused_before_anything_is_written(tmp_path, inline):
    for more, said in (("gamma = [0.9, 1.5]", "gamma"), ("num_minibatches = [1, 3]", "num_minibatches")):
        file = write(tmp_path / "sweep.toml", algorithms=("ppo",), more=more)
        with pytest.raises(pgjax.RequestError, match=said):
            run(file, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_sweep_or_cannot_be_written(tmp_path, inline):
    file = write(tmp_path / "sweep.toml", algorithms=("ppo",))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(pgjax.RequestError, match=r"no sweep \(it holds thesis.tex\)"):
        run(file, tmp_path / "mine")
    for out in (file, file / "below"):
        with pytest.raises(pgjax.RequestError, match="choose another --out"):
            run(file, out)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path, inline):
    file, out = write(tmp_path / "sweep.toml", algorithms=("ppo",)), tmp_path / "out"
    assert run(file, out)
    out.chmod(0o500)
    try:
        with pytest.raises(pgjax.RequestError, match="cannot be written"):
            run(file, out)
        assert "finished" in driver.sweep_status(file, out)
    finally:
        out.chmod(0o700)


def test_a_dry_run_says_what_would_be_and_writes_nothing(tmp_path):
    file, said = write(tmp_path / "sweep.toml"), []
    driver.dry_run(file, driver.Options(tmp_path / "out"), say=said.append)
    text = "\n".join(said)
    assert "4 cells (4 pending)" in text and "2 compilations" in text and "MiB" in text
    assert not (tmp_path / "out").exists()
    said.clear()
    driver.dry_run(file, driver.Options(tmp_path / "out"), measure=False, say=said.append)
    assert "MiB" not in "\n".join(said)


def test_cells_of_the_same_spec_are_one(tmp_path):
    file = write(tmp_path / "sweep.toml", algorithms=("ppo",), rates=(1e-3,))
    spec = read_sweep(file).specs[0]
    assert [cell.name for cell in cells_of([spec, spec])] == [cell_of(spec).name]
