"""On demand, with a real model: bench.py scores as lm-eval's own HFLM does, and sample.py chats and stops.

    python tests/real_model.py MODEL_DIRECTORY GSM8K.jsonl [EXAMPLES]

GSM8K.jsonl: rows of question and answer. Four tasks are made of it: the answer's number among four; sentences in their
order against out of order, without a context, as BLiMP asks; whole texts; and generated solutions after two examples.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import sample
from harness import lm_eval_model
from trained import open_model

COMMON = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
TASKS = {
    "number": """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{numbers}}"
doc_to_target: right
metric_list: [{metric: acc}]
""",
    "order": """
output_type: multiple_choice
doc_to_text: ""
doc_to_choice: "{{orders}}"
doc_to_target: 0
num_fewshot: 0
metric_list: [{metric: acc}]
""",
    "text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
num_fewshot: 0
metric_list: [{metric: word_perplexity}]
""",
    "solution": """
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: " {{answer}}"
fewshot_split: test
num_fewshot: 2
generation_kwargs: {until: ["Question:"], max_gen_toks: 96, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


def rows(path, count):
    """The first `count` rows of GSM8K, each with four numbers of which one is right, and its words out of order."""
    for n, line in enumerate(Path(path).read_text().splitlines()[:count]):
        row = json.loads(line)
        number = int(row["answer"].rpartition("#### ")[2].replace(",", ""))
        numbers = [number + 10, number + 1, 2 * number, number // 2]
        numbers[n % 4] = number
        words = row["question"].split(" ")
        orders = [row["question"], " ".join(words[1::2] + words[::2])]
        yield row | {"numbers": [f" {m}" for m in numbers], "right": n % 4, "orders": orders}


def main(directory, gsm8k, examples="40"):
    with TemporaryDirectory() as folder:
        data = Path(folder, "rows.jsonl")
        data.write_text("".join(json.dumps(row) + "\n" for row in rows(gsm8k, int(examples))))
        for name, task in TASKS.items():
            Path(folder, f"{name}.yaml").write_text(COMMON.format(name=name, file=data) + task)
        model, tokenizer = open_model(directory)
        found = {}
        for name, lm in (
            ("ours", lm_eval_model(model, tokenizer, "causal", 8)),
            ("HFLM", HFLM(pretrained=directory, dtype="float32", batch_size=8, device="cpu")),
        ):
            manager = TaskManager(include_path=folder, include_defaults=False)
            found[name] = lm_eval.simple_evaluate(lm, tasks=list(TASKS), task_manager=manager)
    compare(found["ours"], found["HFLM"])
    sample.main(
        [
            f"--model_path={directory}",
            "--chat",
            "--prompt=What is the capital of France?",
            "--temperature=0",
            "--device=cpu",
        ]
    )


def compare(ours, theirs):
    print(f"{'task':10} {'ours':>10} {'HFLM':>10}   answers, the largest difference")
    for name in TASKS:
        pairs = [
            (mine, their)
            for a, b in zip(ours["samples"][name], theirs["samples"][name], strict=True)
            for mine, their in zip(flat(a["resps"]), flat(b["resps"]), strict=True)
        ]
        if name == "solution":
            what = f"{sum(a == b for a, b in pairs)} of {len(pairs)} generations are equal"
            wrong = any(a != b for a, b in pairs)
        else:
            gap = max(abs(float(a) - float(b)) / max(1, abs(float(b))) for a, b in pairs)
            what, wrong = f"{len(pairs)} log-likelihoods, {gap:.1e} of the larger of it and 1", gap > 1e-4
        scores = [
            next(value for key, value in results["results"][name].items() if key.endswith(",none"))
            for results in (ours, theirs)
        ]
        print(f"{name:10} {scores[0]:10.4f} {scores[1]:10.4f}   {what}{'   NOT EQUAL' if wrong else ''}")


def flat(answers):
    """Numbers and texts of lm-eval's nested answers; whether a continuation is the greedy one goes."""
    for answer in answers:
        if isinstance(answer, list | tuple):
            yield from flat(answer)
        elif str(answer) not in ("True", "False"):
            yield answer


if __name__ == "__main__":
    main(*sys.argv[1:])
