"""Many ranks: DDP and FSDP are one computation on any number of them, from any checkpoint; and the estimate of memory."""

import random
import shutil

import pytest
import torch
from helpers import run_ranks, small_model
from test_train import ARCHITECTURES, VOCAB, common, data, without_clock  # noqa: F401

import checkpoint
import kernels
import parallel
import train
from device import autocast
from errors import CheckpointError, ConfigError, ModelError
from model import ModelConfig, Transformer

STEPS = ["--grad_accum_steps=4", "--max_steps=12", "--log_interval=1", "--eval_interval=6", "--save_interval=0"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Two layers are enough; large weights keep scores apart, as in test_train."""
    folder = tmp_path_factory.mktemp("start")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    for architecture in ARCHITECTURES:
        torch.manual_seed(1)
        model = Transformer(ModelConfig(architecture, VOCAB, num_hidden_layers=2, **shape))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(5)
        model.save_pretrained(folder / architecture)
    return folder


@pytest.fixture(scope="module")
def runs(data, start, tmp_path_factory):  # noqa: F811
    """12 steps of every architecture: <folder>/{one, ddp2, fsdp2, ddp4}/<architecture>, and some that were resumed."""
    folder = tmp_path_factory.mktemp("ranks")

    def job(kind, architecture, *keys):
        out = f"--out_dir={folder / kind / architecture}"
        return [*common(data), *STEPS, f"--init_from={start / architecture}", out, *keys]

    def resumed(kind, architecture, of, *keys):
        step = folder / of / architecture / "step_0000009"
        return [f"--resume={step}", f"--out_dir={folder / kind / architecture}", *keys]

    for architecture in ARCHITECTURES:
        train.main(job("one", architecture))
    fsdp = "--parallel=fsdp"
    saved, two = {"ddp2": ("mod", "dtf"), "fsdp2": ("dtf", "stt")}, []
    for kind, keys in (("ddp2", []), ("fsdp2", [fsdp])):
        for architecture in ARCHITECTURES:
            two.append(job(kind, architecture, *keys, f"--save_interval={9 * (architecture in saved[kind])}"))
    two += [
        resumed("ddp2_ddp2", "dtf", "ddp2"),
        resumed("fsdp2_fsdp2", "stt", "fsdp2"),
        resumed("ddp2_fsdp2", "mod", "ddp2", fsdp),
        resumed("fsdp2_ddp2", "dtf", "fsdp2", "--parallel=ddp"),
    ]
    scratch = ["--init_from=scratch", "--architecture=mod", "--causal_decision=threshold", "--hidden_size=32"]
    scratch += [
        "--capacity_start=1.0",
        "--capacity_anneal_steps=6",
        "--max_steps=8",
        "--gradient_checkpointing",
        "--num_hidden_layers=4",
    ]
    train.main(job("one", "scratch", *scratch))
    two += [job("fsdp2", "scratch", *scratch, fsdp)]
    asked = [f"--init_from={start / 'dense'}", "--architecture=mod", "--routed_layers=auto"]
    asked += ["--router=fitted", "--capacity_choices=0.5"]  # calibrated at the end
    train.main(job("one", "asked", *asked))
    two += [job("fsdp2", "asked", *asked, fsdp)]
    control = ["--init_from=scratch", "--architecture=mod", "--router=random", "--hidden_size=32", "--max_steps=3"]
    two += [job("control", "mod", *control)]
    two += [job("offload", "dtf", fsdp, "--offload")]
    two += [job("half", "dtf", fsdp, "--dtype=bfloat16"), job("half", "stt", fsdp, "--dtype=float16")]
    run_ranks(2, *two)
    four = [
        job("ddp4", architecture, f"--save_interval={9 * (architecture == 'dtf')}") for architecture in ARCHITECTURES
    ]
    run_ranks(4, *four, resumed("ddp4_ddp4", "dtf", "ddp4"))
    return folder


def assert_equal_losses(one, other):
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert b[name] == pytest.approx(value, rel=1e-5, abs=1e-7), (name, a["step"])


def test_the_random_control_trains_on_many_ranks(runs):
    """A router that nobody trains kept DDP waiting for its gradient: "Expected to have finished reduction"."""
    lines = without_clock(runs / "control" / "mod")
    assert [line["step"] for line in lines] == [0, 1, 2, 3] and lines[-1]["train/loss"] < lines[1]["train/loss"]


def test_offloaded_ranks_are_one_too(runs):
    assert_equal_losses(*(without_clock(runs / kind / "dtf") for kind in ("one", "offload")))


@pytest.mark.parametrize("architecture", ["dtf", "stt"])
def test_sharded_half_precision_keeps_float32_masters(architecture, runs):
    """Losses near those of float32; steps of 1e-3 of a weight would be lost in bfloat16, and are not in what is saved."""
    one, half = (
        [line["train/loss"] for line in without_clock(runs / kind / architecture)[1:]] for kind in ("one", "half")
    )
    assert half == pytest.approx(one, rel=0.03) and half != one and half[-1] < half[0]
    model = Transformer.from_pretrained(runs / "half" / architecture / "final_model")
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.float32 and (weight != weight.bfloat16().float()).float().mean() > 0.9


@pytest.mark.parametrize("kind", ["ddp2", "ddp4", "fsdp2"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ranks_are_one(kind, architecture, runs):
    assert_equal_losses(without_clock(runs / "one" / architecture), without_clock(runs / kind / architecture))
    one, many = (
        Transformer.from_pretrained(runs / k / architecture / "final_model").state_dict() for k in ("one", kind)
    )
    for name in one:
        torch.testing.assert_close(many[name], one[name], rtol=1e-3, atol=1e-5)


def test_from_scratch_all_weights_and_thresholds_are_those_of_one_rank(runs):
    """Also an annealed capacity and recomputed activations; average thresholds are moved by each rank's own sequences."""
    both = [without_clock(runs / kind / "scratch") for kind in ("one", "fsdp2")]
    kept = [[{k: v for k, v in line.items() if k == "step" or k.endswith("/loss")} for line in run] for run in both]
    assert_equal_losses(*kept)
    one, two = (Transformer.from_pretrained(runs / k / "scratch" / "final_model") for k in ("one", "fsdp2"))
    assert one.config == two.config and one.config.capacity == 0.5
    assert all(buffer.isfinite() for buffer in two.buffers()) and len(list(two.buffers())) == 2


def test_a_sharded_parent_is_asked_like_a_whole_one(runs):
    """Which blocks it can spare, and for which tokens."""
    assert_equal_losses(*(without_clock(runs / kind / "asked") for kind in ("one", "fsdp2")))
    one, two = (Transformer.from_pretrained(runs / k / "asked" / "final_model") for k in ("one", "fsdp2"))
    (offsets,), (theirs,) = one.config.calibrated.values(), two.config.calibrated.values()
    assert offsets == pytest.approx(theirs, rel=1e-4) and len(offsets) == len(one.config.routed_layers) == 1
    assert one.config.routed_layers == two.config.routed_layers
    (i,) = one.config.routed_layers
    theirs, line = two.model.layers[i].router.weight, one.model.layers[i].router.weight
    torch.testing.assert_close(theirs, line, rtol=1e-3, atol=1e-5)


def test_every_checkpoint_goes_on_anywhere(runs, tmp_path):
    """On the same ranks to the bit; on other ranks, sharded or not, with the same losses."""
    same = ("ddp2_ddp2", "dtf", "ddp2"), ("fsdp2_fsdp2", "stt", "fsdp2"), ("ddp4_ddp4", "dtf", "ddp4")
    for kind, architecture, of in same:
        later = [line for line in without_clock(runs / of / architecture) if line["step"] > 9]
        assert without_clock(runs / kind / architecture) == later
        models = [runs / k / architecture / "final_model" / "model.safetensors" for k in (kind, of)]
        assert models[0].read_bytes() == models[1].read_bytes()
    others = [("ddp2_fsdp2", "mod"), ("fsdp2_ddp2", "dtf")]
    train.main([f"--resume={runs / 'fsdp2' / 'stt' / 'step_0000009'}", f"--out_dir={tmp_path}", "--parallel=ddp"])
    for kind, architecture, path in [(*k, runs / k[0] / k[1]) for k in others] + [("one", "stt", tmp_path)]:
        later = [line for line in without_clock(runs / "one" / architecture) if line["step"] > 9]
        assert_equal_losses(later, without_clock(path)), kind


def test_a_damaged_share_is_refused(runs, tmp_path):
    """60 random changes and cuts of a sharded checkpoint, and every file removed: the one before is used."""
    shutil.copytree(runs / "fsdp2" / "stt", tmp_path / "run")
    path, before = tmp_path / "run" / "step_0000012", tmp_path / "run" / "step_0000009"
    files, rng, warned = sorted(path.iterdir()), random.Random(0), []
    assert sum(file.name.startswith("shard-") for file in files) == 2
    for trial in range(60 + len(files)):
        file = files[trial % len(files)]
        whole = file.read_bytes()
        at = rng.randrange(len(whole))
        if trial >= 60:
            file.unlink()
        elif trial % 3 == 0:
            file.write_bytes(whole[:at])
        else:
            file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :])
        if file.name != "checksums.json" or trial >= 60:
            assert checkpoint.find("auto", tmp_path / "run", warned.append) == before and file.name in warned[-1]
        file.write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"shard-00002.*missing or altered"):
        next(path.glob("shard-00002*")).unlink()
        checkpoint.find(str(path), tmp_path)


def test_a_sharded_step_is_exported_a_file_at_a_time(runs, tmp_path):
    step, final = runs / "fsdp2" / "dtf" / "step_0000012", runs / "fsdp2" / "dtf" / "final_model"
    with pytest.raises(ModelError, match="sharded checkpoint: python checkpoint.py export"):
        Transformer.from_pretrained(step)
    checkpoint.export(step, tmp_path / "out", shard_size=20_000)
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("model-*.safetensors")]
    assert len(sizes) > 2 and max(sizes) < 25_000
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"toy": true}'
    one, many = (Transformer.from_pretrained(path) for path in (final, tmp_path / "out"))
    assert one.config == many.config
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, many.state_dict()[name]), name


def test_sharding_needs_ranks(data, tmp_path):  # noqa: F811
    with pytest.raises(ConfigError, match="start it with torchrun, or set --parallel=ddp"):
        train.main([*common(data), "--parallel=fsdp", f"--out_dir={tmp_path}"])
    with pytest.raises(ConfigError, match="parallel='zero' is not one of ddp, fsdp; offload=True needs parallel"):
        train.TrainConfig(parallel="zero", offload=True)


def test_gradients_are_clipped_as_torch_clips_them():
    ours, theirs = small_model("dtf"), small_model("dtf")
    ids = torch.randint(0, 97, (2, 17))
    for model in (ours, theirs):
        model(ids[:, :-1], ids[:, 1:]).loss.backward()
    norm = parallel.clip_grad_norm(ours.parameters(), 0.5, torch.device("cpu"))
    assert norm == torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5) > 0.5
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)


MEANS = [{"routed_part": "mlp"}, {"kv": "all", "router_input": "normed"}, {"skip": "predict"}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "architecture, means",
    [*((name, {}) for name in ARCHITECTURES), *((name, means) for name in ("mod", "stt") for means in MEANS)],
)
def test_activations_are_what_autograd_keeps(architecture, means, dtype, monkeypatch):
    """The formula against the bytes of the storages that autograd saves in the trunk, parameters and their casts aside."""
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}
    cfg = ModelConfig(architecture, vocab_size=64, num_hidden_layers=8, capacity=0.25, **shape, **means)
    monkeypatch.setattr(kernels, "WRITTEN_OUT", range(64, 1025))
    torch.manual_seed(0)
    model, storages = Transformer(cfg).train(), {}
    ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = {p.numel() for p in model.parameters() if p.ndim == 2}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours and not (
            dtype.itemsize == 2 and tensor.ndim == 2 and tensor.numel() in sizes
        ):
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # held: no address is used twice
        return tensor

    context = autocast(torch.device("cpu"), dtype)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), context:
        model.model(torch.randint(0, 64, (4, 256)))
    saved = sum(size for size, _ in storages.values())
    estimate = parallel.activations(model, train.TrainConfig(seq_len=256, batch_size=4), dtype, "cpu")
    assert estimate == pytest.approx(saved, rel=0.08 if means else 0.06)  # the mask over all keys is not counted


def test_memory_counts_what_a_gpu_repeats(monkeypatch):
    """Keys for each of 4 queries of a group where flash cannot run, and chunks of 4,096 rows where Triton makes the loss."""
    shape = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 4}
    model = Transformer(ModelConfig("mod", vocab_size=1000, routed_layers=[1], kv="all", capacity=0.5, **shape))
    cfg = train.TrainConfig(seq_len=256, batch_size=32)
    monkeypatch.setattr(kernels, "capability", lambda gpu: (9, 0))

    def estimate(dtype, device):
        return parallel.memory(model, cfg, 1, 1, dtype, device)

    repeated = 2 * (8 - 2) * 16 * 256 * 32  # numbers of one layer
    for dtype, layers in ((torch.bfloat16, 1), (torch.float32, 3 + 1 + 0.5)):
        plain, on_gpu = (estimate(dtype, device)["activations"] for device in ("mps", "cuda"))
        assert on_gpu - plain == pytest.approx(layers * repeated * dtype.itemsize)
    monkeypatch.setattr(kernels, "_fused", lambda: kernels._losses_and_gradient)
    torchs = estimate(torch.bfloat16, "cuda")["loss"]
    monkeypatch.setattr(kernels, "_fused", lambda: "in Triton")
    fused = estimate(torch.bfloat16, "cuda")["loss"]
    assert torchs == 8192 * 128 * 2 + 8192 * 1000 * (2 + 8) + 4 * 1000 * 128
    assert fused == 8192 * 128 * 2 + 4096 * 1000 * 2 + 2 * 4 * 1000 * 128
    cfg.distill_from = "a teacher"
    assert estimate(torch.bfloat16, "cuda")["loss"] == fused + 4096 * 1000 * 2
    cfg.distill_from = ""
    model.requires_grad_(False)
    assert estimate(torch.bfloat16, "cuda")["loss"] == fused - 2 * 4 * 1000 * 128
