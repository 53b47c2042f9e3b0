"""The newest revision, for those that only compare it and need no alembic."""

HEAD = "0004"
"""What the code of this version works with."""
