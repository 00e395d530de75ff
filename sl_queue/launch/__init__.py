"""The composition root: the one place that joins a job, its adapters and a role.

`run_party` and `run_scheduler` are one role in this process until it ends; `sl_queue.local` has all, a thread each.
"""
