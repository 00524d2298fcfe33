"""Files of save and load: damaged, hostile, of other models and dtypes; and models that are hard to save."""

import copy
import json
import resource
import struct
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune

import compaware_kernels as ck
from compaware_kernels.compression.tensor_file import FORMAT
from compaware_kernels.demo.networks import small_convnet

FP8 = torch.float8_e4m3fn


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 4))


def parts(path):
    """Header and data of a safetensors file."""
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def assemble(path, header, data):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.fixture
def path(tmp_path):
    ck.save(network(), tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def earlier(path, change=lambda tensors, layers: None):
    """Rewrite the file as earlier versions did, without a checksum."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors, layers = load_file(path), json.loads(metadata["layers"])
    tensors = {name: T.clone() for name, T in tensors.items()}
    change(tensors, layers)
    save_file(tensors, path, {"format": FORMAT, "layers": json.dumps(layers)})


def refused(path, model=None, words="", **options):
    with pytest.raises(ck.CheckpointError, match=words) as error:
        ck.load(path, model or network(), **options)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


# --- damage ---------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_of_the_data_is_noticed(path):
    raw, (_, data) = path.read_bytes(), parts(path)
    for at in range(len(raw) - len(data), len(raw), 7):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << at % 8]) + raw[at + 1 :])
        refused(path, words="checksum|NaN")
    assert isinstance(ck.load(path, network(), verify=False), nn.Sequential)


@pytest.mark.parametrize("change", ["names", "dtypes", "layers", "checksum"])
def test_a_changed_header_is_noticed(path, change):
    header, data = parts(path)
    if change == "names":  # two tensors of one shape
        header["2.weight"], header["2.bias"] = header["2.bias"], header["2.weight"]
    elif change == "dtypes":
        header["2.weight"]["dtype"] = "I32"
    elif change == "layers":
        header["__metadata__"]["layers"] = header["__metadata__"]["layers"].replace("true", "true ")
    else:
        header["__metadata__"]["kcr32"] = header["__metadata__"].pop("crc32")
    assemble(path, header, data)
    refused(path, words="damaged")


def test_files_of_earlier_versions_load(path):
    earlier(path)
    assert torch.equal(ck.load(path, network())[0].weight, network()[0].weight)


def test_equal_models_give_equal_bytes(tmp_path):
    tied = network()
    tied[3].weight = nn.Parameter(tied[0].weight[:4])
    extras = nn.Sequential(*(Extra(2, {"b": i, "a": torch.full((2,), i)}) for i in range(8)))
    for model in (network(), tied, extras):
        for name in "abcdef":
            ck.save(model, tmp_path / name)
        assert len({(tmp_path / name).read_bytes() for name in "abcdef"}) == 1


# --- hostile --------------------------------------------------------------------------------------------------------

HOSTILE = {
    "deep layers": {"layers": "[" * 100_000},
    "deep and named": {"layers": '{"0":' * 100_000},
    "deep state": {"state": "[" * 100_000},
    "layers of no dict": {"layers": "[1, 2]"},
    "state of no dict": {"state": "3"},
    "state of unknown kind": {"state": '{"0.weight": {"code": "print(1)"}}'},
    "state of no tensor": {"state": '{"0.weight": {"tensor": "absent"}}'},
    "weight is a number": {"state": '{"0.weight": 3}'},
    "weight is unhashable": {"state": '{"0.weight": {"dict": [[{"list": []}, 1]]}}'},
    "tied to nothing": {"0.weight": "absent"},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_metadata_is_one_error(path, name):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    del metadata["crc32"]
    save_file({n: T.clone() for n, T in load_file(path).items()}, path, metadata | HOSTILE[name])
    refused(path, words="damaged|do not fit")


@pytest.mark.parametrize("size", [10**8, 10**12, 10**18, 10**30, -1])
@pytest.mark.parametrize("claim", ["batch norm", "linear", "rank", "class"])
def test_claims_of_size_cost_nothing(path, claim, size):
    """Compared with the file's shapes before anything is built: no more memory than a file of the right size takes."""
    entry = {"class": "Linear", "inputs": size, "outputs": 8, "bias": True}
    layers = {
        "batch norm": {"2": {"class": "BatchNorm1d", "inputs": size, "outputs": size, "bias": True}},
        "linear": {"0": entry},
        "rank": {"0": entry | {"class": "LowRankLinear", "inputs": 8, "rank": size, "fold": "paper"}},
        "class": {"0": entry | {"class": "LowRankConv2d", "rank": 2, "fold": "paper"}},
    }[claim]
    earlier(path, lambda tensors, described: described.update(layers))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(path, words="fit")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 50_000  # KB


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.bfloat16, torch.float64, torch.bool, FP8], ids=str)
def test_other_dtypes_are_refused_by_name(path, dtype):
    earlier(path, lambda tensors, _: tensors.update({"3.weight": torch.ones(4, 8).to(dtype)}))
    refused(path, words=rf"3\.weight is {str(dtype).removeprefix('torch.')}, wanted float32")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_model_of_the_files_dtype_loads(tmp_path, dtype):
    ck.save(network().to(dtype), tmp_path / "m")
    loaded = ck.load(tmp_path / "m", network().to(dtype))
    assert torch.equal(loaded[0].weight, network()[0].weight.to(dtype))
    refused(tmp_path / "m", words=r"Convert the model first: model\.to")


@pytest.mark.parametrize("place", ["0.weight", "2.running_var"])
def test_nan_is_refused_by_name_unless_told(path, place):
    earlier(path, lambda tensors, _: tensors[place].view(-1)[-1:].fill_(torch.nan))
    refused(path, words=f"{place}: wanted numbers; got NaN")
    model = ck.load(path, network(), verify=False)
    assert model.state_dict()[place].isnan().any()
    before = path.read_bytes()
    with pytest.raises(ck.CheckpointError, match=f"^{place}: wanted numbers; got NaN"):
        ck.save(model, path)
    assert path.read_bytes() == before
    ck.save(model, path, verify=False)
    refused(path, words="NaN")


def test_threads_that_save_to_one_name(tmp_path):
    """The file is one of theirs, and nothing else is left."""
    models = [network().apply(lambda m, i=i: [nn.init.constant_(p, i) for p in m.parameters()]) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda model: [ck.save(model, tmp_path / "m") for _ in range(20)], models))
    loaded = ck.load(tmp_path / "m", network())
    assert len({float(x) for p in loaded.parameters() for x in p.detach().flatten()}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_infinity_is_a_number(tmp_path):
    """Masks hold it."""
    model = network()
    model.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
    ck.save(model, tmp_path / "m")
    assert torch.equal(ck.load(tmp_path / "m", copy.deepcopy(model)).mask, model.mask)


MISFITS = {
    "prefix": (lambda: nn.Sequential(OrderedDict(net=network())), r"names begin with 'net\.', the file's do not"),
    "sizes": (lambda: nn.Sequential(*network()[:3], nn.Linear(8, 7)), r"3 does not fit|3\.weight is \[4, 8\]"),
    "extra": (lambda: network().append(nn.PReLU()), r"1 missing \(4\.weight\)"),
    "many": (
        lambda: network().extend(nn.PReLU() for _ in range(9)),
        r"9 missing \(4\.weight, 5\.weight, 6\.weight, \.\.\.\)",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_misfits_list_three_names_and_the_likely_cause(path, name):
    make, words = MISFITS[name]
    earlier(path, lambda tensors, layers: layers.clear())
    refused(path, make(), words)


# --- models that are hard to save -----------------------------------------------------------------------------------


class Extra(nn.Linear):
    """Layer whose extra state is whatever it is given."""

    def __init__(self, size, extra=None):
        super().__init__(size, size)
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


EXTRA = {
    "number": 3.5, "text": "é\n", "nothing": None, "dtype": torch.bfloat16, "bytes": b"\0\xff",
    "nested": {"a": [1, (2, "b")], 3: {"t": (True, None)}, (1, 2): []},
    "tensors": {"scale": torch.arange(3.0), "all": [torch.ones(2, dtype=torch.int8), torch.ones(())]},
    "a tensor": torch.ones(2),
}  # fmt: skip


@pytest.mark.parametrize("name", EXTRA)
def test_extra_state_that_is_no_tensor_is_saved(tmp_path, name):
    extra = EXTRA[name]
    ck.save(nn.Sequential(Extra(4, extra)), tmp_path / "m")
    loaded = ck.load(tmp_path / "m", nn.Sequential(Extra(4, torch.zeros(2) if name == "a tensor" else None)))
    torch.testing.assert_close(loaded[0].extra, extra, rtol=0, atol=0) if "tensor" in name else None
    assert "tensor" in name or loaded[0].extra == extra


def deep():
    extra = []
    for _ in range(100_000):
        extra = [extra]
    return extra


def cuda_like():
    """A subclass of Tensor, as shards and quantized weights are."""

    class Sharded(torch.Tensor):
        pass

    return torch.ones(2).as_subclass(Sharded)


UNSAVABLE = {
    "an object": lambda: Extra(2, object()),
    "too deep": lambda: Extra(2, deep()),
    "sparse": lambda: with_buffer(torch.eye(3).to_sparse()),
    "csr": lambda: with_buffer(torch.eye(3).to_sparse_csr()),
    "nested": lambda: with_buffer(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)),
    "complex128": lambda: with_buffer(torch.ones(2, dtype=torch.complex128)),
    "subclass": lambda: with_buffer(cuda_like()),
    "lazy": lambda: nn.LazyLinear(3),
    "meta": lambda: nn.Linear(3, 3, device="meta"),
    "one on meta": lambda: with_buffer(torch.empty(3, device="meta")),
}


def with_buffer(T, **more):
    model = network()
    for name, buffer in {"odd": T, **more}.items():
        model.register_buffer(name, buffer)
    return model


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("name", UNSAVABLE)
def test_what_cannot_be_saved_is_named(tmp_path, name):
    model = nn.Sequential(OrderedDict(block=UNSAVABLE[name]()))
    (tmp_path / "m").write_bytes(b"old")
    with pytest.raises(ck.CheckpointError, match=r"^block\.(odd|weight|_extra_state): wanted .* got") as error:
        ck.save(model, tmp_path / "m")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert (tmp_path / "m").read_bytes() == b"old"


def test_quantized_modules_are_named(tmp_path):
    with pytest.warns():
        model = torch.ao.quantization.quantize_dynamic(network(), {nn.Linear})
    with pytest.raises(ck.CheckpointError, match=r"^0\._packed_params.*torch\.qint8: save the model before"):
        ck.save(model, tmp_path / "m")


def overlapping():
    base = torch.randn(10)
    return {
        "expanded": (torch.randn(3, 1).expand(3, 4), {}),
        "one number": (torch.randn(()).expand(5, 5), {}),
        "views that overlap": (base[:6], {"other": base[4:]}),
        "view of a whole": (base, {"other": base[4:]}),
        "same memory": (base, {"other": base.view(10)}),
        "transposed": (square := torch.randn(3, 3), {"other": square.T}),
        "conjugated": (z := torch.randn(3, dtype=torch.complex64), {"other": z.conj()}),
        "negated": (z.conj().imag, {}),
        "another dtype": (base, {"other": base.view(torch.int32)}),
        "empty": (torch.empty(0, 3), {"other": torch.empty(0)}),
        "channels last": (torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), {}),
        "strided": (torch.randn(6, 6)[::2, 1::3], {}),
    }


@pytest.mark.parametrize("name", overlapping())
def test_overlapping_buffers_keep_their_values(tmp_path, name):
    torch.manual_seed(0)
    odd, more = overlapping()[name]
    model = with_buffer(odd, **more)
    ck.save(model, tmp_path / "m")
    fresh = {key: torch.zeros_like(T.resolve_conj().resolve_neg()) for key, T in more.items()}
    for target in (copy.deepcopy(model), with_buffer(odd.clone() * 0 if odd.dtype != torch.int32 else odd, **fresh)):
        loaded = ck.load(tmp_path / "m", target).state_dict()
        for key, T in model.state_dict().items():
            assert torch.equal(loaded[key], T), key


def test_parameters_on_one_memory(tmp_path):
    """Not one parameter under two names, as tied ones are: a deep copy has them apart."""
    model = network()
    model[2].bias = nn.Parameter(model[2].weight.data)
    ck.save(model, tmp_path / "m")
    assert len(load_file(tmp_path / "m")) == len(model.state_dict()) - 1
    loaded = ck.load(tmp_path / "m", network())
    assert torch.equal(loaded[2].bias, model[2].weight)


@pytest.mark.parametrize("make", [network, partial(small_convnet, 4)], ids=["linear", "convolutions"])
@pytest.mark.parametrize("compressed", [True, False])
def test_a_model_on_the_meta_device_is_loaded_to_the_cpu(tmp_path, make, compressed):
    model, x = make().eval(), torch.randn(2, 8) if make is network else torch.randn(2, 1, 8, 8)
    if compressed:
        model, _ = ck.compress(model, ck.ranks.fixed(2), (x,), goal="size")
    ck.save(model, tmp_path / "m")
    with torch.device("meta"):
        empty = make()
    loaded = ck.load(tmp_path / "m", empty).eval()
    state = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
    assert not any(T.is_meta for T in state.values()) and all(T.is_meta for T in empty.parameters())
    assert torch.equal(loaded(x), model(x)) and all(p.requires_grad for p in loaded.parameters())


def test_tied_weights_on_the_meta_device_stay_tied(tmp_path):
    def tied():
        model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
        model[1].weight = model[0].weight
        return model

    ck.save(model := tied(), tmp_path / "m")
    with torch.device("meta"):
        empty = tied()
    loaded = ck.load(tmp_path / "m", empty)
    assert loaded[1].weight is loaded[0].weight and torch.equal(loaded[0].weight, model[0].weight)


def test_a_tied_tensor_has_one_value(tmp_path):
    """The model may have been saved after it was untied."""

    def model(tie):
        model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
        model[1].weight = model[0].weight if tie else model[1].weight
        return model

    ck.save(apart := model(False), tmp_path / "m")
    refused(tmp_path / "m", model(True), r"1 of two values for one tied tensor \(1\.weight\)\. Untie them")
    apart[1].weight.data.copy_(apart[0].weight)
    ck.save(apart, tmp_path / "m")
    assert torch.equal(ck.load(tmp_path / "m", model(True))[1].weight, apart[1].weight)


def test_a_buffer_without_values_is_refused(tmp_path):
    ck.save(network(), tmp_path / "m")
    empty = network().to("meta")
    empty[1].register_buffer("angles", torch.empty(3, device="meta"), persistent=False)
    refused(tmp_path / "m", empty, r"1\.angles: wanted values; got a buffer on the meta device")


class Versioned(nn.Linear):
    """As torchvision's MNASNet: of a state dict without a version it expects the oldest form."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        if metadata.get("version") != 2:
            raise ValueError("state dicts of version 1 are not supported")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_modules_get_their_version(tmp_path):
    ck.save(model := nn.Sequential(Versioned(3, 3)), tmp_path / "m")
    loaded = ck.load(tmp_path / "m", nn.Sequential(Versioned(3, 3)))
    assert torch.equal(loaded[0].weight, model[0].weight)


def old_weight_norm():
    return nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))


def pruned():
    model = network()
    prune.random_unstructured(model[0], "weight", 0.5)
    return model


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("make", [old_weight_norm, pruned])
def test_fresh_models_with_computed_weights(tmp_path, make):
    model, fresh = make(), make()
    fresh[0].seen = [fresh[0].weight * 2]
    fresh(x := torch.randn(2, model[0].in_features))
    ck.save(model, tmp_path / "m")
    torch.testing.assert_close(ck.load(tmp_path / "m", fresh).eval()(x), model.eval()(x), rtol=0, atol=0)


class Renamed(nn.Linear):
    """Layer that accepts the state dicts of an earlier version of its code."""

    def _load_from_state_dict(self, state, prefix, *rest):
        if f"{prefix}gamma" in state:
            state[f"{prefix}weight"] = state.pop(f"{prefix}gamma") * 2
        super()._load_from_state_dict(state, prefix, *rest)


def test_state_dicts_that_modules_convert(tmp_path):
    ck.save(model := nn.Sequential(Renamed(3, 3)), tmp_path / "m")
    earlier(tmp_path / "m", lambda tensors, _: tensors.update({"0.gamma": tensors.pop("0.weight")}))
    assert torch.equal(ck.load(tmp_path / "m", nn.Sequential(Renamed(3, 3)))[0].weight, 2 * model[0].weight)


def test_a_sparse_buffer_that_is_not_saved_stops_nothing(tmp_path):
    model = network()
    model.register_buffer("graph", torch.eye(3).to_sparse(), persistent=False)
    ck.save(model, tmp_path / "m")
    assert ck.load(tmp_path / "m", model).graph.is_sparse
