"""Definitions of a broker for a party's hands: a virtual host of their own, and two logins with the least rights there.

The lead, who is the party, may declare and empty what is its own; a hand may declare nothing but its own queue. Neither
can reach from there into the job, and a hand's login reaches nothing else.
"""

import re
from collections.abc import Mapping
from typing import Any

from sl_queue.config.job import Job
from sl_queue.deployment.definitions import (
    CHANNELS_PER_CONNECTION,
    CONNECTIONS_PER_USER,
    user_entry,
    user_of,
)
from sl_queue.protocol.hands import HANDS, LEAD, TASKS

MOST_HANDS = 256  # connections of a party's hands at once
SUFFIX = "-hand"  # of the folder with a hand's login


def hands_vhost(job: Job, party: str) -> str:
    """Return the virtual host in which a party meets its hands."""
    return f"{job.name}.{party}.hands"


def hand_user(job: Job, party: str) -> str:
    """Return the name with which the hands of a party log in."""
    return f"{job.name}.{party}.hand"


def permissions(job: Job, party: str) -> list[dict[str, Any]]:
    """Return the rights of the lead and of the hands, in RabbitMQ's own form."""
    own = re.escape(f"{job.name}.{party}.")
    hand = rf"{own}hand\.[0-9a-f]+"
    lead = {
        "configure": f"^{own}({LEAD}|{TASKS}|{HANDS})$",
        "write": rf"^(amq\.default|{own}{HANDS})$",
        "read": f"^{own}({LEAD}|{TASKS})$",
    }
    one = {
        "configure": f"^{hand}$",
        "write": rf"^(amq\.default|{hand})$",
        "read": f"^({hand}|{own}({TASKS}|{HANDS}))$",
    }
    vhost = hands_vhost(job, party)
    return [
        {"user": user_of(job, party), "vhost": vhost, **lead},
        {"user": hand_user(job, party), "vhost": vhost, **one},
    ]


def with_hands(known: dict[str, Any], job: Job, password_hashes: Mapping[str, str]) -> dict[str, Any]:
    """Add to a job's definitions what the hands of these parties need; hashes of their logins, by party."""
    found = {key: list(value) for key, value in known.items()}
    for party, password_hash in password_hashes.items():
        vhost, own = hands_vhost(job, party), f"{job.name}.{party}."
        found["vhosts"].append({"name": vhost})
        user = user_entry(hand_user(job, party), password_hash)
        limits = {"max-connections": MOST_HANDS, "max-channels": MOST_HANDS * CHANNELS_PER_CONNECTION}
        found["users"].append({**user, "limits": limits})
        found["permissions"] += permissions(job, party)
        value = {"max-connections": MOST_HANDS + CONNECTIONS_PER_USER, "max-queues": MOST_HANDS + 2}
        found["parameters"].append({"vhost": vhost, "component": "vhost-limits", "name": "limits", "value": value})
        kept = {"durable": True, "auto_delete": False, "arguments": {}}
        found["exchanges"].append({"name": own + HANDS, "vhost": vhost, "type": "fanout", "internal": False, **kept})
        found["queues"].append({"name": own + TASKS, "vhost": vhost, **kept})
    return found
