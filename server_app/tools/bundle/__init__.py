"""The app bundle in few bytes: what ``fedalloy run`` sends where ``flwr run`` sends the sources uncompressed."""
