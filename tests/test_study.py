"""study.py on toy data: one study that is killed, goes on, has an arm that fails, and is reported; the statistics."""

import dataclasses
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers import toy_data
from tokenizers import Tokenizer, models

import comparison
import costs
import study
import train
from errors import ConfigError
from model import ModelConfig, Transformer

ROOT = Path(__file__).parents[1]
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
RUN = {"seq_len": 32, "batch_size": 4, "log_interval": 10, "save_interval": 20, "num_key_value_heads": 1}
RUN |= {"eval_interval": 20, "eval_batches": 2, "device": "cpu", "flops": 1.5e9, "min_lr_ratio": 0.1}
CONFIG = """
out_dir, configs, results = {folder!r} + "/runs", [{folder!r} + "/base.py"], {folder!r} + "/r.json"
common = {common}
arms = {{"dense": {{}}, "half": {{"architecture": "dtf"}}, "broken": {{"eval_tasks": "no_such_task"}}}}
seeds, judge, judge_tokens, jobs = [1, 2], [{folder!r} + "/data"], 320, 2
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    vocabulary = {f"t{n}": n for n in range(1, 64)} | {"<|endoftext|>": 0}
    data = toy_data(folder / "data")
    Tokenizer(models.WordLevel(vocabulary, unk_token="t1")).save(str(data / "tokenizer.json"))
    (folder / "base.py").write_text(f"data_dir = {str(data)!r}\nlr_base = 1e-2\nmax_steps = 3\n")
    (folder / "study.py").write_text(CONFIG.format(folder=str(folder), common=RUN | SHAPE))
    return folder


def run(folder, *argv) -> int:
    """The exit status of study.py, in this process."""
    try:
        study.main([str(folder / "study.py"), *argv])
    except SystemExit as e:
        return e.code
    return 0


def stop_when(child, condition, number):
    until = time.monotonic() + 40
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    assert condition() and child.poll() is None
    child.send_signal(number)


@pytest.fixture(scope="module")
def killed(folder):
    """A study that was stopped by SIGTERM once a run had trained for some steps: its exit status and that run's steps."""
    command = [sys.executable, str(ROOT / "study.py"), str(folder / "study.py"), "--jobs=1"]
    with open(folder / "killed.log", "w") as log:
        child = subprocess.Popen(command, stderr=log, cwd=folder)
    metrics = folder / "runs" / "dense-1" / "metrics.jsonl"
    stop_when(child, lambda: metrics.exists() and metrics.stat().st_size > 0, signal.SIGTERM)
    status = child.wait(30)
    steps = [path.name for path in (folder / "runs" / "dense-1").glob("step_*")]
    return status, steps


@pytest.fixture(scope="module")
def finished(folder, killed):
    """The exit status of the same study, gone on with."""
    return run(folder)


def test_a_stopped_study_hands_the_signal_on_and_its_runs_are_saved(folder, killed):
    status, steps = killed
    assert status == 128 + signal.SIGTERM
    assert "SIGTERM: stopped; the same command goes on" in (folder / "killed.log").read_text()
    assert steps and not (folder / "runs" / "dense-1" / "final_model").exists()
    assert not (folder / "runs" / "half-1.log").exists(), "nothing new is begun"


def test_it_goes_on_and_an_arm_that_fails_does_not_keep_the_others(folder, killed, finished, capsys):
    assert finished == 1
    for name in ("dense-1", "dense-2", "half-1", "half-2"):
        assert (folder / "runs" / name / "final_model" / "config.json").exists()
    assert "resumed from" in (folder / "runs" / "dense-1.log").read_text()
    assert not (folder / "runs" / "broken-1" / "final_model").exists()


def test_a_second_time_nothing_is_done_but_what_failed(folder, finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").glob("*/*") if "broken" not in str(path)}
    assert len(before) >= 4 * 7 and run(folder, "--seeds=1", "--only=half,broken") == 1
    assert before == {path: path.stat().st_mtime_ns for path in before}
    error = capsys.readouterr().err
    assert "broken-1 failed" in error and "no_such_task" in error
    assert "4 of 5 runs are finished; missing: broken-1" in error and "dense-1 failed" not in error
    assert len(json.loads((folder / "r.json").read_text())["runs"]) == 4, "what is not asked for again stays"


def test_changed_settings_are_refused_with_the_cure(folder, finished):
    for path, old, new in ((folder / "study.py", '"dtf"', '"mod"'), (folder / "base.py", "1e-2", "2e-2")):
        text = path.read_text()
        path.write_text(text.replace(old, new))
        try:
            with pytest.raises(
                ConfigError, match=r"half-1: \w+ was .* and is now .*remove these folders and .*, or name"
            ):
                run(folder, "--report")
        finally:
            path.write_text(text)


def test_other_data_under_the_same_name_are_refused_but_reported(folder, finished):
    manifest = folder / "data" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"weight": 1', '"weight": 2'))
    try:
        assert manifest.read_text() != text
        with pytest.raises(ConfigError, match=r"dense-1: .*data held other text.*half-2: .*remove these folders and"):
            run(folder, "--only=half")
        assert run(folder, "--report") == 0
    finally:
        manifest.write_text(text)


def test_flops_give_totals_within_one_percent(folder, finished):
    assert run(folder, "--report") == 0
    document = json.loads((folder / "r.json").read_text())
    assert len(document["runs"]) == 4
    for each in document["runs"]:
        assert each["flops"] == pytest.approx(RUN["flops"], rel=0.01)
    tokens = {each["arm"]: each["tokens"] for each in document["runs"]}
    assert tokens["half"] > tokens["dense"]


def test_a_report_needs_no_data_and_what_all_arms_lack_is_said_once(folder, finished, tmp_path, capsys):
    assert run(folder, "--report") == 0
    (tmp_path / "r.json").write_text((folder / "r.json").read_text().replace(str(folder / "data"), "gone"))
    settings = str(RUN | SHAPE | {"data_dir": "gone"})
    elsewhere = [f"--out_dir={tmp_path}/runs", f"--results={tmp_path}/r.json"]
    assert run(folder, *elsewhere, "--report", "--common", settings) == 0
    assert len(json.loads((tmp_path / "r.json").read_text())["runs"]) == 4
    with pytest.raises(ConfigError, match="arm dense, half.*: gone is no data folder"):
        run(folder, *elsewhere, "--common", settings)


def test_flops_that_no_number_of_steps_spends_are_refused(folder):
    common = str(RUN | SHAPE | {"flops": 3e7})
    with pytest.raises(ConfigError, match=r"arm dense, broken: flops=3e\+07 are .* steps.*; arm half: flops=3e\+07"):
        run(folder, "--common", common)
    with pytest.raises(ConfigError, match="flops and max_steps do not go together"):
        run(folder, "--common", str(RUN | {"max_steps": 3}))


def test_the_report_has_losses_costs_and_a_picture(folder, finished, capsys):
    assert run(folder, "--report") == 0
    printed, markdown = capsys.readouterr().out, (folder / "r.md").read_text()
    document = json.loads((folder / "r.json").read_text())
    of_dense = [each["losses"]["data"]["causal"] for each in document["runs"] if each["arm"] == "dense"]
    of_half = [each["losses"]["data"]["causal"] for each in document["runs"] if each["arm"] == "half"]
    mean, half = sum(of_dense) / 2, abs(of_dense[0] - of_dense[1]) / math.sqrt(2)
    d = [b - a for a, b in zip(of_dense, of_half, strict=True)]
    width = 12.7062 * abs(d[0] - d[1]) / 2  # s / √n of two numbers is half of their distance
    ns = " n.s." if abs(d[0] + d[1]) / 2 <= width else ""
    for cell in (f"{mean:.4f} ± {half:.4f}", f"{(d[0] + d[1]) / 2:+.4f} ± {width:.4f}{ns} ("):
        assert cell in printed and cell in markdown
    for head in ("data, top-k", "validation, causal", "validation at ", "training, FLOPs", "KV cache, bytes a token"):
        assert head in printed and head in markdown
    for measure in comparison.SPEEDS:
        assert document["speeds"]["dense"][measure]["ratio"] == 1
        assert document["speeds"]["half"][measure]["tokens_per_s"] > 0
    assert (folder / "r.png").read_bytes()[1:4] == b"PNG" and "![losses](r.png)" in markdown
    first = document["runs"][0]
    assert first["curve"][-1]["causal"] == first["losses"]["validation"]["causal"]
    assert first["command"].startswith("train.py ") and first["git"] and first["data"]
    assert set(document["measured_on"]) == {"dense", "half"} and "1 threads, torch" in document["measured_on"]["half"]
    assert 0 < first["seconds"] < 60 and first["costs"]["kv_bytes"] == 2 * 2 * 16 * 4  # 2 layers, k and v of 16 floats


def test_another_machine_goes_on_from_the_results(folder, finished, tmp_path, capsys):
    """Without the runs' folders: what is in the results is not run again, what is not there is."""
    assert run(folder, "--report") == 0
    before = json.loads((folder / "r.json").read_text())
    kept = before | {"runs": [each for each in before["runs"] if (each["arm"], each["seed"]) != ("half", 2)]}
    (tmp_path / "r.json").write_text(json.dumps(kept))
    elsewhere = [f"--out_dir={tmp_path}/runs", f"--results={tmp_path}/r.json"]
    assert run(folder, *elsewhere, "--speed=false") == 1  # broken is broken here too
    assert (
        sorted(path.name for path in (tmp_path / "runs").glob("*/final_model/.."))
        and not (tmp_path / "runs/dense-1").exists()
    )
    after = json.loads((tmp_path / "r.json").read_text())
    assert after["speeds"] == before["speeds"] and len(after["runs"]) == 4
    for one, other in zip(before["runs"], after["runs"], strict=True):
        clocks = dict.fromkeys(("seconds", "command", "curve", "git"))
        assert one | clocks == other | clocks  # a run repeated elsewhere has the same losses
    with pytest.raises(ConfigError, match="half-1: lr_base was 0.01 and is now 0.02"):
        run(folder, *elsewhere, "--common", str(RUN | SHAPE | {"lr_base": 0.02}))


def test_settings_are_those_that_train_takes(folder):
    """Texts of a config become numbers and lists; what train.py would refuse is refused before anything runs."""
    keys = {"capacity_choices": 0.5, "seq_len": "64", "init_from": folder / "parent", "lr_base": 1}
    settings = study.settings_of([str(folder / "base.py")], keys)
    assert settings["capacity_choices"] == [0.5] and settings["seq_len"] == 64 and settings["max_steps"] == 3
    assert settings["init_from"] == str(folder / "parent") and type(settings["lr_base"]) is float
    assert study.settings_of([], keys | {"distill_from": "init_from"})["distill_from"] == settings["init_from"]
    for wrong, said in (
        ({"lr_base": "no number"}, "arm dense.*lr_base.*'no number' is not float"),
        ({"lr_bse": 1}, "did you mean lr_base?"),
        ({"offload": True}, "offload=True needs parallel=fsdp"),
        ({"flops": 0}, "flops=0 must be a number above 0"),
        ({"flops": "1e9"}, "flops='1e9' must be a number above 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            run(folder, "--common", str(RUN | SHAPE | wrong))
    with pytest.raises(ConfigError, match="judge=no/such.txt is not there"):
        run(folder, "--judge=no/such.txt")


def test_a_judged_text_is_known_by_what_it_says(folder, finished, tmp_path):
    """Edited, it is asked again; of two with one name the one that the study names counts; results alone are left out."""
    (settings,) = study.configure("", [str(folder / "study.py")], study.StudyConfig)
    texts = [tmp_path / name / "t.txt" for name in ("a", "b")]
    for text in texts:
        text.parent.mkdir()
        text.write_text(f"of {text}")
    cfg = study.StudyConfig(**settings | {"judge": [str(texts[0])], "results": str(tmp_path / "r.json")})
    shutil.copytree(folder / "runs" / "dense-1", tmp_path / "dense-1")
    mine = dataclasses.replace(study.plan(cfg)[0], folder=tmp_path / "dense-1")
    judged = {
        str(text): {"causal": n, "topk": n, "limit": 320, "data": study.digest(text)} for n, text in enumerate(texts)
    }
    (tmp_path / "dense-1" / "judge.json").write_text(json.dumps(judged))
    assert study.unjudged(cfg, mine) == []
    document = study.document_of(cfg, [mine])
    assert document["runs"][0]["losses"]["t.txt"]["causal"] == 0
    assert comparison.losses(document, "t.txt", "causal") == {"dense": {1: 0}}
    texts[0].write_text("something else")
    assert study.unjudged(cfg, mine) == cfg.judge
    assert comparison.losses(study.document_of(cfg, [mine]), "t.txt", "causal") == {"dense": {}}


@pytest.mark.parametrize("axis", ["training", "inference"])
def test_diverged_runs_are_named_and_the_others_reported(axis, folder, finished, tmp_path):
    assert run(folder, "--report") == 0
    document = json.loads((folder / "r.json").read_text()) | {"axis": axis}
    for diverged in (["half-2"], ["dense-1"], ["half-1", "half-2"], ["dense-1", "half-1", "dense-2", "half-2"]):
        runs = json.loads(json.dumps(document["runs"]))
        for each in runs:
            if f"{each['arm']}-{each['seed']}" in diverged:
                each |= {"losses": {}, "curve": []}
        comparison.report(document | {"runs": runs}, f"{tmp_path}/r.json")
        assert f"Diverged, and in no mean: {', '.join(diverged)}." in (tmp_path / "r.md").read_text()


def test_only_the_named_arms_are_run(folder, tmp_path):
    elsewhere = [f"--out_dir={tmp_path}/runs", f"--results={tmp_path}/r.json"]
    (settings,) = study.configure("", [str(folder / "study.py"), *elsewhere, "--only=half"], study.StudyConfig)
    assert [run.name for run in study.plan(study.StudyConfig(**settings))] == ["half-1", "half-2"]


def test_without_speeds_the_picture_is_over_flops():
    """A picture of inference before a speed was measured shows every arm, at its share of the reference's FLOPs."""
    losses = {"dense": [3.0, 3.2], "half": [3.4], "drop": [3.3]}
    runs = [
        {"arm": arm, "seed": seed, "losses": {"validation": {"causal": loss}}, "costs": {"flops_per_token": flops}}
        for (arm, of_arm), flops in zip(losses.items(), (200, 150, 100), strict=True)
        for seed, loss in enumerate(of_arm)
    ]
    document = {"reference": "dense", "axis": "inference", "runs": runs, "speeds": {arm: {} for arm in losses}}
    (ax,) = comparison.picture(document).axes
    marks = [tuple(point) for line in ax.lines if line.get_marker() != "None" for point in line.get_xydata()]
    assert marks == [(1, 3.0), (1, 3.2), (0.75, 3.4), (0.5, 3.3)]
    assert "FLOPs" in ax.get_xlabel() and {"● dense", "● half", "● drop"} == {text.get_text() for text in ax.texts}
    runs[0]["losses"]["book"] = {"causal": 9.0}  # which not every arm was asked for
    assert "validation" in comparison.picture(document).axes[0].get_ylabel()
    document["speeds"]["half"] = {"decode1": {"ratio": 1.5}}
    (ax,) = comparison.picture(document).axes
    marks = [tuple(point) for line in ax.lines if line.get_marker() != "None" for point in line.get_xydata()]
    assert ax.get_title(loc="left") == "Decoding, batch 1" and marks == [(1.5, 3.4)]


def test_losses_on_other_lengths_of_text_are_not_compared():
    book = {"dense": {"limit": 300, "causal": 3.0}, "half": {"limit": 1000, "causal": 3.1}}
    runs = [{"arm": arm, "seed": 1, "losses": {"book": found}} for arm, found in book.items()]
    document = {"reference": "dense", "judge_tokens": 300, "runs": runs}
    assert comparison.losses(document, "book", "causal") == {"dense": {1: 3.0}, "half": {}}


def test_a_model_that_settings_do_not_rebuild_is_not_timed_as_another():
    settings = {"init_from": "parent", "routed_layers": [1]}
    assert costs.is_rebuilt(settings)
    assert not any(
        costs.is_rebuilt(settings | k) for k in ({"keep_layers": [0]}, {"lora": True}, {"routed_layers": "auto"})
    )


@pytest.mark.parametrize("results", ["r.md", "[]", '{"runs": [{}]}', "{"])
def test_results_that_are_none_are_refused_and_left_alone(results, folder, finished, tmp_path):
    path = tmp_path / (results if results == "r.md" else "r.json")
    path.write_text(results)
    with pytest.raises(ConfigError, match="must end in .json" if results == "r.md" else "is damaged: .*; remove it"):
        study.main([str(folder / "study.py"), f"--results={path}", "--report"])
    assert path.read_text() == results


def test_what_is_selected_is_counted_on_the_text_that_a_run_was_evaluated_on(folder, finished, monkeypatch):
    (settings,) = study.configure("", [str(folder / "study.py")], study.StudyConfig)
    (run_,) = (each for each in study.plan(study.StudyConfig(**settings)) if each.name == "half-1")
    counted = []
    monkeypatch.setattr(costs, "cached", lambda model, ids: counted.append(ids.shape) or ({0: 1.0}, 0.0))
    for eval_batches in (1, 3):
        costs.of_inference(run_.model, run_.settings | {"eval_batches": eval_batches})
    assert counted == [(4, 32), (12, 32)]


def test_timing_a_step_moves_no_average_threshold():
    model = Transformer(ModelConfig("mod", causal_decision="threshold", **SHAPE, num_key_value_heads=1))
    settings, ids = {"grad_accum_steps": 3, "device": "cpu", "dtype": "float32"}, torch.zeros(2, 8, dtype=torch.long)
    model.routed[0].threshold.fill_(0.25)
    costs.training_steps(model, settings, ids, ids, nullcontext())()
    assert model.routed[0].threshold == 0.25


def test_a_timed_step_is_a_step_of_the_run(monkeypatch):
    """Three micro-batches at each of two capacities, then one step of the optimizer."""
    model, calls = Transformer(ModelConfig("mod", **SHAPE, num_key_value_heads=1)), []
    model.forward = lambda x, y, teacher: calls.append(model.config.capacity) or Transformer.forward(model, x, y)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda optimizer: calls.append("step"))
    settings = {"grad_accum_steps": 3, "capacity_choices": [0.5, 1.0], "device": "cpu", "dtype": "float32"}
    ids = torch.zeros(2, 8, dtype=torch.long)
    costs.training_steps(model, settings, ids, ids, nullcontext())()
    assert calls == [0.5, 0.5, 0.5, "step", 1.0, 1.0, 1.0, "step"] and costs.micro_batches(settings) == 6


def test_runs_that_diverged_or_lost_their_files(folder, finished, tmp_path, capsys):
    """The first has no loss at the end, the second is what the results know, or left out."""
    shutil.copytree(folder / "runs", tmp_path / "out")
    keys = [f"--out_dir={tmp_path / 'out'}", f"--results={tmp_path / 'results.json'}", "--report"]
    for name, change in (("dense-1", "null"), ("half-1", None)):
        metrics = tmp_path / "out" / name / "metrics.jsonl"
        *lines, last = metrics.read_text().splitlines()
        last = json.loads(last) | {"val/loss": None, "val/loss_causal": None}
        metrics.write_text("\n".join([*lines, json.dumps(last), ""]) if change else "")
    run(folder, *keys)
    found = {f"{run['arm']}-{run['seed']}": run for run in json.loads((tmp_path / "results.json").read_text())["runs"]}
    assert "validation" not in found["dense-1"]["losses"] and found["dense-1"]["tokens"] > 0
    assert "half-1" not in found and "has lost its metrics.jsonl" in capsys.readouterr().err
    (tmp_path / "out" / "dense-1" / "study.json").write_text("{")
    with pytest.raises(ConfigError, match=r"study.json is damaged: .*; remove it"):
        study.main([str(folder / "study.py"), *keys])


def test_speeds_follow_the_reference(folder, finished, tmp_path):
    """Those of an earlier report as multiples of another arm's, or not at all; also of arms that the config has lost."""
    of = {"dense": 1.0, "half": 1.1, "drop": 1.3}
    document = {"reference": "dense"}
    document["speeds"] = {arm: {"decode1": {"tokens_per_s": 10 * r, "ratio": r}} for arm, r in of.items()}
    assert comparison.against(document, "dense") == document["speeds"]
    ratios = {arm: speeds["decode1"]["ratio"] for arm, speeds in comparison.against(document, "drop").items()}
    assert ratios == {"dense": 1 / 1.3, "half": 1.1 / 1.3, "drop": 1.0}
    assert comparison.against(document, "another") == {"dense": {}, "half": {}, "drop": {}}
    assert run(folder, "--report") == 0
    before = json.loads((folder / "r.json").read_text())
    lost = before["runs"][-1] | {"arm": "lost"}
    document = before | {
        "runs": [*before["runs"], lost],
        "speeds": before["speeds"] | {"lost": before["speeds"]["half"]},
    }
    (tmp_path / "r.json").write_text(json.dumps(document))
    elsewhere = [f"--results={tmp_path}/r.json"]
    assert run(folder, "--report", *elsewhere) == 0
    after = json.loads((tmp_path / "r.json").read_text())
    assert after["speeds"] == document["speeds"] and len(after["runs"]) == 5


def test_times_are_compared_where_they_were_measured_side_by_side(folder, finished, tmp_path, capsys):
    """Of runs that other machines have made too: a step needs no trained model. Else no losses at equal time."""
    assert run(folder, "--report") == 0
    capsys.readouterr()
    before = json.loads((folder / "r.json").read_text())
    (tmp_path / "r.json").write_text(json.dumps(before | {"speeds": {}, "measured_on": {}}))
    elsewhere = [f"--out_dir={tmp_path}/runs", f"--results={tmp_path}/r.json"]
    assert run(folder, *elsewhere, "--report") == 0
    printed = capsys.readouterr().out
    assert "side by side of dense, half." in printed and "validation at " not in printed
    document = json.loads((tmp_path / "r.json").read_text())
    assert len(comparison.picture(document).axes) == 1
    assert run(folder, *elsewhere, "--only=dense,half") == 0
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["speeds"]["dense"] == {"training": document["speeds"]["dense"]["training"] | {"ratio": 1.0}}
    assert set(document["speeds"]["half"]) == {"training"} and not list(tmp_path.glob("runs/*/final_model"))
    assert "validation at " in capsys.readouterr().out and len(comparison.picture(document).axes) == 2
    alone = document["runs"] + [run | {"arm": "untimed"} for run in document["runs"] if run["arm"] == "half"]
    _, losses = comparison.at_equal_time(document | {"runs": alone})
    assert losses["untimed"] == {} and losses["half"] and len(comparison.picture(document | {"runs": alone}).axes) == 2
    run_, rate = document["runs"][-1], document["speeds"]["dense"]["training"]["tokens_per_s"]
    ratio = document["speeds"][run_["arm"]]["training"]["ratio"]
    assert comparison.seconds(document, run_, run_["curve"][-1]) == pytest.approx(run_["tokens"] / (rate * ratio))


def test_two_studies_may_work_on_the_same_results(folder, finished):
    """What one has finished since the other began stays."""
    assert run(folder, "--report") == 0
    before = json.loads((folder / "r.json").read_text())
    (settings,) = study.configure("", [str(folder / "study.py")], study.StudyConfig)
    cfg = study.StudyConfig(**settings)
    mine = [each for each in study.plan(cfg) if each.name == "half-1"]
    document = study.document_of(cfg, mine)
    assert sorted((each["arm"], each["seed"]) for each in document["runs"]) == sorted(
        (each["arm"], each["seed"]) for each in before["runs"]
    )


def test_a_run_that_cannot_be_counted_fails_alone_and_is_not_called_finished(folder, finished, tmp_path, capsys):
    shutil.copytree(folder / "runs", tmp_path / "runs")
    for run_ in ("dense-1", "half-2"):
        (tmp_path / "runs" / run_ / "costs.json").unlink()
    (tmp_path / "runs" / "half-2" / "final_model" / "config.json").write_text("{")
    elsewhere = [f"--out_dir={tmp_path}/runs", f"--results={tmp_path}/r.json"]
    assert run(folder, *elsewhere, "--speed=false", "--only=dense,half") == 1
    assert "half-2 failed: ModelError: " in capsys.readouterr().err
    known = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert [(each["arm"], each["seed"]) for each in known] == [("dense", 1), ("half", 1), ("dense", 2)]
    assert all(each["costs"] for each in known)


def test_a_log_that_another_process_writes_is_waited_for(folder, finished):
    """A study that was killed by SIGKILL leaves runs behind that go on: they hold the lock of their log."""
    with open(folder / "lock.log", "a") as log:
        children = study.Children(1)
        assert children.alone(log)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1.2)"], stdout=log)
    with open(folder / "lock.log", "a") as log:
        began = time.monotonic()
        assert children.alone(log) and child.wait(1) == 0 and time.monotonic() > began + 0.5
    children.release_signals()


def test_paired_intervals_are_students():
    a, b = {1: 4.0, 2: 5.0, 3: 6.0, 4: 1.0}, {1: 3.9, 2: 4.7, 3: 5.8, 5: 9.0}
    mean, half = comparison.paired(a, b)  # differences 0.1, 0.3, 0.2: s = 0.1, t(2) = 4.3027
    assert mean == pytest.approx(0.2) and half == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-6)
    assert comparison.paired({1: 2.0}, {1: 1.5}) == (0.5, math.inf)
    assert math.isnan(comparison.paired({1: 2.0}, {2: 1.5})[0])
    assert comparison.difference(a, b) == "+0.2000 ± 0.2484 n.s. (+4.17%)"
    # Student's t with 1 and 2 degrees of freedom has closed quantiles
    p = 0.975
    assert comparison.STUDENT[0] == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-5)
    assert comparison.STUDENT[1] == pytest.approx((2 * p - 1) / math.sqrt(2 * p * (1 - p)), rel=1e-4)
    student = pytest.importorskip("scipy.stats").t
    assert comparison.STUDENT == pytest.approx([student.ppf(p, n) for n in range(1, 21)], rel=1e-4)


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("study_*.py")), ids=lambda path: path.stem)
def test_the_studies_that_come_along_are_sound(path):
    (settings,) = study.configure("", [str(path)], study.StudyConfig)
    cfg = study.StudyConfig(**settings)
    assert f"python study.py config/{path.name}" in path.read_text()
    assert cfg.out_dir == ("out/demo" if path.stem == "study_demo" else f"out/{path.stem}")
    known = {f.name for schema in (train.TrainConfig, ModelConfig) for f in dataclasses.fields(schema)} | {"flops"}
    assert {key for keys in (cfg.common, *cfg.arms.values()) for key in keys} <= known
    assert all("architecture" in keys for keys in cfg.arms.values())  # a config file may name another
    if "dense_short" in cfg.arms:
        keys = {arm: {"vocab_size": 4096} | cfg.common | cfg.arms[arm] for arm in ("dense_short", "mod_0.5")}
        costs = {}
        for arm, of_arm in keys.items():
            of_model = {key: value for key, value in of_arm.items() if hasattr(ModelConfig, key)}
            model = Transformer(ModelConfig.preset(of_arm.get("size", "demo"), **of_model))
            costs[arm] = [model.flops_per_token(256, training) for training in (True, False)]
        assert costs["dense_short"] == pytest.approx(costs["mod_0.5"], rel=0.01)


def test_bad_studies_are_refused_at_once(folder):
    wrong = [
        "--reference=half_",
        "--only=none",
        "--judge=a/x,b/x",
        "--seeds=1,1",
        '--arms={"a/b": {}, "c": {"seed": 1}}',
    ]
    with pytest.raises(ConfigError) as e:
        run(folder, *wrong)
    for part in (
        "reference='half_'",
        "'a/b' cannot be a folder",
        "c sets seed",
        "judge=a/x,b/x",
        "seeds=[1, 1]",
        "only=none is not",
    ):
        assert part in str(e.value)
