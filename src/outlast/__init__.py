"""Outlast keeps AI work alive: verified backups and checkpoints, chunk by chunk."""
