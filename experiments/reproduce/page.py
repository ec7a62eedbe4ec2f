"""The pages that state where we stand, from the published numbers and the results that were kept."""

from collections.abc import Callable
from pathlib import Path

from pgjax.experiments.compare import markdown_table
from pgjax.experiments.reproduce.figures import draw_paper
from pgjax.experiments.reproduce.measured import RESULTS, Measured, load
from pgjax.experiments.reproduce.paper_file import SCALES, Paper, list_papers, read_paper
from pgjax.experiments.reproduce.verdicts import (
    CLAIM_VERDICTS,
    NUMBER_VERDICTS,
    claim_rows,
    claim_table,
    count,
    number_rows,
    number_table,
)
from pgjax.host.checkpoints import disk_errors, write_file

_PREFACE = """# Where we stand

What the papers of this family published, and what this code gets: made by `pgjax reproduce --page` from
[the published numbers](../experiments/published) and the results that were kept beside them.

A number is **inside** if the 95 % interval of the difference between our mean over seeds and the published one holds 0
(Welch's, with the published spread where there is one; where there is none the published mean is taken for exact, which is
hard on us), else **above** or **below**. It is **not run** if no kept result stands beside it yet, and **not comparable**
where the environment, the measure or the budget is another. A **claim** that was made in words or by a figure holds, is
contradicted, or stays undecided, by the 95 % interval of a difference. With so many comparisons one in twenty is outside by
chance. Budgets are those of 2 CPU cores where nothing else is said."""


def write_page(out: Path, say: Callable[[str], None] = print) -> None:
    """Writes ``out``, and beside it a folder of its name with a page and a figure for each paper.

    Raises: RunError if the disk refuses.
    """
    with disk_errors(out):
        folder = out.parent / out.stem
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in pages(out).items():
            write_file(path, text.encode())
        for name in list_papers():
            results, _, _ = kept(name)
            draw_paper(read_paper(name), results, folder / f"{name}.png")
    say(f"wrote {out} and {folder}/")


def pages(out: Path) -> dict[Path, str]:
    """The text of every page, by path."""
    rows, texts = [], {}
    for name in list_papers():
        paper = read_paper(name)
        results, scale, command = kept(name)
        numbers, claims = number_rows(paper, results), claim_rows(paper, results)
        told = [f"{sum(row.verdict == verdict for row in numbers) or ''}" for verdict in NUMBER_VERDICTS]
        tested = [row for row in claims if row.env]
        claimed = count(tested, CLAIM_VERDICTS) if tested else ""
        link = f"[{paper.title}]({out.stem}/{name}.md)"
        rows.append((link, scale, f"{len(numbers) or ''}", *told, f"{len(paper.claims) or ''}", claimed))
        texts[out.parent / out.stem / f"{name}.md"] = _paper_page(paper, results, scale, command)
    sums = [sum(int(row[column] or 0) for row in rows) for column in range(2, 4 + len(NUMBER_VERDICTS))]
    rows.append(("all", "", *map(str, sums), ""))
    header = ("paper", "scale run", "numbers", *NUMBER_VERDICTS, "claims", "tests of claims")
    return {out: f"{_PREFACE}\n\n{markdown_table(header, rows)}\n", **texts}


def kept(name: str) -> tuple[list[Measured], str, str]:
    """The results of a paper at the largest scale that was kept, the scale and the command; empty without any."""
    for scale in reversed(SCALES):
        path = RESULTS / f"{name}-{scale}.json"
        if path.exists():
            results, command = load(path)
            return results, scale, command
    return [], "", ""


def _paper_page(paper: Paper, results: list[Measured], scale: str, command: str) -> str:
    numbers, claims = number_rows(paper, results), claim_rows(paper, results)
    parts = [f"# {paper.title}", f"{paper.source}."]
    if results:
        seeds = sorted({len(each.result.seeds) for each in results})
        versions = sorted({each.result.provenance.get("pgjax", "") for each in results} - {""})
        commits = sorted({str(each.result.provenance.get("git_commit"))[:10] for each in results})
        made = f"`{command}`: {' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))} seeds, pgjax {', '.join(versions)}"
        parts += [f"{made}, commit {', '.join(commits)}.", f"![Our curves and the published numbers]({paper.name}.png)"]
    else:
        parts.append("Nothing was run at a larger scale than smoke yet.")
    for entry in paper.followups:
        parts.append(f"**{entry['title']}** {entry['text']}")
    if claims:
        parts += [f"## Claims: {count(claims, CLAIM_VERDICTS)}", claim_table(claims)]
    if numbers:
        parts += [
            f"## Numbers: {count(numbers, NUMBER_VERDICTS)}",
            # Those that say something first.
            number_table(sorted(numbers, key=lambda row: max(2, NUMBER_VERDICTS.index(row.verdict)))),
            "## Where they are from",
            _sources(paper),
        ]
    if paper.not_available:
        parts += ["## Published, but not to be had as numbers", "\n".join(f"* {text}" for text in paper.not_available)]
    return "\n\n".join(parts) + "\n"


def _sources(paper: Paper) -> str:
    rows = []
    for numbers in paper.numbers:
        mark = numbers.mark + (f" ({numbers.mark_note})" if numbers.mark_note else "")
        spread = {"none": ""}.get(numbers.spread, numbers.spread)
        rows.append(
            (
                numbers.name,
                numbers.source,
                mark,
                f"{numbers.seeds or ''}",
                spread,
                numbers.measured or numbers.metric,
                numbers.remark,
            )
        )
    return markdown_table(("name", "source", "mark", "seeds", "±", "measured", "remark"), rows)
