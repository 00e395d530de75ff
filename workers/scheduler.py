"""The scheduler: opens epochs, tracks progress, writes the history."""

from workers.entry import main

if __name__ == "__main__":
    main("scheduler")
