import subprocess
import sys

from launch.console import aligned


def test_texts_and_rows_of_tables_are_one_line_each_in_a_pipe_and_are_not_taken_for_markup() -> None:
    code = (
        "from rich.table import Table\nfrom launch.console import make_console\n"
        "console = make_console()\nconsole.print('x ' * 300 + '[red]:smile: 17')\n"
        "table = Table('a', 'b')\ntable.add_row('[red]', 'y ' * 300)\nconsole.print(table, soft_wrap=False)\n"
    )
    words = [sys.executable, "-c", code]
    environ = {"COLUMNS": "40", "PYTHONPATH": ":".join(sys.path)}
    text = subprocess.run(words, capture_output=True, text=True, check=True, env=environ).stdout
    lines = text.splitlines()
    assert lines[0] == "x " * 300 + "[red]:smile: 17"
    assert ["[red]" in line and "y " * 300 in line for line in lines[1:]].count(True) == 1


def test_columns_stand_below_each_other_and_lines_end_with_their_last_word() -> None:
    assert aligned([("a", "bb", ""), ("ccc", "d", "e")]) == "  a    bb\n  ccc  d   e"
