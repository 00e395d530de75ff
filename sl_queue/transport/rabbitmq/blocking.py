"""A connection that blocks, for a person's commands. Why none can be made is said in the words of the workers."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pika
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.exceptions import AMQPError

from sl_queue.errors import BrokerUnreachable
from sl_queue.transport.rabbitmq.address import Address
from sl_queue.transport.rabbitmq.connection import Connection
from sl_queue.transport.rabbitmq.failures import Denied, Lost, why_not


def connect(nodes: Sequence[Address], name: str, whose: str = "") -> pika.BlockingConnection:
    """Log in at the first node that has us. Raises BrokerUnreachable, which names the last one."""
    failed = ""
    for node in nodes:
        try:
            _reach_apart(node, name)  # pika's own does not say what it is that does not speak AMQP
            return pika.BlockingConnection(node.parameters(name))
        except (Lost, Denied) as error:
            failed = str(error)
        except (AMQPError, AMQPConnectorException, OSError) as error:
            failed = str(why_not(error, node))
    raise BrokerUnreachable(f"the broker at {nodes[-1]} cannot be used{whose}: {failed}")


def _reach_apart(node: Address, name: str) -> None:
    """Connect and leave, in a thread of its own: a notebook runs an event loop in this one."""
    with ThreadPoolExecutor(1) as apart:
        apart.submit(lambda: asyncio.run(_reach(node, name))).result()


async def _reach(node: Address, name: str) -> None:
    connection = Connection(node, name)
    await connection.open()
    await connection.close()
