"""The ClientApp of a packed app bundle; importing the package has put its sources on the path."""

from importlib import import_module

app = import_module("client_app.app").app
