"""How much of the kind of thing is left: in decoded captions, and in the pictures as a judge sees them.

Linear probes learn the classes that the recipe names (``evaluation.image_classes``) from training pictures: from their
true captions' embeddings, and from what a judge names in them (its features, if it names nothing). Legend: N images, K
classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from nd_dist.evaluation.reconstruction.decode import ImageTargets
from nd_dist.evaluation.reconstruction.source import Source
from nd_dist.evaluation.scoring.judging import seen_features
from nd_dist.evaluation.scoring.score import JudgedImages
from nd_dist.frozen.judges import Judge
from nd_dist.metrics.kind import Classes, Features, Float64, Probe, each_picture, fit_probe, labels_of, probe_images
from nd_dist.metrics.protocols import Protocol
from nd_dist.schema import SEMANTIC

DECODED, SEEN = "kind", "kind_seen"


@dataclass
class Kinds:
    """The classes of pictures, and the probes that read them; a subject's are fitted on first use.

    Args:
        classes: Class -> images that show it; of images without one nothing is said.
        source: Training pictures and their targets.
        judge: The judge whose features are read, None where training pictures are not at hand.
        protocol: What is done to pictures before judges see them.
        training_images: Images that probes learn from; none: the training images of the subject that is read.
    """

    classes: Classes
    source: Source
    judge: Judge | None
    protocol: Protocol
    training_images: Sequence[int] = ()
    _probes: dict[tuple[str, int], Probe] = field(default_factory=dict)

    def decoded(self, targets: ImageTargets, subject: int, image_ids: Sequence[int]) -> dict[str, Float64]:
        """Return what a probe reads of images' captions, as they are given to the sampler: metric -> (N,)."""
        if not probe_images(self.classes, image_ids):
            return {}
        if (DECODED, subject) not in self._probes:
            ids = self._training_images(subject, image_ids)
            self._probes[DECODED, subject] = fit_probe(
                self.source.targets(SEMANTIC, ids), labels_of(self.classes, ids)
            )
        scores_NK = self._probes[DECODED, subject].scores(targets.rows(SEMANTIC, image_ids))
        return {DECODED: each_picture(scores_NK, labels_of(self.classes, image_ids))}

    def seen(self, judged: JudgedImages, subject: int, image_ids: Sequence[int]) -> dict[str, Float64]:
        """Return what a probe reads of the judge's features of reconstructions: metric -> (N,), mean over repeats."""
        if self.judge is None or not probe_images(self.classes, image_ids):
            return {}
        if (SEEN, subject) not in self._probes:
            ids = self._training_images(subject, image_ids)
            features_ND = torch.cat([*seen_features(self.source, ids, self.judge, self.protocol)]).numpy()
            self._probes[SEEN, subject] = fit_probe(self._named(features_ND), labels_of(self.classes, ids))
        probe, labels_NK = self._probes[SEEN, subject], labels_of(self.classes, image_ids)
        _, repeats = judged.of(self.judge.name, self.protocol)
        each_RN = [each_picture(probe.scores(self._named(made_ND)), labels_NK) for made_ND in repeats]
        return {SEEN: np.mean(each_RN, axis=0)}

    def _named(self, features_ND: Features) -> Features:
        """Return what the judge names in pictures, from its features of them; the features where it names nothing."""
        named = getattr(self.judge, "named", None)
        return features_ND if named is None else named(torch.from_numpy(features_ND)).numpy()

    def _training_images(self, subject: int, image_ids: Sequence[int]) -> list[int]:
        """Return what a probe learns from: training images that show a class, but not those that it reads."""
        read = set(image_ids)
        ids = self.training_images or self.source.images(subject, "train")
        return probe_images(self.classes, [image_id for image_id in ids if image_id not in read])
