"""Every public name with the types that a program gives and gets; checked by mypy in make lint, never run."""

from typing import Any, assert_type

import torch
from torch import Tensor, nn

import compaware_kernels as ck
from compaware_kernels.integrations import lightning, transformers


def train(model: nn.Module, optimizer: torch.optim.Optimizer, base: nn.Module) -> ck.ProximalReport:
    prox = ck.ProximalStep(
        model, optimizer, nuclear=2.0, group={"head": 0.1, "*": 0}, every=10, skip=["stem"], warmup=3
    )
    prox.step()
    assert_type(prox.thresholds(), dict[str, dict[str, float]])
    assert_type(prox.warm, ck.WarmState)
    assert_type(prox.skipped, dict[str, str])
    assert_type(prox.steps, int)
    prox.load_state_dict(prox.state_dict())
    prox.remove()
    ck.ProximalStep(model, optimizer, nuclear=1, center=base, order=("nuclear", "group", "l1"), division="owner")
    report = prox.report()
    assert_type(report.scalars(), dict[str, float])
    assert_type([layer.rank for layer in report], list[int])
    return report


def trainers(model: nn.Module) -> None:
    callback = lightning.CompressionAware(
        nuclear=2.0, every="epoch", save_to="small.safetensors", compress={"goal": "size"}
    )
    assert_type(callback.proxes, list[ck.ProximalStep])
    assert_type(callback.compress_report, ck.CompressReport | None)
    assert_type(transformers.CompressionAware(nuclear=2.0, every=10).proxes, list[ck.ProximalStep])


def operators(W: Tensor, tau: Tensor) -> None:
    assert_type(ck.svt(W, 0.1), Tensor)
    P, info = ck.svt(W, tau, return_info=True)
    assert_type(P, Tensor)
    assert_type(info, ck.SvtInfo)
    assert_type(info.error_bound, Tensor)
    assert_type(ck.firm_svt(W, tau, 3.0), Tensor)
    assert_type(ck.firm_svt(W, 0.1, 3.0, return_info=True), tuple[Tensor, ck.SvtInfo])
    assert_type(ck.group_shrink(W, 1), Tensor)
    assert_type(ck.soft_threshold(W, tau), Tensor)
    assert_type(ck.sparse_group_shrink(W, 0.1, tau), Tensor)


def operators_in_place(weights: list[Tensor], weight: nn.Parameter) -> None:
    state = ck.WarmState(seed=1)
    infos = ck.svt_(weights, 0.1, state=state, names=["a", "b"], groups=[1, 2], fold="spatial")
    assert_type(infos, list[ck.SvtInfo])
    assert_type(infos[0].method, str)
    assert_type(ck.firm_svt_(weights, 0.1, [2.0, 3.0], state=state), list[ck.SvtInfo])
    ck.svt_([weight], [0.1], center=weights, fold=None, tol=1e-2)
    assert_type(ck.weighted_svt_(weights, [[0.1, 0.2]]), list[ck.SvtInfo])
    assert_type(ck.truncate_(weights, [3, 4]), list[ck.SvtInfo])
    assert_type(ck.spectral_ball_(weights, 1.0), list[ck.SvtInfo])
    ck.group_shrink_(weights, 0.1, biases=[None, weight])
    ck.soft_threshold_(weights, torch.ones(2))
    ck.sparse_group_shrink_(weights, 0.1, [0.2, 0.3])
    state.load_state_dict(state.to("cpu").state_dict())
    assert_type(state.numbers(), int)


def compress(model: nn.Module, x: Tensor) -> nn.Module:
    small, report = ck.compress(model, ck.ranks.energy(0.99), (x,), goal="size", fold="auto", skip=["head"])
    assert_type(small, nn.Module)
    assert_type(report, ck.CompressReport)
    assert_type(report.macs, int | None)
    layer = report.layers[0]
    assert_type(layer, ck.LayerReport)
    assert_type(layer.rank, int | None)
    assert_type(report.to_dict(), dict[str, Any])
    ck.compress(model, {"body.*": ck.ranks.fixed(4), "*": lambda s: int((s > 1).sum())}, [x], measure=True)
    budget = ck.allocate(model, 0.4, (x,), of="params", by="equal", calibration=[(x,)])
    ck.compress(model, budget, (x,), goal="size", calibration=[(x,)])
    ck.compress(
        model, ck.ranks.fixed(4), {"x": x}, example_kwargs={"mask": None}, calibration=[{"x": x}], progress=False
    )
    assert_type(ck.fuse(model, (x,), {"mask": None}), nn.Module)
    return small


def ranks_and_folds(W: Tensor) -> None:
    s = torch.linalg.svdvals(ck.folds.to_matrix(W, "spatial", groups=2))
    for rule in (ck.ranks.threshold(0.1, relative=True), ck.ranks.nuclear(0.9), ck.ranks.share(0.5)):
        assert_type(rule(s), int)
    assert_type(str(ck.ranks.parse("energy:0.99")), str)
    assert_type(ck.ranks.break_even(64, 288), int)
    assert_type(ck.ranks.numerical_rank(s, torch.float32), Tensor)
    assert_type(ck.folds.from_matrix(W, W.shape), Tensor)


def deploy(model: nn.Module, base: nn.Module, x: Tensor) -> dict[str, Any]:
    ck.save(model, "small.safetensors")
    try:
        model = ck.load("small.safetensors", base)
    except ck.CheckpointError as error:
        print(error)
    fused = ck.fuse(model, (x,))
    assert_type(fused, nn.Module)
    assert_type(ck.to_plain(model), nn.Module)
    assert_type(ck.to_dense(model), nn.Module)
    adapter = ck.export_lora(model, base, "adapter", whole=["head"], ranks=ck.ranks.fixed(8))
    assert_type(adapter, ck.LoraReport)
    assert_type(adapter.bytes, int)
    return ck.info()


def layers(x: Tensor, V: Tensor, U: Tensor) -> None:
    assert_type(ck.LowRankLinear(64, 32, rank=4, bias=False).to_dense(), nn.Linear)
    assert_type(ck.LowRankLinear.from_dense(nn.Linear(64, 32), 4), ck.LowRankLinear)
    ck.LowRankConv1d(3, 8, 3, rank=2, padding="same")
    ck.LowRankConv2d(3, 8, (3, 5), rank=2, stride=2, padding=1, groups=1, fold="spatial", dtype=torch.float64)
    ck.LowRankConv3d(3, 8, 3, rank=2, device="cpu")
    ck.LowRankConvTranspose1d(3, 8, 3, rank=2, output_padding=0)
    ck.LowRankConvTranspose2d(3, 8, 3, rank=2, stride=(2, 2))
    ck.LowRankConvTranspose3d(3, 8, 3, rank=2)
    assert_type(ck.LowRankConv2d(3, 8, 3, rank=2).why_two_step(x), str)
    assert_type(ck.lowrank_linear(x, V, U, None, activation="relu"), Tensor)
    assert_type(ck.lowrank_conv2d(x, V, U, stride=2, padding=(1, 1), residual=x), Tensor)
