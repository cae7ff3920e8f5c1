"""A fitted detector in, a file out that other programs run without lhact: ONNX, or torch.export.

Inputs and outputs: `images` (n, channels, height, width) float32, prepared as the network takes
them; `logits` (n, classes), `score` (n,), higher = more in-distribution, and `decision` (n,), +1
in-distribution, -1 out-of-distribution. n is free. Where ASH-B has to choose among equal
activations, which an image with few positive ones makes it do, another program may choose others.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lhact.messages import first_line

if TYPE_CHECKING:
    from lhact.detector import Detector

# Banks of neighbours and the like, which would make a file that nobody wants to deploy.
MOST_BYTES = 256 << 20
SUFFIXES = (".onnx", ".pt2")


class _Deployed(nn.Module):
    def __init__(self, detector: "Detector") -> None:
        super().__init__()
        self.detector = detector
        self.training = False

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, score = self.detector(images)
        return logits, score, torch.where(score > self.detector.offset_, 1, -1)


def write(detector: "Detector", path: Path, images: Tensor | None = None) -> None:
    """See `Detector.export`. Raises ValueError for a detector that is not fitted, for ODIN, which
    needs gradients, for a bank of more than 256 MiB, for another suffix, and for a network that
    torch cannot export."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"the file must end in .onnx or .pt2, got {path.name!r}")
    program = _exported(detector, images)
    if path.suffix == ".pt2":
        torch.export.save(program, path)
        return
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "ONNX files need onnx and onnxscript; install them with: pip install 'lhact[onnx]'"
        ) from error
    with _named_errors():
        torch.onnx.export(
            program,
            (),
            path,
            dynamo=True,
            input_names=["images"],
            output_names=["logits", "score", "decision"],
            custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
            external_data=False,
            verbose=False,
        )


def _exported(detector: "Detector", images: Tensor | None) -> torch.export.ExportedProgram:
    scoring, name = detector.fitted(), detector.method.name
    if detector.method.perturbed:
        raise ValueError(f"{name} needs gradients of the network, which no file holds")
    if (size := sum(buffer.nbytes for buffer in scoring.buffers())) > MOST_BYTES:
        raise ValueError(
            f"{name} holds {size >> 20:,} MiB of calibration images, more than "
            f"{MOST_BYTES >> 20} MiB; fit it to fewer, or take another method"
        )
    if images is None:
        if detector.shape is None:
            raise ValueError("the shape of an image is not known; give images, an example of two")
        images = torch.zeros(2, *detector.shape, dtype=detector.input_dtype)
    detector.check(images, detector.shape)
    if not len(images):
        raise ValueError("images must hold at least one example, got none")
    images = images.to(detector.device)
    # An example of one image would make torch take 1 for a constant.
    images = torch.cat([images, images])[:2]
    shapes = ({0: torch.export.Dim("n")},)
    with torch.no_grad(), _named_errors():
        return torch.export.export(_Deployed(detector), (images,), dynamic_shapes=shapes)


@contextmanager
def _named_errors() -> Iterator[None]:
    try:
        yield
    except (OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch raises nearly anything on code that it cannot trace
        raise ValueError(
            f"torch cannot export the network ({type(error).__name__}: {first_line(error)}); mend "
            "its forward such that torch.export takes it"
        ) from error


def _stable_sort(values: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """aten.sort.stable, which torch's own translation lacks: ONNX's TopK of all columns puts the
    lower of two equal ones first."""
    from onnxscript import opset18

    op: Any = opset18
    count = op.Gather(op.Shape(values), op.Constant(value_int=dim), axis=0)
    count = op.Reshape(count, op.Constant(value_ints=[1]))
    return op.TopK(values, count, axis=dim, largest=int(descending), sorted=1)
