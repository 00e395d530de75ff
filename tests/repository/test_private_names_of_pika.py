"""The private names of pika that the transport uses or overrides: all there in the version that is installed."""

import ast
import inspect
from pathlib import Path

import pytest
from pika import BlockingConnection
from pika.connection import Connection

ROOT = Path(__file__).parents[2]
SOCKET = ROOT / "sl_queue" / "transport" / "rabbitmq" / "socket.py"
USED = {
    "_body_max_length",
    "_on_stream_connected",
    "_on_stream_terminated",
    "_output_marshaled_frames",
    "_process_frame",
    "_send_message",
    "_terminate_stream",
}
ADAPTER = {
    "_adapter_add_callback_threadsafe",
    "_adapter_call_later",
    "_adapter_connect_stream",
    "_adapter_disconnect_stream",
    "_adapter_emit_data",
    "_adapter_remove_timeout",
}


def own_names(tree: ast.AST) -> set[str]:
    """Return the private attributes of `self` that code reads, sets or calls."""
    attributes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith("_"))
    return {node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id == "self"}


PIKAS = own_names(ast.parse(inspect.getsource(Connection))) | set(vars(Connection))


@pytest.mark.parametrize("name", sorted(USED | ADAPTER))
def test_pikas_connection_still_has_it(name: str) -> None:
    assert name in PIKAS


def test_a_blocking_connection_still_holds_the_connection_that_knows_what_was_agreed() -> None:
    assert "_impl" in own_names(ast.parse(inspect.getsource(BlockingConnection)))
    assert "self.params" in inspect.getsource(Connection)


def test_our_connection_uses_no_other_private_name_of_pikas() -> None:
    (ours,) = (node for node in ast.parse(SOCKET.read_text()).body if getattr(node, "name", "") == "SocketConnection")
    methods = {node.name for node in ast.walk(ours) if isinstance(node, ast.FunctionDef) and node.name[:2] != "__"}
    assert (own_names(ours) | methods) & PIKAS <= USED | ADAPTER
