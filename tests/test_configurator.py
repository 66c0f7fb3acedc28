import subprocess
import sys
import typing
from dataclasses import dataclass, field

import pytest

from configurator import (
    Amount,
    Count,
    NonNegative,
    Positive,
    Range,
    Share,
    cli,
    configure,
    convert,
    problems,
)
from errors import ConfigError


@dataclass
class Run:
    max_steps: int = 1000  # optimizer steps of the whole run
    lr: float = 1e-5  # learning rate, # and not a comment in a comment
    compile: bool = False  # run torch.compile
    name: str | None = None  # of the run
    runs: list[str] = field(default_factory=list)  # folders


@dataclass
class Shape:
    capacity: float | list[float] = 0.5  # share of tokens a routed block takes
    gate: typing.Literal["soft", "straight_through"] = "soft"  # how the output is scaled
    name: str = "x#y"  # of the shape


def test_later_wins_and_types_are_converted(tmp_path):
    config = tmp_path / "c.py"
    config.write_text(
        "_steps = 3\nimport math\nmax_steps = _steps * 10\nlr = 1\ndef helper(): pass\ncapacity = [1, 0.5]\n"
    )
    run, shape = configure("", ["--max_steps=7", str(config), "--lr", "2e-3", "--name=n"], Run, Shape)
    assert run == {"max_steps": 30, "lr": 2e-3, "name": "n"}
    assert shape == {"capacity": [1.0, 0.5], "name": "n"}  # a key of both classes is set in both
    assert [type(x) for x in shape["capacity"]] == [float, float]


@pytest.mark.parametrize(
    "argv, key, value",
    [
        (["--compile"], "compile", True),
        (["--compile", "false"], "compile", False),
        (["--compile", "--lr=1"], "compile", True),
        (["--max_steps=1e4"], "max_steps", 10_000),
        (["--max_steps", "-5"], "max_steps", -5),
        (["--lr=1"], "lr", 1.0),
        (["--name=none"], "name", None),
        (["--name=a=b"], "name", "a=b"),
        (["--runs=a,b"], "runs", ["a", "b"]),
        (["x", "--lr=1", "y"], "runs", ["x", "y"]),
    ],
)
def test_command_line_values(argv, key, value):
    (run,) = configure("", argv, Run, positional="runs")
    assert run[key] == value and type(run[key]) is type(value)


@pytest.mark.parametrize(
    "text, want, value",
    [
        ("0.25", float | list[float], 0.25),
        ("1,0.5", float | list[float], [1.0, 0.5]),
        ("(0.9, 0.95)", tuple[float, float], (0.9, 0.95)),
        ("[{'id': 'a/b'}]", list[dict], [{"id": "a/b"}]),
        ("5", int | str, 5),
        ("auto", int | str, "auto"),
        ("", list[str], []),
        ("a, b,", list[str], ["a", "b"]),
    ],
)
def test_convert(text, want, value):
    assert convert(text, want, text=True) == value


@pytest.mark.parametrize(
    "value, want",
    [(True, int), (True, float), (1.5, int), ("1", int), (1, str), ((1, 2, 3), tuple[int, int]), (1, bool)],
)
def test_values_of_another_type_are_refused(value, want):
    with pytest.raises(ValueError):
        convert(value, want)


@pytest.mark.parametrize("value", ["nan", "x", "", "none"])
def test_text_that_is_no_number_is_refused(value):
    with pytest.raises(ValueError):
        convert(value, float, text=True)


def test_all_problems_are_named_at_once(tmp_path):
    config = tmp_path / "c.py"
    config.write_text("max_stes = 3\nlr = 'fast'\n")
    argv = [str(config), "--gat=soft", "--gate=hard", "--compile=maybe", "stray", "no/such.py", "--name"]
    with pytest.raises(ConfigError) as e:
        configure("", argv, Run, Shape)
    message = str(e.value)
    for part in (
        f"{config}: max_stes: unknown key; did you mean max_steps?",
        f"{config}: lr: 'fast' is not float",
        "--gat: unknown key; did you mean gate?",
        "gate='hard' is not one of soft, straight_through",
        "--compile: 'maybe' is not bool",
        "'stray' is neither a config file (*.py) nor --key=value",
        "config file no/such.py does not exist",
        "--name: a value is missing",
    ):
        assert part in message
    assert "\n" not in message


def test_a_config_file_that_fails_is_named(tmp_path):
    config = tmp_path / "c.py"
    config.write_text("lr = undefined\n")
    with pytest.raises(ConfigError, match="c.py: NameError: name 'undefined'"):
        configure("", [str(config)], Run)


def test_help_lists_every_key_once_with_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as e:
        configure("What it does.", ["--lr=bad", "--help"], Run, Shape)
    assert e.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("What it does.\n")
    for key, default, meaning in (
        ("max_steps", "1000", "optimizer steps of the whole run"),
        ("lr", "1e-05", "learning rate, # and not a comment in a comment"),
        ("capacity", "0.5", "share of tokens a routed block takes"),
        ("runs", "[]", "folders"),
    ):
        (line,) = [line for line in out.splitlines() if line.startswith(f"  --{key}=")]
        assert line.split(None, 1)[0] == f"--{key}={default}" and line.endswith(meaning)
    assert out.count("--name=") == 1


@dataclass
class Limits:
    routing: typing.Literal["causal", "topk"] = "causal"
    seq_len: Count = 256
    limit: Amount = 0
    scale: Positive = 1.0
    decay: NonNegative = 0.0
    share: Share = 0.5
    top_p: typing.Annotated[float, Range(0, 1, open_low=True)] = 1.0
    fraction: typing.Annotated[float, Range(0, 1, open_high=True)] = 0.0
    vocab_size: typing.Annotated[int, Range(257)] = 4096
    depth: typing.Annotated[float, Range(1, open_low=True)] = 2.0
    num_proc: Count | None = None
    capacity: Share | list[Share] = 0.5
    gates: list[typing.Literal["soft", "hard"]] = field(default_factory=list)
    betas: tuple[Positive, Share] = (1.0, 0.5)
    name: str = ""  # free


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("routing", "top", "routing='top' is not one of causal, topk"),
        ("seq_len", 0, "seq_len=0 must be at least 1"),
        ("limit", -1, "limit=-1 must not be negative"),
        ("scale", 0.0, "scale=0.0 must be positive"),
        ("scale", float("nan"), "scale=nan must be positive"),
        ("decay", -0.5, "decay=-0.5 must not be negative"),
        ("share", 1.5, "share=1.5 must lie in [0, 1]"),
        ("top_p", 0.0, "top_p=0.0 must lie in (0, 1]"),
        ("fraction", 1.0, "fraction=1.0 must lie in [0, 1)"),
        ("vocab_size", 256, "vocab_size=256 must be at least 257"),
        ("depth", 1.0, "depth=1.0 must be above 1"),
        ("num_proc", 0, "num_proc=0 must be at least 1"),
        ("capacity", 2.0, "capacity=2.0 must lie in [0, 1]"),
        ("capacity", [0.5, 2.0], "capacity=[0.5, 2.0] must lie in [0, 1]"),
        ("gates", ["soft", "x"], "gates=['soft', 'x'] is not one of soft, hard"),
        ("betas", (0.0, 0.5), "betas=(0.0, 0.5) must be positive"),
        ("seq_len", "many", "seq_len='many' must be at least 1"),  # config.json may hold anything
    ],
)
def test_a_value_out_of_its_limits_is_said_in_words(key, value, message):
    assert problems(Limits(**{key: value})) == [message]


def test_values_within_their_limits_are_no_problem():
    assert problems(Limits()) == []
    edges = {"seq_len": 1, "share": 1.0, "top_p": 1.0, "fraction": 0.0, "vocab_size": 257, "scale": 1e-9, "num_proc": 3}
    assert problems(Limits(**edges, capacity=[0.0, 1.0], gates=["hard", "soft"], name="any")) == []
    assert problems(Limits(seq_len=None)) == []  # a value that is not there has no limits
    assert problems(Limits(seq_len=0, routing="x")) == [
        "routing='x' is not one of causal, topk",
        "seq_len=0 must be at least 1",
    ]


def test_limits_do_not_change_what_is_read():
    (settings,) = configure("", ["--num_proc=none", "--capacity=0.5,2", "--seq_len=0", "--betas=0.9,0.95"], Limits)
    assert settings == {"num_proc": None, "capacity": [0.5, 2.0], "seq_len": 0, "betas": (0.9, 0.95)}
    for argument, message in (
        ("--routing=top", "routing='top' is not one of causal, topk"),
        ("--gates=soft,x", "gates='soft,x' is not one of soft, hard"),
        ("--num_proc=many", "--num_proc: 'many' is not int | None"),
    ):
        with pytest.raises(ConfigError) as e:
            configure("", [argument], Limits)
        assert str(e.value) == message


@dataclass
class LongRun(Run):
    max_steps: int = 5000  # of a long run
    restarts: Count = 3  # times that it may be started again


def test_help_has_the_comments_of_base_classes_too(capsys):
    with pytest.raises(SystemExit):
        configure("", ["--help"], LongRun)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[2:] == [
        "LongRun:",
        "--max_steps=5000 of a long run",
        "--lr=1e-05 learning rate, # and not a comment in a comment",
        "--compile=False run torch.compile",
        "--name=None of the run",
        "--runs=[] folders",
        "--restarts=3 times that it may be started again",
        "",
    ]


@pytest.mark.parametrize(
    "body, status, stderr",
    [
        ("raise ConfigError('lr: bad,\\n  use 1e-3')", 2, "error: lr: bad, use 1e-3\n"),
        ("open('/no/such/file')", 2, "error: [Errno 2] No such file or directory: '/no/such/file'\n"),
        ("raise UserError('k')", 2, "error: k\n"),
        ("raise KeyboardInterrupt", 130, ""),
        ("print('fine')", 0, ""),
    ],
)
def test_cli_turns_errors_into_one_line_and_a_status(body, status, stderr):
    code = f"from configurator import *\nfrom errors import *\ndef main(argv):\n    {body}\ncli(main)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, stderr)


def test_cli_lets_a_bug_show_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli(lambda argv: 1 / 0)


def test_a_flag_may_also_be_a_word():
    @dataclass
    class Config:
        compile: bool | typing.Literal["auto"] = "auto"  # a switch

    for argv, value in (
        ([], "auto"),
        (["--compile"], True),
        (["--compile", "false"], False),
        (["--compile=auto"], "auto"),
    ):
        (settings,) = configure("", argv, Config)
        assert Config(**settings).compile == value
    with pytest.raises(ConfigError, match="compile='maybe' is not one of auto, true, false"):
        configure("", ["--compile=maybe"], Config)
