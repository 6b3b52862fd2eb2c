"""Reads a command, or a script, as a shell does: words -> grammar -> filling -> script -> command. Nothing is run."""
