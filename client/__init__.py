"""The Flower ClientApp: what a device does with a message. Needs no Hydra and none of the server."""
