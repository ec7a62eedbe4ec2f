"""``pgjax reproduce``: runs what a paper's numbers need and puts ours beside them, with an interval and a verdict.

    OUT/cells/...        the runs, as those of a sweep; a second call goes on where the first one stopped
    OUT/results.json     what came of them, per seed: small enough to be kept
    OUT/table.md, .csv   every published number beside ours; OUT/claims.csv likewise
    OUT/report.html      curves and tables of our runs

What was published, and which of our runs stand beside it, is in ``experiments/published/PAPER.toml``.
"""

import shlex
from collections.abc import Callable
from pathlib import Path

from pgjax.errors import RequestError
from pgjax.experiments.report import write_report
from pgjax.experiments.reproduce.measured import RESULTS, Measured, dump, kept_elsewhere, measure
from pgjax.experiments.reproduce.paper_file import SCALES, Paper, list_papers, read_paper
from pgjax.experiments.reproduce.verdicts import claim_rows, number_rows, summary, to_csv, to_markdown
from pgjax.experiments.sweeps import driver
from pgjax.experiments.sweeps.folder import SweepFolder
from pgjax.host.checkpoints import disk_errors, write_file

__all__ = ["SCALES", "list_papers", "reproduce"]


def reproduce(
    paper: str,
    scale: str,
    options: driver.Options,
    *,
    record: bool = False,
    reuse: bool = False,
    say: Callable[[str], None] = print,
) -> bool:
    """Runs what is left of a paper's reproduction, and writes its tables.

    Args:
      paper: name of a file in ``experiments/published``.  scale: one of ``SCALES``.  options: where and how to run.
      record: keep the results beside the published numbers, for the page.
      reuse: take over what was kept for other papers at the same request, in place of running it.
    Returns: whether every run is finished.
    Raises: RequestError for an unknown paper or scale, or one without runs.
    """
    content = read_paper(paper)
    taken = kept_elsewhere(content, scale) if reuse else []
    sweep = content.sweep(scale, {(each.run, each.algorithm, each.env) for each in taken})
    if record and scale == "smoke":
        raise RequestError("--record: smoke proves the path only; use --scale cpu or full")
    command = f"pgjax reproduce {paper} --scale {scale}{' --reuse' if reuse else ''}"
    again = f"{command} --out {shlex.quote(str(options.out))}"
    say(f"{content.title} ({content.source}), scale {scale}")
    for each in taken:
        say(f"{each.run}: {each.algorithm} on {each.env} is taken from the results that were kept")
    done = driver.run_cells_of(sweep, options, command=again, again=again, say=say)
    here = {(each.run, each.algorithm, each.env): each for each in measure(content, scale, SweepFolder(options.out))}
    results = list({**here, **{(each.run, each.algorithm, each.env): each for each in taken}}.values())
    _write(content, scale, results, options.out, again, say)
    if record:
        if not done:
            raise RequestError("--record: not every run is finished; run the command again")
        RESULTS.mkdir(exist_ok=True)
        write_file(RESULTS / f"{paper}-{scale}.json", dump(results, command).encode())
        say(f"recorded in {RESULTS / f'{paper}-{scale}.json'}; pgjax reproduce --page writes the page anew")
    return done


def _write(paper: Paper, scale: str, results: list[Measured], out: Path, command: str, say) -> None:
    numbers, claims = number_rows(paper, results), claim_rows(paper, results)
    with disk_errors(out / "table.md"):
        write_file(out / "table.md", to_markdown(paper, scale, numbers, claims).encode())
        write_file(out / "table.csv", to_csv(numbers).encode())
        write_file(out / "claims.csv", to_csv(claims).encode())
        write_file(out / "results.json", dump(results, command).encode())
    curves = [each.result for each in results]
    if curves:
        write_report(curves, out, title=f"{paper.title}: scale {scale}", command=command, say=lambda text: None)
    say(summary(numbers, claims))
    say(f"tables in {out / 'table.md'}, curves in {out / 'report.html'}")
