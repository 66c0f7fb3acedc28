"""prepare.py against nanoGPT's recipe, and its memory: `python tests/measure_prepare.py`, some minutes, by hand.

nanoGPT's recipe (data/openwebtext/prepare.py): datasets.map over the documents with tiktoken's encode_ordinary in
num_proc processes, then the ids concatenated shard by shard into a memmap. Here: the same text, the same tokenizer, the
same two processes, from one JSONL file; both sides include their starts.
"""

import json
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np

NANOGPT = """
import sys
import numpy as np, tiktoken
from datasets import load_dataset
from datasets.utils import disable_progress_bars
sys.path.insert(0, ".")
from tokenizer import EOT, tiktoken_parts
import json

disable_progress_bars()
text, tokenizer, out, num_proc = sys.argv[1:]
spec = json.load(open(tokenizer))
pattern, ranks = tiktoken_parts(spec)
enc = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOT: spec["model"]["vocab"][EOT]})

def process(example):
    ids = enc.encode_ordinary(example["text"])
    ids.append(enc.eot_token)
    return {"ids": ids, "len": len(ids)}

if __name__ == "__main__":
    data = load_dataset("json", data_files=text, split="train", cache_dir=out)
    split = data.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    split["val"] = split.pop("test")
    tokenized = split.map(process, remove_columns=["text"], num_proc=int(num_proc))
    for name, part in tokenized.items():
        arr = np.memmap(f"{out}/{name}.bin", dtype=np.uint16, mode="w+", shape=(np.sum(part["len"], dtype=np.uint64),))
        total, at = min(1024, len(part)), 0
        for i in range(total):
            batch = part.shard(num_shards=total, index=i, contiguous=True).with_format("numpy")
            ids = np.concatenate(batch["ids"])
            arr[at : at + len(ids)] = ids
            at += len(ids)
        arr.flush()
    print(sum(int(np.sum(part["len"])) for part in tokenized.values()))
"""


def corpus(path, megabytes):
    """Documents of the standard library and its tests as JSONL, again and again until there are enough."""
    texts = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" not in file.parts:
            try:
                texts.append(file.read_text(encoding="utf-8"))
            except UnicodeDecodeError:
                continue
    with open(path, "w") as f:
        written = 0
        for i in range(10**9):
            text = texts[i % len(texts)]
            f.write(json.dumps({"text": f"# {i}\n{text}"}) + "\n")
            written += len(text)
            if written >= megabytes * 1e6:
                return path


def run(argv):
    """(seconds, CPU seconds of it and its children, greatest sum of resident memory in MB)."""
    import psutil

    before, began = psutil.Process().cpu_times(), time.monotonic()
    process, peak = subprocess.Popen(argv, stdout=subprocess.DEVNULL), 0.0
    while process.poll() is None:
        try:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            peak = max(peak, sum(p.memory_info().rss for p in family) / 1e6)
        except psutil.Error:
            pass
        time.sleep(0.05)
    assert process.returncode == 0, argv
    after = psutil.Process().cpu_times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.monotonic() - began, cpu, peak


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        small, large = corpus(folder / "20.jsonl", 20), corpus(folder / "200.jsonl", 200)
        prepare = [sys.executable, "prepare.py", "--num_proc=2", f"--out_dir={folder}/tok"]
        subprocess.run([*prepare, f"--input={small}", "--val_fraction=0.0005"], check=True)
        tokenizer = folder / "tok/tokenizer.json"
        (folder / "nanogpt.py").write_text(NANOGPT)
        ours, theirs = [], []
        for i in range(3):  # interleaved, so that a busy machine is busy for both
            out = folder / f"ours{i}"
            argv = [sys.executable, "prepare.py", "--num_proc=2", f"--tokenizer={tokenizer}", f"--input={large}"]
            ours.append(run([*argv, f"--out_dir={out}", "--val_fraction=0.0005"]))
            argv = [sys.executable, str(folder / "nanogpt.py"), str(large), str(tokenizer), f"{folder}/theirs{i}", "2"]
            theirs.append(run(argv))
            print(f"ours {ours[-1]}, nanoGPT's {theirs[-1]}", flush=True)
        tokens = sum(file.stat().st_size // 2 for file in out.rglob("*.bin"))
        for what, column in (("wall", 0), ("CPU", 1)):
            a, b = np.median([r[column] for r in ours]), np.median([r[column] for r in theirs])
            print(f"{what}: {tokens / a / 2:,.0f} tokens/s per process, {b / a:.2f} x nanoGPT's recipe")
        argv = [sys.executable, "prepare.py", "--num_proc=2", f"--tokenizer={tokenizer}", f"--input={small}"]
        peak = run([*argv, f"--out_dir={folder}/small"])[2]
        print(f"peak memory of three processes: {peak:.0f} MB for 20 MB of text, {ours[-1][2]:.0f} MB for 200 MB")


if __name__ == "__main__":
    main()
