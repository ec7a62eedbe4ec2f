"""``pgjax report``: one page that shows what runs came to, with nothing merged that is not alike.

    OUT/report.html      curves, aggregates, profiles, tables, provenance and commands; needs no network and no other file
    OUT/figures/*.png    the same figures
    OUT/tables/*.csv     the same tables, with all rows and in full precision

What is shown, and by which rules, is told in ``docs/reports.md``.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from pgjax.errors import RequestError
from pgjax.experiments.report.aggregates import aggregate
from pgjax.experiments.report.figures import STYLE, Styles, curve_figures, sensitivity_figures
from pgjax.experiments.report.page import Contents, render
from pgjax.experiments.report.reading import Unreadable, fault_of, read_runs
from pgjax.experiments.report.study import Study, count_of, make_study
from pgjax.experiments.report.tables import (
    commands_table,
    provenance_table,
    recorded_table,
    results_table,
    settings_table,
    status_table,
    to_csv,
)
from pgjax.experiments.results import Result
from pgjax.host.checkpoints import disk_errors, write_file

__all__ = ["report_runs", "write_report"]


def report_runs(
    paths: Sequence[Path], out: Path | None = None, *, command: str = "pgjax report", say: Callable[[str], None] = print
) -> Path:
    """Writes a report on runs.

    Args:
      paths: folders of runs, or folders that contain runs at any depth, such as a comparison's.
      out: folder to write into, by default ``report`` in the first of ``paths``.
      command: for the record.  say: called with each text to show.
    Returns: the page.
    Raises: RequestError if there is nothing to report on, or ``out`` cannot be written.
    """
    results, unreadable = read_runs(paths)
    for run in unreadable[:5]:
        say(f"left out: {run.path} cannot be read: {run.reason}")
    if len(unreadable) > 5:
        say(f"left out: {len(unreadable) - 5} more, see the status table")
    out = Path(out) if out else Path(paths[0]) / "report"
    title = "Report on " + ", ".join(dict.fromkeys(Path(os.path.realpath(path)).name for path in paths[:3]))
    title += f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return write_report(results, out, title=title, command=command, say=say, unreadable=unreadable)


def write_report(
    results: Sequence[Result],
    out: Path,
    *,
    title: str,
    command: str,
    say: Callable[[str], None] = print,
    unreadable: Sequence[Unreadable] = (),
) -> Path:
    """Writes the page, the figures and the tables. Those of an earlier report are replaced.

    Args:
      results: finished or not; those that are not are in the status table only.
      title: of the page.  command: that makes the page, for the record.  say: called with each text to show.
      unreadable: runs to list beside them. Results that are not as ``Result`` says are listed with these.
    Returns: the page.
    Raises: RequestError if there are no results or ``out`` cannot be written; RunError if the disk gives up half-way.
    """
    faults = [(result, fault_of(result)) for result in results]
    unreadable = [*unreadable, *(Unreadable(str(result.path), fault) for result, fault in faults if fault)]
    sound = [result for result, fault in faults if not fault]
    if not sound:
        why = f"; the first, {unreadable[0].path}: {unreadable[0].reason}" if unreadable else ""
        raise RequestError(f"there is no result to report on{why}")
    out = _prepared(Path(out))
    contents = _contents(title, command, make_study(sound, unreadable))
    for figure in contents.figures:
        _write(out / "figures" / f"{figure.name}.png", figure.png)
    for table in contents.tables:
        _write(out / "tables" / f"{table.name}.csv", to_csv(table).encode())
    page = out / "report.html"
    _write(page, render(contents).encode())
    counts = (
        f"{count_of(sound, 'cell')}, {count_of(contents.figures, 'figure')}, {count_of(contents.study.warnings, 'warning')}"
    )
    say(f"{page}: {counts}")
    return page


def _contents(title: str, command: str, study: Study) -> Contents:
    import matplotlib

    styles = Styles(study)
    with matplotlib.rc_context(STYLE):
        aggregated = aggregate(study, styles)
        curves, sensitivity = curve_figures(study, styles), sensitivity_figures(study, styles)
    return Contents(
        title=title,
        command=command,
        study=study,
        curves=curves,
        sensitivity=sensitivity,
        aggregated=aggregated,
        results=results_table(study, study.groups, "results"),
        sampled=results_table(study, study.sampled, "results_sampled") if study.sampled else None,
        status=status_table(study),
        settings=settings_table(study) if study.tuned else None,
        provenance=provenance_table(study),
        recorded=recorded_table(study),
        commands=commands_table(study),
    )


def _prepared(out: Path) -> Path:
    """The folder with what it needs. Raises: RequestError if it cannot be written."""
    if out.exists() and not out.is_dir():
        raise RequestError(f"--out {out} is a file; choose another --out")
    try:
        for name in ("figures", "tables"):
            (out / name).mkdir(parents=True, exist_ok=True)
        probe = out / f".report-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RequestError(f"--out {out} cannot be written: {error.strerror}; choose another --out") from error
    return out


def _write(path: Path, data: bytes) -> None:
    # Aside and renamed, so that a reader never finds half a file.
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with disk_errors(path):
            write_file(aside, data)
            aside.replace(path)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
