"""``--branches FILE``: any number of branches, teachers and prompt files, and every mistake as one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_camopd.schedule import ScoreRule
from tests.support.saved_runs import save_common_state
from tests.support.worlds import World, prepare, refusal

TWO_FLAGS = dict.fromkeys(("general_teacher_load", "general_prompts", "domain_prompts"))


def branches(world: World, **changes: dict[str, Any]) -> dict[str, Any]:
    """A table of three branches with two teachers; ``changes`` by name, None takes a field out."""
    rows: list[dict[str, Any]] = [
        {"name": "math", "prompts": str(world.general), "teacher": str(world.teacher), "steps": 2},
        {"name": "code", "prompts": [str(world.general)], "teacher": str(world.teacher), "mass_target": 0.5},
        {"name": "style", "prompts": str(world.domain), "teacher": "initial", "score": "positive"},
    ]
    for row in rows:
        row.update(changes.get(row["name"], {}))
    return {"branches": [{key: value for key, value in row.items() if value is not None} for row in rows]}


def flags(world: World, folder: Path, content: Any, *, name: str = "branches.json", **changes: Any) -> list[str]:
    text = yaml.safe_dump(content) if name.endswith((".yaml", ".yml")) else json.dumps(content)
    (folder / name).write_text(content if isinstance(content, str) else text)
    return world.flags(save=folder / "run", branches=folder / name, **(TWO_FLAGS | changes))


@pytest.mark.parametrize("name", ["b.json", "b.yaml", "b.yml"])
def test_three_branches_with_two_teachers(world: World, tmp_path: Path, name: str) -> None:
    _, plan = prepare(flags(world, tmp_path, branches(world), name=name))
    assert plan.names == ["math", "code", "style"]
    assert [plan.table.schedule.counts(step, 4) for step in range(5)] == [
        (4, 0, 0), (4, 0, 0), (0, 4, 0), (0, 0, 4), (4, 0, 0),
    ]  # fmt: skip
    assert plan.teacher_of == {0: 0, 1: 0, 2: 1}, "a checkpoint that teaches two branches is held once"
    assert [teacher.location.directory for teacher in plan.teachers] == [world.teacher, world.student]
    rules = [(one.score, one.mass_target, one.feedback_scale) for one in plan.table.branches]
    assert rules == [(ScoreRule.ABSOLUTE, 0.8, 1.0), (ScoreRule.ABSOLUTE, 0.5, 1.0), (ScoreRule.POSITIVE, 0.8, 1.0)]
    assert {place: len(stream) for place, stream in plan.streams.items()} == {0: 20, 1: 20, 2: 20}
    assert plan.streams[0].next(4) != plan.streams[1].next(4), "each branch goes through the file in its own order"


@pytest.mark.parametrize("count", [1, 4])
def test_any_number_of_branches(world: World, tmp_path: Path, count: int) -> None:
    rows = [{"name": f"b{number}", "prompts": str(world.general)} for number in range(count)]
    _, plan = prepare(flags(world, tmp_path, {"branches": rows}))
    assert [plan.table.schedule.counts(step, 8).index(8) for step in range(8)] == [step % count for step in range(8)]
    assert len(plan.teachers) == 1


def test_mixed_methods_take_shares(world: World, tmp_path: Path) -> None:
    rows = branches(world, math={"steps": None, "share": 2}, code={"mass_target": None}, style={"score": None})
    _, plan = prepare(flags(world, tmp_path, rows, distill_method="mopd"))
    assert plan.table.schedule.counts(3, 8) == (4, 2, 2) and plan.table.mixes


def test_paths_are_relative_to_the_file(world: World, tmp_path: Path) -> None:
    shutil.copy(world.general, tmp_path / "own.jsonl")
    rows = {"branches": [{"name": "one", "prompts": "own.jsonl", "teacher": str(world.teacher)}]}
    _, plan = prepare(flags(world, tmp_path, rows))
    assert plan.table.branches[0].prompts == (str(tmp_path / "own.jsonl"),)


def test_rows_of_a_common_file_name_their_branch(world: World, tmp_path: Path) -> None:
    common = tmp_path / "common.jsonl"
    rows = [{"prompt": f"p{row}", "branch": ("math", "code")[row % 3 == 0]} for row in range(9)] + [{"prompt": "both"}]
    common.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = branches(world, math={"prompts": str(common)}, code={"prompts": str(common)})
    _, plan = prepare(flags(world, tmp_path, table))
    assert {place: len(stream) for place, stream in plan.streams.items()} == {0: 7, 1: 4, 2: 20}
    ids = {prompt.id for prompt in plan.streams[1].next(4)}
    assert ids == {"common.jsonl:1", "common.jsonl:4", "common.jsonl:7", "common.jsonl:10"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "x", "branch": "history"},
         "common.jsonl line 21 names the branch 'history'; the file is listed by 'math', 'code'"),
        ({"prompt": "x", "branch": "style"},
         "common.jsonl line 21 names the branch 'style'; the file is listed by 'math', 'code'"),
        ({"prompt": "x", "branch": 3}, 'common.jsonl line 21 has "branch" 3; it must be text'),
    ],
)  # fmt: skip
def test_rows_of_unknown_branches(world: World, tmp_path: Path, row: dict[str, Any], words: str) -> None:
    common = tmp_path / "common.jsonl"
    common.write_text(world.general.read_text() + json.dumps(row) + "\n")
    table = branches(world, math={"prompts": str(common)}, code={"prompts": str(common)})
    line = refusal(flags(world, tmp_path, table))
    assert line.startswith(f"--branches {tmp_path / 'branches.json'}: prompts of branch 'math': ") and line.endswith(
        words
    )


def test_a_branch_without_rows(world: World, tmp_path: Path) -> None:
    common = tmp_path / "common.jsonl"
    common.write_text('{"prompt": "x", "branch": "math"}\n')
    table = branches(world, math={"prompts": str(common)}, code={"prompts": str(common)})
    line = refusal(flags(world, tmp_path, table))
    assert line.endswith("prompts of branch 'code': no row of these files belongs to the branch 'code'")


def test_rows_of_the_two_branches_may_be_named_too(world: World, tmp_path: Path) -> None:
    common = tmp_path / "common.jsonl"
    names = ("general", "domain")
    common.write_text("".join(json.dumps({"prompt": f"p{row}", "branch": names[row % 2]}) + "\n" for row in range(6)))
    both = {"general_prompts": common, "domain_prompts": common}
    _, plan = prepare(world.flags(save=tmp_path / "run", **both))
    assert {place: len(stream) for place, stream in plan.streams.items()} == {0: 3, 1: 3}
    line = refusal(world.flags(save=tmp_path / "run", general_prompts=common))
    assert "names the branch 'domain'; the file is listed by 'general'" in line


WRONG: list[tuple[Any, str]] = [
    ("{", "cannot be read as JSON ("),
    ([], 'must hold {"branches": [...]} with at least one branch, and nothing else'),
    ({"branches": []}, 'must hold {"branches": [...]} with at least one branch, and nothing else'),
    ({"branches": [{}], "more": 1}, 'must hold {"branches": [...]} with at least one branch, and nothing else'),
    ({"branches": ["a"]}, "branch 1 is 'a'; it must be an object with a name"),
    ({"branches": [{"prompts": "x"}]}, "branch 1 has the name None; it must be letters, digits, - and _, in"),
    ({"branches": [{"name": "a b"}]}, "branch 1 has the name 'a b'; it must be letters, digits, - and _, in"),
    ({"branches": [{"name": "mixed"}]}, "branch 1 has the name 'mixed'; it must be letters, digits, - and _, in"),
    ({"branches": [{"name": "a", "prompt": "x"}]}, "branch a has an unknown field 'prompt'; known are name, prompts,"),
    ({"branches": [{"name": "a"}]}, "branch a has prompts None; it must be a file or a list of files"),
    ({"branches": [{"name": "a", "prompts": []}]}, "branch a has prompts []; it must be a file or a list of files"),
    ({"branches": [{"name": "a", "prompts": "x", "teacher": 3}]}, "branch a has teacher 3; it must be a folder or"),
    ({"branches": [{"name": "a", "prompts": "x", "steps": 0}]}, "branch a has steps 0; it must be at least 1"),
    ({"branches": [{"name": "a", "prompts": "x", "steps": 1.5}]}, "branch a has steps 1.5; it must be a whole number"),
    ({"branches": [{"name": "a", "prompts": "x", "steps": True}]}, "branch a has steps True; it must be a whole numb"),
    ({"branches": [{"name": "a", "prompts": "x", "mass_target": "all"}]}, "branch a has mass_target 'all'; it must be"),
    ({"branches": [{"name": "a", "prompts": "x", "mass_target": 1.5}]}, "branch a has mass_target 1.5; it must be in"),
    ('{"branches": [{"name": "a", "prompts": "x", "mass_target": NaN}]}', "branch a has mass_target nan; it must be"),
    ('{"branches": [{"name": "a", "prompts": "x", "feedback_scale": Infinity}]}',
     "branch a has feedback_scale inf; it must be a positive number"),
    ({"branches": [{"name": "a", "prompts": "x", "score": "best"}]},
     "branch a has score 'best'; it must be absolute or positive"),
    ({"branches": [{"name": "a", "prompts": "x", "score": ["absolute"]}]}, "branch a has score ['absolute']; it must"),
    ({"branches": [{"name": "a", "prompts": "x", "share": 2}]},
     "branch a: share has an effect with the mixed methods alone; drop it"),
    ({"branches": [{"name": "a", "prompts": "x"}, {"name": "a", "prompts": "y"}]},
     "two branches are called 'a'; give each a name of its own"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "words"), WRONG)
def test_what_is_wrong_with_a_file(world: World, tmp_path: Path, content: Any, words: str) -> None:
    line = refusal(flags(world, tmp_path, content))
    found = line.removeprefix(f"--branches {tmp_path / 'branches.json'}: ")
    assert found != line and found.startswith(words), line
    assert not (tmp_path / "run").exists()


def test_yaml_that_is_none(world: World, tmp_path: Path) -> None:
    line = refusal(flags(world, tmp_path, "branches: [", name="b.yaml"))
    assert line.startswith(f"--branches {tmp_path / 'b.yaml'}: cannot be read as YAML (")
    line = refusal(flags(world, tmp_path, "!!python/object/apply:os.getpid []", name="b.yaml"))
    assert "cannot be read as YAML (could not determine a constructor" in line
    line = refusal(flags(world, tmp_path, "{}", name="b.toml"))
    assert line.endswith("has the extension '.toml'; expected .json, .yaml or .yml")
    line = refusal(world.flags(save=tmp_path / "run", branches=tmp_path / "none.json", **TWO_FLAGS))
    assert line.endswith("none.json: cannot be read (No such file or directory)")


def test_files_that_the_table_names(world: World, tmp_path: Path) -> None:
    where = f"--branches {tmp_path / 'branches.json'}"
    line = refusal(flags(world, tmp_path, branches(world, code={"prompts": "nowhere.jsonl"})))
    assert line.startswith(
        f"{where}: prompts of branch 'code': {tmp_path / 'nowhere.jsonl'} does not exist; name a .jsonl"
    )
    line = refusal(flags(world, tmp_path, branches(world, style={"teacher": "nowhere"})))
    assert line.startswith(f"{where}: teacher of branch 'style' {tmp_path / 'nowhere'}: no such folder")


def test_shares_that_do_not_divide_the_batch(world: World, tmp_path: Path) -> None:
    rows = branches(world, math={"steps": None}, code={"mass_target": None}, style={"score": None})
    line = refusal(flags(world, tmp_path, rows, distill_method="mopd"))
    shares = f"the shares 1:1:1 of --branches {tmp_path / 'branches.json'}"
    assert line == f"--global-batch-size 4: does not divide as {shares}"
    line = refusal(flags(world, tmp_path, branches(world), distill_method="mopd"))
    assert line.endswith("steps has an effect where branches take turns (--distill-method camopd) alone; drop it")


@pytest.mark.parametrize(
    ("name", "value"),
    [("general_prompts", "x"), ("domain_prompts", "x"), ("general_teacher_load", "x"), ("domain_teacher_load", "x"),
     ("recovery_steps", 2), ("domain_mass_target", 0.5), ("general_feedback_scale", 1.0)],
)  # fmt: skip
def test_flags_of_two_branches_beside_a_file(world: World, tmp_path: Path, name: str, value: Any) -> None:
    line = refusal(flags(world, tmp_path, branches(world), **{name: value}))
    flag = f"--{name.replace('_', '-')}"
    assert line == f"{flag}: has no effect beside --branches {tmp_path / 'branches.json'}; say it in that file"


def test_a_resumed_run_keeps_its_branches(world: World, tmp_path: Path) -> None:
    from megatron_camopd.checkpoint.assets import assets_dir, copy_assets

    args, plan = prepare(flags(world, tmp_path, branches(world)))
    args.camopd_state = json.dumps({**plan.state_dict(), "skipped_in_a_row": 0})
    save_common_state(tmp_path / "run", 4, args)
    copy_assets(assets_dir(args.load), assets_dir(tmp_path / "run"))
    args, resumed = prepare(flags(world, tmp_path, branches(world), name="moved.yaml"))
    assert args.resume and resumed.teachers == plan.teachers and resumed.names == plan.names
    made = f"but the checkpoint in --save {tmp_path / 'run'} was made with"
    line = refusal(flags(world, tmp_path, branches(world, math={"steps": 3})))
    assert f"steps of branch math is 3, {made} 2; use that, or another --save to start a new run" in line
    line = refusal(flags(world, tmp_path, branches(world, style={"score": "absolute"})))
    assert f"score of branch style is absolute, {made} positive" in line
    line = refusal(flags(world, tmp_path, {"branches": branches(world)["branches"][:2]}))
    assert f"has the branches math, code, {made} math, code, style; use that" in line
    line = refusal(flags(world, tmp_path, branches(world, math={"teacher": "initial"})))
    assert f"teacher of branch math is initial, {made} {world.teacher}; use that" in line
    line = refusal(flags(world, tmp_path, branches(world, math={"teacher": str(world.student)})))
    assert f"teacher of branch 'math' {world.student}: release is not the checkpoint that the run in --save" in line
    line = refusal(world.flags(save=tmp_path / "run"))
    assert line.startswith(
        f"--branches: not given, {made} the branches math (absolute), code (absolute), style (positive);"
    )


def saved(world: World, tmp_path: Path, line: list[str], *, drop: tuple[str, ...] = (), **settings: Any) -> Path:
    """Save what a run of ``line`` saves, without the keys ``drop`` and with further kept ``settings``."""
    from megatron_camopd.checkpoint.assets import assets_dir, copy_assets

    args, plan = prepare(line)
    state = {key: value for key, value in plan.state_dict().items() if key not in drop}
    state["settings"] |= settings
    args.camopd_state = json.dumps({**state, "skipped_in_a_row": 0})
    save_common_state(tmp_path / "run", 4, args)
    copy_assets(assets_dir(args.load), assets_dir(tmp_path / "run"))
    return tmp_path / "run"


def test_branches_that_name_one_checkpoint_differently_resume(world: World, tmp_path: Path) -> None:
    line = flags(world, tmp_path, branches(world, code={"teacher": "initial"}, style={"teacher": str(world.student)}))
    run = saved(world, tmp_path, line)
    args, plan = prepare(line)
    assert args.resume and [teacher.initial for teacher in plan.branch_teachers.values()] == [False, True, False]
    assert plan.teacher_of == {0: 0, 1: 1, 2: 1} and run.exists()


def two(world: World, **general: Any) -> dict[str, Any]:
    """The paper's two branches as a file, with the flags' defaults."""
    return {"branches": [
        {"name": "general", "prompts": str(world.general), "teacher": str(world.teacher), "steps": 3,
         "feedback_scale": 2.0} | general,
        {"name": "domain", "prompts": str(world.domain), "score": "positive"},
    ]}  # fmt: skip


OLD = {
    "recovery_steps": 3, "preservation_steps": 1, "general_mass_target": 0.8, "domain_mass_target": 0.8,
    "general_feedback_scale": 2.0, "domain_feedback_scale": 1.0, "mixing_ratio": None,
}  # fmt: skip


@pytest.mark.parametrize("drop", [("branches",), ()])
def test_flags_and_a_file_that_say_the_same_are_one_run(world: World, tmp_path: Path, drop: tuple[str, ...]) -> None:
    run = saved(world, tmp_path, world.flags(save=tmp_path / "run"), drop=drop, **OLD)
    args, _ = prepare(flags(world, tmp_path, two(world)))
    assert args.resume
    made = f"but the checkpoint in --save {run} was made with"
    line = refusal(flags(world, tmp_path, two(world, steps=7)))
    assert f"steps of branch general is 7, {made} 3; use that" in line
    line = refusal(flags(world, tmp_path, two(world, mass_target=0.1)))
    assert f"mass_target of branch general is 0.1, {made} 0.8; use that" in line
    line = refusal(world.flags(save=run, recovery_steps=1))
    assert line.startswith(f"--recovery-steps is 1, {made} 3; use that")


def test_a_ratio_of_an_older_run_is_kept(world: World, tmp_path: Path) -> None:
    run = saved(world, tmp_path, world.flags(save=tmp_path / "run", distill_method="mopd"), drop=("branches",),
                **(OLD | {"mixing_ratio": [1, 1]}))  # fmt: skip
    line = refusal(world.flags(save=run, distill_method="mopd", mixing_ratio="3:1"))
    assert line.startswith(f"--mixing-ratio is 3:1, but the checkpoint in --save {run} was made with 1:1; use that")


def test_a_folder_may_be_called_initial(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(world.teacher, tmp_path / "initial")
    (tmp_path / "b.json").write_text(json.dumps(branches(world, math={"teacher": "./initial"})))
    monkeypatch.chdir(tmp_path)
    _, plan = prepare(world.flags(save=tmp_path / "run", branches="b.json", **TWO_FLAGS))
    assert plan.branch_teachers[0].location.directory == tmp_path / "initial"


def test_one_prompt_file_by_several_names(world: World, tmp_path: Path) -> None:
    common = tmp_path / "common.jsonl"
    common.write_text("".join(json.dumps({"prompt": "p", "branch": name}) + "\n" for name in ("math", "code")))
    (tmp_path / "link.jsonl").symlink_to(common)
    table = branches(world, math={"prompts": "common.jsonl"}, code={"prompts": "../" + tmp_path.name + "/link.jsonl"})
    _, plan = prepare(flags(world, tmp_path, table))
    assert [len(stream) for stream in plan.streams.values()] == [1, 1, 20]
    line = refusal(flags(world, tmp_path, branches(world, math={"prompts": ["common.jsonl", "link.jsonl"]})))
    assert "branch math lists the prompts" in line and line.endswith("twice; list each file once")


def test_rows_may_name_a_branch_without_steps(world: World, tmp_path: Path) -> None:
    common = tmp_path / "common.jsonl"
    common.write_text("".join(json.dumps({"prompt": "p", "branch": name}) + "\n" for name in ("general", "domain")))
    both = {"general_prompts": common, "domain_prompts": common, "recovery_steps": 0}
    _, plan = prepare(world.flags(save=tmp_path / "run", **both))
    assert {place: len(stream) for place, stream in plan.streams.items()} == {1: 1}


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        ('{"branches": [], "branches": []}', "b.json", "cannot be read as JSON (the key 'branches' is given twice)"),
        ("branches: [{name: a, steps: 1, steps: 2}]", "b.yaml", "cannot be read as YAML (the key 'steps' is given"),
        ("branches: [!!int '']", "b.yaml", "cannot be read as YAML ("),
        ("branches: [!!timestamp x]", "b.yaml", "cannot be read as YAML ("),
        ("branches: [{[1]: 2}]", "b.yaml", "cannot be read as YAML ("),
        ("branches: [{name: a, prompts: 'x\n\ny'}]", "b.yaml", "branch a has prompts 'x\\ny'; it must be a file"),
        ('{"branches": [{"name": "a", "prompts": "x", "teacher": "\\ud800"}]}', "b.json", "branch a has teacher '"),
        (f"branches: [{{name: a, prompts: x, teacher: {'x' * 5000}}}]", "b.yaml", "branch a has teacher 'xxx"),
        ("branches: [{name: a, steps: 1" + "0" * 400 + "}]", "b.yaml", "branch a has steps 1000"),
        ("branches: [{name: a, feedback_scale: 1e-3}]", "b.yaml", "branch a has feedback_scale '1e-3'; it must be a"),
        ("branches: [{name: a-probe}]", "b.yaml", "branch 1 has the name 'a-probe'; it must be"),
        ("branches: [{name: a, prompts: x}, {name: A, prompts: x}]", "b.yaml", "two branches are called 'a'"),
    ],
)
def test_what_parsers_let_through(world: World, tmp_path: Path, text: str, name: str, words: str) -> None:
    line = refusal(flags(world, tmp_path, text, name=name))
    assert line.startswith(f"--branches {tmp_path / name}: {words}"), line
    assert len(line) < 700 and "\n" not in line


def test_a_key_taken_over_may_be_overridden(world: World, tmp_path: Path) -> None:
    text = (f"branches:\n  - &one {{name: a, prompts: {world.general}, teacher: {world.teacher}}}\n"
            "  - {<<: *one, name: b, steps: 2}\n")  # fmt: skip
    _, plan = prepare(flags(world, tmp_path, text, name="b.yaml"))
    assert [(branch.name, branch.steps) for branch in plan.table.branches] == [("a", 1), ("b", 2)]


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        ({}, {"preservation_steps": 0}, "--preservation-steps is 0, but {made} 1; use that"),
        ({"preservation_steps": 0}, {}, "--preservation-steps is 1, but {made} 0; use that"),
        ({}, {"domain_feedback_scale": 3}, "--domain-feedback-scale is 3.0, but {made} 1.0; use that"),
        ({"mixing_ratio": "0:1"}, {"mixing_ratio": "1:1"}, "--mixing-ratio is 1:1, but {made} 0:1; use that"),
        ({"mixing_ratio": "1:3"}, {"mixing_ratio": "3:1"}, "--mixing-ratio is 3:1, but {made} 1:3; use that"),
        ({"mixing_ratio": "1:1"}, {"mixing_ratio": "2:2"}, None),
        ({"mixing_ratio": "0:2"}, {"mixing_ratio": "0:1"}, None),
        ({"preservation_steps": 0}, {"preservation_steps": 0}, None),
    ],
)
@pytest.mark.parametrize("drop", [("branches",), ()])
def test_what_flags_say_of_a_saved_run(
    world: World, tmp_path: Path, before: dict[str, Any], after: dict[str, Any], line: str | None, drop: tuple[str, ...]
) -> None:
    method = {"distill_method": "mopd"} if "mixing_ratio" in before else {}
    shares = [int(share) for share in before.get("mixing_ratio", "1:1").split(":")]
    flags_before = world.flags(save=tmp_path / "run", **before, **method)
    run = saved(world, tmp_path, flags_before, drop=drop, **(OLD | before | {"mixing_ratio": shares}))
    again = world.flags(save=run, **after, **method)
    if line is None:
        assert prepare(again)[0].resume
    else:
        assert refusal(again).startswith(line.format(made=f"the checkpoint in --save {run} was made with"))


def test_a_table_that_no_flags_say(world: World, tmp_path: Path) -> None:
    """The names are those of the flags, but their order or a rule of scoring is not."""
    for number, table in enumerate(({"branches": two(world)["branches"][::-1]}, two(world, score="positive"))):
        folder = tmp_path / str(number)
        folder.mkdir()
        run = saved(world, folder, flags(world, folder, table))
        line = refusal(world.flags(save=run))
        assert line.startswith(f"--branches: not given, but the checkpoint in --save {run} was made with the branches ")
        assert "general (" in line and "domain (positive)" in line


def test_a_tilde_is_the_home(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(world.general.parent))
    _, plan = prepare(flags(world, tmp_path, branches(world, math={"prompts": f"~/{world.general.name}"})))
    assert plan.table.branches[0].prompts == (str(world.general),)
