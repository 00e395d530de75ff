"""Files that the broker and each party need to run at their own places."""
