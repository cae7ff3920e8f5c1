"""A fitted method in, an nn.Module out that computes the same: what it learnt are buffers, which
move to a device and are exported with a network."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lhact.methods.compose import BadMethod
from lhact.methods.entries import Entry
from lhact.methods.fit import FittedMethod, FittedStep, Head, inputs_of
from lhact.methods.rectify import RECTIFIERS
from lhact.methods.scores import SCORES

Number = float | int | None


class StepModule(nn.Module):
    """A fitted rectifier or score, by the names of its function's arguments. tensors: what it
    learnt, as buffers. batches: those of them that the function takes as a sequence of batches.
    numbers: its parameters. of_head: `weight` and `bias`, where it takes them of the head.

    Raises BadMethod for an unknown name.
    """

    def __init__(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        batches: Sequence[str],
        numbers: Mapping[str, Number],
        of_head: Sequence[str],
    ) -> None:
        super().__init__()
        entry: Entry | None = RECTIFIERS.get(name) or SCORES.get(name)
        if entry is None:
            raise BadMethod(f"unknown rectifier or score {name!r}; it may be of a later version")
        self.name, self.batches, self.numbers, self.of_head = name, batches, numbers, of_head
        self.function: Callable[..., Tensor] = entry.function
        self.inputs = inputs_of(entry.function)
        for argument, tensor in tensors.items():
            # Not of the state dict, which would have them without the numbers.
            self.register_buffer(argument, tensor, persistent=False)

    def forward(self, inputs: Mapping[str, Tensor], head: Head) -> Tensor:
        """inputs: `activations` and `logits`, of which the function reads some."""
        arguments: dict[str, object] = {name: inputs[name] for name in self.inputs}
        arguments |= self.numbers
        arguments |= {name: getattr(head, name) for name in self.of_head}
        for name, tensor in self.named_buffers():
            arguments[name] = [tensor] if name in self.batches else tensor
        return self.function(**arguments)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StepModule":
        """Moves the buffers. They stay float32 where a network becomes half as precise."""
        for name, buffer in self.named_buffers():
            self._buffers[name] = buffer.to(fn(buffer).device)
        return self


class MethodModule(nn.Module):
    """(activations (images, channels) float32, head) -> logits (images, classes) of the activations
    as they are, and scores (images,), higher = more in-distribution.

    steps: the rectifiers, then the score. parameters_used: by the names of the command line.
    """

    steps: Sequence[StepModule]

    def __init__(
        self, name: str, parameters_used: Mapping[str, float], steps: Iterable[StepModule]
    ) -> None:
        super().__init__()
        self.name, self.parameters_used = name, parameters_used
        self.steps = nn.ModuleList(steps)  # type: ignore[assignment]

    def forward(self, activations: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        logits = head.logits(activations)
        inputs = {"activations": activations, "logits": logits}
        *rectifiers, score = self.steps
        for rectifier in rectifiers:
            inputs["activations"] = rectifier(inputs, head)
        if rectifiers and "logits" in score.inputs:
            inputs["logits"] = head.logits(inputs["activations"])
        return logits, score(inputs, head)


def module_of(fitted: FittedMethod) -> MethodModule:
    """The method without its head, which the module is given with the activations."""
    steps = (*fitted.rectifiers, fitted.score)
    modules = [_step_of(step, fitted.head) for step in steps]
    return MethodModule(fitted.name, fitted.parameters, modules)


def _step_of(step: FittedStep, head: Head) -> StepModule:
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Number] = {}
    batches, of_head = [], []
    for name, value in step.constants.items():
        if value is head.weight or value is head.bias:
            of_head.append(name)
        elif isinstance(value, Tensor):
            tensors[name] = value
        elif value is None or isinstance(value, int | float):
            numbers[name] = value
        else:
            # Batches, such as the neighbours of KNN, which is all that the calibration set is.
            tensors[name] = torch.cat(list(value))  # type: ignore[call-overload]
            batches.append(name)
    return StepModule(step.name, tensors, batches, numbers, of_head)
