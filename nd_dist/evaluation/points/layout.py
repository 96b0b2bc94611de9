"""Where an evaluation keeps its files below the run folder. Paths only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nd_dist.evaluation.points.axes import decoding_settings
from nd_dist.evaluation.points.units import ORIGINAL, UNGUIDED, Point, image_name, subject_name


@dataclass(frozen=True)
class Layout:
    """Paths of one run.

        reconstructions/original/image-00012/picture.png
        reconstructions/POINT/subj01/image-00012/repeat-0.png ... record.json
        evaluation/decoded/subj01/images-00000/predictions.safetensors record.json ... statistics/
        evaluation/judged/PROTOCOL/POINT/subj01/images-00003/features.safetensors record.json
        evaluation/scores/PROTOCOL/POINT/subj01/arrays.safetensors record.json
        evaluation/leases/LAUNCH/PHASE/   evaluation/ranks/   metrics.json

    Args:
        run_dir: Folder of the run.
        protocol: Name of the metric protocol.
        round_images: Images of an early round of a search, 0 where it is none.
    """

    run_dir: Path
    protocol: str
    round_images: int = 0

    @property
    def _scores(self) -> Path:
        return self.work / (f"scores-{self.round_images}-images" if self.round_images else "scores") / self.protocol

    @property
    def metrics(self) -> Path:
        """The final numbers."""
        return self.run_dir / "metrics.json"

    @property
    def work(self) -> Path:
        """Everything that is not meant to be looked at first."""
        return self.run_dir / "evaluation"

    @property
    def reconstructions(self) -> Path:
        """All pictures."""
        return self.run_dir / "reconstructions"

    @property
    def leases(self) -> Path:
        """Claims."""
        return self.work / "leases"

    @property
    def ranks(self) -> Path:
        """What each rank of each launch did."""
        return self.work / "ranks"

    def decoded(self, point: Point, subject: int) -> Path:
        """Decoder predictions of a subject, for points with the decoding settings of ``point``."""
        return self.work / "decoded" / _with_settings(subject, point)

    def nearest(self, subject: int) -> Path:
        """Which training image is nearest to what was decoded for each image."""
        return self.work / "nearest" / subject_name(subject)

    @property
    def costs(self) -> Path:
        """Measured seconds of single units, for estimates."""
        return self.work / "costs"

    def pictures(self, point: Point, subject: int) -> Path:
        """Reconstructions of a point and subject."""
        return self.reconstructions / point.name / subject_name(subject)

    def pictures_of(self, point: Point, subject: int, image_id: int) -> Path:
        """Reconstructions of one image."""
        return self.pictures(point, subject) / image_name(image_id)

    @property
    def originals(self) -> Path:
        """The pictures that were seen."""
        return self.reconstructions / ORIGINAL

    def original_of(self, image_id: int) -> Path:
        """The picture that was seen."""
        return self.originals / image_name(image_id)

    def judged(self, point: Point, subject: int) -> Path:
        """Metrics and features of a point's images, those of a bundle together."""
        return self.work / "judged" / self.protocol / point.name / subject_name(subject)

    @property
    def judged_originals(self) -> Path:
        """Features of the originals."""
        return self.work / "judged" / self.protocol / ORIGINAL

    def retrieval(self, point: Point, subject: int) -> Path:
        """Retrieval scores of a subject, for points with the decoding settings of ``point``."""
        return self._scores / "retrieval" / _with_settings(subject, point)

    def score(self, point: Point, subject: int) -> Path:
        """Scores of a point and subject."""
        return self._scores / point.name / subject_name(subject)

    def score_folders(self, point: Point, subject: int) -> list[Path]:
        """Return where all scores of a point and subject lie: those of its pictures, and of retrieval if there are."""
        own = self.score(point, subject)
        retrieval = [self.joined_retrieval(point, subject), self.retrieval(point, subject)]
        return [own, *[folder for folder in retrieval if folder.is_dir() and point.has_own_decoding][:1]]

    def joined_retrieval(self, point: Point, subject: int) -> Path:
        """Retrieval scores of one point of a joined run, whose points may have decoders of their own."""
        own = self.score(point, subject)
        return own.with_name(f"{own.name}-retrieval")


def _with_settings(subject: int, point: Point) -> str:
    """Return a subject's folder name, with the settings of a point's decoding where they differ from the recipe's."""
    reduced = decoding_settings(point)
    suffix = reduced.name.removeprefix(UNGUIDED)
    return subject_name(subject) + suffix


PICTURE = "picture.png"
PIXELS = "pixels.safetensors"  # beside pictures that were handed in as floats, which PNG would round
FEATURES = "features.safetensors"
ARRAYS = "arrays.safetensors"


def repeat_file(repeat: int) -> str:
    """Return the file name of one reconstruction."""
    return f"repeat-{repeat}.png"
