"""Checkpoints: whole or absent, refused when altered, the one before is used, and nothing lost on a full disk."""

import json
import random
import resource
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

import architectures
import checkpoint
import files
import publish
from errors import CheckpointError
from model import ModelConfig, Transformer

# What a model card says of a run.
FACTS = {"tokens": 64, "flops": 1e6, "world_size": 1, "torch": "2", "config": {"train": {"init_from": "scratch"}}}
FACTS["config"]["train"]["seq_len"] = 8
FACTS["about"] = {"base_model": None, "tokenizer": "toy", "eot_token": 3, "sources": {}, "commands": [], "git": None}
FACTS["about"]["validation"] = {"step": 0, "loss": 3.5, "loss_causal": 3.25}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small model and an AdamW with state; and a tokenizer directory."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = Transformer(ModelConfig(architecture="dtf", vocab_size=32, num_hidden_layers=2, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = torch.randint(0, 32, (2, 8))
    model(ids, ids).loss.backward()
    optimizer.step()
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    (tokenizer / "tokenizer.json").write_text('{"a": 1}')
    return model, optimizer, tokenizer


def save(run, step, trained, val_loss=None, keep_last=9):
    model, optimizer, tokenizer = trained
    mine = {"rng": torch.get_rng_state(), "rows": torch.ones(1, 2)}
    state = {"step": step, "val_loss": val_loss, **FACTS}
    return checkpoint.save(run, state, model, optimizer, mine, tokenizer, keep_last).result()


def names(run):
    return sorted(path.name for path in run.iterdir())


def test_what_is_saved_comes_back(tmp_path, trained):
    model, optimizer, _ = trained
    path = save(tmp_path, 7, trained, 3.5)
    assert path.name == "step_0000007" and checkpoint.find("auto", tmp_path) == path
    assert checkpoint.find(str(path), "elsewhere") == checkpoint.find(str(tmp_path), "elsewhere") == path
    assert checkpoint.read_state(path) == {"step": 7, "val_loss": 3.5, **FACTS}
    for name, tensor in Transformer.from_pretrained(path).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    stored = torch.load(path / "optimizer.pt", weights_only=True)
    for i, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(state[key], stored["state"][i][key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    assert (path / "tokenizer.json").read_text() == '{"a": 1}'


def test_the_last_ones_and_the_best_are_kept(tmp_path, trained):
    for step, loss in ((10, 5.0), (20, 4.0), (30, None), (40, 4.5), (50, 4.2)):
        save(tmp_path, step, trained, loss, keep_last=2)
    assert names(tmp_path) == ["step_0000020", "step_0000040", "step_0000050"]


def test_no_damage_goes_unseen(tmp_path, trained):
    """200 single-byte changes and cuts at random places, and every file removed: none is loaded, each is named."""
    before, path = save(tmp_path, 1, trained), save(tmp_path, 2, trained)
    files = sorted(path.iterdir())
    rng, warned = random.Random(0), []
    for trial in range(200 + len(files)):
        file = files[trial % len(files)]
        whole = file.read_bytes()
        at = rng.randrange(len(whole))
        if trial >= 200:
            file.unlink()
        elif trial % 4 == 0:
            file.write_bytes(whole[:at])
        else:
            file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :])
        try:
            found = checkpoint.find("auto", tmp_path, warned.append)
            if file.name == "checksums.json" and found == path:  # only white space may change without a consequence
                assert json.loads(file.read_text()) == json.loads(whole)
            else:
                assert found == before and len(warned) == 1 and str(path) in warned[0], (trial, file)
                if file.name != "checksums.json":
                    assert file.name in warned[0]
                with pytest.raises(CheckpointError, match="damaged"):
                    checkpoint.find(str(path), tmp_path)
        finally:
            file.write_bytes(whole)
            warned.clear()
    (before / "optimizer.pt").unlink()
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint of .* is intact"):
        checkpoint.find("auto", tmp_path, warned.append)


def test_checksums_lead_nowhere_else(tmp_path, trained):
    path = save(tmp_path, 1, trained)
    sums = json.loads((path / "checksums.json").read_text())
    (path / "checksums.json").write_text(json.dumps(sums | {"../../secret": "0" * 64}))
    with pytest.raises(CheckpointError, match=r"checksums\.json"):
        checkpoint.verify(path)


def test_a_full_disk_leaves_what_was_there(tmp_path, trained):
    before = save(tmp_path, 1, trained)
    size = (before / "optimizer.pt").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (size // 2, (before / "model.safetensors").stat().st_size // 2, 10):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # writing beyond fails, as on a full disk
        try:
            with pytest.raises(CheckpointError, match="cannot write .*step_0000002"):
                save(tmp_path, 2, trained)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert names(tmp_path) == ["step_0000001"]
        checkpoint.verify(before)
    assert checkpoint.find("auto", tmp_path) == before
    save(tmp_path, 2, trained)
    assert names(tmp_path) == ["step_0000001", "step_0000002"]


def test_a_full_disk_at_the_start_of_a_sharded_checkpoint(tmp_path, trained, monkeypatch):
    """Known before the ranks begin to write together: one that does not come would keep the others waiting."""
    model, optimizer, tokenizer = trained

    def save_config(directory):
        raise OSError("no space left on device")

    monkeypatch.setattr(model, "save_config", save_config)
    state = {"step": 1, "val_loss": None, **FACTS}
    saving = checkpoint.save(tmp_path, state, model, optimizer, {}, tokenizer, 2, group=object())
    with pytest.raises(CheckpointError, match="no space left"):
        saving.result()
    assert names(tmp_path) == []


def test_lines_that_do_not_fit_wait(tmp_path):
    path, lines = tmp_path / "metrics.jsonl", ["second " * 1000 + "\n"]
    path.write_text("first\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(OSError):
            checkpoint.append_lines(path, lines)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "first\n" and len(lines) == 1
    checkpoint.append_lines(path, lines)
    assert path.read_text() == "first\n" + "second " * 1000 + "\n" and lines == []


def test_rewinding_keeps_one_history(tmp_path, trained):
    for step in (10, 20, 30):
        save(tmp_path, step, trained)
    (tmp_path / "step_0000040.partial").mkdir()  # of a save that was killed
    lines = [json.dumps({"step": step, "loss": step / 7}) for step in (0, 10, 15, 20, 25)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 28, "lo')  # and of a torn write
    (tmp_path / "final_model").mkdir()  # of step 30
    checkpoint.rewind(tmp_path, 20, complete=True)
    kept = ["final_model.abandoned", "metrics.jsonl", "step_0000010", "step_0000020", "step_0000030.abandoned"]
    assert names(tmp_path) == kept
    assert (tmp_path / "metrics.jsonl").read_text() == "\n".join(lines[:4]) + "\n"
    assert checkpoint.find("auto", tmp_path).name == "step_0000020"
    (tmp_path / "final_model").mkdir()  # of step 20
    checkpoint.rewind(tmp_path, 20, complete=True)
    assert "final_model" in names(tmp_path)
    checkpoint.rewind(tmp_path, 20, complete=False)  # the run goes on: it is no longer the final one
    assert "final_model" not in names(tmp_path)


def test_where_a_run_starts(tmp_path, trained):
    assert checkpoint.find("none", tmp_path / "new") is None and checkpoint.find("auto", tmp_path / "new") is None
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.find(str(tmp_path), tmp_path)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoint.find(str(tmp_path / "step_0000003"), tmp_path)
    with pytest.raises(CheckpointError, match="step_size holds no checkpoint"):  # a run of that name
        checkpoint.find(str(tmp_path / "step_size"), tmp_path)
    (tmp_path / "finished" / "final_model").mkdir(parents=True)
    for resume in ("none", "auto"):  # never over a model, even if its checkpoints were deleted
        with pytest.raises(CheckpointError, match="another --out_dir"):
            checkpoint.find(resume, tmp_path / "finished")
    save(tmp_path, 1, trained)
    with pytest.raises(CheckpointError, match="--resume=auto.*another --out_dir"):
        checkpoint.find("none", tmp_path)


def script(monkeypatch, capsys, *arguments):
    """Run checkpoint.py as a script: (exit status, stderr)."""
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", *map(str, arguments)])
    try:
        runpy.run_path("checkpoint.py", run_name="__main__")
        status = 0
    except SystemExit as e:
        status = e.code
    return status, capsys.readouterr().err


def test_export(tmp_path, trained, monkeypatch, capsys):
    path, out = save(tmp_path, 5, trained), tmp_path / "out"
    assert script(monkeypatch, capsys, "export", path, out)[0] == 0
    model_files = ["README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    code = [f"{name}.py" for name in publish.code_of(Path(architectures.__file__))]
    assert "hf.py" in code and names(out) == sorted(model_files + code)
    ids = torch.arange(8)[None]
    model = trained[0].eval()
    with torch.no_grad():
        assert torch.equal(Transformer.from_pretrained(out)(ids).logits, model(ids).logits)

    (path / "model.safetensors").write_bytes(b"no")
    shutil.rmtree(out)
    for arguments, message in (
        (("export", path, out), "model.safetensors is missing or altered"),
        (("export", path, tmp_path), "already exists"),
        (("export", path), "usage is"),
        (("eksport", path, out), "usage is"),
    ):
        status, err = script(monkeypatch, capsys, *arguments)
        assert status == 2 and message in err and err.count("\n") == 1 and "Traceback" not in err
        assert not out.exists()


def test_a_folder_is_replaced_whole_though_a_kill_has_left_the_one_before(tmp_path):
    path = tmp_path / "final_model"
    for content in ("first", "second"):
        (tmp_path / "final_model.old").mkdir(exist_ok=True)
        (tmp_path / "final_model.old" / "left").write_text("by a kill")
        with files.folder_written_whole(path) as folder:
            (folder / "content").write_text(content)
        assert [p.name for p in tmp_path.iterdir()] == ["final_model"]
        assert [p.name for p in path.iterdir()] == ["content"] and (path / "content").read_text() == content
