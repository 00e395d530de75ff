"""The same layers as one module in one process, as anybody would write it: the yardstick."""

import numpy as np
import torch
from torch import nn

from benchmarks.measure import Trace
from benchmarks.workloads import Fuse, Workload, features, labels, perceptron
from sl_queue import row_order


def train(workload: Workload, epochs: int, threads: int) -> list[Trace]:
    """Plain PyTorch on `threads` threads."""
    torch.set_num_threads(threads)
    columns = {party: torch.from_numpy(features(workload, party)) for party in workload.columns}
    targets = torch.from_numpy(labels(workload)).float()
    bases = {party: perceptron(workload.base_sizes(party), relu_at_the_end=True) for party in columns}
    fuse = Fuse(workload.fuse_sizes)
    modules = nn.ModuleList([*bases.values(), fuse])
    optimizer = torch.optim.Adam(modules.parameters(), lr=1e-3)
    trace, step = Trace("joined"), 0
    for epoch in range(epochs):
        order = row_order(workload.rows, 7, epoch)
        for first in range(0, workload.rows, workload.batch):
            rows = torch.from_numpy(np.ascontiguousarray(order[first : first + workload.batch]))
            output = fuse([base(columns[party][rows]) for party, base in bases.items()])
            loss = nn.functional.binary_cross_entropy_with_logits(output.squeeze(1), targets[rows])
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            trace.mark(step)
            step += 1
    return [trace]
