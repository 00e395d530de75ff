"""A container engine restarts whatever does not exit with 0: SL_QUEUE_FINAL_EXIT spares it what no restart fixes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sl_queue.errors import SlQueueError, TransportError
from workers.entry import FINAL_CODES, exiting

ROOT = Path(__file__).parents[2]


def every_code(error: type[SlQueueError] = SlQueueError) -> set[int]:
    return {error.exit_code}.union(*(every_code(child) for child in error.__subclasses__()))


def test_all_errors_but_those_of_the_broker_and_silent_peers_are_final() -> None:
    assert every_code() - FINAL_CODES == {0, TransportError.exit_code} and every_code() >= FINAL_CODES


@pytest.mark.parametrize("code", [0, 1, 75, 130, *sorted(FINAL_CODES)])
def test_only_final_codes_are_told_as_the_engine_needs_them(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def left_with() -> object:
        with pytest.raises(SystemExit) as end, exiting():
            raise SystemExit(code)
        return end.value.code

    monkeypatch.delenv("SL_QUEUE_FINAL_EXIT", raising=False)
    assert left_with() == code
    monkeypatch.setenv("SL_QUEUE_FINAL_EXIT", "0")
    assert left_with() == (0 if code in FINAL_CODES else code)


@pytest.mark.parametrize(("final", "code"), [(None, 2), ("0", 0)])
def test_a_worker_says_its_real_code_where_it_tells_another(final: str | None, code: int, tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SL_QUEUE_")}
    environ = {**kept, "PYTHONPATH": str(ROOT), **({} if final is None else {"SL_QUEUE_FINAL_EXIT": final})}
    command = [sys.executable, "-m", "workers.scheduler", "--job", "nowhere.toml", "--broker", "amqp://localhost"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == code and "error: " in done.stderr and "nowhere.toml" in done.stderr
    assert ("exit code 2, reported as 0" in done.stderr) == (final is not None)


def test_a_process_that_refuses_a_table_ends_with_the_same_code_every_time(tmp_path: Path) -> None:
    ragged = "id,x\n1,2\n2,3,4\n" + "".join(f"{i},1\n" for i in range(3, 2000)) + "9\n"
    (tmp_path / "rows.csv").write_text(ragged)
    program = (
        "import sys\nfrom pathlib import Path\nfrom sl_queue.data.csv_file import read\n"
        "sys.exit(2 if read(Path('rows.csv'), 'id', ['id', 'x'])[1] else 3)\n"
    )
    codes = [subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=False).returncode for _ in range(3)]
    assert codes == [2] * 3
