"""The embedded default: a tiny model and its data, made from text this folder generates."""
