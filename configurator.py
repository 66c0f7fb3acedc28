"""Dataclass + config files + --key=value -> a checked config.

    @dataclass
    class Config:
        max_steps: int = 1000  # optimizer steps of the whole run

    (settings,) = configure(__doc__, sys.argv[1:], Config)
    cfg = Config(**settings)

Arguments are read from left to right and a later one wins: config files (`config/demo.py`: a Python program whose
public names are keys) and `--key=value` or `--key value`; a bare `--flag` sets a bool. The dataclass is the whole
truth: a key is a field, its annotation the type, the comment behind it the text of `--help`. A name that is no field
is an error, in a config file too: a typo never makes a new setting silently.
"""

import ast
import dataclasses
import difflib
import inspect
import io
import math
import runpy
import sys
import textwrap
import tokenize
import types
import typing
from typing import Annotated

from errors import ConfigError, UserError

WORDS = {"true": True, "false": False, "1": True, "0": False}  # what a bool may be on the command line


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers that a setting may be: `seq_len: Annotated[int, Range(1)]`. Said in words by `problems`."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False  # low itself is not allowed
    open_high: bool = False

    def __contains__(self, number):
        above = number > self.low if self.open_low else number >= self.low
        return above and (number < self.high if self.open_high else number <= self.high)

    def __str__(self):
        if self.high < math.inf:
            return f"must lie in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"
        if self.low == 0:
            return "must be positive" if self.open_low else "must not be negative"
        return f"must be at least {self.low:g}"


Count = Annotated[int, Range(1)]  # 1, 2, 3 …
Amount = Annotated[int, Range(0)]  # a count, or 0 for none
Positive = Annotated[float, Range(0, open_low=True)]
NonNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]


def problems(cfg) -> list[str]:
    """What is wrong with the values of a dataclass: each field that leaves its Literal or its Range, in one line each.

    A list, or one value in place of a list, is checked item by item; None passes where the annotation allows it.
    """
    found = []
    for key, want in typing.get_type_hints(type(cfg), include_extras=True).items():
        value = getattr(cfg, key)
        if value is not None and not fits(value, want):
            found.append(f"{key}={value!r} {limits(want)}")
    return found


def fits(value, want) -> bool:
    """Whether a value of the right type is within the Literals and Ranges of the annotation `want`."""
    origin, args = typing.get_origin(want), typing.get_args(want)
    if origin is typing.Literal:
        return value in args
    if origin is Annotated:
        return all(value in limit for limit in args[1:])
    if origin in (typing.Union, types.UnionType):
        lists = isinstance(value, list | tuple)
        meant = [option for option in args if (typing.get_origin(option) in (list, tuple)) == lists]
        return any(fits(value, option) for option in meant if option is not types.NoneType)
    if origin in (list, tuple) and isinstance(value, list | tuple):
        each = [option for option in args if option is not Ellipsis]
        return all(fits(item, each[min(i, len(each) - 1)]) for i, item in enumerate(value))
    return True


def limits(want) -> str:
    """The first Literal or Range of an annotation, in words."""
    if typing.get_origin(want) is typing.Literal:
        return f"is not one of {', '.join(map(str, typing.get_args(want)))}"
    if typing.get_origin(want) is Annotated:
        return str(want.__metadata__[0])
    return next(filter(None, map(limits, typing.get_args(want))), "")


def convert(value, want, text=False):
    """`value` as the annotated type `want`, or ValueError.

    An int passes for a float and 1e4 for an int; a list may be given as one value. With `text`, `value` is a string
    from the command line: `1e-4`, `true`, `none`, `a,b,c`, or a Python literal where a list or dict is wanted.
    """
    origin, args = typing.get_origin(want), typing.get_args(want)
    if origin in (typing.Union, types.UnionType):
        for option in sorted(args, key=lambda t: t is str):  # str last: it takes any text
            try:
                return convert(value, option, text)
            except ValueError:
                pass
    elif origin is typing.Literal:
        if value in args:
            return value
    elif want in (list, tuple) or origin in (list, tuple):
        kind = origin or want
        if text and value[:1] in ("[", "("):
            value, text = literal(value), False
        elif text:
            value = [item.strip() for item in value.split(",")] if value else []
        items = value if isinstance(value, (list, tuple)) else [value]
        each = args if kind is tuple and Ellipsis not in args else args[:1] * len(items)
        if not args or len(each) == len(items):
            return kind(convert(v, t, text) for v, t in zip(items, each, strict=True)) if args else kind(items)
    elif want is types.NoneType:
        if value is None or (text and value.lower() == "none"):
            return None
    elif want is bool:
        value = WORDS.get(value.lower(), value) if text else value
        if isinstance(value, bool):
            return value
    elif want in (int, float):
        if text:
            value = int(value) if value.lstrip("+-").replace("_", "").isdigit() else float(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if want is float and not math.isnan(value):  # a NaN setting helps nobody
                return float(value)
            if want is int and value == value // 1:
                return int(value)
    elif want is str or want is typing.Any:
        if isinstance(value, str) or want is typing.Any:
            return value
    else:
        value = literal(value) if text else value
        if isinstance(value, origin or want):
            return value
    raise ValueError(f"{value!r} is not {spell(want)}")


def literal(text):
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise ValueError(f"{text!r} is no Python literal") from None


def spell(want):
    return want.__name__ if isinstance(want, type) and not typing.get_args(want) else str(want).replace("typing.", "")


def configure(doc, argv, *schemas, positional=None):
    """Read `argv` against the dataclasses `schemas`; one dict per dataclass of the values explicitly set, converted.

    A key that stands in several dataclasses is set in each. `positional` names the list field that takes arguments
    which are neither config files nor keys. `--help` prints `doc` and every key, and exits 0.
    Raises ConfigError naming every bad argument at once.
    """
    fields = [
        {f.name: hint[f.name] for f in dataclasses.fields(schema)}  # key -> annotation, for each dataclass
        for schema in schemas
        for hint in [typing.get_type_hints(schema)]
    ]
    types_of = {key: want for known in fields for key, want in known.items()}
    if "--help" in argv or "-h" in argv:
        print_help(doc, schemas, fields)
        sys.exit(0)

    reader = Reader(types_of, fields, [{} for _ in schemas])
    arguments, rest = list(argv), []
    while arguments:
        arg = arguments.pop(0)
        if arg.startswith("--"):
            reader.key(arg[2:], arguments)
        elif arg.endswith(".py"):
            reader.file(arg)
        elif positional:
            rest.append(arg)
        else:
            reader.problems.append(f"{arg!r} is neither a config file (*.py) nor --key=value")
    if rest:
        reader.put(positional, rest, False, positional)
    if reader.problems:
        raise ConfigError("; ".join(reader.problems))
    return reader.settings


@dataclasses.dataclass
class Reader:
    """Puts one argument after another into `settings`, or a line into `problems`."""

    types_of: dict  # key -> annotation, of all dataclasses
    fields: list[dict]  # the same for each dataclass
    settings: list[dict]  # key -> value, for each dataclass
    problems: list[str] = dataclasses.field(default_factory=list)

    def put(self, key, value, text, where):
        """`value` of `key`; text: it is a string of the command line. where: how a message names it."""
        if key not in self.types_of:
            near = difflib.get_close_matches(key, self.types_of, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else "--help lists them"
            self.problems.append(f"{where}: unknown key; {hint}")
            return
        for known, chosen in zip(self.fields, self.settings, strict=True):
            if key not in known:
                continue
            try:
                chosen[key] = convert(value, known[key], text)
            except (ValueError, OverflowError):
                choice = isinstance(value, str) and "Literal[" in str(known[key])
                wrong = f"{key}={value!r} {limits(known[key])}" if choice else None
                self.problems.append(wrong or f"{where}: {value!r} is not {spell(known[key])}")
                return

    def key(self, argument, following):
        """`key=value`, or `key` whose value is the first of the arguments that follow; a bool needs none."""
        key, equals, value = argument.partition("=")
        if equals:
            pass
        elif self.types_of.get(key) is bool:
            value = following.pop(0) if following and following[0].lower() in WORDS else "true"
        elif key in self.types_of:
            if not following or following[0].startswith("--"):
                self.problems.append(f"--{key}: a value is missing, as in --{key}=…")
                return
            value = following.pop(0)
        elif following and not following[0].startswith("--") and not following[0].endswith(".py"):
            following.pop(0)  # the value of an unknown key: not a second error
        self.put(key, value, True, f"--{key}")

    def file(self, path):
        """A config file: the public names that it defines."""
        try:
            names = runpy.run_path(path)
        except Exception as e:  # noqa: BLE001, it is the user's own program: anything can happen
            self.problems.append(f"config file {path}: {type(e).__name__}: {e}")
            return
        for name, value in names.items():
            helper = name.startswith("_") or callable(value) or inspect.ismodule(value)
            if name in self.types_of or not helper:
                self.put(name, value, False, f"{path}: {name}")


def comments_of(schema):
    """{field: the comment behind it} of a dataclass, from the sources of the class and its bases."""
    meaning = {}
    for base in schema.__mro__[-2::-1]:
        source = textwrap.dedent(inspect.getsource(base))
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
        nodes = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]
        meaning |= {node.target.id: comments.get(node.end_lineno, "") for node in nodes}
    return meaning


def print_help(doc, schemas, fields):
    print(doc.strip() + "\n")
    seen = set()
    for schema, known in zip(schemas, fields, strict=True):
        print(f"{schema.__name__}:")
        meaning = comments_of(schema)
        for field in dataclasses.fields(schema):
            if field.name in seen:
                continue
            seen.add(field.name)
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            shown = f"required, {spell(known[field.name])}" if default is dataclasses.MISSING else repr(default)
            print(f"  --{field.name}={shown}".ljust(40) + f"  {meaning.get(field.name, '')}".rstrip())
        print()


def cli(main):
    """Run `main(sys.argv[1:])`; a UserError or an OSError is one line on stderr and status 2."""
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError) as e:
        print("error: " + " ".join(str(e).split()), file=sys.stderr)
        sys.exit(2)
