"""Chat templates: Jinja source that comes with a model, so code from a stranger.

It runs in Jinja's immutable sandbox with what transformers gives it (`raise_exception`, `strftime_now`,
`tojson`, loop controls, `{% generation %}`), sees plain data only, and is bounded: the work it does, the
size of each value it makes and the length of its output have limits, so that a damaged or hostile
template ends in an error and not in a machine without memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextvars import ContextVar
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, Any

from gossamer.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["render"]

_MAX_SOURCE = 1 << 20  # characters of a template; real ones stay under 50,000
_MAX_SIZE = 1 << 24  # characters and items of one value, and characters of the output
_MAX_WORK = 2_000_000  # one for an iteration, a call or 64 characters handled: a second or two at most
_MAX_BITS = 4096  # of a whole number
_MAX_NUMBER = 100_000  # given to a filter or method: a width, a count

# These read one item or the length; to weigh a conversation for each of them would make long ones slow.
_CHEAP_FILTERS = frozenset({"count", "d", "default", "first", "last", "length"})
# Filters and methods no prompt needs, whose result can be far larger than what they are given.
_LEFT_OUT = frozenset({"batch", "center", "pprint", "slice", "urlize", "wordwrap", "xmlattr"})
_GROWING = frozenset({"center", "expandtabs", "format_map", "ljust", "rjust", "translate", "zfill"})

_work_left: ContextVar[list[int]] = ContextVar("work_left")  # [units], of the rendering in progress


def render(
    template: str | None,
    messages: list[dict[str, Any]],
    *,
    add_generation_prompt: bool = True,
    bos_token: str = "",
    eos_token: str = "",
    tools: list[dict[str, Any]] | None = None,
    **extra: Any,
) -> str:
    """The prompt text of a conversation, as the model's template spells it.

    messages: dicts with "role" and "content". add_generation_prompt: end where the answer begins. extra:
    further variables of the template (enable_thinking, ...). The text holds special tokens spelled out
    and may begin with bos_token: encode it with special=True.

    UsageError: no template, or messages that are not plain data. CheckpointError: the template is damaged,
    refuses the conversation, or does more work than a prompt needs.
    """
    if template is None:
        raise UsageError("this model has no chat template; let it continue plain text with --raw")
    variables = {
        "messages": _plain(messages, "messages"),
        "tools": _plain(tools, "tools"),
        "add_generation_prompt": add_generation_prompt,
        "bos_token": bos_token,
        "eos_token": eos_token,
        **{name: _plain(value, name) for name, value in extra.items()},
    }
    before = _work_left.set([_MAX_WORK])
    try:
        pieces, length = [], 0
        for piece in _compile(template).generate(variables):
            length += len(piece)
            _check(length <= _MAX_SIZE, f"its output is longer than {_MAX_SIZE} characters")
            pieces.append(piece)
        return "".join(pieces)
    except Exception as err:
        raise CheckpointError(_explain(err)) from None
    finally:
        _work_left.reset(before)


class _RefusedError(Exception):
    """Raised by the template itself, through raise_exception."""


class _TooMuchError(Exception):
    """More work or memory than a template may use."""


def _explain(err: Exception) -> str:
    reason = " ".join(str(err).split()).rstrip(".")[:300] or type(err).__name__
    if isinstance(err, _RefusedError):
        return f"the chat template refuses this conversation: {reason}; change the messages, or use --raw"
    number = getattr(err, "lineno", None)  # of a syntax error
    line = f" (line {number})" if number else ""
    return f"the chat template cannot be rendered{line}: {reason}; mend the template, or use --raw"


def _plain(value: Any, name: str) -> Any:
    """A copy made of plain types, so that a template finds no object with methods of its own."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, name) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, name) for item in value]
    raise UsageError(
        f"'{name}' holds a {type(value).__name__}; a chat template takes text, numbers, lists and dictionaries only"
    )


# Limits.


def _check(allowed: bool, reason: str) -> None:
    if not allowed:
        raise _TooMuchError(reason)


def _check_size(size: int) -> None:
    _check(size <= _MAX_SIZE, f"it makes a value of more than {_MAX_SIZE} characters or items")


def _charge(units: int) -> None:
    left = _work_left.get()
    left[0] -= units
    _check(left[0] >= 0, "it does far more work than a prompt needs")


def _weigh(*values: Any) -> int:
    """Characters and items in values, a nested one each time it occurs; refused if too many, and charged."""
    size, steps, todo = 0, 0, list(values)
    while todo:
        value = todo.pop()
        steps += 1
        if isinstance(value, str):
            size += len(value)
        elif isinstance(value, dict):
            size += 2 * len(value)
            todo += value
            todo += value.values()
        elif isinstance(value, (list, tuple)):
            size += len(value)
            todo += value
        elif isinstance(value, int):
            _check(value.bit_length() <= _MAX_BITS, "it makes a number without bounds")
        _check_size(size)
        if steps == 1024:  # a list of lists of lists is short to write and endless to walk
            _charge(steps)
            steps = 0
    _charge(steps + size // 64)
    return size


def _check_numbers(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, (int, float)):
            _check(abs(value) <= _MAX_NUMBER, f"it gives a filter or method a number above {_MAX_NUMBER}")


def _check_replace(text: str, old: str, new: str) -> None:
    _check_size(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


def _check_format(pattern: str, values: Any) -> None:
    # A width fills memory with spaces, and one value can be named many times.
    _check(not re.search(r"\d{5}|%[^%a-zA-Z]*\*|:[^}]*\{", pattern), "it formats to a width without bounds")
    _check_size((pattern.count("%") + pattern.count("{")) * _weigh(values))


# What a template can call.


def _range(*bounds: int) -> range:
    values = range(*bounds)
    _charge(len(values))
    return values


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: object = "") -> None:
    raise _RefusedError(str(message))


def _strftime_now(format: str) -> str:
    from datetime import datetime

    _check(len(format) <= 256 and not re.search(r"\d{3}", format), "it asks for a date of unbounded length")
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which a prompt must not.
    _check(indent is None or indent in range(17), "'tojson' takes an indent of 0 to 16")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    _check_replace(text, old, new)
    return str(text.replace(old, new, -1 if count is None else count))


def _limited(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A filter whose arguments and result are weighed."""

    @wraps(function)  # keeps the marks by which Jinja knows what to pass
    def limited(*args: Any, **kwargs: Any) -> Any:
        values = [*args, *kwargs.values()]
        size = _weigh(*values)
        _check_numbers(values if name not in ("abs", "float", "int", "round", "string") else values[1:])
        if name == "format":
            _check_format(str(args[0]), values[1:])
        elif name == "indent":
            widths = [len(v) if isinstance(v, str) else int(v) for v in values[1:2]]
            _check_size((str(args[0]).count("\n") + 1) * max([*widths, 4]))
        elif name == "join":  # the first argument is Jinja's own
            items = args[1] if isinstance(args[1], Sized) else list(args[1])
            args = (args[0], items, *args[2:])
            _check_size(_weigh(items) + len(items) * size)
        result = function(*args, **kwargs)
        _weigh(result)
        return result

    return limited


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    from jinja2 import nodes, pass_context
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}` marks what the model wrote, for training; here its body is simply rendered."""

        tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class Names(Namespace):
        """A namespace without underscores, behind which the sandbox keeps its marks."""

        def __init__(*args: Any, **kwargs: Any) -> None:  # no name for self: a template may set one
            for name in dict(*args[1:], **kwargs):
                _allow_name(name)
            Namespace.__init__(*args, **kwargs)

        def __setitem__(self, name: str, value: Any) -> None:
            _allow_name(name)
            super().__setitem__(name, value)

    def _allow_name(name: object) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace takes no name that begins with an underscore, such as {name}")

    class Bounded(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"+", "*", "**", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "%" and isinstance(left, str):
                _check_format(left, right)
            elif isinstance(left, int) and isinstance(right, int) and operator in ("*", "**"):
                bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
                _check(bits <= _MAX_BITS, "it makes a number without bounds")
            else:
                lengths = [len(v) for v in (left, right) if isinstance(v, (str, list, tuple))]
                times = [v for v in (left, right) if isinstance(v, int)] if operator == "*" else []
                size = sum(lengths) * max([*times, 1])
                _check_size(size)
                _charge(1 + size // 64)
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
            if getattr(obj, "__func__", None) is Bounded.counted:
                return obj(*args)
            values = [*args, *kwargs.values()]
            bound = getattr(obj, "__wrapped__", obj)  # str.format comes wrapped
            text = getattr(bound, "__self__", None)
            name = getattr(bound, "__name__", "")
            _weigh(*values, text)
            if isinstance(text, str):
                if name in _GROWING:
                    raise SecurityError(f"the method '{name}' is left out, since its result has no bounds")
                _check_numbers(values)
                if name == "replace" and len(args) >= 2:
                    _check_replace(text, str(args[0]), str(args[1]))
                elif name == "format":
                    _check_format(text, values)
                elif name == "join" and args:
                    args = (list(args[0]),)
                    _check_size(_weigh(*args) + len(args[0]) * len(text))
            return super().call(context, obj, *args, **kwargs)

        def counted(self, items: Iterable[Any]) -> Iterator[Any]:
            """The items of a loop, each one charged."""
            for item in items:
                _charge(1)
                yield item

        def concatenated(self, *parts: Any) -> str:
            """What `a ~ b` gives."""
            return "".join(map(str, parts))  # weighed by `call`

        @staticmethod
        def concat(parts: Iterable[str]) -> str:
            """What a macro or a `set` block gathers."""
            pieces = list(parts)
            size = sum(map(len, pieces))
            _check_size(size)
            _charge(size // 64)
            return "".join(pieces)

    @pass_context  # with a context there is nothing to work out while compiling
    def weighed(context: Any, value: Any) -> Any:
        _weigh(value)
        return value

    env = Bounded(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,
        finalize=weighed,
        extensions=["jinja2.ext.loopcontrols", Generation],
    )
    env.filters.update(tojson=_tojson, replace=_replace)
    for name, function in list(env.filters.items()):
        if name in _LEFT_OUT:
            del env.filters[name]
        elif name not in _CHEAP_FILTERS:
            env.filters[name] = _limited(function, name)
    del env.globals["lipsum"]
    env.globals.update(
        range=_range,
        dict=_dict,
        namespace=Names,
        raise_exception=_raise_exception,
        strftime_now=_strftime_now,
    )
    return env


@lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    """The template, with its loops and `~` going through the methods that count."""
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    _check(len(source) <= _MAX_SOURCE, f"it is longer than {_MAX_SOURCE} characters")
    env = _environment()

    class Counting(NodeTransformer):
        def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - the visitor's naming
            self.generic_visit(node)
            node.iter = through("counted", node.iter)
            return node

        def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
            self.generic_visit(node)
            return through("concatenated", *node.nodes)

    def through(method: str, *args: nodes.Node) -> nodes.Call:
        return nodes.Call(nodes.EnvironmentAttribute(method), list(args), [], None, None, lineno=args[0].lineno)

    tree = Counting().visit(env.parse(source)).set_environment(env)
    return env.template_class.from_code(env, env.compile(tree), env.make_globals(None))
