"""A study: arms × seeds, each an ordinary run of train.py, then tables with intervals and a picture.

    python study.py config/study_scratch.py --jobs=2
    python study.py config/study_scratch.py --report             of what is finished, without running anything

A study that was killed, or stopped by Ctrl-C or SIGTERM, goes on where it stopped: a finished run is never repeated, and
what was measured is kept in the run's folder. A run that fails is named with the last line of its log, the others go on;
the exit status is then 1.
"""

import fcntl
import json
import os
import platform
import re
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Literal

import torch
from tqdm import tqdm

import comparison
from configurator import Count, cli, configure, problems
from data import TokenData, read_manifest
from device import device_name, pick_device
from errors import ConfigError
from figures import save_figure
from files import write_whole
from inference import Decoder
from measure import cached, interleaved
from model import SIZES, ModelConfig, Transformer
from parallel import say
from publish import git_revision
from tables import markdown_table, print_table
from weights import find_model

ROOT = Path(__file__).parent
OURS = ("out_dir", "seed", "resume")  # keys of train.py that a study sets itself
# What train.py takes where a setting is not given: needed to know how many steps come to so many FLOPs.
DEFAULTS = {"data_dir": "data/stdlib", "init_from": "scratch", "size": "demo", "max_steps": 600}
DEFAULTS |= {"seq_len": 256, "batch_size": 8, "grad_accum_steps": 1}


@dataclass
class StudyConfig:
    out_dir: str = "out/study"  # runs are in <out_dir>/<arm>-<seed>, their output in <arm>-<seed>.log
    configs: list[str] = field(default_factory=list)  # config files of train.py that every run is built on
    common: dict = field(default_factory=dict)  # keys of train.py of every run; flops: as many steps as come to so many
    arms: dict[str, dict] = field(default_factory=dict)  # {name: keys of train.py}, over those of common
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])  # every arm is run with each
    reference: str = "dense"  # the arm that the others are compared with
    judge: list[str] = field(default_factory=list)  # text files, token folders: final models are scored on them too
    judge_tokens: Count = 100_000  # of each text that are scored, at most
    jobs: Count = 1  # runs at a time
    threads: Count = 1  # CPU threads of each
    speed: bool = True  # measure speeds at the end, one model an arm
    checkpoints: bool = True  # keep the checkpoints of finished runs
    axis: Literal["training", "inference"] = "training"  # what the picture shows losses over
    results: str = ""  # JSON file of everything, tables beside it as .md (empty: <out_dir>/results.json)
    picture: str = ""  # PNG file (empty: <out_dir>/study.png)
    report: bool = False  # only report what is finished

    def __post_init__(self):
        found = problems(self)
        if self.reference not in self.arms:
            found.append(f"reference={self.reference!r} is not one of the arms: {', '.join(self.arms) or 'none'}")
        for arm, keys in {"common": self.common, **self.arms}.items():
            if not re.fullmatch(r"\w[\w.=+-]*", arm):
                found.append(f"the arm {arm!r} cannot be a folder: letters, digits and _.=+- only")
            if not isinstance(keys, dict):
                found.append(f"the arm {arm} must be a dict of train.py's keys, not {keys!r}")
            elif ours := [key for key in OURS if key in keys]:
                found.append(f"{arm} sets {', '.join(ours)}, which study.py does itself")
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            found.append(f"seeds={self.seeds} must be different, and at least one")
        if found:
            raise ConfigError("; ".join(found))
        self.results = self.results or f"{self.out_dir}/results.json"
        self.picture = self.picture or f"{self.out_dir}/study.png"


# ---------------------------------------------------------------------------------------------------------------------
# What is to be run


@dataclass
class Run:
    arm: str
    seed: int
    folder: Path
    command: list[str]  # without the name of Python
    settings: dict  # every key of train.py that config files and study give, as JSON holds them

    def __post_init__(self):
        self.name, self.log = self.folder.name, self.folder.with_name(f"{self.folder.name}.log")
        self.model = self.folder / "final_model"
        steps, batch, micro_steps, seq_len = map(self.get, ("max_steps", "batch_size", "grad_accum_steps", "seq_len"))
        self.tokens = steps * batch * micro_steps * seq_len

    def get(self, key: str):
        return self.settings.get(key, DEFAULTS.get(key))

    def kept(self, name: str) -> dict:
        """A JSON file of the run's folder, empty where it is not there."""
        path = self.folder / name
        return json.loads(path.read_text()) if path.exists() else {}

    def metrics(self, size: int | None = None) -> list[dict]:
        """The lines of metrics.jsonl, of its last `size` bytes only; one that is cut or being written is left out."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return []
        with open(path, "rb") as f:
            f.seek(max(0, path.stat().st_size - size) if size else 0)
            lines = f.read().split(b"\n")[:-1]
        return [json.loads(line) for line in lines if line[:1] == b"{"]


def plan(cfg: StudyConfig) -> list[Run]:
    """All runs: every arm with the first seed, then with the next. Raises ConfigError."""
    base = {}
    for path in cfg.configs:
        base |= {name: value for name, value in read_config(path).items() if name not in OURS}
    runs = []
    for seed in cfg.seeds:
        for arm, own in cfg.arms.items():
            keys = cfg.common | own
            if flops := keys.pop("flops", None):
                try:
                    keys["max_steps"] = steps_for(flops, base | keys)
                except ValueError as e:
                    raise ConfigError(f"arm {arm}: {e}") from None
            folder = Path(cfg.out_dir) / f"{arm}-{seed}"
            command = [str(ROOT / "train.py"), *cfg.configs, *(f"--{name}={value}" for name, value in keys.items())]
            command += [f"--seed={seed}", f"--out_dir={folder}", "--resume=auto"]
            settings = json.loads(json.dumps(base | keys | {"seed": seed}))
            runs.append(Run(arm, seed, folder, command, settings))
    return runs


def read_config(path: str) -> dict:
    """The settings of a config file of train.py."""
    try:
        names = runpy.run_path(path)
    except Exception as e:  # noqa: BLE001, it is the user's own program
        raise ConfigError(f"config file {path}: {type(e).__name__}: {e}") from None
    hidden = {name for name, value in names.items() if callable(value) or isinstance(value, ModuleType)}
    return {name: value for name, value in names.items() if name not in hidden and not name.startswith("_")}


def steps_for(flops: float, settings: dict) -> int:
    """How many steps spend `flops`, within 1 %. Raises ConfigError where no number does, or what a step costs changes."""
    unclear = [key for key in ("capacity_start", "distill_from", "lora") if settings.get(key)]
    if unclear or settings.get("max_steps"):
        raise ConfigError(f"flops and {(unclear or ['max_steps'])[0]} do not go together: leave one out")
    of_run = DEFAULTS | settings
    given = {f.name: settings[f.name] for f in fields(ModelConfig) if f.name in settings}
    if of_run["init_from"] == "scratch":
        known = SIZES.get(of_run["size"], {}) | given
        vocab_size = {} if "vocab_size" in known else {"vocab_size": read_manifest(of_run["data_dir"])["vocab_size"]}
        config = ModelConfig.preset(of_run["size"], **vocab_size | given)
    else:
        parent = json.loads((Path(find_model(of_run["init_from"])) / "config.json").read_text())
        config = ModelConfig.from_dict(parent, **given)
    with torch.device("meta"):
        per_token = Transformer(config).flops_per_token(of_run["seq_len"], training=True)
    step = per_token * of_run["batch_size"] * of_run["grad_accum_steps"] * of_run["seq_len"]
    steps = round(flops / step)
    if abs(steps * step / flops - 1) > 0.01:
        raise ConfigError(f"flops={flops:g} are {flops / step:.2f} steps: no whole number comes within 1 %")
    return steps


def refuse_changed(cfg: StudyConfig, runs: list[Run]):
    """Raises ConfigError for runs that were begun with other settings than the study now gives them."""
    changed = []
    for run in runs:
        before = run.kept("study.json").get("settings", run.settings)
        keys = [key for key in before | run.settings if before.get(key) != run.settings.get(key)]
        if keys:
            what = ", ".join(f"{key} was {before.get(key)!r} and is now {run.settings.get(key)!r}" for key in keys)
            changed.append(f"{run.name}: {what}")
    if changed:
        cure = "set them back, remove these folders, or name another --out_dir"
        raise ConfigError(f"{cfg.out_dir} holds runs with other settings: {'; '.join(changed)}; {cure}")


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

    def call(self, name: str, command: list[str], log):
        """Runs a program of the project to its end, its output in the open file `log`."""
        if self.signal:
            return
        child = subprocess.Popen([sys.executable, *command], stdout=log, stderr=log, env=self.environment)
        self.running[name] = child
        if self.signal:  # it came between the two
            child.send_signal(self.signal)
        child.wait()
        del self.running[name]

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
    return [text for text in cfg.judge if str([text, cfg.judge_tokens]) not in run.kept("judge.json")]


def complete(cfg: StudyConfig, run: Run, children: Children) -> str | None:
    """Trains and judges what is still to be done of a run. Returns what went wrong, the last line of its log."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.log, "a+") as log:
        if not children.alone(log):
            return None
        if not run.model.exists():
            revisions = dict.fromkeys([*run.kept("study.json").get("git", []), git_revision()])
            document = {"settings": run.settings, "command": run.command, "git": list(revisions)}
            write_whole(run.folder / "study.json", document)
            children.call(run.name, run.command, log)
        if run.model.exists():
            for text in unjudged(cfg, run):
                judge(cfg, run, text, children, log)
            for step in [] if cfg.checkpoints else run.folder.glob("step_*"):
                shutil.rmtree(step)
        if children.signal or (run.model.exists() and not unjudged(cfg, run)):
            return None
        log.seek(0)
        return next((line.strip() for line in reversed(log.read().splitlines()) if line.strip()), "it said nothing")


def judge(cfg: StudyConfig, run: Run, text: str, children: Children, log):
    """Scores a final model on a text under both routings, by bench.py; its losses go to judge.json."""
    seq_len, found = run.get("seq_len"), run.folder / "bench.json"
    windows = -(-cfg.judge_tokens // max(1, seq_len // 2))  # of which each is asked for its second half
    keys = {"tasks": "perplexity", "model_path": run.model, "text": text, "output_path": found, "limit": windows}
    keys |= {"seq_len": seq_len, "batch_size": 8, "device": run.get("device") or "auto", "dtype": "float32"}
    children.call(run.name, [str(ROOT / "bench.py"), *(f"--{key}={value}" for key, value in keys.items())], log)
    if not found.exists():
        return
    rows, losses = json.loads(found.read_text())["perplexity"], {}
    for routing in {row["routing"] for row in rows}:  # a folder has a row for each source
        mine = [row for row in rows if row["routing"] == routing]
        losses[routing] = sum(row["loss"] * row["tokens"] for row in mine) / sum(row["tokens"] for row in mine)
    asked = str([text, cfg.judge_tokens])
    write_whole(run.folder / "judge.json", run.kept("judge.json") | {asked: {"topk": losses["causal"]} | losses})
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
        if not run.model.exists() and rates:
            rate = latest[run.name].get("tokens_per_s") or statistics.fmean(rates.get(run.arm, [mean]))
            left += (run.tokens - latest[run.name].get("tokens", 0)) / rate
    now = ", ".join(
        f"{name} step {latest[name].get('step', 0)} at {latest[name].get('tokens_per_s', 0):,.0f} tokens/s"
        for name in running
    )
    done = f"{sum(run.model.exists() for run in runs)} of {len(runs)} runs"
    return f"{done}; {now}; {tqdm.format_interval(left / jobs) if rates else '?'} left"


def execute(cfg: StudyConfig, runs: list[Run]) -> dict[str, str]:
    """Brings every run to its end, `jobs` at a time: {run that failed: why}. Exits where the study is stopped."""
    failed, said, terminal = {}, time.monotonic(), sys.stderr.isatty()
    waiting = [run for run in runs if not run.model.exists() or unjudged(cfg, run)]
    children = Children(cfg.threads)
    with ThreadPoolExecutor(cfg.jobs) as pool:
        futures = {pool.submit(complete, cfg, run, children): run for run in waiting}
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=2, return_when="FIRST_COMPLETED")
            for future in done:
                if why := future.result():
                    failed[futures[future].name] = why
                    say(f"{futures[future].name} failed, see {futures[future].log}: {why}")
            if (done and not children.signal) or terminal or time.monotonic() > said + 60:
                said, line = time.monotonic(), progress(runs, list(children.running), cfg.jobs)
                print(f"\r\x1b[K{line[:150]}" if terminal else line, end="" if terminal else "\n", file=sys.stderr)
    if terminal:
        print(file=sys.stderr)
    children.release_signals()
    if children.signal:
        say(f"{signal.Signals(children.signal).name}: stopped and saved; the same command goes on")
        sys.exit(128 + children.signal)
    return failed


# ---------------------------------------------------------------------------------------------------------------------
# Measuring, when nothing runs any more


def opened(run: Run):
    """(final model, device, autocast, validation text: ids and targets (B, T) of 8 sequences) of a run."""
    device, autocast = pick_device(
        SimpleNamespace(device=run.get("device") or "auto", dtype=run.get("dtype") or "auto")
    )
    data = TokenData(run.get("data_dir"), "val", run.get("seq_len"))
    x, y = data.batch(0, min(8, len(data)))
    return Transformer.from_pretrained(run.model).to(device), device, autocast, x.to(device), y.to(device)


def measure_costs(run: Run):
    """Writes what causal routing costs a run's model on validation text: FLOPs a token, and the KV cache of what it selects."""
    model, _, _, x, _ = opened(run)
    selected, kv_bytes = cached(model, x)
    flops = model.flops_per_token(x.size(1), capacity=list(selected.values()))
    write_whole(run.folder / "costs.json", {"flops_per_token": flops, "kv_bytes": kv_bytes, "selected": selected})


def measure_speeds(cfg: StudyConfig, run: Run, reference: Run):
    """Writes the tokens/s of a run's model in training, prefill and decoding, taken in turns with the reference's."""
    models, found = {}, {}
    for each in (reference, run):  # the same where the reference is measured
        models[each.name], device, autocast, x, y = opened(each)
    B, T = x.shape
    size, rounds = min(B, run.get("batch_size")), 8  # the first does not count

    def take(measure, tokens, calls):
        times = interleaved(calls, device, warmup=1, repeats=rounds - 1)
        ratios = [theirs / mine for theirs, mine in zip(times[reference.name], times[run.name], strict=True)]
        rate = tokens / statistics.median(times[run.name])
        found[measure] = {"tokens_per_s": rate, "ratio": statistics.median(ratios)}

    steps = {
        each.name: training_step(models[each.name], each, x[:size], y[:size], autocast) for each in (reference, run)
    }
    take("training", size * T, steps)
    with torch.inference_mode():
        for model in models.values():
            model.eval()
        for batch in sorted({1, B}):
            ids, half, few = x[:batch], T // 2, max(1, T // 2 // rounds)
            prefill = {name: partial(prefilled, model, ids) for name, model in models.items()}
            take(f"prefill{batch}", batch * T, prefill)
            take(f"decode{batch}", batch * few, {name: Decoder(m, ids, half, few) for name, m in models.items()})
    write_whole(run.folder / "speed.json", {"reference": reference.name, "threads": cfg.threads, "speeds": found})


def prefilled(model, ids):
    return model(ids, routing="causal", cache=model.new_cache(*ids.shape))


def training_step(model, run: Run, x, y, autocast):
    """A call that does what a step of the run did, at rate 0: the weights stay as they are."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    parent = run.get("distill_from")
    teacher = parent and Transformer.from_pretrained(parent).to(x.device).requires_grad_(False)

    def step():
        with autocast:
            out = model(x, y, teacher=(teacher.model(x)[0], teacher.head_weight) if teacher else None)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(cfg: StudyConfig, finished: list[Run]):
    """Everything that is not measured yet: costs of every run, speeds of one run an arm."""
    torch.set_num_threads(cfg.threads)
    first = {run.arm: run for run in reversed(finished)}
    for run in finished:
        if not run.kept("costs.json"):
            measure_costs(run)
    for run in first.values() if cfg.speed and cfg.reference in first else ():
        reference = first[cfg.reference]
        kept = run.kept("speed.json")
        if (kept.get("reference"), kept.get("threads")) != (reference.name, cfg.threads):
            say(f"speed of {run.name}")
            measure_speeds(cfg, run, reference)


# ---------------------------------------------------------------------------------------------------------------------
# The report


def record(run: Run) -> dict:
    """What the results keep of a finished run; see comparison.py."""
    curve, seconds, tokens = [], 0.0, 0
    for line in run.metrics():
        if "tokens_per_s" in line:  # of the steps since the last such line
            seconds, tokens = seconds + (line["tokens"] - tokens) / line["tokens_per_s"], line["tokens"]
        if "val/loss" in line:
            point = {"tokens": line["tokens"], "flops": line["flops"], "seconds": round(seconds, 3)}
            curve.append(point | {"topk": line["val/loss"], "causal": line["val/loss_causal"]})
    losses = {"validation": {routing: curve[-1][routing] for routing in ("causal", "topk")}}
    for asked, of_text in run.kept("judge.json").items():
        losses[Path(asked.split("'")[1]).name] = of_text
    about, last = run.kept("study.json"), curve[-1]
    command = [Path(about["command"][0]).name, *about["command"][1:]]
    names = {"arm": run.arm, "seed": run.seed, "command": " ".join(command), "git": about["git"]}
    return (
        names
        | {"curve": curve, "losses": losses, "costs": run.kept("costs.json")}
        | {key: last[key] for key in ("tokens", "flops", "seconds")}
    )


def processor(run: Run) -> str:
    device, _ = pick_device(SimpleNamespace(device=run.get("device") or "auto", dtype="float32"))
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return device_name(device) if device.type == "cuda" else (names or [platform.processor() or platform.machine()])[0]


def report(cfg: StudyConfig, finished: list[Run], planned: int):
    """Prints the tables; writes them with everything else to the results, and the picture."""
    speeds = {run.arm: run.kept("speed.json").get("speeds", {}) for run in finished if run.kept("speed.json")}
    document = {"reference": cfg.reference, "axis": cfg.axis, "judge_tokens": cfg.judge_tokens, "threads": cfg.threads}
    document |= {"processor": processor(finished[0]), "torch": torch.__version__, "speeds": speeds}
    document["runs"] = [record(run) for run in finished]
    rows = ",\n ".join(json.dumps(run) for run in document["runs"])  # a line a run
    head = json.dumps(document | {"runs": []})
    write_whole(cfg.results, head.replace('"runs": []', f'"runs": [\n {rows}\n]') + "\n")
    tables = comparison.loss_table(document), comparison.cost_table(document)
    save_figure(comparison.picture(document), cfg.picture)
    picture = os.path.relpath(cfg.picture, Path(cfg.results).parent)
    notes = [
        f"{len(finished)} of {planned} runs. Losses in nats per token: mean ± standard deviation over seeds. Differences "
        "are paired by seed, with their 95 % Student interval, each by itself; n.s.: the interval holds zero.",
        f"{document['processor']}, torch {torch.__version__}, {cfg.threads} threads; speeds: each arm in turns with "
        f"{cfg.reference}. FLOPs at inference: of the tokens that causal routing selects on validation text.",
    ]
    lines = [line for table in tables for line in [*markdown_table(table), ""]]
    lines += [line for note in notes for line in (note, "")] + [f"![losses]({picture})", ""]
    write_whole(Path(cfg.results).with_suffix(".md"), "\n".join(lines))
    for table in tables:
        print_table(table)
        print()
    print(*notes, cfg.results, cfg.picture, sep="\n")


def main(argv: list[str]):
    (settings,) = configure(__doc__, argv, StudyConfig)
    cfg = StudyConfig(**settings)
    runs = plan(cfg)
    refuse_changed(cfg, runs)
    failed = {} if cfg.report else execute(cfg, runs)
    finished = [run for run in runs if run.model.exists()]
    if not cfg.report:
        measure(cfg, finished)
    if finished:
        report(cfg, finished, len(runs))
    for name, why in failed.items():
        say(f"{name} failed: {why}")
    if failed or not finished:
        say(f"{len(finished)} of {len(runs)} runs are finished")
        sys.exit(1)


if __name__ == "__main__":
    cli(main)
