"""Measures a folder set of phantom networks and writes their cards: the figures are those of the weights in it.

python -m shards.phantom.networks.measure             # the networks that come with the package; prints the figures
python -m shards.phantom.networks.measure FOLDERS     # those of another folder set
python -m shards.phantom.networks.measure --write     # the cards, too
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from transformers import CLIPTokenizer

from nd_dist.files import write_text
from nd_dist.frozen.folders import SHIPPED_PREFIX, resolve_folder
from shards.phantom.networks.cards import cards_of
from shards.phantom.networks.folders import STABLE_DIFFUSION, read_folders
from shards.phantom.networks.history import read_history


def measure(folder: Path, write: bool) -> dict[str, dict[str, float]]:
    """Measure all networks of a folder set; return the figures by card, and write the cards where wanted.

    Raises:
        CheckpointError: a network is missing.
        DataError: the folder set does not say how it was trained.
    """
    networks = read_folders(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder / STABLE_DIFFUSION / "tokenizer", local_files_only=True)
    cards = cards_of(networks, tokenizer, read_history(folder))
    for card in cards if write else ():
        write_text(folder / card.folder / "README.md", card.render())
    return {card.folder: card.figures for card in cards}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program (see the module's docstring)."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m shards.phantom.networks.measure", description=__doc__, formatter_class=formatter
    )
    parser.add_argument("folders", type=Path, nargs="?", default=resolve_folder(SHIPPED_PREFIX), help="folder set")
    parser.add_argument("--write", action="store_true", help="write the cards")
    options = parser.parse_args(arguments)
    torch.use_deterministic_algorithms(True)
    console = Console(soft_wrap=True)
    for folder, figures in measure(options.folders, options.write).items():
        for name, value in figures.items():
            console.print(f"{folder}: {name}: {value:.3f}", highlight=False, markup=False)


if __name__ == "__main__":
    main()
