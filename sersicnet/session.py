"""Sessions of ONNX Runtime: the device and the threads that a network measures with."""

from __future__ import annotations

from typing import Any

from sersicnet import workers
from sersicnet.errors import InputError, first_line

CPU, GPU = "cpu", "gpu"
DEVICES = ("auto", CPU, GPU)
"""Devices that a network can be asked to run on: `auto` is a GPU if ONNX Runtime has one that works, else the CPU."""

ON_CPU = "CPUExecutionProvider"
_ON_GPU: dict[str, dict[str, str]] = {
    "CUDAExecutionProvider": {"use_tf32": "0"},  # which rounds to three digits
    "MIGraphXExecutionProvider": {},
    "ROCMExecutionProvider": {},
    "DmlExecutionProvider": {},
}
"""The providers of ONNX Runtime for GPUs that compute in single precision, and their options. TensorRT is left out,
since it compiles a network for minutes in each process, and CoreML, which may compute in half precision."""

_one_thread = False


def use_one_thread() -> None:
    """Let networks of this process take one core: others work beside it."""
    global _one_thread
    _one_thread = True


def threads() -> int:
    """How many threads of this process may run a network on a CPU side by side."""
    return 1 if _one_thread else workers.cores()


def providers() -> list[str]:
    """What ONNX Runtime may compute with on this machine, fastest first."""
    import onnxruntime

    available = onnxruntime.get_available_providers()
    return [*(name for name in _ON_GPU if name in available), ON_CPU]


def opened(content: bytes, device: str) -> Any:
    """Open a network.

    Parameters
    ----------
    content : bytes
        Of an ONNX file.
    device : str
        One of `DEVICES`.

    Returns
    -------
    onnxruntime.InferenceSession
        Its ``get_providers()`` begins with the provider that it runs on.

    Raises
    ------
    InputError
        If a GPU is asked for, and there is none that works. ONNX Runtime raises other kinds if the file is no network.
    """
    wanted = [ON_CPU] if device == CPU else providers()
    if wanted == [ON_CPU]:
        if device == GPU:
            raise InputError(
                "`device` gpu needs an ONNX Runtime with a provider for GPUs, and the installed one computes on CPUs "
                "only: run `pip uninstall onnxruntime` and `pip install onnxruntime-gpu` (NVIDIA), or choose cpu."
            )
        return _opened(content, wanted)
    reason = ""
    try:
        session = _opened(content, wanted)
        if session.get_providers()[0] != ON_CPU or device != GPU:
            return session
    except Exception as error:  # ONNX Runtime raises several kinds of its own
        reason = f" ({first_line(error)})"
    if device == GPU:
        raise InputError(
            f"`device` gpu needs a GPU that works, and {wanted[0]} of ONNX Runtime does not start here{reason}: check "
            "the GPU's driver and libraries (with NVIDIA, `nvidia-smi` and CUDA with cuDNN), or choose cpu."
        )
    return _opened(content, [ON_CPU])


def _opened(content: bytes, names: list[str]) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is an exception: no lines on stderr beside it
    if names == [ON_CPU]:
        # With several threads in a call, the last bits of a result would depend on their number, on the size of the
        # batch and on the place in it. Calls run side by side instead, see `threads`.
        options.intra_op_num_threads = options.inter_op_num_threads = 1
    # DirectML does not work with memory that is planned ahead. A fallback would print lines on stdout.
    options.enable_mem_pattern = names[0] != "DmlExecutionProvider"
    named = [(name, _ON_GPU.get(name, {})) for name in names]
    return onnxruntime.InferenceSession(content, options, providers=named, enable_fallback=0)
