"""The label holder: fuses activations and trains on labels that stay here."""

from workers.entry import main

if __name__ == "__main__":
    main("label")
