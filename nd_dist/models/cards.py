"""The model card of a decoder: what the Hugging Face Hub reads, what it predicts, how to load it. Pure text.

What a run says of data, protocol and metrics is ``nd_dist.report.evaluation_card``'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nd_dist.schema import TargetSpec

_FRONT = """\
---
library_name: nd_dist
pipeline_tag: image-to-image
tags: [fmri, brain-decoding, neuraldiffuser, nsd]
---

# NeuralDiffuser decoder

Predicts the embeddings of the picture that a person is looking at from z-scored fMRI betas; a guided Stable Diffusion
turns them into a picture.

| subject | voxels |
|---|---|
{voxels}

Targets: {targets}.

```python
from nd_dist import Decoder, NeuralDiffuserPipeline

pipe = NeuralDiffuserPipeline.from_pretrained("CompVis/stable-diffusion-v1-4")  # the model it was trained for
pipe.decoder = Decoder.from_pretrained("FOLDER_OR_NAME")
pipe(voxels, subject={subject}).images[0].save("reconstruction.png")
```

"""
_NO_RUN = "## Evaluation\n\nNo evaluation is recorded with this copy: data, protocol and metrics are unknown.\n"


def model_card(num_voxels: Mapping[int, int], targets: Sequence[TargetSpec], evaluation: str = "") -> str:
    """Return the card of a decoder.

    Args:
        num_voxels: Subject -> number of voxels.
        targets: What it predicts.
        evaluation: Sections about data, protocol and metrics; empty: the card says that there are none.
    """
    front = _FRONT.format(
        voxels="\n".join(f"| {subject} | {count} |" for subject, count in num_voxels.items()),
        targets=", ".join(f"`{spec.name}` {tuple(spec.shape)}" for spec in targets),
        subject=next(iter(num_voxels)),
    )
    return front + (evaluation or _NO_RUN)
