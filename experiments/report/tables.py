"""The report's tables: rows of plain values, written as CSV in full and as HTML as far as a page can take them."""

import csv
import io
import math
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from pgjax.experiments.html_page import esc
from pgjax.experiments.report.study import Entry, Group, Study, is_complete, text_of
from pgjax.experiments.results import command_of

# A browser still sorts so many rows at once without a pause; the rest are in the CSV.
PAGE_ROWS = 2000
Value = str | int | float | None


class Column(NamedTuple):
    """kind: ``text``, ``number`` or ``code``.  on_page: whether the page shows it; the CSV has every column."""

    title: str
    kind: str = "text"
    on_page: bool = True


class Table(NamedTuple):
    """name: of the CSV file, without its ending.  caption: for the page.  rows: values in the order of ``columns``."""

    name: str
    caption: str
    columns: Sequence[Column]
    rows: list[list[Value]]


def results_table(study: Study, groups: dict[Group, list[Entry]], name: str) -> Table:
    """Final returns of every method in every group."""
    fields = list(dict.fromkeys(field for method in study.labels for field, _ in method.settings))
    has_conditions = any(group.differs for group in groups)
    columns = [
        Column("environment"),
        Column("conditions", on_page=has_conditions),
        Column("method"),
        Column("algorithm", on_page=False),
        *(Column(field, on_page=False) for field in fields),
        *(Column(title, "number") for title in ("IQM", "low", "high", "mean", "std", "min", "max")),
        *(Column(title, "number") for title in ("seeds", "frozen", "env steps", "train s")),
        Column("policy", on_page=False),
        Column("path", on_page=False),
    ]
    rows = []
    for group, entries in groups.items():
        for entry in entries:
            settings = dict(entry.method.settings)
            rows.append(
                [
                    group.env,
                    group.told,
                    entry.method.label,
                    entry.method.algorithm,
                    *(settings.get(field, "") for field in fields),
                    *(entry.iqm, entry.low, entry.high, entry.mean, entry.std, entry.min, entry.max),
                    *(len(entry.seeds), len(entry.frozen), int(entry.env_steps[-1])),
                    sum(cell.seconds.get("train", math.nan) for cell in entry.cells),
                    group.policy,
                    " ".join(cell.path for cell in entry.cells),
                ]
            )
    caption = (
        "Return per episode at the last evaluation, a mean over episodes per seed. IQM: interquartile mean over the seeds, "
        "low and high its 95 % bootstrap interval (none with one seed); std: over seeds, n - 1. Seeds that went non-finite are "
        "in no number. Train s: seconds that the program spent training, perhaps with other configurations beside this one."
    )
    return Table(name, caption, columns, rows)


def status_table(study: Study) -> Table:
    """Every cell and how it ended, those that did not end well in front."""
    root = _common([*(run.path for run in study.unreadable), *(result.path for result in study.results)])
    rows: list[tuple[bool, list[Value]]] = []
    for result, method in zip(study.results, study.labels, strict=True):
        seeds = len(result.config["seeds"])
        row: list[Value] = [
            *(result.config["env"], method.label, result.status, len(result.seeds), seeds, len(result.frozen)),
            int(result.env_steps[-1]) if result.env_steps.size else 0,
            int(result.config["total_env_steps"]),
            result.seconds.get("session", math.nan),
            *(result.note, result.path[len(root) :], result.path),
        ]
        rows.append((is_complete(result) and not result.frozen and result.status == "finished", row))
    broken: list[list[Value]] = [
        ["", "", "unreadable", None, None, None, None, None, None, run.reason, run.path[len(root) :], run.path]
        for run in study.unreadable
    ]
    rows.sort(key=lambda pair: pair[0])
    columns = [
        *(Column("environment"), Column("method"), Column("status")),
        *(Column(title, "number") for title in ("seeds", "of", "frozen", "env steps", "of total", "seconds")),
        Column("note", on_page=any(result.note for result in study.results) or bool(study.unreadable)),
        *(Column("run", "code"), Column("path", on_page=False)),
    ]
    caption = (
        "One row a cell, that is a method on an environment, those that need attention first. Seeds: finite ones, of those "
        "asked for; frozen: seeds an update of which went non-finite. Env steps: of the last evaluation. Seconds: of the whole "
        "program." + (f" Runs are below {root}." if root else "")
    )
    return Table("status", caption, columns, [*broken, *(row for _, row in rows)])


def provenance_table(study: Study) -> Table:
    """What the numbers were made with; cells made alike share a row."""
    names = ["pgjax", "git_commit", "device_kind", "device_count", "precision", "x64", "reset_mode", "env_backend"]
    names += ["python", "platform"]
    libraries = sorted({name for result in study.results for name in result.provenance.get("libraries", {})})

    def look(result) -> tuple[str, ...]:
        provenance = result.provenance
        versions = provenance.get("libraries", {})
        return (
            result.config["env"].partition("/")[0],
            *("" if provenance.get(name) is None else text_of(provenance[name]) for name in names),
            *(text_of(versions.get(name, "")) for name in libraries),
        )

    counts = Counter(look(result) for result in study.results if result.provenance)
    titles = ["environments of", *(name.replace("_", " ") for name in names), *libraries]
    # Without any provenance there is no column to look at.
    values = dict(zip(titles, map(set, zip(*counts, strict=True)), strict=False))
    same = {title: found.pop() for title, found in values.items() if len(found) == 1}
    columns = [Column("cells", "number")]
    columns += [Column(title, "code" if title == "git commit" else "text", title not in same) for title in titles]
    caption = "Software, machine, precision, reset mode and backend that the results were made with, as the runs recorded them."
    if same:
        caption += f" The same for all: {', '.join(f'{title} {value}' for title, value in same.items() if value)}."
    return Table("provenance", caption, columns, [[count, *row] for row, count in counts.items()])


def settings_table(study: Study) -> Table:
    """Settings that a method has otherwise on other environments; those in its name are not here."""
    envs = list(dict.fromkeys(env for by_env in study.tuned.values() for env in by_env))
    rows: list[list[Value]] = [
        [algorithm, field, *(by_env.get(env, "") for env in envs)] for (algorithm, field), by_env in study.tuned.items()
    ]
    caption = "Settings with one value on each environment, but not the same one on all; a method's name does not tell them."
    return Table("settings", caption, [Column("algorithm"), Column("setting"), *map(Column, envs)], rows)


def commands_table(study: Study) -> Table:
    """The command that makes each cell again."""
    rows: list[list[Value]] = []
    for result, method in zip(study.results, study.labels, strict=True):
        rows.append([result.config["env"], method.label, _command(result.config)])
    columns = [Column("environment"), Column("method"), Column("command", "code")]
    caption = "What trains one cell again, with every setting that is not the algorithm's default spelled out."
    return Table("commands", caption, columns, rows)


def recorded_table(study: Study) -> Table:
    """The commands that were typed."""
    counts = Counter(_typed(result.provenance.get("command")) for result in study.results)
    counts.pop("", None)
    columns = [Column("cells", "number"), Column("command", "code")]
    return Table(
        "recorded_commands",
        "The commands that made the runs, as they recorded them.",
        columns,
        [[count, command] for command, count in counts.items()],
    )


def _command(config: dict[str, Any]) -> str:
    try:
        return command_of(config)
    except (KeyError, TypeError, AttributeError) as error:
        return f"cannot be spelled out: {type(error).__name__}: {error}"


def _common(paths: Sequence[str]) -> str:
    """The folder, with a slash, that all of several paths are below; empty if there is none."""
    if len(set(paths)) < 2:
        return ""
    # Letter by letter, for what stands there may be no path at all.
    first, last = min(paths), max(paths)
    same = next((i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), min(len(first), len(last)))
    return first[: first.rfind("/", 0, same) + 1]


def _typed(command: Any) -> str:
    if not isinstance(command, list) or not command:
        return ""
    first, *rest = map(str, command)
    program = "pgjax" if PurePath(first).name in ("pgjax", "__main__.py") else first
    return shlex.join([program, *rest])


# --- writing


def to_csv(table: Table) -> str:
    """The whole table; numbers in full, empty where there is none."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(column.title for column in table.columns)
    for row in table.rows:
        writer.writerow("" if _absent(value) else value for value in row)
    return out.getvalue()


def to_html(table: Table) -> str:
    """The table with its caption and a field to filter by; the first ``PAGE_ROWS`` rows. A single cell is caption enough."""
    shown = [index for index, column in enumerate(table.columns) if column.on_page]
    columns = [table.columns[index] for index in shown]
    heads = "".join(
        f'<th scope="col"{_class(column.kind)}><button type="button">{esc(column.title)}</button></th>' for column in columns
    )
    body = []
    for row in table.rows[:PAGE_ROWS]:
        cells = "".join(_cell(row[index], column.kind) for index, column in zip(shown, columns, strict=True))
        body.append(f"<tr>{cells}</tr>")
    left_out = len(table.rows) - PAGE_ROWS
    more = (
        f" <strong>Only the first {PAGE_ROWS:,} of {len(table.rows):,} rows are on this page;</strong> all are in the file."
        if left_out > 0
        else ""
    )
    rows = "\n".join(body)
    caption = f'<p class="caption">{prose(table.caption)}{more} <span class="file">tables/{esc(table.name)}.csv</span></p>'
    if len(table.rows) == len(columns) == 1:
        return caption
    return f"""<div class="table" id="table-{esc(table.name)}">
{caption}
<p class="tools"{"" if len(table.rows) > 1 else " hidden"}><label>Filter
<input type="search" placeholder="words that a row must contain"></label>
<output>{min(len(table.rows), PAGE_ROWS):,} rows</output></p>
<div class="scroll" tabindex="0"><table>
<thead><tr>{heads}</tr></thead>
<tbody>
{rows}
</tbody></table></div></div>"""


def prose(text: str) -> str:
    """A text of our own as HTML, its intervals not broken between lines."""
    return esc(text).replace("95 %", "95&nbsp;%")


def number(value: float) -> str:
    """Four digits, thousands parted in whole numbers; a dash for none."""
    if _absent(value):
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞"
    if value and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.3g}".replace("-", "−")
    digits = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{min(digits, 6)}f}".replace("-", "−")


def _cell(value: Value, kind: str) -> str:
    if kind == "number":
        data = "" if _absent(value) else f' data-v="{value}"'
        return f'<td class="number"{data}>{number(value)}</td>'  # type: ignore[arg-type]
    text = esc("" if value is None else value)
    return f'<td class="code"><code>{text}</code></td>' if kind == "code" else f"<td>{text}</td>"


def _class(kind: str) -> str:
    return ' class="number"' if kind == "number" else ""


def _absent(value: Any) -> bool:
    return value is None or value != value  # NaN is the one number that is not itself
