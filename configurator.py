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

A Literal or a Range in an annotation says which values may be: `problems(self)` in __post_init__ lists those that may not.
"""

import ast
import contextlib
import dataclasses
import difflib
import glob
import inspect
import math
import os
import runpy
import sys
import textwrap
import types
import typing
from typing import Annotated

from errors import ConfigError, UserError

WORDS = {"true": True, "false": False, "1": True, "0": False}  # what a bool may be on the command line
UNIONS = (typing.Union, types.UnionType)  # Optional[X] and X | None


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers that a setting may be: `seq_len: Annotated[int, Range(1)]`. Said in words by `problems`."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False  # low itself is not allowed
    open_high: bool = False

    def __contains__(self, number):
        above = number > self.low if self.open_low else number >= self.low
        below = number < self.high if self.open_high else number <= self.high
        return above and below

    def __str__(self):
        if self.high < math.inf:
            left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
            return f"must lie in {left}{self.low:g}, {self.high:g}{right}"
        if self.low == 0:
            finite = ", and finite" if self.open_high else ""
            return ("must be positive" if self.open_low else "must not be negative") + finite
        return f"must be {'above' if self.open_low else 'at least'} {self.low:g}"


Count = Annotated[int, Range(1)]  # 1, 2, 3 …
Amount = Annotated[int, Range(0)]  # a count, or 0 for none
Positive = Annotated[float, Range(0, open_low=True)]
NonNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
Seed = Annotated[int, Range(0, 2**63 - 1)]


def problems(cfg) -> list[str]:
    """What is wrong with the values of a dataclass: each field that leaves its Literal or its Range, in one line each.

    A list, or one value in place of a list, is checked item by item; None passes everywhere.
    """
    return out_of_limits(type(cfg), vars(cfg))


def out_of_limits(schema, values: dict) -> list[str]:
    """The same of some {key: value} of a dataclass."""
    found = []
    for key, want in typing.get_type_hints(schema, include_extras=True).items():
        value, allowed = values.get(key), limits(want)
        if value is None or not allowed:
            continue
        try:
            convert(value, want)
        except (ValueError, OverflowError):
            found.append(f"{key}={value!r} {allowed}")
    return found


def limits(want) -> str:
    """The first Literal or Range of an annotation, in words; empty where it has none."""
    if typing.get_origin(want) is typing.Literal:
        return f"is not one of {', '.join(map(str, typing.get_args(want)))}"
    if typing.get_origin(want) is Annotated:
        return str(want.__metadata__[0])
    found = next(filter(None, map(limits, typing.get_args(want))), "")
    return f"{found}, true, false" if found and bool in typing.get_args(want) else found


def convert(value, want, text=False):
    """`value` as the annotated type `want`, within its Literals and Ranges, or ValueError.

    An int passes for a float and 1e4 for an int; a list may be given as one value. With `text`, `value` is a string
    from the command line: `1e-4`, `true`, `none`, `a,b,c`, or a Python literal where a list or dict is wanted.
    """
    kind, args = typing.get_origin(want) or want, typing.get_args(want)
    if kind is Annotated:
        value = convert(value, args[0], text)
        if all(value in allowed for allowed in args[1:]):
            return value
    elif kind in UNIONS:
        for option in sorted(args, key=lambda option: option is str):  # str last: it takes any text
            with contextlib.suppress(ValueError):
                return convert(value, option, text)
    elif kind in (list, tuple):
        return convert_items(value, want, text)
    else:
        value = from_text(value, kind) if text else value
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if kind is float and number and not math.isnan(value):  # a NaN setting helps nobody
            return float(value)
        if kind is int and number and value == value // 1:
            return int(value)
        if kind is typing.Literal and value in args:
            return value
        if kind not in (int, float, typing.Literal) and isinstance(value, kind):
            return value
    raise ValueError(f"{value!r} is not {spell(want)}")


def convert_items(value, want, text):
    """`value` as a list or tuple type, its items converted, or ValueError."""
    kind, args = typing.get_origin(want) or want, typing.get_args(want)
    if text and value[:1] in ("[", "("):
        value, text = literal(value), False
    elif text:
        value = [item.strip() for item in value.split(",") if item.strip()]
    items = value if isinstance(value, list | tuple) else [value]
    types_of_items = args if kind is tuple else args * len(items)
    if len(types_of_items) != len(items):
        raise ValueError(f"{value!r} is not {spell(want)}")
    return kind(convert(item, type_, text) for item, type_ in zip(items, types_of_items, strict=True))


def from_text(text, kind):
    """What `text` of the command line stands for where a `kind` is wanted; ValueError where it stands for nothing."""
    if kind is types.NoneType:
        return None if text.lower() == "none" else text
    if kind is bool:
        return WORDS.get(text.lower(), text)
    if kind in (int, float):
        return int(text) if text.lstrip("+-").replace("_", "").isdigit() else float(text)
    return text if kind in (str, typing.Literal) else literal(text)


def literal(text):
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise ValueError(f"{text!r} is no Python literal") from None


def spell(want):
    if want is types.NoneType:
        return "None"
    if typing.get_origin(want) in UNIONS:
        return " | ".join(map(spell, typing.get_args(want)))
    return want.__name__ if isinstance(want, type) and not typing.get_args(want) else str(want).replace("typing.", "")


def configure(doc, argv, *schemas, positional=None):
    """Read `argv` against the dataclasses `schemas`; one dict per dataclass of the values explicitly set, converted.

    A key that stands in several dataclasses is set in each. `positional` names the list field that takes arguments
    which are neither config files nor keys. `--help` prints `doc` and every key, and exits 0.
    Raises ConfigError naming every bad argument at once.
    """
    if "--help" in argv or "-h" in argv:
        print_help(doc, schemas)
        sys.exit(0)
    hints = [typing.get_type_hints(schema) for schema in schemas]  # without Ranges
    types_of = {key: want for known in hints for key, want in known.items()}
    settings, wrong = [{} for _ in schemas], []
    for place, key, value, text in read_arguments(argv, types_of, positional, wrong):
        if key not in types_of:
            near = difflib.get_close_matches(key, types_of, 1, 0.5)
            wrong.append(f"{place}: unknown key; {f'did you mean {near[0]}?' if near else '--help lists them'}")
        for known, chosen in zip(hints, settings, strict=True):
            try:
                if key in known:
                    chosen[key] = convert(value, known[key], text)
            except (ValueError, OverflowError):
                allowed = limits(known[key]) if isinstance(value, str) else ""
                why = f"{key}={value!r} {allowed}" if allowed else f"{place}: {value!r} is not {spell(known[key])}"
                wrong.append(why)
                break
    if wrong:  # alone, values out of their limits are the dataclass's to refuse
        for schema, values in zip(schemas, settings, strict=True):
            wrong += out_of_limits(schema, values)
        raise ConfigError("; ".join(wrong))
    return settings


def read_arguments(argv, types_of, positional, wrong):
    """(how a message names it, key, value, whether that is text) of all that `argv` sets; what is none goes to `wrong`."""
    arguments, rest = list(argv), []
    while arguments:
        argument = arguments.pop(0)
        if argument.endswith(".py") and not argument.startswith("--"):
            yield from read_file(argument, types_of, wrong)
            continue
        if not argument.startswith("--"):
            rest.append(argument)
            continue
        key, equals, value = argument[2:].partition("=")
        options = (types_of.get(key), *typing.get_args(types_of.get(key)))
        if not equals and bool in options:
            words = {*WORDS, *(word for option in options for word in typing.get_args(option))}
            value = arguments.pop(0) if arguments and arguments[0].lower() in words else "true"
        elif not equals and key in types_of:
            if not arguments or arguments[0].startswith("--"):
                wrong.append(f"--{key}: a value is missing, as in --{key}=…")
                continue
            value = arguments.pop(0)
        elif not equals and arguments and not arguments[0].startswith("--") and not arguments[0].endswith(".py"):
            arguments.pop(0)  # the value of an unknown key: not a second error
        yield f"--{key}", key, value, True
    if positional and rest:
        yield positional, positional, rest, False
    elif rest:
        wrong += [f"{argument!r} is neither a config file (*.py) nor --key=value" for argument in rest]


def read_file(path, types_of, wrong):
    """The same of a config file: the public names that it defines."""
    if not os.path.exists(path):
        near = difflib.get_close_matches(path, glob.glob(os.path.join(os.path.dirname(path), "*.py")), 1, 0.7)
        wrong.append(f"config file {path} does not exist{f': did you mean {near[0]}?' if near else ''}")
        return
    try:
        names = runpy.run_path(path)
    except Exception as e:  # noqa: BLE001, it is the user's own program: anything can happen
        wrong.append(f"config file {path}: {type(e).__name__}: {e}")
        return
    for name, value in names.items():
        helper = name.startswith("_") or callable(value) or inspect.ismodule(value)
        if name in types_of or not helper:
            yield f"{path}: {name}", name, value, False


def comments_of(schema):
    """{field: the comment behind it} of a dataclass, from the sources of the class and its bases."""
    meaning = {}
    for base in filter(dataclasses.is_dataclass, reversed(schema.__mro__)):
        source = textwrap.dedent(inspect.getsource(base))
        lines = source.encode().splitlines()  # ast counts bytes
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign):
                meaning[node.target.id] = lines[node.end_lineno - 1][node.end_col_offset :].decode().strip("# ")
    return meaning


def print_help(doc, schemas):
    print(doc.strip() + "\n")
    printed = set()
    for schema in schemas:
        print(f"{schema.__name__}:")
        meaning, hints = comments_of(schema), typing.get_type_hints(schema)
        for field in dataclasses.fields(schema):
            if field.name not in printed:
                no_factory = field.default_factory is dataclasses.MISSING
                default = field.default if no_factory else field.default_factory()
                text, choices = meaning.get(field.name, ""), limits(hints[field.name])
                if choices:  # without Ranges, a hint's only limits are its choices
                    text += f" ({choices.removeprefix('is not one of ')})"
                print(f"  --{field.name}={default!r}".ljust(40) + f"  {text}".rstrip())
                printed.add(field.name)
        print()


def cli(main):
    """Run `main(sys.argv[1:])`; a UserError or an OSError is one line on stderr and status 2."""
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # of a reader that has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at the end
        sys.exit(1)
    except (UserError, OSError) as e:
        print("error: " + " ".join(str(e).split()), file=sys.stderr)
        sys.exit(2)
