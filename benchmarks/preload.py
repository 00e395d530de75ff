"""What every benchmark process imports before it is forked."""

import sl_queue.launch.party
import sl_queue.launch.scheduler
import sl_queue.transport.rabbitmq  # noqa: F401
