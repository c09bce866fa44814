"""Marks in a chat template's own syntax tree, so that a rendering says where everything in it is.

Three kinds of output statements are added, each of which calls a filter of the recorder:
- at the head of every loop at the top level, and behind it: the recorder knows which message the
  loop is at, by identity, whatever the loop and its variable are called;
- where a message's tool calls begin: before the loop over them, or before the first expression that
  reads one. Constant text directly before (`<|tool_calls_section_begin|>`) counts with the calls;
- around the body of every `{% generation %}` block. The block itself then becomes a plain scope: as
  a call of a macro, which is what transformers makes of it, it takes three times as long.

Loops in macros, in blocks that are captured and in other loops get no message marks: what they
write belongs to the message that the outer loop is at.
"""

from collections.abc import Iterator, Sequence
from typing import Final, Literal

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

MESSAGE_FILTER: Final = "srft_prep_message"
END_FILTER: Final = "srft_prep_end"
CALLS_FILTER: Final = "srft_prep_calls"
OPEN_FILTER: Final = "srft_prep_open"
CLOSE_FILTER: Final = "srft_prep_close"

_TEXT_FIELDS: Final = frozenset(
    {"content", "reasoning_content", "thinking", "reasoning", "tool_plan"}
)
_First = Literal["nothing", "calls", "other"]


def add_marks(template: nodes.Template) -> int:
    """Add the marks to a template's tree and return the number of loops that got one."""
    marker = _Marker(_call_names(template))
    template.body = marker.top(template.body)
    for macro in template.find_all(nodes.Macro):
        macro.body = marker.generations(macro.body)
    _Inlined().visit(template)
    return marker.num_loops


class _Marker:
    def __init__(self, call_names: frozenset[str]) -> None:
        self.num_loops = 0
        self._call_names = call_names

    def top(self, body: list[nodes.Node]) -> list[nodes.Node]:
        """Mark statements outside all loops."""
        marked: list[nodes.Node] = []
        for node in body:
            marked.append(node)
            if isinstance(node, nodes.For):
                node.body = self.generations(self.calls(node.body))
                if isinstance(node.target, nodes.Name):
                    self.num_loops += 1
                    loaded = nodes.Name(node.target.name, "load")
                    node.body.insert(0, _mark(loaded, MESSAGE_FILTER))
                    marked.append(_mark(nodes.Const(None), END_FILTER))
            elif isinstance(node, nodes.If):
                node.body, node.else_ = self.top(node.body), self.top(node.else_)
                for branch in node.elif_:
                    branch.body = self.top(branch.body)
            elif isinstance(node, nodes.With | nodes.Scope | nodes.ScopedEvalContextModifier):
                node.body = self.top(node.body)
            elif isinstance(node, nodes.CallBlock) and _is_generation(node):
                node.body = _enclosed(self.top(node.body))
        return marked

    def generations(self, body: list[nodes.Node]) -> list[nodes.Node]:
        """Enclose the generation blocks of a loop's body."""
        for holder in body:
            for node in [holder, *holder.find_all(nodes.CallBlock)]:
                if isinstance(node, nodes.CallBlock) and _is_generation(node):
                    node.body = _enclosed(node.body)
        return body

    def calls(self, body: list[nodes.Node]) -> list[nodes.Node]:
        """Mark where a message's calls begin, in every branch; the recorder keeps the first."""
        for index, node in enumerate(body):
            if isinstance(node, nodes.For):
                if self._reads_calls(node.iter) and self._first(node.body) == "calls":
                    return self._before(body, index)
                node.body = self.calls(node.body)
            elif isinstance(node, nodes.If):
                node.body, node.else_ = self.calls(node.body), self.calls(node.else_)
                for branch in node.elif_:
                    branch.body = self.calls(branch.body)
            elif isinstance(node, nodes.CallBlock) and _is_generation(node):
                node.body = self.calls(node.body)
            elif isinstance(node, nodes.Output):
                place = self._place(node)
                if place == "start":
                    return self._before(body, index)
                if place == "inside":
                    return body
        return body

    def _before(self, body: list[nodes.Node], index: int) -> list[nodes.Node]:
        """Put the calls' mark before a statement and the constant text before that."""
        mark = _mark(nodes.Const(None), CALLS_FILTER)
        while index and isinstance(body[index - 1], nodes.Output | nodes.Assign):
            before = body[index - 1]
            if isinstance(before, nodes.Output):
                trailing = 0
                while trailing < len(before.nodes) and _is_constant(before.nodes[-1 - trailing]):
                    trailing += 1
                if trailing < len(before.nodes):
                    if trailing:
                        before.nodes.insert(len(before.nodes) - trailing, mark.nodes[0])
                        return body
                    break
            index -= 1
        return [*body[:index], mark, *body[index:]]

    def _place(self, output: nodes.Output) -> Literal["start", "inside", "none"]:
        """Mark the first operand of an output that reads a call, unless the output starts there."""
        for index, node in enumerate(output.nodes):
            operands = _operands(node)
            found = next((i for i, each in enumerate(operands) if self._reads_calls(each)), None)
            if found is None:
                continue
            if _reads_text(operands[found]):
                return "none"
            first = found
            while first and _is_constant(operands[first - 1]):
                first -= 1
            if first:
                output.nodes[index] = _joined(node, operands, first)
                return "inside"
            while index and _is_constant(output.nodes[index - 1]):
                index -= 1
            if not index:
                return "start"
            output.nodes.insert(index, _mark(nodes.Const(None), CALLS_FILTER).nodes[0])
            return "inside"
        return "none"

    def _first(self, body: Sequence[nodes.Node]) -> _First:
        """Return what statements write first: a call, or a message's text."""
        found: _First = "nothing"
        for node in body:
            if isinstance(node, nodes.Output):
                for operand in (each for child in node.nodes for each in _operands(child)):
                    if _reads_text(operand):
                        return "other"
                    if self._reads_calls(operand):
                        return "calls"
            elif isinstance(node, nodes.If):
                branches = [node.body, *(branch.body for branch in node.elif_), node.else_]
                firsts = {self._first(branch) for branch in branches}
                if "other" in firsts:
                    return "other"
                if firsts == {"calls"}:
                    return "calls"
                found = "calls" if "calls" in firsts else found
            elif isinstance(node, nodes.For | nodes.CallBlock):
                first = self._first(node.body)
                if first == "other":
                    return "other"
                found = "calls" if first == "calls" else found
        return found

    def _reads_calls(self, node: nodes.Node) -> bool:
        return any(_is_call_access(each, self._call_names) for each in _with_itself(node))


class _Inlined(NodeTransformer):
    """Makes generation blocks plain scopes, which write the same."""

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        """Return what stands in a call block's place."""
        self.generic_visit(node)
        return nodes.Scope(node.body, lineno=node.lineno) if _is_generation(node) else node


def _call_names(template: nodes.Template) -> frozenset[str]:
    """Return the variables that hold tool calls or what was taken from them."""
    names: set[str] = set()
    bindings = [(node.target, node.iter) for node in template.find_all(nodes.For)]
    bindings += [(node.target, node.node) for node in template.find_all(nodes.Assign)]
    size = -1
    while len(names) > size:
        size = len(names)
        for target, value in bindings:
            if any(_is_call_access(each, frozenset(names)) for each in _with_itself(value)):
                found = (each for each in _with_itself(target) if isinstance(each, nodes.Name))
                names.update(name.name for name in found)
    return frozenset(names)


def _is_call_access(node: nodes.Node, names: frozenset[str]) -> bool:
    return (
        (isinstance(node, nodes.Name) and node.name in names)
        or (isinstance(node, nodes.Getattr) and node.attr == "tool_calls")
        or (isinstance(node, nodes.Const) and node.value == "tool_calls")
    )


def _reads_text(node: nodes.Node) -> bool:
    return any(
        (isinstance(each, nodes.Name) and each.name in _TEXT_FIELDS)
        or (isinstance(each, nodes.Getattr) and each.attr in _TEXT_FIELDS)
        or (isinstance(each, nodes.Const) and each.value in _TEXT_FIELDS)
        for each in _with_itself(node)
    )


def _with_itself(node: nodes.Node) -> Iterator[nodes.Node]:
    yield node
    yield from node.find_all(nodes.Node)


def _is_constant(node: nodes.Node) -> bool:
    return not any(isinstance(each, nodes.Name | nodes.NSRef) for each in _with_itself(node))


def _is_generation(node: nodes.CallBlock) -> bool:
    return (
        isinstance(node.call.node, nodes.ExtensionAttribute)
        and node.call.node.name == "_generation_support"
    )


def _operands(node: nodes.Expr) -> list[nodes.Expr]:
    """Return the operands of `a + b + c` or `a ~ b ~ c`, or the node alone."""
    if isinstance(node, nodes.Add):
        return [*_operands_of_sum(node.left), node.right]
    if isinstance(node, nodes.Concat):
        return list(node.nodes)
    return [node]


def _operands_of_sum(node: nodes.Expr) -> list[nodes.Expr]:
    if isinstance(node, nodes.Add):
        return [*_operands_of_sum(node.left), node.right]
    return [node]


def _joined(node: nodes.Expr, operands: list[nodes.Expr], index: int) -> nodes.Expr:
    """Return the expression with the calls' mark before one of its operands, not the first."""
    mark = _mark(nodes.Const(None), CALLS_FILTER).nodes[0]
    if isinstance(node, nodes.Concat):
        return nodes.Concat([*operands[:index], mark, *operands[index:]])
    total = operands[0]
    for each in [*operands[1:index], mark, *operands[index:]]:
        total = nodes.Add(total, each)
    return total


def _enclosed(body: list[nodes.Node]) -> list[nodes.Node]:
    opening, closing = (_mark(nodes.Const(None), name) for name in (OPEN_FILTER, CLOSE_FILTER))
    return [opening, *body, closing]


def _mark(argument: nodes.Expr, name: str) -> nodes.Output:
    return nodes.Output([nodes.Filter(argument, name, [], [], None, None)])
