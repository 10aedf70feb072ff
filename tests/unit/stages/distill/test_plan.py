"""Plans of new and resumed runs: teachers must fit the student, prompts must be usable, a resumed run must be the same.

The checkpoint of a run is made without training: Megatron's writer, the arguments and the CaMOPD state alone. That
what the trainer saves is read alike is held by the integration tests.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from megatron_camopd.checkpoint.directory import TRACKER
from megatron_camopd.config.branch_settings import AlternatingSettings, MixingSettings
from tests.support.saved_runs import STEPS, save_common_state, save_run
from tests.support.worlds import VOCABULARY, World, make_checkpoint, prepare, refusal, write_prompts

if TYPE_CHECKING:
    from megatron_camopd.stages.distill.plan import DistillPlan

BRANCHES = ("general", "domain")
# Of other methods than the saved run's: tried by test_method_flags.
OTHER_METHODS = (
    "mixing_ratio", "relaxed_opd_floor", "relaxed_opd_lambda", "relaxed_opd_entropy_fraction",
    "relaxed_opd_switch_step", "selectkd_verification", "selectkd_candidates", "selectkd_rejected_weight",
)  # fmt: skip
# One other value for every setting that must not change in a run; None: there is no other one.
OTHER_SETTINGS: dict[str, Any] = {
    "stage": None,  # another stage has other flags, and a run of it other settings: tests/integration/test_stages.py
    "distill_method": "mopd", "recovery_steps": 2, "preservation_steps": 2, "general_mass_target": 0.5,
    "domain_mass_target": 0.5, "general_feedback_scale": 3.0, "domain_feedback_scale": 2.0,
    "importance_correction": "clip", "importance_low": 0.25, "importance_high": 4.0, "max_prompt_length": 39,
    "max_response_length": 23, "overlong_prompts": "skip", "chat_template_kwargs": '{"thinking": false}',
    "rollout_engine": None, "rollout_temperature": 0.5, "global_batch_size": 8, "seed": 5, "optimizer": "sgd",
    "lr": 1e-3, "min_lr": 1e-7, "lr_decay_style": "cosine", "lr_decay_iters": 9, "lr_warmup_iters": 1,
    "lr_warmup_init": 1e-7, "lr_wsd_decay_style": "linear", "lr_wsd_decay_iters": 5, "decoupled_lr": 1e-5,
    "decoupled_min_lr": 1e-7, "start_weight_decay": None, "end_weight_decay": None, "weight_decay_incr_style": None,
    "apply_wd_to_qk_layernorm": True, "sgd_momentum": 0.5, "attention_dropout": 0.1, "hidden_dropout": 0.1,
    "lr_warmup_fraction": 0.5, "weight_decay": 0.5, "clip_grad": 2.0, "adam_beta1": 0.8, "adam_beta2": 0.8,
    "adam_eps": 1e-6, "bf16": True, "fp16": None, "unselected_samples": "keep",
    **dict.fromkeys(OTHER_METHODS),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``--save`` folder after :data:`STEPS` steps of the world's command line."""
    return save_run(world, tmp_path_factory.mktemp("saved") / "run")


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy of :func:`saved` that the test may change."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.fixture(scope="module")
def misfits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Teachers that cannot serve the world's student."""
    root = tmp_path_factory.mktemp("misfits")
    swapped = dict(VOCABULARY) | {"a": VOCABULARY["b"], "b": VOCABULARY["a"]}
    return {
        "vocabulary": make_checkpoint(root / "vocabulary", vocab_size=300),
        "layers": make_checkpoint(root / "layers", num_hidden_layers=3),
        "rope": make_checkpoint(root / "rope", rope_parameters={"rope_type": "default", "rope_theta": 20000.0}),
        "tokenizer": make_checkpoint(root / "tokenizer", vocabulary=swapped),
    }


def teacher_folders(plan: "DistillPlan") -> dict[str, str]:
    return {
        plan.names[branch]: str(plan.teachers[number].location.directory) for branch, number in plan.teacher_of.items()
    }


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_plan_of_a_new_run(world: World, tmp_path: Path) -> None:
    args, plan = prepare(world.flags(save=tmp_path / "run"))
    assert not args.resume and plan.state is None
    assert plan.names == ["general", "domain"]
    served = [plan.table.schedule.counts(step, 4) for step in range(5)]
    assert served == [(4, 0)] * 3 + [(0, 4), (4, 0)]
    assert teacher_folders(plan) == {"general": str(world.teacher), "domain": str(world.student)}
    assert plan.end_of_sequence_ids == [VOCABULARY["<|im_end|>"]]
    assert {branch: len(stream) for branch, stream in plan.streams.items()} == {0: 20, 1: 20}
    assert not (tmp_path / "run").exists()


def test_a_domain_teacher_of_its_own(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.root)
    _, plan = prepare(world.flags(save=tmp_path / "run", domain_teacher_load="teacher"))
    assert teacher_folders(plan)["domain"] == str(world.teacher)  # resolved


def test_generation_config_names_the_ends(world: World, tmp_path: Path) -> None:
    student = Path(shutil.copytree(world.student, tmp_path / "student"))
    path = student / "hf" / "generation_config.json"
    flags = world.flags(save=tmp_path / "run", load=student)
    for found, expected in (([5, 2], [2, 5]), (2, [2])):
        path.write_text(json.dumps({"eos_token_id": found}))
        assert prepare(flags)[1].end_of_sequence_ids == expected
    path.write_text("{")
    assert refusal(flags).startswith(f"{path}: cannot be read (") and not (tmp_path / "run").exists()
    path.write_text("[" * 200_000)
    assert refusal(flags).startswith(f"{path}: cannot be read (")
    path.write_text("[1]")
    assert refusal(flags).startswith(f"{path}: holds a JSON list; expected the model's generation_config.json, an obj")
    path.unlink()
    path.mkdir()
    assert refusal(flags).startswith(f"{path}: is no file; expected the model's generation_config.json")


@pytest.mark.parametrize("value", [-1, 10**9, 2.0, True, "2", [2, None], {"a": 1}])
def test_ends_that_are_no_ids_of_the_model(value: Any, world: World, tmp_path: Path) -> None:
    student = Path(shutil.copytree(world.student, tmp_path / "student"))
    path = student / "hf" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": value}))
    line = refusal(world.flags(save=tmp_path / "run", load=student))
    assert line.startswith(f"{path}: eos_token_id holds ") and "; expected ids of the model, 0 to " in line


def test_ends_without_a_generation_config(world: World, tmp_path: Path) -> None:
    """config.json comes next, then the tokenizer."""
    student = Path(shutil.copytree(world.student, tmp_path / "student"))
    folder, flags = student / "hf", world.flags(save=tmp_path / "run", load=student)
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    for ids, expected in (([4, 2, 4], [2, 4]), ([], [VOCABULARY["<|im_end|>"]]), (None, [VOCABULARY["<|im_end|>"]])):
        (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": ids}))
        assert prepare(flags)[1].end_of_sequence_ids == expected


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize(
    ("misfit", "words"),
    [
        ("vocabulary", "vocab-size is 300, the student's is 259; teacher and student must be of one architecture"),
        ("layers", "num-layers is 3, the student's is 2; teacher and student must be of one architecture"),
        ("rope", "rotary-base is 20000, the student's is 10000; teacher and student must be of one architecture"),
        ("tokenizer", "its tokenizer gives 'a' the id 68, the student's gives 67; token ids must be equal"),
    ],
)
def test_teacher_that_does_not_fit(
    branch: str, misfit: str, words: str, misfits: dict[str, Path], world: World, tmp_path: Path
) -> None:
    line = refusal(world.flags(save=tmp_path / "run", **{f"{branch}_teacher_load": misfits[misfit]}))
    assert line == f"--{branch}-teacher-load {misfits[misfit]}: {words}"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", ["tokenizer.json", "config.json"])
def test_student_without_its_small_files(missing: str, world: World, tmp_path: Path) -> None:
    student = Path(shutil.copytree(world.student, tmp_path / "student"))
    (student / "hf" / missing).unlink()
    line = refusal(world.flags(save=tmp_path / "run", load=student))
    assert line.startswith(f"{student / 'hf'}") and ("tokenizer" in line or "config.json: no such file" in line)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize(
    ("row", "text", "words"),
    [
        (17, '{"prompt": ', " line 17 is not JSON (column 11: Expecting value); each line must be one JSON object"),
        (
            3,
            '{"question": "?"}',
            ' line 3 has neither (found: question); each row needs one of "messages" and "prompt"',
        ),
        (5, '{"prompt": " "}', ' line 5 has an empty "prompt"; remove the row or fill it'),
    ],
)
def test_bad_rows(branch: str, row: int, text: str, words: str, world: World, tmp_path: Path) -> None:
    rows = lines_of(getattr(world, branch))
    rows[row - 1] = text
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(rows))
    line = refusal(world.flags(save=tmp_path / "run", **{f"{branch}_prompts": path}))
    assert line == f"--{branch}-prompts: {path}{words}"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("branch", BRANCHES)
def test_missing_and_empty_prompt_files(branch: str, world: World, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    flags = world.flags(save=tmp_path / "run", **{f"{branch}_prompts": [getattr(world, branch), path]})
    assert refusal(flags) == f"--{branch}-prompts: {path} does not exist; name a .jsonl or .parquet file"
    path.touch()
    assert refusal(flags) == f"--{branch}-prompts: {path} is empty; it must hold at least one prompt"
    assert not (tmp_path / "run").exists()


def test_resumed_run_continues_its_streams(world: World, run: Path) -> None:
    args, plan = prepare(world.flags(save=run))
    assert args.resume and plan.state is not None
    untouched = prepare(world.flags(save=run.with_name("new")))[1]
    for branch, steps in ((0, STEPS - 1), (1, 1)):
        assert plan.streams[branch].state_dict() == plan.state["streams"][plan.names[branch]]
        untouched.streams[branch].next(4 * steps)
        assert plan.streams[branch].next(4) == untouched.streams[branch].next(4)


def test_resumed_run_keeps_the_initial_student_as_teacher(world: World, run: Path) -> None:
    """Even where --load has moved on meanwhile, and naming the teacher that it has is no change."""
    plan = prepare(world.flags(save=run, load=world.teacher))[1]
    assert teacher_folders(plan) == {"general": str(world.teacher), "domain": str(world.student)}
    assert prepare(world.flags(save=run, domain_teacher_load=world.student))[1].teachers == plan.teachers


@pytest.mark.parametrize("branch", BRANCHES)
def test_resumed_run_with_another_teacher(branch: str, world: World, run: Path) -> None:
    started, other = (world.teacher, world.student) if branch == "general" else (world.student, world.teacher)
    line = refusal(world.flags(save=run, **{f"{branch}_teacher_load": other}))
    assert line == (
        f"--{branch}-teacher-load {other}: release is not the checkpoint that the run in --save {run} started with "
        f"(then in {started}); give that one"
    )


def test_a_teacher_may_move(world: World, run: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(world.teacher, tmp_path / "moved"))
    plan = prepare(world.flags(save=run, general_teacher_load=moved))[1]
    assert teacher_folders(plan)["general"] == str(moved)


def test_a_teacher_that_is_gone(world: World, run: Path, tmp_path: Path) -> None:
    emptied = Path(shutil.copytree(world.teacher, tmp_path / "emptied"))
    (emptied / "release").rename(emptied / "iter_0000009")
    (emptied / TRACKER).write_text("9")
    line = refusal(world.flags(save=run, general_teacher_load=emptied))
    assert line.startswith(f"--general-teacher-load {emptied}: release, the general teacher of the run in --save {run}")
    assert line.endswith("is not there; give the folder that holds it now")


def test_the_tokenizer_is_the_one_the_run_started_with(world: World, run: Path, tmp_path: Path) -> None:
    """--load may name something else by now: prompts must be rendered as before."""
    other = Path(shutil.copytree(world.student, tmp_path / "student"))
    (other / "hf" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    same = prepare(world.flags(save=run))[1].streams[0].next(4)
    assert prepare(world.flags(save=run, load=other))[1].streams[0].next(4) == same


def test_positions_are_no_part_of_the_architecture(world: World, tmp_path: Path) -> None:
    """Qwen3-*-Base and Qwen3-* differ in nothing but max_position_embeddings; a teacher needs enough of them."""
    more = make_checkpoint(tmp_path / "more", max_position_embeddings=4096)
    assert prepare(world.flags(save=tmp_path / "run", general_teacher_load=more))
    fewer = make_checkpoint(tmp_path / "fewer", max_position_embeddings=8)
    line = refusal(world.flags(save=tmp_path / "run", general_teacher_load=fewer))
    assert line.startswith(f"--general-teacher-load {fewer}: has 8 positions, --seq-length is ")


@pytest.mark.parametrize("branch", BRANCHES)
def test_resumed_run_with_other_prompts(branch: str, world: World, run: Path, tmp_path: Path) -> None:
    other = write_prompts(tmp_path / "other.jsonl", "other", count=21)
    line = refusal(world.flags(save=run, **{f"{branch}_prompts": other}))
    assert line.startswith(f"--{branch}-prompts: the files hold 21 prompts (sha256 ")
    assert "the checkpoint was made with 20 (sha256 " in line and line.endswith("give the same files in the same order")


def test_every_setting_is_tried(world: World, run: Path) -> None:
    of_branches = {*AlternatingSettings.argument_names(), *MixingSettings.argument_names()}  # kept in the table
    assert prepare(world.flags(save=run))[1].settings.keys() == OTHER_SETTINGS.keys() - of_branches


@pytest.mark.parametrize("name", [name for name, value in OTHER_SETTINGS.items() if value is not None])
def test_resumed_run_with_a_changed_setting(name: str, world: World, run: Path) -> None:
    before = sorted(run.rglob("*"))
    line = refusal(world.flags(save=run, **{name: OTHER_SETTINGS[name]}))
    flag = f"--{name.replace('_', '-')}"
    assert line.startswith(f"{flag} is ") and f"the checkpoint in --save {run} was made with " in line
    assert line.endswith("; use that, or another --save to start a new run")
    assert sorted(run.rglob("*")) == before


GROWING = {"weight_decay_incr_style": "linear", "start_weight_decay": 0.1, "end_weight_decay": 0.2}


@pytest.mark.parametrize(
    ("name", "value"), [("end_weight_decay", 0.3), ("start_weight_decay", 0.0), ("weight_decay_incr_style", "cosine")]
)
def test_resumed_run_with_another_growth_of_the_weight_decay(
    name: str, value: Any, world: World, tmp_path: Path
) -> None:
    run = save_run(world, tmp_path / "run", **GROWING)
    line = refusal(world.flags(save=run, **(GROWING | {name: value})))
    assert line.startswith(f"--{name.replace('_', '-')} is {value}, but the checkpoint in --save {run} was made with ")


@pytest.mark.parametrize(
    "schedule",
    [
        {"lr_warmup_iters": 2},
        {"lr_decay_style": "cosine", "lr_decay_iters": 9},
        {"lr_warmup_fraction": 0.5, "lr_decay_iters": 9},
    ],
)
def test_steps_may_be_added(schedule: dict[str, Any], world: World, tmp_path: Path) -> None:
    run = save_run(world, tmp_path / "run", **schedule)
    args, _ = prepare(world.flags(save=run, train_iters=50, **schedule))
    assert args.resume and args.train_iters == 50


@pytest.mark.parametrize(
    "schedule",
    [
        {"lr_decay_style": "cosine"},
        {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 1},
        {"lr_warmup_fraction": 0.5},
        GROWING,
        GROWING | {"lr_decay_style": "cosine", "lr_decay_iters": 9},
    ],
)
def test_steps_may_not_be_added_where_a_schedule_depends_on_them(
    schedule: dict[str, Any], world: World, tmp_path: Path
) -> None:
    run = save_run(world, tmp_path / "run", **schedule)
    assert prepare(world.flags(save=run, **schedule))[0].resume
    line = refusal(world.flags(save=run, train_iters=50, **schedule))
    assert line.startswith(f"--train-iters is 50, but the checkpoint in --save {run} was made with 2;")


def unfinished(run: Path) -> Path:
    """Return what a crash leaves of the checkpoint after the saved one."""
    folder = run / f"iter_{STEPS + 1:07d}"
    shutil.copytree(run / f"iter_{STEPS:07d}", folder)
    (folder / ".metadata").unlink()
    return folder


def test_interrupted_checkpoint_is_passed_over(world: World, run: Path) -> None:
    unfinished(run)
    args, plan = prepare(world.flags(save=run))
    assert args.resume and args.iteration == STEPS and plan.state is not None
    assert (run / TRACKER).read_text() == str(STEPS)


@pytest.mark.parametrize("text", [b"", b"\n", b"\xff\xfe", b"releas", str(STEPS + 1).encode(), b"99"])
def test_damaged_tracker_gives_way_to_the_newest_complete_checkpoint(text: bytes, world: World, run: Path) -> None:
    unfinished(run)
    shutil.copytree(run / f"iter_{STEPS:07d}", run / "iter_0000002")
    (run / TRACKER).write_bytes(text)
    args, _ = prepare(world.flags(save=run))
    assert args.resume and args.iteration == STEPS
    assert (run / TRACKER).read_bytes() == text  # reading the inputs writes nothing; the next checkpoint does


def test_first_checkpoint_interrupted_starts_anew(world: World, run: Path) -> None:
    (run / f"iter_{STEPS:07d}" / ".metadata").unlink()
    (run / TRACKER).unlink()
    assert not prepare(world.flags(save=run))[0].resume


def test_damaged_tracker_of_a_teacher_is_left_alone(world: World, run: Path, tmp_path: Path) -> None:
    (run / TRACKER).write_text("")
    line = refusal(world.flags(save=tmp_path / "new", general_teacher_load=run))
    assert line == (
        f"--general-teacher-load {run}: {TRACKER} says '', but the newest complete checkpoint is iter_0000004; "
        "write 4 into the file"
    )
    assert (run / TRACKER).read_text() == "" and not (tmp_path / "new").exists()


def test_checkpoint_of_another_program(world: World, tmp_path: Path) -> None:
    save = tmp_path / "run"
    args, _ = prepare(world.flags(save=save))
    args.camopd_state = None
    save_common_state(save, 7, args)
    assert refusal(world.flags(save=save)) == (
        f"--save {save}: its checkpoint is not one of a CaMOPD run; use another folder"
    )


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_records_need_a_file(name: str, world: World, tmp_path: Path) -> None:
    (tmp_path / "run" / name).mkdir(parents=True)
    line = refusal(world.flags(save=tmp_path / "run"))
    assert line == f"{tmp_path / 'run' / name}: is no regular file; move it away, or give another --save"
