"""From the hub and to the hub, through a hub on 127.0.0.1; what a model directory tells its reader."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ARCHITECTURES, random_ids, relative_error, small_model
from hub import publish_mixture, serve
from test_train import script as train_script  # in this process

import architectures
import publish
from model import Transformer
from tokenizer import train_tokenizer

VOCAB = 512
PYTHON_FILES = sorted(Path(publish.__file__).parent.glob("*.py"))
LOGITS = """
import sys, torch
from model import Transformer
models = [Transformer.from_pretrained(name) for name in sys.argv[1:]]
torch.manual_seed(0)
ids = torch.randint(0, 512, (2, 40))
for routing in ("topk", "causal"):
    logits = [model(ids, routing=routing).logits for model in models]
    assert all(torch.equal(each, logits[0]) for each in logits), routing
"""


@pytest.fixture(scope="module")
def tokenizer():
    """The bytes of a tokenizer.json of at most 400 tokens, cut into words as Qwen2's does."""
    return train_tokenizer([path.read_text() for path in PYTHON_FILES[:4]], 400)


@pytest.fixture(scope="module")
def hub(tmp_path_factory, tokenizer):
    """A hub with the seven sources of the mixture and tiny Qwen2 models: sharded and bfloat16, single and float32."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    root = tmp_path_factory.mktemp("hub")
    publish_mixture(root)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    theirs = Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCAB, num_hidden_layers=4, tie_word_embeddings=True, **shape))
    theirs.save_pretrained(root / "models/tiny/single")
    theirs.bfloat16().save_pretrained(root / "models/Qwen/Qwen2.5-0.5B", max_shard_size="30KB")
    (root / "models/Qwen/Qwen2.5-0.5B/tokenizer.json").write_bytes(tokenizer)
    assert len(list((root / "models/Qwen/Qwen2.5-0.5B").glob("*.safetensors"))) > 2
    with serve(root) as env:
        yield env


def run(env, *argv):
    """A Python process that uses the hub."""
    return subprocess.run(
        [sys.executable, *map(str, argv)], check=False, env=os.environ | env, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def trained(hub, tmp_path_factory):
    """(folder with data/ and out/, what train.py printed): config/dtf_05b.py, made small, and pushed as user/tiny-dtf."""
    folder = tmp_path_factory.mktemp("run")
    done = run(hub, "prepare.py", "config/mixture.py", f"--out_dir={folder}/data", "--num_proc=2")
    assert done.returncode == 0, done.stderr
    keys = [f"--data_dir={folder}/data", f"--out_dir={folder}/out", "--seq_len=32", "--batch_size=2", "--device=cpu"]
    keys += ["--grad_accum_steps=2", "--max_steps=2", "--eval_batches=2", "--lr_base=1e-3"]
    done = run(hub, "train.py", "config/dtf_05b.py", *keys, "--push_to_hub=user/tiny-dtf")
    assert done.returncode == 0, done.stderr
    return folder, done.stderr


def test_mixture_to_hub_and_back(hub, trained):
    folder, printed = trained
    base = 2 + 4 * 12  # embedding and norm; q, k, v with biases, o, three of the MLP and two norms of each block
    assert f"Qwen/Qwen2.5-0.5B: {base} tensors loaded; new: 1 priors, 1 causal routers, 1 routers" in printed
    uploaded = hub.server.root / "models/user/tiny-dtf"
    assert "uploaded: http://127.0.0.1" in printed and "/user/tiny-dtf" in printed
    asked = hub.server.created[0]  # as huggingface_hub says it since 2.0, and before
    assert asked.get("visibility") == "private" or asked.get("private") is True
    final = folder / "out/final_model"
    files = "README.md config.json generation_config.json model.safetensors tokenizer.json"
    files += " " + " ".join(f"{name}.py" for name in publish.code_of(Path(architectures.__file__)))
    assert sorted(path.name for path in final.iterdir()) == sorted(files.split())
    assert all((uploaded / name).read_bytes() == (final / name).read_bytes() for name in files.split())

    # from the saved step, in shards this time, over what is there; and the models of both kinds of file
    export = """
import sys, checkpoint
from pathlib import Path
(Path(sys.argv[3]) / "old.safetensors").write_bytes(b"")
checkpoint.main(["export", *sys.argv[1:3], "--push_to_hub=user/tiny-dtf"])
"""
    step = folder / "out/step_0000002"
    done = run(hub, "-c", export, step, folder / "exported", uploaded)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in uploaded.iterdir()) == sorted(files.split())
    done = run(hub, "-c", LOGITS, final, folder / "exported", step, "user/tiny-dtf", "user/tiny-dtf@main")
    assert done.returncode == 0, done.stderr


def test_transformers_opens_what_is_on_the_hub(hub, trained, tmp_path):
    """With the code that is there, where peft and the project are not to be found."""
    folder, _ = trained
    outside = """
import sys, torch, importlib.util
sys.modules["peft"] = sys.modules["triton"] = None
assert importlib.util.find_spec("model") is None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("user/tiny-dtf", trust_remote_code=True)
torch.save(model(torch.arange(40)[None]).logits, sys.argv[1])
"""
    command = [sys.executable, "-P", "-c", outside, tmp_path / "logits.pt"]
    env = os.environ | hub | {"HF_HOME": str(tmp_path / "home")}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(command, check=False, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = Transformer.from_pretrained(folder / "out/final_model")
    expected = model(torch.arange(40)[None], routing="causal").logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


def test_every_kind_of_checkpoint_gives_the_same_model(hub):
    root = hub.server.root / "models"
    done = run(hub, "-c", LOGITS, "Qwen/Qwen2.5-0.5B", root / "Qwen/Qwen2.5-0.5B")
    assert done.returncode == 0, done.stderr
    single, sharded = (Transformer.from_pretrained(root / name) for name in ("tiny/single", "Qwen/Qwen2.5-0.5B"))
    for name, tensor in single.state_dict().items():
        assert torch.equal(tensor.bfloat16().float(), sharded.state_dict()[name]), name


def test_a_failed_upload_leaves_the_files_and_says_how_to_retry(hub, trained):
    folder, _ = trained
    argv = ["train.py", f"--resume={folder}/out", "--push_to_hub=user/second"]
    hub.server.fail = lambda method, path: 503 if path.endswith("/commit/main") else None
    done = run(hub, *argv)
    hub.server.fail = lambda method, path: None
    final = folder / "out/final_model"
    assert done.returncode == 2 and "Traceback" not in done.stderr
    message = done.stderr.splitlines()[-1]
    assert message.startswith(f"error: {final} is not on the hub as user/second: ") and "503" in message
    uploaded = hub.server.root / "models/user/second"
    assert not list(uploaded.iterdir()) and Transformer.from_pretrained(final)
    command = shlex.split(message.partition("try again with: ")[2])
    command[0] = shutil.which("hf", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    subprocess.run(command, env=os.environ | hub, check=True, capture_output=True)
    assert (uploaded / "model.safetensors").read_bytes() == (final / "model.safetensors").read_bytes()


def test_what_cannot_be_pushed_to_is_found_before_the_first_step(hub, trained, tmp_path, monkeypatch, capsys):
    folder, _ = trained
    keys = [f"--data_dir={folder}/data", "--seq_len=32", "--hidden_size=32", "--max_steps=1", "--device=cpu"]
    keys += [f"--out_dir={tmp_path}/new", "--vocab_size=512"]
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    for name, message in (
        ("model", "push_to_hub='model' is no repository name like user/name"),
        ("a/b/c", "push_to_hub='a/b/c' is no repository name like user/name"),
        ("user/-x", "push_to_hub='user/-x' is no repository name like user/name"),
        ("user/name", "push_to_hub=user/name needs a token that may write: set HF_TOKEN, or hf auth login"),
    ):
        status, err = train_script(monkeypatch, capsys, [*keys, f"--push_to_hub={name}"])
        assert status == 2 and err.splitlines()[-1] == f"error: {message}" and "Traceback" not in err
    hub.server.fail = lambda method, path: 403 if path == "/api/repos/create" else None
    done = run(hub, "train.py", *keys, "--push_to_hub=other/name")
    hub.server.fail = lambda method, path: None
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: push_to_hub=other/name: the hub does not take it: 403")
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------------------------------
# What a directory tells its reader


def state(**about):
    """state.json of a run, as far as the card needs it."""
    source = {"from": {"id": "allenai/sciq", "subset": None, "commit": "abc"}, "weight": 0.5, "tokens": 1234567}
    facts = {"base_model": "Qwen/Qwen2.5-0.5B", "tokenizer": "toy", "eot_token": 3, "sources": {"sciq": source}}
    facts |= {
        "commands": ["python train.py"],
        "git": "f00",
        "validation": {"step": 7, "loss": 2.0, "loss_causal": 2.25},
    }
    run = {"init_from": "Qwen/Qwen2.5-0.5B", "seq_len": 64}
    numbers = {"step": 8, "tokens": 4096, "flops": 1.5e9, "world_size": 2, "torch": "2.13.0"}
    return numbers | {"config": {"train": run}, "about": facts | about}


def head_and_body(directory):
    text = (directory / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


@pytest.fixture(scope="module")
def code_cache(tmp_path_factory):
    """Where transformers runs the code of a routed model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_card(architecture, tmp_path, code_cache):
    model = small_model(architecture)
    model.save_pretrained(tmp_path)
    publish.describe(tmp_path, state())
    publish.write_code(tmp_path)
    head, body = head_and_body(tmp_path)
    dense = architecture == "dense"
    assert head == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "Qwen/Qwen2.5-0.5B",
        "datasets": ["allenai/sciq"],
        "tags": ["nanodtf", architecture],
    }
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in body
    assert f"{model.flops_per_token(64):.3g} FLOPs" in body
    assert "| `sciq` | `allenai/sciq abc` | 1,234,567 | 0.5 |" in body and "\n    python train.py\n" in body
    assert (
        "| every token | 2.0000 | 7.39 |" if dense else "| causal | 2.2500 | 9.49 |"
    ) in body and "at step 7" in body
    assert ("trust_remote_code=True" in body) != dense and ("AutoTokenizer" in body) == dense
    snippet = re.search(r"(?:^    .*\n|^\n)+", body[body.index("\n    from") :].lstrip("\n"), re.MULTILINE)[0]
    code = "\n".join(line[4:] for line in snippet.splitlines() if "tokenizer =" not in line)
    ids = random_ids(1, 9)
    names = {"DIRECTORY_OR_HUB_ID": str(tmp_path), "tokenizer": lambda text, return_tensors: {"input_ids": ids}}
    exec(code, names)  # noqa: S102, what the card tells its reader to do
    with torch.no_grad():
        assert relative_error(names["model"](ids).logits, model(ids, routing="causal").logits) <= 1e-5


def test_the_card_of_a_model_of_many_capacities_says_how_to_run_it_at_each(tmp_path, code_cache):
    model = small_model("mod", calibrated={"0.25": [1.0, 1.0], "0.5": [0.0, 0.0], "0.75": [-1.0, -1.0]})
    model.save_pretrained(tmp_path)
    publish.describe(tmp_path, state())
    publish.write_code(tmp_path)
    _, body = head_and_body(tmp_path)
    assert "capacity 0.5 (calibrated for 0.25, 0.75 too: from_pretrained(…, capacity=0.25)), causal" in body
    from transformers import AutoModelForCausalLM

    theirs, ids = (
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, capacity=0.25),
        random_ids(1, 9),
    )
    model.set_capacity(0.25)
    with torch.no_grad():
        assert relative_error(theirs(ids).logits, model(ids, routing="causal").logits) <= 1e-5


def test_hostile_names_stay_text(tmp_path):
    evil = "x\n---\nlicense: mit\n---\n# Owned `|` <script>alert(1)</script> ${steps} <!-- end -->"
    small_model("dense").save_pretrained(tmp_path)
    source = {"from": {"id": evil, "subset": evil, "commit": evil}, "weight": 1.0, "tokens": 1}
    publish.describe(
        tmp_path, state(sources={evil: source}, tokenizer=evil, commands=[shlex.join(["a", evil])], git=evil)
    )
    head, body = head_and_body(tmp_path)
    assert "license" not in head and "datasets" not in head
    lines = [line for line in body.splitlines() if "Owned" in line]
    assert len(lines) >= 3 and all(line.startswith(("    ", "| `")) or "`x ---" in line for line in lines)
    assert all("${steps} <!-- end -->" in line for line in lines if "`x ---" in line)  # nor does it fill the template
    assert not re.search(r"^(---|# Owned|license)", body, re.MULTILINE)
    facts = publish.facts("../Qwen", {"sources": {}, "tokenizer": "t", "eot_token": 0}, ["--out_dir=a b"])
    assert facts["base_model"] is None and facts["commands"] == ["python train.py '--out_dir=a b'"]
    (tmp_path / "exp@1e-4").mkdir()
    local = publish.facts(f"{tmp_path}/exp@1e-4", {"sources": {}, "tokenizer": "t", "eot_token": 0}, [])
    assert local["base_model"] is None
    assert publish.facts("Qwen/Qwen2.5-0.5B@main", {"sources": {}, "tokenizer": "t", "eot_token": 0}, [], facts) == (
        facts | {"base_model": "Qwen/Qwen2.5-0.5B", "commands": facts["commands"] + ["python train.py"]}
    )


def test_transformers_finds_tokenizer_and_end(tmp_path, tokenizer, monkeypatch):
    """A dense export: logits, ids, and generate() stops where a document ends."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # AutoTokenizer asks the hub of a folder too
    model, text = small_model("dense", vocab_size=VOCAB), "naïve? def main(x): 1234  # ½\n\n\tit's"
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer)
    ids = torch.tensor([Tokenizer.from_str(tokenizer.decode()).encode(text).ids])
    with torch.no_grad():
        end = int(model.generate(ids, 6)[0, -1])  # the sixth token that it will say
    publish.describe(tmp_path, state(eot_token=end))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert relative_error(theirs(ids).logits, model(ids).logits) <= 1e-5
    said = theirs.generate(ids, max_new_tokens=20, do_sample=False)[0].tolist()
    new = said[ids.size(1) :]
    assert new[-1] == end and end not in new[:-1] and len(new) <= 6
    assert said == model.generate(ids, len(new))[0].tolist()
    for kind in (AutoTokenizer, PreTrainedTokenizerFast):
        found = kind.from_pretrained(tmp_path)
        assert found(text)["input_ids"] == ids[0].tolist() and found.decode(ids[0]) == text
    # words cut otherwise: AutoTokenizer would put Qwen2's pattern in place of this one, so the card names the other
    spec = json.loads(tokenizer)
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\d| ?[^\d ]+| "}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    ids = Tokenizer.from_str(json.dumps(spec)).encode(text).ids
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path)(text)["input_ids"] == ids


def test_other_programs_do_not_take_a_routed_model_for_qwen2(tmp_path):
    small_model("mod").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["NanoDTFForCausalLM"]
