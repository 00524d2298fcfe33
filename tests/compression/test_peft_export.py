"""export_lora: the adapter, loaded and merged by PEFT, gives the fine-tuned model."""

import copy
import functools
import json
import os
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import compaware_kernels as ck
from compaware_kernels._utils import atomic_write
from compaware_kernels.compression import peft_export

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("error")  # PEFT warns of names that match nothing


def update(layer, rank, scale=0.1):
    """Add a random matrix of this rank to the layer's weight."""
    m, n = len(layer.weight), layer.weight[0].numel()
    with torch.no_grad():
        L = scale * torch.randn(m, rank).double() @ torch.randn(rank, n).double()
        layer.weight.copy_(layer.weight.double() + L.reshape(layer.weight.shape))


def tuned(base, change):
    model = copy.deepcopy(base)
    with torch.no_grad():
        change(model)
    return model


def loaded(base, path):
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), path).eval()


def assert_same(base, model, path, x):
    """PEFT's outputs, before and after merging, are at most twice as far from fp64 as the model's own."""
    model, adapted = model.eval(), loaded(base, path)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double() if x.is_floating_point() else x)
        lost = (model(x).double() - exact).norm()
        floor = torch.finfo(model(x).dtype).eps * exact.norm()
        moved = (base.eval()(x).double() - exact).norm()
        assert moved > 20 * (lost + floor), "the update must be seen in the outputs"
        assert (adapted(x).double() - exact).norm() <= 2 * lost + floor
        assert (adapted.merge_and_unload()(x).double() - exact).norm() <= 2 * lost + floor


class Block(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.fc, self.norm, self.out = nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, width, bias=False)

    def forward(self, x):
        return x + self.out(self.norm(self.fc(x)).relu())


class Net(nn.Module):
    """Names that end like others: fc and blocks.1.fc; and blocks_1.fc, which a pattern may confuse with blocks.1.fc."""

    def __init__(self, width=24):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.my_fc, self.last = nn.Linear(width, width), nn.Linear(width, width), nn.LayerNorm(width)
        self.blocks, self.blocks_1 = nn.ModuleDict({"1": Block(width), "11": Block(width)}), Block(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        for block in self.blocks.values():
            x = block(x)
        return self.head(self.last(self.my_fc(self.fc(self.blocks_1(x)).relu())))


RANKS = {"fc": 1, "my_fc": 4, "blocks.1.fc": 2, "blocks.1.out": 0, "blocks.11.fc": 3, "blocks.11.out": 5,
         "blocks_1.fc": 0, "blocks_1.out": 0}  # fmt: skip


def change_all(model):
    for name, rank in RANKS.items():
        update(model.get_submodule(name), rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_gives_the_tuned_model_with_each_layers_own_rank(tmp_path, dtype):
    base = Net().to(dtype)
    model = tuned(base, change_all)
    report = ck.export_lora(model, base, tmp_path / "adapter")
    assert {r.name: r.rank for r in report.layers} == RANKS | {"head": 0}
    assert_same(base, model, tmp_path / "adapter", torch.randn(64, 24, dtype=dtype))
    layers = loaded(base, tmp_path / "adapter").base_model.model.named_modules()
    got = {name: layer.r["default"] for name, layer in layers if hasattr(layer, "lora_A")}
    assert got == {name: rank for name, rank in RANKS.items() if rank}


def pretrained(dtype, m=96, n=160):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(n, m, bias=False), nn.Linear(m, n, bias=False)).to(dtype)
    for layer in base:
        layer.weight.data.normal_(0, 0.05)
    return base


def exported_ranks(model, base, path, **options):
    return [entry.rank for entry in ck.export_lora(model, base, path / "adapter", **options).layers]


@pytest.mark.parametrize(("size", "tau"), [(4e-3, 0.05), (1.0, 2.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_learned_rank_is_the_one_exported(tmp_path, dtype, size, tau):
    """Of a small update, the weights' rounding is the larger error; of a large one, that of the SVT."""
    base = pretrained(dtype)
    model = tuned(base, lambda model: [update(layer, 8, size) or update(layer, 96, 1e-4) for layer in model])
    infos = ck.svt_([layer.weight for layer in model], tau, center=[layer.weight for layer in base])
    assert exported_ranks(model, base, tmp_path) == [int(info.rank) for info in infos] == [8, 8]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_singular_values_just_above_rounding_are_kept(tmp_path, dtype):
    base = pretrained(dtype)
    floor = peft_export.noise_floor(base[0].weight.detach(), 0.0)
    U, V = (torch.linalg.qr(torch.randn(size, 5, dtype=torch.float64))[0] for size in (96, 160))
    L = U * torch.tensor([200.0, 50.0, 10.0, 3.0, 1.5]) * floor @ V.T
    model = tuned(base, lambda model: model[0].weight.copy_(model[0].weight.double() + L))
    assert exported_ranks(model, base, tmp_path) == [5, 0]


@pytest.mark.parametrize("case", ["random", "rows of many sizes", "constant", "tall", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_stays_below_its_bound(case, dtype):
    torch.manual_seed(0)
    random = functools.partial(torch.randn, dtype=torch.float64)
    W = {
        "random": random(200, 300),
        "rows of many sizes": random(200, 300) * torch.logspace(-3, 0, 200)[:, None],
        "constant": 1.9 + 0.01 * random(200, 200),
        "tall": random(3000, 20),
        "wide": random(20, 3000),
    }[case]
    floor = peft_export.noise_floor(W.to(dtype), 0.0)
    assert 0.1 * floor < torch.linalg.matrix_norm(W.to(dtype) - W, 2) < 0.9 * floor


CONVS = {
    "1d": (nn.Conv1d(6, 8, 3, stride=2, padding=1), (12,)),
    "1d, 1": (nn.Conv1d(6, 8, 1), (12,)),
    "2d": (nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), (9, 9)),
    "2d, 1 x 1": (nn.Conv2d(6, 8, 1), (5, 5)),
    "2d, 1 x 3, same": (nn.Conv2d(6, 8, (1, 3), padding="same"), (5, 5)),
    "3d": (nn.Conv3d(6, 8, 3, padding=1), (4, 4, 4)),
    "3d, 1 x 3 x 1": (nn.Conv3d(6, 8, (1, 3, 1)), (4, 4, 4)),
}


@pytest.mark.parametrize("name", CONVS)
def test_convolutions(tmp_path, name):
    layer, size = CONVS[name]
    base = nn.Sequential(layer)
    model = tuned(base, lambda model: update(model[0], 2))
    (entry,) = ck.export_lora(model, base, tmp_path / "adapter").layers
    assert (entry.rank, entry.params) == (2, 2 * (8 + layer.weight[0].numel()))
    assert_same(base, model, tmp_path / "adapter", torch.randn(3, 6, *size))


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1, enable_nested_tensor=False)


def weight_norm():
    return nn.utils.parametrizations.weight_norm(nn.Linear(6, 8))


WHOLE = {
    "grouped": (lambda: nn.Conv2d(6, 8, 3, groups=2), "", (6, 9, 9), "grouped"),
    "dilated": (lambda: nn.Conv1d(6, 8, 3, dilation=2, padding=2), "", (6, 9), "dilation"),
    "circular": (lambda: nn.Conv1d(6, 8, 3, padding=1, padding_mode="circular"), "", (6, 9), "pad with zeros"),
    "3d, 1 x 1 x 3": (lambda: nn.Conv3d(6, 8, (1, 1, 3)), "", (6, 4, 4, 4), "1 x 1 x k"),
    "transposed": (lambda: nn.ConvTranspose2d(6, 8, 3), "", (6, 5, 5), "ConvTranspose2d has no"),
    "layer norm": (lambda: nn.LayerNorm(6), "", (6,), "LayerNorm has no"),
    "attention": (encoder, "layers.0.self_attn.out_proj", (5, 8), "has no low-rank update"),
    "read directly": (encoder, "layers.0.linear1", (5, 8), "reads its weight directly"),
    "not smaller": (lambda: nn.Linear(6, 8), "", (6,), "rank 4 of a 8 x 6 update is not smaller"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_layers_that_peft_cannot_adapt_or_merge_are_stored_whole(tmp_path, name):
    make, inside, size, why = WHOLE[name]
    torch.manual_seed(0)
    base = nn.Sequential(make())
    path = f"0.{inside}".removesuffix(".")
    model = tuned(base, lambda model: update(model.get_submodule(path), 4, 0.5))
    entries = {entry.name: entry for entry in ck.export_lora(model, base, tmp_path / "adapter").layers}
    assert why in entries[path].note and entries[path].rank is None
    assert_same(base, model, tmp_path / "adapter", torch.randn(3, *size))


def test_buffers_parametrized_weights_and_embeddings_are_stored_whole(tmp_path):
    torch.manual_seed(0)
    parts = {"words": nn.Embedding(30, 6), "flat": nn.Flatten(0, 1), "norm": nn.BatchNorm1d(6), "wn": weight_norm()}
    base = nn.Sequential(OrderedDict(parts | {"fc": nn.Linear(8, 8)}))

    def change(model):
        model.words.weight[3] += 1
        model.norm.running_mean += 1
        model.norm.num_batches_tracked += 7
        model.wn.parametrizations.weight.original0.mul_(2)
        update(model.fc, 2)

    model, x = tuned(base, change), torch.randint(30, (4, 5))
    report = ck.export_lora(model, base, tmp_path / "adapter")
    assert {entry.name: entry.rank for entry in report.layers} == {"fc": 2, "words": None, "norm": None, "wn": None}
    merged = loaded(base, tmp_path / "adapter").merge_and_unload()
    assert merged.norm.num_batches_tracked == 7
    torch.testing.assert_close(merged(x), model.eval()(x))


def test_biases_are_stored_and_rank_0_adds_nothing(tmp_path):
    base = Net()

    def change(model):
        update(model.fc, 2)
        for module in (model.fc, model.my_fc, model.last):
            module.bias += 1

    model = tuned(base, change)
    report = ck.export_lora(model, base, tmp_path / "adapter")
    assert (
        report.params
        == 2 * 48 + 3 * 24
        == sum(T.numel() for T in load_file(tmp_path / "adapter" / peft_export.WEIGHTS).values())
    )
    assert report.bytes == (tmp_path / "adapter" / peft_export.WEIGHTS).stat().st_size
    assert_same(base, model, tmp_path / "adapter", torch.randn(64, 24))
    loaded(base, tmp_path / "adapter").save_pretrained(tmp_path / "again")
    assert_same(base, model, tmp_path / "again", torch.randn(64, 24))


def test_a_head_stored_whole_replaces_that_of_another_base(tmp_path):
    base = Net()
    model = tuned(base, lambda model: (update(model.fc, 2), model.head.weight.normal_(), model.head.bias.normal_()))
    report = ck.export_lora(model, base, tmp_path / "adapter", whole=["head"])
    assert [(entry.name, entry.note) for entry in report.layers if entry.note] == [("head", "asked for")]
    base.head.reset_parameters()
    assert_same(base, model, tmp_path / "adapter", torch.randn(64, 24))


def test_names_that_end_like_others_are_stored_and_reported(tmp_path):
    base = Net()
    model = tuned(base, lambda model: (update(model.blocks["1"].fc, 2), update(model.blocks["11"].out, 3)))
    report = ck.export_lora(model, base, tmp_path / "adapter", whole=["fc"])
    entries = {entry.name: entry for entry in report.layers}
    assert all(entry.rank is None for name, entry in entries.items() if name.endswith("fc"))
    assert "ends in 'fc'" in entries["blocks.1.fc"].note and entries["blocks.11.out"].rank == 3
    assert_same(base, model, tmp_path / "adapter", torch.randn(64, 24))


def test_ambiguous_names_are_refused(tmp_path):
    base = Net()
    model = tuned(base, lambda model: update(model.blocks_1.fc, 2))
    with pytest.raises(ValueError, match=r"blocks_1.fc: PEFT would not adapt it, taking it for blocks.1"):
        ck.export_lora(model, base, tmp_path / "adapter", whole=["blocks.1"])


def test_nothing_changed(tmp_path):
    base = Net()
    report = ck.export_lora(base, copy.deepcopy(base), tmp_path / "adapter")
    assert report.params == 0 and {entry.rank for entry in report.layers} == {0}
    x = torch.randn(4, 24)
    assert torch.equal(loaded(base, tmp_path / "adapter")(x), base(x))


def test_rules_by_name_and_the_reported_error(tmp_path):
    base = Net()
    model = tuned(base, change_all)
    rules = {"blocks.*": ck.ranks.fixed(3), "my_fc": ck.ranks.energy(0.7)}
    entries = {entry.name: entry for entry in ck.export_lora(model, base, tmp_path / "adapter", ranks=rules).layers}
    assert [entries[name].rank for name in ("blocks.1.fc", "blocks.11.fc", "blocks.11.out", "fc")] == [2, 3, 3, 1]
    D = (model.my_fc.weight - base.my_fc.weight).detach().double()
    s = torch.linalg.svdvals(D)
    assert entries["my_fc"].rank == ck.ranks.energy(0.7)(s) < 4
    wanted = float(s[entries["my_fc"].rank :].norm() / s.norm())
    assert entries["my_fc"].error == pytest.approx(wanted, rel=1e-4)
    file = load_file(tmp_path / "adapter" / peft_export.WEIGHTS)
    A, B = (file[f"base_model.model.my_fc.lora_{which}.weight"].double() for which in "AB")
    assert float((D - B @ A).norm() / D.norm()) == pytest.approx(wanted, rel=1e-4)
    torch.testing.assert_close(B.norm(dim=0), A.norm(dim=1))
    assert "my_fc" in str(ck.export_lora(model, base, tmp_path / "adapter", ranks=ck.ranks.fixed(1)))
    assert json.dumps(ck.export_lora(model, base, tmp_path / "adapter").to_dict())


def test_wrapped_models(tmp_path):
    base = Net()
    model = tuned(base, change_all)
    assert exported_ranks(
        torch.compile(model, backend="eager"), torch.optim.swa_utils.AveragedModel(base), tmp_path
    ) == [
        *RANKS.values(),
        0,
    ]


def test_a_base_of_another_precision(tmp_path):
    base = Net().bfloat16()
    model = tuned(base, lambda model: change_all(model.float()))
    report = ck.export_lora(model, base, tmp_path / "adapter")
    assert {entry.name: entry.rank for entry in report.layers} == RANKS | {"head": 0}
    assert_same(base.float(), model, tmp_path / "adapter", torch.randn(64, 24))


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.list = nn.Parameter(torch.ones(4)), nn.ParameterList([torch.ones(4)])
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.a = nn.Sequential(OrderedDict(a=nn.Linear(4, 4)))


REFUSED = {
    "the model's own parameter": (lambda model: model.scale.add_(1), {}, "scale: belongs to the model itself"),
    "a list": (lambda model: model.list[0].add_(1), {}, "list: PEFT cannot store a ParameterList"),
    "tied": (lambda model: model.first.weight.add_(1), {}, "second.weight: is the same parameter as first.weight"),
    "NaN": (lambda model: model.a.a.weight.fill_(torch.nan), {}, "a.a.weight: contains NaN"),
    "architecture": (
        lambda model: model.register_module("first", nn.Linear(3, 4)),
        {},
        r"first.weight is \[4, 3\] there",
    ),
    "missing": (lambda model: model.register_module("a", None), {}, "a.a.weight is none there"),
    "twice": (lambda model: None, {"whole": ["a", "a.a"]}, "a.a: PEFT would store it twice"),
    "all": (lambda model: None, {"whole": ["*"]}, "list: PEFT cannot store a ParameterList"),
    "no module": (lambda model: None, {"whole": ["heads"]}, "whole: the pattern 'heads' matches no layer"),
    "no layer": (lambda model: None, {"ranks": {"b": ck.ranks.fixed(1)}}, "ranks: the pattern 'b' matches no layer"),
    "rule": (lambda model: update(model.a.a, 1), {"ranks": lambda s: 1.5}, "a.a: the rank rule must return"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(tmp_path, name):
    change, options, words = REFUSED[name]
    base = Odd()
    with pytest.raises(ValueError, match=words):
        ck.export_lora(tuned(base, change), base, tmp_path / "adapter", **options)
    assert not list(tmp_path.iterdir())


class Extra(nn.Linear):
    """Layer with state that is no tensor."""

    scale = 1.0

    def get_extra_state(self):
        return {"scale": self.scale, "seen": [torch.ones(2)]}

    def set_extra_state(self, state):
        self.scale = state["scale"]


def odd():
    """A network with every kind of state, of which the layer "fc" is fine-tuned."""
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(fc=nn.Linear(24, 24), extra=Extra(24, 24)))
    model.extra.register_buffer("graph", torch.eye(3).to_sparse())
    model.extra.register_buffer("table", torch.ones(3, 1).expand(3, 4))
    model.extra.register_buffer("wide", torch.ones(2, dtype=torch.complex128))
    return model


def test_state_that_does_not_change_stops_nothing(tmp_path):
    base = odd()
    model = tuned(base, lambda model: update(model.fc, 1))
    entries = {r.name: r.rank for r in ck.export_lora(model, base, tmp_path / "adapter").layers}
    assert entries == {"fc": 1}
    merged = loaded(base, tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(merged(x := torch.randn(3, 24)), model(x))


@pytest.mark.parametrize("name", ["graph", "wide", "_extra_state"])
def test_modules_stored_whole_need_tensors_only(tmp_path, name):
    """PEFT wants all the state of such a module in the file."""
    base = odd()
    for other in {"graph", "wide"} - {name}:
        delattr(base.extra, other)
    if name != "_extra_state":
        base.extra.get_extra_state = lambda: torch.ones(2)
    model = tuned(base, lambda model: setattr(model.extra, "table", 2 * model.extra.table))
    with pytest.raises(ck.CheckpointError, match=rf"^extra\.{name}: wanted .* got"):
        ck.export_lora(model, base, tmp_path / "adapter")


STATES = {
    "extra state": (lambda model: setattr(model.extra, "scale", 2.0), r"extra\._extra_state: wanted tensors to change"),
    "sparse": (lambda model: setattr(model.extra, "graph", 2 * model.extra.graph), r"extra\.graph: .* sparse_coo"),
    "complex128": (lambda model: model.extra.wide.add_(1), r"extra\.wide: .* torch\.complex128"),
    "meta": (lambda model: model.to("meta"), r"fc\.weight: wanted a tensor with values; got one on the meta device"),
    "one on meta": (lambda model: model.fc.to("meta"), r"fc\.weight: wanted a tensor with values"),
    "lazy": (lambda model: setattr(model, "fc", nn.LazyLinear(24)), r"fc\.weight: .* lazy layer: run the model once"),
}


@pytest.mark.parametrize("of", ["model", "base"])
@pytest.mark.parametrize("name", STATES)
def test_state_that_cannot_be_stored_is_named(tmp_path, name, of):
    change, words = STATES[name]
    pair = {"model": odd(), "base": odd()}
    change(pair[of])
    with pytest.raises(ck.CheckpointError, match=f"^{words}"):
        ck.export_lora(**pair, path=tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_equal_updates_give_equal_bytes(tmp_path):
    base = Net()
    model = tuned(base, change_all)
    for name in "abcd":
        ck.export_lora(model, base, tmp_path / name)
    for file in (peft_export.WEIGHTS, peft_export.CONFIG):
        assert len({(tmp_path / name / file).read_bytes() for name in "abcd"}) == 1


def test_only_adapter_folders_are_replaced(tmp_path):
    base = Net()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for path in ("mine", "mine/notes.txt"):
        with pytest.raises(FileExistsError, match="something else"):
            ck.export_lora(base, base, tmp_path / path)
    with pytest.raises(FileNotFoundError, match="does not"):
        ck.export_lora(base, base, tmp_path / "none" / "adapter")
    assert [file.name for file in tmp_path.rglob("*")] == ["mine", "notes.txt"]


@pytest.mark.parametrize("fails", ["writing", "the first rename", "the second rename", "the exchange", "nothing"])
def test_the_old_adapter_stays_complete_until_the_new_one_is(tmp_path, monkeypatch, fails):
    base = Net()
    ck.export_lora(tuned(base, change_all), base, tmp_path / "adapter")
    before = {file: file.read_bytes() for file in (tmp_path / "adapter").iterdir()}
    renames = []

    def replace(source, target, real=os.replace):
        renames.append(target)
        if fails == f"the {['first', 'second'][len(renames) - 1] if len(renames) < 3 else 'undoing'} rename":
            raise OSError("no space left")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    if "rename" in fails:  # of the two that do it where folders cannot be exchanged
        monkeypatch.setattr(atomic_write, "_exchanged", lambda a, b: False)
    if fails == "the exchange":
        monkeypatch.setattr(atomic_write, "_exchanged", lambda a, b: replace("", 1 / 0))
    if fails == "writing":
        monkeypatch.setattr(peft_export, "save_file", lambda *args, **kwargs: replace("", 1 / 0))
    model = tuned(base, lambda model: update(model.fc, 1))
    if fails == "nothing":
        ck.export_lora(model, base, tmp_path / "adapter")
    else:
        with pytest.raises((OSError, ZeroDivisionError)):
            ck.export_lora(model, base, tmp_path / "adapter")
    after = {file: file.read_bytes() for file in (tmp_path / "adapter").iterdir()}
    assert (after == before) == (fails != "nothing")
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]
