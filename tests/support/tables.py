"""Tables straight from a job and a party file; without torch."""

from sl_queue.config.job import Job, PartyFile
from sl_queue.config.resolve import table_spec
from sl_queue.config.user_code import Importer
from sl_queue.data import table
from sl_queue.protocol.table import Table


def read_table(job: Job, file: PartyFile) -> Table:
    """Read the table of a party."""
    return table.read_table(table_spec(job, file, Importer()))
