"""Accelerate: compression-aware training (or plain, with --off) in a loop of your own, bf16, accumulated gradients."""

from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

import compaware_kernels as ck
from compaware_kernels.demo.networks import small_convnet
from compaware_kernels.study.images import digits


def main(epochs: int = 20, off: bool = False, seed: int = 0, out: Path = Path("out/examples")) -> None:
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    data, model, path = digits(), small_convnet(), out / "accelerate_digits.safetensors"
    loader = DataLoader(TensorDataset(data.train_x, data.train_y), 16, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=2e-3), loader)
    strengths = {} if off else {"nuclear": 10.0, "group": 0.2}
    prox = ck.ProximalStep(model, optimizer, **strengths, every=10, skip=["11"])
    accelerator.register_for_checkpointing(prox)  # saved and loaded by accelerator.save_state and load_state

    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()

    trained, model = model, small_convnet()
    model.load_state_dict(accelerator.unwrap_model(trained).state_dict())
    small, report = ck.compress(model, ck.ranks.energy(0.99), (data.test_x[:1],), skip=["11"], goal="size")
    ck.save(small, path)
    small = ck.load(path, small_convnet())
    accuracy = [float((m.eval()(data.test_x).argmax(1) == data.test_y).double().mean()) for m in (model, small)]
    print(prox.report())
    print(f"held-out accuracy {accuracy[0]:.1%}, compressed {accuracy[1]:.1%}")
    print(f"multiply-adds {report.macs_before:,} -> {report.macs:,} ({report.macs / report.macs_before:.0%})")
    print(f"saved to {path}")


if __name__ == "__main__":
    typer.run(main)
