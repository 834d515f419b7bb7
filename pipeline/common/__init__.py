"""What any room may use: console, files, randomness, the machine, stopping and suggestions. It imports no other room."""
