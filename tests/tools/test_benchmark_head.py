"""The benchmark of the output head: tables and JSON from tiny runs, its references and its way to weigh memory.

Times of tiny sizes mean nothing and are not looked at; what is computed from them is, from known ones.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tools import benchmark_head
from tools.head_benchmark import memory, problem, report
from tools.head_benchmark.contestants import CONTESTANTS, Contestant, Materialised
from tools.head_benchmark.measure import MODES, Result, Settings, measure_case, peak_memory
from tools.head_benchmark.problem import Case, Problem, make_problem

CPU = torch.device("cpu")
CASE = Case(tokens=10, hidden=64, vocab=24)
QUICK = Settings(repeats=1, threads=1, memory=False)
MIB = 2**20
needs_proc = pytest.mark.skipif(not memory.STATUS.exists(), reason="needs Linux's /proc")


def run_tool(folder: Path, *flags: str) -> tuple[dict[str, Any], str]:
    """The JSON document and the Markdown text of a run with these flags."""
    files = ["--json", str(folder / "head.json"), "--markdown", str(folder / "head.md")]
    assert benchmark_head.main(["--device", "cpu", "--threads", "1", "--repeats", "2", *flags, *files]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["head.json", "head.md"]  # nothing temporary is left
    return json.loads((folder / "head.json").read_text()), (folder / "head.md").read_text()


def tables(text: str) -> list[dict[str, dict[str, str]]]:
    """Return each Markdown table: contestant -> column -> cell."""
    found: list[dict[str, dict[str, str]]] = []
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    for cells in lines:
        if cells[0] == "contestant":
            names = cells
            found.append({})
        elif not cells[0].startswith("--"):
            found[-1][cells[0]] = dict(zip(names, cells, strict=True))
    return found


def results_of(*contestants: Contestant, case: Case = CASE) -> dict[tuple[str, str], Result]:
    results = measure_case(case, contestants, MODES, QUICK)
    return {(result.contestant, result.mode): result for result in results}


def test_grid_run_writes_the_same_figures_to_json_and_markdown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["ours", "materialised", "products", "torch-chunked", "liger"]
    sizes = ["--tokens", "6", "10", "--hidden", "64", "--vocab", "24"]
    document, text = run_tool(tmp_path, *sizes, "--no-memory", "--contestants", *names)
    assert [case["tokens"] for case in document["cases"]] == [6, 10]
    assert document["versions"]["torch"] == torch.__version__ and document["hardware"] and document["commit"]
    assert document["command"].startswith("python tools/benchmark_head.py --device cpu")

    written = tables(text)
    assert len(written) == 4
    for number, table in enumerate(written):
        case, mode = document["cases"][number // 2], MODES[number % 2]
        records = {record["contestant"]: record for record in case["results"] if record["mode"] == mode}
        assert list(records) == list(table) == names
        for name in ("ours", "materialised", "products", "torch-chunked"):
            record, row = records[name], table[name]
            assert len(record["seconds"]) == 2 and min(record["seconds"]) > 0.0
            assert float(row["median ms"].replace(",", "")) == pytest.approx(sum(record["seconds"]) * 500, abs=0.051)
            assert row["x products"] == f"{record['time_over_products']:.3f}"
        for name in ("ours", "materialised", "torch-chunked"):
            kinds = ("logprob_error_max",) if mode == "forward" else ("hidden_gradient_error", "weight_gradient_error")
            assert all(0.0 < records[name][kind] < 1e-5 for kind in kinds), records[name]
        assert table["liger"]["remark"] in ("not installed", "not run: needs CUDA")
        assert table["liger"]["median ms"] == report.NOT_MEASURED
    assert capsys.readouterr().out.count("| contestant ") == 4


def test_ratios_from_known_times() -> None:
    results = [
        Result("ours", "forward", seconds=[3.0, 9.0, 4.0], peak_extra_bytes=10),
        Result("materialised", "forward", seconds=[5.0, 4.0], peak_extra_bytes=200),
        Result("products", "forward", seconds=[2.0]),
        Result("ours", "training", seconds=[1.0]),
        Result("materialised", "training", "out of memory", seconds=[1.0]),
    ]
    ours, plain, floor, training, failed = report.with_ratios(results)
    assert (ours["median_seconds"], ours["min_seconds"]) == (4.0, 3.0)
    assert ours["time_over_materialised"] == 4.0 / 4.5 and ours["time_over_products"] == 2.0
    assert ours["peak_over_materialised"] == 0.05
    assert plain["time_over_materialised"] == 1.0 and floor["peak_over_materialised"] is None
    assert training["time_over_materialised"] is None and training["time_over_products"] is None
    assert failed["median_seconds"] is failed["min_seconds"] is None


class Shifted(Materialised):
    """Wrong on purpose: log-probabilities 0.1 too high, gradients a tenth too large."""

    name = "shifted"

    def forward(self, problem: Problem) -> Tensor:
        return super().forward(problem) + 0.1

    def training(self, problem: Problem) -> None:
        super().training(problem)
        for tensor in (problem.hidden, problem.weight):
            assert tensor.grad is not None
            tensor.grad *= 1.1


class Missing(Materialised):
    name = "missing"
    module = "no_such_package"


class Failing(Materialised):
    name = "failing"
    module = "json"  # any package that is there

    def forward(self, problem: Problem) -> Tensor:
        raise RuntimeError("boom\nand more")


class Exhausting(Materialised):
    name = "exhausting"

    def forward(self, problem: Problem) -> Tensor:
        return torch.empty(2**60)


def test_errors_of_a_wrong_contestant_show() -> None:
    results = results_of(CONTESTANTS["ours"], Shifted())
    # A shifted log-probability also bends the gap and the importance weight, hence more than a tenth.
    assert results["shifted", "forward"].logprob_error_max == pytest.approx(0.1, rel=1e-3)
    assert results["shifted", "forward"].logprob_error_mean == pytest.approx(0.1, rel=1e-3)
    for error in ("hidden_gradient_error", "weight_gradient_error"):
        assert getattr(results["shifted", "training"], error) > 0.05
        assert getattr(results["ours", "training"], error) < 1e-5


def test_contestants_that_cannot_run_are_marked_and_the_others_measured() -> None:
    results = results_of(Missing(), Failing(), Exhausting(), CONTESTANTS["ours"])
    assert results["missing", "forward"].status == results["missing", "training"].status == "not installed"
    assert results["failing", "forward"].status == "failed: RuntimeError: boom"
    assert results["exhausting", "forward"].status == "out of memory"
    assert len(results["ours", "forward"].seconds) == len(results["ours", "training"].seconds) == 1
    tempered = Case(tokens=10, hidden=64, vocab=24, temperature=2.0, tp=2)
    assert CONTESTANTS["torch-chunked"].obstacle(tempered, CPU) == "not run: no tensor parallelism"
    assert CONTESTANTS["materialised"].obstacle(tempered, CPU) == "not run: no tensor parallelism"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_reference_is_the_formula_in_float64(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem, "REFERENCE_BLOCK", 64 * 5)  # 5 vocabulary rows a block, the last one shorter
    given = make_problem(Case(tokens=10, hidden=64, vocab=24, temperature=temperature), CPU, None)
    hidden, weight = (tensor.double().requires_grad_() for tensor in (given.hidden, given.weight))
    logprob = torch.log_softmax(hidden @ weight.T / temperature, -1)[torch.arange(10), given.targets]
    torch.testing.assert_close(given.exact_logprobs, logprob.detach(), rtol=1e-12, atol=1e-12)
    assert logprob[1::4].exp().min() > 0.9 and logprob[3::4].max() < -5.0  # both kinds of peaks

    constant = logprob.detach()
    ratio = torch.exp(constant - given.rollout_logprobs)
    assert ((ratio > 0.5) & (ratio < 5.0)).all()
    strength = given.coefficients * ratio * (given.teacher_logprobs - constant)
    torch.testing.assert_close(problem.reference_strength(given), strength)
    (-(strength * logprob).sum()).backward()
    tokens, rows = torch.tensor([0, 1, 3, 9]), torch.cat([given.targets[:2], torch.tensor([23])]).unique()
    found = problem.reference_gradients(given, strength, tokens, rows)
    assert hidden.grad is not None and weight.grad is not None
    torch.testing.assert_close(found, (hidden.grad[tokens], weight.grad[rows]), rtol=1e-9, atol=1e-9)


def test_two_processes_share_the_vocabulary(tmp_path: Path) -> None:
    sizes = ["--tokens", "10", "--hidden", "64", "--vocab", "24", "--tp", "2", "--mode", "training"]
    document, text = run_tool(tmp_path, *sizes, "--contestants", "ours", "products", "materialised")
    ours, products, plain = document["cases"][0]["results"]
    assert max(ours["hidden_gradient_error"], ours["weight_gradient_error"]) < 1e-5
    assert len(ours["seconds"]) == len(products["seconds"]) == 2
    assert (ours["peak_extra_bytes"] is None) == (not memory.STATUS.exists())
    assert plain["status"] == tables(text)[0]["materialised"]["remark"] == "not run: no tensor parallelism"
    assert "tp 2" in text


@needs_proc
@pytest.mark.parametrize("resets", [True, False])
def test_peak_growth_is_what_a_call_needs_at_worst(resets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not resets:  # where the system forbids it, a thread samples
        monkeypatch.setattr(memory, "_reset_peak", lambda: False)

    def call() -> Tensor:
        torch.ones(40 * MIB // 4)
        kept = torch.ones(64 * MIB // 4)
        torch.ones(32 * MIB // 4).add_(1.0)
        return kept

    for _ in range(2):  # the second call does not live on what the first one left
        assert memory.peak_growth(call, CPU) == pytest.approx(96 * MIB, rel=0.04)


class Scripted(Contestant):
    """Allocates by script: ``before`` MiB, freed again; then the weight's gradient; then ``after`` MiB."""

    name = "scripted"
    note = ""

    def __init__(self, before: int, after: int) -> None:
        self.before, self.after = before, after

    def training(self, problem: Problem) -> None:
        torch.ones(self.before * MIB // 4)
        if problem.weight.requires_grad:
            problem.weight.grad = torch.ones_like(problem.weight)
        torch.ones(self.after * MIB // 4)


@needs_proc
@pytest.mark.parametrize(("before", "after", "extra"), [(96, 40, 96), (40, 80, 80), (40, 0, 40)])
def test_gradient_of_the_weight_is_nobodys_cost(before: int, after: int, extra: int) -> None:
    """Whether the peak comes before the gradient exists or after it: 64 MiB of gradient are never counted."""
    given = make_problem(Case(tokens=4, hidden=1024, vocab=16384), CPU, None)
    assert peak_memory(Scripted(before, after), given, "training") == pytest.approx(extra * MIB, rel=0.04)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tp", "5"], ["--tp is 5", "divide --vocab, 151936"]),
        (["--contestants", "ours", "theirs"], ["'theirs'", "materialised"]),
        (["--tokens", "8", "0"], ["--tokens is 0", "at least 1"]),
        (["--hidden", "-3"], ["--hidden is -3"]),
        (["--repeats", "0"], ["--repeats is 0"]),
        (["--threads", "0"], ["--threads is 0"]),
        (["--temperature", "nan"], ["--temperature is nan", "positive"]),
        (["--json", "no/such/folder/a.json"], ["--json", "no/such/folder does not exist"]),
        (["--tp", str(2**20), "--vocab", str(2**20), "--device", "cuda"], ["--device cuda", "CUDA devices"]),
    ],
)
def test_bad_flags_end_with_one_line(flags: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark_head.main(flags) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert all(word in output.err for word in words), output.err


def test_cuda_asked_for_without_cuda(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for flags in (["--device", "cuda"], ["--preset", "gpu"]):
        assert benchmark_head.main(flags) == 2
        assert "0 CUDA devices" in capsys.readouterr().err


def test_presets() -> None:
    args = benchmark_head.parse_arguments(["--device", "cpu"])
    assert (args.tokens, args.hidden, args.vocab, args.dtype, args.threads) == ([1024], [1024], 151936, "float32", 2)
    gpu = benchmark_head.PRESETS["gpu"]
    assert (gpu["tokens"], gpu["hidden"], gpu["dtype"]) == ([8192, 32768], [2560, 4096, 5120], "bfloat16")
    assert math.prod(len(gpu[name]) for name in ("tokens", "hidden")) == 6
