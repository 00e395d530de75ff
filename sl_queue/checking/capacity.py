"""Load that a job puts on its broker, and the load that one node carries. Pure.

What a message, a byte and a connection cost was measured by `python -m benchmarks scale` with RabbitMQ 3.10 on two
cores that others used as well: benchmarks/results/scale.md has the figures, and how far the law is from them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

from sl_queue.config.job import Job
from sl_queue.protocol.schedule.row_order import Batches
from sl_queue.protocol.text import counted

HEADER_BYTES = 80  # of a message beside its tensor
GIB = 1024**3
LEAST_STEPS = 1  # between two commits


@dataclass(frozen=True, slots=True)
class Node:
    """A broker node, by default the one that was measured: costs in seconds of one core."""

    message_s: float = 0.17e-3
    byte_s: float = 1.1e-9
    connection_s: float = 1.1e-3  # each second, of an idle worker
    idle_s: float = 12e-3  # each second, by itself
    cores: int = 2
    busy: float = 0.7  # share of its cores that may be in use for long: beyond it, messages queue up
    connection_bytes: float = 4.8e6  # of memory, with its channels and queues
    files_of_party: float = 3.0
    files: int = 1024  # that a process may have open where nothing raises the limit
    memory_bytes: float = 0.4 * 8 * GIB  # at which RabbitMQ 3 stops whoever publishes, on a machine with 8 GiB
    channels: int = 2047  # of one connection, by default
    link_bytes_s: float = 1e9 / 8  # each way, of a usual machine


MEASURED = Node()
LABEL_MESSAGE_S = 0.22e-3  # processor seconds of the label holder for one message, whatever its models compute
LABEL_BYTE_S = 1.5e-9


@dataclass(frozen=True, slots=True)
class Load:
    """The load that a job puts on its broker and its label holder."""

    parties: int  # feature parties
    channels: int  # of the label holder's connection
    messages: int  # of a step: activations and gradients
    bytes: float  # of a step
    stretch: int  # steps between two commits
    depth: int
    ahead: bool  # whether forwards run ahead of updates
    micro_batches: int

    @property
    def window_bytes(self) -> float:
        """Bytes that lie at the broker until they are acknowledged, at most: a message is kept up to its commit."""
        return self.bytes * (self.stretch + self.depth / self.micro_batches)

    @property
    def queues(self) -> int:
        """Queues that carry tensors: one each way for each feature party."""
        return 2 * self.parties

    @property
    def label_s(self) -> float:
        """Processor seconds that the label holder takes for the messages of a step; its models come on top."""
        return self.messages * LABEL_MESSAGE_S + self.bytes * LABEL_BYTE_S

    def broker_s(self, node: Node = MEASURED) -> float:
        """Processor seconds that a broker takes for a step, idle connections left out."""
        return self.messages * node.message_s + self.bytes * node.byte_s

    def step_s(self, base_s: float, fuse_s: float) -> float:
        """Return a step's time by what its parties compute in it, over links without delay."""
        label_s = fuse_s + self.label_s
        return max(base_s, label_s) if self.ahead else base_s + label_s

    def cores(self, step_s: float, node: Node = MEASURED) -> float:
        """Return the cores of broker nodes in use at that pace."""
        return self.broker_s(node) / step_s + (self.parties + 2) * node.connection_s + node.idle_s

    @property
    def files(self) -> float:
        """Files that a broker has open for this job."""
        return self.parties * MEASURED.files_of_party


def load_of(job: Job, batches: Batches, dtypes: Mapping[str, str]) -> Load:
    """Return the load of a job; `dtypes` are those that base models compute in, float32 where it is not known."""
    sizes, wire = batches.sizes(0), job.on_the_wire
    one_way = sum(
        wire.bytes_of(dtypes.get(name, "float32"), (rows, *(job.cut(name) or ()))) + HEADER_BYTES
        for name in job.feature_parties
        for rows in sizes
    )
    return Load(
        parties=len(job.feature_parties),
        channels=len(job.topology().senders_to(job.label_holder)) + 2,  # to publish, and to declare queues
        messages=2 * len(job.feature_parties) * len(sizes),
        bytes=2.0 * one_way,
        stretch=min(job.pipeline.checkpoint_every, batches.steps_per_epoch),
        depth=job.pipeline.depth,
        ahead=job.pipeline.staleness > 0,
        micro_batches=len(sizes),
    )


def described(load: Load, step_s: float | None, node: Node = MEASURED) -> str:
    """Say what a step asks of the broker, at that pace if it is known."""
    step = (
        f"a step is {load.messages} messages and {load.bytes / 1e6:.3g} MB: at least {1e3 * load.label_s:.3g} ms of "
        f"the label holder, {1e3 * load.bytes / 2 / node.link_bytes_s:.3g} ms of its link if that has 1 Gbit/s, and "
        f"{1e3 * load.broker_s(node):.3g} ms of a core of the broker; {load.window_bytes / 1e6:,.3g} MB lie there "
        "until a commit"
    )
    if step_s is None:
        return step
    return (
        f"{step}; at the pace of these models, {1e3 * step_s:.3g} ms a step, that is {load.messages / step_s:,.0f} "
        f"messages/s, {8e-6 * load.bytes / step_s:,.3g} Mbit/s and {load.cores(step_s, node):.2g} cores of the broker"
    )


def objections(load: Load, step_s: float | None, node: Node = MEASURED) -> Iterator[str]:
    """Yield what one node cannot carry, each with figures and the remedy; `step_s` is the pace, if it is known."""
    pace = iter(()) if step_s is None else _about_pace(load, step_s, node)
    yield from chain(_about_memory(load, node), pace, _about_size(load, node))


def _about_memory(load: Load, node: Node) -> Iterator[str]:
    """Compare what lies at the broker until a commit with the memory that its connections leave."""
    taken = (load.parties + 2) * node.connection_bytes
    left = node.memory_bytes - taken
    limit = f"a node with 8 GiB stops its senders at {node.memory_bytes / GIB:.2g} GiB"
    if left <= 0:
        yield (
            f"{load.parties + 2:,} connections with their queues take about {taken / GIB:,.3g} GiB, and {limit}: use "
            "nodes with more memory, a cluster, or fewer parties for each broker"
        )
    elif load.window_bytes > left:
        steps = int(left / load.bytes - load.depth / load.micro_batches)
        lower = f"checkpoint_every = {steps} fits; or use " if steps >= LEAST_STEPS else "use "
        yield (
            f"up to {load.window_bytes / GIB:,.3g} GiB lie unacknowledged until a commit, "
            f"{load.window_bytes / load.queues / GIB:,.3g} GiB in each of {load.queues} queues, and {limit}, of which "
            f'{load.parties + 2:,} connections take {taken / GIB:.2g}: {lower}[wire] dtype = "float16", a smaller cut '
            "or batch, or nodes with more memory"
        )


def _about_pace(load: Load, step_s: float, node: Node) -> Iterator[str]:
    """Compare cores in use at that pace with those that a node may use for long."""
    cores, most = load.cores(step_s, node), node.busy * node.cores
    if cores <= most:
        return
    by_message = load.messages * node.message_s >= load.bytes * node.byte_s
    if load.broker_s(node) / step_s <= cores / 2:
        remedy = "fewer parties for each broker"
    elif by_message and load.micro_batches > 1:
        remedy = "fewer micro_batches"
    elif by_message:
        remedy = "a larger batch_size"
    else:
        remedy = '[wire] dtype = "float16", a smaller cut'
    behind = "" if load.ahead else "; with staleness = 1 the parties compute while the broker is behind"
    yield (
        f"at {1e3 * step_s:.3g} ms a step {load.messages / step_s:,.0f} messages/s and "
        f"{8e-6 * load.bytes / step_s:,.3g} Mbit/s take about {cores:.2g} cores, and a node of {node.cores} carries "
        f"{most:.2g} for long: use {remedy}, or a cluster of {_nodes(cores, most)} nodes{behind}"
    )


def _nodes(cores: float, most: float) -> int:
    return max(2, -int(-cores // most))


def _about_size(load: Load, node: Node) -> Iterator[str]:
    if load.files > node.files:
        yield (
            f"{counted(load.parties, 'feature party has', 'feature parties have')} about {load.files:,.0f} "
            f"files and sockets open at the broker, and {node.files:,} is a usual limit of a process: raise it "
            "(LimitNOFILE under systemd, ulimit -n elsewhere)"
        )
    if load.channels > node.channels:
        yield (
            f"the label holder needs {load.channels:,} channels in its connection, and a broker allows "
            f"{node.channels:,} by default: set channel_max = {load.channels} or more in its rabbitmq.conf"
        )
