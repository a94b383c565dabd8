"""The Flower ClientApp: passes requests to the process that has the client's data.

If node-config names the socket of the owner's own service (``site-socket``), this process is a relay and imports
nothing but the relay. Otherwise the run brings the code that works on the data (:mod:`client_app.trainer.bundled`).
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query("register")
def register(message: Message, context: Context) -> Message:
    """Say who this client is, what its adapters look like, and how many examples it has."""
    if "site-socket" in context.node_config:
        from client_app.trainer import relay

        return relay.register(message, context)
    from client_app.trainer import bundled

    return bundled.register(message, context)


@app.train("plan")
def plan(message: Message, context: Context) -> Message:
    """Carry out a plan; all changes to slots become visible together, or none."""
    if "site-socket" in context.node_config:
        from client_app.trainer import relay

        return relay.plan(message, context)
    from client_app.trainer import bundled

    return bundled.plan(message, context)


@app.query("counters")
def counters(message: Message, context: Context) -> Message:
    """Only read the counters; they include the last reply of a run."""
    if "site-socket" in context.node_config:
        from client_app.trainer import relay

        return relay.counters(message, context)
    from client_app.trainer import bundled

    return bundled.counters(message, context)
