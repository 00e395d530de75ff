"""A party's own table: reading it, and its canonical order."""
