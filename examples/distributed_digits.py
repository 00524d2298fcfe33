"""Distributed training, by --how ddp (DistributedDataParallel), fsdp (fully_shard) or tensor (tensor parallel):
torchrun --nproc-per-node 2 examples/distributed_digits.py --how fsdp. On each of two nodes with 8 GPUs:
torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint NODE:29400 examples/distributed_digits.py"""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import typer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import compaware_kernels as ck
from compaware_kernels.demo.networks import small_convnet
from compaware_kernels.study.images import digits


def wrapped(model: torch.nn.Module, how: str, device: torch.device) -> torch.nn.Module:
    if how == "tensor":
        mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
        return parallelize_module(model, mesh, {"9": ColwiseParallel(), "11": RowwiseParallel()})
    return fully_shard(model) if how == "fsdp" else DistributedDataParallel(model)


def main(how: str = "ddp", epochs: int = 20, off: bool = False, out: Path = Path("out/examples")) -> None:
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    dist.init_process_group()
    torch.manual_seed(0)  # the same weights and batches on all ranks
    data, model = digits(), wrapped(small_convnet().to(device), how, device)
    # this rank's part of each batch
    part = slice(None) if how == "tensor" else slice(dist.get_rank(), None, dist.get_world_size())
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, foreach=False)
    prox = ck.ProximalStep(model, optimizer, nuclear=0 if off else 10, group=0 if off else 0.2, every=10, skip=["11"])

    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_y)).split(32):
            x, y = data.train_x[batch][part].to(device), data.train_y[batch][part].to(device)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    path, (weights, moments) = out / f"distributed_digits_{how}", get_state_dict(model, optimizer)
    # can be loaded by any number of processes
    dcp.save({"model": weights, "optimizer": moments, "prox": prox}, checkpoint_id=path)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    report = prox.report()  # a collective call: on all ranks
    if dist.get_rank() == 0:
        (model := small_convnet()).load_state_dict(whole)
        small, _ = ck.compress(model, ck.ranks.energy(0.99), (data.test_x[:1],), skip=["11"], goal="size")
        ck.save(small, file := path.with_suffix(".safetensors"))
        right = [(m.eval()(data.test_x).argmax(1) == data.test_y).double().mean().item() for m in (model, small)]
        print(f"{report}\nheld-out accuracy {right[0]:.1%}, compressed {right[1]:.1%}; saved to {file}")
    dist.barrier()  # a rank that exits while tensors of a message are being freed would abort
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
