"""Check that the built library also works in a CUDA build of torch: make check-cuda-torch.

Needs no GPU. pytest does not collect it: it runs in a virtual environment of its own.
"""

import ctypes

import torch

import compaware_kernels as ck
from compaware_kernels.ops import cuda_launcher, library

OPS = ("soft_threshold", "group_shrink", "sparse_group_shrink")


def error_of(launcher: cuda_launcher.Built, kernel: str) -> str:
    try:
        launcher(kernel, 1, 32, 0, 0, 0, [0])
    except RuntimeError as error:
        return str(error)
    return ""


def main() -> None:
    assert torch.version.cuda, f"torch {torch.__version__} was built without CUDA"
    assert not library.missing, library.missing
    assert not cuda_launcher.Built.why_not(), cuda_launcher.Built.why_not()
    for op, where in ck.info()["ops"].items():
        assert op.removesuffix("_") not in OPS or set(where.values()) == {"C++ kernel"}, f"{op}: {where}"
    W = torch.randn(5, 40)
    wanted = W * (1 - 6 / W.norm(dim=1, keepdim=True)).clamp(min=0)
    assert torch.allclose(ck.group_shrink(W, 6.0), wanted, atol=1e-6)

    # The weak symbol is looked up in the library and its dependencies.
    assert ctypes.CDLL(str(library.PATH)).aoti_torch_get_current_cuda_stream
    launcher = cuda_launcher.Built(0)
    assert error_of(launcher, "ck_absent") == "not launched: no kernel is called ck_absent"
    found = error_of(launcher, "ck_finish")
    assert torch.cuda.is_available() or "not launched: ck_finish: " in found, found
    print(f"torch {torch.__version__}: {library.PATH.name} works; {found or 'the kernels run'}")


if __name__ == "__main__":
    main()
