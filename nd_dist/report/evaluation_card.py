"""What the model card of a decoder says of its evaluation: data, protocol, metrics, provenance. Pure text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nd_dist.files import canonical_json
from nd_dist.report.findings import Findings
from nd_dist.report.table_files import main_table
from nd_dist.report.tables import selection_sentence
from nd_dist.schema import TARGETS

_PROVENANCE = ("code", "config_hash", "shards", "decoding", "networks", "judges", "bootstrap")
_DATA = {
    True: "Simulated data (a phantom NSD), not human brains: the metrics cannot be compared with published ones.",
    False: "Measured data.",
    None: "The shards do not say whether the data are simulated.",
}


def evaluation_card(run_dir: str | Path) -> str:
    """Return the sections of an evaluated run, for ``Decoder.save_pretrained`` and ``push_to_hub``.

    Args:
        run_dir: Folder of a run that has metrics.json.

    Raises:
        DataError: the run has not been evaluated.
    """
    findings = Findings(Path(run_dir))
    config, metrics = findings.config, findings.metrics
    subjects, training = config["data"]["subjects"], config["training"]
    images = {subject: len(ids) for subject, ids in metrics["images"].items()}
    data = [
        _DATA[metrics.get("simulated")],
        f"Betas `{config['data']['betas']}`, ROI `{config['data']['roi']}`, z-scored by "
        f"`{config['data']['normalization']}`. Stages {list(training['stages'])} of training with target subject "
        f"{training['target_subject']}; subjects {subjects}; targets {len(training['targets'])} of {len(TARGETS)}.",
        f"Evaluated on the {metrics.get('split', 'test')} images: "
        + ", ".join(f"subject {subject}: {count}" for subject, count in images.items())
        + ".",
        *(f"Departure: {departure}." for departure in metrics.get("departures", ())),
    ]
    protocol = {"protocol": metrics["protocol"], **metrics.get("protocol_details", {})}
    sections = {
        "Data": "\n\n".join(data),
        "Protocol": _table(protocol),
        "Metrics": "\n\n".join(filter(None, [main_table(findings), selection_sentence(findings)])),
        "Provenance": _table({key: metrics["provenance"].get(key) for key in _PROVENANCE}),
    }
    return "\n".join(f"## {title}\n\n{text.strip()}\n" for title, text in sections.items())


def _table(facts: Mapping[str, object]) -> str:
    """Return facts of JSON, those that are known, as rows of a table."""
    known = ((name, value) for name, value in facts.items() if value not in (None, "", [], {}))
    lines = (f"| {name} | {value if isinstance(value, str) else canonical_json(value)} |" for name, value in known)
    return "\n".join(["| | |", "|---|---|", *lines])
