"""Which GPUs the Triton kernels are built for.

From what the compiler makes of them: on every compute capability in `CAPABILITIES` all kernels compile, fit into the
shared memory of a block, and use tensor cores. Older GPUs lack bf16 and have too little shared memory (attention at
68 columns takes 90,112 bytes, sm_75 has 65,536); on others nobody has looked.
"""

import functools

import torch

# Compute capability as major * 10 + minor -> the one whose tiles it takes.
CAPABILITIES = {80: 80, 86: 86, 89: 86, 90: 90, 120: 86}


def gpus() -> tuple[torch.device, ...]:
    """The devices that PyTorch calls CUDA; one without a number where there is none."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return tuple(torch.device("cuda", index) for index in range(count)) or (torch.device("cuda"),)


def others() -> tuple[torch.device, ...]:
    """This machine's accelerator of another kind, such as mps or xpu."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return () if found is None or found.type == "cuda" else (torch.device(found.type),)


@functools.lru_cache(maxsize=64)
def unfit(device: torch.device) -> str:
    """Why the Triton kernels do not serve the GPU `device`; empty where they do, and for CPU tensors, which reach them
    only where something stands in for a GPU."""
    if device.type == "cpu":
        return ""
    if torch.version.hip is not None:
        return "the Triton kernels are built for NVIDIA GPUs, this is a ROCm build of PyTorch"
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor in CAPABILITIES:
        return ""
    known = ", ".join(f"sm_{capability}" for capability in CAPABILITIES)
    return f"the Triton kernels are compiled for {known}, {torch.cuda.get_device_name(device)} is sm_{major}{minor}"
