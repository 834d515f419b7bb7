"""The most confident mistakes of an evaluation, with the images as the model received them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from pipeline.images.preprocessing import Preprocessing
from pipeline.pages.sheet import caption_name
from pipeline.training.losses import probabilities
from pipeline.training.samples import as_pictures

NUM_MISTAKES = 16


@dataclass(frozen=True)
class PicturedMistake:
    """A misclassified image. picture: uint8 [S, S, C]; true, predicted: classes; confidence: probability of the predicted."""

    picture: np.ndarray
    true: int
    predicted: int
    confidence: float

    def caption(self, class_names: Sequence[str]) -> str:
        true, predicted = (class_names[number] for number in (self.true, self.predicted))
        return f"{predicted} {self.confidence:.2f}, true: {true}"

    def lines(self, class_names: Sequence[str]) -> list[str]:
        """The caption in two lines for a contact sheet."""
        true, predicted = (caption_name(class_names[number], number) for number in (self.true, self.predicted))
        return [f"{self.confidence:.2f} {predicted}", f"true: {true}"]


class ConfidentMistakes:
    """Collects the mistakes of the highest confidence on this rank's device. `add` does not wait for the device."""

    def __init__(self) -> None:
        self.kept: tuple[Tensor, ...] = ()  # confidence, true class, predicted class, image; -1 where an image was right

    @torch.no_grad()
    def add(self, images: Tensor, logits: Tensor, labels: Tensor, loss: str = "cross_entropy") -> None:
        """images: float [B, C, S, S]; logits: float [B, num_classes]; labels: int64 [B]; loss: a row of losses.LOSSES."""
        predicted = logits.argmax(dim=1)
        confidence = probabilities(logits, loss).gather(1, predicted[:, None])[:, 0]
        confidence = confidence.masked_fill(predicted == labels, -1.0)
        own = confidence.topk(min(NUM_MISTAKES, len(confidence))).indices
        batch = tuple(part.index_select(0, own) for part in (confidence, labels, predicted, images))
        self.kept = tuple(map(torch.cat, zip(self.kept, batch))) if self.kept else batch
        best = self.kept[0].topk(min(NUM_MISTAKES, len(self.kept[0]))).indices
        self.kept = tuple(part.index_select(0, best) for part in self.kept)

    def gathered(self, preprocessing: Preprocessing, accelerator: Accelerator) -> list[PicturedMistake]:
        """The mistakes over all ranks, in decreasing order of confidence. Every rank must call it."""
        own = []
        if self.kept:
            confidences, true, predicted = (part.tolist() for part in self.kept[:3])
            pictures = as_pictures(self.kept[3], preprocessing)
            rows = zip(pictures, true, predicted, confidences)
            own = [PicturedMistake(*row) for row in rows if row[3] >= 0]
        everyones = gather_object(own) if accelerator.num_processes > 1 else own
        return sorted(everyones, key=lambda mistake: -mistake.confidence)[:NUM_MISTAKES]
