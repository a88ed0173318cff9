"""The paper's figures from one command: which models they need, a resumable plan, what holds."""
