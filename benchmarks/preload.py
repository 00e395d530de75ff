"""Imports of every benchmark process, made before it is forked."""

import gc

import torch._dynamo  # noqa: F401 - an optimizer's first step would import it, in every process

import sl_queue.launch.party
import sl_queue.launch.scheduler
import sl_queue.transport.rabbitmq.link  # noqa: F401

gc.freeze()  # as a worker does that has loaded: to look through all of this for garbage takes as long as many steps
