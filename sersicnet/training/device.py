"""The device that training runs on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sersicnet import networks
from sersicnet.errors import InputError
from sersicnet.networks import keras
from sersicnet.workers import cores


def jit() -> str | bool:
    """Whether to compile with XLA: not for TensorFlow on a CPU, which is a sixth slower with it."""
    return "auto" if accelerators() or keras.backend.backend() != "tensorflow" else False


def accelerators() -> list[str]:
    """The names of the accelerators, such as the model of a GPU if the backend knows it."""
    if keras.backend.backend() == "torch":
        import torch

        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if keras.backend.backend() == "jax":
        import jax

        return [device.device_kind for device in jax.devices() if device.platform != "cpu"]
    return [d for d in keras.distribution.list_devices() if not d.startswith("cpu")]


def on_accelerator() -> Callable[[np.ndarray], Any] | None:
    """A function that moves arrays to the accelerator; None without one, or with TensorFlow."""
    if not accelerators() or keras.backend.backend() == "tensorflow":
        return None
    if keras.backend.backend() == "torch":
        import torch

        return lambda values: torch.asarray(values, device="cuda")
    import jax.numpy

    return jax.numpy.asarray


CPU_FLAGS = Path("/proc/cpuinfo")
"""Where Linux lists what the CPU can do."""


def check_bfloat16() -> None:
    """Refuse bfloat16 on a CPU that does not compute in it, with an `InputError`: there it is slower, or fails."""
    if accelerators():
        return
    flags = CPU_FLAGS.read_text().split() if CPU_FLAGS.exists() else []
    if not {"amx_bf16", "avx512_bf16", "bf16"}.intersection(flags):  # the last is that of ARM
        raise InputError(
            f"`bfloat16` needs a GPU, or a CPU with amx_bf16 or avx512_bf16 among the flags in {CPU_FLAGS}; this "
            "machine has neither. Leave it out."
        )


def device() -> str:
    """The device that training runs on, in words."""
    return ", ".join(accelerators()) or f"{cores()} CPU cores, no GPU"


def estimate(network: str, stamps_per_second: float, seconds: float) -> str:
    """How long an epoch takes, in words; without a GPU also how long it would take on one, by arithmetic."""
    operations = 6 * networks.multiply_adds(networks.ARCHITECTURES[network].build())  # there, and twice back
    speed = stamps_per_second * operations
    text = f"about {seconds:.0f} s an epoch ({stamps_per_second:.0f} stamps/s, {speed / 1e9:.0f} GFLOP/s)"
    if accelerators() or not speed < 1e12:
        return text
    return f"{text}; a GPU that does 1 TFLOP/s on this network would take {seconds * speed / 1e12:.0f} s (not measured)"
