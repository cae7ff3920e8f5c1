"""A fitted detector in, a file out that other programs run without lhact: ONNX, or torch.export.

Inputs and outputs: `images` (n, channels, height, width) float32, prepared as the network takes
them; `logits` (n, classes), `score` (n,), higher = more in-distribution, and `decision` (n,), +1
in-distribution, -1 out-of-distribution. n is free. Where ASH-B has to choose among equal
activations, which an image with few positive ones makes it do, another program may choose others.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lhact.messages import first_line

# Banks of neighbours and the like, which would make a file that nobody wants to deploy.
MOST_BYTES = 256 << 20
SUFFIXES = (".onnx", ".pt2")


class _Deployed(nn.Module):
    def __init__(self, detector: nn.Module, threshold: float) -> None:
        super().__init__()
        self.detector, self.threshold = detector, threshold
        self.training = False

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, score = self.detector(images)
        return logits, score, torch.where(score > self.threshold, 1, -1)


def write(detector: nn.Module, threshold: float, images: Tensor, path: Path) -> None:
    """detector: images -> (logits, score), both traceable; see `Detector.export`. images: at least
    one example, on its device. Raises ValueError for another suffix, without the packages that ONNX
    needs, and for a network that torch cannot export."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"the file must end in .onnx or .pt2, got {path.name!r}")
    # An example of one image would make torch take 1 for a constant.
    images = torch.cat([images, images])[:2]
    shapes = ({0: torch.export.Dim("n")},)
    with torch.no_grad(), _named_errors():
        deployed = _Deployed(detector, threshold)
        program = torch.export.export(deployed, (images,), dynamic_shapes=shapes)
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
