"""The same split written by hand over torch.distributed: sockets between the parties, lock-step, no recovery."""

import os
import socket

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.measure import Trace
from benchmarks.processes import Work, together
from benchmarks.workloads import LABEL, Fuse, Workload, features, labels, perceptron
from sl_queue import row_order

HOST = "127.0.0.1"


def train(workload: Workload, epochs: int, timeout_s: float) -> list[Trace]:
    """Train in one process for each party, one thread each."""
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    ranks = [LABEL, *workload.feature_parties]
    works: dict[str, Work] = {
        party: (_label if party == LABEL else _feature, (workload, epochs, party, rank, len(ranks), port))
        for rank, party in enumerate(ranks)
    }
    return list(together(works, timeout_s).values())


def _join(rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"tcp://{HOST}:{port}", rank=rank, world_size=world)


def _feature(workload: Workload, epochs: int, party: str, rank: int, world: int, port: int) -> Trace:
    _join(rank, world, port)
    columns = torch.from_numpy(features(workload, party))
    base = perceptron(workload.base_sizes(party), relu_at_the_end=True)
    optimizer = torch.optim.Adam(base.parameters(), lr=1e-3)
    trace, step = Trace(party), 0
    for epoch in range(epochs):
        order = torch.from_numpy(row_order(workload.rows, 7, epoch))
        for first in range(0, workload.rows, workload.batch):
            activation: Tensor = base(columns[order[first : first + workload.batch]])
            dist.send(activation.detach(), 0)
            trace.sent_bytes += activation.nbytes
            gradient = torch.empty_like(activation)
            with trace.waiting():
                dist.recv(gradient, 0)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(activation, gradient)
            optimizer.step()
            trace.mark(step)
            step += 1
    dist.destroy_process_group()
    return trace


def _label(workload: Workload, epochs: int, party: str, rank: int, world: int, port: int) -> Trace:
    _join(rank, world, port)
    fuse = Fuse(workload.fuse_sizes)
    modules = nn.ModuleList([fuse])
    own, columns = None, None
    if LABEL in workload.columns:
        own, columns = perceptron(workload.base_sizes(LABEL), True), torch.from_numpy(features(workload, LABEL))
        modules.append(own)
    targets = torch.from_numpy(labels(workload)).float()
    optimizer = torch.optim.Adam(modules.parameters(), lr=1e-3)
    trace, step = Trace(party), 0
    for epoch in range(epochs):
        order = torch.from_numpy(row_order(workload.rows, 7, epoch))
        for first in range(0, workload.rows, workload.batch):
            rows = order[first : first + workload.batch]
            arrived = [torch.empty(len(rows), workload.cut) for _ in range(1, world)]
            for source, activation in enumerate(arrived, start=1):
                with trace.waiting():
                    dist.recv(activation, source)
                activation.requires_grad_()
            inputs = arrived if own is None or columns is None else [*arrived, own(columns[rows])]
            loss = nn.functional.binary_cross_entropy_with_logits(fuse(inputs).squeeze(1), targets[rows])
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            for target, activation in enumerate(arrived, start=1):
                assert activation.grad is not None
                dist.send(activation.grad, target)
                trace.sent_bytes += activation.nbytes
            optimizer.step()
            trace.mark(step)
            step += 1
    dist.destroy_process_group()
    return trace
