"""Several processes, by --how ddp (DistributedDataParallel), fsdp (fully_shard) or tensor (tensor parallel):

    torchrun --nproc-per-node 2 examples/distributed_digits.py --how fsdp

Two nodes of 8 GPUs, on each of them: torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d \
--rdzv-endpoint FIRST_NODE:29400 examples/distributed_digits.py
"""

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
from compaware_kernels.demo.data import digits
from compaware_kernels.demo.networks import small_convnet


def main(
    how: str = "ddp", epochs: int = 20, off: bool = False, seed: int = 0, out: Path = Path("out/examples")
) -> None:
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    dist.init_process_group()
    rank, processes = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(seed)  # the same weights and order everywhere
    data, model = digits(), small_convnet().to(device)
    if how == "ddp":
        model = DistributedDataParallel(model)
    elif how == "fsdp":
        model = fully_shard(model)
    else:
        mesh = dist.init_device_mesh(device.type, (processes,))
        parallelize_module(model, mesh, {"9": ColwiseParallel(), "11": RowwiseParallel()})
    part = slice(None) if how == "tensor" else slice(rank, None, processes)  # of each batch
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, foreach=False)
    strengths = {} if off else {"nuclear": 10.0, "group": 0.2}
    prox = ck.ProximalStep(
        model, optimizer, **strengths, every=10, skip=["11"]
    )  # no more is needed than in one process

    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_y)).split(32):
            x, y = data.train_x[batch][part].to(device), data.train_y[batch][part].to(device)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    weights, moments = get_state_dict(model, optimizer)
    path = out / f"distributed_digits_{how}"  # of use to any number of processes
    dcp.save({"model": weights, "optimizer": moments, "prox": prox}, checkpoint_id=path)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    report = prox.report()
    if rank == 0:
        model = small_convnet()
        model.load_state_dict(whole)
        small, compressed = ck.compress(model, ck.ranks.energy(0.99), (data.test_x[:1],), skip=["11"], goal="size")
        ck.save(small, path.with_suffix(".safetensors"))
        accuracy = [float((m.eval()(data.test_x).argmax(1) == data.test_y).double().mean()) for m in (model, small)]
        print(f"{report}\nheld-out accuracy {accuracy[0]:.1%}, compressed {accuracy[1]:.1%}")
        print(f"multiply-adds {compressed.macs_before:,} -> {compressed.macs:,}; saved to {path}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
