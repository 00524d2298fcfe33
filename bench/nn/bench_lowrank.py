"""Low-rank inference in fp32 on the CPU: ``make bench-inference``; all layer shapes with BENCH_GRID=whole.

Layers: shapes of ResNet-18 and -50, VGG-16, MobileNetV2 and BERT at rank 1/8, 1/4 and 1/2 of the full one, at least 8.
``dense`` has the weight U V, ``two-step`` is two layers of torch, ``ours`` one module with packed weights. A sample is
1 ms of repeated calls, so that small layers find their weights in the cache. Networks: all layers but the stem and the
classifier at rank 1/4. Every output is compared with fp64 before anything is timed.

The floor is the longer of two times: the layer's bytes at the rate of a copy, and its multiply-adds at the best rate
measured here. Memory that glibc returns to the system comes back as page faults, 10 ms for 25 MB: the make target tells
glibc to keep it, and the table says so.
"""

import pytest
import torch

from bench.nn import inference_floor, inference_layers, inference_networks, inference_tables


@pytest.fixture
def freezing():
    """Turns on inductor's freezing, which makes weights constants; starts with a compiler that has seen no other
    network."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(freezing=True):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("case", inference_layers.cases(), ids=str)
def test_layer(inference_race, benchmark, case):
    torch.manual_seed(0)
    layer, x = case.layer, case.layer.input(case.batch)
    ours = layer.low_rank(layer.rank(inference_layers.SHARES[case.share])).requires_grad_(False)
    rows, peer = inference_layers.rows(layer, ours, x)

    def verdicts(outputs):
        return inference_layers.verdicts(layer, ours, peer, x, outputs)

    with torch.inference_mode():
        result = inference_race(rows, verdicts, inference_layers.OURS, seconds=0.8)
        floor = inference_floor.floor(ours, x, rows[inference_layers.OURS]())
    benchmark.extra_info["floor (ms)"] = floor
    inference_tables.layer_results.append((case, result, floor))
    assert result[inference_layers.OURS]["ok"]


@pytest.mark.parametrize("batch", inference_networks.BATCHES)
@pytest.mark.parametrize("name", inference_networks.NETWORKS)
def test_network(inference_race, benchmark, freezing, name, batch):
    dense, small, x = inference_networks.build(name, batch)
    rows = inference_networks.rows(dense, small, x)

    def verdicts(outputs):
        return inference_networks.verdicts(dense, small, x, outputs)

    with torch.inference_mode():
        result = inference_race(rows, verdicts, inference_networks.OURS, seconds=15)
    count = inference_networks.low_rank_layers(small)
    floor = inference_floor.network_floor(small, x)
    benchmark.extra_info["floor (ms)"] = floor
    inference_tables.network_results.append((f"{name}, batch {batch}, {count} low-rank layers", result, floor))
    assert result[inference_networks.OURS]["ok"]
