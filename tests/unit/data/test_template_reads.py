"""The names that a chat template reads: those of its expressions, not the words of its source."""

import pytest

from megatron_camopd.data.template_reads import template_reads

LOOP = "{% for message in messages %}{{ message.role }}: {{ message['content'] }}"


@pytest.mark.parametrize(
    ("template", "read"),
    [
        ("{{ message.thoughts }}", "thoughts"),
        ("{{ message['loss mask'] }}", "loss mask"),
        ("{{ message.get('mood', 'good') }}", "mood"),
        ("{% if 'image' in message %}x{% endif %}", "image"),
        ("{% if 'image' not in message %}x{% endif %}", "image"),
        ("{{ message.content.split('x')[0] }}", "content"),
        ("{% if message.name is defined and message.name is not none %}{% endif %}", "name"),
        ("{% for call in message.tool_calls %}{% endfor %}", "tool_calls"),
        ("{{ messages | map(attribute='mood') | join }}", "mood"),
        ("{{ messages | selectattr('visible', 'equalto', 'a') | list | length }}", "visible"),
        ("{{ message | attr('deep') }}", "deep"),
        ("{{ messages | sort(attribute='order.first') | length }}", "order"),
        ("{% generation %}{{ message.inner }}{% endgeneration %}", "inner"),
        ("{% macro show(m) %}{{ m.hidden }}{% endmacro %}{{ show(message) }}", "hidden"),
        ("{% set turn = messages[0] %}{{ turn.opening }}", "opening"),
        ("{% set rest = messages[1:] %}{% for m in rest %}{{ m.later }}{% endfor %}", "later"),
        ("{{ loop.previtem.before }}{{ loop.nextitem['x'] }}", "before"),
        ("{% set ns = namespace(m=messages[0]) %}{{ ns.m.kept }}", "kept"),
        ("{% set m = message.content %}{% set m = message %}{{ m.either }}", "either"),
        ("{% for m in messages if m.shown %}{% endfor %}", "shown"),
        ("{% set tools = messages[1:] %}{% for m in tools %}{{ m.odd }}{% endfor %}", "odd"),
        ("{% if message.a %}{% continue %}{% endif %}", "a"),
    ],
)
def test_fields_that_are_read(template: str, read: str) -> None:
    found = template_reads(LOOP + template + "{% endfor %}")
    assert found.parsed and not found.whole_messages
    assert found.reads_field(read) and found.reads_field("role") and found.reads_field("content")
    assert not template_reads(LOOP + "{% endfor %}").reads_field(read) or read == "content"


@pytest.mark.parametrize(
    "rest",
    [
        "messages[1:]", "messages | list", "[] + messages", "messages[1:] if messages[0].role == 'x' else messages",
        "(messages | list)[:-1]", "messages if messages else []", "[messages[0]] + messages[1:]",
    ],
)  # fmt: skip
@pytest.mark.parametrize("also", ["", "{% set all = messages %}{% set messages = all[1:] %}"])
def test_a_template_that_gives_messages_a_new_value_still_reads_their_fields(rest: str, also: str) -> None:
    found = template_reads(
        "{% if not tools is defined %}{% set tools = none %}{% endif %}"
        "{% if messages[0].role == 'system' %}{% set m = 1 %}"
        f"{{% set messages = {rest} %}}{{% endif %}}{also}{LOOP}"
        "{% if 'tool_calls' in message %}{{ message.tool_calls[0].function.name }}{% endif %}{% endfor %}"
        "{% for tool in tools %}{{ tool.mood }}{% endfor %}"
    )
    assert found.parsed and not found.whole_messages and found.fields == {"role", "content", "tool_calls"}


def test_a_name_that_is_empty_first_may_hold_messages() -> None:
    found = template_reads(
        "{% set turns = [] %}{% set turns = turns + messages %}{{ turns[0].mood }}{{ turns[0].role }}"
    )
    assert found.fields == {"mood", "role"}
    found = template_reads("{% set ns = namespace(turns=messages) %}{{ ns['turns'][0].mood }}")
    assert found.fields >= {"mood"}


@pytest.mark.parametrize(
    "word",
    ["", "message", "messages", "if", "for", "in", "endfor", "add_generation_prompt", "assistant", "hidden", "split",
     "strip", "index0", "last", "turn", "role ", "Role", "why", "not", "user", "namespace", "loop", "tools"],
)  # fmt: skip
def test_words_that_are_no_fields(word: str) -> None:
    template = (
        "{# hidden #}{% set ns = namespace(last=-1, turn=0) %}" + LOOP + "assistant hidden why"
        "{% if message.role == 'user' and 'why' in message.content and 'why' in message['content'] %}"
        "{% set ns.last = loop.index0 %}{{ ns.turn }}{{ loop.last }}{{ message.content.split('why')[-1].strip() }}"
        "{% endif %}{% endfor %}{% if tools and add_generation_prompt %}assistant{% endif %}"
    )
    found = template_reads(template)
    assert not found.reads_field(word) and found.fields == {"role", "content"}
    assert found.variables == {"messages", "tools", "add_generation_prompt"}


@pytest.mark.parametrize(
    "template",
    [
        "{% for call in message.tool_calls %}{{ call.name }}{{ call['function'].type }}{% endfor %}",
        "{% for call in message['tool_calls'] %}{% set call = call.function %}{{ call.name }}{% endfor %}",
        "{{ message.tool_calls[0].function.name }}{{ message['tool_calls'][0]['type'] }}",
        "{% for tool in tools %}{{ tool.name }}{{ tool.function.type }}{{ tool.get('function') }}{% endfor %}",
        "{% set content = '' %}{% set content = message.content if message.content else '' %}{{ content.name }}",
        "{% for part in message.content %}{{ part['type'] }}{% if 'name' in part %}{% endif %}{% endfor %}",
        "{% set text = message.content | trim %}{% if 'name' in text %}{{ text.split('function')[0].type }}{% endif %}",
        "{% set text = '<' + message.content %}{% if 'name' in text %}{% endif %}",
        "{{ tools | map(attribute='function.name') | join }}",
        "{{ loop.name }}{% set ns = namespace(type=1) %}{{ ns.type }}",
    ],
)
def test_fields_of_tool_calls_and_tools_are_no_fields_of_messages(template: str) -> None:
    found = template_reads(LOOP + template + "{% endfor %}")
    assert found.parsed and found.fields <= {"role", "content", "tool_calls"}
    for name in ("name", "function", "type"):
        assert not found.reads_field(name)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | tojson }}",
        "{% for m in messages[1:] %}{{ m | tojson(indent=2) }}{% endfor %}",
        "{% set rest = messages[1:] %}{% for m in rest %}{% for key, value in m.items() %}x{% endfor %}{% endfor %}",
        "{% for m in messages %}{{ m }}{% endfor %}",
        "{% set first = messages[0] %}{% for key in first %}{{ first[key] }}{% endfor %}",
        "{% macro show(x) %}{{ x | tojson }}{% endmacro %}{% for m in messages %}{{ show(m) }}{% endfor %}",
        "{{ (messages | last) | string }}",
        "{% for m in messages | reverse %}{{ m | dictsort }}{% endfor %}",
    ],
)
def test_messages_that_are_taken_whole(template: str) -> None:
    found = template_reads(template)
    assert found.parsed and found.whole_messages and found.reads_field("anything")


@pytest.mark.parametrize(
    "template",
    ["{{ messages[0].content }}", "{{ tools | tojson }}",
     "{% for c in messages[0].tool_calls %}{{ c | tojson }}{% endfor %}",
     "{{ messages | length }}", "{% macro show(x) %}{{ x | tojson }}{% endmacro %}{{ show(tools) }}"],
)  # fmt: skip
def test_messages_that_are_not_taken_whole(template: str) -> None:
    assert not template_reads(template).reads_field("anything")


@pytest.mark.parametrize("template", ["{{ oops( }}", "{% for m in messages %}", "{{ " + "(" * 5000 + " }}"])
def test_a_template_that_cannot_be_parsed_reads_everything(template: str) -> None:
    found = template_reads(template)
    assert not found.parsed and found.reads_field("a") and found.reads_variable("tools")


def test_variables_that_a_template_sets_only_if_they_are_missing() -> None:
    found = template_reads("{% if not tools is defined %}{% set tools = none %}{% endif %}{% if tools %}{% endif %}")
    assert found.reads_variable("tools") and not found.reads_variable("documents")
