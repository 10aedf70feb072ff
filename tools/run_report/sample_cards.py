"""The section of a page that shows samples: a card each, by steps, with the tokens of the largest gaps marked.

Colour tells whom a token suits, teacher (gap above zero) or student (below), and so does the line under it, solid or
dotted; how strong it is tells the size of the gap. Filters and folds work without scripts, which the page forbids.
Every text of a sample is escaped here.
"""

from collections import Counter
from collections.abc import Sequence
from html import escape
from itertools import groupby

from tools.run_report.branches import colour_and_line, in_order
from tools.run_report.reading import Run
from tools.run_report.samples import Gap, Sample

LEVELS = (0.25, 1.0, 4.0)  # nats: from each of them on, the colour is stronger
STRENGTHS = (12, 24, 40, 55)  # per cent of the colour below the first level, from it on, ...; text stays readable
MOST_TEXT = 20_000  # characters of one prompt or response
MOST_CHARACTERS = 16_000_000  # of all cards; beyond that, steps are left out
OPEN_PROMPT = 400  # characters; longer prompts are folded
CARD, MARK = 1500, 190  # characters of a card without its texts, and of one marked token and its line in the list
NOTHING = "–"

INTRO = (
    "What the student said at some steps, the latest first. Marked are the tokens of each response on which teacher "
    "and student differ most; a pointer held on a mark, and the list below the response, tell the gap: log p(teacher) "
    "minus log p(student) of the token, in nats. Score: what samples are selected by, in nats a token."
)
STYLE = (
    """
.samples fieldset { border: 0; margin: 0.4rem 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0.2rem 1rem; }
.samples legend { float: left; padding: 0; margin-right: 0.2rem; color: var(--soft); }
.samples h3 { margin: 1.5rem 0 0.25rem; overflow-wrap: anywhere; }
.gap-legend { margin: 0.6rem 0; display: flex; flex-wrap: wrap; gap: 0.2rem 1.5rem; }
.step { margin-top: 0.6rem; border-top: 1px solid var(--line); padding-top: 0.4rem; }
summary { cursor: pointer; overflow-wrap: anywhere; }
.step-samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 32rem), 1fr)); gap: 1rem;
  align-items: start; margin: 0.6rem 0 1.2rem; }
.sample { background: var(--card); border: 1px solid var(--line); border-radius: 0.5rem; padding: 0.7rem 0.9rem;
  border-top: 3px solid var(--branch, var(--line)); min-width: 0; }
.sample-head { display: flex; flex-wrap: wrap; gap: 0.15rem 0.6rem; align-items: baseline; overflow-wrap: anywhere; }
.sample-head b { color: var(--branch, var(--ink)); }
.sample-head code { font-size: 0.85rem; }
.tag { border: 1px solid var(--line); border-radius: 1rem; padding: 0 0.55rem; font-size: 0.8rem; }
.tag.selected { border-color: currentColor; }
.sample p { font-size: 0.85rem; }
.sample .numbers { display: flex; flex-wrap: wrap; gap: 0 0.9rem; font-variant-numeric: tabular-nums; }
.sample details { font-size: 0.85rem; color: var(--soft); margin: 0.35rem 0; }
.sample pre { white-space: pre-wrap; overflow-wrap: anywhere; overflow: auto; max-height: 28rem; margin: 0.3rem 0;
  padding: 0.5rem 0.65rem; border: 1px solid var(--line); border-radius: 0.35rem; color: var(--ink); tab-size: 4;
  background: var(--page); font: 0.85rem/1.6 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.sample .prompt pre { max-height: 14rem; color: var(--soft); }
mark { color: inherit; border-radius: 0.15rem; text-decoration: underline 2px; text-underline-offset: 0.2em;
  text-decoration-skip-ink: none; background: color-mix(in srgb, var(--shade) var(--strength), transparent);
  text-decoration-color: var(--shade); -webkit-box-decoration-break: clone; box-decoration-break: clone; }
mark.line-end::before { content: "↵"; }
.more { --shade: var(--series-2); }
.less { --shade: var(--series-3); text-decoration-style: dotted; }
.gaps ul { list-style: none; margin: 0.3rem 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0.2rem 0.9rem; }
.gaps mark { white-space: pre; font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.gaps li { color: var(--ink); max-width: 100%; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
@media print { .sample pre { max-height: none; } .samples fieldset { display: none; } }
"""
    + "\n".join(f".level-{place} {{ --strength: {strength}%; }}" for place, strength in enumerate(STRENGTHS))
    + "\n"
)


def section(runs: Sequence[Run]) -> str:
    """Return the section about the samples of ``runs``, as HTML; "" where none was logged."""
    logged = [run for run in runs if run.samples]
    if not logged:
        return ""
    names = _branches(logged)
    parts = [_legend(), _filters(names)]
    for run in logged:
        if len(runs) > 1:
            parts.append(f"<h3>{escape(run.label)}</h3>")
        parts += _steps(run, names, MOST_CHARACTERS // len(logged), is_open=len(runs) == 1)
    return (
        '<section id="samples" aria-labelledby="samples-heading" class="samples">\n'
        f'<h2 id="samples-heading">Samples</h2><p class="soft">{escape(INTRO)}</p>\n'
        f"{'\n'.join(parts)}\n</section>"
    )


def style(runs: Sequence[Run]) -> str:
    """Return the CSS of the section; its last rules hide what a filter leaves out, and give branches their colours."""
    names = _branches(runs)
    shown = [*(f"branch-{place}" for place in range(len(names))), "selected", "unselected", "truncated"]
    rules = [f".samples:has(#show-{value}:checked) .sample:not(.{value}) {{ display: none; }}" for value in shown]
    if len(runs) == 1:  # of several runs, a colour stands for a run
        colours = [colour_and_line(name, runs[0].branches)[0] for name in names]
        rules += [f".branch-{place} {{ --branch: var(--series-{colour}); }}" for place, colour in enumerate(colours)]
    return f"{STYLE}{'\n'.join(rules)}\n"


def _branches(runs: Sequence[Run]) -> list[str]:
    return in_order(sample.branch for run in runs for sample in run.samples)


def marked(text: str, gaps: Sequence[Gap]) -> str:
    """Return ``text`` as HTML, the characters of ``gaps`` marked.

    Tokens may share characters, as the bytes of one emoji do: those look like the largest of their gaps, and name all.
    """
    placed = [(gap.start, gap.end, gap) for gap in gaps if gap.start is not None and gap.end is not None]
    cuts = sorted({0, len(text), *(min(place, len(text)) for start, end, _ in placed for place in (start, end))})
    pieces = []
    waiting = sorted(placed, key=lambda each: each[0])
    for start, end in zip(cuts, cuts[1:], strict=False):
        own = [gap for first, last, gap in waiting if first <= start and end <= last]
        piece = escape(text[start:end])
        if own:
            line_end = " line-end" if not text[start:end].strip(" \n") and "\n" in text[start:end] else ""
            told = "; ".join(f"{_signed(gap.value)} nats, token {gap.position}" for gap in own)
            piece = f'<mark class="{_look(own)}{line_end}" title="{told}">{piece}</mark>'
        pieces.append(piece)
    return "".join(pieces)


def level(gap: float) -> int:
    """Return how strong the colour of a gap in nats is: 0 to ``len(LEVELS)``."""
    return sum(abs(gap) >= least for least in LEVELS)


def _look(gaps: Sequence[Gap]) -> str:
    largest = max((gap.value for gap in gaps), key=abs)
    return f"{'more' if largest > 0 else 'less'} level-{level(largest)}"


def _legend() -> str:
    bounds = ["0", *(f"{least:g}" for least in LEVELS)]
    sizes = [f"{low} to {high}" for low, high in zip(bounds, bounds[1:], strict=False)] + [f"{bounds[-1]} or more"]
    kinds = []
    for kind in ("more", "less"):
        shown = " ".join(f'<mark class="{kind} level-{place}">{size}</mark>' for place, size in enumerate(sizes))
        kinds.append(f"<span>The teacher finds the token {kind} likely than the student does, by {shown} nats</span>")
    return f'<div class="gap-legend">{"".join(kinds)}</div>'


def _filters(names: Sequence[str]) -> str:
    """Return choices of what to show; the rules of :func:`style` make them work."""
    branches = [(f"branch-{place}", name) for place, name in enumerate(names)] if len(names) > 1 else []
    states = [("selected", "selected"), ("unselected", "not selected"), ("truncated", "cut at the length limit")]
    groups = []
    for group, title, choices in (("branch", "Branch:", branches), ("state", "Samples:", states)):
        if choices:
            buttons: list[str] = []
            for value, words in [(f"all-{group}", "all"), *choices]:
                checked = " checked" if words == "all" and not buttons else ""
                button = f'<input type="radio" name="samples-{group}" id="show-{value}"{checked}/>'
                buttons.append(f"<label>{button} {escape(words)}</label>")
            groups.append(f"<fieldset><legend>{title}</legend>{''.join(buttons)}</fieldset>")
    return "\n".join(groups)


def _steps(run: Run, names: Sequence[str], most: int, *, is_open: bool) -> list[str]:
    """Return a fold for each step, newest first; of more than about ``most`` characters only evenly spread steps.

    is_open: the newest step is unfolded.
    """
    steps = [(step, list(samples)) for step, samples in groupby(run.samples, key=lambda sample: sample.step)][::-1]
    every = -(-sum(_size(sample) for _, samples in steps for sample in samples) // most)
    shown = steps[:: max(1, every)]
    folds = []
    if len(shown) < len(steps):
        folds.append(
            f'<p class="soft">{len(shown):,} of {len(steps):,} logged steps, evenly spread; samples.jsonl has all.</p>'
        )
    for place, (step, samples) in enumerate(shown):
        cards = "\n".join(_card(sample, names) for sample in samples)
        folds.append(
            f'<details class="step"{" open" if is_open and place == 0 else ""}><summary><b>Step {step:,}</b> '
            f'<span class="soft">{escape(_of_step(samples))}</span></summary>\n'
            f'<div class="step-samples">\n{cards}\n</div></details>'
        )
    return folds


def _size(sample: Sample) -> int:
    """Return about how many characters a card takes."""
    texts = sum(min(len(text), MOST_TEXT) for text in (sample.prompt, sample.response))
    return CARD + texts + MARK * len(sample.largest_gaps)


def _of_step(samples: Sequence[Sample]) -> str:
    """Say in a few words what the samples of a step are."""
    counts = Counter(sample.branch for sample in samples)
    scores = [sample.score for sample in samples if sample.score is not None]
    selected = [sample.selected for sample in samples if sample.selected is not None]
    words = [f"{len(samples):,} sample{'s' * (len(samples) > 1)}"]
    words[0] += f" ({', '.join(f'{name} {counts[name]}' if len(counts) > 1 else name for name in in_order(counts))})"
    words += [f"{sum(selected):,} selected"] if selected else []
    words += [f"mean score {sum(scores) / len(scores):.3g}"] if scores else []
    return ", ".join(words)


def _card(sample: Sample, names: Sequence[str]) -> str:
    classes, tags = ["sample", f"branch-{names.index(sample.branch)}"], []
    if sample.selected is not None:
        classes.append("selected" if sample.selected else "unselected")
        tags.append(("tag selected", "selected") if sample.selected else ("tag", "not selected"))
    if sample.truncated:
        classes.append("truncated")
        tags.append(("tag", "cut at the length limit"))
    head = f"<b>{escape(sample.branch)}</b>"
    head += f" <code>{escape(sample.id)}</code>" if sample.id else ""
    head += f" <span>{escape(sample.category)}</span>" if sample.category else ""
    head += "".join(f' <span class="{kind}">{words}</span>' for kind, words in tags)
    return (
        f'<article class="{" ".join(classes)}"><div class="sample-head">{head}</div>\n'
        f'<p class="numbers">{_numbers(sample)}</p>\n'
        f"{_prompt(sample)}\n{_response(sample)}{_list(sample.largest_gaps)}</article>"
    )


def _numbers(sample: Sample) -> str:
    known = (
        ("score", sample.score, ".3g", ""), ("mean gap", sample.gap_mean, "+.3g", " nats"),
        ("mean |gap|", sample.gap_abs_mean, ".3g", " nats"), ("prompt", sample.prompt_length, ",d", " tokens"),
        ("response", sample.response_length, ",d", " tokens"),
    )  # fmt: skip
    shown = [NOTHING if value is None else _minus(f"{value:{form}}") + unit for _, value, form, unit in known]
    return "".join(f"<span>{name} {value}</span>" for (name, *_), value in zip(known, shown, strict=True))


def _prompt(sample: Sample) -> str:
    is_open = " open" if len(sample.prompt) <= OPEN_PROMPT else ""
    text = _text(escape(sample.prompt[:MOST_TEXT]), len(sample.prompt))
    return f'<details class="prompt"{is_open}><summary>Prompt</summary>{text}</details>'


def _response(sample: Sample) -> str:
    if not sample.response:
        return '<p class="soft">The response has no text.</p>'
    return _text(marked(sample.response[:MOST_TEXT], sample.largest_gaps), len(sample.response))


def _text(content: str, length: int) -> str:
    """Return a box with text as it is; ``content``: HTML of its first MOST_TEXT characters, length: of all of it."""
    rest = f'<p class="soft">… and {length - MOST_TEXT:,} more characters</p>' if length > MOST_TEXT else ""
    # The parser of HTML takes away a line feed right after <pre>: this one, not the text's own.
    return f'<pre dir="auto" tabindex="0">\n{content}</pre>{rest}'


def _list(gaps: Sequence[Gap]) -> str:
    """Return the tokens of the largest gaps with their numbers, largest first, folded."""
    lines = []
    for gap in sorted(gaps, key=lambda gap: -abs(gap.value)):
        place = "" if gap.start is not None else ", not in the text"
        shown = escape(gap.token.replace("\n", "↵")) or "no text"
        lines.append(
            f'<li><mark class="{_look([gap])}">{shown}</mark> {_signed(gap.value)} (token {gap.position}{place})</li>'
        )
    return (
        f'\n<details class="gaps"><summary>Largest gaps</summary><ul>{"".join(lines)}</ul></details>' if lines else ""
    )


def _signed(value: float) -> str:
    return _minus(f"{value:+.3g}")


def _minus(number: str) -> str:
    return number.replace("-", "−")
