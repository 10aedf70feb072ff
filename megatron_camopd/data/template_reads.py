"""Names that a chat template reads: variables, and fields of messages.

Design choice: the names come from the template's syntax tree. A word search would also find those in comments, in
literal text and among the keywords of the language. A field counts as read if any part of the template asks for it, by
``message.name``, ``message["name"]``, ``message.get("name")`` or ``"name" in message``, of whatever may be a message: a
template can hand one on in too many ways to follow them all. Not a message are ``loop``, namespaces, tools, and what is
itself the value of a field, such as a tool call. Names of methods that are called are no fields.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser

_WHOLE = frozenset({"items", "values", "tojson", "string", "pprint", "dictsort", "xmlattr", "urlencode"})
"""Methods and filters that take every field of a message."""
_FIELD_FILTERS = frozenset(
    {"attr", "map", "selectattr", "rejectattr", "groupby", "sort", "sum", "unique", "max", "min"}
)
"""Filters that take the name of a field, as their first argument or as ``attribute``."""


class _GenerationTag(Extension):
    """The tag ``{% generation %}`` that transformers adds to the language of chat templates: its body alone."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the statements between the tag and its end."""
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


@dataclass(frozen=True, slots=True)
class TemplateReads:
    """Names that one chat template reads.

    Attributes:
        variables: names of the variables that it gets from outside and reads.
        fields: names of the fields that it reads of anything, such as a message.
        whole_messages: whether it takes messages as a whole, with all their fields.
        parsed: whether it could be parsed; if not, it counts as reading everything.
    """

    variables: frozenset[str]
    fields: frozenset[str]
    whole_messages: bool
    parsed: bool = True

    def reads_variable(self, name: str) -> bool:
        """Return whether the template reads the variable ``name``."""
        return not self.parsed or name in self.variables

    def reads_field(self, name: str) -> bool:
        """Return whether the template reads the field ``name`` of messages."""
        return not self.parsed or self.whole_messages or name in self.fields


def template_reads(template: str) -> TemplateReads:
    """Return what ``template`` reads; everything if it cannot be parsed, because rendering says what is wrong."""
    try:
        environment = Environment(extensions=["jinja2.ext.loopcontrols", _GenerationTag])
        tree = environment.parse(template)
        # The search for variables replaces expressions of constants in the tree it is given, so it gets its own.
        variables = frozenset(find_undeclared_variables(environment.parse(template)))
        return TemplateReads(variables, frozenset(_fields(tree, variables)), _takes_whole_messages(tree))
    except (TemplateError, RecursionError):
        return TemplateReads(frozenset(), frozenset(), whole_messages=True, parsed=False)


def _fields(tree: nodes.Template, variables: frozenset[str]) -> Iterator[str]:
    """Yield the names of the fields that a template reads of what may be a message."""
    called = {id(call.node) for call in tree.find_all(nodes.Call)}
    is_value = _Values(tree, variables)
    for node in tree.find_all((nodes.Getattr, nodes.Getitem, nodes.Call, nodes.Compare, nodes.Filter)):
        if isinstance(node, nodes.Getattr | nodes.Getitem):
            if id(node) not in called and not is_value(node.node):
                yield from [node.attr] if isinstance(node, nodes.Getattr) else _texts(node.arg)
        elif isinstance(node, nodes.Call):
            if isinstance(node.node, nodes.Getattr) and node.node.attr == "get" and not is_value(node.node.node):
                yield from _texts(*node.args[:1])
        elif isinstance(node, nodes.Compare):
            if any(operand.op in ("in", "notin") and not is_value(operand.expr) for operand in node.ops):
                yield from _texts(node.expr)
        elif isinstance(node, nodes.Filter) and node.name in _FIELD_FILTERS and not is_value(node.node):
            named = [pair.value for pair in node.kwargs if pair.key == "attribute"]
            yield from (text.split(".")[0] for text in _texts(*node.args[:1], *named))


class _Values:
    """Test for expressions that are no message: texts, tools, and values of fields."""

    def __init__(self, tree: nodes.Template, variables: frozenset[str]) -> None:
        """Find the names that only ever stand for such expressions.

        Args:
            tree: the template.
            variables: names of the variables that it gets from outside; all but the tools may be messages, also where
                the template gives them a new value, such as ``{% set messages = messages[1:] %}``.
        """
        self._macros = {macro.name for macro in tree.find_all(nodes.Macro)}
        pairs: list[tuple[nodes.Node, nodes.Node]] = [(loop.target, loop.iter) for loop in tree.find_all(nodes.For)]
        pairs += [(assignment.target, assignment.node) for assignment in tree.find_all(nodes.Assign)]
        bindings = [(target.name, value) for target, value in pairs if isinstance(target, nodes.Name)]
        times_seen = Counter(name for name, _ in bindings)
        times_bound = Counter(name.name for name in tree.find_all(nodes.Name) if name.ctx != "load")
        # A name that is also bound in another way, such as by a macro's parameters, may be a message.
        names = {name for name, times in times_bound.items() if times == times_seen[name]}
        self._scopes = {"loop"} | {name for name, value in bindings if _is_call_of(value, "namespace")}
        self._names = names | ({"tools"} - times_bound.keys())
        self._names -= (variables - {"tools"}) | {"messages"} | self._scopes
        while wrong := {name for name, value in bindings if name in self._names and not self(value)}:
            self._names -= wrong

    def __call__(self, node: nodes.Node | None) -> bool:
        """Return whether an expression is known to be no message."""
        if isinstance(node, nodes.Name):
            return node.name in self._names or node.name in self._scopes
        if isinstance(node, nodes.Getattr):
            return not self._is_scope(node.node)
        if isinstance(node, nodes.Getitem):
            is_field = any(True for _ in _texts(node.arg))
            return not self._is_scope(node.node) if is_field else self(node.node)
        if isinstance(node, nodes.Filter):
            return self(node.node)
        if isinstance(node, nodes.CondExpr):
            return self(node.expr1) and (node.expr2 is None or self(node.expr2))
        if isinstance(node, nodes.Add):
            return self(node.left) or self(node.right)
        if isinstance(node, nodes.Call):
            is_method = isinstance(node.node, nodes.Getattr) and self(node.node.node)
            return is_method or (isinstance(node.node, nodes.Name) and node.node.name in self._macros)
        if isinstance(node, nodes.Const):
            return isinstance(node.value, str | int | float | None)
        return isinstance(node, nodes.Concat | nodes.TemplateData)

    def _is_scope(self, node: nodes.Node) -> bool:
        """Return whether an expression is ``loop`` or a namespace, whose fields may be messages (loop.previtem)."""
        return isinstance(node, nodes.Name) and node.name in self._scopes


def _takes_whole_messages(tree: nodes.Template) -> bool:
    """Return whether a template writes, lists or passes on a message with all its fields."""
    lists, single = {"messages"}, set[str]()
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}

    def is_list(node: nodes.Node | None) -> bool:
        if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
            return is_list(node.node)
        if isinstance(node, nodes.Filter) and node.name in ("selectattr", "rejectattr", "reverse", "list"):
            return is_list(node.node)
        return isinstance(node, nodes.Name) and node.name in lists

    def is_message(node: nodes.Node | None) -> bool:
        if isinstance(node, nodes.Getitem) and not isinstance(node.arg, nodes.Slice):
            return is_list(node.node)
        if isinstance(node, nodes.Filter) and node.name in ("first", "last"):
            return is_list(node.node)
        return isinstance(node, nodes.Name) and node.name in single

    size = -1
    while size != len(lists) + len(single):  # until no name is found any more
        size = len(lists) + len(single)
        for loop in tree.find_all(nodes.For):
            if isinstance(loop.target, nodes.Name) and is_list(loop.iter):
                single.add(loop.target.name)
        for assignment in tree.find_all(nodes.Assign):
            if isinstance(assignment.target, nodes.Name):
                lists |= {assignment.target.name} if is_list(assignment.node) else set()
                single |= {assignment.target.name} if is_message(assignment.node) else set()
        for call in tree.find_all(nodes.Call):
            macro = macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
            for given, parameter in zip(call.args, macro.args if macro else (), strict=False):
                lists |= {parameter.name} if is_list(given) else set()
                single |= {parameter.name} if is_message(given) else set()

    def takes(node: nodes.Node) -> bool:
        if isinstance(node, nodes.Output):
            return any(is_message(part) or is_list(part) for part in node.nodes)
        if isinstance(node, nodes.Filter):
            return node.name in _WHOLE and (is_message(node.node) or is_list(node.node))
        if isinstance(node, nodes.Getattr):
            return node.attr in _WHOLE and is_message(node.node)
        return isinstance(node, nodes.For) and is_message(node.iter)

    return any(map(takes, tree.find_all((nodes.Output, nodes.Filter, nodes.Getattr, nodes.For))))


def _is_call_of(node: nodes.Node, name: str) -> bool:
    return isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name) and node.node.name == name


def _texts(*values: nodes.Node) -> Iterator[str]:
    """Yield the values that are constant texts."""
    for value in values:
        if isinstance(value, nodes.Const) and isinstance(value.value, str):
            yield value.value
