"""The way from one set of tables to the next."""

HEAD = "0004"
"""The newest revision: what the code of this version works with."""
