"""A study: arms × seeds, each an ordinary run of train.py, then tables with intervals and a picture.

    python study.py config/study_scratch.py --jobs=2
    python study.py config/study_scratch.py --seeds=1,2,3 --only=dense,random    these arms now, the rest another day
    python study.py config/study_scratch.py --report             of what is finished, without running anything
    python study.py config/study_scratch.py --results=docs/results/study_scratch.json     to what is published, the rest

A study that was killed, or stopped by Ctrl-C or SIGTERM, goes on where it stopped: a finished run is never repeated,
whatever has become of the code since: an idea that has changed wants another --out_dir. What was measured is kept in the
run's folder, and in the results: a run that stands there needs its folder no more, so that a study goes on on another
machine. A run that fails is named with the last line of its log, the others go on; the exit status is then 1.
"""

import fcntl
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import comparison
import costs
from configurator import Count, cli, configure, problems
from data import read_manifest
from device import device_name
from errors import ConfigError, DataError, UserError, first_line
from files import locked, sha256, write_whole
from model import ModelConfig, Transformer
from parallel import say
from publish import git_revision
from settings import TrainConfig

ROOT = Path(__file__).parent
OURS = ("out_dir", "seed", "resume")  # keys of train.py that a study sets itself
# What train.py takes where a setting is not given: needed to know how many steps come to so many FLOPs.
DEFAULTS = ("data_dir", "init_from", "size", "max_steps", "seq_len", "batch_size", "grad_accum_steps")
DEFAULTS = {name: getattr(TrainConfig, name) for name in DEFAULTS}


@dataclass
class StudyConfig:
    out_dir: str = "out/study"  # runs are in <out_dir>/<arm>-<seed>, their output in <arm>-<seed>.log
    configs: list[str] = field(default_factory=list)  # config files of train.py that every run is built on
    common: dict = field(default_factory=dict)  # keys of train.py of every run; flops: as many steps as come to so many
    arms: dict[str, dict] = field(default_factory=dict)  # {name: keys of train.py}, over those of common
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])  # every arm is run with each
    only: list[str] = field(default_factory=list)  # arms that are run now (empty: all); what is finished stays
    reference: str = "dense"  # the arm that the others are compared with
    judge: list[str] = field(default_factory=list)  # text files, token folders: final models are scored on them too
    judge_tokens: Count = 100_000  # of each text that are scored, at most
    jobs: Count = 1  # runs at a time
    threads: Count = 1  # CPU threads of each
    speed: bool = True  # measure speeds at the end, one model an arm
    checkpoints: bool = True  # keep the checkpoints of finished runs
    axis: Literal["training", "inference"] = "training"  # what the picture shows losses over
    results: str = ""  # .json of everything, .md and .png beside it (empty: <out_dir>/results.json)
    report: bool = False  # only report what is finished

    def asks(self, arm: str, seed: int) -> bool:
        """Whether this run is to be done now; others are reported if they are finished."""
        return seed in self.seeds and arm in (self.only or self.arms)

    def __post_init__(self):
        found = problems(self)
        if not self.arms:
            found.append("arms is empty: name a config file that sets them, as config/study_scratch.py does")
        elif self.reference not in self.arms:
            found.append(f"reference={self.reference!r} is not one of the arms: {', '.join(self.arms)}")
        found += [
            f"only={arm} is not one of the arms: {', '.join(self.arms)}" for arm in self.only if arm not in self.arms
        ]
        for arm, keys in {"common": self.common, **self.arms}.items():
            if not re.fullmatch(r"\w[\w.=+-]*", arm):
                found.append(f"the arm {arm!r} cannot be a folder: letters, digits and _.=+- only")
            if not isinstance(keys, dict):
                found.append(f"the arm {arm} must be a dict of train.py's keys, not {keys!r}")
            elif ours := [key for key in OURS if key in keys]:
                found.append(f"{arm} sets {', '.join(ours)}, which study.py does itself")
        names = [Path(text).name for text in self.judge]
        if len({*names, "validation"}) <= len(names):
            found.append(f"judge={','.join(self.judge)}: the last part of each name must be its own")
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            found.append(f"seeds={self.seeds} must be different, and at least one")
        self.results = self.results or f"{self.out_dir}/results.json"
        if not self.results.endswith(".json"):
            found.append(f"results={self.results} must end in .json: tables and picture have their own endings")
        if found:
            raise ConfigError("; ".join(found))


# ---------------------------------------------------------------------------------------------------------------------
# What is to be run


@dataclass
class Run:
    arm: str
    seed: int
    folder: Path
    command: list[str]  # without the name of Python
    settings: dict  # DEFAULTS and every key of train.py that config files and study give, as JSON holds them
    recorded: dict | None = None  # what an earlier report says of it

    def __post_init__(self):
        self.name, self.log = self.folder.name, self.folder.with_name(f"{self.folder.name}.log")
        self.model = self.folder / "final_model"
        factors = ("max_steps", "batch_size", "grad_accum_steps", "seq_len")
        self.tokens = math.prod(self.settings[key] for key in factors)

    @property
    def finished(self) -> bool:
        return self.model.exists() or self.recorded is not None

    def kept(self, name: str) -> dict:
        """A JSON file of the run's folder, empty where it is not there."""
        path = self.folder / name
        try:
            return json.loads(path.read_text()) if path.exists() else {}
        except ValueError as e:
            raise ConfigError(f"{path} is damaged: {first_line(e)}; remove it") from None

    def metrics(self, size: int | None = None) -> list[dict]:
        """The lines of metrics.jsonl, of its last `size` bytes only; one that is cut or being written is left out."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return []
        with open(path, "rb") as f:
            skipped = max(0, path.stat().st_size - size) if size else 0
            f.seek(skipped)
            try:
                return [json.loads(line) for line in f.read().split(b"\n")[bool(skipped) : -1]]
            except ValueError as e:
                raise ConfigError(f"{path} is damaged: {first_line(e)}; remove {self.folder}, or mend it") from None


def plan(cfg: StudyConfig) -> list[Run]:
    """What is finished and what is to be run, every arm with the first seed, then with the next. Raises ConfigError."""
    recorded = {(run["arm"], run["seed"]): run for run in reported(cfg).get("runs", [])}
    steps_of = {arm: run["settings"]["max_steps"] for (arm, _), run in recorded.items()}
    given, found = {}, {}  # {arm: what it adds to the command line, and all settings}
    for arm, own in cfg.arms.items():
        keys = cfg.common | own
        flops, steps_are_given = keys.pop("flops", None), "max_steps" in keys
        try:
            settings = settings_of(cfg.configs, keys)
            if flops is not None:
                keys["max_steps"] = settings["max_steps"] = steps_of.get(arm, 0)  # where there is no data to count by
                keys["max_steps"] = settings["max_steps"] = steps_for(flops, steps_are_given, settings)
            given[arm] = keys, settings
        except DataError as e:
            given[arm] = keys, settings
            if not cfg.report:  # which needs no data
                found.setdefault(str(e), []).append(arm)
        except UserError as e:
            found.setdefault(str(e), []).append(arm)
    if found:
        raise ConfigError("; ".join(f"arm {', '.join(arms)}: {error}" for error, arms in found.items()))
    runs = []
    for seed in dict.fromkeys([*cfg.seeds, *(seed for _, seed in recorded)]):
        for arm, (keys, settings) in given.items():
            folder = Path(cfg.out_dir) / f"{arm}-{seed}"
            command = ["train.py", *cfg.configs, *arguments(keys)]
            command += [f"--seed={seed}", f"--out_dir={folder}", "--resume=auto"]
            run = Run(arm, seed, folder, command, settings | {"seed": seed}, recorded.get((arm, seed)))
            if run.finished or cfg.asks(arm, seed):
                runs.append(run)
    return runs


def reported(cfg: StudyConfig) -> dict:
    """The document of the last report, empty before the first. Raises ConfigError."""
    try:
        document = json.loads(Path(cfg.results).read_text()) if os.path.exists(cfg.results) else {}
        runs = document["runs"] if document != {} else []
        if not all({"arm", "seed", "settings", "losses", "curve"} <= run.keys() for run in runs):
            raise ValueError("its runs are not those of a study")
        return document
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ConfigError(f"results={cfg.results} is damaged: {first_line(e)}; remove it, or put it back") from None


def arguments(keys: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in keys.items()]


def settings_of(configs: list[str], keys: dict) -> dict:
    """What train.py takes from config files and keys, as JSON holds it, and DEFAULTS. Raises ConfigError."""
    train_set, model_set = configure(__doc__, [*configs, *arguments(keys)], TrainConfig, ModelConfig)
    cfg = TrainConfig(**train_set)  # which knows what distill_from=init_from is
    given = {name: getattr(cfg, name, value) for name, value in (train_set | model_set).items() if name not in OURS}
    return json.loads(json.dumps(DEFAULTS | given))


def steps_for(flops: float, steps_are_given: bool, settings: dict) -> int:
    """How many steps spend `flops`, within 1 %. Raises ConfigError where no number does, or what a step costs changes."""
    unclear = [key for key in ("capacity_start", "distill_from", "lora", "keep_layers") if settings.get(key)]
    unclear += ["capacity_choices"] if len(set(settings.get("capacity_choices", []))) > 1 else []
    if unclear or steps_are_given:
        raise ConfigError(f"flops and {(unclear or ['max_steps'])[0]} do not go together: leave one out")
    if not isinstance(flops, int | float) or flops <= 0:
        raise ConfigError(f"flops={flops!r} must be a number above 0")
    config = costs.config_of(settings)
    with torch.device("meta"):
        per_token = Transformer(config).flops_per_token(settings["seq_len"], training=True)
    step = per_token * settings["batch_size"] * settings["grad_accum_steps"] * settings["seq_len"]
    steps = round(flops / step)
    if abs(steps * step / flops - 1) > 0.01:
        raise ConfigError(f"flops={flops:g} are {flops / step:.2f} steps: no whole number comes within 1 %")
    return steps


def digest(text: str) -> str | None:
    """What tells a text file or a data folder from another: its SHA-256, or its manifest's, which holds those of its files."""
    path = Path(text) / "manifest.json" if Path(text).is_dir() else Path(text)
    return sha256(path) if path.exists() else None


def refuse_changed(cfg: StudyConfig, runs: list[Run]):
    """Raises ConfigError for runs that were begun with other settings, or on other data, than the study now gives them."""
    changed = []
    for run in runs:
        begun = run.kept("study.json") or run.recorded or {}
        if not begun and not run.model.exists():  # a model that no study says is its own is refused
            continue
        before = begun.get("settings", {})
        keys = [key for key in before | run.settings if before.get(key) != run.settings.get(key)]
        what = [f"{key} was {before.get(key)!r} and is now {run.settings.get(key)!r}" for key in keys]
        known, now = begun.get("data"), digest(run.settings["data_dir"])
        if known and now and known != now and not cfg.report:
            what.append(f"{run.settings['data_dir']} held other text, or the same in another order")
        if what:
            changed.append(f"{run.name}: {', '.join(what)}")
    if changed:
        cure = f"set them back, remove these folders and {cfg.results}, or name another --out_dir and --results"
        raise ConfigError(
            f"{cfg.out_dir} or {cfg.results} holds runs with other settings: {'; '.join(changed)}; {cure}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Running


class Children:
    """The programs that are running; a signal to the study is handed on to them, and nothing new is begun."""

    def __init__(self, threads: int):
        self.environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        self.running: dict[str, subprocess.Popen] = {}
        self.signal = 0
        self.handlers = {s: signal.signal(s, self.hand_on) for s in (signal.SIGINT, signal.SIGTERM)}

    def hand_on(self, number, frame):
        self.signal = number
        for child in list(self.running.values()):
            child.send_signal(number)

    def call(self, name: str, command: list[str], log) -> int:
        """Runs a program of the project to its end, its output in the open file `log`. Returns its exit status."""
        if self.signal:
            return 0
        script, *arguments = command
        child = subprocess.Popen(
            [sys.executable, str(ROOT / script), *arguments], stdout=log, stderr=log, env=self.environment
        )
        self.running[name] = child
        if self.signal:  # it came between the two
            child.send_signal(self.signal)
        status = child.wait()
        del self.running[name]
        return status

    def alone(self, log) -> bool:
        """Waits until nothing writes to `log`: what a killed study had begun holds its lock, and runs on to its end."""
        while not self.signal:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                time.sleep(0.5)
        return False

    def release_signals(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def unjudged(cfg: StudyConfig, run: Run) -> list[str]:
    """The texts on which a run's final model is not scored yet, as they are now and as far as is asked."""
    judged = {text: run.kept("judge.json").get(text, {}) for text in cfg.judge}
    return [
        text
        for text, found in judged.items()
        if found.get("limit") != cfg.judge_tokens or found.get("data", digest(text)) != digest(text)
    ]


def to_do(cfg: StudyConfig, run: Run) -> bool:
    """Whether a run is to be trained, judged or counted yet; one that only the results know is finished."""
    return not run.finished or (run.model.exists() and bool(unjudged(cfg, run) or not run.kept("costs.json")))


def done_with(cfg: StudyConfig, runs: list[Run]) -> list[Run]:
    """The runs of which nothing is left to do: only they go into results, which a run's folder may not outlive."""
    return [run for run in runs if run.recorded or not to_do(cfg, run)]


def attempt(cfg: StudyConfig, run: Run, children: Children) -> str | None:
    """`complete`, for which a disk that is full or a model that cannot be opened is this run's trouble alone."""
    try:
        return complete(cfg, run, children)
    except Exception as e:  # noqa: BLE001, whatever it is, the other runs go on
        return f"{type(e).__name__}: {first_line(e)}"


def complete(cfg: StudyConfig, run: Run, children: Children) -> str | None:
    """Trains, judges and counts what is still to be done of a run. Returns what went wrong, the last line of its log."""
    if children.signal:
        return None
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.log, "a+") as log:
        if not children.alone(log):
            return None
        if not run.model.exists():
            revisions = dict.fromkeys([*run.kept("study.json").get("git", []), git_revision()])
            document = {"settings": run.settings, "command": run.command, "git": list(revisions)}
            document["data"] = digest(run.settings["data_dir"])
            write_whole(run.folder / "study.json", document)
            status = children.call(run.name, run.command, log)
            if status < 0:
                return None if children.signal else f"it was ended by {signal.Signals(-status).name}"
        if run.model.exists():
            for text in unjudged(cfg, run):
                judge(cfg, run, text, children, log)
            if not (children.signal or run.kept("costs.json")):
                write_whole(run.folder / "costs.json", costs.of_inference(run.model, run.settings))
            for step in [] if cfg.checkpoints else run.folder.glob("step_*"):
                shutil.rmtree(step)
        if children.signal or not to_do(cfg, run):
            return None
        log.seek(0)
        return next((line.strip() for line in reversed(log.read().splitlines()) if line.strip()), "it said nothing")


def judge(cfg: StudyConfig, run: Run, text: str, children: Children, log):
    """Scores a final model on a text under both routings, by bench.py; its losses go to judge.json."""
    seq_len, found = run.settings["seq_len"], run.folder / "bench.json"
    found.unlink(missing_ok=True)
    # Of a folder's sources: their losses are weighed as the text is.
    sources = read_manifest(text)["sources"] if Path(text).is_dir() else {}
    sizes = {name: source["val"]["tokens"] for name, source in sources.items() if source["val"]["tokens"]} or {text: 1}
    # Each window is asked for its second half, the first for all.
    windows = max(1, cfg.judge_tokens // len(sizes) // max(1, seq_len // 2) - 1)
    keys = {"tasks": "perplexity", "model_path": run.model, "text": text, "output_path": found, "limit": windows}
    keys |= {"seq_len": seq_len, "batch_size": 8, "device": run.settings.get("device", "auto"), "dtype": "float32"}
    children.call(run.name, ["bench.py", *(f"--{key}={value}" for key, value in keys.items())], log)
    if not found.exists():
        return
    rows, losses = json.loads(found.read_text())["perplexity"], {}
    for routing in {row["routing"] for row in rows}:
        mine = {row["text"]: row["loss"] for row in rows if row["routing"] == routing}
        losses[routing] = sum(sizes[name] * loss for name, loss in mine.items()) / sum(sizes.values())
    losses = {"topk": losses["causal"]} | losses  # dense: the two are one
    losses |= {"limit": cfg.judge_tokens, "data": digest(text)}
    write_whole(run.folder / "judge.json", run.kept("judge.json") | {text: losses})
    found.unlink()


def progress(runs: list[Run], running: list[str], jobs: int) -> str:
    """How many runs are finished, how fast the present ones are, and the time left by the rates of the runs so far."""
    rates, left = {}, 0.0
    latest = {
        run.name: next((line for line in reversed(run.metrics(9999)) if "tokens_per_s" in line), {}) for run in runs
    }
    for run in runs:
        if latest[run.name]:
            rates.setdefault(run.arm, []).append(latest[run.name]["tokens_per_s"])
    mean = statistics.fmean(rate for of_arm in rates.values() for rate in of_arm) if rates else 0
    for run in runs:
        if not run.finished and rates:
            rate = latest[run.name].get("tokens_per_s") or statistics.fmean(rates.get(run.arm, [mean]))
            left += (run.tokens - latest[run.name].get("tokens", 0)) / rate
    now = ", ".join(
        f"{name} step {latest[name].get('step', 0)} at {latest[name].get('tokens_per_s', 0):,.0f} tokens/s"
        for name in running
    )
    done = f"{sum(run.finished for run in runs)} of {len(runs)} runs"
    return "; ".join(filter(None, (done, now, f"{tqdm.format_interval(left / jobs) if rates else '?'} left")))


def execute(cfg: StudyConfig, runs: list[Run]) -> dict[str, str]:
    """Brings every run to its end, `jobs` at a time: {run that failed: why}. Exits where the study is stopped."""
    failed, said, terminal = {}, time.monotonic(), sys.stderr.isatty()
    asked = [run for run in runs if cfg.asks(run.arm, run.seed)]
    waiting, children = [run for run in asked if to_do(cfg, run)], Children(cfg.threads)
    torch.set_num_threads(cfg.threads)
    with ThreadPoolExecutor(cfg.jobs) as pool:
        futures = {pool.submit(attempt, cfg, run, children): run for run in waiting}
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=2, return_when="FIRST_COMPLETED")
            for future in done:
                if why := future.result():
                    failed[futures[future].name] = why
                    say(f"{futures[future].name} failed, see {futures[future].log}: {why}")
                keep(cfg, done_with(cfg, runs))  # whatever becomes of this machine
            if (done and not children.signal) or terminal or time.monotonic() > said + 60:
                said, line = time.monotonic(), progress(runs, list(children.running), cfg.jobs)
                width = shutil.get_terminal_size().columns - 1
                print(f"\r\x1b[K{line[:width]}" if terminal else line, end="" if terminal else "\n", file=sys.stderr)
    if terminal:
        print(file=sys.stderr)
    children.release_signals()
    if children.signal:
        say(f"{signal.Signals(children.signal).name}: stopped; the same command goes on")
        sys.exit(128 + children.signal)
    return failed


# ---------------------------------------------------------------------------------------------------------------------
# Measuring, when nothing runs any more


def measure(cfg: StudyConfig, finished: list[Run]):
    """The speeds of each arm that are not measured yet, by its first run whose model is here. What a step of training takes
    needs no trained model.
    """
    torch.set_num_threads(cfg.threads)
    first = {run.arm: run for run in reversed(finished)} | {
        run.arm: run for run in reversed(finished) if run.model.exists()
    }
    reference = first.get(cfg.reference)
    for run in first.values() if cfg.speed and reference else ():
        here = {each.name: (each.model if each.model.exists() else None, each.settings) for each in (reference, run)}
        if not all(model or cfg.axis == "training" and costs.is_rebuilt(own) for model, own in here.values()):
            continue
        processor = device_name(costs.device_of(run.settings)[0])
        where = f"{processor}, {cfg.threads} threads, torch {torch.__version__}"
        about = {"reference": reference.name, "where": where}
        if about | {"speeds": None} != run.kept("speed.json") | {"speeds": None}:
            say(f"speed of {run.name}")
            found = costs.speeds(here, reference.name, run.name)
            run.folder.mkdir(parents=True, exist_ok=True)
            write_whole(run.folder / "speed.json", about | {"speeds": found})


# ---------------------------------------------------------------------------------------------------------------------
# The report


def record(cfg: StudyConfig, run: Run) -> dict | None:
    """What the results keep of a finished run, see comparison.py; None where its folder no longer says what it was."""
    lines, about = run.metrics(), run.kept("study.json")
    evaluated = [line for line in lines if "val/loss" in line and "val/loss_causal" in line]
    if not (run.model.exists() and about and evaluated):
        return run.recorded
    curve, seconds, tokens = [], 0.0, 0
    for line in lines:
        if "tokens_per_s" in line:  # of the steps since the last such line
            seconds, tokens = seconds + (line["tokens"] - tokens) / line["tokens_per_s"], line["tokens"]
        if line.get("val/loss") is not None and line.get("val/loss_causal") is not None:  # null: it was not finite
            point = {"tokens": line["tokens"], "flops": line["flops"], "seconds": round(seconds, 3)}
            curve.append(point | {"topk": line["val/loss"], "causal": line["val/loss_causal"]})
    last, losses = evaluated[-1] | {"seconds": round(seconds, 3)}, {}
    if curve and curve[-1]["tokens"] == last["tokens"]:  # else it diverged
        losses["validation"] = {routing: curve[-1][routing] for routing in ("causal", "topk")}
    judged = run.kept("judge.json")
    for text in sorted(judged, key=lambda text: text in cfg.judge):  # of one name, that which is asked for
        losses[Path(text).name] = judged[text]
    document = {"arm": run.arm, "seed": run.seed, "command": shlex.join(about["command"]), "git": about["git"]}
    document |= {"settings": run.settings, "data": about.get("data")}
    document |= {name: last[name] for name in ("tokens", "flops", "seconds")}
    return document | {"losses": losses, "costs": run.kept("costs.json"), "curve": curve}


def document_of(cfg: StudyConfig, finished: list[Run]) -> dict:
    """All results, as comparison.py describes them."""
    before = reported(cfg)
    # Nothing finished is dropped: of arms that the config has lost, or of another study.py that works on the same results.
    known = {(run.arm, run.seed) for run in finished}
    others = [run for run in before.get("runs", []) if (run["arm"], run["seed"]) not in known]
    kept = {run.arm: speed for run in reversed(finished) if (speed := run.kept("speed.json"))}
    measured = {
        arm: speed for arm, speed in kept.items() if speed.get("reference", "").rpartition("-")[0] == cfg.reference
    }
    document = {"reference": cfg.reference, "axis": cfg.axis, "judge_tokens": cfg.judge_tokens}
    document["speeds"] = comparison.against(before, cfg.reference)  # also of arms that the config no longer has
    document["speeds"] |= {arm: speed["speeds"] for arm, speed in measured.items()}
    document["measured_on"] = before.get("measured_on", {}) | {arm: speed["where"] for arm, speed in measured.items()}
    document["judged"] = before.get("judged", {}) | {Path(text).name: digest(text) for text in cfg.judge}
    records = [record(cfg, run) for run in finished]
    for run in (run for run, of_run in zip(finished, records, strict=True) if of_run is None):
        say(
            f"{run.folder} has lost its metrics.jsonl or study.json and is left out: remove it, and it is trained again"
        )
    return document | {"runs": [of_run for of_run in records if of_run] + others}


def keep(cfg: StudyConfig, finished: list[Run]) -> dict | None:
    """Writes the results of `finished` runs beside what another study has put there. Returns the document, None without any."""
    if not finished:
        return None
    try:
        with locked(Path(cfg.results).parent):
            document = document_of(cfg, finished)
            comparison.write(document, cfg.results)
            return document
    except OSError as e:
        say(f"warning: {cfg.results} is not written: {e}; what was measured is in {cfg.out_dir}")


def main(argv: list[str]):
    (settings,) = configure(__doc__, argv, StudyConfig)
    cfg = StudyConfig(**settings)
    missing = [text for text in cfg.judge if not os.path.exists(text)]
    if missing and not cfg.report:
        cure = "name text files or folders of tokens; the study's config says what prepares the latter"
        raise ConfigError(f"judge={','.join(missing)} is not there: {cure}")
    runs = plan(cfg)
    refuse_changed(cfg, runs)
    failed = {} if cfg.report else execute(cfg, runs)
    finished = [run for run in runs if run.finished] if cfg.report else done_with(cfg, runs)
    if not cfg.report:
        measure(cfg, finished)
    if document := keep(cfg, finished):
        comparison.report(document, cfg.results)
    for name, why in failed.items():
        say(f"{name} failed: {why}")
    if missing := [run.name for run in runs if run not in finished]:
        more = f" and {len(missing) - 9} more" if len(missing) > 9 else ""
        say(f"{len(finished)} of {len(runs)} runs are finished; missing: {', '.join(missing[:9])}{more}")
    if failed or not finished:
        sys.exit(1)


if __name__ == "__main__":
    cli(main)
