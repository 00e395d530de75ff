"""A feature party: trains its base model on columns that stay here."""

from workers.entry import main

if __name__ == "__main__":
    main("feature")
