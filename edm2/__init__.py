"""What the four commands share, one duty a file; imports the networks, never a command."""
