"""Markdown tables of the results of bench/studies/lora_study.py."""

import statistics
from collections import defaultdict

KINDS = {
    "query": "self.query",
    "key": "self.key",
    "value": "self.value",
    "attention's output": "attention.output.dense",
    "first of the MLP": "intermediate.dense",
    "second of the MLP": ".output.dense",
}

TEXT = """# Learned-rank fine-tuning of all-MiniLM-L6-v2

Sentiment of film reviews (positive or negative by the mean of 20 ratings, those within 1 of neutral left out):
{parts[0]:,} sentences to train on, {parts[1]:,} to choose learning rates on, {parts[2]:,} held out; at most 48 tokens,
one epoch of AdamW in batches of 32. Means and deviations over {seeds} seeds (of the head, the order and dropout). The
held-out part alone makes an accuracy uncertain by {sampling:.1f} points.

All methods train the encoder's 36 linear layers (without biases) and a new head; the rest is frozen. Full fine-tuning
and learned rank use AdamW's rate {full_rate:g}, LoRA {lora_rate:g} (alpha = 2 r), the best of {full_tried} and
{lora_tried} on the validation part for the full one and for r = {middle}. What is stored was written as an adapter,
loaded and merged by PEFT, and then evaluated. *Cut by SVD* is the rival that costs no second training: the full
update's largest singular values, over all layers, in as many parameters as the learned one needs.

**Learned rank trains all weights: it takes full fine-tuning's memory and time, and its proximal steps. What it saves is
the size of what is stored.**

{table}

{rivals}

Time: of training, one thread. {machine}; {versions}; {minutes:.0f} minutes of processor time in all. `{command}`.

## Where the ranks went

Mean rank by the kind of layer, and by block from the input to the output:

{where}
"""


def markdown(result: dict) -> str:
    rows, plan = defaultdict(list), result["plan"]
    for run in result["runs"]:
        rows[run["method"], run["setting"]].append(run)
    full = next(run for run in result["runs"] if run["method"].startswith("full"))
    lora = next(run for run in result["runs"] if run["method"] == "LoRA")
    accuracy, held_out = mean([run["held_out"] for run in result["runs"]]), plan["parts"][2]
    header = ("method", "", "MB", "parameters", "rank: least, median, most", "held-out accuracy, %", "validation, %",
              "minutes", "of it proximal")  # fmt: skip
    ranked = {key: runs for key, runs in rows.items() if runs[0]["ranks"]}
    blocks = sorted({block(name) for name in next(iter(ranked.values()))[0]["ranks"]})
    return TEXT.format(
        parts=plan["parts"],
        seeds=plan["seeds"],
        sampling=100 * (accuracy * (1 - accuracy) / held_out) ** 0.5,
        full_rate=full["rate"],
        lora_rate=lora["rate"],
        full_tried=", ".join(f"{rate:g}" for rate in plan["full_rates"]),
        lora_tried=", ".join(f"{rate:g}" for rate in plan["lora_rates"]),
        middle=plan["ranks"][len(plan["ranks"]) // 2],
        table=table(header, [line(*key, runs) for key, runs in rows.items()]),
        rivals=rivals(rows),
        machine=result["machine"],
        versions=", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        minutes=result["minutes"],
        command=result["command"],
        where=table(
            ("", "", *KINDS, *(f"block {block + 1}" for block in blocks)),
            [where(*key, runs, blocks) for key, runs in ranked.items() if key[0] != "LoRA"],
        ),
    )


def line(method: str, setting: str, runs: list[dict]) -> list[str]:
    ranks = sorted(rank for run in runs for rank in run["ranks"].values())
    seconds, prox = (mean([run[what] for run in runs]) for what in ("seconds", "prox_share"))
    return [
        method,
        setting,
        f"{mean([run['bytes'] for run in runs]) / 1e6:.2f}",
        f"{mean([run['params'] for run in runs]):,.0f}",
        f"{ranks[0]}, {statistics.median(ranks):g}, {ranks[-1]}" if ranks else "",
        spread([100 * run["held_out"] for run in runs]),
        spread([100 * run["validation"] for run in runs]),
        f"{seconds / 60:.1f}" if seconds else "",
        f"{prox:.0%}" if prox else "",
    ]


def rivals(rows: dict[tuple[str, str], list[dict]]) -> str:
    """Held-out accuracy of learned ranks minus that of the truncated update of the same size, in points, by seed."""
    lines = []
    for (method, setting), runs in rows.items():
        if method == "learned rank":
            pairs = zip(runs, rows["full, cut by SVD", f"to that of {setting}"], strict=True)
            gains = [100 * (run["held_out"] - cut["held_out"]) for run, cut in pairs]
            lines.append(f"{', '.join(f'{gain:+.1f}' for gain in gains)} ({setting})")
    return "Learned rank minus the cut of its size, seed by seed, in points: " + "; ".join(lines) + "."


def where(method: str, setting: str, runs: list[dict], blocks: list[int]) -> list[str]:
    """Mean ranks by kind of layer and by block.

    The name of the attention's output is also the end of the MLP's: the longer match counts.
    """
    ranks = [(name, rank) for run in runs for name, rank in run["ranks"].items()]
    kind = {name: max((end for end in KINDS.values() if name.endswith(end)), key=len) for name, _ in ranks}
    by_kind = [mean([rank for name, rank in ranks if kind[name] == end]) for end in KINDS.values()]
    by_block = [mean([rank for name, rank in ranks if block(name) == wanted]) for wanted in blocks]
    return [method, setting, *(f"{value:.1f}" for value in by_kind + by_block)]


def block(name: str) -> int:
    return int(name.split(".layer.")[1].partition(".")[0])


def table(header: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def mean(values: list[float]) -> float:
    return statistics.fmean(values)


def spread(values: list[float]) -> str:
    return f"{mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")
