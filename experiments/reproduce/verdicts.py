"""Ours beside what was published: differences with intervals, and a verdict for each number and claim."""

import csv
import dataclasses
import io
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy import stats

from pgjax.errors import RequestError
from pgjax.experiments.compare import markdown_table, text_table
from pgjax.experiments.reproduce.measured import Measured
from pgjax.experiments.reproduce.paper_file import Claim, ClaimTest, Numbers, Paper

LEVEL = 0.95
_SIGNS = {"greater": ">", "less": "<"}
NUMBER_VERDICTS = ("inside", "above", "below", "not run", "not comparable")
CLAIM_VERDICTS = ("holds", "undecided", "contradicted", "not run", "not tested")


@dataclasses.dataclass(frozen=True)
class NumberRow:
    """A published number and ours.

    ours, low, high: our mean over seeds, or interquartile mean, and its 95 % interval.
    difference: ours less published, with its interval.
    verdict: ``inside`` if the difference's interval holds 0, ``above`` or ``below`` if ours is; else why there is none.
    """

    numbers: str
    env: str
    published: str
    mark: str
    env_steps: int
    verdict: str
    why: str = ""
    our_env: str = ""
    ours: float = math.nan
    low: float = math.nan
    high: float = math.nan
    seeds: int = 0
    difference: float = math.nan
    difference_low: float = math.nan
    difference_high: float = math.nan


@dataclasses.dataclass(frozen=True)
class ClaimRow:
    """A claim on one environment.

    test: which runs and metric.  note: what is to be known of the claim and its test.
    difference: left less right (or less the number), with its 95 % interval.
    """

    claim: str
    env: str
    verdict: str
    text: str
    note: str = ""
    test: str = ""
    why: str = ""
    left: float = math.nan
    right: float = math.nan
    seeds: int = 0
    difference: float = math.nan
    difference_low: float = math.nan
    difference_high: float = math.nan


def number_rows(paper: Paper, results: Sequence[Measured]) -> list[NumberRow]:
    """A row for every published number of a paper."""
    return [_number_row(numbers, env, value, results) for numbers in paper.numbers for env, value in numbers.values.items()]


def claim_rows(paper: Paper, results: Sequence[Measured]) -> list[ClaimRow]:
    """A row for every claim on every environment that tests it."""
    return [row for claim in paper.claims for row in _claim_rows(claim, results)]


def mean_interval(scores: np.ndarray) -> tuple[float, float, float]:
    """Mean and the ends of its 95 % interval by Student's t; infinitely wide for one seed."""
    mean = float(np.mean(scores))
    if len(scores) < 2:
        return mean, -math.inf, math.inf
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(scores) - 1) * np.std(scores, ddof=1) / math.sqrt(len(scores)))
    return mean, mean - half, mean + half


def centre(scores: np.ndarray, statistic: str = "mean") -> tuple[float, float, float]:
    """Mean or interquartile mean of scores [S], its standard error and the degrees of freedom of that.

    A quarter of the scores at either end, rounded down, is left out of the interquartile mean; its error is that of a trimmed
    mean, from the winsorised variance (Tukey and McLaughlin 1963).
    """
    cut = len(scores) // 4 if statistic == "iqm" else 0
    sorted_scores = np.sort(np.asarray(scores, np.float64))
    kept = len(scores) - 2 * cut
    mean = float(np.mean(sorted_scores[cut : len(scores) - cut]))
    if kept < 2:
        return mean, math.inf, 1
    winsorised = np.clip(sorted_scores, sorted_scores[cut], sorted_scores[-1 - cut])
    error = np.std(winsorised, ddof=1) * math.sqrt(len(scores) - 1) / math.sqrt(kept * (kept - 1))
    return mean, float(error), kept - 1


def difference_interval(
    mean: float, error: float, df: float, other_error: float, other_df: float
) -> tuple[float, float, float]:
    """A difference and the ends of its 95 % interval: Welch's, from both standard errors and degrees of freedom.

    An infinite ``other_df`` takes the other error for exactly known.
    """
    squares = error**2, other_error**2
    if not sum(squares):
        return mean, mean, mean
    inverse = sum((square / sum(squares)) ** 2 / d for square, d in zip(squares, (df, other_df), strict=True) if square)
    half = float(stats.t.ppf((1 + LEVEL) / 2, 1 / inverse if inverse else math.inf)) * math.sqrt(sum(squares))
    return mean, mean - half, mean + half


def _number_row(numbers: Numbers, env: str, value: list[float], results: Sequence[Measured]) -> NumberRow:
    row = NumberRow(numbers.name, env, _published(numbers, value), numbers.mark, numbers.env_steps, "not comparable")
    ours = numbers.env_of(env)
    row = dataclasses.replace(row, our_env=ours)
    if numbers.not_comparable or numbers.metric == "other" or not ours:
        why = numbers.not_comparable or (f"measured otherwise: {numbers.measured}" if ours else "no environment of ours")
        return dataclasses.replace(row, why=why)
    if not numbers.run:
        return dataclasses.replace(row, verdict="not run", why="no run in these settings yet")
    runs = [each for each in results if (each.run, each.algorithm, each.env) == (numbers.run, numbers.algorithm, ours)]
    if not runs:
        return dataclasses.replace(row, verdict="not run")
    try:
        scores = runs[0].scores(numbers.metric, numbers.env_steps or None)
    except RequestError as error:
        return dataclasses.replace(row, why=str(error))
    mean, error, df = centre(scores, numbers.statistic)
    _, low, high = difference_interval(mean, error, df, 0.0, math.inf)
    row = dataclasses.replace(row, ours=mean, low=low, high=high, seeds=len(scores))
    if len(scores) < 2:
        return dataclasses.replace(row, why="one seed of ours has no interval")
    difference = difference_interval(mean - value[0], error, df, *_published_error(numbers, value))
    verdict = "inside" if difference[1] <= 0 <= difference[2] else "above" if difference[0] > 0 else "below"
    return dataclasses.replace(
        row,
        verdict=verdict,
        why=numbers.remark,
        difference=difference[0],
        difference_low=difference[1],
        difference_high=difference[2],
    )


def _published_error(numbers: Numbers, value: list[float]) -> tuple[float, float]:
    """Standard error of a published mean and its degrees of freedom; 0 where nothing is known of it."""
    if len(value) == 1 or numbers.spread == "none":
        return 0.0, math.inf
    spread = value[1] if len(value) == 2 else (value[2] - value[1]) / 2
    df = numbers.seeds - 1 if numbers.seeds > 1 else math.inf
    if numbers.spread == "ci95":
        # Whatever made the interval, it is about so many standard errors wide.
        return spread / float(stats.norm.ppf((1 + LEVEL) / 2)), math.inf
    if numbers.spread == "sem":
        return spread, df
    return (spread / math.sqrt(numbers.seeds), df) if numbers.seeds > 1 else (0.0, math.inf)


def _claim_rows(claim: Claim, results: Sequence[Measured]) -> list[ClaimRow]:
    row = ClaimRow(claim.name, "", "not tested", claim.text, note=claim.mark_note)
    if not claim.tests:
        return [row]
    rows = [found for test in claim.tests for found in _test_rows(row, test, results)]
    return rows or [dataclasses.replace(row, verdict="not run")]


def _test_rows(row: ClaimRow, test: ClaimTest, results: Sequence[Measured]) -> list[ClaimRow]:
    what = f"{test.metric} against {test.right_metric}" if test.right_metric else test.metric
    row = dataclasses.replace(row, test=f"{test.left} {_SIGNS[test.expect]} {test.right}, {what}")
    left = {env: ours for env, ours in _by_env(test.left, results).items() if test.env in ("", env)}
    right = _by_env(test.right, results) if isinstance(test.right, str) else None
    rows = []
    for env, ours in left.items():
        if right is not None and env not in right:
            continue
        here = dataclasses.replace(row, env=env)
        try:
            x = ours.scores(test.metric, held=True)
            y = right[env].scores(test.right_metric or test.metric, held=True) if right is not None else None
        except RequestError as error:
            rows.append(dataclasses.replace(here, why=str(error)))
            continue
        error, df = _error(x)
        other = _error(y) if y is not None else (0.0, math.inf)
        reference = float(np.mean(y)) if y is not None else float(test.right)
        interval = difference_interval(float(np.mean(x)) - reference, error, df, *other)
        frozen = [(test.left, ours)] + ([(str(test.right), right[env])] if right is not None else [])
        here = dataclasses.replace(
            here,
            why="; ".join(
                f"{len(each.result.frozen)} of {len(each.result.seeds)} seeds of {name} went non-finite"
                for name, each in frozen
                if each.result.frozen
            ),
            left=float(np.mean(x)),
            right=reference,
            seeds=len(x),
            difference=interval[0],
            difference_low=interval[1],
            difference_high=interval[2],
        )
        if len(x) < 2 or (y is not None and len(y) < 2):
            rows.append(dataclasses.replace(here, verdict="undecided", why="one seed of ours has no interval"))
            continue
        sides = (interval[1] > 0, interval[2] < 0)
        holds, against = sides if test.expect == "greater" else sides[::-1]
        rows.append(dataclasses.replace(here, verdict="holds" if holds else "contradicted" if against else "undecided"))
    return rows


def _error(scores: np.ndarray) -> tuple[float, float]:
    if len(scores) < 2:
        return math.inf, 1
    return float(np.std(scores, ddof=1) / math.sqrt(len(scores))), len(scores) - 1


def _by_env(which: str, results: Sequence[Measured]) -> dict[str, Measured]:
    run, _, algorithm = which.partition(":")
    return {each.env: each for each in results if each.run == run and algorithm in ("", each.algorithm)}


# --- as text


def summary(numbers: Sequence[NumberRow], claims: Sequence[ClaimRow]) -> str:
    """What is comparable, row by row, and how many numbers and claims have which verdict."""
    shown = [row for row in numbers if not math.isnan(row.ours)]
    parts = []
    if shown:
        header = ("published by", "environment", "published", "ours", "95 % interval", "seeds", "difference", "verdict")
        cells = [(row.numbers, row.env, row.published, *_ours(row), _signed(row.difference), _verdict(row)) for row in shown]
        parts.append(text_table(header, cells, align="<<>>>>><"))
    tested = [row for row in claims if row.env]
    if tested:
        header = ("claim", "tested by", "environment", "left", "right", "difference", "95 % interval", "verdict")
        cells = [
            (
                row.claim,
                row.test,
                row.env,
                _short(row.left),
                _short(row.right),
                _signed(row.difference),
                _interval(row),
                row.verdict,
            )
            for row in tested
        ]
        parts.append(text_table(header, cells, align="<<<>>>><"))
    parts.append(f"{len(numbers)} published numbers: {count(numbers, NUMBER_VERDICTS)}")
    if claims:
        parts.append(f"{len(claims)} tests of claims: {count(claims, CLAIM_VERDICTS)}")
    return "\n\n".join(parts)


def count(rows: Sequence[NumberRow] | Sequence[ClaimRow], verdicts: Sequence[str]) -> str:
    """Verdicts and how often each was given."""
    counts = Counter(row.verdict for row in rows)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in verdicts if counts[verdict]) or "none"


def number_table(rows: Sequence[NumberRow]) -> str:
    """Rows as a Markdown table."""
    header = (
        "published by",
        "environment",
        "env steps",
        "published",
        "ours",
        "95 % interval",
        "seeds",
        "difference",
        "verdict",
    )
    cells = []
    for row in rows:
        steps = f"{row.env_steps:,}" if row.env_steps else ""
        cells.append((row.numbers, row.env, steps, row.published, *_ours(row), _difference(row), _verdict(row)))
    return markdown_table(header, cells)


def claim_table(rows: Sequence[ClaimRow]) -> str:
    """Rows as a Markdown table; what is to be known of a claim stands in its first row."""
    header = ("claim", "tested by", "environment", "left", "right", "difference", "seeds", "verdict")
    cells, seen = [], set()
    for row in rows:
        numbers = (_short(row.left), _short(row.right), _difference(row), f"{row.seeds or ''}")
        verdict = f"{row.verdict}: {row.why}" if row.why and row.env else row.verdict
        told = f"{row.text} ({row.note})" if row.note and row.claim not in seen else row.text
        seen.add(row.claim)
        cells.append((told, row.test, row.env, *numbers, verdict))
    return markdown_table(header, cells)


def to_markdown(paper: Paper, scale: str, numbers: Sequence[NumberRow], claims: Sequence[ClaimRow]) -> str:
    """All rows of a paper, as a file of its own."""
    parts = [
        f"# {paper.title}, scale {scale}",
        paper.source,
        f"{len(numbers)} published numbers: {count(numbers, NUMBER_VERDICTS)}.",
    ]
    parts += [number_table(numbers)] if numbers else []
    parts += [f"{len(claims)} tests of claims: {count(claims, CLAIM_VERDICTS)}.", claim_table(claims)] if claims else []
    return "\n\n".join(parts) + "\n"


def to_csv(rows: Sequence[NumberRow] | Sequence[ClaimRow]) -> str:
    """Every field of every row."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(rows[0])])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)
    return text.getvalue()


def _published(numbers: Numbers, value: list[float]) -> str:
    if len(value) == 1:
        return _short(value[0])
    if len(value) == 3:
        return f"{_short(value[0])} [{_short(value[1])}, {_short(value[2])}]"
    return f"{_short(value[0])} ± {_short(value[1])}"


def _ours(row: NumberRow) -> tuple[str, str, str]:
    if math.isnan(row.ours):
        return "", "", ""
    return _short(row.ours), f"[{_short(row.low)}, {_short(row.high)}]", f"{row.seeds}"


def _difference(row: NumberRow | ClaimRow) -> str:
    return "" if math.isnan(row.difference) else f"{_signed(row.difference)} {_interval(row)}"


def _interval(row: NumberRow | ClaimRow) -> str:
    return f"[{_signed(row.difference_low)}, {_signed(row.difference_high)}]"


def _verdict(row: NumberRow) -> str:
    return f"{row.verdict}: {row.why}" if row.why and row.verdict in ("not comparable", "not run") else row.verdict


def _signed(value: float) -> str:
    return "" if math.isnan(value) else f"{'+' if value > 0 else ''}{_short(value)}"


def _short(value: float) -> str:
    """Four digits, and no exponent where there need not be one."""
    if math.isnan(value) or math.isinf(value):
        return "" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    digits = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{min(digits, 6)}f}".rstrip("0").rstrip(".") if digits else f"{value:.0f}"
