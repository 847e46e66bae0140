"""A network as a file that other programs run: ONNX (also in 8-bit integers), TorchScript, torch.export.

Each `to_*` function returns the file's bytes, and `load_exported` runs such bytes, so that they can be
checked before a file is there. What its user needs to know goes with it, as JSON called "meta.json".
"""

import contextlib
import importlib.util
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cifar.dataset import CIFAR100_MEAN, CIFAR100_STD
from core.errors import RunError

ENDINGS = {"onnx": ".onnx", "torchscript": ".torchscript", "torch-export": ".pt2"}
META = "meta.json"
# Opset 17 (2022) is written by every torch from 2.4 on, and read by onnxruntime from 1.12 on.
ONNX_OPSET = 17
Exported = Callable[[torch.Tensor], torch.Tensor]


class WithPreprocessing(nn.Module):
    """`model` from pixels to probabilities: uint8 [N, 32, 32, 3] RGB in, float32 [N, classes] out, sum 1.

    Pixels come last but for the channels (NHWC), as image libraries read them and this project keeps them.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # utils.normalize as one multiplication and one subtraction. The constants are buffers, so that each
        # format carries them; a subtraction, since of additions those in the network are made 8-bit.
        mean = torch.tensor(CIFAR100_MEAN, dtype=torch.float64)
        std = torch.tensor(CIFAR100_STD, dtype=torch.float64)
        self.register_buffer("scale", (1 / (255 * std)).float())
        self.register_buffer("shift", (mean / std).float())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Probabilities float32 [N, classes] of `images` (uint8 [N, 32, 32, 3])."""
        normalised = images.float() * self.scale - self.shift
        return self.model(normalised.permute(0, 3, 1, 2)).softmax(1)


def require_packages(names: tuple[str, ...], purpose: str) -> None:
    """Check that optional packages are installed, without importing them.

    Raises:
        RunError: naming those that are missing and how to get them.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise RunError(f"{purpose} needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def to_torchscript(model: nn.Module, example: torch.Tensor, meta: dict[str, Any]) -> bytes:
    """`model` traced and frozen, BatchNorm folded into the convolutions, for torch.jit.load (in C++ too)."""
    buffer = io.BytesIO()
    with _quiet(), torch.no_grad():
        frozen = torch.jit.freeze(torch.jit.trace(model, example, check_trace=False))
        torch.jit.save(frozen, buffer, _extra_files={META: json.dumps(meta)})
    return buffer.getvalue()


def to_torch_export(model: nn.Module, example: torch.Tensor, meta: dict[str, Any]) -> bytes:
    """`model` as torch.export's graph of ATen operators: torch.export.load(...).module() runs it."""
    buffer = io.BytesIO()
    with _quiet():
        batch = torch.export.Dim("batch", min=1)
        program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # it would carry this machine's paths into the file
        torch.export.save(program, buffer, extra_files={META: json.dumps(meta)})
    return buffer.getvalue()


def to_onnx(model: nn.Module, example: torch.Tensor, meta: dict[str, Any]) -> bytes:
    """`model` as ONNX with opset ONNX_OPSET: input "images", output "logits" or, where `example` is uint8,
    "probabilities"; the first dimension of both is free.

    By torch's exporter of TorchScript graphs: it takes 1 s where the one of torch.export graphs takes half a
    minute, folds BatchNorm, needs no package beside onnx, and every torch from 2.4 on has it.
    """
    import inspect

    import onnx

    output = "probabilities" if example.dtype == torch.uint8 else "logits"
    # torch 2.4 does not know the argument, newer ones take the other exporter without it
    choice = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    buffer = io.BytesIO()
    with _quiet():
        torch.onnx.export(
            model,
            (example,),
            buffer,
            input_names=["images"],
            output_names=[output],
            opset_version=ONNX_OPSET,
            dynamic_axes={"images": {0: "batch"}, output: {0: "batch"}},
            **choice,
        )
    proto = onnx.load_from_string(buffer.getvalue())
    onnx.checker.check_model(proto, full_check=True)
    return _with_meta(proto, meta)


def _with_meta(proto: Any, meta: dict[str, Any]) -> bytes:
    import onnx

    onnx.helper.set_model_props(proto, {META: json.dumps(meta)})
    return proto.SerializeToString()


def to_int8(content: bytes, calibration: np.ndarray, meta: dict[str, Any], *, batch_size: int = 100) -> bytes:
    """The ONNX network `content` with 8-bit weights (a scale for each channel) and activations (their ranges
    are those met on `calibration`, the input of N images), as QuantizeLinear/DequantizeLinear pairs.

    Static, since onnxruntime's dynamic quantisation helps matrix products and hardly convolutions.
    Convolutions and the sums of the shortcuts become 8-bit. The last layer, the pooling before it and the
    preprocessing stay float: that costs no time, and the error of the logits is smaller.
    """
    import onnx
    from onnxruntime import quantization

    batches = [calibration[first : first + batch_size] for first in range(0, len(calibration), batch_size)]

    class Reader(quantization.CalibrationDataReader):
        """The batches as onnxruntime asks for them."""

        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.left, None)
            return None if batch is None else {"images": batch}

    with tempfile.TemporaryDirectory() as folder, _quiet():
        source, prepared, target = (str(Path(folder) / f"{name}.onnx") for name in ("in", "prepared", "out"))
        Path(source).write_bytes(content)
        quantization.shape_inference.quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantization.quantize_static(
            prepared,
            target,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Add"],
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        return _with_meta(onnx.load(target), meta)


def load_exported(content: bytes, format_name: str) -> Exported:
    """A function that runs the exported bytes on the CPU: batch in, logits or probabilities out."""
    if format_name == "onnx":
        return _onnx_session(content)
    with _quiet():
        if format_name == "torchscript":
            module = torch.jit.load(io.BytesIO(content), map_location="cpu")
        else:
            module = torch.export.load(io.BytesIO(content)).module()
    return torch.inference_mode()(module)


def _onnx_session(content: bytes) -> Exported:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # latencies compare at equal threads
    options.log_severity_level = 3  # errors alone
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(batch: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {"images": batch.contiguous().numpy()})[0])

    return run


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of exporters: of TorchScript's deprecation, of shapes fixed while tracing (the
    check with other batch sizes is there for that), of quantisation's advice."""
    root = logging.getLogger()
    level = root.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root.setLevel(logging.ERROR)
        try:
            yield
        finally:
            root.setLevel(level)
