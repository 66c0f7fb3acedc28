"""Arms of a study compared over seeds: intervals, tables and the picture, all of the one document that study.py writes.

document = {"reference": arm, "axis": "training" | "inference", "runs": [run], "speeds": {arm: {measure: speed}}, …}
run = {"arm", "seed", "tokens", "flops", "seconds", "curve": [point], "losses": {text: {routing: loss}}, "costs": {…}}
point = {"tokens", "flops", "seconds", "topk", "causal"}        one evaluation, losses of the validation split
speed = {"tokens_per_s", "ratio"}                               ratio: how many times as fast as the reference
"""

import json
import math
import os
import statistics
from functools import partial

import numpy as np

from figures import COLOURS, STYLE, colours, label_ends, markdown_table, print_table, save_figure, si
from files import write_whole

# Student's t at 97.5 % for 1, 2, 3 … degrees of freedom; beyond, the last: a hair too wide.
STUDENT = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
STUDENT += (2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860)
NONE = "–"
MARKS = {"o": "●", "s": "■", "D": "◆", "^": "▲"}  # what a picture draws, and how a text shows it
SPEEDS = {"training": "training", "prefill1": "prefill, batch 1", "prefill8": "prefill, batch 8"}
SPEEDS |= {"decode1": "decoding, batch 1", "decode8": "decoding, batch 8"}


def paired(values: dict[int, float], reference: dict[int, float]) -> tuple[float, float]:
    """The mean difference of {seed: value} from the reference's of the same seeds, and the half width of its 95 %
    Student interval: NaN without a common seed, infinite with one.
    """
    differences = [values[seed] - reference[seed] for seed in values.keys() & reference.keys()]
    n = len(differences)
    if n < 2:
        return (differences[0], math.inf) if differences else (math.nan, math.nan)
    return statistics.fmean(differences), STUDENT[min(n - 1, 20) - 1] * statistics.stdev(differences) / math.sqrt(n)


def spread(values) -> str:
    """Mean ± standard deviation."""
    values = list(values)
    if not values:
        return NONE
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{deviation}"


def difference(values: dict[int, float], reference: dict[int, float]) -> str:
    """A paired difference with its interval, marked where the interval holds zero, and as a share of the reference."""
    mean, half = paired(values, reference)
    if values is reference or math.isnan(mean):
        return NONE
    share = mean / statistics.fmean(reference[seed] for seed in values.keys() & reference.keys())
    width = "one seed" if half == math.inf else f"± {half:.4f}" + (" n.s." if abs(mean) <= half else "")
    return f"{mean:+.4f} {width} ({share:+.2%})"


def per_run(document: dict, value) -> dict[str, dict[int, float]]:
    """{arm: {seed: value(run)}}, the arms in their order; runs for which it is None are left out."""
    table = {run["arm"]: {} for run in document["runs"]}
    for run in document["runs"]:
        if (number := value(run)) is not None:
            table[run["arm"]][run["seed"]] = number
    return table


def against(document: dict, reference: str) -> dict[str, dict]:
    """Its speeds as multiples of those of `reference`, which may not be its own; without those that cannot be."""
    speeds = document.get("speeds", {})
    if document.get("reference", reference) == reference:
        return speeds
    base = speeds.get(reference, {})
    return {
        arm: {
            name: speed | {"ratio": speed["ratio"] / base[name]["ratio"]}
            for name, speed in of_arm.items()
            if name in base
        }
        for arm, of_arm in speeds.items()
    }


def losses(document: dict, text: str, routing: str) -> dict[str, dict[int, float]]:
    """Those on the text as the study has it and of the length that it asks for: others are of another text, or part of it."""
    data = document.get("judged", {}).get(text)

    def loss(run):
        found = run["losses"].get(text, {})
        same = found.get("limit") in (None, document.get("judge_tokens")) and found.get("data") in (None, data)
        return found.get(routing) if same else None

    return per_run(document, loss)


def texts(document: dict) -> list[str]:
    """The texts that runs were scored on, those of `judge` before the validation split."""
    return sorted(
        {text: 0 for run in document["runs"] for text in run["losses"]}, key=lambda text: text == "validation"
    )


def timed(document: dict) -> list[str]:
    """The arms whose speed in training was measured side by side with the reference's. A run's own clock is of its machine
    and of what ran beside it, and says nothing.
    """
    arms = dict.fromkeys([document["reference"], *(run["arm"] for run in document["runs"])])
    found = [arm for arm in arms if "training" in document["speeds"].get(arm, {})]
    return found if document["reference"] in found and len(found) > 1 else []


def seconds(document: dict, run: dict, point: dict) -> float:
    """Training time up to a point of a curve, by speeds that were measured side by side: of `timed` arms."""
    base, own = (document["speeds"][arm]["training"] for arm in (document["reference"], run["arm"]))
    return point["tokens"] / (base["tokens_per_s"] * own["ratio"])


def at_equal_time(document: dict) -> tuple[float, dict[str, dict[int, float]]]:
    """The training time that every run of a timed arm reached, and the validation loss there, between the two evaluations
    next to it.
    """
    arms = timed(document)
    runs = [run for run in document["runs"] if run["arm"] in arms and "validation" in run["losses"]]
    curves = [(run, [seconds(document, run, point) for point in run["curve"]]) for run in runs]
    shortest = min((times[-1] for _, times in curves), default=0.0)
    found = {id(run): np.interp(shortest, times, [p["causal"] for p in run["curve"]]) for run, times in curves}
    return shortest, per_run(document, lambda run: float(found[id(run)]) if id(run) in found else None)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def columns(first: str, arms: list[str], cells: dict[str, dict[str, str]]) -> list[list[str]]:
    """Rows of a table with one line an arm; a column in which no arm has anything is left out."""
    shown = {head: column for head, column in cells.items() if set(column.values()) - {NONE}}
    return [[first, *shown], *([arm, *(column[arm] for column in shown.values())] for arm in arms)]


def loss_table(document: dict) -> list[list[str]]:
    reference, cells = document["reference"], {}
    validation = losses(document, "validation", "causal")
    cells["seeds"] = {arm: str(len(of_arm)) for arm, of_arm in validation.items()}

    def add(head, values):
        cells[head] = {arm: spread(of_arm.values()) for arm, of_arm in values.items()}
        against = values.get(reference, {})
        cells[f"{head}: − {reference}"] = {arm: difference(of_arm, against) for arm, of_arm in values.items()}

    for text in texts(document):
        add(f"{text}, causal", losses(document, text, "causal"))
        topk = losses(document, text, "topk")
        cells[f"{text}, top-k"] = {arm: spread(of_arm.values()) for arm, of_arm in topk.items()}
    if document["axis"] == "training" and timed(document):
        time, values = at_equal_time(document)
        add(f"validation at {time:,.0f} s", values)
    return columns("loss", list(validation), cells)


def cost_table(document: dict) -> list[list[str]]:
    """What the arms cost: FLOPs, memory and measured speeds, of all but the reference as shares of its own."""
    reference, cells = document["reference"], {}

    def add(head, value):
        means = {arm: list(of_arm.values()) for arm, of_arm in per_run(document, value).items()}
        means = {arm: statistics.fmean(values) if values else math.nan for arm, values in means.items()}
        base = means.get(reference, math.nan)
        cells[head] = {arm: NONE if math.isnan(mean) else si(mean) for arm, mean in means.items()}
        for arm, mean in means.items():
            if arm != reference and base and not math.isnan(mean + base):
                cells[head][arm] += f" ({mean / base:.2f}×)"

    add("training, FLOPs", lambda run: run["flops"])
    add("… a token", lambda run: run["flops"] / run["tokens"] if run["tokens"] else None)
    selected = per_run(document, lambda run: run["costs"].get("selected") or None)  # of each routed layer
    cells["tokens selected, causal"] = {
        arm: f"{np.mean(list(of_arm.values())):.1%}" if of_arm else NONE for arm, of_arm in selected.items()
    }
    add("inference, FLOPs a token", lambda run: run["costs"].get("flops_per_token"))
    add("KV cache, bytes a token", lambda run: run["costs"].get("kv_bytes"))
    arms = list(cells["training, FLOPs"])
    for measure, head in SPEEDS.items():
        speeds = {arm: document["speeds"].get(arm, {}).get(measure) for arm in arms}
        cells[f"{head}, tokens/s"] = {arm: NONE for arm in arms}
        for arm, speed in speeds.items():
            if speed:  # rates of different times are no comparison: of the others the ratio alone
                rate = f"{speed['tokens_per_s']:,.0f}" if arm == reference else f"{speed['ratio']:.2f}×"
                cells[f"{head}, tokens/s"][arm] = rate
    return columns("cost", arms, cells)


def write(document: dict, results: str):
    """The document as JSON, a run a line."""
    runs = ",\n ".join(json.dumps(run) for run in document["runs"])
    head = json.dumps(document | {"runs": []})
    write_whole(results, head.replace('"runs": []', f'"runs": [\n {runs}\n]') + "\n")


def report(document: dict, results: str):
    """Prints the tables of a document that is in `results`; writes them beside it as .md, and the picture as .png."""
    stem = os.path.splitext(results)[0]
    save_figure(picture(document), f"{stem}.png")
    tables = loss_table(document), cost_table(document)
    notes = f"""{len(document["runs"])} runs. Losses in nats per token: mean ± standard deviation over seeds. Differences are
paired by seed, with their 95 % Student interval, each by itself: of the seeds, not of the text. n.s.: it holds zero.

FLOPs at inference are of the tokens that causal routing selects on validation text."""
    if measured := {arm: where for arm, where in document["measured_on"].items() if document["speeds"].get(arm)}:
        machines = "; ".join(dict.fromkeys(measured.values()))
        notes += f" Speeds were taken in turns with those of\n{document['reference']}: {machines}."
        arms = dict.fromkeys(run["arm"] for run in document["runs"])
        if (missing := [arm for arm in arms if arm not in measured]) and document["axis"] == "inference":
            notes += f" Not measured, and not in the picture: {', '.join(missing)}."
    if diverged := [f"{run['arm']}-{run['seed']}" for run in document["runs"] if "validation" not in run["losses"]]:
        notes += f"\nDiverged, and in no mean: {', '.join(diverged)}."
    compared = timed(document)
    arms = [arm for arm in dict.fromkeys(run["arm"] for run in document["runs"]) if arm not in compared]
    if document["axis"] == "training" and arms:
        notes += f"\nNo losses at equal time: speeds in training were not measured side by side of {', '.join(arms)}."
    parts = ["\n".join(markdown_table(table)) for table in tables]
    parts += [notes, f"![losses]({os.path.basename(stem)}.png)\n"]
    write_whole(f"{stem}.md", "\n\n".join(parts))
    for table in tables:
        print_table(table)
        print()
    print(notes, results, f"{stem}.png", sep="\n")


# ---------------------------------------------------------------------------------------------------------------------
# The picture


def picture(document: dict):
    """Loss under causal routing, one mark a run: over training FLOPs and time, or over speeds of inference."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        if document["axis"] == "training":
            fig = Figure(figsize=(12 if timed(document) else 6.5, 4.6), layout="constrained")
            draw_training(fig, document)
        else:
            fig = Figure(layout="constrained")
            draw_inference(fig, document)
    return fig


def looks(document: dict) -> dict[str, dict]:
    """{arm: how its marks look}: colours come round, then with another mark."""
    arms = list(dict.fromkeys(run["arm"] for run in document["runs"]))
    return {
        arm: {"color": colour, "marker": list(MARKS)[n // len(COLOURS) % len(MARKS)]}
        for n, (arm, colour) in enumerate(zip(arms, colours(arms), strict=True))
    }


def draw_training(fig, document: dict):
    """The validation curve of every arm, the mean of its runs, over FLOPs, and over time where that is known; the end of each
    run is marked. Beside them the means of an arm's final losses and times.
    """
    look_of, final = looks(document), losses(document, "validation", "causal")
    late = [p["causal"] for run in document["runs"] for p in run["curve"] if 2 * p["tokens"] >= run["tokens"]] or [0.0]
    margin = 0.05 * (max(late) - min(late)) + 0.005
    panels = [("training FLOPs", lambda run, point: point["flops"], final, "{:.3f}")]
    if arms := timed(document):

        def time(run):
            return seconds(document, run, run["curve"][-1]) if run["arm"] in arms and run["curve"] else None

        times = per_run(document, time)
        panels.append(
            ("training time in seconds, by speeds measured in turns", partial(seconds, document), times, "{:,.0f} s")
        )
    axes = fig.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    axes[0].set_ylim(min(late) - margin, max(late) + margin)
    for ax, (label, x, values, form) in zip(axes, panels, strict=True):
        ax.set(xlabel=label)
        shown = {arm: look for arm, look in look_of.items() if values[arm] and final[arm]}
        for arm, look in shown.items():
            runs = [run for run in document["runs"] if run["arm"] == arm and run["curve"]]
            points = [[(x(run, point), point["causal"]) for point in run["curve"]] for run in runs]
            line = np.array([np.mean(step, 0) for step in zip(*points, strict=False)])  # evaluated at the same ones
            ax.plot(*line.T, color=look["color"], linewidth=1, alpha=0.8)
            for of_run in points:
                ax.plot(*of_run[-1], **look, markersize=4.5, clip_on=False)
        means = {arm: form.format(statistics.fmean(values[arm].values())) for arm in shown}
        ends = [
            (statistics.fmean(final[arm].values()), f"{MARKS[look['marker']]} {arm} {means[arm]}", look["color"])
            for arm, look in shown.items()
        ]
        label_ends(ax, ends, gap=0.05)
    fig.axes[0].set(ylabel="nats per token", title="Validation loss, causal routing: a line an arm, a mark a run")


def inference_panels(document: dict) -> list[tuple[str, str, dict[str, float]]]:
    """(title, label of the axis, {arm: a multiple of the reference's}) of each speed; of FLOPs before one is measured."""
    reference, panels = document["reference"], []
    for measure in (measure for measure in SPEEDS if measure != "training"):
        ratios = {arm: speeds[measure]["ratio"] for arm, speeds in document["speeds"].items() if measure in speeds}
        if ratios:
            panels.append((SPEEDS[measure].capitalize(), f"tokens/s, as a multiple of {reference}'s", ratios))
    if panels:
        return panels
    flops = per_run(document, lambda run: run["costs"].get("flops_per_token"))
    means = {arm: statistics.fmean(of_arm.values()) for arm, of_arm in flops.items() if of_arm}
    ratios = {arm: mean / means[reference] for arm, mean in means.items()} if reference in means else {}
    return [("Inference", f"FLOPs a token, as a multiple of {reference}'s", ratios)]


def draw_inference(fig, document: dict):
    """Loss over each speed that was measured, relative to the reference's; over FLOPs before one is."""
    arms, reference = {run["arm"] for run in document["runs"]}, document["reference"]
    scored = {
        text: {arm for arm, of_arm in losses(document, text, "causal").items() if of_arm} for text in texts(document)
    }
    text = next((text for text in scored if scored[text] == arms), "validation")  # of all that have not diverged
    values, panels = losses(document, text, "causal"), inference_panels(document)
    look_of, rows = looks(document), min(2, len(panels))
    columns_of_panels = -(-len(panels) // rows)
    fig.set_size_inches(6 * columns_of_panels, 4 * rows)
    axes = fig.subplots(rows, columns_of_panels, sharey=True, squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for ax, (title, label, ratios) in zip(axes.flat, panels, strict=False):
        ax.set(title=title, xlabel=label)
        for arm, look in look_of.items():
            marks = list(values[arm].values())
            if arm in ratios:
                ax.plot([ratios[arm]] * len(marks), marks, linestyle="", **look, markersize=5)
        if values.get(reference):
            ax.axhline(statistics.fmean(values[reference].values()), color="#BBBBBB", linewidth=0.6, zorder=0)
        ax.margins(0.15, 0.12)
    for ax, (_, _, ratios) in zip(axes.flat, panels, strict=False):  # when all losses are in the common scale
        ends = [
            (statistics.fmean(values[arm].values()), f"{MARKS[look['marker']]} {arm}", look["color"])
            for arm, look in look_of.items()
            if values[arm] and arm in ratios
        ]
        label_ends(ax, ends, gap=0.05)  # in the order of their losses
    for ax in axes[:, 0]:
        ax.set_ylabel(f"nats per token of {text}, causal routing")
