"""What the model card of a decoder says of its evaluation: data, protocol, metrics, provenance. Pure text."""

from __future__ import annotations

from pathlib import Path

from nd_dist.report.facts import protocol_facts, provenance_facts, selection_sentence
from nd_dist.report.findings import Findings
from nd_dist.report.table_files import main_table
from nd_dist.schema import TARGETS

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
    protocol = protocol_facts(metrics.get("protocol_details", {}))
    sections = {
        "Data": "\n\n".join(data),
        "Protocol": _table(protocol),
        "Metrics": "\n\n".join(filter(None, [main_table(findings), selection_sentence(findings)])),
        "Provenance": _table(provenance_facts(metrics["provenance"])),
    }
    return "\n".join(f"## {title}\n\n{text.strip()}\n" for title, text in sections.items())


def _table(facts: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts)])
