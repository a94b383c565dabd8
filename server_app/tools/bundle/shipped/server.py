"""The ServerApp of a packed app bundle; importing the package has put its sources on the path."""

from importlib import import_module

app = import_module("server_app.app").app
