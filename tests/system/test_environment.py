"""A wrong environment variable is one line that names it, and exit code 2, before anything starts."""

import os
import re
import signal
import subprocess
import sys

import pytest

from sl_queue.config.environment import FINAL_EXIT, LOG, METRICS, THREADS, VARIABLES, check
from sl_queue.errors import JobError
from tests.support.sources import ROOT, modules, source_of

WORKERS = ("workers.scheduler", "workers.feature_party", "workers.label_holder")

WRONG = [
    ("SL_QUEUE_THREADS", "abc"),
    ("SL_QUEUE_THREADS", "-1"),
    ("SL_QUEUE_THREADS", "1.5"),
    ("SL_QUEUE_THREADS", "1000000"),
    ("SL_QUEUE_THREADS", "١٢"),
    ("SL_QUEUE_LOG", "basic_format"),
    ("SL_QUEUE_LOG", "trace"),
    ("SL_QUEUE_LOG", "10"),
    ("SL_QUEUE_LOG", "notset"),
    ("SL_QUEUE_METRICS_PORT", "http"),
    ("SL_QUEUE_METRICS_PORT", "0"),
    ("SL_QUEUE_METRICS_PORT", "99999"),
    ("SL_QUEUE_METRICS_PORT", "127.0.0.1:"),
    ("SL_QUEUE_METRICS_PORT", "a b:9108"),
    ("SL_QUEUE_FINAL_EXIT", "abc"),
    ("SL_QUEUE_FINAL_EXIT", "256"),
    ("SL_QUEUE_FINAL_EXIT", "-1"),
    ("SL_QUEUE_PARENT", "init"),
]


def run(*words: str, **changes: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SL_QUEUE_")}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=ROOT, env={**kept, **changes}, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(("name", "text"), WRONG)
def test_a_wrong_value_is_named_with_what_is_allowed(name: str, text: str) -> None:
    allowed = next(variable.allowed for variable in VARIABLES if variable.name == name)
    with pytest.raises(JobError) as error:
        check({name: text})
    assert str(error.value) == f"{name} = {text!r}; it must be {allowed}"


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(JobError, match=r"(?s)SL_QUEUE_THREADS.*\n  SL_QUEUE_LOG.*\n  SL_QUEUE_FINAL_EXIT"):
        check({"SL_QUEUE_LOG": "loud", "SL_QUEUE_THREADS": "many", "SL_QUEUE_FINAL_EXIT": "x"})


def test_what_is_right_is_read_and_nothing_is_the_default() -> None:
    environ = {"SL_QUEUE_THREADS": " 2 ", "SL_QUEUE_LOG": "DEBUG", "SL_QUEUE_METRICS_PORT": "[::1]:9108"}
    assert [variable.read(environ) for variable in (THREADS, LOG, METRICS, FINAL_EXIT)] == [
        2,
        "debug",
        "[::1]:9108",
        None,
    ]
    empty = {variable.name: "" for variable in VARIABLES}
    for environ in ({}, empty):
        assert [variable.read(environ) for variable in (THREADS, LOG, METRICS, FINAL_EXIT)] == [0, "info", None, None]
        check(environ)


def test_every_variable_is_declared_in_one_file_with_its_meaning() -> None:
    elsewhere = [
        (str(path.relative_to(ROOT)), text)
        for path in modules("sl_queue", "workers")
        if path.name != "environment.py" and "SL_QUEUE_" in path.read_text()
        for _, text in source_of(path).strings
        if re.fullmatch(r"SL_QUEUE_[A-Z_]+", text)
    ]
    assert elsewhere == []
    assert [variable.name for variable in VARIABLES if not variable.meaning or not variable.allowed] == []
    assert len({variable.name for variable in VARIABLES}) == len(VARIABLES) >= 10


def test_what_the_product_reads_by_name_is_the_system_s() -> None:
    """A variable read through os.environ by a name in the code belongs to someone else: PATH, LANG."""
    pattern = re.compile(r"""environ(?:\.get\(|\[)["']?(\w+)(?![\w."']*\] = )|getenv\(["']?(\w+)""")
    found = {
        match.group(1) or match.group(2)
        for path in modules("sl_queue", "workers")
        if path.name != "environment.py"
        for match in pattern.finditer(path.read_text())
    }
    assert found <= {"PATH", "name"}  # `name` is one of a tuple of the system's


@pytest.mark.parametrize(
    ("module", "final"), [*((module, {}) for module in WORKERS), (WORKERS[0], {"SL_QUEUE_FINAL_EXIT": "7"})]
)
def test_a_worker_says_it_in_one_line_and_exits_with_2_or_what_stands_for_it(
    module: str, final: dict[str, str]
) -> None:
    done = run("-m", module, "--job", "nowhere.toml", SL_QUEUE_LOG="trace", **final)
    assert done.returncode == int(final.get("SL_QUEUE_FINAL_EXIT", "2"))
    assert done.stderr.splitlines()[0].startswith("error: SL_QUEUE_LOG = 'trace'; it must be debug, info, ")
    assert len(done.stderr.splitlines()) == 1 + len(final)


def test_a_final_exit_code_that_is_none_is_told_and_not_used() -> None:
    done = run("-m", "workers.scheduler", "--job", "nowhere.toml", SL_QUEUE_FINAL_EXIT="ok")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "SL_QUEUE_FINAL_EXIT = 'ok'" in done.stderr


def test_the_health_check_says_it_too() -> None:
    done = run("-m", "workers.health", SL_QUEUE_METRICS_PORT="http")
    assert (done.returncode, "SL_QUEUE_METRICS_PORT = 'http'" in done.stderr) == (2, True)


def test_a_worker_with_keys_leaves_no_core_dump() -> None:
    program = (
        "import ctypes, os, resource, signal\n"
        "from workers.entry import leave_no_core\n"
        "leave_no_core()\n"
        "print(resource.getrlimit(resource.RLIMIT_CORE), ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), flush=True)\n"
        "signal.signal(signal.SIGQUIT, signal.SIG_DFL)\n"  # whoever starts the suite in the background ignores it
        "os.kill(os.getpid(), signal.SIGQUIT)\n"
    )
    done = run("-c", program)
    assert done.stdout == "(0, 0) 0\n"
    assert done.returncode == -signal.SIGQUIT
