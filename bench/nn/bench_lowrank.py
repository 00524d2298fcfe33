"""Low-rank inference on the CPU: ``make bench-inference``; all layer shapes with BENCH_GRID=whole.

Layers: shapes of ResNet-18 and -50, VGG-16, MobileNetV2 and BERT at rank 1/8, 1/4 and 1/2 of the full one, at least 8,
in fp32 with 1 and 2 threads (BENCH_THREADS=1,2), some of them in bf16. ``dense`` has the weight U V, ``two-step`` is
two layers of torch, ``ours`` one module, which has measured how to run when its output was checked. A sample is 1 ms of
repeated calls, so that small layers find their weights in the cache. Networks: all layers but the stem and the
classifier at rank 1/4, with the last of the numbers of threads. Every output is compared with fp64 before anything is
timed.

It can be run in pieces: BENCH_ONLY=REGEX takes the layers that match, ``-k`` the tests; with BENCH_RESUME=FILE each
result goes to that file at once, and what is there is not measured again.

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
def test_layer(inference_race, kept, case):
    result, floor = kept(lambda: layer_row(inference_race, case))
    inference_tables.layer_results.append((case, result, floor))
    assert result[inference_layers.OURS]["ok"]


def layer_row(race, case):
    torch.manual_seed(0)
    torch.set_num_threads(case.threads)
    layer, x = case.layer, case.layer.input(case.batch).to(case.dtype)
    ours = layer.low_rank(layer.rank(inference_layers.SHARES[case.share])).requires_grad_(False).to(case.dtype)
    rows, peer = inference_layers.rows(layer, ours, x)

    def verdicts(outputs):
        return inference_layers.verdicts(layer, ours, peer, x, outputs)

    with torch.inference_mode():
        result = race(rows, verdicts, inference_layers.OURS, seconds=0.6)
        result[inference_layers.OURS]["way"] = inference_layers.way(*rows[inference_layers.OURS].args)
        return result, inference_floor.floor(ours, x, rows[inference_layers.OURS](), case.threads)


@pytest.mark.parametrize("batch", inference_networks.BATCHES)
@pytest.mark.parametrize("name", inference_networks.NETWORKS)
def test_network(inference_race, kept, freezing, name, batch):
    result, floor = kept(lambda: network_row(inference_race, name, batch))
    inference_tables.network_results.append((f"{name}, batch {batch}", result, floor))
    assert result[inference_networks.OURS]["ok"]


def network_row(race, name, batch):
    torch.set_num_threads(inference_layers.THREADS[-1])
    dense, small, x = inference_networks.build(name, batch)
    rows = inference_networks.rows(dense, small, x)

    def verdicts(outputs):
        return inference_networks.verdicts(dense, small, x, outputs)

    with torch.inference_mode():
        result = race(rows, verdicts, inference_networks.OURS, seconds=15)
    return result, inference_floor.network_floor(small, x, torch.get_num_threads())
