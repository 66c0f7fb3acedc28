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

WORDS = {"true": True, "false": False, "1": True, "0": False}  # what a bool may be on the command line


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one line that names it, its value and the cure."""


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

    settings, problems, rest = [{} for _ in schemas], [], []

    def put(key, value, text, where):
        if key not in types_of:
            near = difflib.get_close_matches(key, types_of, 1, 0.5)
            problems.append(f"{where}: unknown key; " + (f"did you mean {near[0]}?" if near else "--help lists them"))
            return
        for known, chosen in zip(fields, settings, strict=True):
            if key in known:
                try:
                    chosen[key] = convert(value, known[key], text)
                except (ValueError, OverflowError):
                    problems.append(f"{where}: {value!r} is not {spell(known[key])}")
                    return

    arguments = list(argv)
    while arguments:
        arg = arguments.pop(0)
        if arg.startswith("--"):
            key, equals, value = arg[2:].partition("=")
            if not equals and types_of.get(key) is bool:
                value = arguments.pop(0) if arguments and arguments[0].lower() in WORDS else "true"
            elif not equals and key in types_of:
                if not arguments or arguments[0].startswith("--"):
                    problems.append(f"--{key}: a value is missing, as in --{key}=…")
                    continue
                value = arguments.pop(0)
            elif not equals and arguments and not arguments[0].startswith("--") and not arguments[0].endswith(".py"):
                arguments.pop(0)  # the value of an unknown key: not a second error
            put(key, value, True, f"--{key}")
        elif arg.endswith(".py"):
            try:
                names = runpy.run_path(arg)
            except Exception as e:  # noqa: BLE001, it is the user's own program: anything can happen
                problems.append(f"config file {arg}: {type(e).__name__}: {e}")
                continue
            for name, value in names.items():
                if name in types_of or not (name.startswith("_") or callable(value) or inspect.ismodule(value)):
                    put(name, value, False, f"{arg}: {name}")
        elif positional:
            rest.append(arg)
        else:
            problems.append(f"{arg!r} is neither a config file (*.py) nor --key=value")
    if rest:
        put(positional, rest, False, positional)
    if problems:
        raise ConfigError("; ".join(problems))
    return settings


def print_help(doc, schemas, fields):
    print(doc.strip() + "\n")
    seen = set()
    for schema, known in zip(schemas, fields, strict=True):
        print(f"{schema.__name__}:")
        source = textwrap.dedent(inspect.getsource(schema))
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
        nodes = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]
        meaning = {node.target.id: comments.get(node.end_lineno, "") for node in nodes}
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


def cli(main, *errors):
    """Run `main(sys.argv[1:])`; a ConfigError, an OSError or one of `errors` is one line on stderr and status 2."""
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except (ConfigError, OSError, *errors) as e:
        print("error: " + " ".join(str(e).split()), file=sys.stderr)
        sys.exit(2)
