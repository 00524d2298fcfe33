"""Lightning: a small convolutional network learns scikit-learn's digits, compression-aware or, with --off, plainly."""

from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
import typer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, TensorDataset

import compaware_kernels as ck
from compaware_kernels.demo.networks import small_convnet
from compaware_kernels.integrations.lightning import CompressionAware
from compaware_kernels.study.images import digits


class Digits(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = small_convnet()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def main(epochs: int = 20, off: bool = False, seed: int = 0, out: Path = Path("out/examples")) -> None:
    out.mkdir(parents=True, exist_ok=True)
    L.seed_everything(seed)
    data, module, path = digits(), Digits(), out / "lightning_digits.safetensors"
    train = DataLoader(TensorDataset(data.train_x, data.train_y), 32, shuffle=True)
    test = DataLoader(TensorDataset(data.test_x, data.test_y), len(data.test_y))
    strengths = {} if off else {"nuclear": 10.0, "group": 0.2}
    compression = CompressionAware(**strengths, every=10, skip=["net.11"], save_to=path, compress={"goal": "size"})
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[compression], enable_checkpointing=False,
        logger=TensorBoardLogger(out / "lightning_logs", name=None),
    )  # fmt: skip
    trainer.fit(module, train, test)

    report, small = compression.compress_report, ck.load(path, Digits())
    accuracy = [float((m.eval()(data.test_x).argmax(1) == data.test_y).double().mean()) for m in (module, small)]
    print(compression.proxes[0].report())
    print(f"held-out accuracy {accuracy[0]:.1%}, compressed {accuracy[1]:.1%}")
    print(f"multiply-adds {report.macs_before:,} -> {report.macs:,} ({report.macs / report.macs_before:.0%})")
    print(f"saved to {path}; the ranks: tensorboard --logdir {out / 'lightning_logs'}")


if __name__ == "__main__":
    typer.run(main)
