"""Channels over a broker: `channel` keeps the recovery law, over a `Link` that is memory or RabbitMQ."""
