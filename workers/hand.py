"""A hand of a party: computes micro-batches for its worker, and may come and go at any moment."""

from workers.entry import main

if __name__ == "__main__":
    main("hand")
