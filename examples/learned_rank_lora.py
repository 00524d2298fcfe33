"""LoRA with learned ranks: fine-tuning that learns the rank of its update, layer by layer, exported for PEFT.

A network learns the digits 0 to 4, then 5 to 9 with a nuclear norm of the change from its earlier weights.
"""

import copy
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from peft import PeftModel
from torch import nn

import compaware_kernels as ck
from compaware_kernels.study.images import digits


def network() -> nn.Module:
    body = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
    return nn.Sequential(OrderedDict(flat=nn.Flatten(), body=body, head=nn.Linear(256, 10)))


def main(epochs: int = 30, nuclear: float = 150.0, seed: int = 0, out: Path = Path("out/examples")) -> None:
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    data, base = digits(), network()

    def train(model: nn.Module, wanted: torch.Tensor, center: nn.Module | None = None) -> None:
        # weight decay pulls to 0, not to center
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
        prox = center and ck.ProximalStep(model, optimizer, nuclear={"body.*": nuclear}, center=center)
        for _ in range(epochs):
            for batch in wanted.nonzero()[:, 0][torch.randperm(int(wanted.sum()))].split(32):
                optimizer.zero_grad()
                F.cross_entropy(model(data.train_x[batch]), data.train_y[batch]).backward()
                optimizer.step()
            if prox:
                prox.step()

    def accuracy(model: nn.Module) -> float:
        x, y = data.test_x[data.test_y >= 5], data.test_y[data.test_y >= 5]
        return float((model(x).argmax(1) == y).double().mean())

    train(base, data.train_y < 5)
    model = copy.deepcopy(base)
    train(model, data.train_y >= 5, base)
    print(ck.export_lora(model, base, out / "learned_rank_lora", whole=["head"]))
    print(f"accuracy on 5 to 9: {accuracy(base):.1%} before, {accuracy(model):.1%} fine-tuned,", end=" ")
    merged = PeftModel.from_pretrained(base, out / "learned_rank_lora").merge_and_unload()
    print(f"{accuracy(merged):.1%} loaded by PEFT and merged")


if __name__ == "__main__":
    typer.run(main)
