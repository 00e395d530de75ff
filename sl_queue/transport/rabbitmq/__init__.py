"""A link over RabbitMQ. pika, its types and its exceptions stay in here; all of it works on one I/O thread."""
