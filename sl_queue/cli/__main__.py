"""`python -m sl_queue.cli`: the command `sl-queue` where its script is not on the path."""

from sl_queue.cli.main import main

if __name__ == "__main__":
    main()
