"""What models run on: the device, the dtype that is fast there, and the versions that results depend on."""

import platform

import torch
import transformers

from prefixvlm.modeling_vlm.cpu_prefix_vlm import product_dtype


def choose_device(name: str | None = None) -> torch.device:
    """The device called `name`, such as `cpu` or `cuda:1`; by default the first there is of cuda, Apple's mps and cpu.

    Raises:
        ValueError: for a device that is not here.
    """
    if name is None:
        kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        return torch.device(next(kind for kind, is_here in kinds.items() if is_here))
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises any of them for a missing device
        device, reason = torch.device("meta"), " ".join(str(error).split())[:120]
    else:
        reason = "it holds no values"
    if device.type == "meta":
        raise ValueError(
            f"The device is {name!r}, which cannot be used here ({reason}); choose one such as {choose_device()}."
        )
    return device


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes in it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return product_dtype(torch.bfloat16, device) if device.type == "cpu" else torch.float32


def bf16_note(device: torch.device) -> str | None:
    """What there is to say of bfloat16 autocast on a device, if anything."""
    if device.type != "cpu" or fast_dtype(device) == torch.bfloat16:
        return None
    return "This CPU has no bfloat16 arithmetic: it computes in float32 instead, which bf16 does not speed up."


def versions() -> dict[str, str]:
    """Versions of torch, transformers and Python, for the records of runs and measurements."""
    return {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
