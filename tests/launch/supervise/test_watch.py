import io

from rich.console import Console

from launch.supervise.watch import Watcher


def test_a_stage_of_a_training_begins_with_one_line() -> None:
    text = io.StringIO()
    watcher = Watcher(Console(file=text, width=20, soft_wrap=True))
    watcher.show(
        {"event": "model", "stage": 1, "parameters": {"voxels.shared.subjects": 10**6, "heads.c.prior": 5 * 10**6}}
    )
    watcher.show(
        {"event": "first_batch", "stage": 1, "rows": 2, "voxels": {"1": [2, 67]}, "targets": {"c": [2, 24, 128]}}
    )
    watcher.show({"event": "progress", "task": "stage 1", "done": 9, "total": 9, "loss": 98.28})
    assert text.getvalue().splitlines() == ["  stage 1: 6.00 million parameters", "  stage 1: 9/9 loss 98.28"]
