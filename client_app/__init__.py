"""The client: interprets plans, trains adapters on local data, keeps its slots on disk, reads its own socket."""
