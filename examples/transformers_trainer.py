"""transformers' Trainer: a small vision transformer learns digits, compression-aware or, with --off, plainly."""

from pathlib import Path

import torch
import typer
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

import compaware_kernels as ck
from compaware_kernels.integrations.transformers import CompressionAware
from compaware_kernels.study.images import digits


def vit() -> ViTForImageClassification:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **sizes))


def samples(x: torch.Tensor, y: torch.Tensor) -> list[dict]:
    return [{"pixel_values": image, "labels": label} for image, label in zip(x, y, strict=True)]


@torch.no_grad()
def accuracy(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    return float((model.eval()(x).logits.argmax(1) == y).double().mean())


def main(epochs: int = 20, off: bool = False, seed: int = 0, out: Path = Path("out/examples")) -> None:
    out.mkdir(parents=True, exist_ok=True)
    set_seed(seed)
    data, model, path = digits(), vit(), out / "transformers_trainer.safetensors"
    arguments = TrainingArguments(
        output_dir=out / "transformers", num_train_epochs=epochs, per_device_train_batch_size=32, learning_rate=2e-3,
        use_cpu=True, seed=seed, save_strategy="no", report_to="none", logging_strategy="epoch", bf16=False,
    )  # fmt: skip
    strengths = {} if off else {"nuclear": 5.0}
    skip = ["classifier", "*.projection"]  # small already; transformers reads the weight of the projection directly
    compression = CompressionAware(**strengths, every=10, skip=skip, save_to=path, compress={"goal": "size"})
    train = samples(data.train_x, data.train_y)
    Trainer(model, arguments, train_dataset=train, callbacks=[compression]).train()

    report, small = compression.compress_report, ck.load(path, vit())
    print(compression.proxes[0].report())
    before, after = (accuracy(m, data.test_x, data.test_y) for m in (model, small))
    print(f"held-out accuracy {before:.1%}, compressed {after:.1%}")
    print(f"multiply-adds {report.macs_before:,} -> {report.macs:,} ({report.macs / report.macs_before:.0%})")
    print(f"saved to {path}")


if __name__ == "__main__":
    typer.run(main)
