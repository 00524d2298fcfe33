"""Checkpoints of ProximalStep: training resumes bit-identically from any step; anything else is refused."""

import base64
import copy
import io
import zlib

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

import compaware_kernels as ck
from compaware_kernels.proximal import gram_list, subspace_iteration
from tests.helpers.cases import low_rank
from tests.helpers.processes import run

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")
STEPS = 10
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.003),
}


def start(name="momentum", wrap=lambda model: model):
    """Layers that take the subspace route: their bases appear, grow and shrink."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 256), nn.ReLU(), nn.Linear(256, 200))
    with torch.no_grad():
        for layer, rank in ((model[0], 30), (model[2], 12)):
            layer.weight.copy_(low_rank(*layer.weight.shape, rank, largest=4, outside=0.1))
    model = wrap(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    strengths = {"nuclear": 0.3, "group": 1e-4, "scale_by_lr": False}
    return model, optimizer, ck.ProximalStep(model, optimizer, **strengths, every=2, warmup=3)


def train(model, optimizer, first, last):
    for i in range(first, last):
        x = torch.randn(32, 200, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        (model(x) - x.roll(1, 1)).square().mean().mul(20).backward()
        optimizer.step()


def assert_same(parts, wanted):
    for a, b in zip(parts[0].parameters(), wanted[0].parameters(), strict=True):
        assert torch.equal(a, b)
    assert parts[2].state_dict() == wanted[2].state_dict()
    torch.testing.assert_close(parts[1].state_dict(), wanted[1].state_dict(), rtol=0, atol=0)


def save(parts, path):
    torch.save([part.state_dict() for part in parts], path)


def load(parts, path):
    for part, state in zip(parts, torch.load(path, weights_only=True), strict=True):
        part.load_state_dict(state)


def save_dcp(parts, path):
    model, optimizer = get_state_dict(*parts[:2])
    dcp.save({"model": model, "optimizer": optimizer, "prox": parts[2]}, checkpoint_id=path)


def load_dcp(parts, path):
    model, optimizer = get_state_dict(*parts[:2])
    dcp.load({"model": model, "optimizer": optimizer, "prox": parts[2]}, checkpoint_id=path)
    set_state_dict(*parts[:2], model_state_dict=model, optim_state_dict=optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("save", "load"), [(save, load), (save_dcp, load_dcp)], ids=["torch", "dcp"])
def test_resuming_at_any_step_is_bit_identical(save, load, name, tmp_path, monkeypatch):
    monkeypatch.setattr(gram_list, "MEDIUM", 0)  # small layers as large ones, with a basis in the state
    monkeypatch.setattr(subspace_iteration, "COLUMNS", 1)  # as many columns as the rank needs
    whole, columns = start(name), []
    for step in range(STEPS):
        train(*whole[:2], step, step + 1)
        save(whole, tmp_path / f"{step}")
        columns.append([V.shape[1] for V in whole[2].warm.bases.values()])
    assert columns[0] == [] and columns[1] != columns[3] != columns[-1] and all(columns[-1]), "bases come and change"
    plain = start(name)
    train(*plain[:2], 0, STEPS)
    assert_same(whole, plain)  # saving changed nothing
    for step in range(STEPS):
        resumed = start(name)
        load(resumed, tmp_path / f"{step}")
        train(*resumed[:2], step + 1, STEPS)
        assert_same(resumed, whole)


def test_dcp_initializing_optimizer_state_takes_no_proximal_step():
    """DCP runs it with gradients and learning rates of 0; thresholds do not depend on either."""
    model, optimizer, prox = start("adamw")
    prox.every = 1
    before = copy.deepcopy(model.state_dict())
    get_state_dict(model, optimizer)
    assert optimizer.state and (prox.steps, prox.applied) == (0, 0)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.fixture
def process_group():
    """Process group of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_later_steps_do_not_change_a_checkpoint_being_written(process_group, tmp_path):
    parts = start()
    train(*parts[:2], 0, 5)
    save(parts, tmp_path / "now.pt")
    bases = parts[2].warm.state_dict()["bases"]
    copies = copy.deepcopy(bases)
    model, optimizer = get_state_dict(*parts[:2])
    state = {"model": model, "optimizer": optimizer, "prox": parts[2]}
    writing = dcp.async_save(state, checkpoint_id=tmp_path / "meanwhile")
    train(*parts[:2], 5, STEPS)
    writing.result()
    torch.testing.assert_close(bases, copies, rtol=0, atol=0)
    now, meanwhile = start(), start()
    load(now, tmp_path / "now.pt")
    load_dcp(meanwhile, tmp_path / "meanwhile")
    assert_same(meanwhile, now)


def train_on(rank, folder, first, last):
    """Same data in every process: the mean of the gradients is bit for bit that of one process."""
    parts = start(wrap=DistributedDataParallel)
    if first:
        load_dcp(parts, f"{folder}/{first}")
    train(*parts[:2], first, last)
    save_dcp(parts, f"{folder}/{last}")
    return parts[0].module.state_dict(), parts[2].state_dict()


def test_resuming_with_another_number_of_processes(tmp_path):
    ((wanted, state),) = run(train_on, 1, f"{tmp_path}/whole", 0, STEPS)
    run(train_on, 1, f"{tmp_path}/parts", 0, 3)
    run(train_on, 2, f"{tmp_path}/parts", 3, 6)
    ((got, last),) = run(train_on, 1, f"{tmp_path}/parts", 6, STEPS)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert last == state


class Code:
    """Object whose unpickling runs code."""

    def __reduce__(self):
        return (print, ("ran",))


def text(anything):
    file = io.BytesIO()
    torch.save(anything, file)
    return base64.b64encode(zlib.compress(file.getvalue())).decode()


def test_foreign_states_are_refused_and_change_nothing(capsys):
    model, optimizer, prox = start()
    train(model, optimizer, 0, 8)
    good, other = prox.state_dict(), ck.WarmState().state_dict()
    warm = good["warm"]
    bad = [{"warm": warm[: len(warm) * i // 40]} for i in range(40)]
    bad += [
        {"warm": x} for x in ("", "not base 64!", text(Code()), text([1]), text(other | {"bases": {"a": 1}}), b"", 3)
    ]
    bad += [{"steps": 1.5}, {"applied": None}, {"more": 1}, {"warm": prox.warm.state_dict()}]
    for change in bad:
        with pytest.raises(ValueError, match="wanted"):
            prox.load_state_dict(good | {"steps": 99} | change)
        assert prox.state_dict() == good
    for state in (None, [], optimizer.state_dict(), model.state_dict(), prox.warm.state_dict()):
        with pytest.raises(ValueError, match="wanted a ProximalStep state"):
            prox.load_state_dict(state)
    assert prox.state_dict() == good and not capsys.readouterr().out
    for i in range(0, len(warm), len(warm) // 100):  # one changed character is refused, or is harmless
        try:
            prox.load_state_dict(good | {"warm": warm[:i] + ("A" if warm[i] != "A" else "B") + warm[i + 1 :]})
        except ValueError as error:
            assert "damaged" in str(error) or "WarmState" in str(error)
        assert prox.state_dict() == good


def assert_resumes(model, prox):
    """A proximal step of the second layer is right and starts from the loaded basis."""
    wanted, columns = ck.svt(model[2].weight.detach().double(), 0.3), prox.warm.bases["2.0"].shape[1]
    prox.strengths["2"]["group"] = 0.0
    prox.step()
    W = model[2].weight.detach()
    error = torch.linalg.matrix_norm(W.double() - wanted, 2)
    assert columns and error < 1e-3 * 0.3 + torch.finfo(W.dtype).eps * torch.linalg.matrix_norm(wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_model_of_another_dtype_resumes(dtype):
    model, optimizer, prox = start()
    train(model, optimizer, 0, 8)
    model.to(dtype)
    assert_resumes(model, prox)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False")
def test_a_model_on_the_gpu_resumes():
    model, optimizer, prox = start()
    train(model, optimizer, 0, 8)
    for before, after in (("cpu", "cuda"), ("cuda", "cpu")):
        assert prox.warm.bases["2.0"].device.type == before
        model.to(after)
        assert_resumes(model, prox)
        assert prox.warm.bases["2.0"].device.type == after
