"""The command's help: quick, and the same commands in the same order."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMANDS = ["demo", "check", "plan", "local", "status", "stop", "dead", "cleanup", "key", "provision", "chaos"]


def test_help_lists_the_commands_and_imports_neither_torch_nor_pika() -> None:
    program = (
        "import sys\n"
        "from sl_queue.cli.main import main\n"
        "sys.argv = ['sl-queue', '--help']\n"
        "try:\n    main()\n"
        "except SystemExit as left:\n    print('exit', left.code)\n"
        "print('loaded', [name for name in ('torch', 'pika', 'pyarrow', 'numpy') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    listed = [line.split()[0] for line in lines[lines.index("Commands:") + 1 :] if line.startswith("  ")]
    assert [name for name in listed if name in COMMANDS] == COMMANDS
    assert lines[-2:] == ["exit 0", "loaded []"]


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sl_queue.cli", "status", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "status [OPTIONS]" in done.stdout and "JOB" in done.stdout
