"""Study data: images, networks for photographs; the same data gives the same trainings."""

import json
from dataclasses import replace
from importlib.resources import files

import pytest
import torch
from PIL import Image
from safetensors.torch import save_model

from compaware_kernels.nn.discovery import foldable_layers
from compaware_kernels.study import fit, latency
from compaware_kernels.study.arms import ARMS
from compaware_kernels.study.config import Config
from compaware_kernels.study.data import Folder, InMemory, load
from compaware_kernels.study.images import Images
from compaware_kernels.study.networks import build, last_layers
from compaware_kernels.study.points import LOW_RANK, Point
from compaware_kernels.study.runs import Record, Study
from tests.helpers import timm_case  # noqa: F401
from tests.helpers.study_case import CONFIG, key, some_digits

PHOTOS = replace(
    CONFIG, network="timm/test_resnet", epochs=2, batch=8, workers=1, validation=0.25, rules=("energy:0.9",),
    device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes of images, light at the top or light at the bottom: 32 for training, 8 for testing."""
    folder = tmp_path_factory.mktemp("photos")
    torch.manual_seed(0)
    for part, count in (("train", 16), ("val", 4)):
        for label in ("above", "below"):
            (folder / part / label).mkdir(parents=True)
            for i in range(count):
                pixels = torch.rand(40, 50, 3) * 100
                pixels[:20] += 150 * (label == "above")
                pixels[20:] += 150 * (label == "below")
                Image.fromarray(pixels.byte().numpy()).save(folder / part / label / f"{i}.png")
    return folder


def test_validation_images_are_never_trained_on():
    data = some_digits()
    order = [{tuple(image.flatten().tolist()) for x, _ in data.train(20, seed, 0) for image in x} for seed in (0, 1)]
    held = {tuple(image.flatten().tolist()) for x, _ in data.validation() for image in x}
    assert order[0] == order[1] and len(held) == 54 and len(order[0]) == data.examples == 216
    assert not held & order[0]


@pytest.mark.parametrize("photographs", [False, True])
def test_seed_and_epoch_determine_the_order(photographs, photos):
    data = Folder(photos, PHOTOS) if photographs else some_digits()

    def images(seed, epoch):
        return torch.cat([x for x, _ in data.train(8, seed, epoch)])

    first = images(0, 0)
    assert torch.equal(first, images(0, 0)) and first.shape == (data.examples, *data.shape)
    assert not torch.equal(first, images(0, 1)) and not torch.equal(first, images(1, 0))


def test_photographs(photos):
    """Augmented in training only; normalized as the network expects."""
    data = Folder(photos, PHOTOS)
    assert data.shape == (3, 160, 160) and data.classes == 2 and data.examples == 24
    held, again = ([torch.cat(part) for part in zip(*data.validation(), strict=True)] for _ in range(2))
    tested = [torch.cat(part) for part in zip(*data.test(), strict=True)]
    assert torch.equal(held[0], again[0]) and len(held[1]) == 8 and tested[1].tolist() == [0] * 4 + [1] * 4
    difference = (tested[0][:, :, :70].mean((1, 2, 3)) - tested[0][:, :, 90:].mean((1, 2, 3))).tolist()
    assert all(0.9 < d < 1.4 for d in difference[:4]) and all(-1.4 < d < -0.9 for d in difference[4:])  # 2 * 150 / 255
    assert torch.equal(data.example(10)[[0, 7, 8]], tested[0][[0, 7, 0]])
    assert Folder(photos, replace(PHOTOS, network="dec")).shape == (3, 32, 32)


@pytest.mark.slow
def test_a_study_of_photographs(photos, tmp_path, monkeypatch):
    """A whole study, and a training that is stopped and resumed: bit-identical."""
    monkeypatch.setattr(fit, "SAVE_EVERY", 0)
    config = replace(PHOTOS, arms={arm: CONFIG.arms[arm] for arm in ("plain", "nuclear+group")})
    data = load(replace(config, data=str(photos)))
    study = Study(config, data.name, tmp_path)
    records = [study.train(key(arm), data, lambda: None) for arm in config.arms]
    assert study.left == [] and not any(record.diverged for record in records)
    monkeypatch.setattr(latency, "MEMORY", 1)  # one network at a time
    latency.measure(study, records, data)
    assert len({json.dumps(record.points[0].structure) for record in records}) == 2
    assert all(record.points[0].milliseconds > 0 for record in records)
    assert all(r.points[0].macs < r.macs for r in records)

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit.fit(config, key("plain"), data, tmp_path / "part", stop)
    assert fit.fit(config, key("plain"), data, tmp_path / "part", lambda: None).losses == records[0].losses


def test_times_are_compared_on_one_machine_only(tmp_path, monkeypatch):
    """Known times are not measured again, unless one is missing that would have to be compared across machines; files
    of another version are refused."""

    def record(*ranks):
        points = [Point(LOW_RANK, "", 1, 1, 1, 0, 0, structure={"0": {"rank": rank}}) for rank in ranks]
        return Record(key("plain"), points=points)

    def measured(where, *ranks):
        timed.clear()
        monkeypatch.setattr(latency, "machine", lambda: f"{where}, {torch.get_num_threads()} thread(s)")
        found = record(*ranks)
        told = latency.measure(study, [found], None)
        assert all(point.milliseconds == 2.0 for point in found.points)
        return told, len(timed)

    study, timed, threads = Study(CONFIG, "digits", tmp_path), [], torch.get_num_threads()
    monkeypatch.setattr(latency, "_time", lambda texts, *_: timed.extend(texts) or dict.fromkeys(texts, 2.0))
    assert measured("here", 1) == ("here, 1 thread(s)", 1)
    assert measured("there", 1) == ("here, 1 thread(s)", 0)
    assert measured("here", 1, 2) == ("here, 1 thread(s)", 1)
    assert measured("there", 1, 2, 3) == ("there, 1 thread(s)", 3)
    assert torch.get_num_threads() == threads
    (tmp_path / "latency.json").write_text("{}")
    with pytest.raises(ValueError, match=r"latency.json: of another version; remove it"):
        measured("here", 1)


def test_bfloat16_trains_too(tmp_path):
    data = some_digits()
    exact, rounded = (fit.fit(replace(CONFIG, amp=amp), key("plain"), data, tmp_path / str(amp), lambda: None).losses
                      for amp in (False, True))  # fmt: skip
    assert exact != rounded and rounded == pytest.approx(exact, rel=0.05)


def test_initial_weights(tmp_path):
    shape, path = (3, 160, 160), tmp_path / "weights.safetensors"
    for name in ("timm/test_vit", "dec"):
        save_model(build(name, shape, 5, 1), path)
        first, other = build(name, shape, 5, 1), build(name, shape, 5, 2)
        loaded = build(name, shape, 5, 2, str(path))
        assert all(map(torch.equal, loaded.parameters(), first.parameters()))
        assert not all(map(torch.equal, loaded.parameters(), other.parameters()))
    with pytest.raises(ValueError, match=r"weights\.safetensors: not this network's weights"):
        build("timm/test_resnet", shape, 5, 1, str(path))
    path.write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"weights\.safetensors: not this network's weights"):
        build("dec", shape, 5, 1, str(path))


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("dec", ("16",)),
        ("timm/test_vit", ("head",)),
        ("timm/test_resnet", ("fc",)),
        ("timm/deit_tiny_distilled_patch16_224", ("head", "head_dist")),
        ("timm/levit_128s", ("head.linear", "head_dist.linear")),
        ("timm/res2net50_26w_4s", ("fc",)),
        ("timm/volo_d1_224", ("head",)),
        ("timm/tf_efficientnet_b0", ("classifier",)),
        ("timm/resnetv2_50", ("head.fc",)),
    ],
)
def test_the_classifier_is_skipped(name, layers):
    with torch.device("meta"):
        model = build(name, (3, 224, 224), 5, 0)
    assert last_layers(model) == layers
    assert set(layers) <= set(foldable_layers(model, layers)[1])


def test_a_network_without_a_classifier():
    with pytest.raises(ValueError, match="wanted a network with a classifier of its own; ReLU has none"):
        last_layers(torch.nn.ReLU())
    with pytest.raises(ValueError, match="wanted a network with a classifier of its own; ResNet has none"):
        last_layers(build("timm/test_resnet", (3, 160, 160), 0, 0))


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_validation_share_must_leave_training_images(share):
    d = some_digits()
    with pytest.raises(ValueError, match=rf"validation: wanted a share of the 216 training images.*got {share}"):
        InMemory(Images("few", d.train_x, d.train_y, d.test_x, d.test_y), share)


def test_missing_data(photos, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder; wanted digits, a folder of IDX files, or"):
        load(Config(data="nowhere", arms={"plain": [{}]}))
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "1.png").write_bytes((photos / "train/above/1.png").read_bytes())
    with pytest.raises(FileNotFoundError, match="val"):
        load(replace(PHOTOS, data=str(tmp_path)))
    (tmp_path / "val" / "dog").mkdir(parents=True)
    (tmp_path / "val" / "dog" / "1.png").write_bytes((photos / "train/above/1.png").read_bytes())
    with pytest.raises(ValueError, match="wanted the same classes in train and val; only one has cat, dog"):
        load(replace(PHOTOS, data=str(tmp_path)))


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    both = [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert replace(CONFIG, device="auto").devices == replace(CONFIG, device="cuda").devices == both
    assert replace(CONFIG, device="cpu").devices == [torch.device("cpu")]


def test_settings_missing_in_old_records_have_their_default(tmp_path):
    Study(CONFIG, "digits", tmp_path)
    path = tmp_path / "study.json"
    before = json.loads(path.read_text())
    del before["amp"]
    path.write_text(json.dumps(before))
    Study(CONFIG, "digits", tmp_path)
    with pytest.raises(ValueError, match="another study: amp was False, now True"):
        Study(replace(CONFIG, amp=True), "digits", tmp_path)


def test_shipped_studies():
    names = [path.name[:-5] for path in (files("compaware_kernels.study") / "configs").iterdir()]
    assert set(names) >= {"digits", "fashion", "resnet50", "vit_b"}
    for name in names:
        config = Config.read(name)
        assert config.seeds >= 3 and set(config.arms) == set(ARMS)
        budgets = {arm: len(strengths) for arm, strengths in config.arms.items() if arm != "plain"}
        assert len(set(budgets.values())) == 1, budgets
        assert len(set(config.keys)) == len(config.keys)


def test_unknown_network():
    with pytest.raises(ValueError, match=r"network: wanted one of mlp, .*, small_convnet, or a network of timm's"):
        replace(CONFIG, network="timm/lenet")
