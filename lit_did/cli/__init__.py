"""The command `lit-did`: one file a command, and `main.py` with the table of them."""
