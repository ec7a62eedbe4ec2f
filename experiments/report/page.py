"""The page itself: everything inline, everything from run files escaped."""

import base64
import dataclasses
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pgjax
from pgjax.experiments.html_page import document, esc
from pgjax.experiments.report.aggregates import Aggregated
from pgjax.experiments.report.figures import Figure
from pgjax.experiments.report.study import Study, count_of
from pgjax.experiments.report.tables import Table, prose, to_html

_HERE = Path(__file__).parent


@dataclasses.dataclass
class Contents:
    """What goes into the page, from top to bottom.

    sampled: results of the sampled policy, where both were evaluated.
    settings: those that differ between environments under one name, where there are any.
    """

    title: str
    command: str
    study: Study
    curves: list[Figure]
    sensitivity: list[Figure]
    aggregated: Aggregated
    results: Table
    sampled: Table | None
    status: Table
    settings: Table | None
    provenance: Table
    recorded: Table
    commands: Table

    @property
    def figures(self) -> list[Figure]:
        of_aggregates = [figure for section in self.aggregated.sections for figure in section.figures]
        return [*self.curves, *of_aggregates, *self.sensitivity]

    @property
    def tables(self) -> list[Table]:
        tables = [self.results, self.sampled, self.aggregated.aggregates, self.aggregated.comparisons, self.status]
        tables += [self.settings, self.provenance, self.recorded, self.commands]
        return [table for table in tables if table]


def render(contents: Contents) -> str:
    """The HTML text: no address outside, and a policy that lets a browser load none."""
    style, script = ((_HERE / f"page.{kind}").read_text() for kind in ("css", "js"))
    sections = list(_sections(contents))
    links = "\n".join(f'<a href="#{name}">{esc(heading)}</a>' for name, heading, _ in sections)
    body = "\n".join(
        f'<section id="{name}">\n<h2>{esc(heading)}</h2>\n{inside}\n</section>' for name, heading, inside in sections
    )
    body = f"""<header>
<h1>{esc(contents.title)}</h1>
{_summary(contents)}
<pre class="command"><code>{esc(contents.command)}</code></pre>
</header>
{_warnings(contents.study.warnings)}
<nav aria-label="Sections">
{links}
</nav>
<main>
{body}
</main>
<footer>Made by pgjax {esc(pgjax.__version__)}. Figures are in <code>figures/</code>, tables in
<code>tables/</code>.</footer>"""
    return document(contents.title, style, body, script)


def _sections(contents: Contents) -> Iterable[tuple[str, str, str]]:
    """``(anchor, heading, HTML)`` of each."""
    nothing = "<p>No cell has a result at the end of its budget yet; the status table says how far each is.</p>"
    yield "curves", "Learning curves", _figures(contents.curves) or nothing
    if inside := _aggregates(contents.aggregated):
        yield "aggregates", "Aggregates over environments", inside
    if contents.sensitivity:
        yield "sensitivity", "Sensitivity to hyperparameters", _figures(contents.sensitivity)
    sampled = _details("The same of the sampled policy", contents.sampled) if contents.sampled else ""
    yield "results", "Results", to_html(contents.results) + sampled
    yield "status", "Status of every cell", to_html(contents.status)
    settings = _details("Settings that differ between environments", contents.settings) if contents.settings else ""
    yield "provenance", "Provenance", to_html(contents.provenance) + settings
    recorded = to_html(contents.recorded) if contents.recorded.rows else ""
    inside = (
        f'<p>This page was made by</p>\n<pre class="command"><code>{esc(contents.command)}</code></pre>\n{recorded}'
        + _details(f"Commands that make each of the {count_of(contents.commands.rows, 'cell')} again", contents.commands)
    )
    yield "commands", "Commands", inside


def _summary(contents: Contents) -> str:
    study = contents.study
    algorithms = {method.algorithm for method in study.labels}
    methods, envs = set(study.labels), {result.config["env"] for result in study.results}
    seeds = sorted({len(result.config["seeds"]) for result in study.results})
    of_seeds = f"{seeds[0]} seed{'s' if seeds[0] != 1 else ''}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    statuses = Counter(result.status for result in study.results)
    if study.unreadable:
        statuses["unreadable"] = len(study.unreadable)
    cells = ", ".join(f"{count:,} {status}" for status, count in statuses.items())
    told = f" {_told_of_returns(study)}" if study.groups else ""
    return (
        f'<p class="summary">{count_of(methods, "method")} ({count_of(algorithms, "algorithm")}) on '
        f"{count_of(envs, 'environment')} with {of_seeds}: {count_of(study.results, 'cell')}, {esc(cells)}.{prose(told)}</p>"
    )


def _told_of_returns(study: Study) -> str:
    which = {
        "mode": "Returns are of the mode policy (no sampling of actions) in whole evaluation episodes, undiscounted",
        "sample": "Returns are of the sampled policy in whole evaluation episodes, undiscounted",
        "training": "Returns are of the episodes that ended while training, undiscounted",
    }
    policies = {group.policy for group in study.groups}
    told = which[policies.pop()] if len(policies) == 1 else "Whose the returns are stands beside each environment"
    told += "; those of the sampled policy stand in a table of their own" if study.sampled else ""
    return f"{told}. They are summed up by the interquartile mean (IQM) over seeds with its 95 % bootstrap interval."


def _warnings(warnings: list[str]) -> str:
    if not warnings:
        return '<aside class="calm" id="warnings"><p>Nothing unlike, frozen or missing was found.</p></aside>'
    items = "\n".join(f"<li>{esc(text)}</li>" for text in warnings)
    heading = f"{count_of(warnings, 'thing')} to know before reading on"
    return f'<aside class="warnings" id="warnings">\n<h2>{heading}</h2>\n<ul>\n{items}\n</ul>\n</aside>'


def _aggregates(aggregated: Aggregated) -> str:
    parts = []
    for section in aggregated.sections:
        if len(aggregated.sections) > 1 and (section.figures or section.notes):
            parts.append(f"<h3>{esc(section.told or 'under the other conditions')}</h3>")
        parts += [f"<p>{esc(note)}</p>" for note in section.notes]
        parts.append(_figures(section.figures))
    for table, heading in (
        (aggregated.aggregates, "All aggregates"),
        (aggregated.comparisons, "Comparisons of every two methods"),
    ):
        if table.rows:
            parts.append(_details(heading, table))
    return "\n".join(part for part in parts if part)


def _details(heading: str, table: Table) -> str:
    return f"<details>\n<summary>{esc(heading)}</summary>\n{to_html(table)}\n</details>"


def _figures(figures: list[Figure]) -> str:
    if not figures:
        return ""
    return '<div class="figures">\n' + "\n".join(map(_figure, figures)) + "\n</div>"


def _figure(figure: Figure) -> str:
    data = base64.b64encode(figure.png).decode()
    # The alternative text names the picture; what it shows is in the caption, which is read out too.
    caption = f"<strong>{esc(figure.title)}.</strong> {prose(figure.caption)}"
    return f"""<figure{' class="wide"' if figure.wide else ""}>
<img alt="{esc(figure.title)}" src="data:image/png;base64,{data}">
<figcaption>{caption} <span class="file">figures/{esc(figure.name)}.png</span></figcaption>
</figure>"""
