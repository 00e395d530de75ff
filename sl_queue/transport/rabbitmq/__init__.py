"""A link over RabbitMQ. pika, its types and its exceptions stay in here."""
