"""What `flwr run configs/flower` sends to the server and the nodes: a name for what is installed there."""

from moa.federated.flower import client_app, server_app

__all__ = ["client_app", "server_app"]
