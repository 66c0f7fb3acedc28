"""What tests/test_hf.py runs where the project cannot be imported: transformers and lm-eval on routed models' folders.

python -P hf_outside.py TASKS FOLDER …     beside each a given.pt; trained/ and found.pt are put there
"""

import importlib.util
import os
import sys

import lm_eval
import torch
from lm_eval.tasks import TaskManager
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

for name in ("model", "hf", "architectures"):
    assert importlib.util.find_spec(name) is None, f"the project is on the path: {name}"


def message(function, *args, **kwargs):
    """What a call is refused with, "" if it is not."""
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return ""


def opened(path, **how):
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **how)


def opening(folder, ids, mask):
    """The model of a folder, and its logits. Refused without the flag, however it is asked for."""
    for call in (AutoModelForCausalLM.from_pretrained, AutoConfig.from_pretrained):
        assert "trust_remote_code=True" in message(call, folder), call
    model = opened(folder)
    assert type(model).__name__ == "NanoDTFForCausalLM" and not model.training
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings
    right = mask.flip(1)  # padding on the right
    with torch.no_grad():
        found = {"logits": model(ids).logits, "left": model(ids, attention_mask=mask).logits}
        found["right"] = model(ids, attention_mask=right).logits
        small = opened(folder, dtype=torch.bfloat16)
        found["bfloat16"] = small(ids).logits
    found["float32"] = {name for name, tensor in small.state_dict().items() if tensor.dtype == torch.float32}
    assert "without holes" in message(model, ids, attention_mask=1 - (mask & right))
    assert "use_cache" in message(model, ids, use_cache=True)
    assert "position_ids: not supported" in message(model, ids, position_ids=ids)
    return model, found


def generating(model, ids, mask):
    greedy = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    found = {"greedy": greedy.sequences, "held": [layer.lengths for layer in greedy.past_key_values.layers]}
    again = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, use_cache=False)
    assert torch.equal(again, greedy.sequences)
    how = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0, "eos_token_id": None}
    torch.manual_seed(1)
    found["sampled"] = model.generate(ids, max_new_tokens=12, **how)
    torch.manual_seed(1)
    found["three"] = model.generate(ids[:1], max_new_tokens=12, num_return_sequences=3, **how)
    for refused in ({"num_beams": 2}, {"assistant_model": model}, {"prompt_lookup_num_tokens": 2}):
        assert "not supported" in message(model.generate, ids[:1], max_new_tokens=3, **refused), refused
    assert "max_position_embeddings=256" in message(model.generate, ids, max_new_tokens=300)
    kernels = sys.modules[type(model).__module__.rpartition(".")[0] + ".kernels"]
    if torch.backends.mkldnn.is_available():
        kernels.PACKS, kernels.LARGE_WEIGHT, during = {torch.float32}, 0, []
        hook = model.register_forward_hook(lambda *_: during.append(len(kernels._PACKED)))
        kept = model.generate(ids, attention_mask=mask, max_new_tokens=3, return_dict_in_generate=True)
        hook.remove()
        assert min(during) > 20 and not kernels._PACKED and kept.past_key_values  # weights may change from now on
    # A cache is gone on with, beyond what it was made for.
    first = model.generate(ids[:1], max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    more = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=9, do_sample=False)
    assert torch.equal(more, model.generate(ids[:1], max_new_tokens=12, do_sample=False))
    return found


def piping(folder, texts):
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    pipe = pipeline("text-generation", folder, tokenizer=tokenizer, trust_remote_code=True, batch_size=2)
    answers = pipe(texts, max_new_tokens=8, do_sample=False, return_full_text=False)
    return {"tokens": tokenizer(texts)["input_ids"], "texts": [answer[0]["generated_text"] for answer in answers]}


def training(model, ids, right, rows):
    """Losses and gradients, and six steps of transformers' own Trainer, whose model is saved and opened again."""
    found = {}
    model.train()
    for name, seen in (("loss", None), ("padded loss", right)):
        out = model(ids, attention_mask=seen, labels=ids if seen is None else ids.masked_fill(seen == 0, -100))
        out.loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found |= {name: out.loss.detach(), f"gradients, {name}": gradients}
        model.zero_grad()
    model.eval()
    found["evaluation"] = model(ids, labels=ids).loss.detach()
    rows = [{"input_ids": row, "labels": row} for row in rows]
    settings = {"max_steps": 6, "learning_rate": 3e-3, "per_device_train_batch_size": 4, "logging_steps": 1, "seed": 0}
    settings |= {"report_to": "none", "use_cpu": True, "save_strategy": "no", "gradient_checkpointing": True}
    settings |= {"per_device_eval_batch_size": 8, "disable_tqdm": True}
    trainer = Trainer(model, TrainingArguments("trainer", **settings), train_dataset=rows, eval_dataset=rows[:8])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    found["losses"] = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert trainer.evaluate()["eval_loss"] < before
    trainer.save_model("trained")
    back = opened("trained")
    assert type(back) is not type(model)  # code of its own
    with torch.no_grad():
        found["trained"] = model.eval()(ids).logits
        assert torch.equal(back(ids).logits, found["trained"])
    return found


def scoring(folder, tasks):
    manager = TaskManager(include_path=tasks, include_defaults=False)
    how = {"model_args": f"pretrained={folder},trust_remote_code=True", "batch_size": 2, "device": "cpu"}
    results = lm_eval.simple_evaluate("hf", tasks=manager.all_tasks, task_manager=manager, **how)["results"]
    return {task: {key: float(v) for key, v in row.items() if isinstance(v, float)} for task, row in results.items()}


def main(tasks, folders):
    for folder in folders:
        os.chdir(os.path.dirname(folder))
        given = torch.load("given.pt")
        ids, mask = given["ids"], given["mask"]
        model, found = opening(folder, ids, mask)
        found |= generating(model, ids, mask) | piping(folder, given["texts"])
        found |= training(model, ids, mask.flip(1), given["rows"]) | {"scores": scoring(folder, tasks)}
        torch.save(found, "found.pt")


main(sys.argv[1], sys.argv[2:])
