"""Memlayer's models inside other projects' tools; each module needs that project installed."""
