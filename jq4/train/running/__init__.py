"""The training loop and what it runs on: rows, devices, an optimizer, and a folder to go on from."""
