"""Study settings: what is accepted, and how the rest is refused."""

import re

import pytest

from compaware_kernels.study.config import COUNTS, Config

SAME = "arms, map: wanted strengths that differ in their first 6 digits, which name their records; got more than once"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch = 3", "unknown settings: epoch"),
        ("epochs = 0", "epochs: wanted a whole number >= 1; got 0"),
        ('network = "lenet"', "network: wanted one of mlp, dec"),
        ('rules = ["magic:1"]', "rank rule: wanted name:value"),
        ("rules = []", "rules: wanted at least one rank rule; got ()"),
        ('weights = "timm"', "weights: wanted timm, for a network of timm's"),
        ('weights = "nowhere.safetensors"', "weights: wanted timm, for a network of timm's, or a safetensors file"),
        ('device = "tpu"', "device: wanted auto, cuda or cpu"),
        ("workers = 0", "workers: wanted a whole number >= 1"),
        *((f"{name} = 1.5", f"{name}: wanted a whole number >= 1; got 1.5") for name in COUNTS),
        ("tune_epochs = 0.5", "tune_epochs: wanted a whole number >= 0; got 0.5"),
        ("lr = 0", "lr: wanted a finite number > 0; got 0"),
        ("lr = inf", "lr: wanted a finite number > 0; got inf"),
        ("tune_lr = -0.1", "tune_lr: wanted a finite number > 0; got -0.1"),
        ("momentum = 1", "momentum: wanted a number >= 0 and < 1; got 1"),
        ("momentum = nan", "momentum: wanted a number >= 0 and < 1; got nan"),
        ("sparsities = [1.5]", "sparsities: wanted shares"),
        ("[arms]\nfancy = [{}]", "arms: wanted plain and any of"),
        ("[arms]\nplain = [{}]\nl1 = [{ l2 = 1 }]", "arms.l1: wanted strengths of l1"),
        ("[arms]\nplain = [{}]\nl2 = [{}]", "arms.l2: wanted strengths of l2; got {}"),
        *(
            (f"[arms]\nplain = [{{}}]\n{text}", words)
            for text, words in (
                ("l1 = [{ l1 = -1 }]", "arms.l1: l1: wanted a finite number >= 0; got -1"),
                ("l2 = [{ l2 = nan }]", "arms.l2: l2: wanted a finite number >= 0; got nan"),
                ("group = [{ group = 'much' }]", "arms.group: group: wanted a finite number >= 0; got 'much'"),
                ("fixed-rank = [{ share = 1 }]", "arms.fixed-rank: share: wanted a share between 0 and 1; got 1"),
                ("trp = [{ energy = 0 }]", "arms.trp: energy: wanted a share between 0 and 1; got 0"),
                (
                    "magnitude = [{ sparsity = 1.5 }]",
                    "arms.magnitude: sparsity: wanted a share between 0 and 1; got 1.5",
                ),
                ("[map]\nnuclear = [1]\ngroup = [-1]", "map: group: wanted a finite number >= 0; got -1"),
                ("l1 = [{ l1 = 1 }, { l1 = 1.0 }]", f"{SAME}: l1 l1=1 seed 0"),
                ("l1 = [{ l1 = 1.0000001 }, { l1 = 1.0000002 }]", f"{SAME}: l1 l1=1 seed 0"),
                (
                    '"nuclear+group" = [{ nuclear = 1, group = 1 }]\n[map]\nnuclear = [1.0000001]\ngroup = [1]',
                    f"{SAME}: nuclear+group nuclear=1,group=1 seed 0",
                ),
            )
        ),
        ("[arms]\nplain = []", "arms: wanted plain and any of"),
        ("[arms]\nplain = [{}]\n[map]\nl1 = [1]", "map: wanted lists named nuclear and group"),
        ("a = ", "not TOML"),
    ],
)
def test_wrong_settings(text, words, tmp_path):
    path = tmp_path / "wrong.toml"
    path.write_text(text if "[arms]" in text else f"{text}\n[arms]\nplain = [{{}}]\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}: {words}")):
        Config.read(path)


def test_no_such_study(tmp_path):
    with pytest.raises(FileNotFoundError, match="no study of that name"):
        Config.read("nowhere")
