"""A small app bundle: ``fedalloy submit`` sends it, whereas ``flwr run`` sends the sources uncompressed."""
