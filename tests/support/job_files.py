"""Job and party files as they are documented, and what is said of wrong ones."""

from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest

from sl_queue.config.job import Job, PartyFile
from sl_queue.config.resolve import agree
from sl_queue.errors import JobError

JOB_TOML = """
name = "credit"
seed = 7
epochs = 20
batch_size = 512                  # rows per optimizer step
holdout = 0.2                     # share of rows kept for evaluation, chosen by hash, the same at every party; default 0
shuffle = true                    # false: canonical order in every epoch
drop_last = false                 # a short last batch is trained on, with uneven micro-batches

[parties.bank]                    # order here is the order of the fuse model's inputs
role = "feature"
cut = [32]                        # shape of one row's activation at the cut layer

[parties.insurer]
role = "label"                    # exactly one label holder
cut = [16]                        # only if the label holder has a base model of its own; it is fused in place, not sent

[fuse]
aggregation = "list"              # list: fuse(inputs) gets a list of tensors; concat | sum | mean: one tensor

[pipeline]                        # all optional
micro_batches = 4
depth = 4                         # default: micro_batches
staleness = 0
checkpoint_every = 50             # steps

[broker]                          # optional
persistent = false                # true: the broker writes messages to disk
patience = 60.0                   # seconds of silence after which a waiting worker names whom it waits for
"""  # noqa: E501 - as it is documented

BANK_TOML = """
party = "bank"
broker = "amqps://bank@broker:5671/credit"        # or memory://; --broker and SL_QUEUE_BROKER override it
state = "state/bank"                              # checkpoints and final weights; --state overrides it

[data]
path = "bank.parquet"                             # .csv or .parquet
id = "customer_id"
features = ["age", "income"]                      # default: every column but id and label
# or: source = "bank:rows"                        # a callable returning sl_queue.Rows, for images, text, anything

[base]
model = "bank:BaseModel"                          # module:callable returning an nn.Module
args = { input_dim = 2, hidden_dim = 32 }
optimizer = { name = "adam", lr = 1e-3 }          # any torch.optim class, by its name in lower case
"""

INSURER_TOML = """
party = "insurer"

[data]
path = "insurer.csv"
id = "customer_id"
label = "defaulted"

[base]
model = "insurer:BaseModel"
optimizer = { name = "adam", lr = 1e-3 }

[fuse]
model = "insurer:FuseModel"
args = { input_dim = 48, output_dim = 1 }
optimizer = { name = "adam", lr = 1e-3 }
loss = "bce_with_logits"                          # cross_entropy, mse, or module:callable
metrics = ["auroc", "accuracy"]
"""

PARTIES: dict[str, Any] = {"bank": {"role": "feature", "cut": [32]}, "insurer": {"role": "label", "cut": [16]}}
KEYS_OF = [b64encode(bytes([number]) * 32).decode() for number in range(5)]
SEALING: dict[str, dict[str, str]] = {
    "bank": {"seal": KEYS_OF[0]},
    "insurer": {"seal": KEYS_OF[1]},
    "scheduler": {"seal": KEYS_OF[2], "sign": KEYS_OF[3]},
    "operator": {"seal": KEYS_OF[4]},
}
FEATURE, LABEL = {"role": "feature", "cut": [4]}, {"role": "label"}
VALUES: dict[str, Any] = {"name": "credit", "seed": 7, "epochs": 20, "batch_size": 512, "parties": PARTIES}
BASE = {"model": "bank:BaseModel", "optimizer": {"name": "adam"}}
FUSE = {**BASE, "loss": "mse", "metrics": ["mae"]}


def job(**changes: Any) -> Job:
    return Job(**{**VALUES, **changes})


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def complaint(**changes: Any) -> str:
    with pytest.raises(JobError) as raised:
        job(**changes)
    return str(raised.value)


def party_complaint(**changes: Any) -> str:
    with pytest.raises(JobError) as raised:
        PartyFile(**{"party": "bank", "data": {"path": "bank.csv", "id": "id"}, "base": BASE, **changes})
    return str(raised.value)


def check_complaint(job_: Job, **changes: Any) -> str:
    values = {"party": "bank", "data": {"path": "bank.csv", "id": "id"}, "base": BASE, **changes}
    with pytest.raises(JobError) as raised:
        agree(job_, PartyFile(**{name: value for name, value in values.items() if value is not None}))
    return str(raised.value)
