"""What `jq4 train` does: a task (what is trained, on what, by which loss), and the run that carries it out."""
