"""lm-eval on our models: the adapter, and tasks that are run one by one, saved after each, and never run twice."""

import difflib
import hashlib
import importlib.metadata
import itertools
import json
import os
import random
from collections import ChainMap
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from errors import ConfigError, ModelError, first_line
from files import write_whole
from model import Transformer
from parallel import of_all, rank, say
from scoring import padded, progress, score, share_of_rank

SUITES = {  # lm-eval tasks and their few-shot examples
    "general": {"arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "winogrande": 5, "truthfulqa_mc2": 0},
    "math": {"gsm8k": None, "mathqa": None},
    "code": {"humaneval": None, "mbpp": None},
    "quick_test": {"truthfulqa_mc2": 0},
}
KEYS = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "group_subtasks")  # what is kept
PIECE = 64  # tokens generated between two looks for a stop string


# ---------------------------------------------------------------------------------------------------------------------
# A model as lm-eval sees one


def lm_eval_model(model: Transformer, tokenizer, routing: str, batch_size: int):
    """Our model behind lm-eval's interface.

    Under torchrun every rank gets all requests, works on its share and hears the rest from the others, so that lm-eval
    itself need not know. Scores equal those of its own HFLM on the same weights.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows

    longest, start = model.config.max_position_embeddings, tokenizer.id_to_token(tokenizer.start)

    class NanoDTF(TemplateLM):
        eot_token_id, prefix_token_id = tokenizer.ends[0], tokenizer.start

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            if add_special_tokens is None:  # as in HFLM: what the tokenizer puts before a text, but not twice
                add_special_tokens = not string.startswith(start)
            return tokenizer.encode(string, add_special_tokens=add_special_tokens).ids

        def _loglikelihood_tokens(self, requests, disable_tqdm=False):
            pairs = [((context + targets)[-longest - 1 : -1], targets) for _, context, targets in requests]
            return score(model, pairs, routing, batch_size, "log-likelihoods")

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            windows = []
            for request in requests:
                ids = self.tok_encode(request.args[0])
                windows.append(list(get_rolling_token_windows(ids, self.prefix_token_id, longest, 1)))
            scores = iter(score(model, list(itertools.chain(*windows)), routing, batch_size, "texts"))
            return [sum(logprob for logprob, _ in itertools.islice(scores, len(text))) for text in windows]

        def generate_until(self, requests, disable_tqdm=False):
            contexts = [self.tok_encode(request.args[0]) for request in requests]
            return generate_all(model, tokenizer, contexts, [request.args[1] for request in requests], batch_size)

    return NanoDTF()


def generate_all(model: Transformer, tokenizer, contexts: list, settings: list[dict], batch_size: int) -> list[str]:
    """A continuation of every context (ids) by its settings, as lm-eval's tasks give them. All ranks must call this."""
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

    keys = [json.dumps(setting, sort_keys=True) for setting in settings]
    local = share_of_rank(sorted(range(len(contexts)), key=lambda n: (keys[n], -len(contexts[n]))))
    texts, bar, longest = {}, progress(len(local), "generations"), model.config.max_position_embeddings
    for key in dict.fromkeys(keys[n] for n in local):
        setting, group = normalize_gen_kwargs(json.loads(key)), [n for n in local if keys[n] == key]
        end = tokenizer.id_to_token(tokenizer.ends[0])
        stops, limit = handle_stop_sequences(setting["until"], eos=end), setting["max_gen_toks"]
        room = longest - limit
        if room < 1:
            raise ModelError(f"max_gen_toks={limit} leaves no room in {longest} positions")
        sampling = {name: setting.get(name) for name in ("top_k", "top_p")}
        sampling["temperature"] = setting.get("temperature", 0.0)
        for start in range(0, len(group), batch_size):
            batch = group[start : start + batch_size]
            prompts = [contexts[n][-room:] or [tokenizer.start] for n in batch]
            for n, ids in zip(batch, continue_until(model, tokenizer, prompts, limit, stops, sampling), strict=True):
                texts[n] = postprocess_generated_text(tokenizer.decode(ids), stops, None)
            bar.update(len(batch))
    bar.close()
    texts = ChainMap(*of_all(texts))
    return [texts[n] for n in range(len(contexts))]


def continue_until(model: Transformer, tokenizer, prompts: list, limit: int, stops: list[str], sampling: dict) -> list:
    """`limit` new ids of every prompt, or fewer from where it meets the end of the text (then repeated) or a stop string.

    A string cannot be seen coming, so rows are generated a PIECE at a time, and those that are done leave.
    """
    ends, device = set(tokenizer.ends), model.head_weight.device
    new, live = [[] for _ in prompts], list(range(len(prompts)))
    for done in range(0, limit, PIECE):
        ids, lengths = padded([prompts[row] + new[row] for row in live], device)
        count = min(PIECE, limit - done)
        known = {"lengths": lengths, "stop_ids": tokenizer.ends, "pad_id": tokenizer.ends[0]}
        out = model.generate(ids, count, **known, **sampling).tolist()
        for row, sequence, length in zip(live, out, lengths, strict=True):
            new[row] += sequence[length : length + count]
        texts = {row: tokenizer.decode(new[row]) for row in live if not ends & {*new[row]}}
        live = [row for row, text in texts.items() if not any(stop in text for stop in stops if stop)]
        if not live:
            break
    return new


# ---------------------------------------------------------------------------------------------------------------------
# Tasks


def find_tasks(names: list[str], others: tuple[str, ...] = ()):
    """(lm-eval's TaskManager, {task: few-shot examples or None for the task's own}) of suites, tasks, and task files or
    folders of them.

    others: what a user may have meant beside them. Raises ConfigError for a task that lm-eval does not know, with the
    nearest that it does.
    """
    import lm_eval.tasks

    paths = {name: Path(name) for name in names if name not in SUITES and os.path.exists(name)}
    folders = [path if path.is_dir() else path.parent for path in paths.values()]
    manager = lm_eval.tasks.TaskManager(include_path=folders or None, include_defaults=len(paths) < len(names))
    tasks = {}
    for name in names:
        if name in paths:
            tasks |= dict.fromkeys(tasks_at(paths[name]))
        elif name in SUITES:
            tasks |= SUITES[name]
        elif name in manager.all_tasks:
            tasks[name] = None
        else:
            ours = [*others, *SUITES]
            near = difflib.get_close_matches(name, [*ours, *manager.all_tasks], 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"name one of {', '.join(ours)}, or an lm-eval task"
            raise ConfigError(f"tasks={name} is unknown; {hint}")
    return manager, tasks


def tasks_at(path: Path) -> list[str]:
    """The lm-eval tasks of a task file, or of a folder of them. Raises ConfigError where there is none."""
    import lm_eval.tasks

    try:
        inside = lm_eval.tasks.TaskManager(include_path=path if path.is_dir() else path.parent, include_defaults=False)
    except Exception as error:  # noqa: BLE001 (YAML, and whatever lm-eval makes of it)
        raise ConfigError(f"tasks={path}: {first_line(error)}") from None
    index = inside.task_index
    if path.is_dir():
        found = inside.all_subtasks
    else:
        found = [name for name in inside.all_tasks if index[name].yaml_path and path.samefile(index[name].yaml_path)]
    if not found:
        raise ConfigError(f"tasks={path} holds no lm-eval task (*.yaml with a `task:` in it)")
    return found


def load_task(manager, name: str, shots: int | None, cfg) -> dict:
    """The task or group `name` with its data, as lm_eval.evaluate takes it. Raises whatever keeps it from loading."""
    from lm_eval.utils import simple_parse_args_string

    random.seed(0)  # the seeds of simple_evaluate
    np.random.seed(1234)
    torch.manual_seed(1234)
    loaded = manager.load([name])
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False) and not cfg.allow_code_execution:
            raise ConfigError("it runs programs that the model wrote: allow that with --allow_code_execution")
        if task.get_config("num_fewshot") != 0:  # a 0 in its own file is meant
            task.set_config("num_fewshot", shots if shots is not None else task.get_config("num_fewshot") or 0)
        if cfg.gen_kwargs and task.get_config("output_type") == "generate_until":
            task.set_config("generation_kwargs", simple_parse_args_string(cfg.gen_kwargs), update=True)
        task.set_fewshot_seed(1234)
    return loaded


def load_on_all_ranks(manager, name: str, shots: int | None, cfg) -> dict | None:
    """The same on every rank; None, and a line that says why, where any of them cannot: a task runs on all or on none."""
    loaded = reason = None
    try:
        loaded = load_task(manager, name, shots, cfg)
    except Exception as error:  # noqa: BLE001 (a data set, a metric or a task file: anything can be missing)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    reasons = [reason for reason in of_all(reason) if reason]
    if not reasons:
        return loaded
    data = (manager.task_index[name].cfg or {}).get("dataset_path", "of the group")
    say(f"error: task {name} (data set {data}) is left out: {reasons[0]}")
    return None


def evaluate(cfg, model, tokenizer, manager, tasks: dict, path: str, document: dict) -> tuple[dict, list[str]]:
    """Runs lm-eval tasks one by one: (`document` with their results, the tasks that could not be run).

    cfg: bench.py's settings. The document is written to `path` after every task. A file of the same weights and settings
    is continued: what it holds is not run again.
    """
    import lm_eval

    os.environ["HF_ALLOW_CODE_EVAL"] = str(int(cfg.allow_code_execution))
    settings = {
        "routing": cfg.routing,
        "limit": cfg.limit,
        "gen_kwargs": cfg.gen_kwargs,
        "dtype": str(model.head_weight.dtype),
        "done": [],
    }
    settings |= {"weights": weights_digest(model), "lm_eval": importlib.metadata.version("lm_eval")}
    settings, results = saved_results(path, settings)
    adapter, missing = lm_eval_model(model, tokenizer, cfg.routing, cfg.batch_size), []
    for name, suggested in tasks.items():
        shots = suggested if cfg.num_fewshot is None else cfg.num_fewshot
        if [name, shots] in settings["done"]:
            say(f"{name}: done before, see {path}")
            continue
        loaded = load_on_all_ranks(manager, name, shots, cfg)
        if loaded is None:
            missing.append(name)
            continue
        new = lm_eval.evaluate(
            adapter,
            task_dict=loaded,
            limit=cfg.limit or None,
            log_samples=False,
            confirm_run_unsafe_code=cfg.allow_code_execution,
        )
        results = {key: results[key] | new.get(key, {}) for key in KEYS}
        settings["done"] = [done for done in settings["done"] if done[0] != name] + [[name, shots]]
        if rank() == 0:
            write_whole(path, document | {"evaluation": settings} | results)
    if results["results"]:
        print_results(cfg, model, results, path)
    return document | {"evaluation": settings} | results, missing


def weights_digest(model: Transformer) -> str:
    """SHA-256 of a model's configuration and weights."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def saved_results(path: str, settings: dict) -> tuple[dict, dict[str, dict]]:
    """The settings and results in the file `path`; where it holds none of the same settings, these and no results."""
    try:
        with open(path, encoding="utf-8") as f:
            saved = json.load(f)
        if saved["evaluation"] | {"done": []} == settings:
            return saved["evaluation"], {key: saved[key] for key in KEYS}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing to continue
    return settings, {key: {} for key in KEYS}


def print_results(cfg, model: Transformer, results: dict, path: str):
    import lm_eval

    protocols = {"causal": "causal routing", "topk": "top-k routing, which looks at the future (generation: causal)"}
    title = f"{cfg.model_path}: {protocols[cfg.routing] if model.routed else model.config.architecture}"
    if cfg.limit:
        title += f", the first {cfg.limit} examples of each task"
    print(f"\n{title}")
    print(lm_eval.utils.make_table(results))
    if results["groups"]:
        print(lm_eval.utils.make_table(results, "groups"))
    print(path)


def log_to_wandb(cfg, results: dict[str, dict]):
    """Every number of lm-eval's results as eval/TASK/METRIC."""
    import wandb

    run = wandb.init(
        project=cfg.wandb_project, entity=cfg.wandb_entity or None, name=f"eval {cfg.model_path}", config=asdict(cfg)
    )
    values = {f"eval/{task}/{name}": value for task, metrics in results.items() for name, value in metrics.items()}
    run.log({name: value for name, value in values.items() if isinstance(value, int | float)})
    run.finish()
