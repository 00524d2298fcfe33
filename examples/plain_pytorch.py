"""Plain PyTorch: digits, averaged weights, autocast (--bf16), and atomic checkpoints to resume from (--resume)."""

from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import compaware_kernels as ck
from compaware_kernels.demo.networks import small_convnet
from compaware_kernels.study.images import digits


def save_atomically(state: dict, path: Path) -> None:
    """Write a checkpoint so that the file is complete whenever the process is killed: the old one or the new one."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def main(epochs: int = 20, off: bool = False, bf16: bool = False, resume: bool = False,
         out: Path = Path("out/examples")) -> None:  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    data, model, done = digits(), small_convnet(), 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    prox = ck.ProximalStep(model, optimizer, nuclear=0.0 if off else 1.0, every=10)
    parts = {"model": model, "optimizer": optimizer, "average": average, "prox": prox}
    checkpoint, path = out / "plain_pytorch.pt", out / "plain_pytorch.safetensors"
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        done, _ = state["done"], torch.set_rng_state(state["random"])
        for name, part in parts.items():
            part.load_state_dict(state[name])
    for epoch in range(done, epochs):
        for batch in torch.randperm(len(data.train_x)).split(32):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = F.cross_entropy(model(data.train_x[batch]), data.train_y[batch])
            loss.backward()
            optimizer.step()  # also takes a proximal step, every tenth time
            average.update_parameters(model)
        states = {name: part.state_dict() for name, part in parts.items()}
        save_atomically(states | {"done": epoch + 1, "random": torch.get_rng_state()}, checkpoint)

    ranks = {layer.name: ck.ranks.fixed(layer.rank) for layer in prox.report()}  # the average has full rank
    small, report = ck.compress(average, ranks, (data.test_x[:1],), goal="size")
    ck.save(small, path)
    small = ck.load(path, small_convnet())
    accuracy = [float((m(data.test_x).argmax(1) == data.test_y).double().mean()) for m in (average, small)]
    print(prox.report())
    print(f"held-out accuracy {accuracy[0]:.1%}, compressed {accuracy[1]:.1%}; saved to {path}")
    print(f"multiply-adds {report.macs_before:,} -> {report.macs:,} ({report.macs / report.macs_before:.0%})")


if __name__ == "__main__":
    typer.run(main)
