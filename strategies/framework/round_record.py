"""Keys of what ``settle`` returns: it stands as ``settled`` in ``rounds.jsonl``, and figures and reports read it.

A strategy may record more under names of its own; only readers of the file see that.
"""

from __future__ import annotations

from typing import Final

MERGED: Final = "merged"
"""How many clients' answers were merged, an integer."""
WEIGHTS: Final = "weights"
"""By client, a list with the weight of each of the server's models; or, if a client's two adapters are merged, a
mapping with ``weight`` (of the federated one) and the numbers behind it. Drawn as a heat map."""
RELATIONS: Final = "relations"
"""By client, the weight of each client's last upload in its merge, in order of client ids. Drawn as a heat map."""
RELEVANCE: Final = "relevance"
"""By client, how relevant each other client is to it, in order of client ids. Drawn as a heat map."""
ENTROPY: Final = "entropy"
"""Mean entropy of a client's relevance over its maximum, 0 to 1. Drawn by round."""
REPLACEMENTS: Final = "replacements"
"""By client and task: ``replaced`` (a boolean), ``source_loss`` and ``target_loss``. Drawn by round."""
WARNING: Final = "warning"
"""A sentence for whoever runs the federation; it is in the log, too."""
UNSOUND: Final = "unsound"
"""Set by the server: why this round's merge was not kept."""
