"""Accuracy against adapter size in fine-tuning: a pretrained encoder learns sentiment in four ways.

    OMP_NUM_THREADS=1 python -m bench.studies.lora_study    # 32 minutes on one core

writes bench/results/lora-minilm.json and .md.  The four: full fine-tuning; LoRA of a fixed rank; ranks learned by
ProximalStep around the pretrained weights; and the full update, truncated by SVD to the size of a learned one. All
train the 36 linear layers of the encoder and a new head, with AdamW. The update is exported as an adapter, loaded and
merged by PEFT, and then evaluated.
"""

import bisect
import functools
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from time import process_time
from typing import Annotated

import torch
import transformers
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from rich.progress import Progress
from torch import nn
from torch.nn.functional import cross_entropy

import compaware_kernels as ck
from bench.studies.lora_data import Classifier, Example, batches, examples, fetch
from bench.studies.lora_table import markdown
from compaware_kernels.environment import info

ROOT = Path(__file__).parents[2]
LINEAR = r"encoder\.encoder\..*\.(query|key|value|dense)"
BATCH, HEAD_RATE, EVERY = 32, 1e-3, 8


@dataclass(frozen=True)
class Plan:
    """Settings of the study: numbers of sentences to train on, to choose learning rates on, and held out; the grid."""

    parts: tuple[int, int, int] = (2048, 600, 1500)
    full_rates: tuple[float, ...] = (1e-4, 2e-4, 4e-4)
    lora_rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    ranks: tuple[int, ...] = (2, 4, 8, 16)
    strengths: tuple[float, ...] = (100.0, 170.0, 300.0)
    seeds: int = 3


FAST = Plan((64, 32, 64), (2e-4,), (5e-3,), (4,), (200.0,), 1)


@dataclass
class Run:
    """Result of one fine-tuned model: method, size of its update, accuracy."""

    method: str
    setting: str
    seed: int
    rate: float
    seconds: float = 0.0  # of training, on one thread
    prox_share: float = 0.0  # fraction of these seconds in proximal steps
    params: int = 0
    bytes: int = 0
    validation: float = 0.0  # accuracies
    held_out: float = 0.0
    ranks: dict[str, int] = field(default_factory=dict)  # by layer


class TimedStep(ck.ProximalStep):
    seconds = 0.0

    def step(self) -> None:
        start = process_time()
        super().step()
        self.seconds += process_time() - start


class Study:
    def __init__(self, cache: Path, plan: Plan, progress: Progress):
        self.cache, self.plan, self.progress = cache, plan, progress
        self.training, self.validation, self.held_out = examples(cache, plan.parts)
        self.adapter = cache / "adapter"
        self.layers = [name for name, _ in self.base(0).named_modules() if re.fullmatch(LINEAR, name)]

    def base(self, seed: int) -> Classifier:
        """Pretrained encoder with a new head; trainable are the weights of its linear layers and the head."""
        model = Classifier(self.cache, seed)
        for name, p in model.named_parameters():
            p.requires_grad_(name.startswith("head") or re.fullmatch(LINEAR + r"\.weight", name) is not None)
        return model

    def train(self, model: nn.Module, run: Run, shrink: Callable | None = None) -> None:
        """Train one epoch without weight decay, which would pull to 0; the rate rises, then falls to a tenth,
        linearly."""
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        head, body = ([p for name, p in trained if ("head" in name) == wanted] for wanted in (True, False))
        groups = [{"params": body, "lr": run.rate}, {"params": head, "lr": HEAD_RATE}]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        data = batches(self.training, BATCH, torch.Generator().manual_seed(run.seed))
        shape = [min(10 * (i + 1), len(data) - 0.9 * i) / len(data) for i in range(len(data) + 1)]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape.__getitem__)
        prox = shrink(model, optimizer) if shrink else None
        task = self.progress.add_task(f"{run.method}, {run.setting}, seed {run.seed}", total=len(data))
        torch.manual_seed(run.seed)
        model.train()
        start = process_time()
        for tokens, mask, labels in data:
            cross_entropy(model(tokens, mask), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            self.progress.advance(task)
        if prox and prox.steps % EVERY:
            prox.step()
        run.seconds = process_time() - start
        run.prox_share = prox.seconds / run.seconds if prox else 0.0
        self.progress.remove_task(task)

    def full(self, seed: int, rate: float) -> tuple[Run, nn.Module]:
        model, run = self.base(seed), Run("full fine-tuning", "", seed, rate)
        self.train(model, run)
        trained = [p for p in model.parameters() if p.requires_grad]
        run.params, run.bytes = sum(p.numel() for p in trained), sum(p.numel() * p.element_size() for p in trained)
        return self.judged(run, model), model

    def lora(self, seed: int, rank: int, rate: float) -> Run:
        run = Run("LoRA", f"r = {rank}", seed, rate, ranks=dict.fromkeys(self.layers, rank))
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEAR, modules_to_save=["head"])
        model = get_peft_model(self.base(seed), config)
        self.train(model, run)
        run.params = sum(p.numel() for p in model.parameters() if p.requires_grad)
        model.save_pretrained(self.adapter)
        (self.adapter / "README.md").unlink()  # export_lora refuses to replace a folder with files that are not its own
        return self.judged(run)

    def learned(self, seed: int, strength: float, rate: float) -> Run:
        model, base = self.base(seed), self.base(seed)
        run = Run("learned rank", f"nuclear {strength:g}", seed, rate)
        options = {"nuclear": {"encoder.*": strength}, "every": EVERY, "center": base}
        self.train(model, run, lambda model, optimizer: TimedStep(model, optimizer, **options))
        return self.exported(run, model, base)

    def cut(self, full: nn.Module, rate: float, like: Run) -> Run:
        """Truncated SVD of the full update, with at most as many parameters as ``like`` has."""
        base, values = self.base(like.seed), []
        for name in self.layers:
            W, C = (model.get_submodule(name).weight.detach().double() for model in (full, base))
            values += [(s, sum(W.shape)) for s in torch.linalg.svdvals(W - C).tolist()]
        values.sort(reverse=True)
        sizes = list(itertools.accumulate(size for _, size in values))
        room = like.params - sum(p.numel() for p in base.head.parameters())
        kept = min(max(1, bisect.bisect_right(sizes, room)), len(values) - 1)
        run = Run("full, cut by SVD", f"to that of {like.setting}", like.seed, rate)
        return self.exported(run, full, base, ranks=ck.ranks.threshold((values[kept - 1][0] + values[kept][0]) / 2))

    def exported(self, run: Run, model: nn.Module, base: nn.Module, **options) -> Run:
        report = ck.export_lora(model, base, self.adapter, whole=["head"], **options)
        run.params = report.params
        full = {name: min(base.get_submodule(name).weight.shape) for name in self.layers}
        run.ranks = {e.name: full[e.name] if e.rank is None else e.rank for e in report.layers if e.name in full}
        return self.judged(run)

    def judged(self, run: Run, model: nn.Module | None = None) -> Run:
        """Fill in the accuracies of the model or, without one, of the exported adapter after PEFT merged it, and its
        size."""
        if model is None:
            run.bytes = (self.adapter / "adapter_model.safetensors").stat().st_size
            model = PeftModel.from_pretrained(self.base(run.seed), self.adapter).merge_and_unload()
        run.validation, run.held_out = (self.accuracy(model, part) for part in (self.validation, self.held_out))
        self.progress.console.print(
            f"{run.method} {run.setting}, rate {run.rate:g}: {run.validation:.1%} of validation"
        )
        return run

    def accuracy(self, model: nn.Module, part: list[Example]) -> float:
        model.eval()
        with torch.no_grad():
            hits = [(model(tokens, mask).argmax(1) == labels).sum() for tokens, mask, labels in batches(part, 64)]
        return int(sum(hits)) / len(part)

    def runs(self) -> tuple[list[Run], list[Run]]:
        """(Runs to compare, runs of the search for learning rates.)

        Rates are chosen on the validation sentences with seed 0; LoRA's at its middle rank.
        """
        plan, full, lora = self.plan, functools.cache(self.full), functools.cache(self.lora)
        middle = plan.ranks[len(plan.ranks) // 2]
        tried = [full(0, rate)[0] for rate in plan.full_rates], [lora(0, middle, rate) for rate in plan.lora_rates]
        full_rate, lora_rate = (max(runs, key=lambda run: run.validation).rate for runs in tried)
        found = []
        for seed in range(plan.seeds):
            run, model = full(seed, full_rate)
            learned = [self.learned(seed, strength, full_rate) for strength in plan.strengths]
            found += [run, *(lora(seed, rank, lora_rate) for rank in plan.ranks), *learned]
            found += [self.cut(model, full_rate, like) for like in learned]
        return found, [*tried[0], *tried[1]]


def main(
    cache: Annotated[Path, typer.Option(help="Folder for the model and the texts.")] = ROOT / "out/lora-study",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = ROOT / "bench/results",
    fast: Annotated[
        bool, typer.Option(help="A few sentences and settings: whether it runs, not what it finds.")
    ] = False,
) -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    fetch(cache)
    plan = FAST if fast else Plan()
    start = process_time()
    with Progress() as progress:
        runs, tried = Study(cache, plan, progress).runs()
    packages = ("torch", "transformers", "peft", "compaware-kernels")
    result = {
        "command": "OMP_NUM_THREADS=1 python -m bench.studies.lora_study" + " --fast" * fast,
        "machine": info()["devices"][0],
        "versions": {name: version(name) for name in packages},
        "minutes": (process_time() - start) / 60,
        "plan": asdict(plan),
        "runs": [asdict(run) for run in runs],
        "tried": [asdict(run) for run in tried],
    }
    out.mkdir(parents=True, exist_ok=True)
    name = "lora-minilm" + "-fast" * fast
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / f"{name}.md").write_text(markdown(result))
    print((out / f"{name}.md").read_text())


if __name__ == "__main__":
    typer.run(main)
