"""Samples in reports: what is read from samples.jsonl, how tokens are marked, and that texts stay texts."""

import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megatron_camopd.errors import ConfigurationError
from tools import report
from tools.run_report import sample_cards
from tools.run_report.reading import read_runs
from tools.run_report.sample_cards import level, marked
from tools.run_report.samples import Gap, read_samples, visible

EVIL = "</pre><script>alert(1)</script>\"'&lt;"


def sample(step: int = 0, branch: str = "general", **fields: Any) -> dict[str, Any]:
    return {
        "step": step, "branch": branch, "id": "gsm8k:17", "category": None, "prompt": "<|im_start|>user\n2 + 2?",
        "response": "It is 4.", "prompt_length": 7, "response_length": 5, "truncated": False, "score": 0.83,
        "selected": True, "gap_mean": -0.41, "gap_abs_mean": 0.83,
        "largest_gaps": [{"position": 2, "start": 5, "end": 7, "token": " 4", "gap": -3.2}], **fields,
    }  # fmt: skip


def gap(start: int | None, end: int | None, value: float, position: int = 0) -> Gap:
    return Gap(position, start, end, "", value)


def write_run(folder: Path, samples: list[dict[str, Any]] | None, end: str = "", branches: str = "general") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    records = [{"step": step, "branch": branch, "loss": 1.0} for step, branch in enumerate(branches.split())]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if samples is not None:
        lines = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in samples)
        (folder / "samples.jsonl").write_bytes((lines + end).encode("utf-8", "surrogatepass"))
    return folder


class Reader(HTMLParser):
    """Collects tags, the text of each element of a kind, and checks that elements are closed in order."""

    VOID = ("meta", "input", "path", "use", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data


def page_of(*runs: Path) -> str:
    output = runs[0].parent / "page"
    assert report.main([*map(str, runs), "--output", str(output)]) == 0
    return (output / "index.html").read_text(encoding="utf-8")


def section_of(html: str) -> str:
    return html[html.index('<section id="samples"') :].partition("</section>")[0]


# ---- reading


def test_samples_are_read(tmp_path: Path) -> None:
    write_run(tmp_path, [sample(20, id=17, category="math", extra={"unknown": 1})])
    (found,), notes = read_samples(tmp_path / "samples.jsonl")
    assert (found.step, found.id, found.category, found.response, notes) == (20, "17", "math", "It is 4.", [])
    assert found.largest_gaps == (Gap(2, 5, 7, " 4", -3.2),)


def test_missing_null_and_odd_fields_are_unknown(tmp_path: Path) -> None:
    bare = {"step": 0, "branch": "general", "prompt": "", "response": ""}
    odd: dict[str, Any] = {
        "score": float("nan"),
        "selected": "yes",
        "truncated": None,
        "prompt_length": 1.5,
        "largest_gaps": "none",
    }
    write_run(tmp_path, [bare, sample(**odd)])
    for found in read_samples(tmp_path / "samples.jsonl")[0]:
        assert found.score is found.selected is found.truncated is found.prompt_length is None
        assert found.largest_gaps == ()


def test_gaps_without_a_place_in_the_text_keep_their_number(tmp_path: Path) -> None:
    entries = [
        {"position": place, "start": start, "end": end, "token": "x", "gap": 1.0}
        for place, (start, end) in enumerate([(-1, 2), (3, 99), (8, 8), (5, 4), (None, None), (0, 8)])
    ]
    entries += [{"position": 9, "start": 0, "end": 1, "token": "x", "gap": None}, {"gap": 1.0}, "x"]  # type: ignore
    write_run(tmp_path, [sample(largest_gaps=entries)])
    (found,), _ = read_samples(tmp_path / "samples.jsonl")
    assert [each.start for each in found.largest_gaps] == [None] * 5 + [0]


@pytest.mark.parametrize("end", ['{"step": 1, "bra', '{"step": 1, "prompt": "\udce4'])
def test_cut_last_line_is_noted_and_left_out(tmp_path: Path, end: str) -> None:
    write_run(tmp_path, [sample()], end=end)
    if "\udce4" in end:  # cut within a character
        path = tmp_path / "samples.jsonl"
        path.write_bytes(path.read_bytes()[:-2])
    samples, notes = read_samples(tmp_path / "samples.jsonl")
    assert len(samples) == 1 and len(notes) == 1 and "line 2, is cut off" in notes[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 1,', "line 1: is no JSON object"),
        ("[]", r"line 1: is \[\]; it must be a JSON object"),
        ('{"branch": "general"}', "line 1: 'step' is None; it must be a whole number"),
        ('{"step": 1, "branch": "general", "prompt": 3}', "line 1: 'prompt' is 3; it must be a text"),
    ],
)
def test_broken_lines_name_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(f"{line}\n{json.dumps(sample())}\n")
    with pytest.raises(ConfigurationError, match=message) as caught:
        read_samples(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_steps_that_were_trained_again_are_shown_once(tmp_path: Path) -> None:
    write_run(tmp_path, [sample(step, response=f"{place}") for place, step in enumerate([0, 20, 20, 40, 20, 40])])
    samples, notes = read_samples(tmp_path / "samples.jsonl")
    assert [(each.step, each.response) for each in samples] == [(0, "0"), (20, "4"), (40, "5")]
    assert len(notes) == 1 and "3 samples" in notes[0]


def test_what_a_page_cannot_show_becomes_visible_and_keeps_its_place() -> None:
    text = "a\x00b\tc\nd\re\x7f\x85\ud83d!"
    assert visible(text) == "a␀b\tc\nd␍e␡\ufffd\ufffd!"
    assert len(visible(text)) == len(text)


# ---- marks


def test_tokens_are_marked_by_sign_and_size() -> None:
    html = marked("It is <4>.", [gap(5, 8, -3.2, 2), gap(0, 2, 0.125)])
    assert html == (
        '<mark class="more level-0" title="+0.125 nats, token 0">It</mark> is'
        '<mark class="less level-2" title="−3.2 nats, token 2"> &lt;4</mark>&gt;.'
    )
    assert [level(value) for value in (0.0, 0.25, -0.9, 1.0, -4.0, 50.0)] == [0, 1, 1, 2, 3, 3]


def test_overlapping_spans_look_like_the_largest_gap() -> None:
    html = marked("abcdef", [gap(0, 4, 0.5, 0), gap(2, 6, -5.0, 1)])
    assert re.findall(r'class="(\w+) level-(\d)" title="([^"]*)">(\w+)<', html) == [
        ("more", "1", "+0.5 nats, token 0", "ab"),
        ("less", "3", "+0.5 nats, token 0; −5 nats, token 1", "cd"),
        ("less", "3", "−5 nats, token 1", "ef"),
    ]


@pytest.mark.parametrize("spans", [[(0, 99)], [(7, 9), (99, 120)], [(None, None)], [(0, 8), (0, 8), (3, 3)], [(2, 5)]])
def test_marks_never_change_the_text(spans: list[tuple[int | None, int | None]]) -> None:
    text = "a <b> &c\n"
    html = marked(text, [gap(start, end, -1.0) for start, end in spans])
    assert unescape(re.sub(r"<mark [^>]*>|</mark>", "", html)) == text


def test_a_marked_line_end_can_be_seen() -> None:
    assert 'class="less level-2 line-end"' in marked("a\nb", [gap(1, 2, -2.0)])
    assert "line-end" not in marked("a b", [gap(1, 2, -2.0)])


# ---- the section


def test_texts_stay_texts_and_whitespace_stays(tmp_path: Path) -> None:
    response = f"\n  {EVIL}\t東京 😀\n\n"
    gaps = [{"position": 0, "start": 3, "end": 12, "token": EVIL, "gap": 2.0}]
    run = write_run(
        tmp_path / "run",
        [sample(branch=EVIL, id=EVIL, category=EVIL, prompt=EVIL, response=response, largest_gaps=gaps)],
    )
    html = page_of(run)
    found = Reader(html)
    assert "<script" not in html and not any(name.startswith("on") for _, tag in found.tags for name in tag)
    assert found.texts["pre"] == [f"\n{EVIL}", f"\n{response}"]  # a browser takes the first line feed away
    assert [found.texts[tag][0] for tag in ("b", "code")] == [f"Step {0}", EVIL] and EVIL in found.texts["b"]
    assert EVIL in found.texts["li"][0]
    ids = [tag["id"] for _, tag in found.tags if "id" in tag]
    assert len(ids) == len(set(ids)) and 'href="#samples"' in html


def test_steps_newest_first_with_one_unfolded(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [sample(step, selected=step > 0) for step in (0, 20, 40) for _ in range(2)])
    html = section_of(page_of(run))
    assert re.findall(r"<b>Step (\d+)</b>", html) == ["40", "20", "0"]
    assert re.findall(r'<details class="step"( open)?>', html) == [" open", "", ""]
    assert "2 samples (general), 0 selected, mean score 0.83" in html
    assert html.count(">not selected</span>") == 2


def test_unknown_numbers_are_dashes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [{"step": 0, "branch": "general", "prompt": "a", "response": ""}])
    html = section_of(page_of(run))
    assert "<span>score –</span>" in html and "The response has no text." in html
    assert "not selected</span>" not in html and "Largest gaps" not in html


def test_without_samples_no_section(tmp_path: Path) -> None:
    for name, samples in (("none", None), ("empty", [])):
        html = page_of(write_run(tmp_path / name / "run", samples))
        assert 'id="samples"' not in html and "#samples" not in html and ".sample" not in html


def test_cut_file_still_gives_a_page_with_a_note(tmp_path: Path) -> None:
    html = page_of(write_run(tmp_path / "run", [sample()], end='{"step"'))
    assert "It is" in section_of(html) and "samples.jsonl, line 2, is cut off" in html


def test_broken_file_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", [sample(branch=None), sample()])  # type: ignore[arg-type]
    assert report.main([str(run)]) == 2
    assert "line 1: 'branch' is None" in capsys.readouterr().err


def test_every_branch_has_a_filter_and_the_colour_of_its_curves(tmp_path: Path) -> None:
    names = ["general", "domain", "code", "math"]
    run = write_run(tmp_path / "run", [sample(branch=name) for name in names], branches=" ".join(names))
    html = page_of(run)
    assert re.findall(r'id="show-branch-(\d)"/> (\w+)', html) == list(zip("0123", names, strict=True))
    colours = re.findall(r"\.branch-(\d) \{ --branch: var\(--series-(\d)\); \}", html)
    assert colours[:2] == [("0", "0"), ("1", "1")] and len({colour for _, colour in colours}) == 4
    for place in "0123":
        assert f".samples:has(#show-branch-{place}:checked) .sample:not(.branch-{place}) {{ display: none; }}" in html


def test_several_runs_have_a_heading_each(tmp_path: Path) -> None:
    a, b = (write_run(tmp_path / name, [sample(branch="general")]) for name in ("a", "b"))
    html = page_of(a, b, write_run(tmp_path / "c", None))
    assert re.findall(r"<h3>(\w)</h3>", section_of(html)) == ["a", "b"]
    assert "--branch: var(--series" not in html  # there, a colour stands for a run


def test_long_texts_and_long_runs_are_cut_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_cards, "MOST_TEXT", 100)
    monkeypatch.setattr(sample_cards, "MOST_CHARACTERS", 20_000)
    gaps = [{"position": 0, "start": 90, "end": 120, "token": "x", "gap": 1.0}]
    run = write_run(tmp_path / "run", [sample(step, response="x" * 1_250, largest_gaps=gaps) for step in range(40)])
    html = section_of(page_of(run))
    assert "… and 1,150 more characters" in html and f"{'x' * 90}<mark" in html
    steps = [int(step) for step in re.findall(r"<b>Step (\d+)</b>", html)]
    assert steps[0] == 39 and {a - b for a, b in zip(steps, steps[1:], strict=False)} == {4}
    assert f"{len(steps)} of 40 logged steps" in html


def test_thousands_of_samples_make_a_page_of_bearable_size(tmp_path: Path) -> None:
    gaps = [{"position": p, "start": 30 * p, "end": 30 * p + 5, "token": "abcde", "gap": p - 8.5} for p in range(32)]
    samples = [sample(step // 8, response="x" * 4000, largest_gaps=gaps) for step in range(4000)]
    run = read_runs([str(write_run(tmp_path / "run", samples))])
    assert len(sample_cards.section(run)) < 1.2 * sample_cards.MOST_CHARACTERS
