"""Run the toy-scale replication and write its tables and figures.

    python examples/toy_replication/replicate.py [--quick] [--jobs N] [--output DIR]      (make replicate [QUICK=1])

1. Write the world's prompts, and convert both models to Megatron checkpoints.
2. Choose the learning rate of each method family, on validation prompts and with seeds of its own. If the best rate is
   the lowest or highest tried, the next one is tried as well.
3. Train every contestant with every seed and score it on the test prompts; then the methods once more, all at one
   learning rate.
4. Write tables and figures from the units that exist.

A unit is one run, (contestant, learning rate, seed), in a folder below ``output/units`` that is kept. Running the
command again makes only the missing units. Units of other settings (see ``settings.json`` there) are refused, not mixed
in. ``--tables`` does step 4 alone, also from the committed ``results/results.json``.
"""

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT), str(ROOT / "examples" / "tiny_cpu")]

import contestants  # noqa: E402
import replication_world  # noqa: E402
from tqdm import tqdm  # noqa: E402

from megatron_camopd.errors import ConfigurationError  # noqa: E402

UNIT_SECONDS = 20 * 60  # time limit of a unit
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false",
               "PYTHONPATH": os.pathsep.join(sys.path[:3])}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Unit:
    """One run; ``contestant`` is a key of ``contestants.BY_KEY``, or of ``REFERENCES``, which are not trained."""

    contestant: str
    learning_rate: float
    seed: int
    split: str

    @property
    def name(self) -> str:
        """Name of the unit's folder."""
        return f"{self.contestant}-lr{self.learning_rate:g}-seed{self.seed}-{self.split}"


class Replication:
    """The inputs and units below the folder ``output``, made with ``budget``, ``jobs`` units at a time."""

    def __init__(self, output: Path, budget: contestants.Budget, jobs: int) -> None:
        self.output, self.budget, self.jobs = output, budget, jobs
        self.inputs, self.units = output / "inputs", output / "units"

    def prepare(self) -> None:
        """Write the prompts, and convert the models to Megatron checkpoints, unless that is done already.

        Raises:
            ConfigurationError: The folder has units that were made with other settings.
        """
        flags = {
            key: contestants.run_flags(one, self.budget, learning_rate=0, seed=0, inputs=Path("in"), save=Path("run"))
            for key, one in contestants.BY_KEY.items()
        }
        settings = json.dumps({"inputs": _fingerprint(), "flags": flags}, indent=1)
        file = self.output / "settings.json"
        if file.exists() and file.read_text(encoding="utf-8") != settings:
            raise ConfigurationError(
                f"--output {self.output}: its units were made with other settings (settings.json); give another folder "
                "or remove that one"
            )
        self.units.mkdir(parents=True, exist_ok=True)
        file.write_text(settings, encoding="utf-8")
        if not (self.inputs / "prompts").exists():
            replication_world.write_prompts(self.inputs / "prompts.partial")
            (self.inputs / "prompts.partial").rename(self.inputs / "prompts")
        for name in contestants.REFERENCES:
            if not (self.inputs / "megatron" / name).exists():
                command = [sys.executable, ROOT / "checkpoints_convert" / "hf_to_megatron.py",
                           "--hf-path", HERE / "models" / name, "--save", self.inputs / "megatron" / name]  # fmt: skip
                subprocess.run(list(map(str, command)), check=True, env=os.environ | ENVIRONMENT)

    def result(self, unit: Unit) -> dict[str, Any] | None:
        """Return the scores and series of a unit, or None if it is not finished."""
        file = self.units / unit.name / "result.json"
        if not file.is_file():
            return None
        return dataclasses.asdict(unit) | json.loads(file.read_text(encoding="utf-8"))

    def run(self, units: list[Unit], title: str) -> list[dict[str, Any]]:
        """Make the units that do not exist yet; return the results of all ``units`` that exist then."""
        missing = [unit for unit in units if self.result(unit) is None] if self.jobs else []
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["replication_unit"])
        running: dict[Unit, tuple[BaseProcess, float]] = {}
        bar = tqdm(total=len(units), initial=len(units) - len(missing), desc=title, unit="run")
        try:
            while missing or running:
                while missing and len(running) < self.jobs:
                    unit = missing.pop(0)
                    running[unit] = (self._start(context, unit), time.monotonic())
                done = [unit for unit, (process, _) in running.items() if process.exitcode is not None]
                for unit in done:
                    process, _ = running.pop(unit)
                    self._finish(unit, process, bar)
                for unit, (process, since) in running.items():
                    if time.monotonic() - since > UNIT_SECONDS:
                        process.kill()
                        raise RuntimeError(f"{unit.name} took longer than {UNIT_SECONDS} s; see {self._log(unit)}")
                time.sleep(0.1)
        finally:
            for process, _ in running.values():
                process.kill()
            bar.close()
        return [found for unit in units if (found := self.result(unit)) is not None]

    def _log(self, unit: Unit) -> Path:
        """Return the path of a unit's console output."""
        return self.units / unit.name / "unit.log"

    def _start(self, context: Any, unit: Unit) -> BaseProcess:
        """Start a unit in a process of its own."""
        from replication_unit import run_unit  # imported late, because it imports Megatron

        folder = self.units / unit.name
        shutil.rmtree(folder, ignore_errors=True)  # may be left from an interrupted run
        folder.mkdir()
        trained = unit.contestant in contestants.BY_KEY
        contestant = contestants.BY_KEY.get(unit.contestant, contestants.CONTESTANTS[0])
        flags = contestants.run_flags(
            contestant, self.budget, learning_rate=unit.learning_rate, seed=unit.seed, inputs=self.inputs,
            save=folder / "run",
        )  # fmt: skip
        if not trained:
            flags += ["--load", str(self.inputs / "megatron" / unit.contestant)]
        prompts = {side: str(self.inputs / "prompts" / f"{unit.split}_{side}.jsonl") for side in ("general", "domain")}
        process = context.Process(
            target=run_unit,
            args=(flags, prompts, str(folder / "result.json"), str(self._log(unit)), commit()),
            kwargs={"train": trained},
        )
        process.start()
        return process

    def _finish(self, unit: Unit, process: BaseProcess, bar: Any) -> None:
        """Report the scores of a unit whose process has ended, and remove its checkpoints."""
        found = self.result(unit)
        if process.exitcode or found is None:
            raise RuntimeError(f"{unit.name} failed (exit status {process.exitcode}); see {self._log(unit)}")
        for leftover in (self.units / unit.name / "run").glob("iter_*"):
            shutil.rmtree(leftover)  # large, and not needed once the unit is scored
        means = {side: sum(scores.values()) / len(scores) for side, scores in found["scores"].items()}
        bar.update()
        bar.write(
            f"{unit.name}: general {100 * means['general']:.1f}, domain {100 * means['domain']:.1f} "
            f"({found['seconds_training'] + found['seconds_scoring']:.0f} s)"
        )


def mean_scores(results: list[dict[str, Any]]) -> dict[str, dict[float, float]]:
    """Return {method family: {learning rate: mean of general and domain score, over seeds}}."""
    totals: dict[str, dict[float, list[float]]] = {}
    for found in results:
        sides = [sum(scores.values()) / len(scores) for scores in found["scores"].values()]
        family = contestants.BY_KEY[found["contestant"]].family
        totals.setdefault(family, {}).setdefault(found["learning_rate"], []).append(sum(sides) / len(sides))
    return {
        family: {rate: sum(values) / len(values) for rate, values in tried.items()} for family, tried in totals.items()
    }


def best_rate(tried: dict[float, float]) -> float:
    """Return the learning rate with the best score."""
    return max(tried, key=lambda rate: tried[rate])


def next_rate(tried: dict[float, float]) -> float | None:
    """Return the next rate beyond the best one if that is the lowest or highest tried, else None."""
    best, ladder = best_rate(tried), contestants.LEARNING_RATES
    place = ladder.index(best)
    for beyond, edge in ((place - 1, min(tried)), (place + 1, max(tried))):
        if best == edge and 0 <= beyond < len(ladder):
            return ladder[beyond]
    return None


def check_rates(replication: Replication) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Try learning rates; return the results on validation prompts and each method family's best rate."""
    budget = replication.budget
    first: dict[str, str] = {}  # method family -> key of the contestant that tries rates for it
    for key in budget.contestants:
        first.setdefault(contestants.BY_KEY[key].family, key)
    rates = {family: list(budget.first_rates) for family in first}
    found: list[dict[str, Any]] = []
    scores: dict[str, dict[float, float]] = {}
    while budget.rate_seeds:
        units = [
            Unit(first[family], rate, seed, "valid")
            for seed in budget.rate_seeds
            for family, tried in rates.items()
            for rate in tried
        ]
        found = replication.run(units, "learning rates")
        scores = mean_scores(found)
        further = {family: rate for family, tried in scores.items() if (rate := next_rate(tried)) is not None}
        if not further or len(found) < len(units):
            break
        for family, rate in further.items():
            rates[family].append(rate)
    untried = {budget.first_rates[0]: 0.0}
    return found, {family: best_rate(scores.get(family, untried)) for family in first}


def replicate(output: Path, budget: contestants.Budget, jobs: int) -> dict[str, Any]:
    """Do steps 1 to 3; return everything that the tables need, as JSON values."""
    replication, started = Replication(output, budget, jobs), time.monotonic()
    replication.prepare()
    checks, rates = check_rates(replication)
    references = [Unit(name, 1e-4, 1, "test") for name in contestants.REFERENCES]
    runs = [Unit(key, rates[contestants.BY_KEY[key].family], seed, "test") for seed in budget.seeds
            for key in budget.contestants]  # fmt: skip
    results = replication.run(references + runs, "runs")
    compared = [key for key in budget.contestants if {"1", "3"} & set(contestants.BY_KEY[key].tables)]
    common = [Unit(key, budget.common_rate, seed, "test") for seed in budget.seeds for key in compared
              if budget.common_rate is not None and key != contestants.CONTROL]  # fmt: skip
    at_common_rate = replication.run(common, "one learning rate")
    return {
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "commit": commit(),
        "budget": dataclasses.asdict(budget),
        "learning_rates": rates,
        "rate_checks": checks,
        "units": results,
        "units_at_common_rate": at_common_rate,
        "units_planned": len(references) + len(runs),
        "seconds_this_time": round(time.monotonic() - started),
        "jobs": jobs,
    }


def _fingerprint() -> str:
    """Return a SHA-256 of the inputs of all units: the models, and the code that makes the prompts."""
    digest = hashlib.sha256()
    worlds = [HERE / "replication_world.py", HERE.parent / "tiny_cpu" / "world.py"]
    for path in [*sorted(HERE.glob("models/*/model.safetensors")), *worlds]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def commit() -> str:
    """Return the checkout's commit, with ``-dirty`` if files differ from it; empty outside of git."""
    described = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True
    )
    return described.stdout.strip()


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(description="Toy-scale replication of the paper's comparison.")
    parser.add_argument("--quick", action="store_true", help="a few steps of some contestants: shows that it works")
    jobs_help = "units at a time, one core each (0: none, only tables of what exists)"
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help=jobs_help)
    parser.add_argument("--output", type=Path, help="where everything goes (default: output/ or output/quick/ here)")
    parser.add_argument(
        "--tables", type=Path, metavar="RESULTS", help="only write tables and figures of a results.json"
    )
    arguments = parser.parse_args(argv)
    budget = contestants.QUICK if arguments.quick else contestants.FULL
    output = (arguments.output or HERE / "output" / ("quick" if arguments.quick else "full")).resolve()
    os.environ.update(ENVIRONMENT)
    try:
        if arguments.jobs < 0:
            raise ConfigurationError(f"--jobs {arguments.jobs}: must be 0 or more")
        if arguments.tables is not None:
            if not arguments.tables.is_file():
                raise ConfigurationError(f"--tables {arguments.tables}: no such file; give a results.json")
            results = json.loads(arguments.tables.read_text(encoding="utf-8"))
        else:
            results = replicate(output, budget, arguments.jobs)
        from replication_report import write_report

        print(write_report(results, output / "results"))
    except (ConfigurationError, RuntimeError) as error:
        print(f"replicate.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
