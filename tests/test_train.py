"""The training loop: its numbers against independent ones, one run on any number of ranks, stopped, resumed, poisoned."""

import itertools
import json
import math
import os
import re
import resource
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import time
import types
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import small_model, toy_data

import checkpoint
import device
import kernels
import parallel
import prepare
import train
from configurator import ConfigError, configure
from conversion import choose_layers
from data import TokenData
from device import peak_flops
from errors import CheckpointError, ModelError, TrainError
from metrics import Metrics, Progress, spikes
from model import SIZES, ModelConfig, Transformer
from optimizer import LossScale, lr_scale, param_groups, step_unless
from sources import read_sources

ARCHITECTURES = ("dense", "mod", "dtf", "stt")
VOCAB, SEQ_LEN = 64, 32
ROOT = Path(train.__file__).parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Model directories to start from. Their large weights keep scores well apart: near ties, a last bit decides."""
    folder = tmp_path_factory.mktemp("start")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    for architecture in ARCHITECTURES:
        torch.manual_seed(1)
        cfg = ModelConfig(architecture, VOCAB, num_hidden_layers=4, max_position_embeddings=64, **shape)
        model = Transformer(cfg)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(5)
        model.save_pretrained(folder / architecture)
    return folder


def common(data):
    """9 steps; the checkpoint of step 4 lies between two lines of metrics."""
    keys = {
        "data_dir": data,
        "device": "cpu",
        "seq_len": SEQ_LEN,
        "batch_size": 4,
        "grad_accum_steps": 2,
        "max_steps": 9,
    }
    keys |= {"log_interval": 3, "eval_interval": 6, "eval_batches": 3, "save_interval": 4, "lr_base": 3e-3}
    return [f"--{key}={value}" for key, value in keys.items()]


@pytest.fixture(autouse=True)
def own_signal_handlers():
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def runs(data, start, tmp_path_factory):
    """A finished run of every architecture."""
    folder = tmp_path_factory.mktemp("runs")
    for architecture in ARCHITECTURES:
        train.main([*common(data), f"--init_from={start / architecture}", f"--out_dir={folder / architecture}"])
    return folder


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_clock(run):
    return [{k: v for k, v in line.items() if k not in ("tokens_per_s", "mfu", "data_wait")} for line in metrics(run)]


def assert_same_run(one, other):
    """Equal metrics, weights and optimizer, to the bit; clock readings excepted."""
    assert without_clock(one) == without_clock(other)
    final = "final_model/model.safetensors"
    assert (one / final).read_bytes() == (other / final).read_bytes()
    last = max(one.glob("step_*")).name
    states = [torch.load(run / last / "optimizer.pt", weights_only=True)["state"] for run in (one, other)]
    for i, state in states[0].items():
        assert all(torch.equal(state[key], states[1][i][key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def cut_back(run, to, step):
    """A copy of a finished run as it lay on disk at an earlier checkpoint, lines of metrics beyond it included."""
    shutil.copytree(run, to)
    shutil.rmtree(to / "final_model")
    for path in to.glob("step_*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    return to


def mean_loss(model, batch, routing):
    """Cross-entropy from the full logits, by torch's own function."""
    ids, targets = batch
    with torch.no_grad():
        return F.cross_entropy(model(ids, routing=routing).logits.flatten(0, 1), targets.flatten()).item()


# -- the parts --------------------------------------------------------------------------------------------------------


def test_schedule():
    scale = [lr_scale(step, 100, 0.1, 0.2) for step in range(101)]
    assert scale[0] == 0.1 and scale[4] == 0.5 and scale[9] == scale[10] == 1  # linear warm-up over 10 steps
    assert scale[55] == pytest.approx(0.6)  # half-way down the cosine: the mean of 1 and 0.2
    assert scale[100] == pytest.approx(0.2) and sorted(scale[10:], reverse=True) == scale[10:]
    assert lr_scale(0, 0, 0.1, 0.2) == 1 and lr_scale(3, 5, 0, 0.2) < 1
    assert [lr_scale(step, 4, 1, 0.2) for step in range(4)] == [0.25, 0.5, 0.75, 1]  # warm-up as long as the run
    assert lr_scale(4, 4, 1, 0.2) == 1


def test_annealed_capacity():
    values = [train.annealed(step, 1.0, 0.3, 50) for step in range(80)]
    assert values[0] == 1.0 and values[50] == values[79] == 0.3 and sorted(values, reverse=True) == values
    assert len(set(values)) == 8
    assert train.annealed(25, 1.0, [0.3, 0.65], 50) == pytest.approx([1 - 0.7 * 4 / 7, 1 - 0.35 * 4 / 7])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_is_in_one_group_and_learns(architecture, start, runs):
    model = Transformer.from_pretrained(start / architecture)
    groups = param_groups(model, train.TrainConfig())
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
    where = {id(p): group for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        kind = re.search(r"layers\.\d+\.(prior|transition|router|causal_router)\.", name)
        kind = {None: "base", "transition": "prior"}.get(kind and kind[1], kind and kind[1])
        assert where[id(p)]["name"] == kind, name
        assert (where[id(p)]["weight_decay"] > 0) == (p.ndim > 1), name
    trained = Transformer.from_pretrained(runs / architecture / "final_model").state_dict()
    unchanged = [name for name, p in model.state_dict().items() if torch.equal(p, trained[name])]
    assert not unchanged


# -- what is logged ---------------------------------------------------------------------------------------------------

TRAIN = {"train/loss", "train/perplexity", "grad_norm", "lr/base", "tokens_per_s", "bad_steps", "data_wait"}
VAL = {"val/loss", "val/loss_causal", "val/perplexity", "val/perplexity_causal"}
ROUTED = {"causal_loss", "causal_accuracy", "causal_capacity", "lr/causal_router", "lr/router"}
SURPRISE = {"S_CE", "S_CU", "G_cont", "beta_ce", "beta_cu", "o_ce", "m_cu", "lr/prior"}
EXPECTED = {
    "dense": TRAIN,
    "mod": TRAIN | ROUTED | {"mod_aux_loss", "mod_z_loss"},
    "dtf": TRAIN | ROUTED | SURPRISE | {"prior_loss"},
    "stt": TRAIN | ROUTED | SURPRISE | {"tpn_loss", "g_reg_loss"},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_metrics(architecture, runs, start, data):
    lines = metrics(runs / architecture)
    assert [line["step"] for line in lines] == [0, 1, 3, 6, 9]
    for line in lines:
        names = {"step", "tokens", "flops"} | (VAL if line["step"] in (0, 6, 9) else set())
        assert set(line) == names | (EXPECTED[architecture] if line["step"] else set())

    # losses, recomputed from the logits of the model before the first step and of the last one
    first, last = (
        Transformer.from_pretrained(path) for path in (start / architecture, runs / architecture / "final_model")
    )
    stream, val = (TokenData(data, split, SEQ_LEN) for split in ("train", "val"))
    losses = [mean_loss(first, stream.batch(4 * m, 4), "topk") for m in range(2)]
    assert lines[1]["train/loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    for line, model in ((lines[0], first), (lines[-1], last)):
        assert line["val/loss"] == pytest.approx(mean_loss(model, val.batch(0, 12), "topk"), rel=1e-6)
        assert line["val/loss_causal"] == pytest.approx(mean_loss(model, val.batch(0, 12), "causal"), rel=1e-6)
    assert lines[-1]["val/loss"] < lines[0]["val/loss"] - 0.3

    line = lines[-1]
    assert line["train/perplexity"] == pytest.approx(math.exp(line["train/loss"]))
    assert line["val/perplexity_causal"] == pytest.approx(math.exp(line["val/loss_causal"]))
    assert line["tokens"] == 9 * 2 * 4 * SEQ_LEN
    assert line["flops"] == line["tokens"] * first.flops_per_token(SEQ_LEN, training=True)
    decay = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 8 / 9))
    assert line["lr/base"] == pytest.approx(3e-3 * decay)
    if architecture != "dense":
        assert line["lr/router"] == pytest.approx(1e-2 * decay)


def test_layers_are_logged_when_asked(data, start, tmp_path):
    train.main(
        [*common(data), f"--init_from={start / 'dtf'}", f"--out_dir={tmp_path}", "--max_steps=1", "--log_layers"]
    )
    line = metrics(tmp_path)[-1]
    for name in ("S_CE", "G_cont", "causal_accuracy", "o_ce"):
        assert line[name] == pytest.approx((line[f"layer_1/{name}"] + line[f"layer_3/{name}"]) / 2, rel=1e-5)


def test_final_model_and_checkpoints(runs):
    for architecture in ARCHITECTURES:
        names = sorted(path.name for path in (runs / architecture).iterdir())
        assert names == ["final_model", "metrics.jsonl", "step_0000008", "step_0000009"]
        assert (runs / architecture / "final_model" / "tokenizer.json").read_text() == '{"toy": true}'
        state = json.loads((runs / architecture / "step_0000009" / "state.json").read_text())
        val_losses = [line["val/loss"] for line in metrics(runs / architecture) if "val/loss" in line]
        assert state["step"] == 9 and state["val_loss"] == val_losses[-1]
        assert state["config"]["model"]["architecture"] == architecture


# -- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_resumed_run_is_the_undisturbed_one(architecture, runs, tmp_path):
    """From step 8, between two lines of metrics, with nothing said but where."""
    resumed = cut_back(runs / architecture, tmp_path / "run", 8)
    train.main([f"--resume={resumed}"])
    assert_same_run(runs / architecture, resumed)


def test_random_numbers_annealing_and_damage_survive_a_resume(data, start, tmp_path, capsys):
    """The random control (its noise goes on), an annealed capacity, scheduled betas; and a damaged last checkpoint."""
    for name, keys in {
        "mod": ["--router=random", "--capacity_start=1.0", "--capacity_anneal_steps=8", "--save_interval=2"],
        "dtf": ["--beta_schedule=cosine", "--beta_ce_range=0.5,2", "--beta_cu_range=0.5,3", "--save_interval=2"],
    }.items():
        arguments = [*common(data), f"--init_from={start / name}", *keys]
        if name == "mod":  # the control has no router of its own
            torch.manual_seed(1)
            shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
            Transformer(ModelConfig("mod", VOCAB, router="random", num_hidden_layers=4, **shape)).save_pretrained(
                tmp_path / "random"
            )
            arguments[-5:] = [f"--init_from={tmp_path / 'random'}", *keys]
        whole = tmp_path / name
        train.main([*arguments, f"--out_dir={whole}", "--keep_last=9"])
        resumed = cut_back(whole, tmp_path / f"{name}_resumed", 6)
        damaged = resumed / "step_0000006" / "optimizer.pt"
        damaged.write_bytes(damaged.read_bytes()[:-100])
        capsys.readouterr()
        train.main([*arguments, f"--out_dir={resumed}", "--keep_last=9", "--resume=auto"])
        err = capsys.readouterr().err
        assert "step_0000006 is damaged: optimizer.pt" in err and "resumed from" in err and "step_0000004" in err
        assert_same_run(whole, resumed)
        config = json.loads((resumed / "final_model" / "config.json").read_text())
        assert config["capacity"] == 0.5
        if name == "dtf":
            cosines = [0.5 * (1 + math.cos(math.pi * s / 9)) for s in (6, 7, 8)]  # of the last three steps
            assert metrics(whole)[-1]["beta_ce"] == pytest.approx(2 - 1.5 * np.mean(cosines), rel=1e-5)
            layer = Transformer.from_pretrained(whole / "final_model").routed[0].router
            assert F.softplus(layer.beta_cu).item() == pytest.approx(3 - 2.5 * cosines[-1], rel=1e-5)


def test_a_run_grows_and_an_early_step_starts_another_history(runs, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(runs / "dense", run)
    train.main([f"--resume={run}"])
    assert "complete" in capsys.readouterr().err
    assert_same_run(runs / "dense", run)
    train.main([f"--resume={run}", "--max_steps=11"])
    assert [line["step"] for line in metrics(run)] == [0, 1, 3, 6, 9, 11]
    train.main([f"--resume={run / 'step_0000009'}", "--max_steps=10"])
    assert [line["step"] for line in metrics(run)] == [0, 1, 3, 6, 9, 10]
    assert (run / "step_0000011.abandoned").is_dir() and not (run / "step_0000011").exists()


def test_other_micro_batches_read_the_same_sequences(data, start, tmp_path):
    for name, keys in (
        ("a", ["--batch_size=4", "--grad_accum_steps=2"]),
        ("b", ["--batch_size=2", "--grad_accum_steps=4"]),
    ):
        train.main(
            [*common(data), f"--init_from={start / 'dense'}", f"--out_dir={tmp_path / name}", *keys, "--max_steps=3"]
        )
    a, b = ([line["train/loss"] for line in metrics(tmp_path / name)[1:]] for name in "ab")
    assert a == pytest.approx(b, rel=1e-5)
    # and a checkpoint of the one may go on as the other, for the tokens of a step are the same
    train.main([f"--resume={tmp_path / 'a'}", "--batch_size=8", "--grad_accum_steps=1", "--max_steps=4"])


def test_killed_at_any_moment_and_resumed_it_is_the_same_run():
    """A short version of `python tests/kill_train.py 100`."""
    command = [sys.executable, "tests/kill_train.py", "6"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and "6 kills" in done.stdout and "equal to the bit" in done.stdout, done.stderr


# -- stopping, poison, a full disk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 0), (signal.SIGUSR1, 0), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_and_saves(number, status, runs, data, start, tmp_path, monkeypatch, capsys):
    """The signal comes in step 5; what is resumed from there is the undisturbed run."""
    calls, batch, handler = [], TokenData.batch, signal.getsignal(number)

    def interrupting(self, first, count):
        if self.split == "train" and first == 5 * 8 - 4:
            calls.append(os.kill(os.getpid(), number))
        return batch(self, first, count)

    monkeypatch.setattr(TokenData, "batch", interrupting)
    arguments = [*common(data), f"--init_from={start / 'dtf'}", f"--out_dir={tmp_path / 'run'}"]
    try:
        train.main(arguments)
        ended = 0
    except SystemExit as e:
        ended = e.code
    assert ended == status and len(calls) == 1 and signal.getsignal(number) is handler
    err = capsys.readouterr().err
    assert f"{signal.Signals(number).name}: stopped and saved in" in err and "--resume=auto" in err
    assert not (tmp_path / "run" / "final_model").exists()
    monkeypatch.setattr(TokenData, "batch", batch)
    train.main([*arguments, "--resume=auto"])
    assert_same_run(runs / "dtf", tmp_path / "run")


def test_a_second_interrupt_stops_at_once(data, start, tmp_path, monkeypatch):
    evaluate = train.evaluate

    def interrupted_twice(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same key press, as torchrun hands it on
        time.sleep(1.1)
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*arguments)

    monkeypatch.setattr(train, "evaluate", interrupted_twice)
    with pytest.raises(KeyboardInterrupt):
        train.main([*common(data), f"--init_from={start / 'dense'}", f"--out_dir={tmp_path}"])


def poison(monkeypatch, steps, what):
    """Make the loss (or only the gradient) of these 0-based steps infinite or NaN; two micro-batches are a step."""
    forward, calls = Transformer.forward, [0]

    def poisoned(self, *arguments, **keys):
        out = forward(self, *arguments, **keys)
        if self.training:
            if calls[0] // 2 in steps:
                out.loss = (
                    out.loss * what if what != "gradient" else out.loss + (self.model.norm.weight.sum() * 0).sqrt()
                )
            calls[0] += 1
        return out

    monkeypatch.setattr(Transformer, "forward", poisoned)


@pytest.mark.parametrize("what", [math.nan, math.inf, "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(what, data, start, tmp_path, monkeypatch):
    """Steps 0 and 1 are poisoned: no parameter moves, nothing is averaged in, and the run goes on learning."""
    poison(monkeypatch, {0, 1}, what)
    arguments = [*common(data), f"--init_from={start / 'dtf'}", f"--out_dir={tmp_path}", "--save_interval=2"]
    train.main([*arguments, "--keep_last=9"])
    before = Transformer.from_pretrained(start / "dtf").state_dict()
    after = Transformer.from_pretrained(tmp_path / "step_0000002").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    lines = {line["step"]: line for line in metrics(tmp_path)}
    assert lines[1]["train/loss"] is None and lines[1]["bad_steps"] == 1 and lines[9]["bad_steps"] == 2
    loss = pytest.approx(math.log(VOCAB), rel=0.2)  # of the text alone: it is the total that was poisoned
    spikes = [{"step": step + 1, "loss": loss, "sequences": [8 * step, 8 * step + 7]} for step in (0, 1)]
    assert lines[1]["spikes"] == spikes[:1] and lines[3]["spikes"] == spikes[1:] and "spikes" not in lines[6]
    stream = TokenData(data, "train", SEQ_LEN)
    model = Transformer.from_pretrained(start / "dtf")
    third = np.mean([mean_loss(model, stream.batch(4 * m, 4), "topk") for m in (4, 5)])
    assert lines[3]["train/loss"] == pytest.approx(third, rel=1e-6)  # the one good step of three
    assert lines[9]["val/loss"] < lines[0]["val/loss"]


def test_the_capacity_that_is_asked_for_goes_before_a_single_choice(data, tmp_path, capsys):
    """Behind a config that calibrates to an eighth, say: that capacity is trained and calibrated to, also after a stop."""
    keys = [*common(data), "--architecture=mod", "--capacity_choices=0.25", "--save_interval=1"]
    train.main([*keys, "--max_steps=2", f"--out_dir={tmp_path / 'run'}"])
    assert "note: capacity=0.5 goes before capacity_choices=[0.25]" in capsys.readouterr().err
    model = Transformer.from_pretrained(tmp_path / "run" / "final_model")
    assert [*model.config.calibrated] == ["0.5"]
    flops = model.train().flops_per_token(SEQ_LEN, training=True)
    assert metrics(tmp_path / "run")[1]["flops"] == pytest.approx(flops * metrics(tmp_path / "run")[1]["tokens"])
    resumed = cut_back(tmp_path / "run", tmp_path / "resumed", 1)
    train.main([*keys, "--max_steps=2", f"--out_dir={resumed}", "--resume=auto"])
    assert_same_run(tmp_path / "run", resumed)
    train.main([*keys, "--capacity_choices=", "--max_steps=1", f"--out_dir={tmp_path / 'none'}"])
    assert Transformer.from_pretrained(tmp_path / "none" / "final_model").config.calibrated is None


def test_a_run_that_ends_at_the_checkpoint_it_goes_on_from(data, tmp_path, capsys):
    """Elsewhere, by a lower max_steps: evaluated and calibrated like any other, and a step of its own at once."""
    keys = [*common(data), "--architecture=mod", "--capacity_choices=0.25,0.75", "--max_steps=5"]
    train.main([*keys, f"--out_dir={tmp_path / 'run'}"])
    step = tmp_path / "run" / "step_0000004"
    assert json.loads((step / "config.json").read_text())["capacity"] == 0.5  # asked for, and never drawn
    for steps, out in ((4, tmp_path / "fork"), (5, tmp_path / "run"), (6, tmp_path / "longer")):
        before = metrics(out) if out.exists() else []
        train.main([f"--resume={step if steps != 5 else 'auto'}", f"--out_dir={out}", f"--max_steps={steps}"])
        config = Transformer.from_pretrained(out / "final_model").config
        assert [*config.calibrated] == ["0.25", "0.5", "0.75"] and config.capacity == 0.5
        assert metrics(out) == before or metrics(out)[-1]["step"] == steps and "val/loss" in metrics(out)[-1]
    assert sorted(path.name for path in (tmp_path / "longer").glob("step_*")) == ["step_0000004", "step_0000006"]
    assert "is complete" in capsys.readouterr().err


def test_two_runs_never_write_to_one_folder(data, tmp_path, monkeypatch):
    """The other one is another process; this one may come back."""
    run = [*common(data), "--max_steps=1", f"--out_dir={tmp_path / 'run'}"]
    (tmp_path / "run").mkdir()
    code = f"import files; files.hold({str(tmp_path / 'run')!r}); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, cwd=ROOT) as other:
        other.stdout.readline()
        with pytest.raises(CheckpointError, match="another run is writing to .*name another out_dir"):
            train.main(run)
        with monkeypatch.context() as patch:  # it is not even searched: the other may end, and have gone on, in between
            patch.setattr(checkpoint, "find", lambda *given: pytest.fail("searched before it was held"))
            with pytest.raises(CheckpointError, match="another run is writing to"):
                train.main([*run, "--resume=auto"])
        other.communicate(b"\n")
    train.main(run)
    train.main([*run, "--resume=auto", "--max_steps=2"])


def test_an_evaluation_that_cannot_be_does_not_keep_a_model_from_the_hub(monkeypatch, capsys):
    cfg = train.TrainConfig(eval_tasks=["code"], push_to_hub="me/it", allow_code_execution=True)
    assert "--allow_code_execution=True" in train.eval_argv(cfg)
    monkeypatch.setattr(train, "train", lambda argv: (cfg, True))
    monkeypatch.setattr(train.publish, "push", lambda *given: "https://hub/me/it")
    sys.modules["bench"], before = types.SimpleNamespace(main=lambda argv: refuse()), sys.modules.get("bench")

    def refuse():
        raise ConfigError("no such task")

    try:
        with pytest.raises(SystemExit) as end:
            train.main([])
    finally:
        sys.modules.pop("bench") if before is None else sys.modules.update(bench=before)
    err = capsys.readouterr().err
    assert (
        end.value.code == 2 and "no such task; final_model is complete" in err and "uploaded: https://hub/me/it" in err
    )


def test_mfu_is_of_all_steps_whatever_each_of_them_cost(monkeypatch):
    """Of capacities that are drawn anew, not of the last one."""
    cfg, progress, clock = train.TrainConfig(max_steps=4), Progress(), iter([0.0, 10.0])
    metrics = Metrics(cfg, progress, peak=100.0)
    metrics.names = ["train/loss"]
    monkeypatch.setattr("metrics.time.perf_counter", lambda: next(clock))
    metrics.start_clock()
    for flops in (300.0, 100.0):
        progress.step, progress.flops = progress.step + 1, progress.flops + flops
        progress.rows.append(torch.tensor([2.0, 1.0, 0.0]))
    assert metrics.read({})["mfu"] == 400 / (10 * 100)


def test_metrics_that_vanish_cost_no_checkpoint(data, tmp_path, monkeypatch):
    def vanishing(self, *given, save=train.Run.save):
        (self.out_dir / "metrics.jsonl").unlink(missing_ok=True)
        return save(self, *given)

    monkeypatch.setattr(train.Run, "save", vanishing)
    train.main([*common(data), f"--out_dir={tmp_path / 'run'}"])
    assert (tmp_path / "run" / "step_0000009").is_dir()


@pytest.mark.parametrize(
    "keys, message",
    [
        (["--architecture=mod", "--capacity_start=1", "--capacity_anneal_steps=20"], "never reaches the capacity"),
        (["--lr_base=-1"], "lr_base=-1.0 must not be negative, and finite"),
        (["--lr_router=inf"], "lr_router=inf must"),
        (["--seed=99999999999999999999999"], "seed="),
        (["--keep_layers=0,1"], "keep_layers needs pretrained weights"),
        (["--distill_from=init_from"], "needs a pretrained model: set init_from"),
        (["--rope_theta=0"], "rope_theta=0.0 must be positive"),
        (["--rope_scaling={'rope_type': 'llama3', 'factor': 8.0}"], "lacks high_freq_factor, low_freq_factor"),
        (["--out_dir="], "out_dir is empty"),
        (["--batch_size=100000000000"], "out of memory; in this order: halve --batch_size"),
    ],
)
def test_settings_that_cannot_be(keys, message, data, tmp_path):
    with pytest.raises((ConfigError, ModelError, TrainError), match=re.escape(message)):
        train.main([*common(data), f"--out_dir={tmp_path / 'run'}", *keys])


@pytest.mark.parametrize("name", ["mod_05b", "dtf_05b", "stt_05b"])
def test_the_papers_settings_stand_behind_those_of_a_conversion(name):
    """All that a routed model may vary is as where nothing is set."""
    sets = train.configure(train.__doc__, [f"config/{name}.py", "config/paper.py"], train.TrainConfig, ModelConfig)
    train_set, model_set = sets
    assert not train_set["capacity_choices"]
    shape = {"vocab_size": 97, "num_hidden_layers": 6}
    given = {key: value for key, value in model_set.items() if key != "routed_share"}
    assert ModelConfig(**shape | given) == ModelConfig(**shape, architecture=given["architecture"])


@pytest.mark.parametrize("keys", [["--architecture=mod", "--causal_decision=threshold"], ["--architecture=stt"]])
def test_one_model_has_many_capacities(keys, data, tmp_path):
    """Another capacity each step, the same after a stop; at the end each of them selects its share, from one file."""
    choices = [0.25, 0.5, 0.75]
    run = [
        *common(data),
        *keys,
        "--hidden_size=32",
        "--num_hidden_layers=4",
        "--batch_size=16",
        "--capacity_choices=0.25,0.75",
        "--seed=5",
    ]
    train.main([*run, "--log_interval=1", "--keep_last=9", f"--out_dir={tmp_path / 'run'}"])
    model = small_model("mod", num_hidden_layers=4)
    seen = [train.drawn([0.25, 0.75], 5, step) for step in range(9)]
    assert {*seen} == {0.25, 0.75} and seen != [train.drawn([0.25, 0.75], 6, step) for step in range(9)]
    flops = [line["flops"] for line in metrics(tmp_path / "run")]
    spent = [after - before for before, after in itertools.pairwise([*flops])]
    cheap, dear = ({cost for cost, c in zip(spent, seen, strict=True) if c == choice} for choice in (0.25, 0.75))
    assert max(cheap) - min(cheap) < 1 and max(dear) - min(dear) < 1 and min(dear) > max(cheap)

    resumed = cut_back(tmp_path / "run", tmp_path / "resumed", 4)
    train.main([f"--resume={resumed}"])
    assert_same_run(tmp_path / "run", resumed)
    ids, _ = TokenData(data, "train", SEQ_LEN).batch(0, train.CALIBRATING // SEQ_LEN)
    final, border = tmp_path / "run/final_model", {}
    for capacity in choices:
        model = Transformer.from_pretrained(final, capacity=capacity).eval()
        with torch.no_grad():
            masks = model(ids, routing="causal", return_masks=True).masks
        assert [mask.float().mean().item() for mask in masks.values()] == pytest.approx([capacity] * 2, abs=0.01)
        border[capacity] = [layer.offset for layer in model.routed]
        model.save_pretrained(tmp_path / "again")
        assert [layer.offset for layer in Transformer.from_pretrained(tmp_path / "again").routed] == border[capacity]
    assert border[0.25] != border[0.75]
    model.set_capacity(0.25)
    assert [layer.offset for layer in model.routed] == border[0.25]
    with pytest.raises(ModelError, match="capacity=0.6 is not calibrated, 0.25, 0.5, 0.75 are: name one"):
        Transformer.from_pretrained(final, capacity=0.6)
    train.main([*common(data), f"--init_from={final}", "--capacity=0.6", "--max_steps=1", f"--out_dir={tmp_path}/on"])
    assert (
        Transformer.from_pretrained(tmp_path / "on/final_model").config.calibrated is None
    )  # its weights have moved on


@pytest.mark.parametrize("architecture", ["mod", "stt"])
def test_float16_learns_as_float32_does(architecture, data, start, runs, tmp_path, monkeypatch):
    """From a scale at which gradients overflow: it halves until they do not, which is no bad step; resumed to the bit."""
    monkeypatch.setattr(LossScale, "FIRST", 2.0**22)
    keys = [f"--init_from={start / architecture}", "--dtype=float16", "--max_steps=16", "--save_interval=1"]
    train.main([*common(data), *keys, "--keep_last=99", f"--out_dir={tmp_path / 'run'}"])
    lines = {line["step"]: line for line in metrics(tmp_path / "run")}
    overflows = int(lines[16]["overflow_steps"])
    assert 1 <= overflows < 10 and lines[16]["loss_scale"] == 2.0 ** (22 - overflows)
    assert lines[16]["bad_steps"] == 0 and not any("spikes" in line for line in lines.values())
    weights = [Transformer.from_pretrained(tmp_path / f"run/step_{n:07d}").state_dict() for n in range(1, 17)]
    moved = sum(not all(torch.equal(a[name], b[name]) for name in a) for a, b in itertools.pairwise(weights))
    assert moved == 16 - overflows  # the first step, of which we have no weights before, overflowed
    train.main(
        [*common(data), f"--init_from={start / architecture}", "--max_steps=16", f"--out_dir={tmp_path / 'float32'}"]
    )
    exact = [line["val/loss"] for line in metrics(tmp_path / "float32") if "val/loss" in line]
    halves = [line["val/loss"] for line in lines.values() if "val/loss" in line]
    assert halves[0] == pytest.approx(exact[0], abs=2e-3) and halves[-1] < halves[0] - 0.1
    resumed = cut_back(tmp_path / "run", tmp_path / "resumed", 7)
    train.main([f"--resume={resumed}"])
    assert_same_run(tmp_path / "run", resumed)


def test_the_loss_scale_doubles_after_long_enough_without_an_overflow_and_ends_at_one():
    scale = LossScale(torch.float16, torch.device("cpu"), {"loss_scale": 4.0, "overflow_steps": 0.0, "good": 0.0})
    good, bad, finite, nan = torch.tensor(0.0), torch.tensor(1.0), torch.tensor(3.0), torch.tensor(math.nan)
    for step in range(LossScale.INTERVAL + 1):
        assert scale.metrics()["loss_scale"] == (8.0 if step == LossScale.INTERVAL else 4.0)
        assert scale.adapt(good, finite) == 0
    assert scale.adapt(bad, nan) == 1 and scale.metrics()["loss_scale"] == 8.0  # the loss itself: no scale helps
    assert [int(scale.adapt(bad, finite)) for _ in range(4)] == [2, 2, 2, 1]
    assert scale.metrics() == {"loss_scale": 1.0, "overflow_steps": 3.0}


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),  # torch's would begin with what lies in memory
        lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9),
    ],
)
def test_a_bad_first_step_changes_nothing_whatever_the_optimizer(optimizer):
    ends = []
    for bad_steps in (0, 2):
        parameter = torch.nn.Parameter(torch.ones(64, 64))
        ours = optimizer([parameter])
        for step in range(bad_steps + 3):
            bad = step < bad_steps
            parameter.grad = torch.full_like(parameter, math.nan if bad else 1.0)
            step_unless(torch.tensor(float(bad)), ours)
        ends.append(parameter.detach().clone())
    assert torch.equal(*ends) and not torch.equal(ends[0], torch.ones(64, 64))


def test_a_step_that_is_not_finite_leaves_the_average_thresholds(data, tmp_path, monkeypatch):
    model = small_model("mod", vocab_size=VOCAB, causal_decision="threshold")
    model.save_pretrained(tmp_path / "start")
    poison(monkeypatch, {1}, math.nan)
    arguments = [*common(data), f"--init_from={tmp_path / 'start'}", f"--out_dir={tmp_path / 'run'}"]
    train.main([*arguments, "--save_interval=1", "--keep_last=9", "--max_steps=3"])
    states = [Transformer.from_pretrained(tmp_path / f"run/step_000000{n}").state_dict() for n in (1, 2, 3)]
    first, bad, last = ([state[f"model.layers.{i}.threshold"].item() for i in (1, 3)] for state in states)
    assert first == bad and all(a != b and math.isfinite(b) for a, b in zip(bad, last, strict=True))


def test_a_spike_is_a_loss_beyond_six_deviations():
    recent = deque([2.0, 2.2] * 10, maxlen=100)  # mean 2.1, deviation 0.1
    table = [[2.69, 0.5, 0.0], [4.0, 0.5, 0.0], [math.nan, 0.5, 1.0], [2.1, 0.5, 0.0]]
    found = spikes(table, 44, recent, 8)
    assert [spike["step"] for spike in found] == [42, 43] and found[0]["sequences"] == [328, 335]
    assert found[0]["loss"] == 4.0 and found[1]["loss"] is None
    assert list(recent)[-3:] == [2.69, 4.0, 2.1]
    assert spikes([[1e9, 1.0, 0.0]], 1, deque([1.0] * 19), 8) == []  # too early to tell


def test_data_that_is_written_anew_under_a_run_is_noticed(data, start, tmp_path, monkeypatch):
    """The checkpoints hold the fingerprint of what the run has opened, not of what lies there now."""
    shutil.copytree(data, tmp_path / "data")
    evaluate = train.evaluate

    def rewriting(*arguments):
        with open(tmp_path / "data" / "manifest.json", "a") as f:
            f.write("\n")
        return evaluate(*arguments)

    monkeypatch.setattr(train, "evaluate", rewriting)
    train.main([*common(tmp_path / "data"), f"--init_from={start / 'dense'}", f"--out_dir={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match="is not the data that the checkpoint was trained on"):
        train.main([f"--resume={tmp_path / 'run'}", "--max_steps=10"])


def test_out_of_memory_names_the_flags(data, start, tmp_path, monkeypatch, capsys):
    def forward(*arguments, **keys):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …")

    monkeypatch.setattr(Transformer, "forward", forward)
    arguments = [*common(data), f"--init_from={start / 'dtf'}", f"--out_dir={tmp_path}"]
    status, err = script(monkeypatch, capsys, arguments)
    last = err.splitlines()[-1]
    assert status == 2 and "Traceback" not in err and "Tried to allocate 2.00 GiB" in last
    for flag in ("--batch_size", "--grad_accum_steps", "--gradient_checkpointing", "--parallel=fsdp", "--offload"):
        assert flag in last

    def unknown(*arguments, **keys):
        raise NotImplementedError("this operator is not there on MPS")  # a RuntimeError, as many are

    monkeypatch.setattr(Transformer, "forward", unknown)
    with pytest.raises(NotImplementedError):
        train.main([*arguments, "--resume=auto"])


def test_the_clock_stops_a_run_too(runs, data, start, tmp_path, capsys):
    arguments = [*common(data), f"--init_from={start / 'stt'}", f"--out_dir={tmp_path}", "--resume=auto"]
    train.main([*arguments, "--max_seconds=0.001"])
    assert "max_seconds=0.001: stopped and saved in" in capsys.readouterr().err
    assert not (tmp_path / "final_model").exists() and (tmp_path / "step_0000001").is_dir()
    train.main([*arguments, "--max_seconds=0"])
    assert_same_run(runs / "stt", tmp_path)


def test_a_small_disk_that_is_really_full(runs, data, start, tmp_path, capsys):
    """Room for one checkpoint and not for two: the first stays, training goes on, and with more room all is well."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        arguments = [*common(data), f"--init_from={start / 'dtf'}", f"--out_dir={disk / 'run'}", "--keep_last=1"]
        with pytest.raises(CheckpointError, match="step 9 is not saved in .*: make room"):
            train.main(arguments)
        err = capsys.readouterr().err
        assert "warning: step 8 is not saved" in err and "(0.0 MB free)" in err
        assert [path.name for path in (disk / "run").glob("step_*")] == ["step_0000004"]
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        train.main([*arguments, "--resume=auto"])
        assert_same_run(runs / "dtf", disk / "run")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_too_many_bad_steps_end_the_run(data, start, tmp_path, monkeypatch):
    poison(monkeypatch, range(2, 99), math.nan)
    arguments = [*common(data), f"--init_from={start / 'mod'}", f"--out_dir={tmp_path}", "--max_steps=60"]
    with pytest.raises(TrainError, match="no finite loss and gradient in 5 steps .*step_0000009"):
        train.main([*arguments, "--max_bad_steps=5", "--keep_last=9"])
    states = [Transformer.from_pretrained(tmp_path / f"step_000000{n}").state_dict() for n in (4, 9)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])  # those before the poison


def test_a_full_disk_is_not_the_end(runs, data, start, tmp_path, monkeypatch, capsys):
    """The disk is full at step 4's checkpoint and has room again at step 6's evaluation."""
    evaluate, (soft, hard) = train.evaluate, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limiting(*arguments):
        limits.pop(0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits[0], hard))
        return evaluate(*arguments)

    limits = [soft, 500, soft, soft]  # bytes of a file, from the evaluations of step 0, 6 and 9 on
    monkeypatch.setattr(train, "evaluate", limiting)
    try:
        train.main([*common(data), f"--init_from={start / 'stt'}", f"--out_dir={tmp_path / 'run'}"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    err = capsys.readouterr().err
    assert "warning: step 4 is not saved" in err and "the metrics wait in memory" in err
    assert_same_run(runs / "stt", tmp_path / "run")

    limits[:] = [soft, soft, soft, 500]
    monkeypatch.setattr(train, "evaluate", limiting)
    try:
        with pytest.raises(CheckpointError, match="step 9 is not saved in .*: make room"):
            train.main([*common(data), f"--init_from={start / 'stt'}", f"--out_dir={tmp_path / 'full'}"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.setattr(train, "evaluate", evaluate)
    train.main([f"--resume={tmp_path / 'full'}"])
    assert_same_run(runs / "stt", tmp_path / "full")


# -- W&B --------------------------------------------------------------------------------------------------------------


def wandb_records(path):
    """The records of a .wandb file: 7 bytes, then blocks of 32 KiB of (crc32, length, type) and a piece of a record."""
    from wandb.proto.wandb_internal_pb2 import Record

    raw, at, piece = path.read_bytes(), 7, b""
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", raw[at : at + 7])
        piece += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, last
            record = Record()
            record.ParseFromString(piece)
            yield record
            piece = b""


def test_wandb_holds_what_metrics_jsonl_holds(data, start, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    keys = ["--wandb_log", "--wandb_project=surprise", "--wandb_entity=team", "--wandb_run_name=first"]
    train.main([*common(data), f"--init_from={start / 'dtf'}", f"--out_dir={tmp_path}", *keys])
    wandb.teardown()  # its process has written everything when it is gone
    history, config, runs = {}, {}, []
    for record in wandb_records(next(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))):
        if record.HasField("run"):
            runs.append(record.run)
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if record.HasField("history"):
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            history[row.pop("_step")] = {k: v for k, v in row.items() if not k.startswith("_")}
    assert {line.pop("step"): line for line in metrics(tmp_path)} == history
    assert (runs[0].project, runs[0].entity, runs[0].display_name) == ("surprise", "team", "first")
    assert config["architecture"] == "dtf" and config["hidden_size"] == 32 and config["seq_len"] == SEQ_LEN
    state = json.loads((tmp_path / "step_0000009" / "state.json").read_text())
    assert runs[0].run_id == state["wandb_id"]


# -- bad input --------------------------------------------------------------------------------------------------------


def script(monkeypatch, capsys, arguments):
    """Run train.py as a script: (exit status, stderr)."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    try:
        runpy.run_path("train.py", run_name="__main__")
        status = 0
    except SystemExit as e:
        status = e.code
    return status, capsys.readouterr().err


def test_bad_input_is_one_line(data, start, runs, tmp_path, monkeypatch, capsys):
    (tmp_path / "typo.py").write_text("max_step = 3\n")
    (tmp_path / "broken.py").write_text("max_steps = = 3\n")
    altered = tmp_path / "altered"
    shutil.copytree(data, altered)
    manifest = json.loads((altered / "manifest.json").read_text())
    (altered / "manifest.json").write_text(json.dumps(manifest | {"tokenizer": "another"}))
    run = tmp_path / "run"
    shutil.copytree(runs / "mod", run)
    new = ["--max_steps=2", "--hidden_size=32", "--out_dir", tmp_path / "new"]
    cases = [
        (["--max_step=3"], "--max_step: unknown key; did you mean max_steps?"),
        ([tmp_path / "typo.py"], "max_step: unknown key; did you mean max_steps?"),
        ([tmp_path / "broken.py"], "SyntaxError"),
        ([tmp_path / "absent.py"], "absent.py"),
        (["--max_steps=many"], "--max_steps: 'many' is not int"),
        (["--seq_len=0", "--keep_last=0", "--warmup_ratio=2"], "seq_len=0 must be at least 1; keep_last=0"),
        (["--dtype=float8"], "dtype='float8' is not one of auto, float32, bfloat16"),
        (["--device=tpu"], "device='tpu' is not available here"),
        (["--capacity_start=1"], "capacity_start and capacity_anneal_steps need each other"),
        (["--data_dir=nowhere"], "python prepare.py"),
        (["--architecture=mamba"], "architecture='mamba' is not one of dense, mod, dtf, stt"),
        (["--hidden_size=30"], "hidden_size=30 is not divisible by num_attention_heads=4"),
        (["--num_key_value_heads=3"], "num_attention_heads=4 is not divisible by num_key_value_heads=3"),
        (["--architecture=mod", "--capacity=1.5"], "capacity=1.5 must lie in (0, 1]"),
        (["--size=5B"], "size='5B' is not one of demo"),
        (["--vocab_size=63"], "has token ids up to 63, the model vocab_size=63"),
        (["--max_position_embeddings=16"], "seq_len=32 is longer than max_position_embeddings=16"),
        (["--seq_len=2000"], "too few for seq_len=2000"),
        (["--capacity_start=1", "--capacity_anneal_steps=3"], "capacity_start=1.0 needs routed layers"),
        (
            [f"--init_from={start / 'mod'}", "--size=demo"],
            f"size='demo' is of a model from scratch, {start / 'mod'} has its own",
        ),
        ([f"--init_from={tmp_path}"], "config.json"),
        ([f"--out_dir={run}"], "already holds a run: --resume=auto continues it"),
        ([f"--resume={tmp_path / 'step_0000007'}"], "no such checkpoint"),
        ([f"--resume={tmp_path}"], "holds no checkpoint"),
    ]
    resume = [f"--resume={run}"]
    bare = [
        ([*resume, "--architecture=dtf"], "architecture was 'mod' and is now 'dtf'"),
        (
            [*resume, "--seq_len=16", "--hidden_size=64"],
            "seq_len was 32 and is now 16, hidden_size was 32 and is now 64",
        ),
        ([*resume, "--batch_size=5"], "batch_size · grad_accum_steps was 8 and is now 10"),
        ([*resume, "--max_steps=3"], "max_steps=3 lies before the checkpoint's step 9"),
        ([*resume, f"--data_dir={altered}"], "is not the data that the checkpoint was trained on"),
        ([*resume, f"--out_dir={runs / 'dtf'}"], "already holds a run"),
    ]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for arguments, message in [([*common(data), *new, *a], m) for a, m in cases] + bare:
        status, err = script(monkeypatch, capsys, arguments)
        assert status == 2, (arguments, err)
        assert message in err and err.startswith("error: ") and err.count("\n") == 1, err
        assert not (tmp_path / "new").exists()
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    tokens = np.fromfile(altered / "train" / "toy-00000.bin", "<u2")
    tokens[:] = VOCAB + 7
    tokens.tofile(altered / "train" / "toy-00000.bin")
    arguments = [*common(data), *new, f"--data_dir={altered}"]
    status, err = script(monkeypatch, capsys, arguments)
    assert status == 2 and "beyond vocab_size=64" in err.splitlines()[-1] and "Traceback" not in err


def test_a_model_is_not_trained_on_another_tokenizers_ids(data, start, tmp_path, monkeypatch, capsys):
    parent, words = tmp_path / "parent", {"a": 0, "b": 1}
    shutil.copytree(start / "dense", parent)
    (parent / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}}))
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data/tokenizer.json").write_text(json.dumps({"model": {"vocab": words | {"c": 2}}}))
    keys = [*common(tmp_path / "data"), f"--out_dir={tmp_path / 'run'}"]
    for more, message in (
        ([f"--init_from={parent}"], f"has another tokenizer than {parent}: prepare the text with python prepare.py"),
        ([f"--init_from={start / 'dense'}", f"--distill_from={parent}"], "has another tokenizer than"),
    ):
        status, err = script(monkeypatch, capsys, [*keys, *more])
        assert status == 2 and message in err.splitlines()[-1] and not (tmp_path / "run").exists()
    same = {"version": "1.0", "model": {"vocab": words}}  # written by another version
    (tmp_path / "data/tokenizer.json").write_text(json.dumps(same))
    assert not train.another_tokenizer(str(parent), tmp_path / "data")
    (tmp_path / "data/tokenizer.json").write_text('{"model": {"voc')
    status, err = script(monkeypatch, capsys, [*keys, f"--init_from={parent}"])
    assert status == 2 and "tokenizer.json is damaged: put back" in err.splitlines()[-1] and "Traceback" not in err


def test_a_resumed_run_takes_keys_that_need_others_of_it(runs, tmp_path):
    """Unsharded runs cannot be offloaded; the rest of what --offload needs is the checkpoint's to say."""
    run = cut_back(runs / "mod", tmp_path / "run", 8)
    with pytest.raises(ConfigError, match="offload.*parallel=fsdp"):
        train.main([f"--resume={run}", "--offload"])
    with pytest.raises(ConfigError, match="lora was False and is now True"):
        train.main([f"--resume={run}", "--lora"])


def test_peak_flops_are_of_the_named_device_or_none(monkeypatch):
    def peak(name, dtype=torch.bfloat16):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        return peak_flops(torch.device("cuda"), dtype)

    assert peak("NVIDIA H100 80GB HBM3") == 989e12 and peak("NVIDIA H100 PCIe") == 756e12
    assert peak("NVIDIA A100-SXM4-80GB") == 312e12 and peak("NVIDIA A10G") == 70e12 and peak("NVIDIA A10") == 125e12
    assert peak("NVIDIA GH200 480GB") == 989e12 and peak("NVIDIA H800 PCIe") == 756e12 and peak("NVIDIA H20") == 148e12
    for other in ("NVIDIA RTX A1000", "NVIDIA RTX A4000", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA L400"):
        assert peak(other) is None
    assert peak("NVIDIA H200", dtype=torch.float32) is None


class Accelerator:
    """A device of another type, as torch would show it: what this machine lacks."""

    def __init__(self, kind):
        self.type = kind


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_a_batch_is_only_copied_behind_the_back_on_cuda(kind):
    class Batch:
        def to(self, device, non_blocking):
            return device.type, non_blocking

    assert device.moved(Batch(), Accelerator(kind)) == (kind, kind == "cuda")


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_the_random_state_of_the_device_is_kept(kind, monkeypatch):
    given = []
    monkeypatch.setattr(getattr(torch, kind), "get_rng_state", lambda: torch.tensor([7]))
    monkeypatch.setattr(getattr(torch, kind), "set_rng_state", given.append)
    states = device.random_state(Accelerator(kind))
    before = torch.rand(3)
    device.set_random_state(Accelerator(kind), states)
    assert torch.equal(torch.rand(3), before) and given == [torch.tensor([7])]
    device.set_random_state(torch.device("cpu"), states)
    assert torch.equal(torch.rand(3), before) and len(given) == 1
    assert set(device.random_state(torch.device("cpu"))) == {"rng"}


def test_what_a_device_takes_of_number_formats(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device.pick_device("auto") == (torch.device("mps"), torch.float32)
    for half in ("bfloat16", "float16"):
        with pytest.raises(ConfigError, match=f"dtype={half} is not to be trusted on MPS"):
            device.pick_device("mps", half)
    limits = (None, "DEFAULT", "AVX512_CORE_AMX", "AVX512_CORE_BF16", "AVX512_CORE")  # of oneDNN
    takes = {(True, True): 4, (True, False): 3, (False, True): 4, (False, False): 0}  # (AMX, AVX512_BF16): so many
    for (amx, avx512_bf16), count in takes.items():
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=amx: has)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=avx512_bf16: has)
        for i, limit in enumerate(limits):
            monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
            if limit:
                monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
            assert device.pick_device("cpu")[1] == (torch.bfloat16 if i < count else torch.float32)
            assert device.pick_device("cpu", "float32")[1] == torch.float32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    precision = torch.get_float32_matmul_precision()
    for has_bf16, dtype in ((True, torch.bfloat16), (False, torch.float16)):  # a T4 only emulates it
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, b=has_bf16: b)
        assert device.pick_device("auto") == (torch.device("cuda", 0), dtype)
    torch.set_float32_matmul_precision(precision)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_run_goes_on_in_the_format_that_it_began_in(data, tmp_path, monkeypatch, capsys):
    """Whatever is the fastest where, or in the version that, it is resumed."""
    keys = [*common(data), "--architecture=mod", "--max_steps=2", "--save_interval=1", f"--out_dir={tmp_path}"]
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(device, "fastest_dtype", lambda kind: "bfloat16")
        train.main(keys)
    resumed = cut_back(tmp_path, tmp_path.with_name("resumed"), 1)
    train.main([f"--resume={resumed}"])
    assert capsys.readouterr().err.count("cpu, 1 rank(s), bfloat16") == 2
    assert_same_run(tmp_path, resumed)


def test_ranks_must_divide_the_accumulation(data):
    val = TokenData(data, "val", SEQ_LEN)
    with pytest.raises(ConfigError, match="grad_accum_steps=6 cannot be divided over 4 ranks: use 8"):
        train.check_fit(train.TrainConfig(seq_len=SEQ_LEN, grad_accum_steps=6), ModelConfig(), val, 4)


def test_help_lists_every_key(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit) as e:
        runpy.run_path("train.py", run_name="__main__")
    assert e.value.code == 0
    out = capsys.readouterr().out
    for line in re.findall(r"^  --\w+=.*", out, re.MULTILINE):
        assert re.search(r"\S  +[^\s(]", line), f"no meaning: {line}"
    for key in ("data_dir", "grad_accum_steps", "lr_causal_router", "wandb_entity", "capacity", "prior_factor"):
        assert f"  --{key}=" in out


@pytest.mark.skipif("COMPILE" not in os.environ, reason="COMPILE=1 pytest tests/test_train.py -k compiled: minutes")
@pytest.mark.parametrize("keys", [[], ["--gradient_checkpointing"], ["--lora"]])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_compiled_run_is_the_eager_one(architecture, keys, data, start, tmp_path, capsys):
    for kind, more in (("eager", []), ("compiled", ["--compile"])):
        out = f"--out_dir={tmp_path / kind}"
        train.main([*common(data), f"--init_from={start / architecture}", out, "--lora_dropout=0", *keys, *more])
    assert "compiled within the first step, " in capsys.readouterr().err
    for a, b in zip(without_clock(tmp_path / "eager"), without_clock(tmp_path / "compiled"), strict=True):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-5)


# -- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", sorted(set(ROOT.glob("config/*.py")) - set(ROOT.glob("config/study_*"))), ids=lambda path: path.name
)
def test_every_config_opens_with_its_launch_line_and_is_read(path):
    launch = rf"(train|prepare)\.py((?: (?:config/|--)\S+)* config/{path.name}(?: --\S+)*)"
    script, arguments = re.search(launch, path.read_text()).groups()
    classes = (train.TrainConfig, ModelConfig) if script == "train" else (prepare.PrepareConfig,)
    settings = configure("", arguments.split(), *classes)
    cfg = classes[0](**settings[0])
    assert cfg.out_dir and (script == "train" or read_sources(cfg))
    assert script == "prepare" or cfg.out_dir != train.TrainConfig.out_dir  # runs of two configs do not mix


def chosen(model_keys, keys, size) -> dict:
    """The keys of a model whose blocks are chosen at its conversion, as if each cost more to remove than the one below."""
    layers = SIZES[size]["num_hidden_layers"]
    kind = ModelConfig(architecture=model_keys["architecture"])
    routed = choose_layers(list(range(layers)), keys["routed_share"], kind) if "routed_share" in keys else None
    return model_keys | {"routed_layers": routed}


def test_configs_of_half_a_billion():
    """Qwen2.5-0.5B's 494,032,768 parameters and the routed parts, by DESIGN's shapes; its rates and batch."""
    d, prior = 896, 3 * 896 * 56 + 896  # SwiGLU of width 56 = 896 / 16, and its norm
    routed = {
        "dense": 0,
        "mod": 12 * (d + 1 + 2 * d + 1),
        "dtf": 7 * (4 + 2 * d + 1 + prior),
        "stt": 7 * (4 + 2 * d + 1 + prior),
    }
    for architecture in ARCHITECTURES:
        keys, model_keys = configure("", [f"config/{architecture}_05b.py"], train.TrainConfig, ModelConfig)
        cfg = train.TrainConfig(**keys)
        assert cfg.init_from == "Qwen/Qwen2.5-0.5B" and model_keys["architecture"] == architecture
        with torch.device("meta"):
            model = Transformer(ModelConfig.preset("0.5B", **chosen(model_keys, keys, "0.5B")))
        assert sum(p.numel() for p in model.parameters()) == 494_032_768 + routed[architecture]
        flops = cfg.max_steps * 1_048_576 * model.flops_per_token(cfg.seq_len, training=True)
        said = (ROOT / f"config/{architecture}_05b.py").read_text()
        assert f"{flops / 1e18:.1f} · 10^18 FLOPs" in " ".join(said.split())
        rates = cfg.lr_base, cfg.lr_prior, cfg.lr_router, cfg.lr_causal_router
        assert rates == (1e-5, 1e-3, 1e-2, 1e-3)
        assert (cfg.seq_len, cfg.batch_size, cfg.grad_accum_steps, cfg.seed) == (1024, 16, 64, 42)
        assert (cfg.weight_decay, cfg.warmup_ratio, cfg.grad_clip) == (0.01, 0.01, 1.0)


@pytest.mark.parametrize("architecture", ARCHITECTURES[1:])
def test_configs_that_keep_what_the_parent_knew(architecture):
    """Put behind an architecture's plain config they change what they are about, and nothing else."""
    plain, soft = configure("", [f"config/{architecture}_05b.py"], train.TrainConfig, ModelConfig)
    ways = {
        "anneal": ({"capacity_start": 1.0, "capacity_anneal_steps": 1800}, {"gate": "straight_through"}),
        "distill": ({"distill_from": "init_from"}, {"distill_weight": 1.0}),
    }
    for way, (train_keys, model_keys) in ways.items():
        argv = [f"config/{architecture}_05b.py", f"config/{way}.py", f"--out_dir=out/{architecture}_05b_{way}"]
        given = configure("", argv, train.TrainConfig, ModelConfig)
        assert given[0] == plain | train_keys | {"out_dir": f"out/{architecture}_05b_{way}"}
        assert given[1] == soft | model_keys
    assert train.TrainConfig(**given[0]).distill_from == plain["init_from"]


@pytest.mark.parametrize("size, parameters", [("3B", 3_085_938_688), ("7B", 7_615_616_512)])
@pytest.mark.parametrize("architecture", ARCHITECTURES[1:])
def test_configs_of_billions_are_sharded_and_fit(architecture, size, parameters, monkeypatch):
    """Qwen2.5's published counts and less than one per cent of routed parts; by the estimate on 8 GPUs of 80 GB."""
    path = f"config/{size.lower()}.py"
    more = ["--gradient_checkpointing"] if architecture == "stt" else []
    keys, model_keys = configure("", [f"config/{architecture}_05b.py", path, *more], train.TrainConfig, ModelConfig)
    cfg = train.TrainConfig(**keys)
    assert (
        cfg.init_from == f"Qwen/Qwen2.5-{size}"
        and cfg.parallel == "fsdp"
        and model_keys["architecture"] == architecture
    )
    with torch.device("meta"):
        model = Transformer(ModelConfig.preset(size, **chosen(model_keys, keys, size)))
    assert parameters < sum(p.numel() for p in model.parameters()) < 1.01 * parameters
    monkeypatch.setattr(kernels, "capability", lambda gpu: (9, 0))
    monkeypatch.setattr(kernels, "_fused", lambda: "in Triton")
    on_h100 = {"micro_steps": cfg.grad_accum_steps // 8, "dtype": torch.bfloat16, "device": "cuda"}
    parts = parallel.memory(model, cfg, 8, **on_h100)
    assert f"{architecture} {sum(parts.values()) / 1e9:.0f} GB" in " ".join(Path(path).read_text().split())
    assert sum(parts.values()) < 64e9
    whole = parallel.memory(model, train.TrainConfig(**keys | {"parallel": "ddp"}), 8, **on_h100)
    assert whole["optimizer"] == pytest.approx(8 * parts["optimizer"]) == pytest.approx(8 * parameters, rel=0.01)


@pytest.mark.parametrize("name", ["quickstart", "demo", "scratch_50m"])
def test_configs_from_scratch(name):
    keys, model_keys = configure("", [f"config/{name}.py"], train.TrainConfig, ModelConfig)
    cfg = train.TrainConfig(**keys)
    assert cfg.init_from == "scratch" and cfg.lr_base > 1e-5
    with torch.device("meta"):
        model = Transformer(ModelConfig.preset(cfg.size, vocab_size=4096, **model_keys))
    assert model.config.max_position_embeddings >= cfg.seq_len


def test_the_last_step_is_followed_by_an_evaluation(tmp_path, capsys, monkeypatch):
    text, data, run = tmp_path / "text.jsonl", tmp_path / "data", tmp_path / "run"
    source = (ROOT / "train.py").read_text()
    rows = [{"text": source[start : start + 400]} for start in range(0, 16_000, 400)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare.main([f"--input={text}", f"--out_dir={data}", "--vocab_size=300", "--val_fraction=0.5", "--num_proc=1"])
    keys = [f"--data_dir={data}", f"--out_dir={run}", "--architecture=mod", "--hidden_size=32", "--max_steps=2"]
    keys += ["--num_hidden_layers=2", "--seq_len=32", "--batch_size=8", "--eval_batches=1000", "--device=cpu"]
    keys += ["--eval_tasks=perplexity"]
    train.main(keys)
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["routing"]: row for row in results["perplexity"]}
    assert results["config"]["model_path"] == f"{run}/final_model" and set(rows) == {"causal", "topk"}
    # the same text in windows that share context, where train.py's blocks stand alone: near, not equal
    assert rows["causal"]["loss"] == pytest.approx(metrics(run)[-1]["val/loss_causal"], rel=0.02)

    # lm-eval reads thousands of task files to know their names
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **how: types.SimpleNamespace(all_tasks=["hellaswag"]))
    with pytest.raises(ConfigError, match="tasks=perplexty is unknown; did you mean perplexity"):
        train.main([*keys, "--eval_tasks=perplexty", f"--out_dir={tmp_path / 'other'}"])
    assert not (tmp_path / "other").exists()  # found before the first step


@pytest.mark.parametrize("architecture", ARCHITECTURES[1:])
def test_an_annealed_conversion_starts_as_its_parent(architecture, data, start, tmp_path):
    keys = [*common(data), f"--init_from={start / 'dense'}", "--max_steps=8"]
    train.main([*keys, f"--out_dir={tmp_path / 'dense'}"])
    keys += [f"--architecture={architecture}", "--gate=straight_through", "--capacity_choices=0.5"]
    keys += ["--capacity_start=1.0", "--capacity_anneal_steps=8", f"--out_dir={tmp_path / 'routed'}"]
    train.main(keys)
    parent, child = (metrics(tmp_path / name)[0]["val/loss"] for name in ("dense", "routed"))
    assert child == pytest.approx(parent, rel=1e-5)


def test_distillation(data, start, tmp_path, capsys):
    keys = [*common(data), f"--init_from={start / 'dense'}", "--architecture=mod", "--gate=straight_through"]
    keys += [f"--distill_from={start / 'dense'}", "--distill_weight=0.5"]
    run = tmp_path / "run"
    train.main([*keys, f"--out_dir={run}"])
    line = metrics(run)[1]
    student = Transformer.from_pretrained(start / "dense", architecture="mod", gate="straight_through")
    teacher = Transformer.from_pretrained(start / "dense")
    torch.manual_seed(42)  # as train.py seeds the routers that a conversion adds
    again = Transformer.from_pretrained(start / "dense", architecture="mod", gate="straight_through")
    stream, losses = TokenData(data, "train", SEQ_LEN), []
    for micro in range(2):
        ids, _ = stream.batch(4 * micro, 4)
        with torch.no_grad():
            p, q = (model(ids).logits.log_softmax(-1) for model in (again, teacher))
        losses.append((q.exp() * (q - p)).sum(-1).mean().item())
    assert line["distill_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    flops = student.flops_per_token(SEQ_LEN, training=True) + teacher.flops_per_token(SEQ_LEN)
    assert line["flops"] == pytest.approx(flops * line["tokens"])
    train.main([*keys, "--lora", "--max_steps=1", f"--out_dir={tmp_path / 'lora'}"])
    cheaper = metrics(tmp_path / "lora")[1]
    student = Transformer.from_pretrained(tmp_path / "lora" / "final_model").train()
    flops = student.flops_per_token(SEQ_LEN, training=True) + teacher.flops_per_token(SEQ_LEN)
    assert cheaper["flops"] == pytest.approx(flops * cheaper["tokens"])
    near = tmp_path / "near"
    train.main([*keys, "--distill_weight=50", f"--out_dir={near}"])
    assert metrics(near)[-1]["distill_loss"] < 0.8 * metrics(run)[-1]["distill_loss"]
    saved = json.loads((run / "final_model" / "config.json").read_text())
    assert saved["distill_weight"] == 0.5 and saved["architecture"] == "mod"

    for name, message in (("mod", "is mod, a dense model is needed"), ("none", "neither a directory nor a hub id")):
        with pytest.raises((ConfigError, ModelError), match=message):
            train.main([*keys, f"--distill_from={start / name}", f"--out_dir={tmp_path / 'other'}"])


def test_weights_that_cannot_be_used_are_refused_by_name(data, start, tmp_path, monkeypatch, capsys):
    from safetensors.torch import load_file, save_file

    def changed(name, **config):
        folder = tmp_path / name
        shutil.copytree(start / "dense", folder)
        before = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(before | config))
        return folder, load_file(folder / "model.safetensors")

    def index(folder, shards):
        (folder / "model.safetensors").unlink()
        for file, tensors in shards.items():
            save_file(tensors, folder / file)
        found = {name: file for file, tensors in shards.items() for name in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": found}))

    for name, config in {
        "window": {"use_sliding_window": True},
        "rope": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        "mistral": {"model_type": "mistral"},
        "shape": {"intermediate_size": 96},
    }.items():
        changed(name, **config)
    folder, tensors = changed("pickle")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    folder, tensors = changed("unknown")
    save_file(tensors | {"model.extra": torch.ones(1)}, folder / "model.safetensors")
    folder, tensors = changed("missing")
    save_file({k: v for k, v in tensors.items() if k != "model.norm.weight"}, folder / "model.safetensors")
    folder, tensors = changed("twice")
    index(folder, {"a.safetensors": tensors, "b.safetensors": {"model.norm.weight": torch.ones(32)}})
    folder, tensors = changed("lost")
    index(folder, {"a.safetensors": tensors, "b.safetensors": {"x": torch.ones(1)}})
    (folder / "b.safetensors").unlink()
    folder, tensors = changed("escape")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../dense/model.safetensors"}}')
    folder, tensors = changed("torn")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ')
    for name, message in {
        "window": "use_sliding_window=true is not supported",
        "rope": "RoPE scaling {'rope_type': 'yarn', 'factor': 4.0} is not supported",
        "mistral": "model_type='mistral' is not supported",
        "shape": "has shape (32, 64), (32, 96) is expected",
        "pickle": "pickled weights (pytorch_model.bin)",
        "unknown": "unknown tensor model.extra",
        "missing": "missing tensors model.norm.weight",
        "twice": "tensor model.norm.weight is in two files",
        "lost": "b.safetensors is missing",
        "escape": "points outside its directory: ../dense/model.safetensors",
        "torn": "is not an index of safetensors files",
    }.items():
        keys = [f"--init_from={tmp_path / name}", "--architecture=dtf", f"--out_dir={tmp_path / 'new'}"]
        status, err = script(monkeypatch, capsys, [*common(data), *keys])
        assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, err
        assert message in err and str(tmp_path / name) in err
        assert not (tmp_path / "new").exists()
