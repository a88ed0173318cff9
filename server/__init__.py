"""The Flower ServerApp, the in-process simulation, certification and reports, and the CLI."""
