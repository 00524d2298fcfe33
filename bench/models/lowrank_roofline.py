"""Roofline model of low-rank inference on GPUs: one dense convolution, two convolutions, and the fused kernel.

    python -m bench.models.lowrank_roofline

A prediction for GPUs that this machine lacks. The time of a kernel is its launch overhead plus the longest of four:
DRAM traffic, L2 traffic, tensor-core arithmetic, and the latency of the steps that one program must run in sequence.
bf16; bias, ReLU and the residual are left out everywhere.
"""

from collections import Counter
from itertools import product
from math import ceil
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from bench.nn.inference_layers import Layer
from compaware_kernels.ops.triton_lowrank import MAX_RANK, tile_for


class Chip(NamedTuple):
    tensor: float  # dense bf16 flop/s
    dram: float  # bytes/s
    L2: float  # bytes/s
    L2_size: float  # bytes
    multiprocessors: int
    clock: float  # Hz


CHIPS = {
    "A100 80 GB SXM": Chip(312e12, 2.039e12, 7.2e12, 40e6, 108, 1.41e9),
    "H100 SXM": Chip(989e12, 3.35e12, 9.0e12, 50e6, 132, 1.755e9),
    "B200": Chip(2250e12, 8.0e12, 10.7e12, 126e6, 148, 1.86e9),
}
DRAM_SHARE, L2_SHARE, TENSOR_SHARE = 0.85, 0.7, 0.65  # fraction of the peak rates that good kernels reach
STEP = 0.2e-6  # s: DRAM latency of 0.6 us, over three pipeline stages in flight
PORT = 64  # bytes per clock from L2 to one multiprocessor
PEER_TILE, PEER_STEP = 128, 64
BATCHES, SHARES = (1, 8, 32, 256), (1 / 8, 1 / 4, 1 / 2)

NOTES = """# Low-rank convolutions on GPUs: arithmetic, not measurement

Nothing here has run on a GPU. ResNet-50 (v1.5, 224 x 224), bf16, microseconds, {launch:g} us a launch. Written by
`python -m bench.models.lowrank_roofline`.

| | dense bf16 | DRAM | L2 | L2 size | multiprocessors |
|---|---|---|---|---|---|
{chips}

Tensor and DRAM rates, L2 sizes: NVIDIA's data sheets (A100 80 GB SXM, 2021; H100 SXM, 2023; HGX B200, 2025), dense, not
sparse. L2 rate: 5,120 bytes a clock on A100 (NVIDIA A100 whitepaper, 2020), the same at the H100's clock; NVIDIA states
none for B200: the H100's, scaled by multiprocessors and clock (an assumption). One multiprocessor gets 64 a clock.

Assumed: {tensor:.0%} of the tensor peak, {dram:.0%} of the DRAM's, {L2:.0%} of the L2's; activations below a quarter of
the L2 stay in it, weights come from DRAM; every tap reads its pixels from L2 again; a step of a program's loop takes at
least {step:g} us. Dense and two convolutions: tiles of 128 x 128 or the channels there are, and the sum cut until every
multiprocessor has work. Fused: the tiles of `compaware_kernels/ops/triton_lowrank.py`, and as many
multiprocessors as they occupy. Rank: the share of min(O, C k k); above {max_rank} the fused column is two convolutions.
The stem and the classifier stay dense.
"""


STEM, CLASSIFIER = Layer(3, 64, 7, 224, 2), Layer(2048, 1000, 1, 1)


def resnet50_layers() -> Counter[Layer]:
    """The factorized layers of ResNet-50 and the count of each: He et al. 2016, stride in the 3 x 3."""
    layers, C, H = Counter(), 64, 56
    for blocks, width, stride in ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2)):
        layers[Layer(C, 4 * width, 1, H, stride)] += 1  # the shortcut
        for _ in range(blocks):
            layers[Layer(C, width, 1, H)] += 1
            layers[Layer(width, width, 3, H, stride)] += 1
            C, H, stride = 4 * width, H // stride, 1
            layers[Layer(width, C, 1, H)] += 1
    return layers


def longest(chip: Chip, dram: float, L2: float, flops: float, steps: float, busy: float) -> float:
    """Seconds of the slowest resource; ``busy``: fraction of the multiprocessors with work."""
    L2_rate = min(chip.L2 * L2_SHARE, PORT * chip.clock * chip.multiprocessors * busy)
    return max(dram / (chip.dram * DRAM_SHARE), L2 / L2_rate, flops / (chip.tensor * TENSOR_SHARE * busy), steps * STEP)


def traffic(chip: Chip, *activations: float) -> float:
    """DRAM bytes of the activations (sizes in elements) that are too large to stay in L2."""
    return sum(2 * size for size in activations if 2 * size > chip.L2_size / 4)


def conv(chip: Chip, layer: Layer, batch: int, launch: float) -> float:
    """Seconds of one dense convolution."""
    K, M = layer.C * layer.k**2, layer.pixels(batch)
    BM, BN = min(PEER_TILE, M), min(PEER_TILE, layer.O)
    tiles = ceil(M / BM) * ceil(layer.O / BN)
    dram = traffic(chip, batch * layer.C * layer.H**2, M * layer.O) + 2 * K * layer.O
    L2 = 2 * tiles * K * (BM + BN) + 2 * M * layer.O
    steps = ceil(K / PEER_STEP) / max(1, chip.multiprocessors // tiles)
    return launch + longest(chip, dram, L2, 2 * M * K * layer.O, steps, 1)


def two_convs(chip: Chip, layer: Layer, batch: int, rank: int, launch: float) -> float:
    H = ceil(layer.H / layer.stride)
    return conv(chip, layer._replace(O=rank), batch, launch) + conv(chip, Layer(rank, layer.O, 1, H), batch, launch)


def fused(chip: Chip, layer: Layer, batch: int, rank: int, launch: float) -> float:
    """Seconds of the fused kernel, whose programs compute both products one after the other."""
    if rank > MAX_RANK:
        return two_convs(chip, layer, batch, rank, launch)
    K, M, O = layer.C * layer.k**2, layer.pixels(batch), layer.O
    BR, tile, sharing = tile_for("half", rank, M, chip.multiprocessors)
    sharing = min(sharing, ceil(O / tile.BO))
    programs = ceil(M / tile.BM) * sharing
    busy = min(1, programs / chip.multiprocessors)
    dram = traffic(chip, batch * layer.C * layer.H**2, M * O) + 2 * rank * (K + O)
    L2 = 2 * programs * K * (tile.BM + rank) + 2 * programs * rank * O / sharing + 2 * M * O
    flops = 2 * programs * tile.BM * BR * (K + O / sharing)
    steps = layer.k**2 * ceil(layer.C / tile.BK) + ceil(O / tile.BO / sharing)
    return launch + longest(chip, dram, L2, flops, steps, busy)


def network(chip: Chip, batch: int, share: float, launch: float) -> dict[str, float]:
    """Seconds of ResNet-50: all layers dense, all factorized, and with the fastest form of each layer."""
    total = Counter()
    rest = conv(chip, STEM, batch, launch) + conv(chip, CLASSIFIER, batch, launch)
    for layer, count in resnet50_layers().items():
        dense, two, one = times(chip, layer, batch, share, launch)
        best = {"dense": dense, "two": two, "fused": one, "dense or two": min(dense, two), "best": min(dense, two, one)}
        for name, seconds in best.items():
            total[name] += count * seconds
    return {name: seconds + rest for name, seconds in total.items()}


def times(chip: Chip, layer: Layer, batch: int, share: float, launch: float) -> tuple[float, float, float]:
    rank = layer.rank(share)
    factorized = (two_convs(chip, layer, batch, rank, launch), fused(chip, layer, batch, rank, launch))
    return conv(chip, layer, batch, launch), *factorized


def markdown(columns, rows) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (columns, ["---"] * len(columns), *rows)) + "\n"


def networks(launch: float) -> str:
    rows = []
    for (name, chip), share, batch in product(CHIPS.items(), SHARES, BATCHES):
        t = network(chip, batch, share, launch)
        absolute = [f"{1e6 * t[key]:,.0f}" for key in ("dense", "two", "fused", "best")]
        ratios = [t["two"] / t["fused"], t["dense"] / t["dense or two"], t["dense"] / t["best"]]
        rows.append((name, f"{share:g}", batch, *absolute, *(f"{ratio:.2f}" for ratio in ratios)))
    columns = ("", "rank", "batch", "dense", "two convs", "fused", "best per layer")
    ratios = ("two convs / fused", "dense / best without fused", "dense / best")
    return markdown((*columns, *ratios), rows)


def layers(chip: Chip, share: float, launch: float) -> str:
    rows = []
    for layer, count in resnet50_layers().items():
        cells = (times(chip, layer, batch, share, launch) for batch in BATCHES)
        text = (" / ".join(f"{1e6 * seconds:.1f}" for seconds in cell) for cell in cells)
        rows.append((layer, count, layer.rank(share), *text))
    return markdown(("layer", "count", "rank", *(f"batch {batch}" for batch in BATCHES)), rows)


def main(
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path(__file__).parents[1]
    / "results/roofline-lowrank.md",
    launch: Annotated[float, typer.Option(help="Microseconds a launch.")] = 3.0,
) -> None:
    """Write the predictions for whole networks and for every layer."""
    sheet = (
        f"| {name} | {c.tensor / 1e12:,.0f} TFLOP/s | {c.dram / 1e12:.2f} TB/s | {c.L2 / 1e12:.1f} TB/s | "
        f"{c.L2_size / 1e6:.0f} MB | {c.multiprocessors} |"
        for name, c in CHIPS.items()
    )
    shares = {"tensor": TENSOR_SHARE, "dram": DRAM_SHARE, "L2": L2_SHARE}
    text = [NOTES.format(launch=launch, chips="\n".join(sheet), step=1e6 * STEP, max_rank=MAX_RANK, **shares)]
    text += ["## ResNet-50\n", networks(1e-6 * launch), "## Layers: dense / two convs / fused\n"]
    for (name, chip), share in product(CHIPS.items(), SHARES):
        text += [f"### {name}, rank {share:g}\n", layers(chip, share, 1e-6 * launch)]
    out.write_text("\n".join(text))
    print(out)


if __name__ == "__main__":
    typer.run(main)
