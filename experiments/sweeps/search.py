"""Hyperparameter search in a sweep file: Optuna proposes a population at a time, and each generation trains as one program.

    [search]
    trials = 64                    # of each algorithm on each environment
    population = 16                # trials that are proposed, trained and judged together
    sampler = "tpe"                # or random
    metric = "final"               # return of the mode policy at the last evaluation; "area": mean over all evaluations
    rungs = 1                      # successive halving: this many budgets, each eta times the one before,
    eta = 3                        # and after each only one in eta goes on
    seed = 0
    storage = "sqlite:///..."      # any of Optuna's database URLs; search.db in the sweep's folder if not given

    [search.space]
    learning_rate = { low = 1e-5, high = 1e-2, log = true }
    num_minibatches = [2, 4, 8]    # a field of Setup is a program of its own for each value

A trial's runs are cells of the sweep, so a search that was killed proposes, trains and judges what it would have without the
kill.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pgjax.errors import RequestError, close_names
from pgjax.experiments.compare import text_table
from pgjax.experiments.objective_file import load_objective
from pgjax.experiments.results import Result, command_of
from pgjax.experiments.shared_settings import show
from pgjax.experiments.sweeps.folder import Cell, SweepFolder, cell_of, write_whole
from pgjax.experiments.sweeps.sweep_file import Sweep, read_range, with_values
from pgjax.host.runner import RunSpec

_LEAST = {"trials": 1, "population": 1, "rungs": 1, "eta": 2, "seed": 0}
_DEFAULTS = {"trials": 64, "population": 16, "rungs": 1, "eta": 3, "seed": 0}
_DEFAULTS |= {"sampler": "tpe", "metric": "final", "storage": ""}
_SAMPLERS, _METRICS = ("tpe", "random"), ("final", "area")


@dataclasses.dataclass(frozen=True)
class Search:
    """The ``[search]`` table, checked; fields as in the file. space: field -> range, as the file has it."""

    trials: int
    population: int
    sampler: str
    metric: str
    rungs: int
    eta: int
    seed: int
    storage: str
    space: dict[str, Any]


def read_search(table: dict[str, Any]) -> Search:
    """Raises: RequestError for an unknown field or an impossible value."""
    for name in table:
        if name not in (*_DEFAULTS, "space"):
            raise RequestError(f"search.{name} is unknown; {close_names(name, (*_DEFAULTS, 'space'))}")
    values = {**_DEFAULTS, **table}
    for name, least in _LEAST.items():
        if type(values[name]) is not int or values[name] < least:
            raise RequestError(f"search.{name} = {values[name]!r} must be a whole number, at least {least}")
    for name, known in (("sampler", _SAMPLERS), ("metric", _METRICS)):
        if values[name] not in known:
            raise RequestError(f"search.{name} = {values[name]!r} is unknown; known: {', '.join(known)}")
    space = values.get("space")
    if not isinstance(space, dict) or not space:
        raise RequestError("[search.space] is missing; give each field to search {low = ..., high = ...} or a list of values")
    for name, choices in space.items():
        read_range(f"search.space.{name}", choices)
    return Search(**{**values, "space": space})


def run_search(sweep: Sweep, folder: SweepFolder, options, *, command: str, say: Callable[[str], None] = print) -> bool:
    """Goes on with the search of ``sweep`` until every study has its trials. Returns whether it came to its end.

    Raises: RequestError for a wrong request, before anything is written.
    """
    from pgjax.experiments.sweeps import driver

    search = read_search(_table(sweep))
    for spec in sweep.specs:
        _check_space(spec, search)
    _optuna()
    driver.check_specs(sweep.specs)
    with folder.owned(), driver.interruptible():
        folder.record_start(sweep.path, sweep.text, command)
        try:
            with driver.make_engine(sweep, folder, options, say) as engine:

                def train(cells: Sequence[Cell]) -> None:
                    driver.run_cells(engine, folder, cells, options, driver.devices_each(sweep, options), say)

                for name, specs in _studies(sweep).items():
                    _run_study(name, specs, search, folder, train, say)
        except KeyboardInterrupt:
            say(f"interrupted; continue with: {command}")
            return False
        say(_best_table(sweep, search, folder))
        _write_best(sweep, search, folder)
    return True


def search_status(sweep: Sweep, folder: SweepFolder) -> str:
    """How far each study is, and the best of it so far."""
    return _best_table(sweep, read_search(_table(sweep)), folder)


def budgets(search: Search, total: int) -> list[int]:
    """Environment steps of each rung, ascending; the last is the whole budget."""
    return [max(1, math.ceil(total / search.eta ** (search.rungs - 1 - rung))) for rung in range(search.rungs)]


def rung_spec(spec: RunSpec, budget: int) -> RunSpec:
    """``spec`` stopped at ``budget``, with the schedules of the whole run, so that it is the beginning of it."""
    if budget >= spec.total_env_steps:
        return spec
    cost = spec.build(load_objective(spec.objective)).env_steps_per_iteration
    horizon = float(math.ceil(spec.total_env_steps / cost) * cost)
    evals = max(1, round(spec.num_evals * budget / spec.total_env_steps))
    configs = ({"anneal_env_steps": horizon, **spec.configs[0]},)
    return dataclasses.replace(spec, total_env_steps=budget, configs=configs, num_evals=evals)


# --- one study: an algorithm on an environment


def _run_study(name: str, specs: Sequence[RunSpec], search: Search, folder: SweepFolder, train, say) -> None:
    study = _study(name, search, folder)
    for start in range(0, search.trials, search.population):
        stop = min(start + search.population, search.trials)
        for number in range(len(study.get_trials(deepcopy=False)), stop):
            # A sampler of its own for every trial: what it proposes depends on the trials before, and on nothing else.
            study.sampler = _sampler(search, number)
            study.ask(_distributions(search))
        generation = study.get_trials(deepcopy=False)[start:stop]
        if not all(trial.state.is_finished() for trial in generation):
            say(f"{name}: trials {start} to {stop - 1} of {search.trials}")
            _judge(study, generation, specs, search, folder, train)


def _judge(study, generation, specs: Sequence[RunSpec], search: Search, folder: SweepFolder, train) -> None:
    """Trains a generation rung by rung and tells the study what became of every trial.

    After a kill the whole generation is judged again, from cells that are there: a rung ranks all who reached it.
    """
    optuna = _optuna()
    states = optuna.trial.TrialState

    def tell(trial, value=None, state=None):
        if not trial.state.is_finished():
            study.tell(trial.number, value, state=state)

    alive = list(generation)
    for rung, budget in enumerate(budgets(search, specs[0].total_env_steps)):
        cells = {trial.number: _cells_of(trial, specs, search, budget) for trial in alive}
        distinct = {cell.name: cell for several in cells.values() for cell in several}
        train(list(distinct.values()))
        values = {}
        for trial in alive:
            value, why = _value([_result_of(folder, cell) for cell in cells[trial.number]], search.metric)
            if value is not None:
                values[trial.number] = value
            if trial.state.is_finished():
                continue
            asked = optuna.trial.Trial(study, trial._trial_id)
            if value is None:
                asked.set_user_attr("failed", why)
                tell(trial, state=states.FAIL)
            elif budget not in trial.intermediate_values:
                asked.report(value, budget)
        ranked = sorted((trial for trial in alive if trial.number in values), key=lambda trial: -values[trial.number])
        if rung == search.rungs - 1:
            for trial in ranked:
                tell(trial, values[trial.number])
            return
        alive = ranked[: math.ceil(len(ranked) / search.eta)]
        for trial in ranked[len(alive) :]:
            tell(trial, state=states.PRUNED)


def _cells_of(trial, specs: Sequence[RunSpec], search: Search, budget: int) -> list[Cell]:
    values = {name: json.loads(value) if isinstance(value, str) else value for name, value in trial.params.items()}
    return [cell_of(rung_spec(with_values(spec, values, "search.space"), budget)) for spec in specs]


def _result_of(folder: SweepFolder, cell: Cell) -> Result | None:
    try:
        return folder.result(cell.name)
    except RequestError:
        return None


def _value(results: Sequence[Result | None], metric: str) -> tuple[float | None, str]:
    """What a trial is judged by: the mean over all its seeds. A trial with a seed that went non-finite has failed."""
    found = [result for result in results if result is not None and "mode" in result.returns]
    if len(found) < len(results):
        return None, "a run of it failed or was not evaluated"
    if frozen := [seed for result in found for seed in result.frozen]:
        return None, f"seeds {', '.join(map(str, frozen))} went non-finite"
    returns = np.concatenate([result.returns["mode"] for result in found])
    return float(np.mean(returns[:, -1] if metric == "final" else returns)), ""


# --- Optuna


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise RequestError("[search] needs optuna: pip install 'pgjax[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _study(name: str, search: Search, folder: SweepFolder):
    optuna = _optuna()
    url = search.storage or f"sqlite:///{folder.path.absolute() / 'search.db'}"
    try:
        return optuna.create_study(study_name=name, storage=url, direction="maximize", load_if_exists=True)
    except Exception as error:  # each database has errors of its own
        raise RequestError(f"search.storage = {url!r} cannot be used: {str(error).splitlines()[0][:200]}") from None


def _sampler(search: Search, number: int):
    samplers = _optuna().samplers
    seed = int(np.random.SeedSequence([search.seed, number]).generate_state(1)[0])
    if search.sampler == "random":
        return samplers.RandomSampler(seed=seed)
    # Trials of the same generation know of one another through the liar.
    return samplers.TPESampler(seed=seed, n_startup_trials=min(10, search.population), constant_liar=True)


def _distributions(search: Search) -> dict[str, Any]:
    distributions = _optuna().distributions
    space = {}
    for name, choices in search.space.items():
        kind, *limits = read_range(f"search.space.{name}", choices)
        if kind == "choice":
            # Lists are no choices to Optuna; their text is.
            plain = [json.dumps(value) if isinstance(value, (list, str)) else value for value in limits[0]]
            space[name] = distributions.CategoricalDistribution(plain)
        elif kind == "int":
            space[name] = distributions.IntDistribution(*limits)
        else:
            space[name] = distributions.FloatDistribution(*limits, log=kind == "log")
    return space


# --- what is asked for, and what came of it


def _table(sweep: Sweep) -> dict[str, Any]:
    return sweep.search or {}


def _studies(sweep: Sweep) -> dict[str, list[RunSpec]]:
    """Runs of each study, one a block of seeds."""
    studies: dict[str, list[RunSpec]] = {}
    for spec in sweep.specs:
        studies.setdefault(f"{spec.algorithm} on {spec.env}", []).append(spec)
    return studies


def _check_space(spec: RunSpec, search: Search) -> None:
    for name, choices in search.space.items():
        kind, *limits = read_range(f"search.space.{name}", choices)
        for value in limits[0] if kind == "choice" else limits:
            with_values(spec, {name: value}, "search.space")


def _best_table(sweep: Sweep, search: Search, folder: SweepFolder) -> str:
    rows, commands = [], []
    states = ("COMPLETE", "PRUNED", "FAIL", "RUNNING")
    for name, specs in _studies(sweep).items():
        trials = _trials(name, search, folder)
        counts = [sum(trial.state.name == state for trial in trials) for state in states]
        best = max((trial for trial in trials if trial.state.name == "COMPLETE"), key=lambda trial: trial.value, default=None)
        params = best.params if best else {}
        shown = ", ".join(f"{field} {show(value)}" for field, value in params.items())
        rows.append((name, *(f"{count or ''}" for count in counts), f"{best.value:.4g}" if best else "", shown))
        if best:
            commands.append(_command(best, specs, search))
    header = ("study", "complete", "pruned", "failed", "running", "best", "with")
    lines = [text_table(header, rows, align="<>>>>><")]
    if commands:
        lines += ["the best of many looks better than it is; to judge it by seeds that it was not chosen on:", *commands]
    return "\n".join(lines)


def _trials(name: str, search: Search, folder: SweepFolder) -> list[Any]:
    if not search.storage and not (folder.path / "search.db").exists():
        return []
    return _study(name, search, folder).get_trials(deepcopy=False)


def _command(best, specs: Sequence[RunSpec], search: Search) -> str:
    spec = _cells_of(best, specs[:1], search, specs[0].total_env_steps)[0].spec
    used = [seed for each in specs for seed in each.seeds]
    fresh = dataclasses.replace(spec, seeds=tuple(range(max(used) + 1, max(used) + 1 + len(used))))
    return "  " + command_of(fresh.config())


def _write_best(sweep: Sweep, search: Search, folder: SweepFolder) -> None:
    """``best.json``: by study the best trial's value and fields, and how many trials there were."""
    best = {}
    for name in _studies(sweep):
        trials = _trials(name, search, folder)
        complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
        if complete:
            top = max(complete, key=lambda trial: trial.value)
            best[name] = {"trial": top.number, "value": top.value, "params": top.params, "trials": len(trials)}
    write_whole(folder.path / "best.json", json.dumps(best, indent=1) + "\n")
