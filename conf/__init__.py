"""Hydra configuration groups; ``config.yaml`` composes them."""
