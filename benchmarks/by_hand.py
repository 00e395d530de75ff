"""The same split written by hand, without recovery, over sockets or over the broker.

Sockets: torch.distributed. The broker: librabbitmq, its C client, which asks for no confirms and whose calls let go of
the interpreter. So it says how fast these models can be over this broker, whatever a library does.
"""

import os
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.c_client import OverBroker
from benchmarks.measure import Trace
from benchmarks.processes import Work, together
from benchmarks.workloads import LABEL, Fuse, Workload, features, labels, perceptron
from sl_queue import row_order

HOST = "127.0.0.1"


class Peers(Protocol):
    """Whom a party exchanges tensors with."""

    def send(self, tensor: Tensor, peer: str) -> None: ...
    def receive(self, into: Tensor, peer: str) -> None: ...
    def close(self) -> None: ...


Connect = Callable[[], Peers]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Order in which feature parties work."""

    micro_batches: int = 1  # of a step: all their activations are sent before the first gradient is waited for
    ahead: int = 0  # steps that are under way before a gradient is waited for


class Sockets:
    """A process group of torch.distributed over gloo."""

    def __init__(self, party: str, parties: Sequence[str], port: int) -> None:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        self._ranks = {name: rank for rank, name in enumerate(parties)}
        where = f"tcp://{HOST}:{port}"
        dist.init_process_group("gloo", init_method=where, rank=self._ranks[party], world_size=len(parties))

    def send(self, tensor: Tensor, peer: str) -> None:
        dist.send(tensor, self._ranks[peer])

    def receive(self, into: Tensor, peer: str) -> None:
        dist.recv(into, self._ranks[peer])

    def close(self) -> None:
        dist.destroy_process_group()


def over_sockets(workload: Workload, epochs: int, timeout_s: float) -> list[Trace]:
    """Train in one process for each party, one thread each, in lock-step."""
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    parties = [LABEL, *workload.feature_parties]
    connects: dict[str, Connect] = {party: partial(Sockets, party, parties, port) for party in parties}
    return _train(workload, epochs, Schedule(), connects, timeout_s)


def over_broker(
    workload: Workload, epochs: int, how: Schedule, url: str, library: Path, timeout_s: float
) -> list[Trace]:
    """Train in one process for each party, one thread each."""
    others = workload.feature_parties
    connects: dict[str, Connect] = {party: partial(OverBroker, party, [LABEL], url, library) for party in others}
    connects[LABEL] = partial(OverBroker, LABEL, others, url, library)
    return _train(workload, epochs, how, connects, timeout_s)


def _train(
    workload: Workload, epochs: int, how: Schedule, connects: Mapping[str, Connect], timeout_s: float
) -> list[Trace]:
    works: dict[str, Work] = {
        party: (_label, (workload, epochs, connect, how))
        if party == LABEL
        else (_feature, (workload, epochs, party, connect, how))
        for party, connect in connects.items()
    }
    return list(together(works, timeout_s).values())


def _feature(workload: Workload, epochs: int, party: str, connect: Connect, how: Schedule) -> Trace:
    torch.set_num_threads(1)
    peers = connect()
    columns = torch.from_numpy(features(workload, party))
    base = perceptron(workload.base_sizes(party), relu_at_the_end=True)
    optimizer = torch.optim.Adam(base.parameters(), lr=1e-3)
    trace, step = Trace(party), 0
    flight: deque[list[Tensor]] = deque()  # the activations of a step

    def settle() -> None:
        optimizer.zero_grad(set_to_none=True)
        for activation in flight.popleft():
            gradient = torch.empty_like(activation)
            with trace.waiting():
                peers.receive(gradient, LABEL)
            torch.autograd.backward(activation, gradient)
        optimizer.step()

    for epoch in range(epochs):
        order = torch.from_numpy(row_order(workload.rows, 7, epoch))
        for first in range(0, workload.rows, workload.batch):
            flight.append([])
            for rows in order[first : first + workload.batch].tensor_split(how.micro_batches):
                activation: Tensor = base(columns[rows])
                peers.send(activation.detach(), LABEL)
                trace.sent_bytes += activation.nbytes
                flight[-1].append(activation)
            if len(flight) > how.ahead:
                settle()
            trace.mark(step)
            step += 1
    while flight:
        settle()
    peers.close()
    return trace


def _label(workload: Workload, epochs: int, connect: Connect, how: Schedule) -> Trace:
    torch.set_num_threads(1)
    peers = connect()
    fuse = Fuse(workload.fuse_sizes)
    modules = nn.ModuleList([fuse])
    own, columns = None, None
    if LABEL in workload.columns:
        own, columns = perceptron(workload.base_sizes(LABEL), True), torch.from_numpy(features(workload, LABEL))
        modules.append(own)
    targets = torch.from_numpy(labels(workload)).float()
    optimizer = torch.optim.Adam(modules.parameters(), lr=1e-3)
    trace, step = Trace(LABEL), 0
    for epoch in range(epochs):
        order = torch.from_numpy(row_order(workload.rows, 7, epoch))
        for first in range(0, workload.rows, workload.batch):
            optimizer.zero_grad(set_to_none=True)
            batch = order[first : first + workload.batch]
            for rows in batch.tensor_split(how.micro_batches):
                arrived = {party: torch.empty(len(rows), workload.cut) for party in workload.feature_parties}
                for party, activation in arrived.items():
                    with trace.waiting():
                        peers.receive(activation, party)
                    activation.requires_grad_()
                inputs = list(arrived.values())
                if own is not None and columns is not None:
                    inputs.append(own(columns[rows]))
                loss = nn.functional.binary_cross_entropy_with_logits(fuse(inputs).squeeze(1), targets[rows])
                torch.autograd.backward(loss * (len(rows) / len(batch)))
                for party, activation in arrived.items():
                    assert activation.grad is not None
                    peers.send(activation.grad, party)
                    trace.sent_bytes += activation.nbytes
            optimizer.step()
            trace.mark(step)
            step += 1
    peers.close()
    return trace
