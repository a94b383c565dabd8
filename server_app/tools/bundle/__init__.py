"""The app bundle in few bytes: what ``fedalloy submit`` sends where ``flwr run`` sends the sources uncompressed."""
