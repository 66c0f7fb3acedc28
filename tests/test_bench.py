import json
import math
import os
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ARCHITECTURES, ROUTED, needs_compiler, random_ids, relative_error, small_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
import harness
import kernels
import lora
import sample
import trained
from errors import ConfigError, DataError, ModelError
from files import write_whole
from harness import find_tasks, lm_eval_model
from measure import calibrate, interleaved
from model import ModelConfig, Transformer
from speed import MEASURES, Peer, count_flops
from tokenizer import EOT

ROOT = Path(bench.__file__).parent
TEXT = (ROOT / "routers.py").read_text()
VOCAB = 300


SPECIAL = [EOT, "<|im_start|>", "<|im_end|>"]  # as in SmolLM2: a text starts with the second, and ends with the third
NAMES = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "pad_token": SPECIAL[2]}
ENDS = [2, 0]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    made.start, made.ends = 1, ENDS  # what trained.open_model finds beside it
    return made


def tiny(architecture):
    return small_model(architecture, vocab_size=VOCAB, num_hidden_layers=3, eos_token_id=ENDS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """{architecture: directory of a small model with its tokenizer}."""
    made = {}
    for name in ARCHITECTURES:
        made[name] = str(tmp_path_factory.mktemp(name))
        tiny(name).save_pretrained(made[name])
        tokenizer.save(f"{made[name]}/tokenizer.json")
        write_whole(f"{made[name]}/tokenizer_config.json", NAMES)
    return made


TASK = """
task: tiny_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
fewshot_split: test
""",
    "text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
num_fewshot: 0
""",
    "generate": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: [" the", "zz"], max_gen_toks: 70, do_sample: false}
metric_list: [{metric: exact_match}]
num_fewshot: 0
""",
}


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    words = TEXT.split(" ")
    docs = [
        {
            "question": " ".join(words[40 * n : 40 * n + 3 + 4 * n]),
            "choices": [" " + " ".join(words[70 * n + c : 70 * n + 2 * c + 1]) for c in range(4)],
            "answer": n % 4,
            "text": TEXT[90 * n : 90 * n + 40 + 130 * n],
        }
        for n in range(6)
    ]
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    for name, rest in TASKS.items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=folder / "docs.jsonl") + rest)
    return folder


def requests_of(*arguments):
    return [types.SimpleNamespace(args=args) for args in arguments]


def our_lm(model, tokenizer, routing="causal", batch_size=4):
    return lm_eval_model(model.eval(), tokenizer, routing, batch_size)


def ask(lm):
    """Answers to requests of every kind, short and long; some are longer than the 256 positions of the model."""
    pairs = [(TEXT[7 * n : 16 * n], TEXT[16 * n : 17 * n + 3]) for n in range(7)] + [(TEXT[:1500], " end")]
    texts = [(TEXT[50 * n : 50 * n + 5 + 400 * n],) for n in range(3)]
    how = {"until": ["ee", "\n"], "max_gen_toks": 70, "do_sample": False}
    prompts = [(TEXT[31 * n : 31 * n + 4 + 8 * n], how) for n in range(3)] + [(TEXT[:1500], {"max_gen_toks": 70})]
    kinds = (lm.loglikelihood, pairs), (lm.loglikelihood_rolling, texts), (lm.generate_until, prompts)
    return [method(requests_of(*arguments)) for method, arguments in kinds]


def assert_same(a, b, tolerance):
    for (x, greedy), (y, greedy_too) in zip(a[0], b[0], strict=True):
        assert x == pytest.approx(y, abs=tolerance) and greedy == greedy_too
    assert a[1] == pytest.approx(b[1], rel=tolerance)
    assert a[2] == b[2]


def hflm(folder, tokenizer):
    """lm-eval's own way to run the dense model."""
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **NAMES)
    return HFLM(pretrained=Qwen2ForCausalLM.from_pretrained(folder), tokenizer=fast, batch_size=1)


def test_tasks_score_as_under_hflm(folders, tokenizer, task_folder, tmp_path, capsys):
    """Task files by path, two examples before a question, other settings of generation: bench.py's results, and lm-eval's."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    how, files = {"num_fewshot": 2, "gen_kwargs": "max_gen_toks=20"}, ",".join(map(str, task_folder.glob("*.yaml")))
    settings = [f"--{name}={value}" for name, value in how.items()]
    arguments = [f"--model_path={folders['dense']}", f"--tasks={files}", f"--output_path={tmp_path}/r", *settings]
    ours, _, _ = run(capsys, *arguments)
    manager = TaskManager(include_path=str(task_folder), include_defaults=False)
    names = ["tiny_choice", "tiny_text", "tiny_generate"]
    theirs = lm_eval.simple_evaluate(hflm(folders["dense"], tokenizer), tasks=names, task_manager=manager, **how)
    assert ours["n-shot"] == theirs["n-shot"] == dict(zip(names, (2, 0, 0), strict=True))
    again, table, _ = run(capsys, *arguments[:3], settings[0])  # other settings of generation: all is run again
    assert again["evaluation"]["gen_kwargs"] == "" and "done before" not in table
    assert set(ours["results"]) == set(theirs["results"]) == set(names)
    compared = [
        (ours["results"][name][metric], value)
        for name in names
        for metric, value in theirs["results"][name].items()
        if isinstance(value, float) and "stderr" not in metric
    ]
    assert len(compared) >= 4 and all(mine == pytest.approx(value, rel=1e-4) for mine, value in compared)


def test_scores_and_generations_equal_hflm(folders, tokenizer):
    theirs = hflm(folders["dense"], tokenizer)
    ours = our_lm(Transformer.from_pretrained(folders["dense"]), tokenizer, batch_size=4)
    expected = ask(theirs)
    assert any(expected[2])
    assert_same(ask(ours), expected, 1e-4)


def test_a_tokenizer_that_begins_every_text_and_one_that_cuts_it(folders, tokenizer, tmp_path):
    """As Llama 3's, whose post-processor puts a token before a text; and as many a fine-tune's, saved with truncation."""
    from tokenizers import Tokenizer, processors

    beginning = Tokenizer.from_str(tokenizer.to_str())
    beginning.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[1]} $A", special_tokens=[(SPECIAL[1], 1)]
    )
    theirs = hflm(folders["dense"], beginning)
    beginning.start, beginning.ends = 1, ENDS
    ours = our_lm(Transformer.from_pretrained(folders["dense"]), beginning)
    assert ours.tok_encode("def") == [1, *tokenizer.encode("def").ids] == theirs.tok_encode("def")
    expected = ask(theirs)
    assert_same(ask(ours), expected, 1e-4)
    assert expected[0] != ask(hflm(folders["dense"], tokenizer))[0]

    shutil.copytree(folders["dense"], tmp_path / "model")
    beginning.enable_truncation(16)
    beginning.enable_padding(length=64)
    beginning.save(str(tmp_path / "model" / "tokenizer.json"))
    model, opened = trained.open_model(str(tmp_path / "model"))
    whole = tokenizer.encode(TEXT[:300]).ids
    assert trained.encode(model, opened, TEXT[:300]).tolist() == whole and len(whole) > 64
    assert trained.encode(model, opened, TEXT[:300], begins=True).tolist() == [1, *whole]
    assert trained.encode(model, opened, "", begins=True).tolist() == [1]


def test_an_empty_context_is_continued_from_the_token_that_starts_a_text(folders, tokenizer):
    model = Transformer.from_pretrained(folders["dense"])
    ours, how = our_lm(model, tokenizer), {"until": ["zzz"], "max_gen_toks": 9, "do_sample": False}
    empty, short = ours.generate_until(requests_of(("", how), (TEXT[:9], how)))
    new = model.generate(torch.tensor([[tokenizer.start]]), 9, stop_ids=ENDS, pad_id=ENDS[0])[0, 1:].tolist()
    assert empty == tokenizer.decode(new)
    assert short == ours.generate_until(requests_of((TEXT[:9], how)))[0]


def test_a_greedy_continuation_is_recognised(folders, tokenizer):
    ours = our_lm(Transformer.from_pretrained(folders["dense"]), tokenizer)
    prompt = tokenizer.encode(TEXT[:40]).ids
    ids = ours._loglikelihood_tokens([("", prompt, [n]) for n in range(VOCAB)])
    likeliest = max(range(VOCAB), key=lambda n: ids[n][0])
    assert [greedy for _, greedy in ids] == [n == likeliest for n in range(VOCAB)]
    assert sum(math.exp(logprob) for logprob, _ in ids) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("architecture, routing", [*((a, "causal") for a in ROUTED), ("mod", "topk")])
def test_batch_size_order_and_padding_change_no_score(architecture, routing, tokenizer):
    model = tiny(architecture)
    alone = ask(our_lm(model, tokenizer, batch_size=1, routing=routing))
    together = our_lm(model, tokenizer, batch_size=5, routing=routing)
    assert_same(ask(together), alone, 1e-5)
    pairs = [(TEXT[7 * n : 16 * n], TEXT[16 * n : 17 * n + 3]) for n in range(7)]
    backwards = together.loglikelihood(requests_of(*pairs[::-1]))
    assert [x for x, _ in backwards[::-1]] == pytest.approx([x for x, _ in alone[0][:7]], abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------


def run(capsys, *arguments):
    """bench.main in this process: (the JSON line, everything printed before it, stderr)."""
    bench.main(list(arguments))
    out, err = capsys.readouterr()
    lines = out.rstrip().splitlines()
    return json.loads(lines[-1]), "\n".join(lines[:-1]), err


def test_a_task_folder_is_run_saved_and_not_run_twice(folders, task_folder, tmp_path, capsys, monkeypatch):
    import lm_eval

    logged = {}
    fake = types.SimpleNamespace(log=logged.update, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **how: fake))
    path = str(tmp_path / "deep" / "results.json")
    arguments = [f"--model_path={folders['mod']}", f"--tasks={task_folder}", "--limit=5", f"--output_path={path}"]
    document, table, _ = run(capsys, *arguments, "--wandb_log")
    assert set(document["results"]) == {"tiny_choice", "tiny_text", "tiny_generate"}
    assert "±" in table and "causal routing" in table and "first 5 examples" in table
    assert document["results"]["tiny_choice"]["sample_len"] == 5
    assert logged["eval/tiny_choice/acc,none"] == document["results"]["tiny_choice"]["acc,none"]
    assert json.loads(Path(path).read_text())["results"] == document["results"]
    assert document["packages"]["lm_eval"] and document["config"]["limit"] == 5

    def refuse(*args, **kwargs):
        raise RuntimeError("run again")

    monkeypatch.setattr(lm_eval, "evaluate", refuse)
    again, _, err = run(capsys, *arguments)
    assert again["results"] == document["results"] and err.count("done before") == 3
    with pytest.raises(RuntimeError, match="run again"):  # other settings are another evaluation
        bench.main([*arguments, "--routing=topk"])
    with pytest.raises(RuntimeError, match="run again"):  # other weights, too
        bench.main([*arguments, f"--model_path={folders['dtf']}"])

    asked = []

    def answer(adapter, **settings):
        asked.append(settings)
        return {key: document.get(key, {}) for key in harness.KEYS}

    monkeypatch.setattr(lm_eval, "evaluate", answer)
    for shots in (
        "--num_fewshot=1",
        "--num_fewshot=0",
        "--num_fewshot=0",
    ):  # the file holds a task's latest results alone
        run(capsys, *arguments, shots)
    assert len(asked) == 2 * 3


def test_two_ranks_give_the_scores_of_one_and_name_what_is_missing(folders, task_folder, tmp_path, capsys):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for file in task_folder.glob("*.yaml"):
        (tasks / file.name).write_text(file.read_text())
    alone, _, _ = run(capsys, f"--model_path={folders['dtf']}", f"--tasks={tasks}", f"--output_path={tmp_path}/a")
    far = TASK.format(name="far", file="x").replace("dataset_path: json", "dataset_path: nobody/no-such-data")
    (tasks / "far.yaml").write_text(far + TASKS["choice"])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = ["bench.py", f"--model_path={folders['dtf']}", f"--tasks={tasks}", f"--output_path={tmp_path}/b"]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    named = [line for line in done.stderr.splitlines() if line.startswith("error: task")]
    assert len(named) == 1 and "tiny_far" in named[0] and "nobody/no-such-data" in named[0]
    both = json.loads((tmp_path / "b").read_text())["results"]
    assert set(both) == set(alone["results"])
    for task, found in alone["results"].items():
        for metric, value in found.items():
            assert both[task][metric] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value)


def test_topk_routing_says_that_it_looks_ahead(folders, task_folder, tmp_path, capsys):
    arguments = [f"--model_path={folders['stt']}", f"--tasks={task_folder}", "--routing=topk", "--limit=1"]
    _, table, _ = run(capsys, *arguments, f"--output_path={tmp_path}/r.json")
    assert "top-k routing, which looks at the future" in table


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", ["causal", "topk"])
def test_perplexity_is_that_of_each_token_behind_its_window(routing, folders, tokenizer, tmp_path, capsys):
    """Against one forward pass per token (causal) or per window (top-k) of the model itself."""
    (tmp_path / "text.txt").write_text(TEXT[:330])
    document, _, _ = run(
        capsys, f"--model_path={folders['mod']}", "--tasks=perplexity", f"--text={tmp_path}/text.txt",
        "--seq_len=48", "--stride=20", "--batch_size=3",
    )  # fmt: skip
    model, ids = Transformer.from_pretrained(folders["mod"]), tokenizer.encode(TEXT[:330]).ids
    fed = torch.tensor([tokenizer.start, *ids])
    total, predicted = 0.0, 0
    with torch.no_grad():
        for end in [48, *range(68, len(ids) + 20, 20)]:
            end = min(end, len(ids))
            for t in range(predicted, end):
                window = fed[max(0, end - 48) : t + 1 if routing == "causal" else end][None]
                logits = model(window, routing=routing).logits[0, t - max(0, end - 48)]
                total -= logits.log_softmax(-1)[ids[t]].item()
            predicted = end
    row = next(row for row in document["perplexity"] if row["routing"] == routing)
    assert predicted == len(ids) == row["tokens"]
    assert row["loss"] == pytest.approx(total / len(ids), rel=1e-5)
    assert row["perplexity"] == pytest.approx(math.exp(total / len(ids)), rel=1e-5)
    assert row["bits_per_byte"] == pytest.approx(total / math.log(2) / len(TEXT[:330].encode()), rel=1e-5)


@pytest.mark.parametrize("architecture", ["dense", "mod"])
def test_copying_is_the_loss_of_what_was_read_before(architecture, folders, tokenizer, capsys):
    """By one forward pass over both halves."""
    keys = [f"--model_path={folders[architecture]}", "--tasks=copying", "--seq_len=41", "--batch_size=3"]
    found = run(capsys, *keys)[0]["copying"]
    assert (found["sequences"], found["tokens"]) == (16, 20)
    words = [i for i in range(VOCAB) if i not in tokenizer.get_added_tokens_decoder()]
    rows = torch.tensor(words)[torch.randint(len(words), (16, 20), generator=torch.Generator().manual_seed(0))]
    ids = rows.repeat(1, 2)
    with torch.no_grad():
        logits = Transformer.from_pretrained(folders[architecture])(ids, routing="causal").logits
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(16, 39)
    assert found["first"] == pytest.approx(losses[:, :19].mean().item(), rel=1e-4)
    assert found["again"] == pytest.approx(losses[:, 20:].mean().item(), rel=1e-4)
    assert losses[:, 19].mean().item() != pytest.approx(found["first"], rel=1e-4)


def token_folder(folder, documents, tokenizer):
    """A token folder of one source, as prepare.py writes it; documents: its validation split."""
    ids = np.array([i for text in documents for i in [*tokenizer.encode(text).ids, 0]], dtype="<u2")
    (folder / "val").mkdir(parents=True)
    ids.tofile(folder / "val" / "code-00000.bin")
    val = {"tokens": len(ids), "documents": len(documents)}
    val["files"] = [{"name": "val/code-00000.bin", "tokens": len(ids), "sha256": ""}]
    train = {"tokens": 0, "documents": 0, "files": []}
    source = {"weight": 1.0, "train": train, "val": val}
    facts = {"version": 1, "tokenizer": "", "dtype": "uint16", "vocab_size": VOCAB, "eot_token": 0}
    (folder / "manifest.json").write_text(json.dumps(facts | {"sources": {"code": source}}))
    return len(ids)


def test_a_token_folder_counts_the_bytes_of_its_text(folders, tokenizer, tmp_path, capsys):
    documents = [TEXT[:300], "naïve Ω 雪\r\n" * 5, TEXT[900:1300]]
    n = token_folder(tmp_path / "data", documents, tokenizer)
    document, _, _ = run(
        capsys, f"--model_path={folders['dense']}", "--tasks=perplexity", f"--text={tmp_path}/data", "--seq_len=64"
    )
    (row,) = document["perplexity"]  # dense: both routings are one
    assert (row["tokens"], row["bytes"]) == (n, sum(len(text.encode()) for text in documents))


def test_capacity_sweep(folders, tokenizer, tmp_path, capsys):
    token_folder(tmp_path / "data", [TEXT], tokenizer)
    before = {name: (Path(folders["dtf"]) / name).read_bytes() for name in ("model.safetensors", "config.json")}
    document, table, _ = run(
        capsys, f"--model_path={folders['dtf']}", "--tasks=capacity", f"--text={tmp_path}/data", "--seq_len=64",
        "--capacities=0.25,1,0.5", "--repeats=2", "--warmup=1", "--decode_steps=3",
    )  # fmt: skip
    trained, *swept = document["capacity"]
    assert [row["capacity"] for row in swept] == [0.25, 0.5, 1.0] and trained["capacity"] is None
    assert [row["selected"] for row in swept] == pytest.approx([0.25, 0.5, 1.0], abs=0.08)
    model = Transformer.from_pretrained(folders["dtf"])
    assert swept[-1]["flops_per_token"] == model.flops_per_token(64, capacity=1.0)
    assert all(row["decode_tokens_per_s"] > 0 for row in document["capacity"])
    assert (Path(folders["dtf"]) / "capacity.png").read_bytes().startswith(b"\x89PNG")
    assert "as trained" in table
    assert before == {name: (Path(folders["dtf"]) / name).read_bytes() for name in before}


@pytest.mark.parametrize("decision", ["router", "threshold"])
@pytest.mark.parametrize("capacity", [0.1, 0.5, 1.0])
def test_calibrated_routers_select_the_share(decision, capacity):
    model = small_model("dtf", causal_decision=decision, num_hidden_layers=6)
    ids = random_ids(4, 50)
    calibrate(model, ids, capacity)
    with torch.no_grad():
        masks = model(ids, routing="causal", return_masks=True).masks
    assert [mask.sum().item() for mask in masks.values()] == [200 * capacity] * 3
    calibrate(model, ids, [0.1, capacity, 1.0])
    with torch.no_grad():
        masks = model(ids, routing="causal", return_masks=True).masks
    assert [mask.sum().item() for mask in masks.values()] == [20, 200 * capacity, 200]


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_flops_equal_those_that_torch_counts_on_a_real_step(architecture):
    config = replace(small_model(architecture, capacity=0.4).config, vocab_size=500, prior_factor=0.5)
    torch.manual_seed(0)
    model, T = Transformer(config), 60
    x, y = random_ids(1, T), random_ids(1, T)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # flash on CPU goes uncounted
        out = model(x)
        loss = F.cross_entropy(out.logits.flatten(0, 1), y.flatten()) + sum(out.losses.values())
        loss.backward()
    real = counter.get_total_flops() / T
    parts, counted = count_flops(config, T)
    assert counted == real
    assert model.flops_per_token(T, training=True) == pytest.approx(real, rel=0.01)
    detached = 4 * config.hidden_size * len(config.routed_layers)  # of causal routers: no input gradient
    assert 3 * sum(parts.values()) - detached == pytest.approx(real, rel=1e-6)
    assert parts["head"] == 2 * 32 * 500
    router = {"dense": 0, "mod": 2 * (4 + 2) * 32, "dtf": 2 * 4 * 32, "stt": 2 * 4 * 32}[architecture]
    assert parts["routers"] == router
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        calibrate(model, x, 0.4)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x, routing="causal")
    assert model.flops_per_token(T) == pytest.approx(counter.get_total_flops() / T, rel=0.01)


def test_decode_bytes():
    """Closed forms: float32, d = 32, FFN 48, 8-wide heads (4, 2 for keys and values), 5 layers, vocabulary 97."""
    block = 4 * (2 * 32 * 32 + 2 * 32 * 16 + 32 + 2 * 16 + 3 * 32 * 48 + 2 * 32)
    head, kv = 4 * (97 * 32 + 32), 2 * 16 * 4
    dense = small_model("dense").decode_bytes(3, 100, {}, {})
    assert dense == head + 5 * block + 5 * 3 * 100 * kv
    stt = small_model("stt").decode_bytes(3, 100, {1: 0.5, 3: 0.25}, {1: 1.0, 3: 0.5})
    routers = 2 * 4 * (4 + 65)  # gate scalars and causal routers; the transition networks do not run
    cached = 3 * 100 * kv * (3 + 0.5**2 + 0.25**2)
    assert stt == head + 4.5 * block + routers + cached
    prior = 4 * (3 * 32 * 8 + 32)  # runs where the layer behind it does
    ran = {1: 0.5, 3: 0.25}, {1: 1.0, 3: 0.5}
    assert small_model("dtf").decode_bytes(3, 100, *ran) == head + 4.5 * block + routers + 1.5 * prior + cached
    ungated = small_model("dtf", gate="straight_through").decode_bytes(3, 100, *ran)
    assert ungated == head + 4.5 * block + routers + cached
    mod = small_model("mod", causal_decision="threshold").decode_bytes(3, 100, *ran)
    assert mod == head + 4.5 * block + 2 * 4 * 32 + cached  # the routers that score; the causal ones are not asked


def test_the_peer_is_our_dense_model():
    model = small_model("dense")
    peer, ids = Peer(model).eval(), random_ids(2, 30)
    with torch.no_grad():
        assert relative_error(peer(ids).logits, model(ids).logits) < 1e-5
        loss = model(ids[:, :-1], ids[:, 1:]).loss
        assert peer(ids, ids).loss.item() == pytest.approx(loss.item(), rel=1e-5)
        logits = []
        for either in (model, peer):
            cache = either.new_cache(2, 30)
            steps = [either(ids[:, :20], routing="causal", cache=cache)]
            steps += [either(ids[:, t : t + 1], routing="causal", cache=cache) for t in range(20, 30)]
            logits.append(torch.cat([step.logits for step in steps], 1))
        assert logits[0].shape == (2, 11, 97) and relative_error(logits[1], logits[0]) < 1e-5


def test_speed_of_models_that_were_calibrated_adapted_or_of_another_family(tmp_path, tokenizer, capsys):
    options = ["--measure=forward", "--repeats=1", "--warmup=0", "--batch_size=1", "--seq_len=16"]
    small = {"vocab_size": VOCAB, "num_hidden_layers": 3}
    calibrated = small_model("mod", capacity=0.25, calibrated={"0.25": [0.1], "0.75": [-0.1]}, **small)
    fitted = small_model("mod", router="fitted", causal_decision="threshold", allotment=[0.4], **small)
    llama = small_model("dense", model_type="llama", **small)
    for name, model in (("calibrated", calibrated), ("fitted", fitted), ("llama", llama)):
        model.save_pretrained(str(tmp_path / name))
    base = small_model("dense", **small)
    base.save_pretrained(str(tmp_path / "base"))
    lora.inject(base, r=2, alpha=4, dropout=0.0, base=str(tmp_path / "base"))
    base.save_pretrained(str(tmp_path / "lora"))
    for name in ("calibrated", "fitted", "llama", "lora"):
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
        write_whole(tmp_path / name / "tokenizer_config.json", NAMES)
        document, _, _ = run(capsys, f"--model_path={tmp_path / name}", *options)
        variants = [row["variant"] for row in document["speed"]["rows"]]
        assert variants == ["transformers", "dense"] + ["mod"] * (name in ("calibrated", "fitted"))


def test_a_model_of_many_capacities_at_each(folders, tokenizer, tmp_path, capsys):
    """bench.py and sample.py run the model at the capacity that is asked for, of those that it is calibrated for."""
    many = tmp_path / "many"
    offsets = {"0.25": [2.0, 2.0], "0.75": [-2.0, -2.0]}
    model = small_model("mod", vocab_size=VOCAB, num_hidden_layers=4, capacity=0.25, calibrated=offsets)
    model.save_pretrained(str(many))
    tokenizer.save(str(many / "tokenizer.json"))
    write_whole(many / "tokenizer_config.json", NAMES)
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten " * 4)
    losses = {}
    for asked in (None, 0.25, 0.75):
        capacity = [f"--capacity={asked}"] if asked else []
        common = ["--tasks=perplexity", f"--text={tmp_path / 'text.txt'}", "--seq_len=32", "--dtype=float32"]
        document, _, _ = run(capsys, f"--model_path={many}", *common, *capacity)
        losses[asked] = document["perplexity"][0]["loss"]
    assert losses[None] == losses[0.25] != losses[0.75]
    opened, _ = trained.open_model(str(many), capacity=0.75)
    assert opened.config.capacity == 0.75 and [layer.offset for layer in opened.routed] == [-2.0, -2.0]
    page = tmp_path / "page.html"
    sample.main([f"--model_path={many}", "--capacity=0.75", f"--text={tmp_path / 'text.txt'}", f"--html={page}"])
    assert "(capacity 0.75" in page.read_text()
    with pytest.raises(ModelError, match="capacity=0.5 is not calibrated, 0.25, 0.75 are: name one"):
        sample.main([f"--model_path={many}", "--capacity=0.5"])
    with pytest.raises(ModelError, match="is calibrated for none, train it with capacity_choices"):
        bench.main([f"--model_path={folders['dtf']}", "--tasks=perplexity", "--capacity=0.25"])
    with pytest.raises(ModelError, match="is dense, which has none"):
        bench.main([f"--model_path={folders['dense']}", "--tasks=perplexity", "--capacity=0.25"])


def test_attention_is_counted_as_such_where_it_is_written_out(monkeypatch):
    shape = ModelConfig("dense", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    components = []
    for written_out in (range(0), range(2, 200)):
        monkeypatch.setattr(kernels, "WRITTEN_OUT", written_out)
        components.append(count_flops(shape, 128))
    assert components[0] == components[1] and components[1][0]["attention, products"] > 0


def test_speed_suite(tmp_path, capsys):
    shape = "--hidden_size=32 --num_hidden_layers=4 --intermediate_size=64 --vocab_size=128 --capacity=0.25"
    options = "--batch_size=2 --seq_len=32 --repeats=2 --warmup=0 --decode_steps=8 --size=demo"
    document, table, _ = run(capsys, *shape.split(), *options.split(), f"--output_path={tmp_path}/speed.json")
    assert json.loads((tmp_path / "speed.json").read_text()) == document
    rows = document["speed"]["rows"]
    by = {(row["measure"], row["variant"]): row for row in rows}
    assert set(by) == {(m, v) for m in MEASURES for v in ("transformers", *ARCHITECTURES)}
    models = {
        a: Transformer(ModelConfig(architecture=a, vocab_size=128, hidden_size=32, num_hidden_layers=4,
                                   intermediate_size=64, capacity=0.25))
        for a in ARCHITECTURES
    }  # fmt: skip
    for row in rows:
        assert row["tokens_per_s"] * row["seconds"] == pytest.approx(
            {"decode1": 1, "decode8": 8}.get(row["measure"], 64)
        )
        if row["variant"] == "dense":
            assert row["ratio"] == row["promised"] == row["efficiency"] == 1
            if row["measure"] == "decode1":
                read = models["dense"].decode_bytes(1, 40, {}, {})  # between 32 and 48 tokens
                assert row["gb_per_s"] == pytest.approx(read / row["seconds"] / 1e9)
        elif row["variant"] != "transformers":
            assert row["efficiency"] == pytest.approx(row["promised"] / row["ratio"])
    for a in ROUTED:
        promised = models[a].flops_per_token(32, training=True) / models["dense"].flops_per_token(32, training=True)
        assert by["train", a]["promised"] == pytest.approx(promised)
        assert by["decode1", a]["promised"] < by["decode8", a]["promised"] < 1.1
        memory = document["speed"]["memory"][a]
        assert memory["causal_capacity"] == pytest.approx(0.25, abs=0.1)
        share = memory["kv_bytes_per_token"] / document["speed"]["memory"]["dense"]["kv_bytes_per_token"]
        assert share == pytest.approx((1 + memory["causal_capacity"]) / 2, rel=1e-6)
    assert document["speed"]["memory"]["dense"]["kv_bytes_per_token"] == 4 * 2 * 2 * 8 * 4  # layers, K and V, heads
    forward = {a: sum(count_flops(models[a].config, 32)[0].values()) for a in ("stt", "dense")}
    assert by["forward", "stt"]["promised"] == pytest.approx(forward["stt"] / forward["dense"])  # with its dense pass
    kept = {name: m["activation_bytes"] for name, m in document["speed"]["memory"].items()}
    assert kept["mod"] < 0.8 * kept["dense"]
    assert "efficiency" in table and "n/a" in table


@needs_compiler
def test_compiled_decoding_is_timed_beside_the_eager_one(capsys):
    options = (
        "--hidden_size=32 --num_hidden_layers=2 --intermediate_size=64 --vocab_size=128 --architecture=mod --compile"
    )
    more = "--seq_len=32 --batch_size=1 --repeats=2 --decode_steps=8 --measure=decode1"
    document, table, _ = run(capsys, *options.split(), *more.split())
    rows = {(row["variant"], row["compiled"]): row for row in document["speed"]["rows"]}
    assert set(rows) == {("transformers", False), *((n, c) for n in ("dense", "mod") for c in (False, True))}
    assert rows["mod", True]["promised"] == rows["mod", False]["promised"] < 1
    assert document["speed"]["memory"]["mod"]["compile_seconds"] > 0 and "mod, compiled" in table


def test_a_baseline_is_kept_and_compared_with(tmp_path, capsys):
    shape = "--hidden_size=32 --num_hidden_layers=2 --intermediate_size=64 --vocab_size=128 --architecture=mod"
    keys = [*shape.split(), *["--seq_len=16", "--batch_size=1", "--repeats=1", "--warmup=0", "--measure=forward"]]
    path = tmp_path / "baseline.json"
    run(capsys, *keys, f"--baseline={path}")
    before = json.loads(path.read_text())
    for row in before["speed"]["rows"]:
        row["ratio"], row["vs_hf"] = row["ratio"] * 1e3, row["vs_hf"] / 1e3  # whatever comes is faster
    path.write_text(json.dumps(before))
    run(capsys, *keys, f"--baseline={path}")
    for row in before["speed"]["rows"]:
        row["ratio"] /= 1e9  # far below a thousandth, however slow the machine was just then
    path.write_text(json.dumps(before))
    with pytest.raises(SystemExit) as stop:
        bench.main([*keys, f"--baseline={path}"])
    assert stop.value.code == 1 and "forward mod: ratio 0.000" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="is of another size"):
        bench.main([*keys, "--seq_len=17", f"--baseline={path}"])
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ConfigError, match="holds no results of bench.py's speed suite"):
        bench.main([*keys, f"--baseline={path}"])
    assert capsys.readouterr().out == ""  # before anything is measured


def test_interleaved_turns_around_and_leaves_out_the_warm_up():
    seen = []
    times = interleaved({n: lambda n=n: seen.append(n) for n in "abc"}, torch.device("cpu"), warmup=1, repeats=2)
    assert "".join(seen) in ("abccbaabc", "cbaabccba") and all(len(times[n]) == 2 for n in "abc")


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ("--tasks=perplexity", ConfigError, "needs a trained model: --model_path"),
        ("--tasks=code --model_path=x", ConfigError, "--allow_code_execution"),
        ("--tasks=", ConfigError, "tasks is empty: name one"),
        ("--measure=trian", ConfigError, "measure='trian' is not one of train"),
        ("--repeats=0 --warmup=-1", ConfigError, "repeats=0 must be at least 1; warmup=-1 must not be negative"),
        (
            "--repeats=0 --routing=best",
            ConfigError,
            "routing='best' is not one of causal, topk; repeats=0 must be at least 1",
        ),
        ("--stride=900", ConfigError, "stride=900 must lie between 1 and seq_len=256"),
        ("--size=11M", ModelError, "size='11M' is not one of demo"),
        ("--capacity=1.5", ModelError, "capacity=1.5 must lie in (0, 1]"),
        ("--hiden_size=4", ConfigError, "did you mean hidden_size?"),
        ("--model_path={dtf} --hidden_size=4", ConfigError, "has its own configuration: drop hidden_size"),
        ("--model_path={dtf} --tasks=perplexity --text=no/such --seq_len=64", DataError, "no/such is no data folder"),
        ("--model_path={dtf} --tasks=perplexity --seq_len=999", ConfigError, "max_position_embeddings=256"),
        ("--model_path={dtf} --tasks=copying --seq_len=3", ConfigError, "seq_len=3 must lie between 4 and"),
        ("--model_path={dtf} --tasks=copying --seq_len=258", ConfigError, "max_position_embeddings=256"),
        ("--model_path={dense} --tasks=capacity", ConfigError, "is dense: it has no capacity to sweep"),
        ("--model_path={dtf} --tasks={empty}", ConfigError, "holds no lm-eval task"),
        ("--model_path={dtf} --seq_len=250", ConfigError, "lower seq_len, decode_steps or repeats"),
        ("--model_path=/no/such", ModelError, "/no/such"),
    ],
)
def test_bad_input(arguments, error, words, folders, tmp_path):
    with pytest.raises(error, match=".*") as caught:
        bench.main(arguments.format(**folders, empty=tmp_path).split())
    assert words in str(caught.value)


def test_an_unknown_task_names_the_nearest(tmp_path, monkeypatch):
    import lm_eval.tasks

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **how: types.SimpleNamespace(all_tasks=["hellaswag"]))
    (tmp_path / "quick_test").mkdir()  # of the user's own, no task
    monkeypatch.chdir(tmp_path)
    assert find_tasks(["quick_test", "hellaswag"])[1] == {"truthfulqa_mc2": 0, "hellaswag": None}
    with pytest.raises(ConfigError, match="tasks=helaswag is unknown; did you mean hellaswag?"):
        find_tasks(["quick_test", "helaswag"])


def test_a_users_error_is_one_line_and_status_2():
    arguments = [sys.executable, "bench.py", "--tasks=perplexity", "--model_path=no/such/model"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: no/such/model")
