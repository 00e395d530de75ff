"""Imports of module:callable in a party file, from its own folder."""

import threading
from pathlib import Path

import pytest

from sl_queue.config.user_code import Importer
from sl_queue.errors import JobError
from tests.support.job_files import written


def test_a_callable_is_imported_from_the_folder_of_the_file(tmp_path: Path) -> None:
    written(tmp_path, "a_bank.py", "class Models:\n    def base():\n        return 1\n")
    assert Importer().within(tmp_path).load("a_bank:Models.base")() == 1
    assert Importer().within(None).load("os.path:join") is __import__("os").path.join


def test_modules_of_one_name_in_two_folders_are_two_modules(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
        written(folder, "two_layers.py", f"where = {folder.name!r}")
        written(folder, "two_models.py", "import two_layers\ndef where():\n    return two_layers.where\n")
        (folder / "two_packages").mkdir()
        written(folder / "two_packages", "models.py", f"def where():\n    return {folder.name!r}\n")
    importer = Importer()
    for name in ("two_models:where", "two_packages.models:where"):
        found = [importer.within(folder).load(name) for folder in folders]
        assert [function() for function in found] == ["first", "second"]
        assert importer.within(folders[0]).load(name) is found[0]


def test_threads_that_import_at_once_get_their_own_modules(tmp_path: Path) -> None:
    folders = [tmp_path / f"party_{i}" for i in range(8)]
    for folder in folders:
        folder.mkdir()
        written(folder, "at_once.py", f"def where():\n    return {folder.name!r}\n")
    importer, found = Importer(), dict[Path, str]()
    threads = [
        threading.Thread(target=lambda f=folder: found.update({f: importer.within(f).load("at_once:where")()}))
        for folder in folders
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {folder: folder.name for folder in folders}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("no_such_module:f", "there is no module 'no_such_module' in "),
        ("broken_syntax:f", "importing 'broken_syntax' from .* fails: SyntaxError"),
        ("broken_import:f", "importing 'broken_import' from .* fails: No module named 'no_such_library'"),
        ("a_few:rowz", "there is no 'rowz' in .*did you mean 'rows'?"),
        ("a_few:number", "is of type int; it must be callable"),
        ("a_few", "is not of the form module:callable"),
        ("a_few:", "is not of the form"),
        ("queue:f", "Python already knows another module 'queue'"),
    ],
)
def test_what_cannot_be_imported_is_explained(tmp_path: Path, name: str, expected: str) -> None:
    written(tmp_path, "broken_syntax.py", "def f(:\n")
    written(tmp_path, "broken_import.py", "import no_such_library\n")
    written(tmp_path, "a_few.py", "number = 3\ndef rows():\n    pass\n")
    written(tmp_path, "queue.py", "def f():\n    pass\n")
    with pytest.raises(JobError, match=expected) as raised:
        Importer().within(tmp_path).load(name)
    assert repr(name) in str(raised.value)


def test_another_importer_of_this_process_knows_the_folders_of_the_first(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("earlier", "later")]
    for folder in folders:
        folder.mkdir()
        written(folder, "twice_run.py", f"def where():\n    return {folder.name!r}\n")
    found = [Importer().within(folder).load("twice_run:where")() for folder in (*folders, *folders)]
    assert found == ["earlier", "later", "earlier", "later"]
