"""Fed-SmoothAdv's library: certifiably robust federated learning, without any federation runtime.

It depends on torch, numpy and scipy alone. See ``docs/architecture.md`` for who may import whom.
"""
