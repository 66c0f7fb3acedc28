"""The pictures' and the report's numbers, against the files they come from and direct calls of the model."""

import hashlib
import json
import re
import shutil
import statistics
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from test_sample import TEXT, TOKENIZER, VOCABULARY, save_model

import figures
import measure
import plot
import trained
from configurator import cli
from data import TokenData

SEQ_LEN = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four runs on one data folder, as prepare.py and train.py leave them, with random weights and made-up losses."""
    root = tmp_path_factory.mktemp("demo")
    ids = np.array(TOKENIZER.encode(TEXT).ids, "<u2")
    parts = {}
    for split, tokens in (("train", np.tile(ids, 3)), ("val", ids)):
        (root / "data" / split).mkdir(parents=True)
        tokens.tofile(root / "data" / split / "text-00000.bin")
        sha256 = hashlib.sha256(tokens.tobytes()).hexdigest()
        files = [{"name": f"{split}/text-00000.bin", "tokens": len(tokens), "sha256": sha256}]
        parts[split] = {"tokens": len(tokens), "documents": 1, "files": files}
    manifest = {"version": 1, "tokenizer": "test", "dtype": "uint16", "vocab_size": VOCABULARY, "eot_token": 0}
    manifest["sources"] = {"text": {"weight": 1.0, **parts}}
    (root / "data" / "manifest.json").write_text(json.dumps(manifest))
    for n, architecture in enumerate(("dense", "mod", "dtf", "stt")):
        run = root / architecture
        save_model(run / "final_model", architecture)
        (run / "step_0000020").mkdir()
        train = {"data_dir": str(root / "data"), "seq_len": SEQ_LEN, "seed": 1, "out_dir": str(run)}
        state = {"config": {"train": train, "model": {"architecture": architecture}}}
        (run / "step_0000020" / "state.json").write_text(json.dumps(state))
        write_metrics(run, n, architecture)
    return root


def write_metrics(run, n, architecture):
    lines = []
    for step in range(0, 21, 5):
        line = {"step": step, "train/loss": 8 - step / 10 + n / 10, "tokens_per_s": 1000 + step * (n + 1)}
        if step % 10 == 0:
            line |= {"val/loss": 9 - step / 5 + n / 10, "val/loss_causal": (9 - step / 5 + n / 10) * 1.01}
        if architecture != "dense":
            line |= {"causal_accuracy": 0.5 + step / 50, "causal_capacity": 0.45}
        if architecture in ("dtf", "stt"):
            line |= {"S_CE": 0.3 + step / 100, "S_CU": 0.2, "G_cont": 0.4}
        lines.append(json.dumps(line) + "\n")
    (run / "metrics.jsonl").write_text("".join(lines))


def run(monkeypatch, capsys, *arguments):
    """The script in this process: (exit status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, arguments)])
    try:
        cli(plot.main)
        status = 0
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def is_picture(path):
    head = path.read_bytes()[:8]
    return head == b"\x89PNG\r\n\x1a\n" if path.suffix == ".png" else head.startswith(b"%PDF")


# -- curves -----------------------------------------------------------------------------------------------------------


def test_metrics_are_read_and_a_torn_last_line_is_left_out(tmp_path):
    good = '{"step": 0, "a": 1, "run": "name"}\n{"step": 10, "a": null, "b": 2.5}\n'
    (tmp_path / "metrics.jsonl").write_text(good + '{"step": 20, "a"')
    metrics = plot.read_metrics(str(tmp_path))
    assert set(metrics) == {"a", "b"} and metrics["b"] == ([10], [2.5])
    assert metrics["a"][0] == [0, 10] and np.isnan(metrics["a"][1][1])


def test_curves_show_the_logged_numbers(folder):
    runs = {name: [plot.read_metrics(str(folder / name))] for name in ("dense", "mod", "dtf")}
    fig = plot.curves(runs)
    axes = {ax.get_title(loc="left").split(",")[0].split(":")[0]: ax for ax in fig.axes}
    assert list(axes) == ["Training loss", "Validation loss", *(t.split(",")[0] for t in plot.SIGNALS.values())]
    drawn = [line.get_xydata().tolist() for line in axes["Training loss"].lines]
    assert drawn == [[[s, 8 - s / 10 + n / 10] for s in range(0, 21, 5)] for n in range(3)]
    top, causal = (line.get_ydata() for line in axes["Validation loss"].lines[2:4])  # mod's
    assert list(top) == [9.1, 7.1, 5.1] and causal == pytest.approx(top * 1.01)
    assert [t.get_text() for t in axes["Training loss"].texts] == ["dense 6.00", "mod 6.10", "dtf 6.20"]
    assert len(axes["S_CE"].lines) == 1 and len(axes["Causal router's accuracy"].lines) == 2
    colours = [{line.get_color() for line in axes[t].lines} for t in ("S_CE", "Training loss")]
    assert colours[0] < colours[1] and len(colours[1]) == 3  # a run keeps its colour in every panel
    low, high = axes["Validation loss"].get_ylim()
    assert low < 5 and 7.2 < high < 9  # the untrained loss is outside


def test_curves_of_a_dense_run_have_no_router_panels(folder):
    assert len(plot.curves({"dense": [plot.read_metrics(str(folder / "dense"))]}).axes) == 2


def test_labels_keep_apart_and_inside():
    ax = Figure().add_subplot()
    ax.set_ylim(0, 10)
    ends = [(9.9, "a", "k"), (10, "b", "k"), (9.8, "c", "k"), (2, "d", "k"), (5, "e", "k"), (5.2, "f", "k")]
    figures.label_ends(ax, [*ends, (float("nan"), "g", "k")], 0.1)
    places = {t.get_text(): t.get_position()[1] for t in ax.texts}
    expected = {"d": 0.2, "e": 0.46, "f": 0.56, "c": 0.8, "a": 0.9, "b": 1.0}  # pairs centred, none beyond the axis
    assert places == pytest.approx(expected)


# -- the report -------------------------------------------------------------------------------------------------------


def test_si():
    assert [figures.si(v) for v in (0.5, 7, 999_700, 1234567, 9.99e9, 2e12)] == [
        "0.5",
        "7",
        "1 M",
        "1.23 M",
        "9.99 G",
        "2 T",
    ]


def test_report(folder, monkeypatch, capsys):
    speeds = {"dense": 200.0, "mod": 100.0, "dtf": 50.0, "stt": 400.0}
    monkeypatch.setattr(plot, "decode_speeds", lambda models, prompt: speeds)
    status, out, err = run(monkeypatch, capsys, "report", *(folder / name for name in speeds))
    assert (status, err) == (0, "")
    report = (folder / "report.md").read_text(encoding="utf-8")
    table = {}
    for line in report.splitlines():
        if line.startswith("| "):
            first, *cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            table[first.strip()] = cells
    assert table[""] == ["dense", "mod", "dtf", "stt"]
    assert table["decoding, tokens/s"] == ["200", "100 (0.50×)", "50 (0.25×)", "400 (2.00×)"]
    assert table["training, tokens/s"] == ["1,010", "1,020 (1.01×)", "1,030 (1.02×)", "1,040 (1.03×)"]  # medians
    assert table["validation loss, before training"] == ["9.0000", "9.1000", "9.2000", "9.3000"]
    assert table["validation loss, top-k routing"] == ["5.0000", "5.1000", "5.2000", "5.3000"]
    assert table["validation loss, causal routing"][:2] == ["5.0500", "5.1510 (+1.00%)"]
    assert table["− dense's"][:2] == ["–", "+0.1010 one seed (+2.00%)"]
    assert "**One seed in common with dense: mod, dtf, stt**" in report
    assert table["causal router, accuracy"] == ["–", "90.0%", "90.0%", "90.0%"]

    val = TokenData(str(folder / "data"), "val", SEQ_LEN)
    ids, _ = val.batch(0, len(val))
    per_layer = 2 * 2 * 8 * 4  # keys and values, 2 KV heads of 8, float32
    for n, name in enumerate(("dense", "mod", "dtf", "stt")):
        model, _ = trained.open_model(str(folder / name))
        with torch.no_grad():
            masks = model(ids, routing="causal", return_masks=True).masks
        shares = [int(mask.sum()) / mask.numel() for mask in masks.values()]
        kept = per_layer * (5 - len(shares) + sum(shares))
        assert table["KV cache, bytes per token"][n].split(" (")[0] == f"{kept:,.0f}"
        flops = model.flops_per_token(SEQ_LEN, capacity=shares)
        assert table["FLOPs per token, causal inference"][n].split(" (")[0] == figures.si(flops)
        expected = f"{sum(shares) / len(shares):.1%}" if shares else "–"
        assert table["causal router, capacity"][n] == expected
        assert table["parameters"][n].split(" (")[0] == f"{sum(p.numel() for p in model.parameters()):,}"
    for row, cells in table.items():  # the terminal shows the same
        line = next(line for line in out.splitlines() if line.startswith(row or " "))
        assert re.sub(r"\s+", " ", line[len(row) :]).strip() == " ".join(cells)

    pictures = re.findall(r"!\[.*\]\((.*)\)", report)
    assert pictures == ["curves.png", "routing.png"]
    assert all(is_picture(folder / f"{name}.{kind}") for name in ("curves", "routing") for kind in ("png", "pdf"))
    assert report.count("def main(") == 4
    assert sorted(p.name for p in folder.iterdir() if p.is_file()) == [
        *("curves.pdf", "curves.png", "report.md", "routing.pdf", "routing.png"),
    ]


def test_a_report_of_several_seeds_says_what_they_decide(folder, tmp_path, monkeypatch, capsys):
    """Runs that differ in their seed alone are one column; a difference within its interval is named as undecided."""
    monkeypatch.setattr(plot, "decode_speeds", lambda models, prompt: dict.fromkeys(models, 100.0))
    for name in ("dense", "mod", "stt"):
        for seed in (1, 2, 3):
            run_folder = tmp_path / f"{name}-{seed}"
            shutil.copytree(folder / name, run_folder)
            path = run_folder / "step_0000020" / "state.json"
            state = json.loads(path.read_text())
            state["config"]["train"] |= {"seed": seed, "out_dir": str(run_folder)}
            path.write_text(json.dumps(state))
            # mod lies 0.1 above dense with every seed, stt 0.0, 0.1 and 0.2
            write_metrics(run_folder, 5 * seed + {"dense": 0, "mod": 1, "stt": seed - 1}[name], name)
    runs = [tmp_path / f"{name}-{seed}" for name in ("dense", "mod", "stt") for seed in (1, 2, 3)]
    shutil.rmtree(tmp_path / "dense-3" / "final_model")
    status, _, _ = run(monkeypatch, capsys, "report", *runs)
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert status == 0 and report.startswith("# Report: dense, mod, stt\n")
    finals = [5 + seed / 2 for seed in (1, 2, 3)]
    assert f"{statistics.fmean(finals):.4f} ± {statistics.stdev(finals):.4f} | " in report
    width = 4.3027 * 0.101 / 3**0.5  # Student's t of two degrees of freedom
    row = next(line for line in report.splitlines() if line.startswith("| − dense's"))
    assert "| +0.1010 ± 0.0000 (" in row and f"| +0.1010 ± {width:.4f} n.s. (" in row
    assert "**Not told apart: stt**" in report and "One seed" not in report
    assert "**Not finished: dense-3**" in report
    seed = {"val/loss_causal": ([20], [5.0])}
    said = plot.what_seeds_say({"dense": {1: seed}, "mod": {1: seed}, "stt": {2: seed}}, "dense")
    assert "**One seed in common with dense: mod**" in said and "diverged: stt**: not compared" in said
    kinds = plot.kinds_of_run({path.name: str(path) for path in [*runs, folder / "dtf"]})
    assert kinds == {n: {s: f"{n}-{s}" for s in (1, 2, 3)} for n in ("dense", "mod", "stt")} | {"dtf": {1: "dtf"}}
    # the arm's own number stays, and a name is given once
    named = {"mod_0.5-1": runs[3], "mod_0.5-2": runs[4], "stt-10": runs[6], "stt-11": runs[7], "stt": folder / "dtf"}
    (tmp_path / "stt-1" / "step_0000020" / "state.json").write_text(json.dumps(state))
    kinds = plot.kinds_of_run({name: str(path) for name, path in named.items()})
    assert kinds == {
        "mod_0.5": {1: "mod_0.5-1", 2: "mod_0.5-2"},
        "stt-10": {3: "stt-10", 2: "stt-11"},
        "stt": {1: "stt"},
    }
    metrics_path = tmp_path / "mod-2" / "metrics.jsonl"
    metrics_path.write_text("".join(metrics_path.read_text().splitlines(True)[:1]))
    status, _, err = run(monkeypatch, capsys, "report", *runs)
    assert status == 2 and "the runs of mod stand at different steps, [0, 20]: finish them, or leave them out" in err


def test_decode_speeds_take_turns(folder):
    calls = []

    class Fake(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name, self.head_weight = name, torch.zeros(1)

        def generate(self, ids, n):  # no stop_ids: a model that ends early would seem to be fast
            calls.append(self.name)
            assert ids.shape == (1, 3)
            return torch.zeros(1, 3 + n)

    speeds = measure.decode_speeds({"a": Fake("a"), "b": Fake("b")}, torch.zeros(3, dtype=torch.int64), n=4, rounds=3)
    assert calls == ["b", "a", "a", "b"] * 2 and all(speed > 0 for speed in speeds.values())


# -- which tokens are routed ------------------------------------------------------------------------------------------


def test_kinds():
    expected = {
        "word start": ["def", " main", "argv", "return", ".x", "_y"],
        "continuation": ["ab", "", "é"],
        "punctuation": ["(", "):", " ->"],
        "whitespace": ["\n    ", "  "],
        "number": [" 12", "½"],
    }
    order = ["def", " main", "(", "argv", "):", "\n    ", "return", " 12", " ->", ".x", "ab", "", "é", "_y", "  ", "½"]
    kinds = [plot.KINDS[k] for k in plot.kinds_of(order)]
    assert {kind: {t for t, k in zip(order, kinds, strict=True) if k == kind} for kind in plot.KINDS} == {
        kind: set(texts) for kind, texts in expected.items()
    }


def test_deciles_and_rates():
    values = np.random.default_rng(0).permutation(1000)
    assert (plot.deciles(values) == values // 100).all()
    assert plot.deciles(np.array([7.0, 7, 7, 7, 9, 9])).tolist() == [3, 3, 3, 3, 8, 8]  # ranks 2 of 6 and 5 of 6
    masks = np.array([[1, 1, 0, 0, 1], [0, 0, 0, 1, 0]], bool)
    rate = plot.rates(masks, np.array([0, 0, 0, 2, 2]), 3)
    assert rate[:, [0, 2]].tolist() == [[2 / 3, 0.5], [0, 0.5]] and np.isnan(rate[:, 1]).all()


def test_routing_figure_shows_the_models_selection(folder):
    metrics = plot.read_metrics(str(folder / "dtf"))
    selection = plot.selection_of(str(folder / "dtf"), plot.PlotConfig(sequences=3))
    fig = plot.routing("dtf", metrics, selection)
    by_layer, by_kind, by_frequency, by_position, by_loss, drivers = fig.axes
    ids, targets = TokenData(str(folder / "data"), "val", SEQ_LEN).batch(0, 3)
    model, _ = trained.open_model(str(folder / "dtf"))
    with torch.no_grad():
        out = model(ids, routing="causal", return_masks=True)
    masks = {i: mask.float() for i, mask in out.masks.items()}
    assert [bar.get_height() for bar in by_layer.patches] == pytest.approx([float(m.mean()) for m in masks.values()])
    for line, mask in zip(by_position.lines, masks.values(), strict=True):
        assert line.get_ydata() == pytest.approx(mask.mean(0).numpy())  # 24 positions: a bin each
    texts = [TOKENIZER.decode([i]) for i in ids.flatten().tolist()]
    numbers = torch.tensor([text.strip().isdigit() for text in texts])
    dots = [line.get_xdata()[plot.KINDS.index("number")] for line in by_kind.lines]
    assert numbers.sum() > 2 and dots == pytest.approx([float(m.flatten()[numbers].mean()) for m in masks.values()])
    loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), targets.flatten(), reduction="none")
    highest = loss.argsort()[-7:]  # of 72 tokens, those whose middle rank is above 9/10
    assert by_loss.lines[0].get_ydata()[9] == pytest.approx(float(masks[1].flatten()[highest].mean()))
    assert len(by_frequency.lines) == 2 and by_frequency.lines[0].get_xdata().tolist() == list(range(1, 11))
    ce, cu = (line.get_ydata() for line in drivers.lines)
    assert ce == pytest.approx([(0.3 + s / 100) / (0.5 + s / 100) for s in range(0, 21, 5)])
    assert ce + cu == pytest.approx(1)

    other = plot.selection_of(str(folder / "mod"), plot.PlotConfig(sequences=3))
    table = {row: cells for row, *cells in plot.what_was_taken({"dtf": selection, "mod": other})}
    entered = [sum(mask.flatten() for mask in masks.values()), torch.tensor(other.masks.sum(0))]
    assert table[""] == ["dtf", "mod"]
    share = torch.stack([mask.flatten()[numbers] for mask in masks.values()]).mean()
    assert table["number, share selected"][0] == f"{share:.1%}"
    expected = torch.corrcoef(torch.stack((entered[0], loss)))[0, 1]
    assert table["blocks entered, r with the next token's loss"][0] == f"{expected:+.2f}"
    both = torch.corrcoef(torch.stack([e.double() for e in entered]))[0, 1]
    assert table["… with those of mod"] == [f"{both:+.2f}", "–"] and table["… with those of dtf"][1] == f"{both:+.2f}"
    assert plot.correlation(np.ones(3), np.arange(3)) == "–"


# -- the script -------------------------------------------------------------------------------------------------------


def test_script_writes_pictures_where_the_runs_are(folder, monkeypatch, capsys, tmp_path):
    status, out, err = run(monkeypatch, capsys, folder / "mod")
    assert (status, err) == (0, "") and out == f"{folder}/mod/curves.png\n"
    assert is_picture(folder / "mod" / "curves.png") and is_picture(folder / "mod" / "curves.pdf")
    monkeypatch.setattr(plot, "routing", lambda name, metrics, selection: Figure(figsize=(1, 1)))
    status, out, err = run(monkeypatch, capsys, "routing", folder / "mod", folder / "stt", f"--out={tmp_path}/new")
    assert (status, err) == (0, "")
    names = [f"routed_tokens_{name}.{kind}" for name in ("mod", "stt") for kind in ("pdf", "png")]
    table = tmp_path / "new" / "routed_tokens.md"
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted([*names, table.name])
    assert all(is_picture(tmp_path / "new" / name) for name in names)
    assert "| … with those of stt |" in table.read_text() and "… with those of stt" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no run is named"),
        (["report"], "no run is named"),
        (["{}/none"], "none is no run (it has no metrics.jsonl)"),
        (["{}/garbled"], "metrics.jsonl, line 2 is no JSON object with a step"),
        (["report", "{}/untrained"], "has no checkpoint"),
        (["report", "{}/stateless"], "has no checkpoint"),
        (["report", "{}/odd", "{}/dense"], "different data or sequence lengths"),
        (["routing", "{}/dense"], "dense is a dense model: it routes nothing"),
        (["{}/dense", "--outt=x"], "did you mean out?"),
        (["routing", "{}/dense", "--sequences=some"], "'some' is not int"),
    ],
)
def test_bad_input_gets_one_line_and_status_2(folder, monkeypatch, capsys, arguments, message):
    metrics = '{"step": 0, "train/loss": 1.0}\n'
    for name in ("garbled", "untrained", "stateless", "odd"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "metrics.jsonl").write_text(metrics + "[]\n" * (name == "garbled"))
    for name in ("stateless", "odd"):
        if not (folder / name / "final_model").exists():
            save_model(folder / name / "final_model", "dense")
    (folder / "odd" / "step_0000001").mkdir(exist_ok=True)
    state = {"config": {"train": {"data_dir": str(folder / "data"), "seq_len": 7}}}
    (folder / "odd" / "step_0000001" / "state.json").write_text(json.dumps(state))
    status, out, err = run(monkeypatch, capsys, *(argument.format(folder) for argument in arguments))
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
