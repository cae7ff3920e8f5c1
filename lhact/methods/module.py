"""A fitted method in, an nn.Module out that computes the same: what it learnt are buffers, which
move to a device and are exported with a network."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lhact.methods.compose import BadMethod
from lhact.methods.entries import Entry
from lhact.methods.fit import FittedMethod, FittedStep, Head, inputs_of
from lhact.methods.rectify import RECTIFIERS
from lhact.methods.scores import SCORES

Number = float | int | None


@dataclass(frozen=True)
class StepContent:
    """What a fitted rectifier or score holds, by the names of its function's arguments. tensors:
    what it learnt. batches: those of them that the function takes as a sequence of batches.
    numbers: its parameters. of_head: `weight` and `bias`, where it takes them of the head."""

    name: str
    tensors: Mapping[str, Tensor]
    batches: tuple[str, ...]
    numbers: Mapping[str, Number]
    of_head: tuple[str, ...]


@dataclass(frozen=True)
class MethodContent:
    """A fitted method without its head: the rectifiers, then the score. parameters: as shown."""

    name: str
    parameters: Mapping[str, float]
    steps: tuple[StepContent, ...]


def content_of(fitted: FittedMethod) -> MethodContent:
    """What the method holds. Raises BadMethod for a constant of another kind."""
    steps = (*fitted.rectifiers, fitted.score)
    contents = tuple(_step_content(step, fitted.head) for step in steps)
    return MethodContent(fitted.name, fitted.parameters, contents)


def _step_content(step: FittedStep, head: Head) -> StepContent:
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
    return StepContent(step.name, tensors, tuple(batches), numbers, tuple(of_head))


class MethodModule(nn.Module):
    """(activations (images, channels) float32, head) -> logits (images, classes) of the activations
    as they are, and scores (images,), higher = more in-distribution."""

    def __init__(self, content: MethodContent) -> None:
        super().__init__()
        self.content = content
        self.functions = [_entry(step.name).function for step in content.steps]
        self.inputs = [inputs_of(function) for function in self.functions]
        for number, step in enumerate(content.steps):
            for name, tensor in step.tensors.items():
                # Not of the state dict, which would have them without the numbers.
                self.register_buffer(_buffer(number, step, name), tensor, persistent=False)

    @property
    def perturbed(self) -> bool:
        """Whether it scores images that ODIN has perturbed."""
        return _entry(self.content.steps[-1].name).perturbed

    def forward(self, activations: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        logits = head.logits(activations)
        inputs = {"activations": activations, "logits": logits}
        *rectifiers, score = [self._fitted(i, head) for i in range(len(self.functions))]
        for rectifier in rectifiers:
            inputs["activations"] = rectifier(**inputs)
        if rectifiers and "logits" in score.inputs:
            inputs["logits"] = head.logits(inputs["activations"])
        return logits, score(**inputs)

    def _fitted(self, number: int, head: Head) -> FittedStep:
        """The step of that number, with its tensors where they are now."""
        step = self.content.steps[number]
        constants = {**step.numbers, **{name: getattr(head, name) for name in step.of_head}}
        for name in step.tensors:
            tensor = getattr(self, _buffer(number, step, name))
            constants[name] = [tensor] if name in step.batches else tensor
        return FittedStep(step.name, self.functions[number], self.inputs[number], constants, {})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MethodModule":
        """Moves the buffers. They stay float32 where a network becomes half as precise."""
        for name, buffer in self.named_buffers(recurse=False):
            self._buffers[name] = buffer.to(fn(buffer).device)
        return self


def _buffer(number: int, step: StepContent, name: str) -> str:
    """The name of the buffer of one of its tensors."""
    return f"{number}_{step.name.replace('-', '_')}_{name}"


def _entry(name: str) -> Entry:
    found: Entry | None = RECTIFIERS.get(name) or SCORES.get(name)
    if found is None:
        raise BadMethod(f"unknown rectifier or score {name!r}; it may be of a later version")
    return found


def bytes_of(content: MethodContent) -> int:
    """How much memory its tensors take."""
    return sum(tensor.nbytes for step in content.steps for tensor in step.tensors.values())
